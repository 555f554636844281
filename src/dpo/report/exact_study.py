"""What a study of exact worlds leaves: its numbers as data, and questions asked of them.

The numbers of a seed are a JSON file; what is said of all seeds (means, Student's intervals, paired
differences) is computed from these files alone. The page is in `exact_page`, its figures in
`exact_figures`.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from dpo.atomic import write_json, write_text
from dpo.core.frontier import Floats, Point, area_under, reward_at_kl, tuned_rewards
from dpo.core.stats import mean_interval
from dpo.evaluate.exact import Measured

DPO, IPO, ONLINE_DPO = "DPO", "IPO", "online DPO"
PREFERRED_FT, UNLIKELIHOOD = "preferred-FT", "unlikelihood"
PPO_RM, PPO_TRUE = "PPO, reward model", "PPO, true reward"
BEST_OF_RM, BEST_OF_TRUE = "best-of-n, reward model", "best-of-n, true reward"
RM_SOLVED = "reward model, solved exactly"
METHODS = (
    DPO,
    PPO_RM,
    PPO_TRUE,
    ONLINE_DPO,
    IPO,
    BEST_OF_TRUE,
    BEST_OF_RM,
    PREFERRED_FT,
    UNLIKELIHOOD,
    RM_SOLVED,
)
"""In the order of tables and figures."""

FRONTIER, PAIRS, COVERAGE, RATE, REWARD_MODEL = "frontier", "pairs", "coverage", "rate", "model"
"""What a policy was trained for: the frontier, or the effect of what was varied."""

FIXED_KLS = (1.0, 2.0, 4.0)
MAX_KL = 4.0
"""Nats: the area under a frontier ends there."""


@dataclass(frozen=True, slots=True)
class PolicyRow:
    """One policy of one seed, and how it came to be."""

    seed: int
    effect: str
    method: str
    strength: float | None
    """beta, IPO's tau, the weight of unlikelihood, or n of best-of-n."""
    varied: float | None
    """Number of pairs, share of the responses that pairs are drawn from, factor on the learning
    rate, or number of pairs of the reward model; by `effect`.
    """
    step: int
    last: bool
    seconds: float
    """Of the processor: for training, and for the reward model's before it."""
    measured: Measured


@dataclass(frozen=True, slots=True)
class RewardModelRow:
    """A reward model: its correlation with the true reward, within prompts."""

    pairs: int
    seconds: float
    correlation: float


@dataclass(frozen=True, slots=True)
class SeedResult:
    """All numbers of one seed, or of a part of it."""

    seed: int
    policies: list[PolicyRow]
    reward_models: list[RewardModelRow]
    frontier: list[tuple[float, float, float]]
    """beta, KL and reward of exact optima."""
    reference_reward: float
    reference_entropy: float
    """Nats, mean over prompts."""
    diverged: list[str]
    """Trials that ended without a policy, with the sentence that they ended with."""


@dataclass(frozen=True, slots=True)
class MethodCost:
    """What a method needs, by its settings."""

    method: str
    models: list[str]
    """In memory while it is trained, or used in the case of best-of-n."""
    trained: list[str]
    megabytes: float
    """Weights of all models; gradients and moments of the trained ones."""
    responses: int
    """Drawn for training."""
    labels: int
    """Comparisons of two responses that somebody had to make."""
    rewards: int
    """True rewards of single responses that somebody had to give."""
    settings: int
    """Numbers to choose."""
    per_answer: str
    """Responses drawn for every answer, once it is trained."""


@dataclass(frozen=True, slots=True)
class ExactStudy:
    """A finished study."""

    folder: Path
    seeds: list[SeedResult]
    costs: list[MethodCost]
    config: dict[str, Any]

    @property
    def beta(self) -> float:
        """The beta at which single effects were studied."""
        return float(self.config["beta"])

    def rows(self, effect: str = FRONTIER, method: str | None = None) -> list[PolicyRow]:
        """Policies on the way and at the end, of all seeds."""
        return [
            row
            for seed in self.seeds
            for row in seed.policies
            if row.effect == effect and method in (None, row.method)
        ]

    def final(self, effect: str = FRONTIER, method: str | None = None) -> list[PolicyRow]:
        """Policies at the end of their training."""
        return [row for row in self.rows(effect, method) if row.last]

    def at_beta(self, method: str, beta: float | None = None) -> list[PolicyRow]:
        """The final policies of a method at one beta, one a seed."""
        beta = self.beta if beta is None else beta
        return [row for row in self.final(method=method) if row.strength == beta]


# -- files ---------------------------------------------------------------------------------------


def write_seed(result: SeedResult, file: Path) -> None:
    """Write the numbers of a seed, whole or not at all."""
    write_json(file, asdict(result))


def read_seed(file: Path) -> SeedResult:
    """The numbers of a seed, as they were written."""
    values = json.loads(file.read_text(encoding="utf-8"))
    policies = [
        PolicyRow(**{**row, "measured": Measured(**row["measured"])}) for row in values["policies"]
    ]
    return SeedResult(
        **{
            **values,
            "policies": policies,
            "reward_models": [RewardModelRow(**row) for row in values["reward_models"]],
            "frontier": [(beta, kl, reward) for beta, kl, reward in values["frontier"]],
        }
    )


def merged(parts: Sequence[SeedResult]) -> SeedResult:
    """The halves of a seed as one."""
    return replace(
        parts[0],
        policies=[row for part in parts for row in part.policies],
        reward_models=[row for part in parts for row in part.reward_models],
        diverged=[text for part in parts for text in part.diverged],
    )


MEASURES = [field.name for field in fields(Measured)]
KEYS = ["effect", "method", "strength", "varied"]


def write_tables(study: ExactStudy) -> None:
    """policies.csv: every policy of every seed; table.csv: final ones, means and intervals."""
    own = [field.name for field in fields(PolicyRow) if field.name != "measured"]
    rows = [row for seed in study.seeds for row in seed.policies]
    flat = [{**{name: getattr(row, name) for name in own}, **asdict(row.measured)} for row in rows]
    _write_csv(study.folder / "policies.csv", own + MEASURES, flat)
    header = [*KEYS, "seeds", "seconds"]
    header += [name + end for name in MEASURES for end in ("", "_low", "_high")]
    lines = []
    for group in grouped([row for row in rows if row.last]):
        line = {key: getattr(group[0], key) for key in KEYS}
        line |= {"seeds": len(group), "seconds": mean([row.seconds for row in group])}
        for name in MEASURES:
            values = [getattr(row.measured, name) for row in group]
            if None not in values:
                low, high = mean_interval(values)
                line |= {name: mean(values), f"{name}_low": low, f"{name}_high": high}
        lines.append(line)
    _write_csv(study.folder / "table.csv", header, lines)


def _write_csv(file: Path, header: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> None:
    stream = io.StringIO()
    writer = csv.DictWriter(stream, header, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(file, stream.getvalue())


# -- questions -----------------------------------------------------------------------------------


def grouped(rows: Iterable[PolicyRow]) -> list[list[PolicyRow]]:
    """Rows that differ in seed and time alone, together, in the order of the first of each."""
    groups: dict[tuple[Any, ...], list[PolicyRow]] = {}
    for row in rows:
        groups.setdefault((row.effect, row.method, row.strength, row.varied), []).append(row)
    return list(groups.values())


def mean(values: Sequence[float]) -> float:
    """The arithmetic mean."""
    return sum(values) / len(values)


def exact_frontier(seed: SeedResult) -> list[Point]:
    """The reference and the optima, by rising KL."""
    optima = [Point(kl, reward) for _, kl, reward in seed.frontier]
    return [Point(0.0, seed.reference_reward), *sorted(optima)]


def rewards_at(study: ExactStudy, method: str, kl: float) -> list[float]:
    """Reward of a method tuned to a KL, one a seed."""
    return [float(_tuned(seed, method, [kl])[0]) for seed in study.seeds]


def exact_rewards_at(study: ExactStudy, kl: float) -> list[float]:
    """Reward of the optimum at a KL, one a seed."""
    return [reward_at_kl(exact_frontier(seed), kl) for seed in study.seeds]


def area_shares(study: ExactStudy, method: str) -> list[float]:
    """Area between a method's frontier and the reference's reward up to `MAX_KL`, as a share of
    that of the optimum's, one a seed.
    """
    shares = []
    for seed in study.seeds:
        own = [Point(*xy) for xy in zip(GRID, _tuned(seed, method, GRID), strict=True)]
        shares.append(area_under(own, MAX_KL) / area_under(exact_frontier(seed), MAX_KL))
    return shares


GRID = [MAX_KL * k / 400 for k in range(401)]
"""KLs at which a frontier is summed."""


def _tuned(seed: SeedResult, method: str, kls: Sequence[float]) -> Floats:
    """A method's frontier through its final policies."""
    points = [
        Point(row.measured.kl, row.measured.reward)
        for row in seed.policies
        if (row.effect, row.method, row.last) == (FRONTIER, method, True)
    ]
    return tuned_rewards(points, exact_frontier(seed), kls)


def gains(rows: Iterable[PolicyRow]) -> dict[int, float]:
    """Share of the objective's gain, by seed."""
    return {row.seed: row.measured.gain for row in rows if row.measured.gain is not None}


def paired(first: Mapping[int, float], second: Mapping[int, float]) -> list[float]:
    """Differences on the seeds that both have."""
    return [value - second[seed] for seed, value in first.items() if seed in second]


def seconds_to(study: ExactStudy, method: str, gain: float) -> dict[int, float]:
    """Training time until a share of the gain is reached at the study's beta, by seed; seeds in
    which no checkpoint has it are left out.
    """
    found: dict[int, float] = {}
    for row in study.rows(method=method):
        reached = row.measured.gain is not None and row.measured.gain >= gain
        if row.strength == study.beta and reached:
            found.setdefault(row.seed, row.seconds)
    return found


def at_rate(study: ExactStudy, method: str, factor: float) -> list[PolicyRow]:
    """Final policies at the study's beta, the learning rate multiplied by a factor."""
    if factor == 1.0:
        return study.at_beta(method)
    return [row for row in study.final(RATE, method) if row.varied == factor]


def worst_gains(study: ExactStudy, method: str) -> dict[int, float]:
    """The lowest gain over the learning rates, by seed."""
    found: dict[int, float] = {}
    for factor in (1.0, *study.config["rate_factors"]):
        for seed, gain in gains(at_rate(study, method, factor)).items():
            found[seed] = min(gain, found.get(seed, gain))
    return found
