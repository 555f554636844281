"""AdamW one parameter at a time: with masters of bfloat16 weights, and in the backward pass."""

from __future__ import annotations

import copy
import math
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from dpo.config import OptimizerConfig, PreferenceConfig, SFTConfig
from dpo.config_files import validate
from dpo.errors import DivergedError, InputError, Stopped
from dpo.models.adapters import has_adapter, open_model
from dpo.models.load import find_model
from dpo.models.plan import in_bfloat16, scoring_plan
from dpo.models.scoring import response_logps
from dpo.online_config import PPOConfig
from dpo.train import checkpoint, jobs, optimizers
from dpo.train.jobs import train_preference, train_sft
from dpo.train.optimizers import ParameterAdamW, make_optimizer, stepping_in_backward
from dpo.train.run import read_metrics
from dpo.train.schedule import adamw
from models.scored_data import VOCAB, random_sequences
from models.test_packed import random_trees
from tiny_models import ARCHITECTURES, make
from train.small_runs import dpo_config, forked, outcome, sft_config, sft_run
from train.test_resume import stop_at

SETTINGS = OptimizerConfig(weight_decay=0.1, max_grad_norm=None, in_backward=True)


def with_rate(optimizer: torch.optim.Optimizer, rate: float) -> torch.optim.Optimizer:
    for group in optimizer.param_groups:
        group["lr"] = rate
    return optimizer


def plain_adamw(model: nn.Module, rate: float) -> torch.optim.Optimizer:
    options = {"beta1": 0.9, "beta2": 0.95, "epsilon": 1e-8, "weight_decay": 0.1}
    return with_rate(adamw(model, **options), rate)


def loss_of(model: nn.Module) -> torch.Tensor:
    return -response_logps(model, random_sequences()).mean()


# -- RMSprop ---------------------------------------------------------------------------------------


def test_rmsprop_divides_by_the_root_of_the_mean_square() -> None:
    """By hand: v = 0.99 v + 0.01 g^2, and the weight moves by rate g / (sqrt(v) + epsilon)."""
    model = nn.Linear(1, 1, bias=False)
    with torch.no_grad():
        model.weight.fill_(1.0)
    settings = OptimizerConfig(name="rmsprop", beta2=0.99, epsilon=1e-8)
    optimizer = with_rate(make_optimizer(model, settings), 0.03)
    weight, square = 1.0, 0.0
    for gradient in (2.0, -1.0, 0.5):
        model.weight.grad = torch.full((1, 1), gradient)
        optimizer.step()
        square = 0.99 * square + 0.01 * gradient**2
        weight -= 0.03 * gradient / (math.sqrt(square) + 1e-8)
        assert model.weight.item() == pytest.approx(weight, rel=1e-5)


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"beta1": 0.5}, "beta1: has no effect, rmsprop averages squares only"),
        ({"weight_decay": 0.1}, "weight_decay: is for AdamW; rmsprop would scale it"),
        ({"in_backward": True, "max_grad_norm": None}, "in_backward: goes with name=adamw"),
    ],
)
def test_rmsprop_refuses_what_it_does_not_use(settings: dict, complaint: str) -> None:
    with pytest.raises(InputError, match=complaint):
        validate(OptimizerConfig, {"name": "rmsprop", **settings})


# -- masters ---------------------------------------------------------------------------------------


def test_updates_that_bfloat16_cannot_hold_add_up_in_the_master() -> None:
    """A weight of 1 and steps of 1e-4: half a unit in the last place below 1 is 2e-3."""
    weights = [nn.Parameter(torch.ones(2, 2, dtype=torch.bfloat16)) for _ in range(2)]
    groups = [{"params": [weights[0]], "weight_decay": 0.0}]
    ours = with_rate(ParameterAdamW(groups, betas=(0.9, 0.95), eps=1e-8), 1e-4)
    naive = torch.optim.AdamW([weights[1]], lr=1e-4, weight_decay=0.0)
    for _ in range(100):
        for weight, optimizer in zip(weights, (ours, naive), strict=True):
            weight.grad = torch.ones_like(weight)
            optimizer.step()
    master = ours.state[weights[0]]["master"]
    torch.testing.assert_close(master, torch.full((2, 2), 0.99), rtol=0, atol=1e-5)
    assert torch.equal(weights[0], master.bfloat16())
    assert weights[0].dtype == torch.bfloat16
    assert torch.equal(weights[1].detach(), torch.ones(2, 2, dtype=torch.bfloat16))


def test_pure_bf16_with_masters_stays_nearer_to_float32_than_without() -> None:
    start = make("gpt2", VOCAB, scale=1.0)
    models = {"float32": copy.deepcopy(start)}
    for name in ("masters", "naive"):
        models[name] = in_bfloat16(copy.deepcopy(start))
    steppers = {name: plain_adamw(model, 1e-4) for name, model in models.items()}
    steppers["masters"] = with_rate(make_optimizer(models["masters"], SETTINGS), 1e-4)
    assert isinstance(steppers["masters"], ParameterAdamW)
    assert not isinstance(steppers["naive"], ParameterAdamW)
    first = loss_of(start).item()
    for _ in range(60):
        for name, model in models.items():
            steppers[name].zero_grad()
            loss_of(model).backward()
            steppers[name].step()

    def vector(model: nn.Module) -> torch.Tensor:
        return torch.cat([p.detach().float().flatten() for p in model.parameters()])

    moved = (vector(models["float32"]) - vector(start)).norm()
    away = {n: (vector(models[n]) - vector(models["float32"])).norm() / moved for n in steppers}
    losses = {name: loss_of(model).item() for name, model in models.items()}
    assert losses["float32"] < first - 0.05
    assert away["masters"] < 0.5 * away["naive"]
    gaps = {name: abs(losses[name] - losses["float32"]) for name in ("masters", "naive")}
    assert gaps["masters"] < 0.5 * gaps["naive"]


@pytest.mark.parametrize("name", ARCHITECTURES)
@torch.no_grad()
def test_in_bfloat16_a_model_is_scored_on_the_same_path_and_to_its_rounding(name) -> None:
    model, sequences = make(name, VOCAB, scale=1.0), random_trees()
    expected = response_logps(model, sequences)
    rounded = in_bfloat16(copy.deepcopy(model))
    assert {p.dtype for p in rounded.parameters()} == {torch.bfloat16}
    assert {b.dtype for b in rounded.buffers()} == {b.dtype for b in model.buffers()}
    assert scoring_plan(rounded) == scoring_plan(model)
    assert scoring_plan(rounded).packed
    found = response_logps(rounded, sequences)
    assert found.dtype == torch.float64
    assert 0 < (found - expected).abs().max() < 0.1


def test_a_pure_bf16_run_starts_at_its_reference_and_keeps_masters(tmp_path) -> None:
    folder = train_preference(dpo_config(tmp_path / "run", {"precision": "pure_bf16"}))
    start = next(row for row in read_metrics(folder) if "eval/loss" in row)
    assert start["eval/loss"] == pytest.approx(math.log(2), abs=1e-12)
    assert start["eval/kl"] == 0
    weights = load_file(folder / "model" / "model.safetensors")
    assert {t.dtype for t in weights.values()} == {torch.bfloat16}
    state = load_file(max((folder / "checkpoints").glob("step-*")) / "optimizer.safetensors")
    assert {t.dtype for t in state.values()} == {torch.float32}
    masters = {name: t for name, t in state.items() if name.endswith("/master")}
    assert len(masters) == len(state) / 4
    for name, master in masters.items():
        if name.removesuffix("/master") in weights:
            assert torch.equal(master.bfloat16(), weights[name.removesuffix("/master")])


def test_an_adapter_on_bfloat16_weights_is_float32_itself(tmp_path) -> None:
    changes = {"precision": "pure_bf16", "adapter": {"rank": 2}}
    folder = train_preference(dpo_config(tmp_path / "run", changes))
    start = next(row for row in read_metrics(folder) if "eval/loss" in row)
    assert start["eval/loss"] == pytest.approx(math.log(2), abs=1e-12)
    weights = load_file(folder / "model" / "adapter_model.safetensors")
    assert {t.dtype for t in weights.values()} == {torch.float32}
    state = load_file(max((folder / "checkpoints").glob("step-*")) / "optimizer.safetensors")
    assert not [name for name in state if name.endswith("/master")]
    assert not has_adapter(open_model(find_model(str(folder))))  # its base is known by float32


# -- in the backward pass --------------------------------------------------------------------------


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_updates_in_the_backward_pass_are_those_after_it_bit_for_bit(name) -> None:
    """Tied embeddings (GPT-2, Gemma 2), whose gradient comes from both ends, included."""
    after, inside = make(name, VOCAB), make(name, VOCAB)
    plain = plain_adamw(after, 3e-3)
    stepper = with_rate(make_optimizer(inside, SETTINGS), 3e-3)
    for _ in range(4):
        plain.zero_grad()
        loss = loss_of(after)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(after.parameters(), math.inf)
        plain.step()
        with stepping_in_backward(stepper) as seen:
            same = loss_of(inside)
            same.backward()
        assert torch.equal(loss, same)
        assert seen.norm == pytest.approx(norm.item(), rel=1e-5)
        assert all(p.grad is None for p in inside.parameters())
        for a, b in zip(after.parameters(), inside.parameters(), strict=True):
            assert torch.equal(a, b)


def test_the_gradients_of_all_are_never_there_together() -> None:
    model = make("gpt2", VOCAB)
    stepper = make_optimizer(model, SETTINGS)
    update, together = stepper.update, []

    def counted(parameter):
        together.append(sum(p.grad is not None for p in model.parameters()))
        update(parameter)

    stepper.update = counted
    with stepping_in_backward(stepper):
        loss_of(model).backward()
    assert len(together) == len(list(model.parameters()))
    assert set(together) == {1}
    loss_of(model).backward()  # outside nothing is updated
    assert len(together) == len(list(model.parameters()))


IN_BACKWARD = {"optimizer": {"learning_rate": 0.003, "max_grad_norm": None, "in_backward": True}}
AFTER = {"optimizer": {"learning_rate": 0.003, "max_grad_norm": None}}
VARIANTS = {
    "sft": (sft_config, train_sft, {}),
    "sft with dropout": (sft_config, train_sft, {"dropout": True}),
    "sft, recomputing": (sft_config, train_sft, {"gradient_checkpointing": True}),
    "dpo": (dpo_config, train_preference, {}),
    "dpo with an adapter": (dpo_config, train_preference, {"adapter": {"rank": 2, "dropout": 0.1}}),
    "dpo in pure bf16": (dpo_config, train_preference, {"precision": "pure_bf16"}),
}


def weights_of(folder: Path) -> dict[str, bytes]:
    return {f.name: f.read_bytes() for f in (folder / "model").glob("*.safetensors")}


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_run_that_steps_in_the_backward_pass_ends_with_the_same_weights(
    variant, tmp_path
) -> None:
    config, train, changes = VARIANTS[variant]
    inside = train(config(tmp_path / "inside", IN_BACKWARD | changes))
    after = train(config(tmp_path / "after", AFTER | changes))
    assert weights_of(inside) == weights_of(after) != {}
    losses = ([r["loss"] for r in read_metrics(f) if "loss" in r] for f in (inside, after))
    assert next(losses) == next(losses)


@pytest.mark.parametrize("variant", ["dpo", "dpo in pure bf16", "dpo with an adapter"])
def test_stopped_and_killed_it_ends_bit_for_bit_as_if_nothing_had_been(variant, tmp_path) -> None:
    config, train, changes = VARIANTS[variant]
    sft_run()
    expected = outcome(train(config(tmp_path / "whole", IN_BACKWARD | changes)))
    folder = tmp_path / "run"

    def interrupted(step: int, number: int) -> None:
        stop_at(step, number)
        train(config(folder, IN_BACKWARD | changes))

    assert forked(lambda: interrupted(3, signal.SIGTERM)) == Stopped.exit_code
    assert forked(lambda: interrupted(5, signal.SIGKILL)) == -signal.SIGKILL
    train(config(folder, IN_BACKWARD | changes))
    assert outcome(folder) == expected


def test_a_batch_that_may_need_several_passes_is_refused_before_the_first_step(tmp_path) -> None:
    with pytest.raises(InputError) as error:
        train_sft(sft_config(tmp_path / "run", IN_BACKWARD | {"batch.max_tokens": 100}))
    message = str(error.value)
    assert message.startswith("optimizer.in_backward: 8 rows can have ")
    assert "more than batch.max_tokens=100" in message
    assert not list((tmp_path / "run").glob("*.json*"))


def test_after_a_gradient_that_is_not_finite_the_run_ends_and_nothing_is_saved(
    tmp_path, monkeypatch
) -> None:
    loss = jobs.SupervisedMethod.loss
    calls = []

    def poisoned(method, policy, rows):
        result = loss(method, policy, rows)
        calls.append(1)
        if len(calls) == 3:
            result.loss.register_hook(lambda gradient: gradient * math.nan)
        return result

    monkeypatch.setattr(jobs.SupervisedMethod, "loss", poisoned)
    with pytest.raises(
        DivergedError, match=r"Step 3: the loss is [\d.]+ and the gradient norm nan"
    ):
        train_sft(sft_config(tmp_path / "run", IN_BACKWARD))
    kept = [f.name for f in (tmp_path / "run" / "checkpoints").iterdir()]
    assert kept == ["step-00000002"]


# -- what is refused, and what bitsandbytes would have ---------------------------------------------


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"optimizer": {"in_backward": True}}, "in_backward: clipping needs all gradients at once"),
        (
            {"optimizer": {"in_backward": True, "max_grad_norm": None, "name": "adamw_8bit"}},
            "in_backward: goes with name=adamw, not with adamw_8bit",
        ),
        (
            {"precision": "pure_bf16", "optimizer": {"name": "paged_adamw"}},
            "precision: pure_bf16 needs optimizer.name=adamw; paged_adamw has no masters",
        ),
        (
            {"precision": "pure_bf16", "adapter": {"quantize": "4bit"}},
            "precision: pure_bf16 has no effect on quantised weights; take bf16",
        ),
        ({"precision": "fp16"}, "precision"),
        ({"optimizer": {"name": "sgd"}}, "optimizer.name"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(changes, sentence) -> None:
    with pytest.raises(InputError) as error:
        validate(SFTConfig, {"model": "gpt2", "out": "runs/x"} | changes)
    assert sentence in str(error.value)


def test_a_reference_in_bfloat16_does_not_move() -> None:
    start = {"model": "gpt2", "out": "runs/x", "precision": "pure_bf16", "moving_reference": {}}
    with pytest.raises(InputError, match="would round small mixtures away"):
        validate(PreferenceConfig, start)


def test_methods_that_sample_take_neither_pure_bf16_nor_updates_in_the_backward_pass() -> None:
    start = {"model": "gpt2", "out": "runs/x", "reward": "runs/reward"}
    for changes in ({"precision": "pure_bf16"}, IN_BACKWARD):
        with pytest.raises(InputError, match=r"is for dpo sft"):
            validate(PPOConfig, start | changes)


@pytest.mark.parametrize("name", optimizers.BITSANDBYTES)
def test_optimizers_of_bitsandbytes_are_refused_without_a_gpu(name, monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(InputError) as error:
        make_optimizer(make("gpt2", VOCAB), OptimizerConfig(name=name))
    assert str(error.value) == f"optimizer.name: {name} needs a GPU; leave it out."


def test_a_state_with_a_whole_number_comes_back_as_it_was(tmp_path) -> None:
    """bitsandbytes counts its steps so."""
    model = make("gpt2", VOCAB)
    optimizer = plain_adamw(model, 1e-3)
    for parameter in model.parameters():
        optimizer.state[parameter] = {"step": 3, "state1": torch.ones(2, dtype=torch.uint8)}
    origin = checkpoint.Origin("a")
    checkpoint.write(tmp_path / "c", checkpoint.snapshot(model, optimizer, {"step": 1}), origin)
    other = plain_adamw(model, 1e-3)
    checkpoint.restore(checkpoint.newest(tmp_path / "c", origin), model, other)
    for parameter in model.parameters():
        assert other.state[parameter]["step"] == 3
        assert type(other.state[parameter]["step"]) is int
        assert torch.equal(other.state[parameter]["state1"], torch.ones(2, dtype=torch.uint8))
