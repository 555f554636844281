"""Reward against KL: the exact frontier at a KL, hulls of measured points, areas."""

import math

import numpy as np
import pytest
import torch

from dpo.core import exact
from dpo.core.frontier import (
    Point,
    area_under,
    concave_hull,
    merge_equal_rewards,
    optimum_at_kl,
    reward_at_kl,
    tuned_rewards,
)
from dpo.errors import InputError


def small_world(seed: int = 0) -> exact.World:
    """Three prompts, 40 responses, rewards with many ties and another number of levels for each."""
    draw = torch.Generator().manual_seed(seed)
    log_ref = torch.randn(3, 40, generator=draw, dtype=torch.float64).log_softmax(-1)
    levels = torch.tensor([[3.0], [5.0], [7.0]], dtype=torch.float64)
    reward = (levels * torch.rand(3, 40, generator=draw, dtype=torch.float64)).floor() / 2
    return exact.World(torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64), log_ref, reward)


def test_merging_equal_rewards_leaves_the_frontier_as_it_is():
    world = small_world()
    merged = merge_equal_rewards(world)
    assert merged.reward.shape[1] <= 7 < world.reward.shape[1]
    betas = [3.0, 0.5, 0.05]
    for values, expected in zip(merged.frontier(betas)[1:], world.frontier(betas)[1:], strict=True):
        torch.testing.assert_close(values, expected)


@pytest.mark.parametrize("beta", [5.0, 0.7, 0.1])
def test_the_optimum_at_the_kl_of_an_optimum_is_that_optimum(beta):
    world = small_world()
    own = world.optimum(beta=beta)
    found = optimum_at_kl(world, float(world.kl_to_ref(own)))
    assert found.beta == pytest.approx(beta, rel=1e-6)
    assert found.reward == pytest.approx(float(world.expected_reward(own)), abs=1e-9)


def test_no_policy_has_more_reward_at_its_kl():
    world = small_world()
    draw = torch.Generator().manual_seed(1)
    for scale in (0.1, 1.0, 3.0):
        noise = scale * torch.randn(world.log_ref.shape, generator=draw, dtype=torch.float64)
        policy = (world.log_ref + world.reward + noise).log_softmax(-1)
        best = optimum_at_kl(world, float(world.kl_to_ref(policy)))
        assert best.reward > float(world.expected_reward(policy))


def test_at_no_kl_stands_the_reference_and_beyond_the_last_the_greedy_policy():
    world = small_world()
    still, greedy = optimum_at_kl(world, 0.0), optimum_at_kl(world, 100.0)
    assert still.reward == pytest.approx(float(world.expected_reward(world.log_ref)), abs=1e-3)
    best = world.prompt_probs @ world.reward.max(dim=-1).values
    assert greedy.reward == pytest.approx(float(best))
    for kl in (-0.1, math.nan):
        with pytest.raises(InputError, match="a KL is at least 0"):
            optimum_at_kl(world, kl)


def random_points(seed: int) -> list[Point]:
    draw = np.random.default_rng(seed)
    return [Point(0.0, 0.3), *(Point(*map(float, xy)) for xy in draw.random((12, 2)))]


@pytest.mark.parametrize("seed", range(5))
def test_a_hull_is_the_least_concave_rising_curve_above_its_points(seed):
    points = random_points(seed)
    hull = concave_hull(points)
    assert set(hull) <= set(points)
    for point in points:
        # Above all points that are not further away, and all mixtures across this KL.
        mixtures = [
            a.reward + (point.kl - a.kl) / (b.kl - a.kl) * (b.reward - a.reward)
            for a in points
            for b in points
            if a.kl < point.kl < b.kl
        ]
        nearer = [other.reward for other in points if other.kl <= point.kl]
        assert reward_at_kl(hull, point.kl) == pytest.approx(max([*mixtures, *nearer]))
    slopes = np.diff([p.reward for p in hull]) / np.diff([p.kl for p in hull])
    assert (slopes > 0).all()
    assert (np.diff(slopes) < 0).all()


def test_a_policy_on_the_hull_between_two_policies_exists():
    """The mixture of two policies has the mean reward, and at most the mean KL."""
    world = small_world()
    ends = [world.optimum(beta=beta) for beta in (2.0, 0.1)]
    mixture = (ends[0].exp() / 2 + ends[1].exp() / 2).log()
    rewards = [float(world.expected_reward(policy)) for policy in ends]
    kls = [float(world.kl_to_ref(policy)) for policy in ends]
    assert float(world.expected_reward(mixture)) == pytest.approx(np.mean(rewards))
    assert float(world.kl_to_ref(mixture)) < np.mean(kls)


@pytest.mark.parametrize("max_kl", [0.05, 0.4, 3.0])
def test_the_area_is_that_of_a_fine_sum(max_kl):
    hull = concave_hull(random_points(7))
    x = np.linspace(0, max_kl, 20_001)
    heights = np.array([reward_at_kl(hull, float(kl)) for kl in x]) - 0.3
    assert area_under(hull, max_kl) == pytest.approx(np.trapezoid(heights, x), rel=1e-4)


def exact_points(world):
    found = world.frontier([10 ** (k / 20) for k in range(60, -61, -1)])
    optima = [Point(*xy) for xy in zip(found.kl.tolist(), found.reward.tolist(), strict=True)]
    return [Point(0.0, float(world.expected_reward(world.log_ref))), *optima]


def test_a_few_optima_tuned_are_the_exact_frontier_between_them():
    """Where the hull of the same policies is below it."""
    world = small_world()
    exact = exact_points(world)
    policies = [world.optimum(beta=beta) for beta in (2.0, 0.3, 0.02)]
    points = [Point(float(world.kl_to_ref(p)), float(world.expected_reward(p))) for p in policies]
    kls = np.linspace(0.01, points[-1].kl, 7)
    expected = [optimum_at_kl(world, float(kl)).reward for kl in kls]
    assert tuned_rewards(points, exact, kls) == pytest.approx(np.array(expected), abs=2e-3)
    hull = concave_hull([exact[0], *points])
    assert reward_at_kl(hull, 0.3) < optimum_at_kl(world, 0.3).reward - 0.05


def test_a_policy_that_gains_half_of_what_is_possible_does_so_at_any_smaller_kl():
    world = small_world()
    exact = exact_points(world)
    start, far = exact[0].reward, exact[-1].kl
    half = Point(1.0, start + (optimum_at_kl(world, 1.0).reward - start) / 2)
    found = tuned_rewards([half], exact, [0.0, 0.5, 1.0, far])
    between = start + (optimum_at_kl(world, 0.5).reward - start) / 2
    assert found == pytest.approx([start, between, half.reward, half.reward], abs=1e-3)


def test_more_kl_with_less_reward_takes_nothing_away():
    exact = [Point(0.0, 0.0), Point(4.0, 4.0)]
    kls = np.linspace(0, 3, 61)
    found = tuned_rewards([Point(1.0, 0.9), Point(2.0, 0.5)], exact, kls)
    assert (np.diff(found) >= 0).all()
    # Between the two: the most of KL · efficiency, (0.9 - 0.65 (kl - 1)) kl, is at kl = 1.55 / 1.3.
    assert found[-1] == pytest.approx(1.55**2 / (4 * 0.65), abs=1e-3)
    assert found[20] == pytest.approx(0.9)


def test_a_frontier_says_nothing_before_its_first_point():
    with pytest.raises(InputError, match=r"no point at a KL of 0\.5"):
        reward_at_kl([Point(1.0, 2.0)], 0.5)
