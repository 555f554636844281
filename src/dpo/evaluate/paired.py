"""Who is better on the same prompts: tests between models and against the nulls, and what such
tests can see.

The prompt is the unit, however many samples it has. Ties are left out of the win rates that are
compared here, as they are of the table; a prompt counts where both responders have a decided
response to it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Literal

from dpo.core.stats import (
    detectable_difference,
    holm,
    mcnemar_exact,
    paired_permutation,
    paired_proportion_interval,
    required_n_for_difference,
)
from dpo.evaluate.records import (
    Responder,
    SamplesByPrompt,
    ScoredGeneration,
    by_responder,
    win_share,
)

Family = Literal["models", "null"]
FAMILIES: dict[Family, str] = {"models": "between models", "null": "against the best null response"}
"""The families of tests, each with what it compares; Holm's correction is over one of them, all
its models and temperatures together.
"""

DIFFERENCE, POWER, LEVEL = 0.05, 0.8, 0.05
"""What a power analysis asks for: to see 5 points with probability 0.8 by a test at 5%."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PairedTest:
    """Two responders on the same prompts: `difference` is the win rate of a minus that of b.

    `num_unshared` counts the prompts that only one of the two answered, which are left out;
    `num_decided` the shared prompts on which both have a decided response, which the difference,
    its interval and McNemar's test are about. `disagreement` is the mean squared difference of the
    two win shares there: with one sample a prompt, the share of prompts that only one of them wins.

    The adjusted p-values are Holm's over the `family_size` tests of the same family.
    """

    family: Family
    family_size: int
    model_a: str
    model_b: str
    temperature: float | None
    num_prompts: int
    num_unshared: int
    num_decided: int
    wins_only_a: int
    wins_only_b: int
    disagreement: float | None
    difference: float | None
    low: float
    high: float
    confidence: float
    mcnemar_p: float
    mcnemar_p_holm: float
    margin_difference: float | None
    permutation_p: float
    permutation_p_holm: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Power:
    """What the tests of one family can see, by the two responders that disagree most.

    `prompts_needed` (decided by both) show a `DIFFERENCE` with probability `POWER` in one test at
    `LEVEL`; the `num_prompts` of this evaluation show a `smallest_difference` so, or none (None).
    `..._corrected` is the same at `LEVEL / num_tests`, which is what Holm's correction asks of the
    smallest p-value of the family: enough for any one of its tests.
    """

    family: Family
    num_tests: int
    num_prompts: int
    disagreement: float
    prompts_needed: int
    prompts_needed_corrected: int
    smallest_difference: float | None
    smallest_difference_corrected: float | None


def paired_tests(
    scored: Iterable[ScoredGeneration],
    *,
    num_permutations: int = 10_000,
    seed: int = 0,
    confidence: float = 0.95,
) -> list[PairedTest]:
    """Tests on the same prompts: every two models at each temperature, and each against the nulls.

    Family "models" holds the pairs of models that share a temperature. Family "null" holds each
    model at each temperature against the null response with the highest win rate: the one to beat.
    Choosing it by its win rate favours the null, so the tests err on the side of caution.

    `difference` is the mean over the decided prompts of the difference of the win shares there,
    with Bonett and Price's interval; McNemar's exact test counts the prompts that only one of the
    two wins (by majority, where there are several samples). The permutation test takes the
    differences of mean margins on all shared prompts, ties included.
    """
    responders = by_responder(scored)
    models = [key for key in responders if key.kind == "model"]
    null = best_null(responders)
    pairs = [(a, b) for a, b in combinations(models, 2) if a.temperature == b.temperature]
    against_null = [(model, null) for model in models if null]

    def tests_of(family: Family, pairs: list[tuple[Responder, Responder]]) -> list[PairedTest]:
        compared = [
            _compare(family, a, b, responders, num_permutations, seed, confidence) for a, b in pairs
        ]
        return _with_holm(compared)

    return tests_of("models", pairs) + tests_of("null", against_null)


def best_null(responders: Mapping[Responder, SamplesByPrompt]) -> Responder | None:
    """The null response of highest win rate, the first of equals; None without null responses."""

    def rate(null: Responder) -> float:
        samples = (record for prompt in responders[null].values() for record in prompt)
        return win_share(samples) or 0.0

    return max((key for key in responders if key.kind == "null"), key=rate, default=None)


def power_of(tests: Sequence[PairedTest]) -> list[Power]:
    """One line for each family of tests, by the test whose responders disagree most.

    It uses Connor's equation with the disagreement that was observed, or `DIFFERENCE` where that is
    smaller: two models that differ by 5 points disagree on 5% of the prompts at least. McNemar's
    test, being exact, needs a few prompts more.
    """
    found = []
    for family in FAMILIES:
        known = [t for t in tests if t.family == family and t.disagreement is not None]
        if known:
            found.append(_power(max(known, key=lambda test: test.disagreement or 0.0)))
    return found


def power_lines(tests: Sequence[PairedTest]) -> list[str]:
    """The power of each family as a sentence."""
    return [_sentence(power) for power in power_of(tests)]


def _power(test: PairedTest) -> Power:
    disagreement = test.disagreement or 0.0

    def needed(level: float) -> int:
        discordant = max(disagreement, DIFFERENCE)
        # Of a paired test, the rate itself decides nothing.
        return required_n_for_difference(
            0.5, DIFFERENCE, power=POWER, alpha=level, discordant=discordant
        )

    def smallest(level: float) -> float | None:
        return detectable_difference(
            test.num_decided, discordant=disagreement, power=POWER, alpha=level
        )

    corrected = LEVEL / test.family_size
    return Power(
        family=test.family,
        num_tests=test.family_size,
        num_prompts=test.num_decided,
        disagreement=disagreement,
        prompts_needed=needed(LEVEL),
        prompts_needed_corrected=needed(corrected),
        smallest_difference=smallest(LEVEL),
        smallest_difference_corrected=smallest(corrected),
    )


def _sentence(power: Power) -> str:
    """For example: Between models: prompts needed to see a 5-point difference at 80% power: 1,004
    (1,702 with Holm's correction over 9 tests, all temperatures together); these 500 can see 7.1
    points (9.3).
    """
    many = power.num_tests > 1
    needed = f"{power.prompts_needed:,}"
    if many:
        needed += (
            f" ({power.prompts_needed_corrected:,} with Holm's correction over "
            f"{power.num_tests} tests, all temperatures together)"
        )
    seen = _points(power.smallest_difference)
    if many:
        seen += f" ({_points(power.smallest_difference_corrected)})"
    what = FAMILIES[power.family]
    return (
        f"{what[0].upper()}{what[1:]}: prompts needed to see a {100 * DIFFERENCE:.0f}-point "
        f"difference at {POWER:.0%} power: {needed}; these {power.num_prompts:,} can see {seen}."
    )


def _points(difference: float | None) -> str:
    return "none" if difference is None else f"{100 * difference:.1f} points"


def _compare(
    family: Family,
    a: Responder,
    b: Responder,
    responders: Mapping[Responder, SamplesByPrompt],
    num_permutations: int,
    seed: int,
    confidence: float,
) -> PairedTest:
    prompts_a, prompts_b = responders[a], responders[b]
    shared = sorted(prompts_a.keys() & prompts_b.keys())
    shares = [
        (share_a, share_b)
        for i in shared
        if (share_a := win_share(prompts_a[i])) is not None
        and (share_b := win_share(prompts_b[i])) is not None
    ]
    differences = [share_a - share_b for share_a, share_b in shares]
    wins_only_a = sum(share_a > 0.5 > share_b for share_a, share_b in shares)
    wins_only_b = sum(share_b > 0.5 > share_a for share_a, share_b in shares)
    margin_differences = [_mean_margin(prompts_a[i]) - _mean_margin(prompts_b[i]) for i in shared]
    interval = paired_proportion_interval(differences, confidence=confidence)
    mcnemar_p = mcnemar_exact(wins_only_a, wins_only_b)
    permutation_p = paired_permutation(
        margin_differences, num_permutations=num_permutations, seed=seed
    )
    return PairedTest(
        family=family,
        family_size=1,
        model_a=a.model,
        model_b=b.model,
        temperature=a.temperature,
        num_prompts=len(shared),
        num_unshared=len(prompts_a.keys() ^ prompts_b.keys()),
        num_decided=len(shares),
        wins_only_a=wins_only_a,
        wins_only_b=wins_only_b,
        disagreement=_mean([difference**2 for difference in differences]),
        difference=_mean(differences),
        low=interval.low,
        high=interval.high,
        confidence=confidence,
        mcnemar_p=mcnemar_p,
        mcnemar_p_holm=mcnemar_p,
        margin_difference=_mean(margin_differences),
        permutation_p=permutation_p,
        permutation_p_holm=permutation_p,
    )


def _with_holm(family: Sequence[PairedTest]) -> list[PairedTest]:
    mcnemar = holm([test.mcnemar_p for test in family])
    permutation = holm([test.permutation_p for test in family])
    return [
        replace(test, family_size=len(family), mcnemar_p_holm=p, permutation_p_holm=q)
        for test, p, q in zip(family, mcnemar, permutation, strict=True)
    ]


def _mean_margin(samples: Sequence[ScoredGeneration]) -> float:
    return sum(record.margin for record in samples) / len(samples)


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None
