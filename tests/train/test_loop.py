"""One optimizer step: accumulation, dropout, clipping, and the stop before a non-finite update."""

import copy
import math

import numpy as np
import pytest
import torch

from dpo.config import DPOLossConfig, SFTConfig
from dpo.config_files import validate
from dpo.data.tokenize import TokenSequence
from dpo.errors import DivergedError
from dpo.models.fresh import fresh_gpt2
from dpo.models.load import weights_digest
from dpo.models.recompute import enable_recomputation
from dpo.train.encoded import EncodedPair, sequences_of
from dpo.train.loop import Progression, total_steps, training_step, warn_of_warmup
from dpo.train.preference import PreferenceMethod
from dpo.train.reference import score_all
from dpo.train.schedule import adamw
from dpo.train.sft import SupervisedMethod

NUM_ROWS = 11


@pytest.fixture(scope="module")
def start(tokenizer):
    return fresh_gpt2(width=16, layers=1, heads=2, positions=64, tokenizer=tokenizer, seed=0)


def sequence(rng, prompt):
    response = tuple(map(int, rng.integers(0, 300, rng.integers(1, 40))))
    return TokenSequence(prompt + response, len(prompt))


def prompts(rng):
    return [tuple(map(int, rng.integers(0, 300, rng.integers(1, 20)))) for _ in range(NUM_ROWS)]


def sft_method(start, max_tokens=4096, precision="fp32"):
    rng = np.random.default_rng(1)
    rows = [sequence(rng, prompt) for prompt in prompts(rng)]
    sources = [f"rows.jsonl:{i}" for i in range(1, NUM_ROWS + 1)]
    return SupervisedMethod(rows, rows[:3], sources, precision, max_tokens, lambda model, to: None)


def dpo_method(start, max_tokens=4096, precision="fp32", smoothing=0.0):
    rng = np.random.default_rng(2)
    pairs = [
        EncodedPair(sequence(rng, prompt), sequence(rng, prompt), f"prefs.jsonl:{i}")
        for i, prompt in enumerate(prompts(rng), 1)
    ]
    logps = score_all(start, sequences_of(pairs), precision=precision, max_tokens=max_tokens)
    return PreferenceMethod(
        train=pairs,
        test=pairs,
        train_reference=logps,
        test_reference=logps,
        loss_config=DPOLossConfig(beta=0.5, label_smoothing=smoothing),
        precision=precision,
        max_tokens=max_tokens,
        on_policy=None,
        save=lambda model, to: None,
    )


METHODS = {"sft": sft_method, "dpo": dpo_method}


def configured(**changes):
    values = {
        "model": {"fresh": {}},
        "out": "unused",
        "batch": {"size": 8} | changes.pop("batch", {}),
        "optimizer": {"learning_rate": 0.01, "schedule": "constant", "warmup": 0.0}
        | changes.pop("optimizer", {}),
        **changes,
    }
    return validate(SFTConfig, values)


def stepped(start, method, config, step=0, policy=None):
    """The policy after one step, its gradients, and what was logged."""
    policy = policy or copy.deepcopy(start)
    optimizer = adamw(policy, beta1=0.9, beta2=0.95, epsilon=1e-8, weight_decay=0.0)
    metrics = training_step(method, policy, optimizer, config, step=step)
    gradients = torch.cat([parameter.grad.flatten() for parameter in policy.parameters()])
    return policy, gradients, metrics


@pytest.mark.parametrize("name", METHODS)
def test_accumulated_gradients_are_those_of_one_large_batch_whatever_the_lengths(start, name):
    whole_config = configured(batch={"max_tokens": 10_000})
    row_config = configured(batch={"max_tokens": 1})
    _, whole, one_pass = stepped(start, METHODS[name](start), whole_config)
    _, rows, eight_passes = stepped(start, METHODS[name](start, max_tokens=1), row_config)
    assert (one_pass["num_passes"], eight_passes["num_passes"]) == (1, 8)
    assert torch.allclose(whole, rows, atol=1e-6 * float(whole.abs().max()))
    assert one_pass["loss"] == pytest.approx(eight_passes["loss"], rel=1e-6)
    assert one_pass["num_tokens"] == eight_passes["num_tokens"]


@pytest.mark.parametrize("name", METHODS)
def test_the_short_last_batch_of_an_epoch_is_scaled_by_its_own_size(start, name):
    method = METHODS[name](start)
    config = configured(batch={"size": 8, "max_tokens": 1})
    _, gradients, metrics = stepped(start, method, config, step=1)  # rows 8 to 10
    assert metrics["num_rows"] == 3

    from dpo.data.order import batch_rows

    rows = batch_rows(1, num_rows=NUM_ROWS, batch_size=8, seed=0)
    policy = copy.deepcopy(start)
    loss = method.loss(policy, rows).loss / method.weight(rows)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
    expected = torch.cat([parameter.grad.flatten() for parameter in policy.parameters()])
    assert torch.allclose(gradients, expected, atol=1e-6 * float(expected.abs().max()))
    assert metrics["loss"] == pytest.approx(loss.item(), rel=1e-6)


def test_sft_weighs_tokens_and_dpo_weighs_pairs(start):
    sft, dpo = sft_method(start), dpo_method(start)
    assert sft.weight([0, 4]) == sft.train[0].num_scored + sft.train[4].num_scored
    assert dpo.weight([0, 4]) == 2


def test_sft_loss_is_the_mean_over_response_tokens(start):
    method = sft_method(start)
    row = method.train[0]
    with torch.no_grad():
        logps = start(torch.tensor([row.ids])).logits.log_softmax(-1)[0]
    scored = [logps[i - 1, row.ids[i]].item() for i in range(row.prompt_length, len(row.ids))]
    found = method.loss(start, [0]).loss.item() / method.weight([0])
    assert found == pytest.approx(-np.mean(scored), rel=1e-5)


@pytest.mark.parametrize("smoothing", [0.0, 0.3])
def test_dpo_begins_at_log_two_with_ties_and_no_hit(start, smoothing):
    _, _, metrics = stepped(start, dpo_method(start, smoothing=smoothing), configured())
    assert metrics["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert metrics["rewards/margin"] == pytest.approx(0, abs=1e-6)
    assert (metrics["rewards/ties"], metrics["rewards/accuracy"]) == (1, 0)


def test_dpo_gradient_at_the_reference_is_half_beta_times_the_log_ratio_gradient(start):
    """d loss / d theta = -beta sigmoid(0) (grad log pi(chosen) - grad log pi(rejected)), Eq. 7."""
    method = dpo_method(start)
    config = configured(batch={"size": 11}, optimizer={"max_grad_norm": 1e9})
    _, gradients, _ = stepped(start, method, config)

    from dpo.models.scoring import response_logps

    policy = copy.deepcopy(start)
    chosen = response_logps(policy, [pair.chosen for pair in method.train]).mean()
    rejected = response_logps(policy, [pair.rejected for pair in method.train]).mean()
    (-0.5 * 0.5 * (chosen - rejected)).backward()
    expected = torch.cat([parameter.grad.flatten() for parameter in policy.parameters()])
    assert torch.allclose(gradients, expected, atol=1e-5 * float(expected.abs().max()))


def test_gradients_are_clipped_and_the_norm_before_is_logged(start):
    config = configured(optimizer={"max_grad_norm": 0.01})
    _, gradients, metrics = stepped(start, sft_method(start), config)
    assert metrics["gradient_norm"] > 0.01
    assert gradients.norm().item() == pytest.approx(0.01, rel=1e-3)


@pytest.mark.parametrize("name", METHODS)
def test_dropout_is_off_by_default_though_the_model_has_some(start, name):
    assert start.config.resid_pdrop > 0
    once = stepped(start, METHODS[name](start), configured())
    again = stepped(start, METHODS[name](start), configured())
    assert torch.equal(once[1], again[1])
    assert weights_digest(once[0]) == weights_digest(again[0])
    policy = copy.deepcopy(start).train()
    assert torch.equal(
        stepped(start, METHODS[name](start), configured(), policy=policy)[1], once[1]
    )


def test_dropout_differs_by_step_and_pass_and_seed_and_is_a_function_of_them(start):
    method = sft_method(start)

    def gradients(step=0, **changes):
        config = configured(dropout=True, batch={"size": NUM_ROWS}, **changes)
        torch.manual_seed(int(torch.randint(100, (1,))))  # whatever the process drew before
        return stepped(start, method, config, step=step)[1]

    plain = stepped(start, method, configured(batch={"size": NUM_ROWS}))[1]
    assert torch.equal(gradients(), gradients())
    assert not torch.allclose(gradients(), plain)
    assert not torch.allclose(gradients(step=0), gradients(step=1))
    assert not torch.allclose(gradients(seed=0), gradients(seed=1))


@pytest.mark.parametrize("name", METHODS)
def test_a_nan_weight_stops_before_the_update_and_names_step_and_rows(start, name):
    policy = copy.deepcopy(start)
    with torch.no_grad():
        policy.transformer.ln_f.weight[0] = math.nan
    before = weights_digest(policy)
    optimizer = adamw(policy, beta1=0.9, beta2=0.95, epsilon=1e-8, weight_decay=0.0)
    method = METHODS[name](start)
    with pytest.raises(DivergedError) as caught:
        training_step(method, policy, optimizer, configured(), step=4)
    assert str(caught.value).startswith("Step 5: the loss is nan")
    assert method.describe(0).split(":")[0] in str(caught.value)
    assert ", ..." in str(caught.value)
    assert caught.value.exit_code == 3
    assert weights_digest(policy) == before
    assert not optimizer.state


def test_an_infinite_gradient_of_a_finite_loss_stops_before_the_update(start, monkeypatch):
    method, policy = sft_method(start), copy.deepcopy(start)
    policy.lm_head.weight.register_hook(lambda gradient: gradient * math.inf)
    before = weights_digest(policy)
    optimizer = adamw(policy, beta1=0.9, beta2=0.95, epsilon=1e-8, weight_decay=0.0)
    with pytest.raises(DivergedError, match=r"the gradient norm (nan|inf)"):
        training_step(method, policy, optimizer, configured(), step=0)
    assert weights_digest(policy) == before


def test_margins_far_beyond_any_exponent_stay_finite(start):
    method = dpo_method(start)
    method.train_reference = method.train_reference.clone()
    method.train_reference[:NUM_ROWS] += 3e4
    _, gradients, metrics = stepped(start, method, configured())
    assert metrics["loss"] == pytest.approx(0.5 * 3e4, rel=1e-2)
    assert gradients.isfinite().all()


def test_bf16_stays_near_float32(start):
    config = configured()
    exact = stepped(start, sft_method(start), config)[2]["loss"]
    rounded = stepped(start, sft_method(start, precision="bf16"), config)[2]["loss"]
    assert rounded != exact
    assert rounded == pytest.approx(exact, rel=0.01)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, 2),
        ({"epochs": 3}, 6),
        ({"epochs": 0.5}, 1),
        ({"epochs": 0.01}, 1),
        ({"max_steps": 7}, 7),
    ],
)
def test_total_steps_count_the_short_last_batch(changes, expected):
    assert total_steps(configured(**changes), NUM_ROWS) == expected


def test_progress_survives_its_json_even_where_nothing_was_the_best_yet():
    for best in (math.inf, 0.25):
        progression = Progression(step=3, best_step=2, best_loss=best, seconds=1.5)
        assert Progression.from_state(progression.as_state()) == progression


@pytest.mark.parametrize("name", METHODS)
def test_gradient_checkpointing_and_logits_in_parts_train_the_same_policy(start, name):
    """Losses of several steps with dropout off, as without them."""
    plain, thrifty = copy.deepcopy(start), copy.deepcopy(start)
    enable_recomputation(thrifty)
    method, frugal = METHODS[name](start), METHODS[name](start)
    frugal.max_logit_bytes = 4096
    config = configured(optimizer={"learning_rate": 0.003})
    saving = configured(optimizer={"learning_rate": 0.003}, gradient_checkpointing=True)
    losses = [train(method, plain, config, steps=4), train(frugal, thrifty, saving, steps=4)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert len(set(losses[0])) == 4


def test_with_dropout_recomputation_draws_the_same_masks(start):
    plain, thrifty = copy.deepcopy(start), copy.deepcopy(start)
    enable_recomputation(thrifty)
    losses = [
        train(dpo_method(start), plain, configured(dropout=True), steps=3),
        train(
            dpo_method(start),
            thrifty,
            configured(dropout=True, gradient_checkpointing=True),
            steps=3,
        ),
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_pairs_long_since_learnt_do_not_make_denormal_gradients(start):
    """Margins of 95: their gradients are below the smallest normal number of float32."""
    method = dpo_method(start)
    method.train_reference[: len(method.train)] -= 190
    policy = copy.deepcopy(start)
    training_step(
        method,
        policy,
        adamw(policy, beta1=0.9, beta2=0.95, epsilon=1e-8, weight_decay=0.0),
        configured(),
        step=0,
    )
    tiny = torch.finfo(torch.float32).tiny
    for parameter in policy.parameters():
        size = parameter.grad.abs()
        assert not ((size > 0) & (size < tiny)).any()


def train(method, policy, config, *, steps):
    optimizer = adamw(policy, beta1=0.9, beta2=0.95, epsilon=1e-8, weight_decay=0.0)
    return [
        training_step(method, policy, optimizer, config, step=step)["loss"] for step in range(steps)
    ]


def test_a_step_leaves_the_threads_arithmetic_as_it_was(start):
    policy = copy.deepcopy(start)
    optimizer = adamw(policy, beta1=0.9, beta2=0.95, epsilon=1e-8, weight_decay=0.0)
    training_step(dpo_method(start), policy, optimizer, configured(), step=0)
    assert torch.tensor(1e-40).mul(1).item() > 0


def test_a_warm_up_that_is_longer_than_the_run_is_said(caplog):
    warn_of_warmup(configured(optimizer={"warmup": 8}), 8)
    assert not caplog.records
    warn_of_warmup(configured(optimizer={"warmup": 8}), 2)
    [record] = caplog.records
    assert record.getMessage() == (
        "optimizer.warmup: 8 steps are more than the run's 2, so the learning rate ends at 0.25 of "
        "its peak."
    )
