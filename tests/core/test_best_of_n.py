"""Best-of-n against brute force: every sequence of draws, every subset of samples."""

import itertools
import math

import pytest
import torch

from dpo.core import exact
from dpo.core.best_of_n import best_of_n_kl_bound, best_of_n_log_policy, expected_best_of
from dpo.errors import InputError


def world(num_responses, seed, scores=None):
    draw = torch.Generator().manual_seed(seed)
    log_policy = torch.randn(num_responses, generator=draw, dtype=torch.float64).log_softmax(0)
    if scores is None:
        scores = torch.randn(num_responses, generator=draw, dtype=torch.float64)
    return log_policy, torch.as_tensor(scores, dtype=torch.float64)


def by_all_draws(log_policy, scores, n):
    """The winner of every sequence of n draws, the first drawn among those of the best score."""
    probabilities, found = log_policy.exp().tolist(), [0.0] * len(scores)
    for draws in itertools.product(range(len(scores)), repeat=n):
        winner = max(draws, key=lambda y: scores[y].item())  # max gives the first of equal ones
        found[winner] += math.prod(probabilities[y] for y in draws)
    return torch.tensor(found, dtype=torch.float64)


@pytest.mark.parametrize("n", [1, 2, 3, 5])
@pytest.mark.parametrize("scores", [None, [1, 0, 1, 2, 2, 0], [3, 3, 3, 3, 3, 3]])
def test_the_exact_distribution_is_that_of_all_draws(n, scores):
    log_policy, score = world(6, 0, scores)
    found = best_of_n_log_policy(log_policy, score, n=n)
    torch.testing.assert_close(found.exp(), by_all_draws(log_policy, score, n))


def test_a_prompt_is_a_row_of_the_table():
    rows = [world(6, seed) for seed in range(3)]
    table = torch.stack([p for p, _ in rows]), torch.stack([s for _, s in rows])
    expected = torch.stack([best_of_n_log_policy(*row, n=4) for row in rows])
    torch.testing.assert_close(best_of_n_log_policy(*table, n=4), expected)


def test_a_response_outside_the_support_stays_outside():
    log_policy = torch.tensor([0.5, 0.0, 0.5], dtype=torch.float64).log()
    score = torch.tensor([0.0, 9.0, 1.0], dtype=torch.float64)
    found = best_of_n_log_policy(log_policy, score, n=3).exp()
    torch.testing.assert_close(found, torch.tensor([1 / 8, 0, 7 / 8], dtype=torch.float64))


def test_a_response_too_unlikely_for_a_difference_of_sums_keeps_its_ratio():
    """The best of all of 1e-30: it wins wherever it is drawn, n times as often as once."""
    log_policy = torch.tensor([1.0, 1e-30], dtype=torch.float64).log()
    score = torch.tensor([0.0, 1.0], dtype=torch.float64)
    found = best_of_n_log_policy(log_policy, score, n=10)
    torch.testing.assert_close(found[1], log_policy[1] + math.log(10))


def test_one_draw_is_the_policy_itself_and_so_is_any_number_under_a_constant_score():
    log_policy, score = world(50, 1)
    torch.testing.assert_close(best_of_n_log_policy(log_policy, score, n=1), log_policy)
    constant = torch.zeros_like(score)
    torch.testing.assert_close(best_of_n_log_policy(log_policy, constant, n=9), log_policy)


@pytest.mark.parametrize("n", [2, 8, 64, 1000])
def test_the_kl_stays_below_its_bound_and_reaches_it_where_no_response_is_likely(n):
    bound = best_of_n_kl_bound(n)
    for num_responses, scores in [(6, None), (6, [0, 0, 0, 1, 1, 1]), (1000, None)]:
        log_policy, score = world(num_responses, n, scores)
        value = exact.kl(best_of_n_log_policy(log_policy, score, n=n), log_policy).item()
        assert 0 < value < bound
    many = 200 * n
    even = torch.full((many,), -math.log(many), dtype=torch.float64)
    value = exact.kl(best_of_n_log_policy(even, torch.arange(many).double(), n=n), even).item()
    assert value < bound
    assert value == pytest.approx(bound, abs=0.01)


def test_a_response_that_is_almost_certain_leaves_the_kl_far_below_the_bound():
    """The example by which Beirami et al. disprove the formula as a value: two responses."""
    log_policy = torch.tensor([1e-6, 1 - 1e-6], dtype=torch.float64).log()
    for score in ([0.0, 1.0], [1.0, 0.0]):
        best = best_of_n_log_policy(log_policy, torch.tensor(score, dtype=torch.float64), n=100)
        assert exact.kl(best, log_policy).item() < 0.001 * best_of_n_kl_bound(100)


@pytest.mark.parametrize("num_samples", [1, 2, 5, 7])
def test_the_estimate_is_the_mean_over_all_subsets(num_samples):
    draw = torch.Generator().manual_seed(num_samples)
    values = torch.randn(3, num_samples, generator=draw, dtype=torch.float64)
    scores = torch.randint(3, (3, num_samples), generator=draw)  # with ties
    for chosen_by in (None, scores):
        found = expected_best_of(values, chosen_by)
        order = values if chosen_by is None else chosen_by
        for row, k in itertools.product(range(3), range(1, num_samples + 1)):
            best = [
                values[row, max(subset, key=lambda i: (order[row, i].item(), i))].item()
                for subset in itertools.combinations(range(num_samples), k)
            ]
            assert found[row, k - 1].item() == pytest.approx(sum(best) / len(best), abs=1e-12)


def test_the_estimate_is_unbiased_for_the_exact_value():
    log_policy, score = world(8, 3, [0, 0, 1, 1, 2, 2, 3, 4])
    draw = torch.Generator().manual_seed(0)
    drawn = torch.multinomial(log_policy.exp(), 20_000 * 6, replacement=True, generator=draw)
    estimates = expected_best_of(score[drawn].reshape(20_000, 6))
    for k in range(1, 7):
        exactly = exact.expectation(score, best_of_n_log_policy(log_policy, score, n=k)).item()
        stderr = estimates[:, k - 1].std().item() / math.sqrt(20_000)
        assert estimates[:, k - 1].mean().item() == pytest.approx(exactly, abs=4 * stderr)


def test_many_samples_are_counted_without_overflow():
    values = torch.arange(1000, dtype=torch.float64).unsqueeze(0)
    found = expected_best_of(values)[0]
    assert found[0].item() == pytest.approx(499.5)
    assert found[-1].item() == pytest.approx(999)
    # The largest of k of the numbers 0 ... N - 1, drawn without return, is k (N + 1)/(k + 1) - 1.
    k = torch.arange(1, 1001).double()
    torch.testing.assert_close(found, k * 1001 / (k + 1) - 1, rtol=1e-9, atol=0)


@pytest.mark.parametrize("n", [0, -1])
def test_no_draw_is_refused(n):
    log_policy, score = world(3, 0)
    for call in (
        lambda: best_of_n_kl_bound(n),
        lambda: best_of_n_log_policy(log_policy, score, n=n),
    ):
        with pytest.raises(InputError, match="at least 1 draw"):
            call()
