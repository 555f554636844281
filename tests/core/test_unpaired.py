"""Losses on single judged responses: by hand, by identities, at extremes, and their estimates."""

import itertools
import math
from collections.abc import Callable

import pytest
import torch

from dpo.core import losses, unpaired

BETA = 0.3
KL = torch.tensor(0.4, dtype=torch.float64)
SHIFT = torch.tensor(-0.2, dtype=torch.float64)
DESIRABLE = torch.tensor([True, False, False, True, True])
UnpairedLoss = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def vec(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def draw(seed: int, size: int) -> torch.Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def kto(
    policy: torch.Tensor,
    reference: torch.Tensor,
    desirable: torch.Tensor,
    kl: torch.Tensor = KL,
    *,
    beta: float = BETA,
) -> torch.Tensor:
    weights = {"desirable_weight": 1.3, "undesirable_weight": 0.8}
    return unpaired.kto(policy, reference, desirable, kl, beta=beta, **weights)


def bco(
    policy: torch.Tensor,
    reference: torch.Tensor,
    desirable: torch.Tensor,
    shift: torch.Tensor = SHIFT,
    *,
    beta: float = BETA,
) -> torch.Tensor:
    return unpaired.bco(policy, reference, desirable, shift, beta=beta)


def nca(
    policy: torch.Tensor,
    reference: torch.Tensor,
    desirable: torch.Tensor,
    *,
    beta: float = BETA,
    desirable_fraction: float = 0.35,
) -> torch.Tensor:
    options = {"beta": beta, "desirable_fraction": desirable_fraction}
    return unpaired.nca_unpaired(policy, reference, desirable, **options)


def aot(
    policy: torch.Tensor,
    reference: torch.Tensor,
    desirable: torch.Tensor,
    *,
    beta: float = BETA,
) -> torch.Tensor:
    return unpaired.aot_unpaired(policy, reference, desirable, beta=beta)


EVERY = pytest.mark.parametrize("loss", [kto, bco, nca, aot])
SEPARATE = pytest.mark.parametrize("loss", [kto, bco, nca])


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


# --- values against the formulas as written ---


@pytest.mark.parametrize("h", [-9.0, -0.5, 0.0, 0.4, 20.0])
def test_each_loss_is_its_formula(h: float) -> None:
    both = torch.tensor([True, False])
    arguments = vec(h - 7, h - 7), vec(-7.0, -7.0), both
    u, z = BETA * h, BETA * (h - KL.item())
    expected_kto = [1.3 * (1 - sigmoid(z)), 0.8 * (1 - sigmoid(-z))]
    assert kto(*arguments).tolist() == pytest.approx(expected_kto, abs=1e-14)
    logit = u - SHIFT.item()
    expected_bco = [-math.log(sigmoid(logit)), -math.log(1 - sigmoid(logit))]
    assert bco(*arguments).tolist() == pytest.approx(expected_bco, abs=1e-12)
    noise = -0.35 * math.log(1 - sigmoid(u))
    expected_nca = [-math.log(sigmoid(u)) + noise, noise]
    assert nca(*arguments).tolist() == pytest.approx(expected_nca, abs=1e-12)


def test_values_at_the_reference() -> None:
    policy = draw(0, 5)
    zero = vec(0.0).squeeze()
    halves = torch.where(DESIRABLE, 0.65, 0.4).double()
    torch.testing.assert_close(kto(policy, policy, DESIRABLE, zero), halves)
    log_two = torch.full((5,), math.log(2), dtype=torch.float64)
    torch.testing.assert_close(bco(policy, policy, DESIRABLE, zero), log_two)
    torch.testing.assert_close(aot(policy, policy, DESIRABLE), log_two)
    found = nca(policy, policy, DESIRABLE)
    torch.testing.assert_close(found, (DESIRABLE + 0.35) * log_two)


def test_kto_is_bounded_and_saturates_on_both_sides() -> None:
    policy = vec(-1e4, 1e4).requires_grad_()
    both = torch.tensor([True, True])
    found = kto(policy, vec(0.0, 0.0), both)
    found.sum().backward()
    assert found.tolist() == [1.3, 0.0]
    assert policy.grad is not None
    assert not policy.grad.any()


def test_kto_keeps_a_small_loss_that_one_minus_sigmoid_would_round_away() -> None:
    found = kto(
        torch.tensor([40.0]), torch.tensor([0.0]), torch.tensor([True]), torch.tensor(0.0), beta=1.0
    )
    assert found.item() == pytest.approx(1.3 * math.exp(-40), rel=1e-5)


# --- identities with the paired losses ---


def test_bco_of_both_responses_of_a_pair_exceeds_dpo_and_is_tightest_at_half_way() -> None:
    chosen, rejected, reference = vec(3.0), vec(-1.0), vec(-2.0)

    def both(shift: float) -> float:
        delta = torch.tensor(shift, dtype=torch.float64)
        up = bco(chosen, reference, torch.tensor([True]), delta)
        return (up + bco(rejected, reference, torch.tensor([False]), delta)).item()

    dpo = losses.dpo(chosen, rejected, reference, reference, beta=BETA, label_smoothing=0.0).item()
    shifts = [s / 10 for s in range(-40, 41)]
    values = [both(shift) for shift in shifts]
    assert min(values) > dpo
    assert shifts[values.index(min(values))] == pytest.approx(BETA * (5.0 + 1.0) / 2)


def test_nca_and_bco_split_the_paired_losses_by_response() -> None:
    chosen, rejected, ref_chosen, ref_rejected = (draw(seed, 4) for seed in range(4))
    pair = chosen, rejected, ref_chosen, ref_rejected
    policy, reference = torch.cat([chosen, rejected]), torch.cat([ref_chosen, ref_rejected])
    labels = torch.tensor([True] * 4 + [False] * 4)
    split = nca(policy, reference, labels, desirable_fraction=0.5)
    torch.testing.assert_close(split[:4] + split[4:], losses.nca_pair(*pair, beta=BETA))
    split = bco(policy, reference, labels)
    torch.testing.assert_close(split[:4] + split[4:], losses.bco_pair(*pair, SHIFT, beta=BETA))


# --- AOT: the matching ---


def pair_loss(first: float, second: float) -> float:
    return math.log1p(math.exp(-BETA * (first - second)))


def test_aot_with_equal_numbers_pairs_the_sorted_responses() -> None:
    h = [0.3, 5.0, -2.0, 1.0, 0.0, -1.0]
    desirable = torch.tensor([True, True, False, True, False, False])
    found = aot(vec(*h), vec(*[0.0] * 6), desirable).tolist()
    up, down = [0, 3, 1], [2, 5, 4]  # worst to best
    for i, j in zip(up, down, strict=True):
        assert found[i] == pytest.approx(pair_loss(h[i], h[j]), abs=1e-14)
        assert found[j] == pytest.approx(found[i], abs=1e-15)


@pytest.mark.parametrize(("num_up", "num_down"), [(1, 4), (2, 3), (4, 6), (5, 1), (7, 7), (13, 9)])
def test_aot_is_the_integral_over_quantiles(num_up: int, num_down: int) -> None:
    """Against copying every response until both kinds are equally many."""
    h = 3 * draw(num_up, num_up + num_down)
    desirable = torch.arange(num_up + num_down) < num_up
    found = aot(h, torch.zeros_like(h), desirable)
    up = sorted(h[desirable].tolist() * num_down)
    down = sorted(h[~desirable].tolist() * num_up)
    expected = sum(map(pair_loss, up, down)) / (num_up * num_down)
    assert found.mean().item() == pytest.approx(expected, abs=1e-13)
    assert found[desirable].mean().item() == pytest.approx(expected, abs=1e-13)
    assert found[~desirable].mean().item() == pytest.approx(expected, abs=1e-13)


def test_aot_matching_is_the_cheapest_of_all() -> None:
    """Optimal transport in one dimension: no other assignment has a smaller convex cost."""
    h = 3 * draw(5, 8)
    desirable = torch.arange(8) < 4
    up, down = h[:4].tolist(), h[4:].tolist()
    costs = [sum(map(pair_loss, up, order)) / 4 for order in itertools.permutations(down)]
    found = aot(h, torch.zeros_like(h), desirable).mean().item()
    assert found == pytest.approx(min(costs), abs=1e-14)


def test_aot_has_nothing_to_match_in_a_batch_of_one_kind() -> None:
    for labels in ([True] * 3, [False] * 3, []):
        policy = draw(0, len(labels)).requires_grad_()
        found = aot(policy, draw(1, len(labels)), torch.tensor(labels, dtype=torch.bool))
        found.sum().backward()
        assert found.tolist() == [0.0] * len(labels)
        assert policy.grad is not None
        assert not policy.grad.any()


def test_aot_depends_on_the_batch_and_not_on_its_order() -> None:
    policy, reference = 3 * draw(0, 5), draw(1, 5)
    found = aot(policy, reference, DESIRABLE)
    order = torch.tensor([4, 2, 0, 3, 1])
    moved = aot(policy[order], reference[order], DESIRABLE[order])
    torch.testing.assert_close(moved, found[order])
    fewer = aot(policy[:4], reference[:4], DESIRABLE[:4])
    assert not torch.allclose(fewer, found[:4])


# --- what all of them share ---


@EVERY
def test_gradient_by_central_differences(loss: UnpairedLoss) -> None:
    policy, reference = 4 * draw(2, 5), draw(3, 5)
    leaf = policy.clone().requires_grad_()
    loss(leaf, reference, DESIRABLE).mean().backward()
    assert leaf.grad is not None
    for index in range(5):
        step = torch.zeros(5, dtype=torch.float64)
        step[index] = 1e-5
        high = loss(policy + step, reference, DESIRABLE).mean().item()
        low = loss(policy - step, reference, DESIRABLE).mean().item()
        assert leaf.grad[index].item() == pytest.approx((high - low) / 2e-5, rel=1e-6, abs=1e-10)


@pytest.mark.parametrize("loss", [kto, bco, aot])
def test_training_pushes_desirable_up_and_undesirable_down(loss: UnpairedLoss) -> None:
    policy = draw(0, 5).requires_grad_()
    loss(policy, draw(1, 5), DESIRABLE).mean().backward()
    assert policy.grad is not None
    assert ((policy.grad < 0) == DESIRABLE).all()


def test_nca_also_pushes_desirable_responses_down_once_they_are_likely_enough() -> None:
    """Its target is absolute: sigmoid(u) = 1 / (1 + rho), where the slope changes sign."""
    target = math.log(1 / 0.35) / BETA
    for shift, sign in ((-0.1, -1), (0.1, 1)):
        policy = vec(target + shift).requires_grad_()
        nca(policy, vec(0.0), torch.tensor([True])).sum().backward()
        assert policy.grad is not None
        assert math.copysign(1, policy.grad.item()) == sign


@EVERY
def test_no_gradient_flows_through_the_reference(loss: UnpairedLoss) -> None:
    policy, reference = draw(0, 5).requires_grad_(), draw(1, 5).requires_grad_()
    loss(policy, reference, DESIRABLE).sum().backward()
    assert policy.grad is not None
    assert reference.grad is None


@pytest.mark.parametrize("loss", [kto, bco])
def test_no_gradient_flows_through_the_estimate(loss: Callable[..., torch.Tensor]) -> None:
    policy, estimate = draw(0, 5).requires_grad_(), torch.tensor(0.5, requires_grad=True)
    loss(policy, draw(1, 5), DESIRABLE, estimate).sum().backward()
    assert estimate.grad is None


@EVERY
def test_beta_scales_log_ratios(loss: Callable[..., torch.Tensor]) -> None:
    policy, reference = draw(0, 5), draw(1, 5)
    plain = {kto: (KL,), bco: (SHIFT,)}.get(loss, ())
    scaled = {kto: (KL * 4,), bco: (SHIFT,)}.get(loss, ())  # the shift is a reward, KL is in nats
    torch.testing.assert_close(
        loss(4 * policy, 4 * reference, DESIRABLE, *scaled, beta=0.25),
        loss(policy, reference, DESIRABLE, *plain, beta=1.0),
    )


@SEPARATE
def test_a_response_is_worth_the_same_in_any_batch(loss: UnpairedLoss) -> None:
    policy, reference = draw(0, 5), draw(1, 5)
    together = loss(policy, reference, DESIRABLE)
    alone = [loss(policy[i : i + 1], reference[i : i + 1], DESIRABLE[i : i + 1]) for i in range(5)]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-14, atol=0)


@EVERY
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_huge_log_ratios_have_finite_losses_and_gradients(
    loss: Callable[..., torch.Tensor], dtype: torch.dtype
) -> None:
    policy = torch.tensor([1e4, 1e4, -1e4, -1e4, 0.0], dtype=dtype, requires_grad=True)
    found = loss(policy, torch.zeros(5, dtype=dtype), DESIRABLE, beta=1.0)
    found.mean().backward()
    assert bool(found.isfinite().all())
    assert policy.grad is not None
    assert bool(policy.grad.isfinite().all())
    assert found.dtype == policy.grad.dtype == dtype


# --- the estimates ---


def test_reference_point_is_the_mean_log_ratio_cut_at_zero() -> None:
    policy, reference = vec(-1.0, -5.0, -2.0), vec(-4.0, -4.0, -4.0)
    assert unpaired.kto_reference_point(policy, reference).item() == pytest.approx(4 / 3)
    assert unpaired.kto_reference_point(reference, policy).item() == 0.0
    one_negative = unpaired.kto_reference_point(vec(-3.0, -4.5), vec(-4.0, -4.0))
    assert one_negative.item() == pytest.approx(0.25)  # the clamp is on the mean, not on the terms


def test_reference_point_has_no_gradient() -> None:
    policy = vec(-1.0, -2.0).requires_grad_()
    assert not unpaired.kto_reference_point(policy, vec(-3.0, -3.0)).requires_grad


@pytest.mark.parametrize("cuts", [[20], [1, 2, 17], [5, 5, 5, 5], [1] * 20])
def test_the_running_shift_is_the_mean_of_all_rewards_however_they_come(cuts: list[int]) -> None:
    policy, reference = 3 * draw(0, 20), draw(1, 20)
    shift, seen = vec(0.0).squeeze(), torch.tensor(0)
    for part, ref in zip(policy.split(cuts), reference.split(cuts), strict=True):
        shift, seen = unpaired.update_reward_shift(shift, seen, part, ref, beta=BETA)
    assert shift.item() == pytest.approx((BETA * (policy - reference)).mean().item(), abs=1e-14)
    assert seen.item() == 20
    assert shift.dtype == torch.float64


def test_the_running_shift_has_no_gradient_and_changes_no_argument() -> None:
    shift, seen = torch.tensor(1.0), torch.tensor(4)
    policy = draw(0, 4).requires_grad_()
    found, _ = unpaired.update_reward_shift(shift, seen, policy, draw(1, 4), beta=BETA)
    assert not found.requires_grad
    assert (shift.item(), seen.item()) == (1.0, 4)
