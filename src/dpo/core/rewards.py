"""From rewards to preferences: Bradley-Terry, Plackett-Luce, and the reward inside a policy.

Shapes: B pairs, K responses of one prompt. Rewards are in the units of the logit: a difference of 1
means odds of e. All functions are differentiable and keep the dtype they are given.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from dpo.errors import InputError


def implicit_reward(policy_logps: Tensor, reference_logps: Tensor, *, beta: float) -> Tensor:
    """The reward that a policy encodes, up to a function of the prompt; any shape.

    `r = beta (log pi(y|x) - log pi_ref(y|x))`, with log-probabilities summed over the response's
    tokens. Rafailov et al. 2023, Eq. 5 without `beta log Z(x)`, which cancels in preferences.

    >>> implicit_reward(torch.tensor([-10.0]), torch.tensor([-12.0]), beta=0.5).tolist()
    [1.0]
    """
    if not (beta > 0 and beta < float("inf")):
        raise InputError(f"beta must be positive and finite, got {beta}")
    return beta * (policy_logps - reference_logps)


def bradley_terry_log_prob(reward: Tensor, other: Tensor) -> Tensor:
    """`log P(y > y') = log sigmoid(r(y) - r(y'))`, elementwise (B,). Bradley & Terry 1952.

    >>> round(bradley_terry_log_prob(torch.tensor(0.0), torch.tensor(0.0)).exp().item(), 6)
    0.5
    """
    return logsigmoid(reward - other)


def bradley_terry_nll(chosen_rewards: Tensor, rejected_rewards: Tensor) -> Tensor:
    """Reward-model loss per pair, (B,): `-log sigmoid(r_w - r_l)`. Christiano et al. 2017."""
    return -bradley_terry_log_prob(chosen_rewards, rejected_rewards)


def preference_table(rewards: Tensor) -> Tensor:
    """All Bradley-Terry probabilities, (..., Y, Y): entry (i, j) is `P(y_i > y_j)`."""
    return torch.sigmoid(rewards.unsqueeze(-1) - rewards.unsqueeze(-2))


def plackett_luce_log_prob(ranked_rewards: Tensor, *, top_k: int | None = None) -> Tensor:
    """Log-probability of a ranking, (...,), for rewards listed best first, (..., K).

    `sum_k [r_k - log sum_{j>=k} exp r_j]`: the best is chosen among all, the next among the rest.
    With `top_k`, only the first `top_k` choices count: the probability that these responses come
    first, in this order. Plackett 1975; Rafailov et al. 2023, Eq. 18.

    >>> rewards = torch.tensor([2.0, 1.0, 1.0], dtype=torch.float64).log()
    >>> round(plackett_luce_log_prob(rewards).exp().item(), 6)  # (2/4) (1/2)
    0.25
    """
    num_responses = ranked_rewards.shape[-1]
    stages = num_responses if top_k is None else top_k
    if not 1 <= stages <= num_responses:
        raise InputError(f"top_k must be between 1 and {num_responses} responses, got {top_k}")
    remaining = torch.logcumsumexp(ranked_rewards.flip(-1), dim=-1).flip(-1)
    return (ranked_rewards - remaining)[..., :stages].sum(dim=-1)


def sample_rankings(rewards: Tensor, num_samples: int, *, generator: torch.Generator) -> Tensor:
    """Plackett-Luce rankings of K responses, (num_samples, K) indices, best first.

    Sorts rewards plus independent standard Gumbel noise (Yellott 1977): the same law as drawing
    without replacement with weights `exp(r)`, in one sort.
    """
    uniform = torch.rand(
        (num_samples, rewards.shape[-1]), generator=generator, dtype=rewards.dtype
    ).clamp_min(torch.finfo(rewards.dtype).tiny)
    gumbel = -torch.log(-torch.log(uniform))
    return (rewards + gumbel).argsort(dim=-1, descending=True)
