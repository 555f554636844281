"""The fused head equals logits, log-softmax and autograd, in any number of parts."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dpo.core.head import HeadForm, head_token_logps

FORMS = {
    "plain": HeadForm(),
    "scaled": HeadForm(scale=0.25),
    "capped": HeadForm(cap=3.0),
    "both": HeadForm(scale=1.7, cap=2.0),
}
N, D, V, M = 7, 5, 23, 12


def case(dtype: torch.dtype, *, bias: bool) -> tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor]:
    draw = torch.Generator().manual_seed(0)
    hidden = torch.randn(N, D, generator=draw, dtype=torch.float64).to(dtype).requires_grad_()
    weight = torch.randn(V, D, generator=draw, dtype=torch.float64).to(dtype).requires_grad_()
    shift = torch.randn(V, generator=draw, dtype=torch.float64).to(dtype).requires_grad_()
    source = torch.randint(N, (M,), generator=draw)
    targets = torch.randint(V, (M,), generator=draw)
    source[1], targets[1] = source[0], targets[0]  # the same target of the same row twice
    return hidden, weight, shift if bias else None, source, targets


def plainly(hidden, weight, bias, source, targets, form: HeadForm) -> Tensor:
    logits = form.scale * torch.nn.functional.linear(hidden, weight, bias)
    if form.cap is not None:
        logits = form.cap * torch.tanh(logits / form.cap)
    return logits.log_softmax(-1)[source, targets]


@pytest.mark.parametrize("max_bytes", [1 << 20, 8 * N * 9, 8 * N, 1])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_values_and_gradients_equal_the_plain_ones(form, bias, max_bytes) -> None:
    inputs = case(torch.float64, bias=bias)
    weights = torch.randn(M, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    found = head_token_logps(*inputs, form=form, max_bytes=max_bytes)
    expected = plainly(*inputs, form)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    variables = [x for x in inputs[:3] if x is not None]
    for a, b in zip(
        torch.autograd.grad(found @ weights, variables),
        torch.autograd.grad(expected @ weights, variables),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


@pytest.mark.parametrize("max_bytes", [8 * N * 9, 1])
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_gradients_equal_finite_differences(form, max_bytes) -> None:
    hidden, weight, bias, source, targets = case(torch.float64, bias=True)

    def function(h: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return head_token_logps(h, w, b, source, targets, form=form, max_bytes=max_bytes)

    assert torch.autograd.gradcheck(function, (hidden, weight, bias))


def test_a_frozen_head_gets_no_gradient_and_the_hidden_states_theirs() -> None:
    hidden, weight, bias, source, targets = case(torch.float64, bias=True)
    expected = torch.autograd.grad(
        plainly(hidden, weight, bias, source, targets, HeadForm()).sum(), hidden
    )[0]
    frozen = weight.detach(), bias.detach()
    head_token_logps(hidden, *frozen, source, targets).sum().backward()
    torch.testing.assert_close(hidden.grad, expected, rtol=0, atol=1e-12)
    assert weight.grad is None


def test_no_targets_give_no_values_and_no_gradient() -> None:
    hidden, weight, bias, _, _ = case(torch.float64, bias=True)
    nothing = torch.empty(0, dtype=torch.int64)
    found = head_token_logps(hidden, weight, bias, nothing, nothing)
    assert found.shape == (0,)
    found.sum().backward()
    assert torch.equal(weight.grad, torch.zeros_like(weight))


def test_a_second_backward_pass_through_logits_that_were_used_up_is_refused() -> None:
    inputs = case(torch.float64, bias=True)
    found = head_token_logps(*inputs).sum()
    found.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        found.backward()


def test_enormous_logits_stay_finite() -> None:
    hidden = torch.tensor([[1e4, -1e4]], requires_grad=True)
    weight = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.5, 0.5]], requires_grad=True)
    source, targets = torch.tensor([0, 0]), torch.tensor([0, 1])
    found = head_token_logps(hidden, weight, None, source, targets)
    assert found.tolist() == [0.0, -2e4]
    found.sum().backward()
    assert hidden.grad.isfinite().all()
    assert weight.grad.isfinite().all()


def test_the_logits_never_take_more_than_the_budget(monkeypatch) -> None:
    """Every product with the head, forward and backward, is seen."""
    hidden, weight, bias, source, targets = case(torch.float32, bias=True)
    shapes: list[torch.Size] = []
    original = HeadForm.__call__

    def seen(self: HeadForm, logits: Tensor) -> Tensor:
        shapes.append(logits.shape)
        return original(self, logits)

    monkeypatch.setattr(HeadForm, "__call__", seen)
    budget = 4 * N * 5
    head_token_logps(hidden, weight, bias, source, targets, max_bytes=budget).sum().backward()
    assert all(4 * rows * columns <= budget for rows, columns in shapes)
    assert sum(columns for _, columns in shapes) == 2 * V, "each part once forward, once backward"
    shapes.clear()
    head_token_logps(hidden, weight, bias, source, targets).sum().backward()
    assert shapes == [(N, V)], "all at once where they fit, and never again"


def test_without_gradients_nothing_is_kept() -> None:
    hidden, weight, bias, source, targets = case(torch.float32, bias=True)
    with torch.no_grad():
        found = head_token_logps(hidden, weight, bias, source, targets)
    assert not found.requires_grad
