"""What is computed of a policy that is known as a table: nothing here is an estimate."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from dpo.core.exact import World, canonical_reward, kl, total_variation
from dpo.core.frontier import merge_equal_rewards, optimum_at_kl

SMALL_KL = 1e-6
"""Nats. Nearer to the reference than that, efficiency is a ratio of rounding errors."""


@dataclass(frozen=True, slots=True)
class Measured:
    """A policy in numbers; means over prompts. KL in nats."""

    kl: float
    """KL(policy || reference)."""
    reward: float
    efficiency: float | None
    """Reward gained, as a share of what the optimum of the same KL gains; None at the reference."""
    win_rate: float
    """Against the reference, by a Bradley-Terry judge of the true reward."""
    total_variation: float
    """To the optimum of the same beta; for methods whose strength is no beta, of the same KL, which
    beyond the KL of the greedy policy is the greedy policy.
    """
    kl_to_optimum: float
    """KL(policy || optimum), of the same optimum."""
    correlation: float | None
    """Between log(policy / reference) and the true reward, within prompts, over the reference's
    responses; None at the reference, and where a response has probability zero.
    """
    gain: float | None = None
    """Share of the objective's possible gain `J(optimum) - J(reference)` at this beta; None for
    methods whose strength is no beta.
    """
    coverage: float | None = None
    """Share of the reference's probability on responses that occur in the pairs; where there are
    pairs.
    """
    error_seen: float | None = None
    """Root mean square error of the implicit reward over responses that the pairs contain, in
    units of the reward, weighted by the reference; both rewards in their canonical form.
    """
    error_unseen: float | None = None
    """The same over responses that the pairs do not contain."""


class Measures:
    """What all measurements in a world share, computed once."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.merged = merge_equal_rewards(world)
        self.reference_reward = float(world.expected_reward(world.log_ref))
        self.win_table = win_probabilities(world)

    def __call__(
        self, log_policy: Tensor, *, beta: float | None = None, seen: Tensor | None = None
    ) -> Measured:
        """Measure a policy, (P, Y).

        Args:
            beta: of the objective that it was trained for, where it was.
            seen: which responses occur in the pairs it was trained on, a boolean table.
        """
        world = self.world
        kl_to_ref = max(0.0, float(world.kl_to_ref(log_policy)))
        reward = float(world.expected_reward(log_policy))
        same_kl = optimum_at_kl(self.merged, kl_to_ref)
        optimum = world.optimum(beta=same_kl.beta if beta is None else beta)
        moved = kl_to_ref > SMALL_KL
        efficiency = (reward - self.reference_reward) / (same_kl.reward - self.reference_reward)
        log_ratio = log_policy - world.log_ref
        full_support = bool(log_ratio.isfinite().all())  # not that of the best of many
        return Measured(
            kl=kl_to_ref,
            reward=reward,
            efficiency=efficiency if moved else None,
            win_rate=self._mean((log_policy.exp() * self.win_table).sum(dim=-1)),
            total_variation=self._mean(total_variation(log_policy, optimum)),
            kl_to_optimum=max(0.0, self._mean(kl(log_policy, optimum))),
            correlation=correlation(world, log_ratio) if moved and full_support else None,
            gain=None if beta is None else self._gain(log_policy, beta),
            coverage=None if seen is None else coverage(world, seen),
            **({} if beta is None or seen is None else self._errors(log_ratio, beta, seen)),
        )

    def _mean(self, of_prompts: Tensor) -> float:
        return float(self.world.prompt_probs @ of_prompts)

    def _gain(self, log_policy: Tensor, beta: float) -> float:
        best = float(self.world.objective(self.world.optimum(beta=beta), beta=beta))
        reached = float(self.world.objective(log_policy, beta=beta))
        return (reached - self.reference_reward) / (best - self.reference_reward)

    def _errors(self, log_ratio: Tensor, beta: float, seen: Tensor) -> dict[str, float | None]:
        world = self.world
        squares = (beta * log_ratio - canonical_reward(world.reward, world.log_ref, beta=beta)) ** 2
        weights = world.prompt_probs.unsqueeze(-1) * world.log_ref.exp()

        def root_mean(where: Tensor) -> float | None:
            if not where.any():
                return None
            return math.sqrt(float((weights * squares)[where].sum() / weights[where].sum()))

        return {"error_seen": root_mean(seen), "error_unseen": root_mean(~seen)}


def win_probabilities(world: World) -> Tensor:
    """`sum_y' pi_ref(y'|x) sigmoid(r(x,y) - r(x,y'))` of every response, (P, Y).

    The mean of it under a policy is the policy's win rate. Rewards of a prompt that are equal are
    compared once.
    """
    rows = []
    for reward, log_ref in zip(world.reward, world.log_ref, strict=True):
        values, place = reward.unique(return_inverse=True)
        mass = values.new_zeros(len(values)).index_add(0, place, log_ref.exp())
        rows.append((torch.sigmoid(values.unsqueeze(1) - values) @ mass)[place])
    return torch.stack(rows)


def correlation(world: World, scores: Tensor) -> float:
    """Pearson's correlation of a table with the true reward, mean over prompts.

    Within a prompt, weighted by the reference: what is added to all scores of a prompt changes
    nothing.
    """
    weights = world.log_ref.exp()

    def centred(table: Tensor) -> Tensor:
        return table - (weights * table).sum(dim=-1, keepdim=True)

    a, b = centred(scores), centred(world.reward)
    covariance = (weights * a * b).sum(dim=-1)
    spread = ((weights * a * a).sum(dim=-1) * (weights * b * b).sum(dim=-1)).sqrt()
    return float(world.prompt_probs @ (covariance / spread))


def coverage(world: World, seen: Tensor) -> float:
    """Share of the reference's probability on responses that occur in the pairs."""
    return float(world.prompt_probs @ (world.log_ref.exp() * seen).sum(dim=-1))
