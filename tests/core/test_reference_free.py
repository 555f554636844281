"""Losses without a reference: identities, what each claims of itself, and the edges of the range.

Values, gradients and extremes of all of them are in test_family.py.
"""

import math

import pytest
import torch

from dpo.core import losses
from dpo.core.reference_free import alpha_po, cpo, nll, orpo, simpo, slic


def vec(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


CHOSEN, REJECTED = vec(-3.0, -9.0, -2.0), vec(-5.0, -4.0, -2.5)
LENGTHS = torch.tensor([4, 2, 7]), torch.tensor([3, 3, 3])
ZERO = vec(0.0, 0.0, 0.0)


def test_nll_is_a_mean_over_the_response_s_tokens() -> None:
    torch.testing.assert_close(nll(CHOSEN, LENGTHS[0]), vec(3 / 4, 9 / 2, 2 / 7))


def test_repeating_a_response_leaves_losses_per_token_unchanged() -> None:
    twice = 2 * CHOSEN, 2 * REJECTED, 2 * LENGTHS[0], 2 * LENGTHS[1]
    once = CHOSEN, REJECTED, *LENGTHS
    torch.testing.assert_close(nll(twice[0], twice[2]), nll(once[0], once[2]))
    for loss, options in [
        (simpo, {"beta": 2.0, "gamma": 0.5}),
        (orpo, {"beta": 0.5, "nll_weight": 1.0}),
        (alpha_po, {"beta": 2.0, "gamma": 0.5, "alpha": 0.3}),
    ]:
        torch.testing.assert_close(loss(*twice, **options), loss(*once, **options))
    doubled = cpo(twice[0], twice[1], twice[2], beta=0.5, nll_weight=0.0)
    assert (doubled - cpo(*once[:3], beta=0.5, nll_weight=0.0)).abs().min() > 0.01


def test_cpo_is_dpo_with_a_uniform_reference() -> None:
    uniform = torch.full_like(CHOSEN, -7.0)
    dpo = losses.dpo(CHOSEN, REJECTED, uniform, uniform, beta=0.3)
    torch.testing.assert_close(cpo(CHOSEN, REJECTED, LENGTHS[0], beta=0.3, nll_weight=0.0), dpo)


@pytest.mark.parametrize("weight", [0.5, 2.0])
def test_likelihood_terms_are_added_with_their_weight(weight: float) -> None:
    without = cpo(CHOSEN, REJECTED, LENGTHS[0], beta=0.3, nll_weight=0.0)
    added = cpo(CHOSEN, REJECTED, LENGTHS[0], beta=0.3, nll_weight=weight) - without
    torch.testing.assert_close(added, weight * nll(CHOSEN, LENGTHS[0]))

    without = orpo(CHOSEN, REJECTED, *LENGTHS, beta=0.3, nll_weight=0.0)
    added = orpo(CHOSEN, REJECTED, *LENGTHS, beta=0.3, nll_weight=weight) - without
    torch.testing.assert_close(added, weight * nll(CHOSEN, LENGTHS[0]))

    without = slic(CHOSEN, REJECTED, delta=1.0, nll_weight=0.0)
    added = slic(CHOSEN, REJECTED, delta=1.0, nll_weight=weight) - without
    torch.testing.assert_close(added, -weight * CHOSEN)  # a sum over tokens, as in the paper


def test_slic_has_nothing_to_gain_beyond_its_margin() -> None:
    found = slic(vec(-1.0, -1.0, -1.0), vec(-1.5, -2.0, -9.0), delta=1.0, nll_weight=0.0)
    torch.testing.assert_close(found, vec(0.5, 0.0, 0.0))


def test_simpo_is_log_two_where_the_target_margin_is_met() -> None:
    found = simpo(vec(-4.0), vec(-6.0), torch.tensor([4]), torch.tensor([4]), beta=2.0, gamma=1.0)
    assert found.item() == pytest.approx(math.log(2))


@pytest.mark.parametrize("alpha", [1e-5, -1e-5])
def test_alpha_po_tends_to_simpo(alpha: float) -> None:
    expected = simpo(CHOSEN, REJECTED, *LENGTHS, beta=2.0, gamma=0.5)
    found = alpha_po(CHOSEN, REJECTED, *LENGTHS, beta=2.0, gamma=0.5, alpha=alpha)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
    assert (found - expected).abs().max() > 1e-9


def test_orpo_compares_odds() -> None:
    """Probabilities per token of 0.8 and 0.5 are odds of 4 and 1: sp(-log 4) = log(5/4)."""
    one = torch.tensor([1])
    found = orpo(vec(0.8).log(), vec(0.5).log(), one, one, beta=2.0, nll_weight=0.0)
    assert found.item() == pytest.approx(2 * math.log(5 / 4))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_orpo_is_finite_for_a_response_of_probability_one(dtype: torch.dtype) -> None:
    one = torch.tensor([1])
    for chosen, rejected in [(0.0, -1.0), (-1.0, 0.0), (-1e-12, -1e-9), (0.0, 0.0)]:
        leaves = [torch.tensor([v], dtype=dtype, requires_grad=True) for v in (chosen, rejected)]
        found = orpo(*leaves, one, one, beta=1.0, nll_weight=1.0)
        found.sum().backward()
        assert found.isfinite().all()
        assert all(leaf.grad.isfinite().all() for leaf in leaves)


def test_orpo_s_odds_are_right_for_unlikely_responses() -> None:
    """log(p / (1 - p)) = log p for p = e^-100, although 1 - p rounds to 1."""
    one = torch.tensor([1])
    found = orpo(vec(-100.0), vec(-103.0), one, one, beta=1.0, nll_weight=0.0)
    assert found.item() == pytest.approx(math.log1p(math.exp(-3)), rel=1e-12)
