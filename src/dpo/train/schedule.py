"""The learning rate and the optimizer."""

from __future__ import annotations

import math
from typing import Any

from torch import nn
from torch.optim import AdamW, Optimizer


def learning_rate(
    step: int, *, total_steps: int, peak: float, warmup: float, schedule: str
) -> float:
    """The learning rate of optimizer step `step` (from 0): linear warm-up, then the schedule.

    Warm-up takes `warmup_steps` and never starts at 0; after it the rate stays ("constant"), falls
    on a line ("linear") or a half cosine ("cosine") that would reach 0 one step after the last.

    >>> [learning_rate(s, total_steps=4, peak=1, warmup=0.5, schedule="linear") for s in range(4)]
    [0.5, 1.0, 1.0, 0.5]
    """
    warming = warmup_steps(warmup, total_steps)
    if step < warming:
        return peak * (step + 1) / warming
    if schedule == "constant":
        return peak
    progress = (step - warming) / (total_steps - warming)
    return peak * (1 - progress if schedule == "linear" else (1 + math.cos(math.pi * progress)) / 2)


def warmup_steps(warmup: float, total_steps: int) -> int:
    """How many steps the warm-up takes: below 1 a share of all, rounded up; from 1 on a number.

    >>> warmup_steps(0.1, 57), warmup_steps(10, 57)
    (6, 10)
    """
    return int(warmup) if warmup >= 1 else math.ceil(warmup * total_steps)


def adamw(
    policy: nn.Module, *, beta1: float, beta2: float, epsilon: float, weight_decay: float
) -> Optimizer:
    """Fused AdamW (Loshchilov and Hutter 2019); decay on matrices only, not on biases and norms."""
    groups = decayed_and_not(policy, weight_decay=weight_decay)
    return AdamW(groups, lr=0.0, betas=(beta1, beta2), eps=epsilon, fused=True)


def decayed_and_not(policy: nn.Module, *, weight_decay: float) -> list[dict[str, Any]]:
    """The trained parameters: matrices, which decay, and the rest, which does not."""
    trained = [p for p in policy.parameters() if p.requires_grad]
    return [
        {"params": [p for p in trained if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.dim() < 2], "weight_decay": 0.0},
    ]
