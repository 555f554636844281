"""What a round's responses are scored with, and the loss on them through a real model."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from dpo.config_files import validate
from dpo.data.tokenize import TokenSequence
from dpo.models.actor_critic import ActorCritic, token_mask
from dpo.models.load import fuse_activations
from dpo.models.plan import scoring_plan
from dpo.models.scoring import response_logps, response_token_logps
from dpo.online_config import PPOConfig
from dpo.train.ppo import PPOMethod
from dpo.train.rollouts import Rollouts, make_targets, roll_out
from dpo.train.samples import Samples

VOCAB, END = 24, 0
SHAPES = [(3, 4), (3, 1), (6, 5), (6, 2), (1, 7), (1, 3)]
"""Tokens of a prompt and of a response; two responses to each of three prompts."""


def tiny(seed=0, width=16):
    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=VOCAB, n_embd=width, n_layer=2, n_head=2, n_positions=32, use_cache=False
    )
    model = GPT2LMHeadModel(config)
    for parameter in model.parameters():  # far from uniform, so that mistakes show
        parameter.data.mul_(3.0)
    return fuse_activations(model.eval())


def actor_critic(kind, policy=None, seed=1):
    """With a value head that says something."""
    policy = policy or tiny()
    model = ActorCritic(policy, None if kind == "shared" else tiny(5).base_model)
    draw = torch.Generator().manual_seed(seed)
    torch.nn.init.normal_(model.value_head.weight, std=0.3, generator=draw)
    torch.nn.init.normal_(model.value_head.bias, generator=draw)
    return model


KINDS = pytest.mark.parametrize("kind", ["shared", "separate"])


def sequences(seed=0):
    draw = torch.Generator().manual_seed(seed)
    found, prompt = [], ()
    for i, (before, after) in enumerate(SHAPES):
        ids = torch.randint(1, VOCAB, (before + after,), generator=draw).tolist()
        prompt = prompt if i % 2 else tuple(ids[:before])
        found.append(TokenSequence((*prompt, *ids[before:-1], END), before))
    return found


def some_samples(seed=0):
    draw = torch.Generator().manual_seed(seed)
    rewards = torch.randn(3, 2, generator=draw, dtype=torch.float64)
    truncated = torch.tensor([False, True, False, False, True, False])
    return Samples(sequences(seed), rewards, truncated)


def method_of(policy, changes=None, samples=None, reference=None):
    """A method whose first round has the given samples, begun."""
    values = {
        "model": "runs/sft",
        "out": "runs/ppo",
        "reward": {"function": "synthetic"},
        "prompts_per_round": 3,
        "samples_per_prompt": 2,
        "batch": {"size": 6},
        "kl": {"coefficient": 0.1},
    }
    method = PPOMethod(
        config=validate(PPOConfig, values | (changes or {})),
        draw=lambda model, number: samples or some_samples(),
        reference=reference or tiny(7),
        on_policy=None,
        save=None,
    )
    method.rows(policy, 0, method.config)
    return method


def moved(policy, size=0.02, seed=3):
    """Change every weight a little, as some steps would."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in policy.parameters():
            noise = torch.randn(parameter.shape, generator=draw, dtype=parameter.dtype)
            parameter.add_(size * noise)


# -- the model ---------------------------------------------------------------------------------


@KINDS
def test_log_probs_are_those_of_dpo_and_values_a_head_on_the_states_before(kind):
    model = actor_critic(kind)
    trunk = model.trunk or model.policy.base_model
    with torch.no_grad():
        logps, values = model(sequences())
        torch.testing.assert_close(logps.sum(1), response_logps(model.policy, sequences()))
        torch.testing.assert_close(logps, response_token_logps(model.policy, sequences()))
        for i, s in enumerate(sequences()):
            ids = torch.tensor([s.ids])
            states = trunk(input_ids=ids).last_hidden_state[0, s.prompt_length - 1 : -1]
            expected = states @ model.value_head.weight[0] + model.value_head.bias
            own = values[i, : s.num_scored]
            torch.testing.assert_close(own, expected.double(), atol=1e-5, rtol=1e-5)
            log_probs = model.policy(input_ids=ids).logits[0].log_softmax(-1)
            places = range(s.prompt_length, len(s))
            plain = torch.stack([log_probs[t - 1, s.ids[t]] for t in places])
            torch.testing.assert_close(
                logps[i, : s.num_scored], plain.double(), atol=1e-5, rtol=1e-5
            )
    assert values.std() > 0.1


@KINDS
def test_places_behind_a_response_are_zero_and_the_mask_says_which(kind):
    mask = token_mask(sequences())
    assert mask.sum(1).tolist() == [after for _, after in SHAPES]
    assert mask.shape == (6, 7)
    for tensor in actor_critic(kind)(sequences()):
        assert tensor.dtype == torch.float64
        assert not tensor[~mask].any()
        assert tensor[mask].all()


@KINDS
def test_a_value_looks_at_what_came_before_its_token_only(kind):
    model = actor_critic(kind)
    first = sequences()[2]
    other = TokenSequence((*first.ids[:8], 5 if first.ids[8] != 5 else 6, *first.ids[9:]), 6)
    with torch.no_grad():
        a, b = model([first])[1][0], model([other])[1][0]
    torch.testing.assert_close(a[:3], b[:3])  # token 8 is the response's third
    assert (a[3:] - b[3:]).abs().min() > 1e-4


@KINDS
def test_a_new_value_function_expects_nothing(kind):
    model = ActorCritic(tiny(), None if kind == "shared" else tiny().base_model)
    assert not model(sequences())[1].any()


@KINDS
def test_neither_company_nor_the_token_budget_changes_a_response(kind):
    model = actor_critic(kind)
    with torch.no_grad():
        whole = model(sequences())
        for budget in (1, 20):
            parts = model(sequences(), max_tokens=budget)
            for a, b in zip(whole, parts, strict=True):
                torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
        reverse = model(sequences()[::-1])
        for a, b in zip(whole, reverse, strict=True):
            torch.testing.assert_close(a, b.flip(0), atol=1e-5, rtol=1e-5)


@KINDS
def test_padded_rows_give_what_packed_ones_give(kind, monkeypatch):
    packed = actor_critic(kind)
    expected = packed(sequences())
    for module in ("plan", "actor_critic"):
        monkeypatch.setattr(f"dpo.models.{module}.why_not_packed", lambda *a: "it must not be")
    padded = actor_critic(kind)
    found = padded(sequences())
    assert scoring_plan(packed.policy).packed
    assert not scoring_plan(padded.policy).packed
    for a, b in zip(expected, found, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def test_a_model_that_is_scored_through_its_own_head_has_the_same_values():
    model = actor_critic("shared")
    expected = model(sequences())
    head = model.policy.get_output_embeddings()
    head.forward = head.forward  # what a library that wraps modules leaves behind
    for a, b in zip(expected, model(sequences()), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def test_the_trunk_is_trained_apart_or_together():
    for kind, apart in (("shared", False), ("separate", True)):
        model = actor_critic(kind)
        model(sequences())[1].sum().backward()
        touched = any(p.grad is not None and p.grad.any() for p in model.policy.parameters())
        assert touched is not apart


# -- rollouts ----------------------------------------------------------------------------------


def rolled_out(policy=None, reference=None):
    return roll_out(
        policy or actor_critic("shared"), reference or tiny(7), some_samples(), max_tokens=4096
    )


def targets_of(rollouts, **changes):
    settings = {
        "kl_coefficient": 0.1,
        "kl_estimator": "k1",
        "missing_eos_penalty": 0.0,
        "gamma": 1.0,
        "gae_lambda": 0.95,
        "whitened": False,
    }
    return make_targets(rollouts, **settings | changes)


def test_a_rollout_holds_what_both_models_say():
    policy, reference = actor_critic("separate"), tiny(7)
    found = rolled_out(policy, reference)
    logps, values = policy(sequences())
    torch.testing.assert_close(found.logps, logps)
    torch.testing.assert_close(found.values, values)
    torch.testing.assert_close(found.reference_logps.sum(1), response_logps(reference, sequences()))
    assert not any(x.requires_grad for x in found.as_tensors().values())
    assert policy.training is reference.training is False


def test_rollouts_survive_a_checkpoint_bit_for_bit():
    found = rolled_out()
    again = Rollouts.from_tensors(found.as_tensors())
    assert again.samples.sequences == found.samples.sequences
    for name, tensor in found.as_tensors().items():
        assert torch.equal(again.as_tensors()[name], tensor)
    assert again.metrics() == found.metrics()
    assert torch.equal(targets_of(again).advantages, targets_of(found).advantages)


@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_the_return_of_a_response_is_its_score_less_its_kl(estimator):
    found = rolled_out()
    targets = targets_of(found, gae_lambda=1.0, kl_estimator=estimator)
    kl = found.kl(estimator)
    torch.testing.assert_close(targets.returns[:, 0], found.scores - 0.1 * kl.sum(1))
    assert kl.abs().sum() > 1
    expected = (found.scores - 0.1 * kl.sum(1)).mean().item()
    assert targets.metrics["samples/penalised_reward"] == pytest.approx(expected)
    free = targets_of(found, gae_lambda=1.0, kl_coefficient=0.0, kl_estimator=estimator)
    own = found.mask
    torch.testing.assert_close(free.returns[own], found.scores[:, None].expand_as(own)[own])


def test_only_a_response_that_was_cut_pays_for_its_missing_end():
    found = rolled_out()
    plain, fined = targets_of(found), targets_of(found, missing_eos_penalty=2.0)
    last = found.mask.sum(1) - 1
    paid = (plain.returns - fined.returns).gather(1, last[:, None]).flatten()
    torch.testing.assert_close(paid, 2.0 * found.samples.truncated.double())


@pytest.mark.parametrize("whitened", [False, True])
def test_there_is_no_advantage_behind_the_end_token(whitened):
    found = rolled_out()
    targets = targets_of(found, whitened=whitened)
    for tensor in (targets.advantages, targets.returns):
        assert not tensor[~found.mask].any()
        assert tensor[found.mask].abs().min() > 0
    if whitened:
        own = targets.advantages[found.mask]
        assert own.mean().item() == pytest.approx(0, abs=1e-12)
        assert own.std(unbiased=False).item() == pytest.approx(1)


def test_what_is_logged_of_a_round_is_true():
    found = rolled_out()
    logged = found.metrics()
    d = (found.logps - found.reference_logps)[found.mask]
    assert logged["samples/kl_k1"] == pytest.approx(d.sum().item() / 6)
    assert logged["samples/kl_k3"] == pytest.approx(((-d).exp() - 1 + d).sum().item() / 6)
    assert logged["samples/entropy"] == pytest.approx(-found.logps[found.mask].mean().item())
    assert logged["samples/reward"] == pytest.approx(some_samples().rewards.mean().item())
    assert logged["samples/truncated"] == pytest.approx(2 / 6)
    assert logged["samples/tokens"] == pytest.approx(22 / 6)


# -- the loss through the model ----------------------------------------------------------------


@KINDS
def test_on_the_first_minibatch_every_ratio_is_one(kind):
    policy = actor_critic(kind)
    method = method_of(policy)
    rows = [4, 1, 3]
    logps, _ = policy([method.rollouts.samples.sequences[row] for row in rows])
    old = method.rollouts.logps[rows, : logps.shape[1]]
    assert (logps - old).abs().max() < 1e-6
    sums, count = method.loss(policy, rows).sums, method.weight(rows)
    assert sums["ppo/approximate_kl"] / count < 1e-12
    assert sums["ppo/clip_fraction"] == 0
    advantages = method.targets.advantages[rows].sum().item()
    assert sums["ppo/policy_loss"] == pytest.approx(-advantages, abs=1e-5)


@KINDS
def test_without_an_advantage_the_policy_has_no_gradient_and_without_an_error_the_values(kind):
    policy = actor_critic(kind)
    method = method_of(policy, {"value_coefficient": 1e-30})
    method.targets.advantages.zero_()
    method.loss(policy, range(6)).loss.backward()
    norms = [p.grad.norm().item() for p in policy.parameters() if p.grad is not None]
    assert max(norms) < 1e-20
    assert len(norms) > 10


@KINDS
def test_the_whole_gradient_is_that_of_finite_differences(kind):
    """In float64, away from the old policy, with clipped and unclipped tokens."""
    policy = actor_critic(kind).double()
    method = method_of(policy, {"value_coefficient": 0.5}, reference=tiny(7).double())
    moved(policy, size=0.03)
    parameters = list(policy.parameters())

    def loss():
        return method.loss(policy, range(6)).loss

    value = method.loss(policy, range(6))
    assert 0.1 < value.sums["ppo/clip_fraction"] / method.weight(range(6)) < 0.9
    gradients = torch.autograd.grad(value.loss, parameters)
    for seed in range(4):
        draw = torch.Generator().manual_seed(seed)
        directions = [torch.randn(p.shape, generator=draw, dtype=p.dtype) for p in parameters]
        expected = sum((g * d).sum() for g, d in zip(gradients, directions, strict=True)).item()
        step, values = 1e-6, []
        with torch.no_grad():
            for sign in (1, -2, 1):
                for p, d in zip(parameters, directions, strict=True):
                    p.add_(sign * step * d)
                values.append(loss().item())
        slope = (values[0] - values[1]) / (2 * step)
        assert slope == pytest.approx(expected, rel=1e-6, abs=1e-6)


@KINDS
def test_a_batch_in_parts_has_the_gradient_of_the_whole(kind):
    policy = actor_critic(kind).double()
    method = method_of(policy, reference=tiny(7).double())
    moved(policy)
    rows = [5, 0, 3, 2, 4, 1]

    def gradient(parts):
        policy.zero_grad()
        sums = {}
        for part in parts:
            result = method.loss(policy, part)
            (result.loss / method.weight(rows)).backward()
            for name, value in result.sums.items():
                sums[name] = sums.get(name, 0.0) + value / method.weight(rows)
        return [p.grad.clone() for p in policy.parameters() if p.grad is not None], sums

    whole, logged = gradient([rows])
    for parts in ([[row] for row in rows], [[5, 0], [3, 2, 4, 1]]):
        split, also = gradient(parts)
        for a, b in zip(whole, split, strict=True):
            torch.testing.assert_close(a, b, atol=1e-12, rtol=1e-9)
        assert also == pytest.approx(logged)


def test_longer_padding_changes_no_gradient():
    """The same rows in a round whose longest response is longer."""
    policy = actor_critic("shared").double()
    method = method_of(policy, reference=tiny(7).double())
    moved(policy)
    short = method.loss(policy, [1, 3]).loss
    wide = {
        name: torch.nn.functional.pad(x, (0, 5), value=math.nan)
        for name, x in method.rollouts.as_tensors().items()
        if name in ("logps", "reference_logps", "values")
    }
    width = wide["logps"].shape[1]
    assert width == 12
    method.rollouts = Rollouts(method.rollouts.samples, **wide)
    torch.testing.assert_close(method.loss(policy, [1, 3]).loss, short)


def test_the_reference_and_the_old_policy_are_never_touched():
    policy, reference = actor_critic("separate"), tiny(7)
    before = copy.deepcopy(reference.state_dict())
    method = method_of(policy, reference=reference)
    method.loss(policy, range(6)).loss.backward()
    assert all(p.grad is None for p in reference.parameters())
    assert all(torch.equal(x, before[name]) for name, x in reference.state_dict().items())


def test_every_response_comes_once_an_epoch_in_another_order_each_time():
    policy = actor_critic("shared")
    changes = {"batch": {"size": 4}, "epochs_per_round": 3, "rounds": 2}
    method = method_of(policy, changes)
    assert method.steps_per_pass(method.config) == 6
    assert method.num_steps(method.config) == 12
    order = [method.rows(policy, step, method.config) for step in range(12)]
    epochs = [order[i] + order[i + 1] for i in range(0, 12, 2)]
    assert all(sorted(epoch) == list(range(6)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 6
    assert method.round == 1
