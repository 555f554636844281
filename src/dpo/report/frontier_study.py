"""What a study of frontiers leaves: its numbers as data, and questions asked of them.

Everything that is said of all seeds (means, Student's intervals, paired differences) is computed
from these. The page is in `frontier_page`, its figures in `frontier_figures`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dpo.core.frontier import Point, area_under, concave_hull, reward_at_kl
from dpo.evaluate.frontier import BestOfN, efficiency
from dpo.report.exact_study import (
    BEST_OF_RM,
    BEST_OF_TRUE,
    DPO,
    IPO,
    MAX_KL,
    ONLINE_DPO,
    PPO_RM,
    PPO_TRUE,
    PREFERRED_FT,
    UNLIKELIHOOD,
)

TRAINED = (DPO, IPO, PPO_RM, PPO_TRUE, ONLINE_DPO, PREFERRED_FT, UNLIKELIHOOD)
"""Methods that train a policy, in the order of tables."""
METHODS = (*TRAINED, BEST_OF_TRUE, BEST_OF_RM)

SMALLEST_KL = 0.05
"""Nats: nearer to the reference, an efficiency is a ratio of two sampling errors."""


@dataclass(frozen=True, slots=True)
class Measurement:
    """A policy on its own samples for held-out questions; standard errors over questions."""

    step: int
    kl: float
    kl_stderr: float
    reward: float
    reward_stderr: float

    @property
    def point(self) -> Point:
        return Point(self.kl, self.reward)


@dataclass(frozen=True, slots=True)
class RunResult:
    """One method at one strength from one seed's SFT model."""

    seed: int
    method: str
    strength: float | None
    """beta, IPO's tau, unlikelihood's alpha, PPO's KL coefficient."""
    trail: list[Measurement]
    """Along training, after the start; the last is the policy at the end."""
    cost: Cost | None
    diverged: str = ""
    """The sentence that the run ended with, if it did not come to its end."""

    @property
    def last(self) -> Measurement:
        return self.trail[-1]


@dataclass(frozen=True, slots=True)
class Cost:
    """What it took to make one policy."""

    seconds: float
    """In training, the drawing of samples included, measuring left out."""
    reward_model_seconds: float
    """In training the reward model that it needs."""
    peak_memory_bytes: int
    """The most that a process of its own held: the run's, or the reward model's."""
    steps: int
    """Gradient steps of the policy."""
    responses: int
    """Drawn for training; pairs are two responses each."""
    reward_model_responses: int
    """Of the pairs that its reward model is trained on."""
    keys: int
    """Settings that its configurations name, apart from model, data, folder, seed and measuring."""


@dataclass(frozen=True, slots=True)
class RewardModelFit:
    """A reward model against labels and against the true reward, on held-out questions."""

    accuracy: float
    """On held-out pairs."""
    label_accuracy: float
    """Of the true reward on these pairs: their labels are noisy."""
    correlation: float
    """With the true reward of the SFT model's samples, within questions."""


@dataclass(frozen=True, slots=True)
class ShiftResult:
    """A policy on held-out questions of one group, by what its preferences were on."""

    seed: int
    kind: str
    """The kind of questions that was left out."""
    method: str
    strength: float
    without: bool
    """Whether preferences and reward model were without that kind."""
    on_kind: bool
    """Measured on questions of that kind, or on the other three."""
    kl: float
    reward: float
    efficiency: float


@dataclass(frozen=True, slots=True)
class SeedResult:
    """All numbers of one seed."""

    seed: int
    reference_reward: float
    curve: list[Point]
    """The most reward at each KL."""
    curve_stderr: list[float]
    """From sampling, at `FIXED_KLS`."""
    best_of: dict[str, list[BestOfN]]
    reward_model: RewardModelFit
    runs: list[RunResult]
    shift: list[ShiftResult]


@dataclass(frozen=True, slots=True)
class FrontierStudy:
    """A finished study."""

    folder: Path
    seeds: list[SeedResult]
    models: dict[str, list[str]]
    """In memory while a method trains (or answers, in the case of best-of-n)."""
    num_questions: int
    config: dict[str, Any]
    known_kl: float = math.inf
    """Up to which the curves are known; beyond, too few samples carry the weight."""

    def runs(self, method: str, strength: float | None = None) -> list[RunResult]:
        """The runs of a method that came to their end, of all seeds."""
        return [
            run
            for seed in self.seeds
            for run in seed.runs
            if run.method == method and not run.diverged and strength in (None, run.strength)
        ]

    def diverged(self, method: str) -> list[RunResult]:
        """Its runs that did not."""
        return [r for seed in self.seeds for r in seed.runs if r.method == method and r.diverged]

    def methods(self) -> list[str]:
        """Those with a point on the plane."""
        return [m for m in METHODS if any(points(seed, m) for seed in self.seeds)]


# -- questions -----------------------------------------------------------------------------------


def points(seed: SeedResult, method: str) -> list[Point]:
    """All policies of a method, over strengths and training time; best-of-n's over n."""
    if method in seed.best_of:
        return [Point(one.kl, one.reward) for one in seed.best_of[method]]
    own = [run for run in seed.runs if run.method == method]
    return [one.point for run in own for one in run.trail if math.isfinite(one.kl + one.reward)]


def hull(seed: SeedResult, method: str) -> list[Point]:
    """The frontier of a method: the concave hull of the SFT model and all its policies."""
    return concave_hull([Point(0.0, seed.reference_reward), *points(seed, method)])


def by_strength(runs: Iterable[RunResult]) -> list[list[RunResult]]:
    """Runs that differ in seed alone, together; strengths ascending."""
    groups: dict[float, list[RunResult]] = {}
    for run in sorted(runs, key=lambda run: run.strength or 0.0):
        groups.setdefault(run.strength or 0.0, []).append(run)
    return list(groups.values())


BySeed = dict[int, float]
"""A number of a method in each seed that has it."""


def rewards_at(study: FrontierStudy, method: str, kl: float) -> BySeed:
    """Height of a method's frontier at a KL; level beyond its last policy."""
    own = [seed for seed in study.seeds if points(seed, method)]
    return {seed.seed: reward_at_kl(hull(seed, method), kl) for seed in own}


def area_shares(study: FrontierStudy, method: str) -> BySeed:
    """Area under a method's frontier up to `MAX_KL`, as a share of that under the optimum's."""
    return {
        seed.seed: area_under(hull(seed, method), MAX_KL) / area_under(seed.curve, MAX_KL)
        for seed in study.seeds
        if points(seed, method)
    }


def mean_gains(study: FrontierStudy, method: str) -> BySeed:
    """Reward of a method's frontier above the SFT model's, the mean over KL up to `MAX_KL`."""
    own = [seed for seed in study.seeds if points(seed, method)]
    return {seed.seed: area_under(hull(seed, method), MAX_KL) / MAX_KL for seed in own}


def highest_rewards(study: FrontierStudy, method: str) -> BySeed:
    """The most reward that any of a method's policies has."""
    own = [seed for seed in study.seeds if points(seed, method)]
    return {seed.seed: max(p.reward for p in points(seed, method)) for seed in own}


def efficiencies(study: FrontierStudy, runs: Sequence[RunResult]) -> list[float | None]:
    """Of the policies at the end of these runs; None too near to the reference, and beyond what is
    known.
    """
    curves = {seed.seed: seed.curve for seed in study.seeds}
    return [
        efficiency(run.last.point, curves[run.seed])
        if SMALLEST_KL <= run.last.kl <= study.known_kl
        else None
        for run in runs
    ]


def seconds(study: FrontierStudy, method: str) -> BySeed:
    """Training a policy, the reward model's training included; mean over strengths."""
    return _mean_over_runs(
        study, method, lambda run: _cost(run).seconds + _cost(run).reward_model_seconds
    )


def drops(study: FrontierStudy, method: str) -> BySeed:
    """Reward lost at the end against the best evaluation of the same run; mean over strengths."""
    return _mean_over_runs(
        study, method, lambda run: max(m.reward for m in run.trail) - run.last.reward
    )


def lowest_rewards(study: FrontierStudy, method: str) -> BySeed:
    """The reward at the end of training at a method's worst strength."""
    found: BySeed = {}
    for run in study.runs(method):
        found[run.seed] = min(run.last.reward, found.get(run.seed, math.inf))
    return found


def _mean_over_runs(study: FrontierStudy, method: str, value: Any) -> BySeed:
    own: dict[int, list[float]] = {}
    for run in study.runs(method):
        own.setdefault(run.seed, []).append(value(run))
    return {seed: sum(values) / len(values) for seed, values in own.items()}


def _cost(run: RunResult) -> Cost:
    assert run.cost is not None
    return run.cost
