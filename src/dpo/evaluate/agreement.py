"""Do two judges say the same? Raw agreement and Cohen's kappa on the same comparisons.

Raw agreement flatters judges that mostly say one thing: two that give every prompt to the chosen
response agree without looking. Kappa takes out what their marginal rates alone would give. It has
the opposite weakness: where one verdict is nearly all there is, chance agreement is near 1, and
kappa is near 0 although they hardly differ. So both are reported, with the counts.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import combinations
from typing import Any, get_args

import numpy as np
from numpy.typing import NDArray

from dpo.core.stats import Interval
from dpo.evaluate.matchups import JudgedMatchup, Place
from dpo.evaluate.records import Verdict
from dpo.evaluation_config import Comparison

VERDICTS: tuple[Verdict, ...] = get_args(Verdict)
"""Order of the rows (first judge) and columns (second judge) of the counts."""

DECIDED = [VERDICTS.index("win"), VERDICTS.index("loss")]
NUM_RESAMPLES = 2_000

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Agreement:
    """Two judges on the comparisons of one family that both judged.

    `agreement` and `kappa` are over win, loss and tie; the `decided_` ones over the comparisons
    that neither called a tie. None: nothing to compare, or a kappa that is 0/0. Intervals are the
    bootstrap's over prompts. `win_loss` counts what judge_a called a win and judge_b a loss.
    """

    judge_a: str
    judge_b: str
    family: Comparison
    num_prompts: int
    n: int
    agreement: float | None
    kappa: float | None
    low: float | None
    high: float | None
    decided_n: int
    decided_agreement: float | None
    decided_kappa: float | None
    decided_low: float | None
    decided_high: float | None
    confidence: float
    win_win: int
    win_loss: int
    win_tie: int
    loss_win: int
    loss_loss: int
    loss_tie: int
    tie_win: int
    tie_loss: int
    tie_tie: int


def agreement_table(
    verdicts: Iterable[JudgedMatchup], *, confidence: float = 0.95, seed: int = 0
) -> list[Agreement]:
    """One row for every two judges and each family that both judged, in order of appearance."""
    by_judge: dict[tuple[str, Comparison], dict[Place, Verdict]] = {}
    for v in verdicts:
        place = Place(
            family=v.family,
            a=v.a,
            b=v.b,
            temperature=v.temperature,
            prompt_index=v.prompt_index,
            sample=v.sample,
        )
        by_judge.setdefault((v.judge, v.family), {})[place] = v.verdict
    return [
        _row(first, second, by_judge, confidence, seed)
        for first, second in combinations(by_judge, 2)
        if first[1] == second[1]
    ]


def cohens_kappa(counts: Floats) -> Floats:
    """Cohen's kappa of confusion counts (..., K, K), shape (...); NaN where it is 0/0.

    `kappa = (p_o - p_e) / (1 - p_e)`, `p_o` the share on the diagonal, `p_e = sum_k p_k. p_.k` the
    share that independent judges with these marginal rates would have there.

    Source: Cohen 1960, A coefficient of agreement for nominal scales.

    >>> round(float(cohens_kappa(np.array([[20.0, 5.0], [10.0, 15.0]]))), 3)
    0.4
    """
    n = counts.sum((-2, -1))
    # Times n²: whole numbers, so that equal terms are equal and 0/0 is found exactly.
    observed = n * np.trace(counts, axis1=-2, axis2=-1)
    expected = (counts.sum(-1) * counts.sum(-2)).sum(-1)
    with np.errstate(invalid="ignore", divide="ignore"):
        kappa = (observed - expected) / (n**2 - expected)
    return np.where(np.isfinite(kappa), kappa, np.nan)


def kappa_interval(
    counts: Floats, *, confidence: float, seed: int, num_resamples: int = NUM_RESAMPLES
) -> Interval | None:
    """Percentile bootstrap over prompts: counts of each prompt, (P, K, K), P prompts.

    A resample draws P prompts with replacement; those whose kappa is 0/0 are left out. Where the
    judges agree throughout, every resample does, and the interval is a point. None: below two
    prompts, or no resample has a kappa.

    Source: Efron and Tibshirani 1993, An introduction to the bootstrap, chapter 13.
    """
    num_prompts = len(counts)
    if num_prompts < 2:
        return None
    rng = np.random.default_rng(seed)
    uniform = np.full(num_prompts, 1 / num_prompts)
    times_drawn = rng.multinomial(num_prompts, uniform, size=num_resamples)
    kappas = cohens_kappa(np.tensordot(times_drawn.astype(np.float64), counts, axes=1))
    known = kappas[~np.isnan(kappas)]
    if not len(known):
        return None
    low, high = np.quantile(known, [(1 - confidence) / 2, (1 + confidence) / 2])
    return Interval(float(low), float(high))


def _row(
    first: tuple[str, Comparison],
    second: tuple[str, Comparison],
    by_judge: Mapping[tuple[str, Comparison], Mapping[Place, Verdict]],
    confidence: float,
    seed: int,
) -> Agreement:
    here, there = by_judge[first], by_judge[second]
    shared = [place for place in here if place in there]
    number = {p: i for i, p in enumerate(dict.fromkeys(place.prompt_index for place in shared))}
    counts = np.zeros((len(number), len(VERDICTS), len(VERDICTS)))
    for place in shared:
        row, column = VERDICTS.index(here[place]), VERDICTS.index(there[place])
        counts[number[place.prompt_index], row, column] += 1
    every = _summary(counts, confidence, seed)
    decided = _summary(counts[:, DECIDED][:, :, DECIDED], confidence, seed)
    names = [f"{row}_{column}" for row in VERDICTS for column in VERDICTS]
    totals = counts.sum(0).astype(int).flatten().tolist()
    return Agreement(
        judge_a=first[0],
        judge_b=second[0],
        family=first[1],
        num_prompts=len(number),
        confidence=confidence,
        **every,
        **{f"decided_{name}": value for name, value in decided.items()},
        **dict(zip(names, totals, strict=True)),
    )


def _summary(counts: Floats, confidence: float, seed: int) -> dict[str, Any]:
    """n, agreement, kappa and its interval, from the counts of each prompt, (P, K, K)."""
    total = counts.sum(0)
    n = int(total.sum())
    kappa = float(cohens_kappa(total)) if n else float("nan")
    if np.isnan(kappa):
        interval = None
    else:
        interval = kappa_interval(counts, confidence=confidence, seed=seed)
    return {
        "n": n,
        "agreement": float(np.trace(total)) / n if n else None,
        "kappa": None if np.isnan(kappa) else kappa,
        "low": interval.low if interval else None,
        "high": interval.high if interval else None,
    }
