"""Losses on tokens and distributions: identities, and what each claims of itself.

Values, gradients and extremes of all of them are in test_family.py.
"""

import math

import pytest
import torch

from dpo.core import losses
from dpo.core.logps import token_logps
from dpo.core.token_level import ld_dpo, mallows_po, tdpo1, tdpo2, wpo, wpo_weight


def vec(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


FOUR = (vec(-3.0, -9.0, -2.0), vec(-5.0, -4.0, -2.5), vec(-3.5, -6.0, -2.0), vec(-4.0, -5.0, -3.0))
DPO = losses.dpo(*FOUR, beta=0.5)
LENGTHS = torch.tensor([4, 2, 1]), torch.tensor([3, 3, 3])
FORWARD_KL = vec(0.5, 1.0, 2.0), vec(1.5, 0.2, 0.1)


def padded_tokens(lengths: torch.Tensor, width: int, seed: int) -> torch.Tensor:
    draw = torch.Generator().manual_seed(seed)
    values = -torch.rand(len(lengths), width, generator=draw, dtype=torch.float64)
    return values * (torch.arange(width) < lengths.unsqueeze(-1))


def test_tdpo_without_divergences_is_dpo() -> None:
    zero = torch.zeros_like(FOUR[0])
    torch.testing.assert_close(tdpo1(*FOUR, zero, zero, beta=0.5), DPO)
    torch.testing.assert_close(tdpo2(*FOUR, *FORWARD_KL, beta=0.5, alpha=0.0), DPO)


def test_tdpo2_at_weight_one_has_tdpo1_s_value_but_not_its_gradient() -> None:
    gradients = {}
    for name, loss in [("tdpo1", tdpo1), ("tdpo2", tdpo2)]:
        leaves = [value.clone().requires_grad_() for value in FORWARD_KL]
        options = {"beta": 0.5} if loss is tdpo1 else {"beta": 0.5, "alpha": 1.0}
        found = loss(*FOUR, *leaves, **options)
        found.sum().backward()
        gradients[name] = [leaf.grad for leaf in leaves]
    torch.testing.assert_close(tdpo2(*FOUR, *FORWARD_KL, beta=0.5, alpha=1.0), found.detach())
    torch.testing.assert_close(tdpo1(*FOUR, *FORWARD_KL, beta=0.5), found.detach())
    torch.testing.assert_close(gradients["tdpo1"][1], gradients["tdpo2"][1])
    assert (gradients["tdpo1"][0] < 0).all()
    assert gradients["tdpo2"][0] is None


def test_tdpo_makes_the_rejected_response_s_divergence_costly() -> None:
    more = FORWARD_KL[0], FORWARD_KL[1] + 1
    assert (
        tdpo2(*FOUR, *more, beta=0.5, alpha=0.5) > tdpo2(*FOUR, *FORWARD_KL, beta=0.5, alpha=0.5)
    ).all()


def ld_tokens() -> tuple[torch.Tensor, ...]:
    """Chosen and rejected padded to different widths."""
    return (
        padded_tokens(LENGTHS[0], 5, 0),
        padded_tokens(LENGTHS[1], 4, 1),
        padded_tokens(LENGTHS[0], 5, 2),
        padded_tokens(LENGTHS[1], 4, 3),
    )


def test_ld_dpo_is_dpo_at_weight_one() -> None:
    sums = (value.sum(-1) for value in ld_tokens())
    found = ld_dpo(*ld_tokens(), *LENGTHS, beta=0.5, alpha=1.0)
    torch.testing.assert_close(found, losses.dpo(*sums, beta=0.5))


def test_ld_dpo_at_weight_zero_cuts_both_responses_to_the_shorter_one() -> None:
    tokens = ld_tokens()
    shared = [3, 2, 1]
    cut = [torch.stack([row[:n].sum() for row, n in zip(v, shared, strict=True)]) for v in tokens]
    found = ld_dpo(*tokens, *LENGTHS, beta=0.5, alpha=0.0)
    torch.testing.assert_close(found, losses.dpo(*cut, beta=0.5))


def test_ld_dpo_does_not_see_padding() -> None:
    wider = [torch.nn.functional.pad(value, (0, 3)) for value in ld_tokens()]
    expected = ld_dpo(*ld_tokens(), *LENGTHS, beta=0.5, alpha=0.3)
    torch.testing.assert_close(ld_dpo(*wider, *LENGTHS, beta=0.5, alpha=0.3), expected)


def test_wpo_s_weight_is_one_on_average_over_the_policy_s_own_tokens() -> None:
    """E_{v ~ pi} [pi(v) / sum pi^2] = 1 for every distribution: one token, enumerated."""
    logits = torch.randn(20, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    probabilities = logits.softmax(-1)
    collision = (probabilities**2).sum(-1).log()
    for row, log_collision in zip(logits, collision, strict=True):
        every_token = token_logps(row.expand(7, 7), torch.arange(7)).unsqueeze(-1)
        weight = wpo_weight(every_token, log_collision.expand(7, 1), torch.ones(7))
        assert (row.softmax(-1) * weight).sum().item() == pytest.approx(1, abs=1e-12)


def test_wpo_weighs_dpo_and_cuts_the_weight_of_the_pair() -> None:
    lengths = torch.tensor([2, 2, 2]), torch.tensor([2, 2, 2])
    # Mean log-weights 0.5, -1, 2 for the chosen and -0.1, -1, -1 for the rejected response.
    tokens = [row.unsqueeze(-1).expand(3, 2) for row in (vec(-0.5, -2.0, -1.0), vec(-1.1, -2, -2))]
    collisions = [
        row.unsqueeze(-1).expand(3, 2) for row in (vec(-1.0, -1.0, -3.0), vec(-1, -1, -1))
    ]
    tensors = *FOUR, *tokens, *collisions, *lengths
    weights = vec(0.5 - 0.1, -1.0 - 1.0, 2.0 - 1.0).exp()
    uncut = wpo(*tensors, beta=0.5, max_weight=math.inf)
    torch.testing.assert_close(uncut, weights * DPO)
    # The cut is on the product: the third response's weight of e^2 survives beside its e^-1.
    cut = wpo(*tensors, beta=0.5, max_weight=2.0)
    torch.testing.assert_close(cut, vec(weights[0], weights[1], 2.0) * DPO)


def test_mallows_po_ignores_the_margin_where_the_reference_could_say_anything() -> None:
    uniform = [length * math.log(50) for length in LENGTHS]
    options = {"beta": 0.5, "dispersion_scale": 2.0, "vocab_size": 50}
    found = mallows_po(*FOUR, *uniform, *LENGTHS, **options)
    torch.testing.assert_close(found, torch.full_like(found, math.log(2)))


def test_mallows_po_is_dpo_where_the_dispersion_is_one() -> None:
    """A tenth of the largest entropy in both: phi = log(10) / log(10)."""
    tenth = [length * math.log(50) / 10 for length in LENGTHS]
    options = {"beta": 0.5, "dispersion_scale": 1 / math.log(10), "vocab_size": 50}
    torch.testing.assert_close(mallows_po(*FOUR, *tenth, *LENGTHS, **options), DPO)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_mallows_po_is_finite_for_a_reference_without_entropy(dtype: torch.dtype) -> None:
    four = [value.to(dtype).requires_grad_() for value in FOUR]
    zero = torch.zeros(3, dtype=dtype)
    options = {"beta": 0.5, "dispersion_scale": 2.0, "vocab_size": 50}
    found = mallows_po(*four, zero, zero, *LENGTHS, **options)
    found.sum().backward()
    assert found.isfinite().all()
    assert four[0].grad.isfinite().all()
