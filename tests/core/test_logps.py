"""Log-probabilities and divergences of next-token distributions, against explicit sums."""

import math

import pytest
import torch

from dpo.core.logps import (
    at_least_float32,
    sum_per_sequence,
    token_entropy,
    token_kl,
    token_logps,
)


def log_softmax(logits: list[float]) -> list[float]:
    """By the equation, in python's floats."""
    top = max(logits)
    log_normaliser = top + math.log(sum(math.exp(z - top) for z in logits))
    return [z - log_normaliser for z in logits]


def random_logits(num_tokens: int, vocab_size: int, *, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 3 * torch.randn(num_tokens, vocab_size, generator=generator, dtype=torch.float64)


def test_token_logps_by_hand() -> None:
    logits = torch.tensor([[1, 2, 5]]).double().log()
    for target, probability in [(0, 1 / 8), (1, 2 / 8), (2, 5 / 8)]:
        found = token_logps(logits, torch.tensor([target]))
        assert found.item() == pytest.approx(math.log(probability), abs=1e-14)


def test_token_logps_equal_the_sum_written_out() -> None:
    logits = random_logits(20, 50)
    targets = torch.arange(20) * 7 % 50
    found = token_logps(logits, targets)
    for row, target, value in zip(logits.tolist(), targets.tolist(), found.tolist(), strict=True):
        assert value == pytest.approx(log_softmax(row)[target], abs=1e-12)


def test_token_logps_do_not_change_when_all_logits_are_shifted() -> None:
    logits, targets = random_logits(4, 30), torch.tensor([1, 2, 3, 4])
    found = token_logps(logits + 1000, targets)
    torch.testing.assert_close(found, token_logps(logits, targets), rtol=0, atol=1e-11)


def test_extreme_logits_give_finite_log_probabilities_and_gradients() -> None:
    logits = torch.tensor([[1e4, -1e4, 0.0]], requires_grad=True)
    found = token_logps(logits, torch.tensor([1]))
    found.sum().backward()
    assert found.item() == pytest.approx(-2e4)
    torch.testing.assert_close(logits.grad, torch.tensor([[-1.0, 1.0, 0.0]]))


def test_gradient_of_a_log_probability_is_one_hot_minus_softmax() -> None:
    logits = random_logits(1, 5).requires_grad_()
    token_logps(logits, torch.tensor([3])).sum().backward()
    probabilities = [math.exp(value) for value in log_softmax(logits[0].tolist())]
    expected = [(v == 3) - p for v, p in enumerate(probabilities)]
    torch.testing.assert_close(logits.grad[0], torch.tensor(expected, dtype=torch.float64))


def test_half_precision_logits_are_normalised_in_float32() -> None:
    """Of the same bfloat16 logits over GPT-2's vocabulary, the error is float32's (under 1e-5 nat a
    token); normalising in bfloat16 is off by tenths of a nat."""
    logits = random_logits(50, 50_257).bfloat16()
    targets = torch.arange(50)
    exact = token_logps(logits.double(), targets)
    found = token_logps(logits, targets)
    assert found.dtype == torch.float32
    assert (found - exact).abs().max() < 1e-5
    naive = logits.log_softmax(-1).gather(-1, targets.unsqueeze(-1)).squeeze(-1)
    assert (naive.double() - exact).abs().max() > 1e-2


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
)
def test_only_half_precision_is_widened(given: torch.dtype, expected: torch.dtype) -> None:
    assert at_least_float32(torch.ones(2, dtype=given)).dtype == expected


def test_sums_are_per_sequence_whatever_the_order_and_empty_ones_are_zero() -> None:
    values = torch.tensor([1.0, 10.0, 100.0, 1000.0])
    found = sum_per_sequence(values, torch.tensor([2, 0, 2, 0]), 4)
    assert found.tolist() == [1010.0, 0.0, 101.0, 0.0]


def test_sums_of_many_small_values_are_exact_in_float64() -> None:
    """Ten thousand tokens of -0.1 nat: float32's running sum is off by more than 1e-4."""
    values = torch.full((10_000,), -0.1)
    found = sum_per_sequence(values, torch.zeros(10_000, dtype=torch.long), 1)
    assert found.dtype == torch.float64
    assert found.item() == pytest.approx(10_000 * values[0].item(), abs=1e-9)
    running = torch.zeros(1).index_add(0, torch.zeros(10_000, dtype=torch.long), values)
    assert abs(running.item() - found.item()) > 1e-4


def test_the_gradient_of_a_sum_reaches_every_token_of_its_sequence_only() -> None:
    values = torch.zeros(4, requires_grad=True)
    sum_per_sequence(values, torch.tensor([0, 1, 0, 1]), 2)[1].backward()
    assert values.grad.tolist() == [0.0, 1.0, 0.0, 1.0]


def test_token_kl_by_hand() -> None:
    policy = torch.tensor([[0.5, 0.5]]).double().log()
    reference = torch.tensor([[0.25, 0.75]]).double().log()
    expected = 0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75)
    assert token_kl(policy, reference).item() == pytest.approx(expected, abs=1e-14)
    backward = 0.25 * math.log(0.25 / 0.5) + 0.75 * math.log(0.75 / 0.5)
    assert token_kl(reference, policy).item() == pytest.approx(backward, abs=1e-14)


def test_token_kl_equals_the_sum_written_out() -> None:
    policy, reference = random_logits(10, 40), random_logits(10, 40, seed=1)
    for p, q, value in zip(policy, reference, token_kl(policy, reference), strict=True):
        log_p, log_q = log_softmax(p.tolist()), log_softmax(q.tolist())
        expected = sum(math.exp(a) * (a - b) for a, b in zip(log_p, log_q, strict=True))
        assert value.item() == pytest.approx(expected, abs=1e-12)


def test_token_entropy_is_that_of_the_distribution_and_shifts_do_not_matter() -> None:
    logits = random_logits(10, 7)
    p = logits.softmax(-1)
    torch.testing.assert_close(token_entropy(logits), -(p * p.log()).sum(-1))
    torch.testing.assert_close(token_entropy(logits + 9), token_entropy(logits))
    assert token_entropy(torch.zeros(1, 50)).item() == pytest.approx(math.log(50))
    assert token_entropy(torch.tensor([[0.0, 200.0]])).item() == pytest.approx(0)


def test_token_kl_of_equal_distributions_is_zero() -> None:
    logits = random_logits(10, 1000).float()
    assert token_kl(logits, logits).abs().max() == 0
    torch.testing.assert_close(token_kl(logits, logits + 5), torch.zeros(10), rtol=0, atol=1e-5)


def test_token_kl_of_nearly_equal_distributions_is_not_negative() -> None:
    """Rounding alone would make about half of these negative."""
    logits = random_logits(1000, 300).float()
    noise = random_logits(1000, 300, seed=1).float()
    assert token_kl(logits, logits + 1e-6 * noise).min() >= 0


def test_token_kl_has_the_gradient_of_the_divergence() -> None:
    policy, reference = random_logits(3, 6).requires_grad_(), random_logits(3, 6, seed=1)
    assert torch.autograd.gradcheck(lambda logits: token_kl(logits, reference), (policy,))
