"""What is computed of a policy that is a table."""

import math

import pytest
import torch

from dpo.core import exact
from dpo.core.rewards import preference_table
from dpo.evaluate.exact import Measures, correlation, coverage, win_probabilities


def world() -> exact.World:
    draw = torch.Generator().manual_seed(3)
    log_ref = torch.randn(2, 30, generator=draw, dtype=torch.float64).log_softmax(-1)
    reward = torch.randint(0, 6, (2, 30), generator=draw).double() / 2
    return exact.World(torch.tensor([0.25, 0.75], dtype=torch.float64), log_ref, reward)


def test_the_optimum_gets_everything_that_is_possible():
    here = world()
    seen = torch.zeros(2, 30, dtype=torch.bool)
    seen[:, :10] = True
    found = Measures(here)(here.optimum(beta=0.4), beta=0.4, seen=seen)
    ones = (found.efficiency, found.gain, found.correlation)
    assert ones == pytest.approx((1.0, 1.0, 1.0), abs=1e-9)
    zeros = (found.total_variation, found.kl_to_optimum, found.error_seen, found.error_unseen)
    assert zeros == pytest.approx((0.0, 0.0, 0.0, 0.0), abs=1e-9)
    mass = here.log_ref.exp()[:, :10].sum(-1)
    assert found.coverage == pytest.approx(0.25 * float(mass[0]) + 0.75 * float(mass[1]))


def test_the_reference_gains_nothing_and_has_no_efficiency():
    here = world()
    found = Measures(here)(here.log_ref, beta=0.4)
    assert (found.kl, found.gain) == pytest.approx((0.0, 0.0), abs=1e-12)
    assert (found.efficiency, found.correlation, found.coverage) == (None, None, None)
    assert found.win_rate == pytest.approx(0.5)


def test_a_policy_that_runs_away_is_told_from_the_optimum_of_its_kl():
    here = world()
    away = here.optimum(beta=-0.4 + 0.8)  # the optimum, then the same for the opposite reward
    opposite = exact.World(here.prompt_probs, here.log_ref, -here.reward).optimum(beta=0.4)
    measures = Measures(here)
    assert measures(away, beta=0.4).efficiency == pytest.approx(1.0)
    found = measures(opposite, beta=0.4)
    assert found.efficiency < 0
    assert found.gain < 0
    assert found.correlation == pytest.approx(-1.0)


def test_without_a_beta_the_optimum_of_the_same_kl_is_what_counts():
    here = world()
    found = Measures(here)(here.optimum(beta=0.4))
    assert (found.total_variation, found.kl_to_optimum) == pytest.approx((0.0, 0.0), abs=1e-8)
    assert (found.gain, found.error_seen) == (None, None)


def test_the_win_rate_is_that_of_all_pairs_of_responses():
    here = world()
    policy = here.optimum(beta=0.7)
    by_hand = exact.win_rate(policy, here.log_ref, preference_table(here.reward))
    torch.testing.assert_close((policy.exp() * win_probabilities(here)).sum(-1), by_hand)
    found = Measures(here)(policy).win_rate
    assert found == pytest.approx(float(here.prompt_probs @ by_hand))


def test_the_correlation_is_pearsons_within_prompts():
    here = world()
    draw = torch.Generator().manual_seed(4)
    scores = torch.randn(2, 30, generator=draw, dtype=torch.float64)
    expected = []
    for prompt in range(2):
        p = here.log_ref[prompt].exp()
        a, b = scores[prompt], here.reward[prompt]
        a, b = a - p @ a, b - p @ b
        expected.append(float((p @ (a * b)) / math.sqrt((p @ a**2) * (p @ b**2))))
    found = correlation(here, scores)
    assert found == pytest.approx(0.25 * expected[0] + 0.75 * expected[1])
    shifted = 3 * scores + torch.tensor([[5.0], [-7.0]])  # of a prompt, and in scale
    assert correlation(here, shifted) == pytest.approx(found)


def test_a_policy_without_full_support_has_no_correlation_and_a_kl():
    here = world()
    half = here.log_ref.clone()
    half[:, ::2] = -math.inf
    found = Measures(here)(half.log_softmax(-1))
    assert found.correlation is None
    mass = here.log_ref[:, 1::2].exp().sum(-1)
    assert found.kl == pytest.approx(float(here.prompt_probs @ -mass.log()))


def test_pairs_that_show_everything_leave_no_error_unseen():
    here = world()
    everything = torch.ones(2, 30, dtype=torch.bool)
    found = Measures(here)(here.optimum(beta=1.0), beta=0.5, seen=everything)
    assert coverage(here, everything) == pytest.approx(1.0)
    assert found.error_seen > 0.01
    assert found.error_unseen is None
