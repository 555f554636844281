"""What is possible on the reward-KL plane where responses can only be sampled.

`pi*/pi_ref` depends on a response through its reward alone, so reward and KL of the optimal policy
depend on the distribution of the reward under the reference alone, prompt by prompt. Where the
reward takes few values, a few hundred samples of the reference to each prompt show it. The same
samples give best-of-n. KL in nats, (P, N): N samples to each of P prompts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dpo.core.best_of_n import best_of_n_kl_bound, best_of_n_log_policy, expected_best_of
from dpo.core.exact import World, kl
from dpo.core.frontier import Point, concave_hull, merge_equal_rewards, reward_at_kl

BETAS = torch.logspace(-2, 2, 241, dtype=torch.float64).tolist()
"""So near each other that straight lines between their optima are the curve."""


@dataclass(frozen=True, slots=True)
class BestOfN:
    """Best-of-n of the reference's samples: the mean over prompts of its reward and KL."""

    n: int
    reward: float
    kl: float
    """`KL(p_n || pi_ref)` of the distribution of the samples themselves. Samples of equal score are
    one level, within which p_n and the reference differ by a factor only.
    """
    kl_bound: float
    """`log n - (n - 1)/n`, which it never exceeds."""


def world_of_samples(rewards: Tensor) -> World:
    """The world in which the samples (P, N) are all that the reference says, each equally likely;
    one response for each distinct reward of a prompt.
    """
    num_prompts, num_samples = rewards.shape
    uniform = rewards.new_full((num_prompts,), 1 / num_prompts)
    log_ref = torch.full_like(rewards, 1 / num_samples).log()
    return merge_equal_rewards(World(uniform, log_ref, rewards))


def optimum_curve(world: World) -> list[Point]:
    """The most reward at each KL, as corners by rising KL, from the reference on.

    Beyond its last corner, where every prompt's best reward is certain, it is level.
    """
    frontier = world.frontier(BETAS)
    reference = Point(0.0, float(world.expected_reward(world.log_ref)))
    optima = zip(frontier.kl.tolist(), frontier.reward.tolist(), strict=True)
    return concave_hull([reference, *(Point(x, y) for x, y in optima)])


def curve_stderr(
    rewards: Tensor, kls: Sequence[float], *, num_resamples: int = 50, seed: int = 0
) -> list[float]:
    """Standard error of the curve's height at some KLs, from sampling the reference.

    The bootstrap: samples are drawn anew of each prompt's samples (P, N), with replacement. The
    prompts stay, for policies are measured on the same ones.
    """
    generator = torch.Generator().manual_seed(seed)
    heights = []
    for _ in range(num_resamples):
        drawn = torch.randint(rewards.shape[1], rewards.shape, generator=generator)
        curve = optimum_curve(world_of_samples(rewards.gather(1, drawn)))
        heights.append([reward_at_kl(curve, x) for x in kls])
    return torch.tensor(heights, dtype=torch.float64).std(dim=0).tolist()


def best_of_n(rewards: Tensor, ns: Sequence[int], *, scores: Tensor | None = None) -> list[BestOfN]:
    """Best-of-n for each n: unbiased rewards, and the KL of the samples' own distribution.

    Args:
        rewards: what is measured, (P, N).
        scores: what decides which response is the best, (P, N), if this is another thing.
    """
    expected = expected_best_of(rewards, scores).mean(dim=0)
    levels = world_of_samples(rewards if scores is None else scores)
    return [
        BestOfN(
            n=n,
            reward=float(expected[n - 1]),
            kl=max(0.0, float(_best_of_n_kl(levels, n))),  # rounding of n = 1
            kl_bound=best_of_n_kl_bound(n),
        )
        for n in ns
    ]


def _best_of_n_kl(levels: World, n: int) -> Tensor:
    log_best = best_of_n_log_policy(levels.log_ref, levels.reward, n=n)
    return levels.prompt_probs @ kl(log_best, levels.log_ref)


def efficiency(point: Point, curve: Sequence[Point]) -> float:
    """Reward gained over the reference, as a share of what the optimum gains at the same KL.

    `(R - R_ref) / (R*(KL) - R_ref)`; nan where the optimum gains nothing, which is at KL 0.
    """
    start = curve[0].reward
    possible = reward_at_kl(curve, point.kl) - start
    return (point.reward - start) / possible if possible > 0 else float("nan")


def within_prompt_correlation(rewards: Tensor, scores: Tensor) -> float:
    """Pearson's correlation of two tables (P, N) within each prompt, averaged over the prompts in
    which both vary.
    """
    centred = [table - table.mean(dim=1, keepdim=True) for table in (rewards, scores)]
    spread = [table.norm(dim=1) for table in centred]
    varies = (spread[0] > 0) & (spread[1] > 0)
    products = (centred[0] * centred[1]).sum(dim=1)[varies]
    return float((products / (spread[0] * spread[1])[varies]).mean())
