"""The DPO loss: values by hand, identities, gradients, extremes, and where its minimum is."""

import doctest
import importlib
import math
import pkgutil

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import dpo
from dpo.core import losses

LOGPS = st.floats(-500, 0)
BETAS = st.floats(0.01, 5)


def vec(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def loss_of_margin(margin: float, *, beta: float = 1.0, label_smoothing: float = 0.0) -> float:
    """The loss of a pair whose log-ratios differ by `margin`."""
    zero = vec(0.0)
    found = losses.dpo(vec(margin), zero, zero, zero, beta=beta, label_smoothing=label_smoothing)
    return found.item()


@pytest.mark.parametrize("beta", [1e-3, 0.1, 0.5, 10.0])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1, 0.49])
def test_policy_equal_to_reference_costs_log_two_whatever_beta(
    beta: float, label_smoothing: float
) -> None:
    chosen, rejected = vec(-3.0, -250.0), vec(-70.0, -0.5)
    found = losses.dpo(
        chosen, rejected, chosen, rejected, beta=beta, label_smoothing=label_smoothing
    )
    torch.testing.assert_close(found, vec(math.log(2), math.log(2)), rtol=0, atol=1e-15)


def test_loss_by_hand() -> None:
    # chosen: log-ratio ln 4; rejected: log-ratio ln 2; so u = beta ln 2 and sigmoid(u) = 2/3, 4/5.
    chosen, rejected = vec(math.log(0.4)), vec(math.log(0.6))
    reference_chosen, reference_rejected = vec(math.log(0.1)), vec(math.log(0.3))
    arguments = (chosen, rejected, reference_chosen, reference_rejected)
    assert losses.dpo(*arguments, beta=1.0).item() == pytest.approx(math.log(3 / 2), abs=1e-14)
    assert losses.dpo(*arguments, beta=2.0).item() == pytest.approx(math.log(5 / 4), abs=1e-14)


def test_smoothed_loss_by_hand() -> None:
    # u = ln 3: sigmoid(u) = 3/4, sigmoid(-u) = 1/4.
    expected = 0.8 * math.log(4 / 3) + 0.2 * math.log(4)
    found = loss_of_margin(math.log(3), label_smoothing=0.2)
    assert found == pytest.approx(expected, abs=1e-14)


def test_loss_keeps_one_value_a_pair() -> None:
    zero = vec(0.0, 0.0, 0.0)
    found = losses.dpo(vec(0.0, 1.0, -1.0), zero, zero, zero, beta=1.0)
    expected = [math.log(2), math.log1p(math.exp(-1)), math.log1p(math.exp(1))]
    torch.testing.assert_close(found, vec(*expected))


def test_each_argument_has_its_own_role() -> None:
    """Raising a log-probability lowers the loss for chosen and reference-rejected, and raises it
    for the others: no two arguments can be mistaken for each other."""
    base = [vec(-10.0), vec(-11.0), vec(-12.0), vec(-13.5)]
    at_base = losses.dpo(*base, beta=0.5).item()
    for position, sign in enumerate([-1, 1, 1, -1]):
        moved = list(base)
        moved[position] = moved[position] + 1.0
        change = losses.dpo(*moved, beta=0.5).item() - at_base
        assert math.copysign(1, change) == sign, position
    raised_together = losses.dpo(base[0] + 1, base[1] + 1, *base[2:], beta=0.5).item()
    assert raised_together == pytest.approx(at_base, abs=1e-14)


@given(LOGPS, LOGPS, LOGPS, LOGPS, BETAS)
def test_beta_scales_the_log_ratios(w: float, l: float, rw: float, rl: float, beta: float) -> None:  # noqa: E741
    scaled = losses.dpo(vec(w * beta), vec(l * beta), vec(rw * beta), vec(rl * beta), beta=1.0)
    found = losses.dpo(vec(w), vec(l), vec(rw), vec(rl), beta=beta)
    torch.testing.assert_close(found, scaled, rtol=1e-9, atol=1e-9)


@given(LOGPS, LOGPS, LOGPS, LOGPS, BETAS)
def test_swapping_the_pair_costs_the_margin(
    w: float,
    l: float,  # noqa: E741
    rw: float,
    rl: float,
    beta: float,
) -> None:
    """-log sigmoid(-u) = -log sigmoid(u) + u."""
    straight = losses.dpo(vec(w), vec(l), vec(rw), vec(rl), beta=beta).item()
    swapped = losses.dpo(vec(l), vec(w), vec(rl), vec(rw), beta=beta).item()
    margin = beta * ((w - rw) - (l - rl))
    assert swapped - straight == pytest.approx(margin, rel=1e-9, abs=1e-9)


@given(st.floats(-50, 50), st.floats(0, 0.499))
def test_label_smoothing_mixes_the_pair_with_its_swap(margin: float, eps: float) -> None:
    mixed = (1 - eps) * loss_of_margin(margin) + eps * loss_of_margin(-margin)
    found = loss_of_margin(margin, label_smoothing=eps)
    assert found == pytest.approx(mixed, rel=1e-12, abs=1e-12)
    # and (1 - eps) L(u) + eps (L(u) + u) = L(u) + eps u
    assert found == pytest.approx(loss_of_margin(margin) + eps * margin, rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("beta", [0.1, 1.0, 3.0])
@pytest.mark.parametrize("margin", [-20.0, -1.0, 0.0, 0.3, 15.0])
@pytest.mark.parametrize("eps", [0.0, 0.2])
def test_gradient_is_minus_beta_sigmoid_of_the_negated_margin(
    beta: float, margin: float, eps: float
) -> None:
    """dL/d log pi(chosen) = -beta ((1 - eps) sigmoid(-u) - eps sigmoid(u)), and the opposite for
    the rejected response, by autograd and by central differences."""
    point = [vec(margin), vec(0.0), vec(0.0), vec(0.0)]
    sigmoid = 1 / (1 + math.exp(beta * margin))
    expected = -beta * ((1 - eps) * sigmoid - eps * (1 - sigmoid))
    for position, sign in [(0, 1), (1, -1)]:
        leaf = point[position].clone().requires_grad_()
        arguments = [leaf if i == position else value for i, value in enumerate(point)]
        losses.dpo(*arguments, beta=beta, label_smoothing=eps).sum().backward()
        assert leaf.grad.item() == pytest.approx(sign * expected, rel=1e-10, abs=1e-15)

        def at(step: float, position: int = position) -> float:
            moved = [value + step * (i == position) for i, value in enumerate(point)]
            return losses.dpo(*moved, beta=beta, label_smoothing=eps).item()

        numeric = (at(1e-5) - at(-1e-5)) / 2e-5
        assert numeric == pytest.approx(sign * expected, rel=1e-6, abs=1e-8)


def test_no_gradient_flows_through_the_reference() -> None:
    policy = [vec(-1.0).requires_grad_(), vec(-2.0).requires_grad_()]
    reference = [vec(-1.5).requires_grad_(), vec(-1.5).requires_grad_()]
    losses.dpo(*policy, *reference, beta=0.1).sum().backward()
    assert all(value.grad is not None for value in policy)
    assert all(value.grad is None for value in reference)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("eps", [0.0, 0.1])
def test_huge_margins_stay_finite(dtype: torch.dtype, eps: float) -> None:
    """The loss of a margin of -1e4 is 1e4, not the infinity of log(sigmoid(-1e4))."""
    chosen = torch.tensor([1e4, -1e4], dtype=dtype, requires_grad=True)
    zero = torch.zeros(2, dtype=dtype)
    found = losses.dpo(chosen, zero, zero, zero, beta=1.0, label_smoothing=eps)
    found.sum().backward()
    expected = torch.tensor([eps * 1e4, (1 - eps) * 1e4], dtype=dtype)
    torch.testing.assert_close(found.detach(), expected)
    torch.testing.assert_close(chosen.grad, torch.tensor([eps, -(1 - eps)], dtype=dtype))


@pytest.mark.parametrize("eps", [0.05, 0.2, 0.4])
def test_conservative_dpo_is_least_where_the_model_believes_the_labels(eps: float) -> None:
    """The margin that minimises the smoothed loss is logit(1 - eps): found by Newton's method
    without the formula; the unsmoothed loss has no minimum at all."""
    margin = vec(0.0).requires_grad_()
    zero = vec(0.0)
    for _ in range(50):
        loss = losses.dpo(margin, zero, zero, zero, beta=1.0, label_smoothing=eps).sum()
        (slope,) = torch.autograd.grad(loss, margin, create_graph=True)
        (curvature,) = torch.autograd.grad(slope.sum(), margin)
        margin = (margin - 0.5 * slope / curvature).detach().requires_grad_()
    assert margin.item() == pytest.approx(math.log((1 - eps) / eps), abs=1e-9)
    unsmoothed = [loss_of_margin(u) for u in range(0, 700, 50)]
    assert unsmoothed == sorted(unsmoothed, reverse=True)
    assert unsmoothed[-1] > 0


@pytest.mark.parametrize("package", ["dpo.core", "dpo.data", "dpo.models"])
def test_the_examples_in_docstrings_hold(package: str) -> None:
    folder = importlib.import_module(package)
    for module in pkgutil.iter_modules(folder.__path__, package + "."):
        results = doctest.testmod(importlib.import_module(module.name))
        assert results.failed == 0, module.name


def test_the_loss_and_its_neighbours_have_examples() -> None:
    """The test above would pass on modules without any."""
    tested = ["core.losses", "data.prompts", "data.order", "data.synthetic"]
    for name in tested:
        module = importlib.import_module(f"{dpo.__name__}.{name}")
        examples = [e for t in doctest.DocTestFinder().find(module) for e in t.examples]
        assert examples, name
