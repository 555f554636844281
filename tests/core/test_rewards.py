import itertools
import math

import pytest
import torch

from dpo.core import rewards
from dpo.errors import InputError


def vec(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_implicit_reward_is_beta_times_the_log_ratio() -> None:
    found = rewards.implicit_reward(vec(-1.0, -5.0), vec(-3.0, -4.0), beta=0.5)
    torch.testing.assert_close(found, vec(1.0, -0.5))


def test_bradley_terry_by_hand() -> None:
    assert rewards.bradley_terry_log_prob(vec(math.log(3)), vec(0.0)).exp().item() == pytest.approx(
        0.75
    )
    assert rewards.bradley_terry_nll(vec(2.0), vec(2.0)).item() == pytest.approx(math.log(2))


def test_bradley_terry_stays_finite_at_large_margins() -> None:
    assert rewards.bradley_terry_nll(vec(-1e4), vec(1e4)).item() == 2e4


def test_preference_table_is_complementary() -> None:
    table = rewards.preference_table(vec(0.3, -1.0, 2.0))
    torch.testing.assert_close(table + table.T, torch.ones(3, 3, dtype=torch.float64))


def test_plackett_luce_by_hand() -> None:
    ranked = vec(3.0, 2.0, 1.0).log()
    assert rewards.plackett_luce_log_prob(ranked).exp().item() == pytest.approx(3 / 6 * 2 / 3)
    assert rewards.plackett_luce_log_prob(ranked, top_k=1).exp().item() == pytest.approx(0.5)


def test_plackett_luce_sums_to_one_and_ignores_shifts() -> None:
    reward = vec(0.5, -0.2, 1.0, 0.0)
    orders = torch.tensor(list(itertools.permutations(range(4))))
    law = rewards.plackett_luce_log_prob(reward[orders]).exp()
    assert law.sum().item() == pytest.approx(1.0)
    torch.testing.assert_close(law, rewards.plackett_luce_log_prob(reward[orders] + 9.0).exp())


def test_plackett_luce_has_finite_values_and_gradients_at_extreme_rewards() -> None:
    ranked = vec(-800.0, 0.0, 800.0).requires_grad_()
    value = rewards.plackett_luce_log_prob(ranked)
    value.backward()
    assert value.item() == pytest.approx(-2400.0)
    assert ranked.grad is not None
    assert bool(ranked.grad.isfinite().all())


@pytest.mark.parametrize("top_k", [0, 4])
def test_top_k_must_fit(top_k: int) -> None:
    with pytest.raises(InputError, match="between 1 and 3 responses"):
        rewards.plackett_luce_log_prob(vec(1.0, 2.0, 3.0), top_k=top_k)


def test_sampled_rankings_follow_the_best_choice_probabilities() -> None:
    reward = vec(1.0, 0.0, -1.0)
    drawn = rewards.sample_rankings(reward, 50_000, generator=torch.Generator().manual_seed(0))
    first = torch.bincount(drawn[:, 0], minlength=3) / 50_000
    torch.testing.assert_close(first, torch.softmax(reward, 0).float(), atol=0.01, rtol=0)
    assert bool((drawn.sort(dim=-1).values == torch.arange(3)).all())


def test_beta_must_be_positive() -> None:
    with pytest.raises(InputError, match="beta must be positive"):
        rewards.implicit_reward(vec(0.0), vec(0.0), beta=0.0)
