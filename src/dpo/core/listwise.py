"""Losses on ranked lists of responses: one value a list, unreduced, on plain tensors.

A list is one prompt with up to K responses. Every tensor is (B, K), padded anywhere (by convention
on the right, responses from best to worst): `mask` is True where there is a response, and what the
others hold, NaN included, changes neither value nor gradient. `ranks` are integers, 0 for the best,
equal for a tie. With `h = log pi(y|x) - log pi_ref(y|x)` in nats, summed over the response's
tokens, a response's implicit reward is `r = beta h`.

For two responses `plackett_luce` and `all_pairs` are `losses.dpo` exactly; `lipo_lambda` is it
times a constant. ListMLE is `plackett_luce`.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from dpo.errors import InputError

MAX_TIED = 10
"""The largest tie with something below it: its likelihood sums over 2^10 subsets."""


def plackett_luce(
    policy_logps: Tensor,
    reference_logps: Tensor,
    mask: Tensor,
    ranks: Tensor,
    *,
    beta: float,
    top: int | None,
) -> Tensor:
    """Plackett-Luce DPO loss of each list, (B,): the negative log-likelihood of its ranking, nats.

    The best response is chosen among all with probability `softmax(r)`, the next among the rest:

        loss = sum_{k < K} [log sum_{j >= k} exp r_j  -  r_k]            (k counts places)

    With `top`, only the choices for the first `top` places are scored: the negative log-probability
    of that beginning, whatever the order below it. For a partial ranking (some responses ordered,
    the others only known to be worse) give the others one common rank: nothing is below them, so
    their tie costs nothing.

    Ties. A tie is read as an order that was not recorded, so its likelihood is the sum over all
    orders of the tied responses: group G, with responses R below it, costs

        -log P(every member of G is chosen before any of R)
      = -log sum_{orders g of G} prod_k exp r_g(k) / (sum_{j >= k} exp r_g(j) + sum_R exp r)

    This keeps the model: rewards that explain strict rankings explain tied ones, the probabilities
    of all outcomes still sum to one, and a list of ties alone costs 0, for it says nothing. It does
    not pull tied responses together; Davidson's model of ties, which does, needs further parameters
    for how willing the judge is to tie. A group counts for `top` by its first place: it is scored,
    whole, if fewer than `top` responses are strictly better.

    Rafailov et al. 2023 (arXiv:2305.18290), appendix on the Plackett-Luce model (Plackett 1975);
    ListMLE in the learning-to-rank literature. The paper has neither top-k nor ties. TRL 1.16 has
    no listwise loss.

    Args:
        policy_logps: log pi(y|x), summed over the response's tokens, (B, K), in nats.
        reference_logps: log pi_ref(y|x), (B, K); no gradient flows through it.
        mask: where there is a response, (B, K), bool.
        ranks: 0 for the best, equal for a tie, (B, K), integers; the columns' order is not used.
        beta: strength of the pull towards the reference, > 0.
        top: how many places are scored, >= 1; None scores all.

    Raises:
        InputError: if `top` < 1, or more than MAX_TIED responses tie above others.

    >>> import torch
    >>> policy, reference = torch.tensor([[2.0, 1.0, 1.0]]).log(), torch.zeros(1, 3)
    >>> mask, ranks = torch.ones(1, 3, dtype=torch.bool), torch.tensor([[0, 1, 2]])
    >>> loss = plackett_luce(policy, reference, mask, ranks, beta=1.0, top=None)
    >>> round((-loss).exp().item(), 4)  # (2/4) (1/2)
    0.25
    >>> loss = plackett_luce(policy, reference, mask, torch.tensor([[0, 1, 1]]), beta=1.0, top=None)
    >>> round((-loss).exp().item(), 4)  # the first is first, in whatever order the others are: 2/4
    0.5
    """
    if top is not None and top < 1:
        raise InputError(f"top must be at least 1 place, or None for all of them, got {top}")
    rewards = _rewards(policy_logps, reference_logps, mask, beta=beta)
    better = _better(-ranks, mask)
    tied = (ranks.unsqueeze(-1) == ranks.unsqueeze(-2)) & mask.unsqueeze(-1) & mask.unsqueeze(-2)
    place = better.sum(dim=-2)
    stands_for_its_tie = mask & ~tied.tril(-1).any(dim=-1)
    scored = stands_for_its_tie & better.any(dim=-1)
    if top is not None:
        scored = scored & (place < top)

    # Each scored group is one entry: the list that it is in, and the column that stands for it.
    row, column = scored.nonzero(as_tuple=True)
    size = tied[row, column].sum(dim=-1)
    below = rewards[row].masked_fill(~better[row, column], -torch.inf).logsumexp(dim=-1)
    loss = 0.0 * rewards.sum(dim=-1)
    for tied_responses in size.unique().tolist():
        _require_enumerable(tied_responses)
        of_size = size == tied_responses
        members = tied[row[of_size], column[of_size]].nonzero()[:, 1].reshape(-1, tied_responses)
        lead = rewards[row[of_size]].gather(-1, members) - below[of_size].unsqueeze(-1)
        loss = loss.index_add(0, row[of_size], -_log_all_come_first(lead))
    return loss


def all_pairs(
    policy_logps: Tensor,
    reference_logps: Tensor,
    mask: Tensor,
    ranks: Tensor,
    *,
    beta: float,
) -> Tensor:
    """Mean DPO loss over the ordered pairs of each list, (B,), in nats.

    `mean_{i better than j} -log sigmoid(r_i - r_j)`. Tied pairs do not count; a list of ties alone
    costs 0. The mean makes a list weigh the same whatever its length: multiply by the number of
    ordered pairs, K (K - 1) / 2 without ties, for the sum.

    Rafailov et al. 2023 (arXiv:2305.18290), Eq. 7, on pairs. The pairs of one ranking are not
    independent: with Plackett-Luce data the minimiser is the same as `plackett_luce`'s, but the
    estimate has more variance. TRL 1.16 has no listwise loss.

    Args:
        policy_logps: log pi(y|x), summed over the response's tokens, (B, K), in nats.
        reference_logps: log pi_ref(y|x), (B, K); no gradient flows through it.
        mask: where there is a response, (B, K), bool.
        ranks: 0 for the best, equal for a tie, (B, K), integers; the columns' order is not used.
        beta: strength of the pull towards the reference, > 0.

    >>> import torch
    >>> policy, reference = torch.tensor([[3.0, 1.0, 1.0]]).log(), torch.zeros(1, 3)
    >>> mask, ranks = torch.ones(1, 3, dtype=torch.bool), torch.tensor([[0, 1, 1]])
    >>> round(all_pairs(policy, reference, mask, ranks, beta=1.0).item(), 4)  # twice log(4/3)
    0.2877
    """
    rewards = _rewards(policy_logps, reference_logps, mask, beta=beta)
    better = _better(-ranks, mask)
    num_pairs = better.sum(dim=(-2, -1)).clamp(min=1)
    return (better * _pair_losses(rewards)).sum(dim=(-2, -1)) / num_pairs


def lipo_lambda(
    policy_logps: Tensor,
    reference_logps: Tensor,
    mask: Tensor,
    scores: Tensor,
    *,
    beta: float,
) -> Tensor:
    """LiPO-lambda loss of each list, (B,): DPO on its pairs, weighted by what a swap costs the DCG.

        loss  = sum_{psi_i > psi_j} Lambda_ij * -log sigmoid(r_i - r_j)
        Lambda_ij = |2^psi_i - 2^psi_j| * |1 / log(1 + tau_i) - 1 / log(1 + tau_j)|

    psi are the data's scores and tau the places, from 1, in the policy's own order, by descending
    r. Lambda carries no gradient. Pairs of equal score do not count.

    Liu et al. 2024 (arXiv:2402.01878). Recalled or taken from secondary texts, not checked against
    the paper: the gain 2^psi - 1 (the 1 cancels), the discount log(1 + tau), natural here (another
    base only scales the loss), the sum instead of a mean over the pairs, and scores used as they
    come. Keep scores near [0, 1], where the paper's are remembered to be: gains grow as 2^psi.
    Responses to which the policy gives equal r keep the order of their columns: at the start of
    training, where every r is 0, tau is the order given. TRL 1.16 has no listwise loss.

    Args:
        policy_logps: log pi(y|x), summed over the response's tokens, (B, K), in nats.
        reference_logps: log pi_ref(y|x), (B, K); no gradient flows through it.
        mask: where there is a response, (B, K), bool.
        scores: ratings, higher is better, (B, K).
        beta: strength of the pull towards the reference, > 0.

    >>> import torch
    >>> policy, reference = torch.tensor([[0.0, 0.0]]), torch.tensor([[0.0, 0.0]])
    >>> mask, scores = torch.ones(1, 2, dtype=torch.bool), torch.tensor([[1.0, 0.0]])
    >>> loss = lipo_lambda(policy, reference, mask, scores, beta=0.1)
    >>> round(loss.item(), 4)  # (2 - 1) (1/log 2 - 1/log 3) log 2
    0.3691
    """
    rewards = _rewards(policy_logps, reference_logps, mask, beta=beta)
    own_order = rewards.detach().masked_fill(~mask, -torch.inf)
    place = own_order.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1) + 1
    discount = 1 / torch.log1p(place.to(rewards.dtype))
    gain = scores.detach().masked_fill(~mask, 0).to(rewards.dtype).exp2()
    weight = _differences(gain).abs() * _differences(discount).abs()
    return (_better(scores, mask) * weight * _pair_losses(rewards)).sum(dim=(-2, -1))


def _rewards(policy_logps: Tensor, reference_logps: Tensor, mask: Tensor, *, beta: float) -> Tensor:
    """`beta h` where there is a response and 0 elsewhere, (B, K).

    Padding is replaced before any arithmetic: a NaN times 0 is NaN, in the gradient too.
    """
    policy = policy_logps.masked_fill(~mask, 0.0)
    reference = reference_logps.detach().masked_fill(~mask, 0.0)
    return beta * (policy - reference)


def _differences(values: Tensor) -> Tensor:
    """Entry (i, j) is value i minus value j, (B, K, K)."""
    return values.unsqueeze(-1) - values.unsqueeze(-2)


def _pair_losses(rewards: Tensor) -> Tensor:
    """Entry (i, j) is the DPO loss of preferring i to j, (B, K, K)."""
    return -logsigmoid(_differences(rewards))


def _better(quality: Tensor, mask: Tensor) -> Tensor:
    """Entry (i, j) says whether response i is there and strictly better than j, (B, K, K)."""
    there = mask.unsqueeze(-1) & mask.unsqueeze(-2)
    return there & (quality.unsqueeze(-1) > quality.unsqueeze(-2))


def _require_enumerable(num_tied: int) -> None:
    if num_tied > MAX_TIED:
        raise InputError(
            f"{num_tied} responses of one list tie above others; the likelihood of a tie sums over "
            f"all its orders and is computed for at most {MAX_TIED} tied responses (a tie in the "
            "last place may have any size). Use all_pairs or lipo_lambda, which skip tied pairs, "
            "or break the ties in the data"
        )


def _log_all_come_first(lead: Tensor) -> Tensor:
    """Log-probability that a group is chosen before everything below it, (N,).

    `lead`, (N, G), is each member's reward minus the log-sum-exp of the rewards below. Over subsets
    S of the group, from small to large, by who is chosen first:

        P(S) = sigmoid(lse lead_S) * sum_{i in S} softmax(lead_S)_i * P(S without i),   P({}) = 1

    2^G subsets instead of G! orders, all terms positive, so nothing cancels in the logarithm. For
    G = 1 it is log sigmoid(lead): one choice of Plackett-Luce.
    """
    num_members = lead.shape[-1]
    position: dict[tuple[int, ...], int] = {(): 0}
    log_prob = torch.zeros_like(lead[:, :1])
    for size in range(1, num_members + 1):
        subsets = list(itertools.combinations(range(num_members), size))
        smaller = [[position[s[:i] + s[i + 1 :]] for i in range(size)] for s in subsets]
        subset_lead = lead[:, torch.tensor(subsets, device=lead.device)]
        others = log_prob[:, torch.tensor(smaller, device=lead.device)]
        one_is_first = logsigmoid(subset_lead.logsumexp(dim=-1))
        log_prob = one_is_first + (subset_lead.log_softmax(dim=-1) + others).logsumexp(dim=-1)
        position = {subset: index for index, subset in enumerate(subsets)}
    return log_prob.squeeze(-1)
