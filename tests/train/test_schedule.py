"""The learning rate by hand, and what weight decay touches."""

import math

import pytest
import torch
from torch import nn

from dpo.train.schedule import adamw, learning_rate


def rates(schedule, total_steps, warmup, peak=1.0):
    return [
        learning_rate(s, total_steps=total_steps, peak=peak, warmup=warmup, schedule=schedule)
        for s in range(total_steps)
    ]


def test_linear_schedule_falls_on_a_line_to_one_step_before_zero():
    assert rates("linear", 4, 0.0) == pytest.approx([1, 0.75, 0.5, 0.25])


def test_cosine_schedule_by_hand():
    root = math.sqrt(0.5)
    assert rates("cosine", 4, 0.0) == pytest.approx([1, (1 + root) / 2, 0.5, (1 - root) / 2])


def test_constant_schedule_stays_at_the_peak_after_warm_up():
    assert rates("constant", 5, 0.4, peak=3.0) == pytest.approx([1.5, 3, 3, 3, 3])


def test_warm_up_takes_its_share_and_the_schedule_starts_at_the_peak():
    assert rates("linear", 8, 0.25) == pytest.approx(
        [1 / 2, 1, 1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6]
    )


def test_warm_up_of_a_part_of_a_step_is_a_whole_step():
    assert rates("linear", 4, 0.1) == pytest.approx([1, 1, 2 / 3, 1 / 3])


def test_warm_up_of_one_and_more_is_a_number_of_steps():
    assert rates("linear", 8, 2) == rates("linear", 8, 0.25)
    assert rates("constant", 4, 3) == pytest.approx([1 / 3, 2 / 3, 1, 1])
    assert rates("constant", 2, 4) == pytest.approx([1 / 4, 2 / 4])


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant"])
@pytest.mark.parametrize("total_steps", [1, 2, 7, 100])
@pytest.mark.parametrize("warmup", [0.0, 0.1, 0.5, 0.999])
def test_rate_is_never_zero_never_above_the_peak_and_reaches_it(schedule, total_steps, warmup):
    found = rates(schedule, total_steps, warmup)
    assert min(found) > 0
    assert max(found) == 1.0


def test_weight_decay_shrinks_matrices_and_nothing_else():
    model = nn.Sequential(nn.Embedding(3, 4), nn.Linear(4, 4), nn.LayerNorm(4))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(1.0)
            parameter.grad = torch.zeros_like(parameter)
    optimizer = adamw(model, beta1=0.9, beta2=0.95, epsilon=1e-8, weight_decay=0.5)
    for group in optimizer.param_groups:
        group["lr"] = 0.1
    optimizer.step()
    for name, parameter in model.named_parameters():
        expected = 1 - 0.1 * 0.5 if name in ("0.weight", "1.weight") else 1.0
        assert torch.allclose(parameter, torch.tensor(expected)), name


def test_frozen_parameters_are_not_optimized():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[0].requires_grad_(False)
    optimizer = adamw(model, beta1=0.9, beta2=0.95, epsilon=1e-8, weight_decay=0.1)
    optimized = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert optimized == {id(p) for p in model[1].parameters()}
