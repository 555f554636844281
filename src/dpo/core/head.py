"""The output head and the log-softmax in one step, so that few logits ever exist."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

BLOCK_BYTES = 1 << 20
"""Logits that are exponentiated together: they stay in a core's cache."""


@dataclass(frozen=True, slots=True)
class HeadForm:
    """What a model does with its head's output: `cap * tanh(scale * z / cap)`, or `scale * z`."""

    scale: float = 1.0
    cap: float | None = None

    def __call__(self, logits: Tensor) -> Tensor:
        """The form applied to the head's output, in place."""
        if self.scale != 1.0:
            logits.mul_(self.scale)
        return logits if self.cap is None else logits.div_(self.cap).tanh_().mul_(self.cap)

    def backward(self, gradient: Tensor, logits: Tensor) -> Tensor:
        """From the gradient of the final `logits` to that of the head's output, in place."""
        if self.cap is not None:
            gradient.mul_(1 - (logits / self.cap).square_())
        return gradient.mul_(self.scale) if self.scale != 1.0 else gradient


def head_token_logps(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    source: Tensor,
    targets: Tensor,
    *,
    form: HeadForm = HeadForm(),
    max_bytes: int = 1 << 29,
) -> Tensor:
    """Log-probability of each target token, (M,), in nats, from hidden states.

        logp_m = z_{source_m, target_m} - log sum_v exp z_{source_m, v},   z = form(h W^T + b)

    Where the (N, V) logits fit into `max_bytes` they are computed once and turned in place into
    softmax and then into their own gradient: three matrix products in all, the least possible.
    Otherwise they exist only for a part of the vocabulary at a time, and the backward pass
    computes each part again: four products, at bounded memory. (Wijmans et al. 2024,
    arXiv:2411.09009, do the latter in one GPU kernel.)

    Args:
        hidden: (N, D), float32 or float64; row n is what the head sees at some position.
        weight: (V, D). bias: (V,) or None.
        source: (M,), the row of `hidden` that predicts each target; rows may repeat.
        targets: (M,), token ids.
        form: scale and soft cap that the model applies after the head.
        max_bytes: most memory for logits.
    """
    width = _part_width(hidden, len(weight), max_bytes)
    if width >= len(weight):
        logits = linear(hidden, weight, bias)
        return _apply(_LogitTokenLogps, logits, source, targets, form)
    return _apply(_PartwiseTokenLogps, hidden, weight, bias, source, targets, form, width)


def _apply(function: Any, *arguments: Any) -> Tensor:
    logps: Tensor = function.apply(*arguments)
    return logps


class _LogitTokenLogps(torch.autograd.Function):
    """From all logits, which become their own gradient. The products around it are torch's."""

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, source: Tensor, targets: Tensor, form: HeadForm
    ) -> Tensor:
        logits = form(logits)
        log_total = _log_sum_exp(logits)
        ctx.save_for_backward(logits, source, targets, log_total)
        ctx.form = form
        return logits[source, targets] - log_total[source]

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor | None, ...]:
        logits, source, targets, log_total = ctx.saved_tensors
        _to_gradient(logits, log_total, source, targets, outputs[0], slice(0, None), ctx.form)
        return logits, None, None, None


class _PartwiseTokenLogps(torch.autograd.Function):
    """From hidden states, with the logits of `width` tokens of the vocabulary at a time."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        source: Tensor,
        targets: Tensor,
        form: HeadForm,
        width: int,
    ) -> Tensor:
        log_total = hidden.new_full((len(hidden),), -torch.inf)
        target_logits = hidden.new_empty(len(targets))
        for part in _parts(weight, width):
            logits = _logits(hidden, weight, bias, part, form)
            inside, hit, column = _in_part(source, targets, part)
            target_logits[inside] = logits[hit, column]
            log_total = torch.logaddexp(log_total, _log_sum_exp(logits))
        ctx.save_for_backward(hidden, weight, bias, source, targets, log_total)
        ctx.form, ctx.width = form, width
        return target_logits - log_total[source]

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, source, targets, log_total = ctx.saved_tensors
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        hidden_gradient = torch.zeros_like(hidden) if needs_hidden else None
        weight_gradient = torch.empty_like(weight) if needs_weight else None
        bias_gradient = torch.empty_like(weight[:, 0]) if needs_bias else None
        for part in _parts(weight, ctx.width):
            logits = _logits(hidden, weight, bias, part, ctx.form)
            _to_gradient(logits, log_total, source, targets, outputs[0], part, ctx.form)
            if hidden_gradient is not None:
                hidden_gradient.addmm_(logits, weight[part])
            if weight_gradient is not None:
                torch.mm(logits.T, hidden, out=weight_gradient[part])
            if bias_gradient is not None:
                bias_gradient[part] = logits.sum(0)
        return hidden_gradient, weight_gradient, bias_gradient, None, None, None, None


def _parts(weight: Tensor, width: int) -> Iterator[slice]:
    """Parts of the vocabulary."""
    for start in range(0, len(weight), width):
        yield slice(start, start + width)


def _part_width(hidden: Tensor, vocabulary: int, max_bytes: int) -> int:
    """Columns of the logits that exist at once: all where they fit, else equal parts."""
    column_bytes: int = max(1, len(hidden)) * hidden.element_size()
    parts: int = -(-vocabulary * column_bytes // max_bytes)
    width: int = -(-vocabulary // parts)
    return max(1, width)


def _logits(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, part: slice, form: HeadForm
) -> Tensor:
    return form(linear(hidden, weight[part], None if bias is None else bias[part]))


def _in_part(source: Tensor, targets: Tensor, part: slice) -> tuple[Tensor, Tensor, Tensor]:
    """The targets whose logit stands in this part: their numbers, its rows, its columns."""
    within: Tensor = targets >= part.start
    if part.stop is not None:
        within = within & (targets < part.stop)
    inside = within.nonzero().squeeze(-1)
    return inside, source[inside], targets[inside] - part.start


def _blocks(logits: Tensor) -> Iterator[slice]:
    """Rows that are worked on together."""
    rows = max(1, BLOCK_BYTES // max(1, logits.shape[1] * logits.element_size()))
    for start in range(0, len(logits), rows):
        yield slice(start, start + rows)


def _log_sum_exp(logits: Tensor) -> Tensor:
    """`log sum_v exp z_v` of each row, without a second tensor of the logits' size."""
    found = logits.new_empty(len(logits))
    for rows in _blocks(logits):
        found[rows] = logits[rows].logsumexp(-1)
    return found


def _to_gradient(
    logits: Tensor,
    log_total: Tensor,
    source: Tensor,
    targets: Tensor,
    gradient: Tensor,
    part: slice,
    form: HeadForm,
) -> None:
    """Turn logits into the gradient of the head's output, in place: for row n
    `sum_m g_m (onehot(target_m) - softmax_n)` over its targets m, taken back through the form.
    """
    row_gradient = torch.zeros_like(log_total).index_add_(0, source, gradient)
    inside, hit, column = _in_part(source, targets, part)
    hit_logits = logits[hit, column]  # the form's derivative there needs them
    for rows in _blocks(logits):
        block = logits[rows]
        final = block.clone() if form.cap is not None else block
        block.sub_(log_total[rows, None]).exp_().mul_(-row_gradient[rows, None])
        form.backward(block, final)
    ones = form.backward(gradient[inside].clone(), hit_logits)
    logits.index_put_((hit, column), ones, accumulate=True)
