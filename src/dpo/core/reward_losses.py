"""Losses of a reward model: one value a row, unreduced, on the rewards of its responses.

Rewards are in the units of the logit: a difference of 1 means odds of e. Preferences fix them up to
a constant of the prompt; `centre` is what fixes the constant.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dpo.core.listwise import plackett_luce
from dpo.core.rewards import bradley_terry_nll


def pair_loss(
    chosen_rewards: Tensor,
    rejected_rewards: Tensor,
    *,
    margins: Tensor | None = None,
    centre: float = 0.0,
) -> Tensor:
    """Bradley-Terry loss of each pair, (B,), in nats.

        loss = -log sigmoid(r_w - r_l - m) + centre (r_w + r_l)^2

    Christiano et al. 2017 (arXiv:1706.03741). The margin m, by how much the chosen response was
    rated better, asks for a larger difference where the data see one: Touvron et al. 2023, Llama 2
    (arXiv:2307.09288), Eq. 2. With margins the difference is no longer the log-odds of the
    preference. Centring: Eisenstein et al. 2023 (arXiv:2312.09244); preferences say nothing about
    `r_w + r_l`, which then goes to 0.

    Args:
        chosen_rewards: r_w, (B,). rejected_rewards: r_l, (B,).
        margins: m >= 0, (B,); None: 0.
        centre: coefficient of the centring term, >= 0; the paper's is 0.01.

    >>> loss = pair_loss(torch.tensor([2.0]), torch.tensor([1.0]), margins=torch.tensor([1.0]))
    >>> round(loss.item(), 4)  # log 2
    0.6931
    >>> loss = pair_loss(torch.tensor([1.0]), torch.tensor([1.0]), centre=0.01)
    >>> round(loss.item(), 4)  # log 2 + 0.01 * 4
    0.7331
    """
    asked = rejected_rewards if margins is None else rejected_rewards + margins
    loss = bradley_terry_nll(chosen_rewards, asked)
    return loss + centre * (chosen_rewards + rejected_rewards).square()


def ranking_loss(rewards: Tensor, mask: Tensor, ranks: Tensor, *, centre: float = 0.0) -> Tensor:
    """Plackett-Luce loss of each ranking, (B,), in nats; for two responses it is `pair_loss`.

        loss = sum_{k < K} [log sum_{j >= k} exp r_j  -  r_k] + centre (2 mean_k r_k)^2

    Ties are orders that were not recorded, as in `listwise.plackett_luce`, whose implicit rewards
    are replaced by a reward model's. The centring term is `centre (r_w + r_l)^2` for two responses
    and is as strong for longer lists.

    Args:
        rewards: (B, K), what the padding holds is not looked at.
        mask: where there is a response, (B, K), bool.
        ranks: 0 for the best, equal for a tie, (B, K), integers.
        centre: coefficient of the centring term, >= 0.

    >>> rewards = torch.tensor([[2.0, 1.0, 1.0]]).log()
    >>> mask, ranks = torch.ones(1, 3, dtype=torch.bool), torch.tensor([[0, 1, 2]])
    >>> round((-ranking_loss(rewards, mask, ranks)).exp().item(), 4)  # (2/4) (1/2)
    0.25
    """
    loss = plackett_luce(rewards, torch.zeros_like(rewards), mask, ranks, beta=1.0, top=None)
    mean = rewards.masked_fill(~mask, 0.0).sum(-1) / mask.sum(-1)
    return loss + centre * (2 * mean).square()


def ordered_margins(rewards: Sequence[float], ranks: Sequence[int]) -> list[float]:
    """`r_i - r_j` of every two responses of which i is ranked above j.

    >>> ordered_margins([3.0, 1.0, 1.5], [0, 1, 1])
    [2.0, 1.5]
    """
    responses = range(len(ranks))
    return [rewards[i] - rewards[j] for i in responses for j in responses if ranks[i] < ranks[j]]
