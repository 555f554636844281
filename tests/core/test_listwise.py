"""Losses on ranked lists against enumeration, by identities, at extremes, and with padding."""

import itertools
import math
from collections.abc import Callable

import pytest
import torch

from dpo.core import listwise, losses
from dpo.errors import InputError

BETA = 0.7
Losses = Callable[..., torch.Tensor]


def plackett_luce(*tensors: torch.Tensor, top: int | None = None, beta: float = BETA):
    return listwise.plackett_luce(*tensors, beta=beta, top=top)


def draw(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def ranking(*ranks: int) -> torch.Tensor:
    return torch.tensor([ranks])


def whole(logps: torch.Tensor) -> torch.Tensor:
    """The mask of lists without padding."""
    return torch.ones_like(logps, dtype=torch.bool)


def one_list(num_responses: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    policy, reference = 3 * draw(seed, 1, num_responses), draw(seed + 1, 1, num_responses)
    return policy, reference, whole(policy)


def order_probability(rewards: list[float], order: tuple[int, ...], places: int) -> float:
    """Plackett-Luce probability that `order` comes out, as far as its first `places`."""
    probability, rest = 1.0, list(order)
    for response in order[:places]:
        probability *= math.exp(rewards[response]) / sum(math.exp(rewards[j]) for j in rest)
        rest.remove(response)
    return probability


def enumerated(rewards: list[float], ranks: list[int], top: int | None = None) -> float:
    """Minus the log-probability of the ranking: the sum over every full order that agrees with it.

    With `top`, an order agrees if it has the groups that begin within the first `top` places where
    they belong.
    """
    place = [sum(other < rank for other in ranks) for rank in ranks]
    if top is not None:
        place = [p if p < top else len(ranks) for p in place]
    total = 0.0
    for order in itertools.permutations(range(len(ranks))):
        places = [place[response] for response in order]
        if places == sorted(places):
            total += order_probability(rewards, order, len(ranks))
    return -math.log(total)


def rewards_of(policy: torch.Tensor, reference: torch.Tensor, beta: float = BETA) -> list[float]:
    return [beta * (p - r) for p, r in zip(policy[0].tolist(), reference[0].tolist(), strict=True)]


def fd_gradient(function: Callable[[torch.Tensor], torch.Tensor], at: torch.Tensor) -> torch.Tensor:
    """Central differences of the sum of a loss."""
    slopes = torch.zeros_like(at)
    for index in itertools.product(*(range(size) for size in at.shape)):
        step = torch.zeros_like(at)
        step[index] = 1e-5
        slopes[index] = (function(at + step) - function(at - step)).sum() / 2e-5
    return slopes


def reference_all_pairs(rewards: list[float], ranks: list[int]) -> float:
    pairs = [(i, j) for i in range(len(ranks)) for j in range(len(ranks)) if ranks[i] < ranks[j]]
    return sum(math.log1p(math.exp(rewards[j] - rewards[i])) for i, j in pairs) / len(pairs)


def reference_lipo(rewards: list[float], scores: list[float]) -> float:
    by_reward = sorted(range(len(rewards)), key=lambda i: -rewards[i])
    tau = [by_reward.index(i) + 1 for i in range(len(rewards))]
    total = 0.0
    for i, j in itertools.permutations(range(len(scores)), 2):
        if scores[i] > scores[j]:
            gain = abs((2 ** scores[i] - 1) - (2 ** scores[j] - 1))
            discount = abs(1 / math.log(1 + tau[i]) - 1 / math.log(1 + tau[j]))
            total += gain * discount * math.log(1 + math.exp(rewards[j] - rewards[i]))
    return total


# --- Plackett-Luce: full rankings ---


@pytest.mark.parametrize("num_responses", [1, 2, 3, 5])
def test_plackett_luce_is_the_enumerated_likelihood(num_responses: int) -> None:
    policy, reference, mask = one_list(num_responses)
    ranks = torch.arange(num_responses).unsqueeze(0)
    found = plackett_luce(policy, reference, mask, ranks).item()
    expected = enumerated(rewards_of(policy, reference), list(range(num_responses)))
    assert found == pytest.approx(expected, abs=1e-12)


def test_plackett_luce_by_hand() -> None:
    policy = torch.tensor([[3.0, 2.0, 1.0]], dtype=torch.float64).log()
    found = plackett_luce(
        policy, torch.zeros_like(policy), whole(policy), ranking(0, 1, 2), beta=1.0
    )
    assert found.item() == pytest.approx(-math.log(3 / 6 * 2 / 3), abs=1e-14)


def test_the_probabilities_of_all_rankings_sum_to_one() -> None:
    policy, reference, mask = one_list(5)
    orders = torch.tensor(list(itertools.permutations(range(5))))
    repeated = [tensor.expand(len(orders), 5) for tensor in (policy, reference, mask)]
    total = (-plackett_luce(*repeated, orders)).exp().sum().item()
    assert total == pytest.approx(1.0, abs=1e-12)


@pytest.mark.parametrize("num_responses", [2, 4, 20, 64])
def test_policy_equal_to_reference_costs_log_factorial(num_responses: int) -> None:
    policy = 100 * draw(3, 2, num_responses)
    ranks = torch.arange(num_responses).expand(2, -1)
    found = plackett_luce(policy, policy.clone(), whole(policy), ranks)
    expected = torch.full((2,), math.lgamma(num_responses + 1), dtype=torch.float64)
    torch.testing.assert_close(found, expected, rtol=1e-13, atol=0)


def test_a_list_without_a_comparison_costs_nothing_and_has_a_gradient() -> None:
    policy = draw(5, 2, 3).requires_grad_()
    mask = torch.tensor([[True, False, False], [True, True, True]])
    ranks = torch.tensor([[0, 0, 0], [4, 4, 4]])
    for loss in (plackett_luce, all_pairs):
        policy.grad = None
        found = loss(policy, draw(6, 2, 3), mask, ranks)
        found.sum().backward()
        assert found.tolist() == [0.0, 0.0]
        assert policy.grad is not None
        assert not policy.grad.any()


# --- top-k ---


@pytest.mark.parametrize("top", [1, 2, 3, 4, 9])
def test_top_k_is_the_sum_over_all_completions(top: int) -> None:
    """The probability of the first places is the marginal of the full ranking's law."""
    policy, reference, mask = one_list(5, seed=11)
    order = (2, 0, 4, 1, 3)
    ranks = torch.tensor(order).argsort().unsqueeze(0)
    found = (-plackett_luce(policy, reference, mask, ranks, top=top)).exp().item()
    rewards = rewards_of(policy, reference)
    completions = [
        order[:top] + rest for rest in itertools.permutations(set(range(5)) - set(order[:top]))
    ]
    marginal = sum(order_probability(rewards, completion, 5) for completion in completions)
    assert found == pytest.approx(marginal, abs=1e-14)
    assert found == pytest.approx(order_probability(rewards, order, top), abs=1e-14)


def test_top_one_is_cross_entropy_of_a_softmax_over_rewards() -> None:
    policy, reference, mask = one_list(6)
    found = plackett_luce(policy, reference, mask, torch.arange(6).unsqueeze(0), top=1)
    expected = -(BETA * (policy - reference)).log_softmax(-1)[:, 0]
    torch.testing.assert_close(found, expected)


def test_responses_known_only_to_be_worse_are_a_partial_ranking() -> None:
    """One rank for the unordered rest, and top-k, are two ways to say the same."""
    policy, reference, mask = one_list(6)
    tied_rest = plackett_luce(policy, reference, mask, ranking(0, 1, 2, 2, 2, 2))
    top_two = plackett_luce(policy, reference, mask, torch.arange(6).unsqueeze(0), top=2)
    torch.testing.assert_close(tied_rest, top_two)


@pytest.mark.parametrize("top", [0, -1])
def test_top_must_be_positive(top: int) -> None:
    with pytest.raises(InputError, match="at least 1 place"):
        plackett_luce(*one_list(3), ranking(0, 1, 2), top=top)


# --- ties ---

TIED = [
    [0, 0],
    [0, 0, 1],
    [0, 1, 1],
    [0, 0, 1, 1, 2],
    [0, 1, 1, 1, 2],
    [0, 0, 0, 0, 1],
    [1, 0, 1, 0, 1],
    [5, 5, 5, 5, 5],
]


@pytest.mark.parametrize("top", [None, 1, 2, 3])
@pytest.mark.parametrize("ranks", TIED)
def test_a_tie_is_the_sum_over_the_orders_that_it_hides(ranks: list[int], top: int | None) -> None:
    policy, reference, mask = one_list(len(ranks), seed=21)
    found = plackett_luce(policy, reference, mask, ranking(*ranks), top=top).item()
    expected = enumerated(rewards_of(policy, reference), ranks, top)
    assert found == pytest.approx(expected, abs=1e-12)


def test_a_tie_is_the_sum_of_the_losses_own_strict_rankings() -> None:
    """The same without the independent transcription, on a group of seven."""
    policy, reference, mask = one_list(9)
    tied = plackett_luce(policy, reference, mask, ranking(0, *[1] * 7, 8))
    orders = list(itertools.permutations(range(1, 8)))
    strict = torch.tensor([[0, *order, 8] for order in orders])
    repeated = [tensor.expand(len(orders), 9) for tensor in (policy, reference, mask)]
    torch.testing.assert_close(tied, -(-plackett_luce(*repeated, strict)).logsumexp(0, True))


def test_the_probabilities_of_all_outcomes_with_two_tied_at_the_top_sum_to_one() -> None:
    policy, reference, mask = one_list(5)
    total = 0.0
    for pair in itertools.combinations(range(5), 2):
        ranks = [0 if response in pair else 1 for response in range(5)]
        total += math.exp(-plackett_luce(policy, reference, mask, ranking(*ranks)).item())
    assert total == pytest.approx(1.0, abs=1e-12)


@pytest.mark.parametrize("num_tied", [2, 5, listwise.MAX_TIED])
def test_a_tie_among_equals_by_counting(num_tied: int) -> None:
    """All rewards equal: the group is the best of K with probability 1 / (K choose g)."""
    policy = torch.zeros(1, num_tied + 3, dtype=torch.float64)
    ranks = ranking(*[0] * num_tied, 1, 1, 1)
    found = plackett_luce(policy, policy, whole(policy), ranks).item()
    assert found == pytest.approx(math.log(math.comb(num_tied + 3, num_tied)), abs=1e-12)


def test_a_tie_too_large_to_sum_over_is_refused_unless_it_is_last() -> None:
    size = listwise.MAX_TIED + 1
    policy = torch.zeros(1, size + 1, dtype=torch.float64)
    with pytest.raises(InputError, match=rf"{size} responses .* at most {listwise.MAX_TIED} tied"):
        plackett_luce(policy, policy, whole(policy), ranking(*[0] * size, 1))
    last = plackett_luce(policy, policy, whole(policy), ranking(0, *[1] * size))
    assert last.item() == pytest.approx(math.log(size + 1), abs=1e-14)


# --- all pairs and LiPO ---


@pytest.mark.parametrize("ranks", [[0, 1], [0, 1, 2, 3], [2, 0, 1], [0, 0, 1, 2, 2]])
def test_all_pairs_is_the_mean_over_ordered_pairs(ranks: list[int]) -> None:
    policy, reference, mask = one_list(len(ranks), seed=31)
    found = all_pairs(policy, reference, mask, ranking(*ranks)).item()
    assert found == pytest.approx(
        reference_all_pairs(rewards_of(policy, reference), ranks), abs=1e-12
    )


def test_all_pairs_at_the_reference_is_log_two_whatever_the_length() -> None:
    for num_responses in (2, 3, 64):
        policy = draw(0, 1, num_responses)
        ranks = torch.arange(num_responses).unsqueeze(0)
        found = all_pairs(policy, policy, whole(policy), ranks).item()
        assert found == pytest.approx(math.log(2), abs=1e-14)


@pytest.mark.parametrize(
    "scores", [[1.0, 0.0], [0.1, 0.9, 0.4], [0.9, 0.9, 0.2, 0.5], [3.0, -1.0, 2.0, 0.0, 2.5]]
)
def test_lipo_lambda_is_its_formula(scores: list[float]) -> None:
    policy, reference, mask = one_list(len(scores), seed=41)
    found = listwise.lipo_lambda(policy, reference, mask, torch.tensor([scores]), beta=BETA).item()
    expected = reference_lipo(rewards_of(policy, reference), [float(s) for s in scores])
    assert found == pytest.approx(expected, rel=1e-6)  # the scores are float32


def test_lipo_at_the_reference_takes_the_order_given() -> None:
    """sum_{i<j} Lambda_ij log 2 with tau = 1, 2, 3."""
    policy = draw(0, 1, 3)
    scores = torch.tensor([[1.0, 0.5, 0.0]], dtype=torch.float64)
    found = listwise.lipo_lambda(policy, policy, whole(policy), scores, beta=BETA).item()
    expected = reference_lipo([0.0, 0.0, 0.0], [1.0, 0.5, 0.0])
    assert found == pytest.approx(expected, abs=1e-14)


def test_lipo_ignores_a_constant_added_to_the_gain_but_not_to_the_scores() -> None:
    policy, reference, mask = one_list(4)
    scores = draw(2, 1, 4)
    plain = listwise.lipo_lambda(policy, reference, mask, scores, beta=BETA)
    shifted = listwise.lipo_lambda(policy, reference, mask, scores + 1, beta=BETA)
    torch.testing.assert_close(shifted, 2 * plain)
    tied = listwise.lipo_lambda(policy, reference, mask, scores * 0 + 3, beta=BETA)
    assert tied.item() == 0.0


def test_lipo_weights_carry_no_gradient() -> None:
    """With the weights frozen by hand the gradient is the same, though the order could change."""
    policy, reference, mask = one_list(3, seed=7)
    scores = torch.tensor([[0.2, 1.0, 0.6]], dtype=torch.float64)
    leaf = policy.clone().requires_grad_()
    listwise.lipo_lambda(leaf, reference, mask, scores, beta=BETA).sum().backward()
    rewards = BETA * (policy - reference)
    tau = (rewards.unsqueeze(-1) < rewards.unsqueeze(-2)).sum(-1) + 1
    expected = torch.zeros_like(policy)
    for i, j in itertools.permutations(range(3), 2):
        if scores[0, i] > scores[0, j]:
            gain = abs(2 ** scores[0, i] - 2 ** scores[0, j])
            weight = gain * abs(1 / (1 + tau[0, i]).log() - 1 / (1 + tau[0, j]).log())
            slope = BETA * weight * torch.sigmoid(rewards[0, j] - rewards[0, i])
            expected[0, i] -= slope
            expected[0, j] += slope
    torch.testing.assert_close(leaf.grad, expected)


# --- what all three share ---


def all_pairs(*tensors: torch.Tensor) -> torch.Tensor:
    return listwise.all_pairs(*tensors, beta=BETA)


def lipo_lambda(
    policy: torch.Tensor, reference: torch.Tensor, mask: torch.Tensor, ranks: torch.Tensor
) -> torch.Tensor:
    """LiPO-lambda with scores that fall by 0.1 a rank from 1."""
    scores = 1 - ranks.to(policy.dtype) / 10
    return listwise.lipo_lambda(policy, reference, mask, scores, beta=BETA)


EVERY = pytest.mark.parametrize("loss", [plackett_luce, all_pairs, lipo_lambda])
MIXED_RANKS = torch.tensor([[0, 1, 2, 3], [0, 0, 1, 1], [0, 1, 1, 2]])


@EVERY
def test_a_list_of_two_is_dpo(loss: Losses) -> None:
    """LiPO's is times the one pair's weight, which no reward changes."""
    policy, reference = 5 * draw(0, 6, 2), draw(1, 6, 2)
    ranks = torch.tensor([[0, 1]]).expand(6, 2)
    found = loss(policy, reference, whole(policy), ranks)
    columns = policy[:, 0], policy[:, 1], reference[:, 0], reference[:, 1]
    pair = losses.dpo(*columns, beta=BETA, label_smoothing=0.0)
    weight = {lipo_lambda: (2**1.0 - 2**0.9) * (1 / math.log(2) - 1 / math.log(3))}.get(loss, 1.0)
    torch.testing.assert_close(found, weight * pair, rtol=1e-12, atol=1e-14)


@EVERY
def test_gradient_by_central_differences(loss: Losses) -> None:
    policy, reference = 2 * draw(50, 3, 4), draw(51, 3, 4)
    leaf = policy.clone().requires_grad_()
    loss(leaf, reference, whole(policy), MIXED_RANKS).sum().backward()
    numeric = fd_gradient(lambda p: loss(p, reference, whole(policy), MIXED_RANKS), policy)
    torch.testing.assert_close(leaf.grad, numeric, rtol=1e-7, atol=1e-8)
    assert leaf.grad is not None
    # What is gained by some is lost by the others: a shift of all rewards of a list is not seen.
    torch.testing.assert_close(leaf.grad.sum(-1), torch.zeros(3, dtype=torch.float64))


@EVERY
def test_no_gradient_flows_through_the_reference(loss: Losses) -> None:
    policy, reference = draw(0, 3, 4).requires_grad_(), draw(1, 3, 4).requires_grad_()
    loss(policy, reference, whole(policy), MIXED_RANKS).sum().backward()
    assert policy.grad is not None
    assert reference.grad is None


@EVERY
def test_a_function_of_the_prompt_added_to_all_changes_nothing(loss: Losses) -> None:
    policy, reference = draw(0, 3, 4), draw(1, 3, 4)
    prompt = torch.tensor([[40.0], [-7.0], [0.3]], dtype=torch.float64)
    plain = loss(policy, reference, whole(policy), MIXED_RANKS)
    torch.testing.assert_close(loss(policy + prompt, reference, whole(policy), MIXED_RANKS), plain)
    torch.testing.assert_close(loss(policy, reference - prompt, whole(policy), MIXED_RANKS), plain)


@EVERY
@pytest.mark.parametrize("order", [[3, 2, 1, 0], [1, 3, 0, 2]])
def test_the_order_of_the_columns_changes_nothing(loss: Losses, order: list[int]) -> None:
    policy, reference = draw(0, 3, 4), draw(1, 3, 4)
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0], [1, 1, 0, 0]], dtype=torch.bool)
    plain = loss(policy, reference, mask, MIXED_RANKS)
    moved = [tensor[:, order] for tensor in (policy, reference, mask, MIXED_RANKS)]
    torch.testing.assert_close(loss(*moved), plain)


@pytest.mark.parametrize("loss", [plackett_luce, all_pairs])
def test_only_the_order_of_ranks_counts_not_their_values(loss: Losses) -> None:
    policy, reference, mask = one_list(4)
    plain = loss(policy, reference, mask, ranking(0, 1, 1, 2))
    torch.testing.assert_close(loss(policy, reference, mask, ranking(-5, 7, 7, 90)), plain)


@EVERY
@pytest.mark.parametrize("junk", [0.0, -1e30, math.nan, math.inf, -math.inf])
def test_padding_changes_neither_value_nor_gradient(loss: Losses, junk: float) -> None:
    policy, reference = draw(0, 3, 4), draw(1, 3, 4)
    bare = policy.clone().requires_grad_()
    plain = loss(bare, reference, whole(policy), MIXED_RANKS)
    plain.sum().backward()

    padding = torch.full((3, 3), junk, dtype=torch.float64)
    padded = torch.cat([policy, padding], -1).requires_grad_()
    mask = torch.cat([whole(policy), torch.zeros(3, 3, dtype=torch.bool)], -1)
    ranks = torch.cat([MIXED_RANKS, torch.tensor([[0, 1, 9]]).expand(3, 3)], -1)
    found = loss(padded, torch.cat([reference, padding], -1), mask, ranks)
    found.sum().backward()
    torch.testing.assert_close(found, plain)
    assert padded.grad is not None
    torch.testing.assert_close(padded.grad[:, :4], bare.grad)
    assert not padded.grad[:, 4:].any()


@pytest.mark.parametrize("junk", [math.nan, math.inf, -math.inf, 1e30])
def test_scores_of_padding_change_nothing(junk: float) -> None:
    policy, reference, mask = one_list(4)
    scores = torch.tensor([[0.9, 0.5, 0.1, junk]], dtype=torch.float64)
    mask = torch.tensor([[True, True, True, False]])
    found = listwise.lipo_lambda(policy, reference, mask, scores, beta=BETA)
    bare = [tensor[:, :3] for tensor in (policy, reference, mask, scores)]
    torch.testing.assert_close(found, listwise.lipo_lambda(*bare, beta=BETA))


@EVERY
def test_a_list_is_worth_the_same_in_any_batch(loss: Losses) -> None:
    policy, reference = draw(0, 3, 4), draw(1, 3, 4)
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0], [1, 1, 0, 0]], dtype=torch.bool)
    together = loss(policy, reference, mask, MIXED_RANKS)
    alone = [
        loss(*(tensor[i : i + 1] for tensor in (policy, reference, mask, MIXED_RANKS)))
        for i in range(3)
    ]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-14, atol=1e-15)


@EVERY
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("num_responses", [2, 3, 10, 64])
def test_huge_log_ratios_have_finite_losses_and_gradients(
    loss: Losses, dtype: torch.dtype, num_responses: int
) -> None:
    """Every response at +1e4 or -1e4: the worst order, the best, and with ties of three."""
    signs = torch.tensor([1.0, -1.0], dtype=dtype).repeat(num_responses)[:num_responses]
    policy = torch.stack([signs, -signs, signs.sort().values, signs.sort().values.flip(0)]) * 1e4
    for ranks in (torch.arange(num_responses), torch.arange(num_responses) // 3):
        leaf = policy.clone().requires_grad_()
        batch = ranks.expand(4, num_responses)
        found = loss(leaf, torch.zeros_like(policy), whole(policy), batch)
        found.sum().backward()
        assert bool(found.isfinite().all())
        assert leaf.grad is not None
        assert bool(leaf.grad.isfinite().all())


def test_huge_log_ratios_by_hand() -> None:
    """The worst possible order costs what the rewards differ by; the best nothing."""
    policy = torch.tensor([[-1e4, 0.0, 1e4]])
    found = plackett_luce(policy, 0 * policy, whole(policy), ranking(0, 1, 2), beta=1.0)
    assert found.item() == pytest.approx(2e4 + 1e4)
    found = plackett_luce(policy, 0 * policy, whole(policy), ranking(2, 1, 0), beta=1.0)
    assert found.item() == 0.0
    found = plackett_luce(policy, 0 * policy, whole(policy), ranking(0, 0, 1), beta=1.0)
    assert found.item() == pytest.approx(3e4 - math.log(2), rel=1e-6)  # two orders, 3e4 each


def test_float32_agrees_with_float64_on_a_long_list_with_ties() -> None:
    policy, reference = 20 * draw(0, 4, 64), draw(1, 4, 64)
    ranks = (torch.arange(64) // 5).expand(4, 64)
    exact = plackett_luce(policy, reference, whole(policy), ranks)
    found = plackett_luce(policy.float(), reference.float(), whole(policy), ranks)
    torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-4)
