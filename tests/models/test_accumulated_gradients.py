"""A step in many passes is the step in one, whatever the lengths and however short the batch."""

from __future__ import annotations

import math

import pytest
import torch
from scored_data import (
    SHAPES,
    VOCAB,
    preference_method,
    random_pairs,
    random_sequences,
    supervised_method,
)
from torch import nn

from dpo.config import DPOLossConfig, PreferenceConfig, SFTConfig, TrainingConfig
from dpo.config_files import read_config
from dpo.data.order import batch_rows
from dpo.train.loop import Method, training_step
from tiny_models import make

NUM_ROWS = len(SHAPES)
LARGE = 10_000


def config_of(schema: type[TrainingConfig], *, size: int, max_tokens: int, **more: object):
    """One row per key; gradients are hardly ever clipped, and the rate is constant."""
    overrides = {
        "model": "unused",
        "out": "unused",
        "max_steps": 10,
        "batch.size": size,
        "batch.max_tokens": max_tokens,
        "optimizer.learning_rate": 1.0,
        "optimizer.schedule": "constant",
        "optimizer.warmup": 0,
        "optimizer.max_grad_norm": 1e6,
        **more,
    }
    return read_config(schema, None, [f"{key}={value}" for key, value in overrides.items()])


def dpo_step(
    dtype: torch.dtype, *, size: int, max_tokens: int, step: int, **more: object
) -> tuple[nn.Module, dict[str, float]]:
    """The policy after one step of plain gradient descent, its gradients still in place."""
    policy = make("gpt2", VOCAB).to(dtype)
    reference = make("gpt2", VOCAB, seed=1).to(dtype)
    method = preference_method(
        reference, random_pairs(), DPOLossConfig(beta=0.5), max_tokens=max_tokens
    )
    config = config_of(PreferenceConfig, size=size, max_tokens=max_tokens, **more)
    return policy, one_step(method, policy, config, step)


def sft_step(
    dtype: torch.dtype, *, size: int, max_tokens: int, step: int, **more: object
) -> tuple[nn.Module, dict[str, float]]:
    policy = make("gpt2", VOCAB).to(dtype)
    method = supervised_method(random_sequences(), max_tokens=max_tokens)
    config = config_of(SFTConfig, size=size, max_tokens=max_tokens, **more)
    return policy, one_step(method, policy, config, step)


def one_step(
    method: Method, policy: nn.Module, config: TrainingConfig, step: int
) -> dict[str, float]:
    optimizer = torch.optim.SGD(policy.parameters(), lr=1.0)
    return training_step(method, policy, optimizer, config, step=step)


def largest_difference(first: nn.Module, second: nn.Module) -> float:
    """Of gradients and of parameters after the step."""
    return max(
        max((p - q).abs().max().item(), (p.grad - q.grad).abs().max().item())
        for p, q in zip(first.parameters(), second.parameters(), strict=True)
    )


@pytest.mark.parametrize("take_step", [dpo_step, sft_step])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-6), (torch.float32, 1e-5)], ids=["fp64", "fp32"]
)
def test_many_passes_equal_one(take_step, dtype: torch.dtype, tolerance: float) -> None:
    whole, at_once = take_step(dtype, size=NUM_ROWS, max_tokens=LARGE, step=0)
    assert at_once["num_passes"] == 1
    for max_tokens in (1, 20, 50):
        parts, metrics = take_step(dtype, size=NUM_ROWS, max_tokens=max_tokens, step=0)
        assert metrics["num_passes"] > 1
        assert largest_difference(whole, parts) < tolerance
        for name in at_once.keys() - {"num_passes", "learning_rate"}:
            assert metrics[name] == pytest.approx(at_once[name], abs=10 * tolerance), name
    assert max(p.grad.abs().max() for p in whole.parameters()) > 1e-2, "the step does something"


@pytest.mark.parametrize("take_step", [dpo_step, sft_step])
@pytest.mark.parametrize("max_tokens", [1, 50, LARGE])
def test_the_short_last_batch_is_scaled_by_its_own_size(take_step, max_tokens: int) -> None:
    """Six rows in batches of four: the second step holds two, and its loss is the mean over
    those two, as a batch of two with the same rows gives."""
    policy, metrics = take_step(torch.float64, size=4, max_tokens=max_tokens, step=1)
    assert metrics["num_rows"] == 2
    rows = batch_rows(1, num_rows=NUM_ROWS, batch_size=4, seed=0)
    assert sorted(rows + batch_rows(0, num_rows=NUM_ROWS, batch_size=4, seed=0)) == list(
        range(NUM_ROWS)
    )

    expected_policy = make("gpt2", VOCAB).double()
    if take_step is dpo_step:
        reference = make("gpt2", VOCAB, seed=1).double()
        method = preference_method(
            reference, random_pairs(), DPOLossConfig(beta=0.5), max_tokens=LARGE
        )
        weight = 2
    else:
        method = supervised_method(random_sequences(), max_tokens=LARGE)
        weight = sum(SHAPES[row][1] for row in rows)
    expected = method.loss(expected_policy, rows).loss / weight
    expected.backward()
    assert metrics["loss"] == pytest.approx(expected.item(), abs=1e-9)
    for found, wanted in zip(policy.parameters(), expected_policy.parameters(), strict=True):
        torch.testing.assert_close(found.grad, wanted.grad, rtol=0, atol=1e-9)


def test_sft_weighs_tokens_and_dpo_weighs_pairs() -> None:
    """The SFT gradient of a batch is the token-weighted mean of its rows' gradients, DPO's the
    plain mean: rows of unlike length tell them apart."""
    sft = supervised_method(random_sequences(), max_tokens=LARGE)
    dpo = preference_method(
        make("gpt2", VOCAB, seed=1), random_pairs(), DPOLossConfig(), max_tokens=LARGE
    )
    assert sft.weight([0, 4]) == 1 + 22
    assert dpo.weight([0, 4]) == 2


@pytest.mark.parametrize("take_step", [dpo_step, sft_step])
def test_gradients_are_clipped_once_over_all_passes(take_step) -> None:
    free, metrics = take_step(torch.float64, size=NUM_ROWS, max_tokens=20, step=0)
    limit = metrics["gradient_norm"] / 4
    clipped, again = take_step(
        torch.float64, size=NUM_ROWS, max_tokens=20, step=0, **{"optimizer.max_grad_norm": limit}
    )
    assert again["gradient_norm"] == pytest.approx(metrics["gradient_norm"], rel=1e-9)
    norm = math.sqrt(sum((p.grad**2).sum().item() for p in clipped.parameters()))
    assert norm == pytest.approx(limit, rel=1e-4)
    for p, q in zip(clipped.parameters(), free.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad / 4, rtol=1e-4, atol=1e-12)


def test_dropout_is_off_unless_asked_for() -> None:
    """GPT-2 has dropout of 0.1: without the option two steps are the same bit for bit."""
    first, _ = dpo_step(torch.float32, size=4, max_tokens=60, step=0)
    second, _ = dpo_step(torch.float32, size=4, max_tokens=60, step=0)
    assert largest_difference(first, second) == 0
    dropped, _ = dpo_step(torch.float32, size=4, max_tokens=60, step=0, dropout="true")
    same, _ = dpo_step(torch.float32, size=4, max_tokens=60, step=0, dropout="true")
    assert largest_difference(first, dropped) > 1e-3
    assert largest_difference(dropped, same) == 0
