"""Intervals and paired tests: what a win rate on a few hundred prompts can prove.

Everything is two-sided and takes plain numbers. The prompt is the unit of independence: several
samples of one prompt are one cluster, never several observations.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from dpo.errors import InputError

Floats = NDArray[np.float64]


class Interval(NamedTuple):
    """A closed interval, in the units of what it encloses."""

    low: float
    high: float


def wilson_interval(wins: int, n: int, *, confidence: float = 0.95) -> Interval:
    """Wilson's score interval for a proportion, within [0, 1].

    `(p + z²/2n ± z sqrt(p(1-p)/n + z²/4n²)) / (1 + z²/n)`, p = wins/n, z the normal quantile.
    It covers near its nominal rate at small n and at p near 0 or 1, where `p ± z·se` does not.

    Source: Wilson 1927, Probable inference, the law of succession, and statistical inference.
    With n = 0 nothing is known: (0, 1).

    Raises:
        InputError: unless 0 <= wins <= n and 0 < confidence < 1.

    >>> [round(end, 3) for end in wilson_interval(5, 10)]
    [0.237, 0.763]
    """
    if not 0 <= wins <= n:
        raise InputError(f"a proportion needs 0 <= wins <= n; got wins={wins}, n={n}.")
    z = _normal_quantile(confidence)
    return _wilson(wins / n, n, z) if n else Interval(0.0, 1.0)


def clustered_wilson_interval(
    successes: ArrayLike, clusters: Sequence[Hashable], *, confidence: float = 0.95
) -> Interval:
    """Wilson's interval for a proportion of observations in clusters (samples of one prompt).

    Wilson's equation at the effective sample size `n_eff = p(1-p) / v`, v the cluster-robust
    variance of the mean, with Student's quantile (clusters - 1 degrees of freedom) for z. `n_eff`
    is never above n; where every observation is the same, v says nothing and n_eff is the number
    of clusters. One observation a cluster is the plain `wilson_interval`.

    Source: Kish 1965 (design effect); Dean and Pagano 2015, Evaluating confidence interval methods
    for binomial proportions in clustered surveys (Wilson's with n_eff).

    Raises:
        InputError: on unequal lengths, values other than 0 and 1, or a confidence outside (0, 1).
    """
    values, groups = _values_and_groups(successes, clusters)
    if not np.isin(values, (0.0, 1.0)).all():
        raise InputError("successes must be 0 or 1.")
    n, num_clusters = len(values), len(set(clusters))
    if num_clusters == n:
        return wilson_interval(int(values.sum()), n, confidence=confidence)
    if num_clusters < 2:
        return Interval(0.0, 1.0)
    p = float(values.mean())
    variance = _clustered_variance(values, groups)
    effective_n = min(n, p * (1 - p) / variance) if variance > 0 else num_clusters
    return _wilson(p, effective_n, _student_quantile(confidence, num_clusters - 1))


def mean_interval(values: ArrayLike, *, confidence: float = 0.95) -> Interval:
    """Student's interval for a mean: `mean ± t_{n-1} s / sqrt(n)`, s with n - 1 in the denominator.

    Source: Student 1908, The probable error of a mean. Below two values the width is infinite.

    Raises:
        InputError: on a value that is not finite, or a confidence outside (0, 1).

    >>> [round(end, 3) for end in mean_interval([1.0, 2.0, 3.0])]
    [-0.484, 4.484]
    """
    sample = _finite_vector(values)
    n = len(sample)
    if n < 2:
        return Interval(-math.inf, math.inf)
    half = _student_quantile(confidence, n - 1) * float(sample.std(ddof=1)) / math.sqrt(n)
    return Interval(float(sample.mean()) - half, float(sample.mean()) + half)


def clustered_mean_interval(
    values: ArrayLike, clusters: Sequence[Hashable], *, confidence: float = 0.95
) -> Interval:
    """Interval for the mean of all values when those that share a cluster are dependent.

    `mean ± t_{G-1} sqrt(v)`, `v = G/(G-1) · sum_g (sum_{i in g} (x_i - mean))² / n²`, G the number
    of clusters. With one value a cluster, or equally large clusters, this is `mean_interval` of
    the clusters' means. Below two clusters the width is infinite.

    Source: Liang and Zeger 1986 (cluster-robust variance), with the G/(G-1) small-sample factor.

    Raises:
        InputError: on unequal lengths, a value that is not finite, or a confidence outside (0, 1).
    """
    sample, groups = _values_and_groups(values, clusters)
    num_clusters = len(set(clusters))
    if num_clusters < 2:
        return Interval(-math.inf, math.inf)
    spread = math.sqrt(_clustered_variance(sample, groups))
    half = _student_quantile(confidence, num_clusters - 1) * spread
    return Interval(float(sample.mean()) - half, float(sample.mean()) + half)


def clustered_bootstrap_interval(
    values: ArrayLike,
    clusters: Sequence[Hashable],
    *,
    confidence: float = 0.95,
    num_resamples: int = 5_000,
    seed: int = 0,
) -> Interval | None:
    """Bootstrap interval for the mean of all values when whole clusters are drawn again.

    Clusters (prompts) are drawn with replacement, each with all its values; the mean of a draw is
    `sum_g s_g / sum_g n_g`, s_g the sum of a cluster's values and n_g their number. The interval is
    bias-corrected and accelerated (BCa). It assumes no distribution, and so checks the intervals
    that do; with few clusters it is too narrow. The same seed gives the same interval.

    None where nothing can be resampled: below two clusters, or all clusters have the same mean.

    Source: Efron 1987, Better bootstrap confidence intervals; clusters: Davison and Hinkley 1997,
    section 3.8. Computed by `scipy.stats.bootstrap`.

    Raises:
        InputError: on unequal lengths, a value that is not finite, num_resamples below 1, or a
            confidence outside (0, 1).
    """
    sample, groups = _values_and_groups(values, clusters)
    _check_confidence(confidence)
    if num_resamples < 1:
        raise InputError(f"num_resamples must be at least 1; got {num_resamples}.")
    sums = np.bincount(groups, weights=sample)
    counts = np.bincount(groups).astype(np.float64)
    if len(set((sums / counts).tolist())) < 2:
        return None
    found = (
        _scipy_stats()
        .bootstrap(
            (sums, counts),
            lambda s, n, axis: s.sum(axis=axis) / n.sum(axis=axis),
            paired=True,
            vectorized=True,
            confidence_level=confidence,
            n_resamples=num_resamples,
            batch=max(1, 1_000_000 // len(sums)),  # bounds the memory: 8 MB of sums at once
            rng=np.random.default_rng(seed),
        )
        .confidence_interval
    )
    return Interval(float(found.low), float(found.high))


def paired_proportion_interval(differences: ArrayLike, *, confidence: float = 0.95) -> Interval:
    """Interval for a difference of two proportions measured on the same prompts, within [-1, 1].

    `d` holds one difference a prompt: -1, 0 or 1 for single verdicts, in between for shares of
    several samples. The pseudo-pairs +1 and -1 are appended, then `mean(d) ± z sqrt((mean(d²) -
    mean(d)²) / n)`. Unlike the plain Wald interval it keeps a width when no pair disagrees.

    Source: Bonett and Price 2012, Adjusted Wald confidence interval for a difference of binomial
    proportions based on paired data, to which it is equal for single verdicts.

    Raises:
        InputError: on a difference outside [-1, 1], or a confidence outside (0, 1).
    """
    sample = _finite_vector(differences)
    if (np.abs(sample) > 1).any():
        raise InputError("differences of proportions must lie within [-1, 1].")
    adjusted = np.append(sample, (1.0, -1.0))
    mean, spread = float(adjusted.mean()), float(adjusted.std())
    half = _normal_quantile(confidence) * spread / math.sqrt(len(adjusted))
    return Interval(max(-1.0, mean - half), min(1.0, mean + half))


def mcnemar_exact(wins_only_a: int, wins_only_b: int) -> float:
    """Exact McNemar test of two paired proportions: p-value, two-sided.

    Pairs on which both won or both lost say nothing; under the null each of the others is a fair
    coin, so `wins_only_a ~ Binomial(wins_only_a + wins_only_b, 1/2)`. Without such pairs, p = 1.

    Source: McNemar 1947; the exact form is the sign test.

    Raises:
        InputError: on a negative count.

    >>> mcnemar_exact(0, 5)
    0.0625
    """
    if min(wins_only_a, wins_only_b) < 0:
        raise InputError(f"counts cannot be negative; got {wins_only_a} and {wins_only_b}.")
    discordant = wins_only_a + wins_only_b
    if discordant == 0:
        return 1.0
    return float(_scipy_stats().binomtest(wins_only_a, discordant, 0.5).pvalue)


def paired_permutation(
    differences: ArrayLike, *, num_permutations: int = 10_000, seed: int = 0
) -> float:
    """Sign-flip permutation test that paired differences are symmetric about 0: p-value, two-sided.

    The statistic is the mean. All `2^n` sign patterns are enumerated when they are at most
    `num_permutations`; otherwise that many are drawn and `p = (hits + 1) / (num_permutations + 1)`
    for each side, so that p is never 0. Without differences, p = 1.

    Source: Fisher 1935 (sign flips); Phipson and Smyth 2010 (the + 1).

    Raises:
        InputError: on a value that is not finite or a num_permutations below 1.

    >>> paired_permutation([1.0, 2.0, 3.0])  # only +++ and --- of the 8 are as extreme
    0.25
    """
    sample = _finite_vector(differences)
    if num_permutations < 1:
        raise InputError(f"num_permutations must be at least 1; got {num_permutations}.")
    if not sample.any():
        return 1.0
    exact = 2 ** len(sample) <= num_permutations
    sums = _flipped_sums(sample, None if exact else num_permutations, seed)
    observed = float(sample.sum())
    slack = 1e-9 * float(np.abs(sample).sum())  # equal statistics may differ by rounding
    above = int((sums >= observed - slack).sum())
    below = int((sums <= observed + slack).sum())
    if exact:
        return min(1.0, 2 * min(above, below) / len(sums))
    return min(1.0, 2 * (min(above, below) + 1) / (num_permutations + 1))


def _flipped_sums(sample: Floats, num_patterns: int | None, seed: int) -> Floats:
    """Sums of the sample under random sign patterns; under all `2^n` where no number is given."""
    n = len(sample)
    if num_patterns is None:
        negative = (np.arange(2**n)[:, None] >> np.arange(n)) & 1
        return np.asarray((1.0 - 2.0 * negative) @ sample, dtype=np.float64)
    rng = np.random.default_rng(seed)
    block = max(1, 1_000_000 // n)  # bounds the memory: 8 MB of signs at once
    sizes = [min(block, num_patterns - start) for start in range(0, num_patterns, block)]
    blocks = [(1.0 - 2.0 * rng.integers(0, 2, size=(size, n))) @ sample for size in sizes]
    return np.concatenate(blocks).astype(np.float64)


def holm(p_values: ArrayLike) -> list[float]:
    """Holm's step-down adjustment: p-values that control the family-wise error, in the order given.

    Sorted ascending, `adjusted_(i) = max_{j <= i} min(1, (m - j + 1) p_(j))`, m the number of
    tests. Valid under any dependence, and never weaker than Bonferroni.

    Source: Holm 1979, A simple sequentially rejective multiple test procedure.

    Raises:
        InputError: on a p-value outside [0, 1].

    >>> holm([0.01, 0.04, 0.03])
    [0.03, 0.06, 0.06]
    """
    p = _finite_vector(p_values)
    if ((p < 0) | (p > 1)).any():
        raise InputError("p-values must lie within [0, 1].")
    order = np.argsort(p, kind="stable")
    stepped = np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1))
    adjusted = np.empty_like(p)
    adjusted[order] = np.minimum(stepped, 1.0)
    return [float(value) for value in adjusted]


def required_n_for_difference(
    p: float,
    delta: float,
    *,
    power: float = 0.8,
    alpha: float = 0.05,
    discordant: float | None = None,
) -> int:
    """Prompts needed to tell win rate p from p + delta, by a two-sided test at level `alpha`.

    Unpaired (default), prompts for each of the two models, `p̄ = p + delta/2`:
    `n = (z_{1-alpha/2} sqrt(2 p̄(1-p̄)) + z_power sqrt(p1(1-p1) + p2(1-p2)))² / delta²`.

    Paired (`discordant` given: the share of prompts on which exactly one of the two wins), prompts
    that both answer: `n = (z_{1-alpha/2} sqrt(discordant) + z_power sqrt(discordant - delta²))² /
    delta²`. `discordant` is the mean squared difference of two verdicts, and where prompts have
    several samples, that of two win shares takes its place.

    Source: Fleiss 1981, Statistical methods for rates and proportions; Connor 1987,
    Sample size for testing differences in proportions for the paired-sample design. Without
    continuity correction.

    Raises:
        InputError: on delta = 0, a rate outside (0, 1), or a discordant share outside [|delta|, 1].

    >>> required_n_for_difference(0.5, 0.1)
    388
    >>> required_n_for_difference(0.5, 0.1, discordant=0.3)
    234
    """
    rates = {"p": p, "p + delta": p + delta, "power": power, "alpha": alpha}
    for name, rate in rates.items():
        if not 0 < rate < 1:
            raise InputError(f"{name} must lie within (0, 1); got {rate}.")
    if delta == 0:
        raise InputError("delta must not be 0: no sample shows a difference that is not there.")
    z_power = float(_scipy_stats().norm.ppf(power))
    if discordant is None:
        middle = p + delta / 2
        null = 2 * middle * (1 - middle)
        alternative = p * (1 - p) + (p + delta) * (1 - p - delta)
    elif abs(delta) <= discordant <= 1:
        null, alternative = discordant, discordant - delta**2
    else:
        raise InputError(f"discordant must lie within [|delta|, 1]; got {discordant}.")
    quantiles = _normal_quantile(1 - alpha) * math.sqrt(null) + z_power * math.sqrt(alternative)
    return math.ceil((quantiles / delta) ** 2)


def detectable_difference(
    n: int, *, discordant: float, power: float = 0.8, alpha: float = 0.05
) -> float | None:
    """The smallest difference of two win rates that n paired prompts show, by a two-sided test.

    The inverse of `required_n_for_difference(..., discordant=...)`, z = z_{1-alpha/2} and
    y = z_power: `r = (z sqrt(n) + y sqrt(n + y² - z²)) / (n + y²)`, and the difference is
    `r sqrt(discordant)`. No difference exceeds the share of discordant prompts; where this one
    would, that share is taken to be the difference itself, which gives `r²`.

    None where n <= z²: so few prompts show nothing, even if one of the two wins them all.

    Source: Connor's equation (see there), solved for the difference.

    Raises:
        InputError: on a negative n, a power or level outside (0, 1), or a discordant share
            outside [0, 1].

    >>> round(detectable_difference(234, discordant=0.3), 3)
    0.1
    """
    for name, rate in {"power": power, "alpha": alpha}.items():
        if not 0 < rate < 1:
            raise InputError(f"{name} must lie within (0, 1); got {rate}.")
    if n < 0 or not 0 <= discordant <= 1:
        raise InputError(f"expected n >= 0 and a share; got n={n}, discordant={discordant}.")
    z, y = _normal_quantile(1 - alpha), float(_scipy_stats().norm.ppf(power))
    if n <= z**2:
        return None
    r = (z * math.sqrt(n) + y * math.sqrt(n + y**2 - z**2)) / (n + y**2)
    return r * max(math.sqrt(discordant), r)


class ConfidenceBin(NamedTuple):
    """Pairs of which a model is about equally sure."""

    n: int
    confidence: float
    """Mean probability that it gives to its own verdicts, in [1/2, 1]."""
    accuracy: float
    """Share of them that are right."""


class Calibration(NamedTuple):
    """Whether a model's probabilities are those of what comes."""

    error: float
    """Expected calibration error: mean distance of accuracy from confidence, in [0, 1]."""
    brier: float
    """Mean squared error of the probability of what came: 0 is certain and right, 1/4 a coin."""
    bins: tuple[ConfidenceBin, ...]
    """From the least to the most sure; those that hold no pair are left out."""


def pair_calibration(margins: ArrayLike, *, num_bins: int = 10) -> Calibration:
    """Calibration of Bradley-Terry probabilities on labelled pairs.

    `margins` holds `m = r(preferred) - r(other)` of each pair. The model's verdict is the response
    of higher reward, its confidence `sigmoid(|m|)`; it is right where m > 0, and half right where
    m = 0. With bins b of equal width over [1/2, 1] the expected calibration error is
    `sum_b n_b/n |accuracy_b - confidence_b|`. It is above 0 by chance even for a perfect model, the
    more so the fewer pairs a bin has. The Brier score is `mean (1 - sigmoid(m))²`.

    Source: Naeini et al. 2015 and Guo et al. 2017 (arXiv:1706.04599), Eq. 3; Brier 1950, whose
    score sums over both outcomes and is twice ours.

    Raises:
        InputError: without a pair, on a margin that is not finite, or num_bins below 1.

    >>> found = pair_calibration([np.log(3.0)] * 3 + [-np.log(3.0)])  # sure at 3/4, right in 3/4
    >>> round(found.error, 6), round(found.brier, 6)
    (0.0, 0.1875)
    """
    sample = _finite_vector(margins)
    if not len(sample) or num_bins < 1:
        raise InputError(f"calibration needs pairs and bins; got {len(sample)} and {num_bins}.")
    confidence = 1 / (1 + np.exp(-np.abs(sample)))
    right = (np.sign(sample) + 1) / 2
    number = np.minimum((confidence - 0.5) * 2 * num_bins, num_bins - 1).astype(np.intp)
    bins = [
        ConfidenceBin(int(here.sum()), float(confidence[here].mean()), float(right[here].mean()))
        for here in (number == b for b in range(num_bins))
        if here.any()
    ]
    error = sum(b.n * abs(b.accuracy - b.confidence) for b in bins) / len(sample)
    brier = (np.where(sample >= 0, 1 - confidence, confidence) ** 2).mean()
    return Calibration(float(error), float(brier), tuple(bins))


def _wilson(p: float, n: float, z: float) -> Interval:
    centre = p + z**2 / (2 * n)
    half = z * math.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    scale = 1 + z**2 / n
    # It holds p, and is within 0 and 1; the clamps remove the last rounding error.
    low, high = (centre - half) / scale, (centre + half) / scale
    return Interval(min(p, max(0.0, low)), max(p, min(1.0, high)))


def _clustered_variance(values: Floats, groups: NDArray[np.intp]) -> float:
    """Cluster-robust variance of the mean of `values`, at least two clusters."""
    sums = np.bincount(groups, weights=values - values.mean())
    num_clusters = len(sums)
    return float(num_clusters / (num_clusters - 1) * (sums**2).sum() / len(values) ** 2)


def _values_and_groups(
    values: ArrayLike, clusters: Sequence[Hashable]
) -> tuple[Floats, NDArray[np.intp]]:
    sample = _finite_vector(values)
    if len(sample) != len(clusters):
        raise InputError(f"each value needs its cluster; got {len(sample)} and {len(clusters)}.")
    number: dict[Hashable, int] = {}
    groups = [number.setdefault(cluster, len(number)) for cluster in clusters]
    return sample, np.array(groups, dtype=np.intp)


def _finite_vector(values: ArrayLike) -> Floats:
    sample = np.asarray(values, dtype=np.float64)
    if sample.ndim != 1 or not np.isfinite(sample).all():
        raise InputError("expected a flat list of finite numbers.")
    return sample


def _normal_quantile(confidence: float) -> float:
    _check_confidence(confidence)
    return float(_scipy_stats().norm.ppf((1 + confidence) / 2))


def _student_quantile(confidence: float, degrees: int) -> float:
    _check_confidence(confidence)
    return float(_scipy_stats().t.ppf((1 + confidence) / 2, degrees))


def _check_confidence(confidence: float) -> None:
    if not 0 < confidence < 1:
        raise InputError(f"confidence must lie within (0, 1); got {confidence}.")


def _scipy_stats() -> Any:
    """`scipy.stats`, which ships no types and takes a second to import."""
    from scipy import stats

    return stats
