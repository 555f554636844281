"""Enumerable worlds: a few prompts, finitely many responses, everything in closed form.

The KL-constrained problem that DPO solves implicitly can be solved explicitly when the responses
can be listed: the partition function `Z(x)`, the optimal policy `pi*`, the objective and the exact
reward-KL frontier are one line each. Trained policies are measured against these numbers, and the
theory checks build on them.

Shapes: a table over responses has shape (..., Y), where the leading dimensions are prompts.
Policies are log-probabilities in nats; an entry of `-inf` is a response outside the support.
Every function reduces the last dimension. Use float64: the functions keep the dtype they are given.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from dpo.errors import InputError

NORMALISATION_TOLERANCE = 1e-6


def _require_positive(beta: float) -> None:
    if not (beta > 0 and beta < float("inf")):
        raise InputError(f"beta must be positive and finite, got {beta}")


def log_partition(reward: Tensor, log_ref: Tensor, *, beta: float) -> Tensor:
    """Log partition function per prompt, (...,).

    `log Z(x) = log sum_y pi_ref(y|x) exp(r(x,y)/beta)`. Rafailov et al. 2023, below Eq. 4.

    >>> ref = torch.tensor([0.5, 0.5], dtype=torch.float64).log()
    >>> log_partition(torch.zeros(2, dtype=torch.float64), ref, beta=0.1).item()
    0.0
    """
    _require_positive(beta)
    return torch.logsumexp(log_ref + reward / beta, dim=-1)


def optimal_log_policy(reward: Tensor, log_ref: Tensor, *, beta: float) -> Tensor:
    """Log-probabilities of the KL-constrained optimum, (..., Y).

    `pi_r(y|x) = pi_ref(y|x) exp(r(x,y)/beta) / Z(x)`, the unique maximiser of
    `E_pi r - beta KL(pi || pi_ref)`. Rafailov et al. 2023, Eq. 4.

    >>> ref = torch.tensor([0.5, 0.5], dtype=torch.float64).log()
    >>> reward = torch.tensor([3.0, 1.0], dtype=torch.float64).log()
    >>> [round(p, 6) for p in optimal_log_policy(reward, ref, beta=1.0).exp().tolist()]
    [0.75, 0.25]
    """
    return log_ref + reward / beta - log_partition(reward, log_ref, beta=beta).unsqueeze(-1)


def canonical_reward(reward: Tensor, log_ref: Tensor, *, beta: float) -> Tensor:
    """The member of the reward's equivalence class that is a log-ratio of policies, (..., Y).

    `r - beta log Z = beta log(pi_r / pi_ref)`: the only reward that differs from `r` by a
    function of the prompt and satisfies `sum_y pi_ref exp(r/beta) = 1`. Rafailov et al. 2023,
    Eq. 8.
    """
    return reward - beta * log_partition(reward, log_ref, beta=beta).unsqueeze(-1)


def expectation(values: Tensor, log_policy: Tensor) -> Tensor:
    """Mean of a table under a policy, (...,); responses of probability zero do not count."""
    inside = values.masked_fill(torch.isneginf(log_policy), 0.0)
    return (log_policy.exp() * inside).sum(dim=-1)


def kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Kullback-Leibler divergence `KL(p || q)` in nats, (...,).

    `0 log 0 = 0`, and the divergence is `inf` where p puts mass outside the support of q.

    >>> p = torch.tensor([1.0, 0.0], dtype=torch.float64).log()
    >>> q = torch.tensor([0.5, 0.5], dtype=torch.float64).log()
    >>> round(kl(p, q).item(), 6), kl(q, p).item()
    (0.693147, inf)
    """
    return expectation(log_p - log_q, log_p)


def objective(log_policy: Tensor, reward: Tensor, log_ref: Tensor, *, beta: float) -> Tensor:
    """KL-constrained objective `J(pi) = E_pi r - beta KL(pi || pi_ref)` per prompt, (...,).

    Rafailov et al. 2023, Eq. 3.
    """
    _require_positive(beta)
    return expectation(reward, log_policy) - beta * kl(log_policy, log_ref)


def total_variation(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Total variation distance `(1/2) sum_y |p - q|` in [0, 1], (...,)."""
    return 0.5 * (log_p.exp() - log_q.exp()).abs().sum(dim=-1)


def win_rate(log_p: Tensor, log_q: Tensor, preference: Tensor) -> Tensor:
    """`P(p > q) = sum_{y,y'} p(y) q(y') P(y > y')`, (...,), for a preference table (..., Y, Y)."""
    return torch.einsum("...i,...ij,...j->...", log_p.exp(), preference, log_q.exp())


class Frontier(NamedTuple):
    """The best expected reward at each KL: one entry per beta, in the order given."""

    betas: tuple[float, ...]
    kl: Tensor
    reward: Tensor


@dataclass(frozen=True, slots=True)
class World:
    """A distribution over prompts (X,), a reference policy and a reward, both tables (X, Y).

    The methods average over prompts; the functions above give the value for each prompt.
    """

    prompt_probs: Tensor
    log_ref: Tensor
    reward: Tensor

    def __post_init__(self) -> None:
        """Refuse tables whose shapes differ or whose probabilities do not sum to one."""
        if self.log_ref.shape != self.reward.shape or self.log_ref.dim() != 2:
            raise InputError(
                "log_ref and reward must be tables of one shape (prompts, responses), got "
                f"{tuple(self.log_ref.shape)} and {tuple(self.reward.shape)}"
            )
        if self.prompt_probs.shape != self.log_ref.shape[:1]:
            raise InputError(
                f"prompt_probs must have shape ({self.log_ref.shape[0]},), one entry per prompt, "
                f"got {tuple(self.prompt_probs.shape)}"
            )
        self._require_normalised("prompt_probs", self.prompt_probs.sum())
        self._require_normalised("each row of exp(log_ref)", self.log_ref.exp().sum(dim=-1))

    @staticmethod
    def _require_normalised(name: str, total: Tensor) -> None:
        worst = float((total - 1.0).abs().max())
        if not worst <= NORMALISATION_TOLERANCE:
            raise InputError(f"{name} must sum to 1, off by {worst:.3g}")

    def optimum(self, *, beta: float) -> Tensor:
        """Log-probabilities of the optimal policy, (X, Y)."""
        return optimal_log_policy(self.reward, self.log_ref, beta=beta)

    def expected_reward(self, log_policy: Tensor) -> Tensor:
        """`E_x E_{y~pi(.|x)} r(x, y)`, a scalar."""
        return self.prompt_probs @ expectation(self.reward, log_policy)

    def kl_to_ref(self, log_policy: Tensor) -> Tensor:
        """`E_x KL(pi(.|x) || pi_ref(.|x))` in nats, a scalar."""
        return self.prompt_probs @ kl(log_policy, self.log_ref)

    def objective(self, log_policy: Tensor, *, beta: float) -> Tensor:
        """`E_x [E_pi r - beta KL(pi || pi_ref)]`, a scalar."""
        return self.prompt_probs @ objective(log_policy, self.reward, self.log_ref, beta=beta)

    def frontier(self, betas: Sequence[float]) -> Frontier:
        """Reward and KL of the optimum at each beta: no policy has more reward at that KL."""
        optima = [self.optimum(beta=beta) for beta in betas]
        return Frontier(
            betas=tuple(betas),
            kl=torch.stack([self.kl_to_ref(policy) for policy in optima]),
            reward=torch.stack([self.expected_reward(policy) for policy in optima]),
        )
