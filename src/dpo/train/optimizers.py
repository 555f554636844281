"""AdamW as it is needed: fused, with float32 masters of bfloat16 weights, in the backward pass, or
with 8-bit or paged state; and RMSprop, with which the DPO paper trained.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer, RMSprop
from torch.optim.adamw import adamw as adamw_update

from dpo.config import OptimizerConfig
from dpo.models.load import need_bitsandbytes
from dpo.train.schedule import adamw, decayed_and_not

BITSANDBYTES = {
    "adamw_8bit": "AdamW8bit",
    "paged_adamw": "PagedAdamW",
    "paged_adamw_8bit": "PagedAdamW8bit",
}
"""Our names, and the classes of `bitsandbytes.optim`."""


def make_optimizer(policy: nn.Module, settings: OptimizerConfig) -> Optimizer:
    """The optimizer that a configuration names, over the parameters that are trained.

    Raises:
        InputError: it needs a GPU or a package that is not here.
    """
    beta1, beta2, epsilon = settings.beta1, settings.beta2, settings.epsilon
    decay = settings.weight_decay
    groups = decayed_and_not(policy, weight_decay=decay)
    if settings.name == "rmsprop":
        return RMSprop(groups, lr=0.0, alpha=beta2, eps=epsilon)
    if settings.name in BITSANDBYTES:
        need_bitsandbytes("optimizer.name", settings.name)
        import bitsandbytes

        make = getattr(bitsandbytes.optim, BITSANDBYTES[settings.name])
        made: Optimizer = make(groups, lr=0.0, betas=(beta1, beta2), eps=epsilon)
        return made
    rounded = any(p.dtype == torch.bfloat16 for group in groups for p in group["params"])
    if settings.in_backward or rounded:
        return ParameterAdamW(groups, betas=(beta1, beta2), eps=epsilon)
    return adamw(policy, beta1=beta1, beta2=beta2, epsilon=epsilon, weight_decay=decay)


class ParameterAdamW(Optimizer):
    """AdamW, one parameter at a time, with a float32 state whatever the parameter's type.

    Of a bfloat16 parameter it keeps a float32 copy, the master: the update is made there, and the
    parameter is the master rounded. Without one, an update below 1/512 of a weight rounds to
    nothing (Micikevicius et al. 2018, arXiv:1710.03740, section 3.1).

    A float32 parameter is its own master, and gets bit for bit what torch's fused AdamW gives it.
    """

    def __init__(
        self, groups: list[dict[str, Any]], *, betas: tuple[float, float], eps: float
    ) -> None:
        super().__init__(groups, {"lr": 0.0, "betas": betas, "eps": eps, "weight_decay": 0.0})
        self._group_of = {p: group for group in self.param_groups for p in group["params"]}

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        assert closure is None
        for parameter in self._group_of:
            if parameter.grad is not None:
                self.update(parameter)

    @torch.no_grad()
    def update(self, parameter: Tensor) -> None:
        """Update one parameter by its gradient."""
        assert parameter.grad is not None
        state, group = self.state[parameter], self._group_of[parameter]
        rounded = parameter.dtype != torch.float32
        if not state:
            if rounded:
                state["master"] = parameter.detach().float()
            like = state.get("master", parameter)
            state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(like), torch.zeros_like(like)
        master = state.get("master", parameter)
        adamw_update(
            [master],
            [parameter.grad.to(master.dtype)],
            [state["exp_avg"]],
            [state["exp_avg_sq"]],
            [],
            [state["step"]],
            fused=True,
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )
        if rounded:
            parameter.copy_(master)


@dataclass
class SteppedInBackward:
    """What is known of gradients that are gone."""

    squares: float = 0.0

    @property
    def norm(self) -> float:
        """The norm of all gradients as one vector."""
        return math.sqrt(self.squares) if self.squares >= 0 else math.nan


@contextmanager
def stepping_in_backward(optimizer: Optimizer) -> Iterator[SteppedInBackward]:
    """Inside, a backward pass updates each parameter as soon as its gradient is whole, and lets the
    gradient go: there are never the gradients of all.

    The same as a step after the pass, because the pass reads a parameter before its gradient is
    whole and never after. After a gradient that is not finite nothing more is updated.
    """
    assert isinstance(optimizer, ParameterAdamW)
    seen, outside = SteppedInBackward(), flushes_denormals()

    update_one = optimizer.update

    def update(parameter: Tensor) -> None:
        assert parameter.grad is not None
        seen.squares += parameter.grad.double().square().sum().item()
        if math.isfinite(seen.squares):
            with denormals_as_zero(outside):  # as a step after the pass would find them
                update_one(parameter)
        parameter.grad = None

    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    hooks = [p.register_post_accumulate_grad_hook(update) for p in parameters]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def denormals_as_zero(zero: bool = True) -> Iterator[None]:
    """Inside, numbers below the smallest normal one are 0, on a CPU, or with `zero=False` are not.

    Gradients of pairs that are long since learnt are such numbers, which make a matrix product two
    hundred times slower; next to the others they are nothing. The setting is the thread's, so it
    is put back.
    """
    before = flushes_denormals()
    torch.set_flush_denormal(zero)
    try:
        yield
    finally:
        torch.set_flush_denormal(before)


def flushes_denormals() -> bool:
    return torch.tensor(1e-40).mul(1).item() == 0
