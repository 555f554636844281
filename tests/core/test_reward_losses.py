"""The losses of a reward model against numbers derived by hand, and what they are blind to."""

import itertools
import math

import pytest
import torch

from dpo.core.reward_losses import ordered_margins, pair_loss, ranking_loss

FLOAT64 = {"dtype": torch.float64}


def rewards(*values):
    return torch.tensor(values, **FLOAT64)


def test_a_pair_of_odds_three_costs_log_four_thirds():
    loss = pair_loss(rewards(math.log(3.0)), rewards(0.0))
    torch.testing.assert_close(loss, rewards(math.log(4 / 3)))


def test_equal_rewards_cost_log_two_and_a_swap_costs_the_difference():
    chosen, rejected = rewards(0.4, -1.0, 2.0), rewards(0.4, 0.5, -1.0)
    forward, swapped = pair_loss(chosen, rejected), pair_loss(rejected, chosen)
    assert forward[0].item() == pytest.approx(math.log(2))
    torch.testing.assert_close(swapped - forward, chosen - rejected)


def test_a_margin_moves_the_point_of_indifference():
    """Llama 2, Eq. 2: a pair that is ahead by its margin costs what equal rewards cost without."""
    loss = pair_loss(rewards(3.0), rewards(1.0), margins=rewards(2.0))
    assert loss.item() == pytest.approx(math.log(2))
    by_hand = math.log(1 + math.exp(-(0.3 - 0.1 - 1.5)))
    assert pair_loss(rewards(0.3), rewards(0.1), margins=rewards(1.5)).item() == pytest.approx(
        by_hand
    )


def test_centring_adds_the_squared_sum():
    loss = pair_loss(rewards(2.0), rewards(1.0), centre=0.01)
    assert loss.item() == pytest.approx(math.log(1 + math.exp(-1)) + 0.09)


@pytest.mark.parametrize("name", ["pair", "ranking"])
def test_without_centring_a_constant_changes_nothing_and_with_it_the_sum_goes_to_zero(name):
    values = rewards(2.0, 0.5)
    mask, ranks = torch.ones(1, 2, dtype=torch.bool), torch.tensor([[0, 1]])

    def loss(shift, centre):
        moved = values + shift
        if name == "pair":
            return pair_loss(moved[:1], moved[1:], centre=centre).sum()
        return ranking_loss(moved[None], mask, ranks, centre=centre).sum()

    torch.testing.assert_close(loss(0.0, 0.0), loss(7.0, 0.0))
    shift = torch.zeros((), **FLOAT64, requires_grad=True)
    for _ in range(200):
        (gradient,) = torch.autograd.grad(loss(shift, 0.1), shift)
        shift = (shift - 0.5 * gradient).detach().requires_grad_()
    assert shift.item() == pytest.approx(-1.25)  # minus the mean of the two


def test_a_ranking_of_two_is_a_pair():
    chosen, rejected = rewards(0.3, -2.0), rewards(1.0, -4.0)
    mask, ranks = torch.ones(2, 2, dtype=torch.bool), torch.tensor([[0, 1], [0, 1]])
    both = torch.stack([chosen, rejected], dim=1)
    torch.testing.assert_close(
        ranking_loss(both, mask, ranks, centre=0.2), pair_loss(chosen, rejected, centre=0.2)
    )


def test_the_probabilities_of_all_rankings_add_up_to_one():
    values, mask = rewards(0.3, -1.0, 2.0)[None], torch.ones(1, 3, dtype=torch.bool)
    total = sum(
        (-ranking_loss(values, mask, torch.tensor([order]))).exp().item()
        for order in itertools.permutations(range(3))
    )
    assert total == pytest.approx(1)


def test_a_ranking_of_three_by_hand_and_its_tie():
    """Weights 4, 2, 1: strict 4/7 * 2/3; with the last two tied only the first choice counts."""
    values, mask = rewards(4.0, 2.0, 1.0).log()[None], torch.ones(1, 3, dtype=torch.bool)
    strict = ranking_loss(values, mask, torch.tensor([[0, 1, 2]]))
    tied = ranking_loss(values, mask, torch.tensor([[0, 1, 1]]))
    assert (-strict).exp().item() == pytest.approx(8 / 21)
    assert (-tied).exp().item() == pytest.approx(4 / 7)


def test_padding_of_a_ranking_changes_neither_value_nor_gradient():
    short = rewards(0.5, -0.5)[None].requires_grad_()
    one = ranking_loss(
        short, torch.ones(1, 2, dtype=torch.bool), torch.tensor([[0, 1]]), centre=0.3
    )
    long = rewards(0.5, -0.5, math.nan)[None].requires_grad_()
    mask = torch.tensor([[True, True, False]])
    other = ranking_loss(long, mask, torch.tensor([[0, 1, 0]]), centre=0.3)
    torch.testing.assert_close(one, other)
    (a,), (b,) = torch.autograd.grad(one, short), torch.autograd.grad(other, long)
    torch.testing.assert_close(b[0], torch.cat([a[0], rewards(0.0)]))


def test_the_gradient_is_that_of_finite_differences():
    chosen = torch.randn(5, **FLOAT64, generator=torch.Generator().manual_seed(0))
    rejected = torch.randn(5, **FLOAT64, generator=torch.Generator().manual_seed(1))
    margins = torch.rand(5, **FLOAT64, generator=torch.Generator().manual_seed(2))
    inputs = (chosen.requires_grad_(), rejected.requires_grad_())
    assert torch.autograd.gradcheck(
        lambda a, b: pair_loss(a, b, margins=margins, centre=0.05), inputs
    )


def test_margins_are_those_of_the_strictly_ordered_pairs():
    assert ordered_margins([1.0, 4.0], [0, 1]) == [-3.0]
    assert ordered_margins([5.0, 3.0, 2.0, 0.0], [0, 1, 1, 2]) == [2.0, 3.0, 5.0, 3.0, 2.0]
    assert ordered_margins([1.0, 2.0], [0, 0]) == []
