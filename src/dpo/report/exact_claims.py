"""What a study of exact worlds says of "simpler, faster, more stable than PPO"."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

from dpo.core.stats import mean_interval
from dpo.report.exact_study import (
    DPO,
    FIXED_KLS,
    PPO_RM,
    PPO_TRUE,
    ExactStudy,
    area_shares,
    gains,
    mean,
    paired,
    rewards_at,
    seconds_to,
    worst_gains,
)
from dpo.report.exact_tables import NEAR, minus
from dpo.report.tables import Cells, spread


def claims_table(study: ExactStudy) -> list[Cells]:
    """Each claim as a number with an interval, and what the interval says."""
    others = (PPO_RM, PPO_TRUE)
    lines = [["claim", "measured as", *(f"against {other}" for other in others)]]
    lines.append(
        ["simpler", "models held; settings", *(_simpler(study, other) for other in others)]
    )
    for claim, measured_as, difference in CLAIMS:
        ratio = "ratio" in measured_as
        verdicts = [verdict(difference(study, other), ratio=ratio) for other in others]
        lines.append([claim, measured_as, *verdicts])
    return lines


def _simpler(study: ExactStudy, other: str) -> str:
    cost = {one.method: one for one in study.costs}
    own, theirs = cost[DPO], cost[other]
    return fewer(
        (len(own.models), own.settings),
        (len(theirs.models), theirs.settings),
    )


def fewer(own: tuple[int, int], theirs: tuple[int, int]) -> str:
    """Models and settings, and whether DPO has fewer of both: counts, which have no interval.

    >>> fewer((2, 4), (4, 12))
    '2 against 4; 4 against 12: **holds**'
    """
    holds = all(a < b for a, b in zip(own, theirs, strict=True))
    counts = "; ".join(f"{a} against {b}" for a, b in zip(own, theirs, strict=True))
    return f"{counts}: {'**holds**' if holds else '**does not hold**'}"


def verdict(values: Sequence[float], *, ratio: bool = False) -> str:
    """Mean, interval, and whether a claim that the difference is above 0 holds.

    Args:
        values: differences, one a seed; or logarithms of ratios, shown as ratios.

    >>> verdict([1.0, 1.1, 0.9])
    '+1.000 [+0.752, +1.248]: **holds**'
    >>> verdict([1.0, -1.0])
    '+0.000 [-12.706, +12.706]: open'
    """
    if len(values) < 2:
        return "open: too few seeds"
    low, high = mean_interval(values)
    said = "**holds**" if low > 0 else "**does not hold**" if high < 0 else "open"
    if ratio:
        centre, low, high = (math.exp(x) for x in (mean(values), low, high))
        return f"{centre:.2f} [{low:.2f}, {high:.2f}]: {said}"
    return f"{spread(values, 3, signed=True)}: {said}"


def _faster(study: ExactStudy, other: str) -> list[float]:
    own, theirs = (
        {row.seed: math.log(row.seconds) for row in study.at_beta(method)}
        for method in (other, DPO)
    )
    return paired(own, theirs)


def _sooner(study: ExactStudy, other: str) -> list[float]:
    own, theirs = (
        {seed: math.log(s) for seed, s in seconds_to(study, method, NEAR).items()}
        for method in (other, DPO)
    )
    return paired(own, theirs)


def _better_at(kl: float) -> Callable[[ExactStudy, str], list[float]]:
    def difference(study: ExactStudy, other: str) -> list[float]:
        return minus(rewards_at(study, DPO, kl), rewards_at(study, other, kl))

    return difference


def _wider(study: ExactStudy, other: str) -> list[float]:
    return minus(area_shares(study, DPO), area_shares(study, other))


def _nearer(study: ExactStudy, other: str) -> list[float]:
    return paired(gains(study.at_beta(DPO)), gains(study.at_beta(other)))


def _robuster(study: ExactStudy, other: str) -> list[float]:
    return paired(worst_gains(study, DPO), worst_gains(study, other))


def _steadier(study: ExactStudy, other: str) -> list[float]:
    """How much further a seed's gain is from the mean over seeds with PPO than with DPO; of two
    seeds both are equally far from it, which says nothing.
    """
    if len(study.seeds) < 3:
        return []
    return paired(_scatter(gains(study.at_beta(other))), _scatter(gains(study.at_beta(DPO))))


def _scatter(values: Mapping[int, float]) -> dict[int, float]:
    """Absolute distance from the mean over seeds, by seed (Levene's statistic)."""
    centre = mean(list(values.values())) if values else 0.0
    return {seed: abs(value - centre) for seed, value in values.items()}


CLAIMS: tuple[tuple[str, str, Callable[[ExactStudy, str], list[float]]], ...] = (
    ("faster", "processor seconds of all training, PPO's ratio to DPO's", _faster),
    ("faster", f"processor seconds to {NEAR:.0%} of the gain, PPO's ratio to DPO's", _sooner),
    (
        "more stable",
        "scatter of the gain over seeds (mean distance from the mean), PPO's less DPO's",
        _steadier,
    ),
    ("more stable", "worst gain over learning rates, DPO's less PPO's", _robuster),
    ("nearer to π*", "gain at the study's beta, DPO's less PPO's", _nearer),
    ("a better frontier", "area share, DPO's less PPO's", _wider),
    *(
        ("a better frontier", f"reward at KL {kl:g}, DPO's less PPO's", _better_at(kl))
        for kl in FIXED_KLS
    ),
)
