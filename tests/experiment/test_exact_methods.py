"""The methods of the enumerable world: their data, their loop, and what each does to a policy."""

from __future__ import annotations

import math
from copy import deepcopy
from functools import partial

import pytest
import torch

from dpo.core.exact import World
from dpo.core.losses import dpo, ipo
from dpo.errors import DivergedError
from dpo.evaluate.exact import Measures, correlation, coverage
from dpo.experiment.exact_config import PPOSettings
from dpo.experiment.exact_methods import (
    Fit,
    Pairs,
    Start,
    batches,
    descend,
    draw_prompts,
    fit_reward_model,
    label,
    prefer,
    prefer_online,
    preferred_ft,
    sample_pairs,
)
from dpo.experiment.exact_ppo import ppo
from dpo.experiment.exact_world import WORDS, log_policy, new_policy, reward_table, token_logps


def draw(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def start():
    """An untrained policy as the reference: nearly uniform."""
    policy = new_policy(0)
    uniform = torch.full((16,), 1 / 16, dtype=torch.float64)
    return Start(policy, World(uniform, log_policy(policy), reward_table()))


@pytest.fixture(scope="module")
def pairs(start):
    return sample_pairs(start.world, start.world.log_ref, 4_000, draw(1))


def final(snapshots):
    *_, last = snapshots
    return last


# -- data ----------------------------------------------------------------------------------------


def test_labels_follow_bradley_terry(start):
    world = start.world
    prompts = torch.zeros(20_000, dtype=torch.long)
    good, bad = int(world.reward[0].argmax()), int(world.reward[0].argsort()[1500])
    first, second = torch.full_like(prompts, bad), torch.full_like(prompts, good)
    found = label(world, prompts, first, second, draw())
    expected = torch.sigmoid(world.reward[0, good] - world.reward[0, bad])
    share = (found.chosen == good).double().mean()
    assert share == pytest.approx(float(expected), abs=4 * math.sqrt(0.25 / 20_000))
    assert (found.chosen + found.rejected == good + bad).all()


def test_pairs_come_from_the_policy_that_is_given(start):
    log_p = torch.full((16, 4096), -torch.inf, dtype=torch.float64)
    log_p[:, 7], log_p[:, 4000] = math.log(0.25), math.log(0.75)
    found = sample_pairs(start.world, log_p, 8_000, draw())
    both = torch.cat([found.chosen, found.rejected])
    assert set(both.tolist()) == {7, 4000}
    assert (both == 7).double().mean() == pytest.approx(0.25, abs=0.02)
    assert torch.bincount(found.prompts, minlength=16).min() > 400
    seen = found.covered(log_p.shape)
    assert seen.sum() == 32
    assert coverage(World(start.world.prompt_probs, log_p, start.world.reward), seen) == 1.0


def test_prompts_are_drawn_by_their_probabilities(start):
    probabilities = torch.tensor([0.7, 0.3], dtype=torch.float64)
    world = World(probabilities, torch.zeros(2, 1).double(), torch.zeros(2, 1).double())
    assert draw_prompts(world, 5_000, draw()).double().mean() == pytest.approx(0.3, abs=0.03)


def test_every_pass_has_every_row_once_but_a_short_remainder():
    rows = batches(10, 4, draw())
    first, second = ([next(rows), next(rows)] for _ in range(2))
    for passed in (first, second):
        assert len(set(torch.cat(passed).tolist())) == 8
    assert torch.cat(first).tolist() != torch.cat(second).tolist()
    assert sorted(next(batches(3, 4, draw())).tolist()) == [0, 1, 2]


# -- the loop ------------------------------------------------------------------------------------


def test_the_loop_descends_at_a_falling_rate_and_stops_at_its_checkpoints():
    x = torch.nn.Parameter(torch.tensor([3.0, -2.0]))
    places = [x.detach().clone()]

    def loss():
        places.append(x.detach().clone())
        return (x**2).sum()

    passed = list(descend([x], loss, Fit(40, 1, 0.1, {10, 40})))
    assert [step for step, _ in passed] == [10, 40]
    assert 0 < passed[0][1] < passed[1][1]
    assert x.norm() < places[0].norm() / 3
    moves = torch.stack([*places[1:], x.detach()]).diff(dim=0).abs().amax(dim=1)
    assert moves[0] == pytest.approx(0.1, rel=1e-3)  # Adam's first step is the rate
    assert moves[-1] < 0.1 / 40 * 1.5


def test_a_loss_that_is_not_finite_ends_the_loop_with_its_step():
    x = torch.nn.Parameter(torch.ones(1))
    values = iter([x.sum(), x.sum(), x.sum() * math.nan])
    with pytest.raises(DivergedError, match="Step 3: the loss is nan"):
        list(descend([x], lambda: next(values), Fit(5, 1, 0.0, set())))


# -- the methods ---------------------------------------------------------------------------------


def test_dpo_comes_nearer_to_the_optimum_and_leaves_the_reference_alone(start, pairs):
    before = deepcopy(start.reference.state_dict())
    fit = Fit(40, 64, 2e-3, {10})
    measures = Measures(start.world)
    found = [
        measures(snapshot.log_policy, beta=1.0)
        for snapshot in prefer(start, pairs, partial(dpo, beta=1.0), fit, draw())
    ]
    at_start = measures(start.world.log_ref, beta=1.0)
    assert found[1].kl_to_optimum < found[0].kl_to_optimum < at_start.kl_to_optimum
    assert found[1].gain > 0.2
    assert found[1].correlation > 0.4
    for name, tensor in start.reference.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_the_first_step_on_pairs_is_that_of_the_loss_by_hand(start, pairs):
    """One step of SGD's direction: the gradient of IPO on the batch that is drawn."""
    policy = deepcopy(start.reference)
    batch = pairs[next(batches(len(pairs), 32, draw(9)))]
    sums = [token_logps(policy, batch.prompts, y).sum(-1) for y in (batch.chosen, batch.rejected)]
    references = [
        start.world.log_ref[batch.prompts, y].float() for y in (batch.chosen, batch.rejected)
    ]
    ipo(*sums, *references, beta=0.2).mean().backward()
    gradient = policy.lm_head.weight.grad
    moved = final(prefer(start, pairs, partial(ipo, beta=0.2), Fit(1, 32, 1e-4, {1}), draw(9)))
    by_hand = deepcopy(start.reference)
    with torch.no_grad():
        for own, other in zip(by_hand.parameters(), policy.parameters(), strict=True):
            own -= 1e-4 * other.grad.sign()  # Adam's first step
    assert gradient.abs().sum() > 0
    torch.testing.assert_close(moved.log_policy, log_policy(by_hand), atol=2e-4, rtol=0)


def test_online_dpo_labels_its_own_responses(start, monkeypatch):
    """Pairs of a later round come from the policy of then, which prefers other responses."""
    labelled = []

    def remembered(world, prompts, first, second, generator):
        labelled.append(label(world, prompts, first, second, generator))
        return labelled[-1]

    monkeypatch.setattr("dpo.experiment.exact_methods.label", remembered)
    loss, fit = partial(dpo, beta=0.1), Fit(24, 64, 3e-3, {24})
    final(prefer_online(start, loss, fit, draw(), pairs_per_round=128, passes=2))
    assert [len(pairs) for pairs in labelled] == [128] * 6  # 24 steps of 64, each pair twice

    def mean_reward(pairs: Pairs) -> float:
        responses = torch.cat([pairs.chosen, pairs.rejected])
        return float(start.world.reward[pairs.prompts.repeat(2), responses].mean())

    assert mean_reward(labelled[-1]) > mean_reward(labelled[0]) + 0.2


def test_preferred_ft_imitates_the_chosen_responses(start, pairs):
    found = final(preferred_ft(start, pairs, Fit(40, 64, 3e-3, {40}), draw()))

    def likelihood(table, responses):
        return float(table[pairs.prompts, responses].mean())

    gained = [
        likelihood(found.log_policy, y) - likelihood(start.world.log_ref, y)
        for y in (pairs.chosen, pairs.rejected)
    ]
    assert gained[0] > gained[1] + 0.1


def test_a_reward_model_learns_what_the_labels_say(start):
    """Here: that a response should end with "good", which takes no composition."""
    ends_well = (torch.arange(4096) % len(WORDS) == WORDS.index("good")).double()
    world = World(start.world.prompt_probs, start.world.log_ref, 6 * ends_well.expand(16, -1))
    pairs = sample_pairs(world, world.log_ref, 2_000, draw(2))
    model = fit_reward_model(Start(start.reference, world), pairs, Fit(40, 64, 3e-3, ()), draw())
    assert correlation(world, model.scores) > 0.9
    assert model.seconds > 0


SHORT = PPOSettings(rounds=6, rollouts=128, epochs=2, minibatch_size=64, learning_rate=3e-3)


def test_ppo_on_the_true_reward_raises_it(start):
    assert SHORT.steps == 24
    arguments = {"checkpoints": {24}, "generator": draw()}
    found = final(ppo(start, start.world.reward, SHORT, beta=0.1, **arguments))
    measures = Measures(start.world)
    assert measures(found.log_policy).reward > measures.reference_reward + 0.5


def test_a_large_beta_keeps_ppo_near_the_reference(start):
    divergence = []
    for beta in (0.1, 30.0):
        arguments = {"checkpoints": {24}, "generator": draw()}
        found = final(ppo(start, start.world.reward, SHORT, beta=beta, **arguments))
        divergence.append(Measures(start.world)(found.log_policy).kl)
    assert divergence[1] < divergence[0] / 4


def test_ppo_follows_the_scores_that_it_is_given(start):
    arguments = {"checkpoints": {24}, "generator": draw()}
    found = final(ppo(start, -start.world.reward, SHORT, beta=0.1, **arguments))
    measures = Measures(start.world)
    assert measures(found.log_policy).reward < measures.reference_reward - 0.5
