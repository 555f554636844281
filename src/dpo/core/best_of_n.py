"""Best-of-n: draw n responses and keep the one of the highest score.

No training, and hard to beat at its KL, at n times the cost of a response. Shapes: a table over
responses has shape (..., Y), samples have shape (..., N); leading dimensions are prompts.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dpo.errors import InputError


def best_of_n_log_policy(log_policy: Tensor, score: Tensor, *, n: int) -> Tensor:
    """Log-probabilities of the best of n independent draws, (..., Y).

        p_n(y) = p(y) / p(S_y) [F(y)^n - (F(y) - p(S_y))^n]

    with `S_y` the responses that score as y does and `F(y)` the probability of a score not above
    y's: the best of n has score s if all n have at most s and not all have less; among draws of
    equal score each is as likely as it was. Beirami et al. 2024 (arXiv:2401.01879) for scores that
    all differ, where `S_y` is y alone.

    Args:
        log_policy: what is drawn from, (..., Y), in nats, normalised.
        score: what decides, (..., Y).

    >>> fair = torch.tensor([0.5, 0.5], dtype=torch.float64).log()
    >>> scores = torch.tensor([0.0, 1.0], dtype=torch.float64)
    >>> [round(p, 6) for p in best_of_n_log_policy(fair, scores, n=2).exp().tolist()]
    [0.25, 0.75]
    """
    _require_positive(n)
    probabilities = log_policy.exp()
    sorted_score, order = score.sort(dim=-1)
    at_most = probabilities.gather(-1, order).cumsum(-1)
    last = torch.searchsorted(sorted_score, score.contiguous(), right=True) - 1
    first = torch.searchsorted(sorted_score, score.contiguous())  # equal scores share it
    level = torch.zeros_like(probabilities).scatter_add(-1, first, probabilities).gather(-1, first)
    cumulative = at_most.gather(-1, last).clamp(max=1.0)
    # (F^n - (F - l)^n) / l = F^(n-1) (1 - (1 - x)^n) / x with x = l/F, exact for a small l too.
    x = (level / cumulative).clamp(max=1.0)
    ratio = cumulative ** (n - 1) * -torch.expm1(n * torch.log1p(-x)) / x
    return torch.where(level > 0, log_policy + ratio.log(), -torch.inf)


def best_of_n_kl_bound(n: int) -> float:
    """`log n - (n - 1)/n` nats: the most that best-of-n can be away from what it draws from.

    An upper bound of `KL(p_n || p)`, reached where no single response is likely and no two score
    alike; the exact value of a finite world is `exact.kl(best_of_n_log_policy(...), log_policy)`.
    Long taken for the value itself; Beirami et al. 2024 (arXiv:2401.01879).

    >>> best_of_n_kl_bound(1), round(best_of_n_kl_bound(16), 3)
    (0.0, 1.835)
    """
    _require_positive(n)
    return math.log(n) - (n - 1) / n


def expected_best_of(values: Tensor, scores: Tensor | None = None) -> Tensor:
    """Unbiased estimates of the expected value of the best of k = 1 ... N draws, (..., N).

        sum_i C(i-1, k-1) / C(N, k) v_(i),    v_(1), ..., v_(N) by ascending score

    the mean over all subsets of k of the N samples of the value of the subset's best, which is the
    i-th of all in `C(i-1, k-1)` of the `C(N, k)` subsets. The same count gives pass@k (Chen et al.
    2021, arXiv:2107.03374). One set of N samples serves every k.

    Args:
        values: what is measured of each of N independent samples of a prompt, (..., N).
        scores: what decides which is the best, (..., N), where this is another thing: a reward
            model chooses and the true reward is measured. Of equal scores the later sample wins.

    >>> rewards = torch.tensor([1.0, 3.0, 2.0], dtype=torch.float64)
    >>> [round(reward, 6) for reward in expected_best_of(rewards).tolist()]
    [2.0, 2.666667, 3.0]
    """
    num_samples = values.shape[-1]
    _require_positive(num_samples)
    order = (values if scores is None else scores).argsort(dim=-1, stable=True)
    i = torch.arange(1, num_samples + 1, dtype=torch.float64, device=values.device)
    k = i.unsqueeze(-1)  # (N, 1): a line of weights for each k
    log_weights = _log_choose(i - 1, k - 1) - _log_choose(torch.full_like(k, num_samples), k)
    weights = torch.where(i >= k, log_weights.exp(), 0.0)
    return values.double().gather(-1, order) @ weights.T


def _log_choose(n: Tensor, k: Tensor) -> Tensor:
    """Logarithm of the binomial coefficient; of no meaning where k > n."""
    return torch.lgamma(n + 1) - torch.lgamma(k + 1) - torch.lgamma((n - k).clamp(min=0) + 1)


def _require_positive(n: int) -> None:
    if n < 1:
        raise InputError(f"best-of-n needs at least 1 draw, got n = {n}")
