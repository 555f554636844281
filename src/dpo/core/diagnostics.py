"""What a preference run did beside lowering its loss: displacement, length, repetition, subsets,
calibration.

Plain numbers in and out. Log-probabilities are in nats, summed over a response's tokens. Where
several observations share a prompt, `clusters` names the prompt of each, and intervals and tests
take the prompt as the unit of independence.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from dpo.core.stats import Interval, clustered_mean_interval, clustered_wilson_interval, holm
from dpo.errors import InputError

Floats = NDArray[np.float64]
Places = NDArray[np.intp]


# -- likelihood displacement ---------------------------------------------------------------------


class Displacement(NamedTuple):
    """How the log-probabilities of P pairs changed, in nats a response."""

    num_pairs: int
    chosen_mean: float
    chosen_interval: Interval
    rejected_mean: float
    rejected_interval: Interval
    chosen_fell: float
    """Share of the pairs whose chosen response became less likely."""
    chosen_fell_interval: Interval
    both_fell: float
    """Share in which both did: what they lost went to responses that are in no pair."""


def displacement(
    chosen_change: ArrayLike,
    rejected_change: ArrayLike,
    clusters: Sequence[Hashable],
    *,
    tolerance: float = 0.0,
) -> Displacement:
    """Changes `log pi(y|x) - log pi_0(y|x)` of chosen and rejected responses, (P,), summarised.

    pi_0 is the policy before training. A loss of the margin alone can fall while both responses
    become less likely. To first order and for one pair, the chosen response's log-probability
    moves at rate `beta sigmoid(-u) <s_w, s_w - s_l>`, s the gradients of the two log-probabilities:
    downwards where the two are alike and the rejected one's gradient is the longer.

    Args:
        tolerance: a change of at most that many nats, rounding, is no fall.

    Source: Razin et al. 2024 (arXiv:2410.08847); Pal et al. 2024 (arXiv:2402.13228).

    Raises:
        InputError: on unequal lengths or a change that is not finite.
    """
    chosen = np.asarray(chosen_change, np.float64)
    rejected = np.asarray(rejected_change, np.float64)
    chosen_fell, rejected_fell = chosen < -tolerance, rejected < -tolerance
    return Displacement(
        num_pairs=len(chosen),
        chosen_mean=float(chosen.mean()),
        chosen_interval=clustered_mean_interval(chosen, clusters),
        rejected_mean=float(rejected.mean()),
        rejected_interval=clustered_mean_interval(rejected, clusters),
        chosen_fell=float(chosen_fell.mean()),
        chosen_fell_interval=clustered_wilson_interval(chosen_fell, clusters),
        both_fell=float((chosen_fell & rejected_fell).mean()),
    )


# -- rank correlation ----------------------------------------------------------------------------


def spearman(x: ArrayLike, y: ArrayLike) -> float:
    """Spearman's rank correlation, in [-1, 1]: Pearson's of the ranks, ties at their mean rank.

    NaN where either side is constant, or with fewer than two values. Source: Spearman 1904.

    >>> spearman([1, 2, 3, 4], [1, 4, 9, 16])
    1.0
    """
    a, b = _centred_ranks(x), _centred_ranks(y)
    scale = math.sqrt((a @ a) * (b @ b))
    return float(a @ b / scale) if scale > 0 else math.nan


def _centred_ranks(values: ArrayLike) -> Floats:
    """Ranks, equal values at their mean rank, less the mean of all ranks."""
    _, place, counts = np.unique(
        np.asarray(values, np.float64), return_inverse=True, return_counts=True
    )
    ranks = np.cumsum(counts) - (counts - 1) / 2
    found: Floats = ranks[place] - (len(place) + 1) / 2
    return found


def difference_spearman(x: ArrayLike, y: ArrayLike) -> float:
    """Spearman's correlation of differences within pairs, (P,), whichever response comes first.

    Which of a pair's responses is subtracted from which is a convention, and a reward is defined
    only up to a function of the prompt. So each pair counts both ways round, as (dx, dy) and as
    (-dx, -dy): the ranks are about 0, and what all pairs have in common does not hide a relation.

    >>> difference_spearman([3, 5, 4], [30, 50, 40])
    1.0
    """
    dx, dy = np.asarray(x, np.float64), np.asarray(y, np.float64)
    return spearman(np.concatenate([dx, -dx]), np.concatenate([dy, -dy]))


def bootstrap_interval(
    statistic: Callable[[Places], float],
    clusters: Sequence[Hashable],
    *,
    num_resamples: int = 1000,
    seed: int = 0,
    confidence: float = 0.95,
) -> Interval:
    """Percentile interval of a statistic when whole clusters are drawn again with replacement.

    The ends are resampled values themselves, so a statistic may be infinite; resamples in which it
    is not defined (NaN) are left out. Below two clusters nothing is known: (-inf, inf).

    Args:
        statistic: of the observations at the places given, which may repeat.

    Source: Efron 1979; Davison and Hinkley 1997, section 3.8 (resampling of clusters).
    """
    groups = _numbered(clusters)
    sizes = np.bincount(groups)
    if len(sizes) < 2:
        return Interval(-math.inf, math.inf)
    members = np.argsort(groups, kind="stable")  # cluster after cluster
    starts = np.cumsum(sizes) - sizes
    draws = np.random.default_rng(seed).integers(len(sizes), size=(num_resamples, len(sizes)))
    found = np.array(
        [statistic(members[_ranges(starts[draw], sizes[draw])]) for draw in draws], np.float64
    )
    found = found[~np.isnan(found)]
    if not len(found):
        return Interval(-math.inf, math.inf)
    tail = (1 - confidence) / 2
    low = np.quantile(found, tail, method="lower")
    return Interval(float(low), float(np.quantile(found, 1 - tail, method="higher")))


def _numbered(clusters: Sequence[Hashable]) -> Places:
    """The clusters' numbers, from 0, in order of appearance."""
    number: dict[Hashable, int] = {}
    return np.array([number.setdefault(c, len(number)) for c in clusters], dtype=np.intp)


def _ranges(starts: Places, sizes: Places) -> Places:
    """`start, start + 1, ..., start + size - 1` of each range, one after the other."""
    within = np.arange(sizes.sum()) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    found: Places = np.repeat(starts, sizes) + within
    return found


# -- length --------------------------------------------------------------------------------------


class LengthControlled(NamedTuple):
    """A win rate as it is, and as it would be between responses of equal length."""

    n: int
    raw: float
    """Mean outcome, a tie counting half."""
    win_rate: float
    """At equal length: `sigmoid(constant)`."""
    interval: Interval
    constant: float
    """Log-odds of a win at equal length."""
    slope: float
    """What a length difference far above its spread adds to the log-odds."""
    slope_interval: Interval
    longer: float
    """Share of the comparisons in which the method's response is the longer. Near 0 or 1, equal
    length is hardly in the data, and the win rate at it an extrapolation."""


RIDGE = 0.01
"""Penalty `RIDGE/2 (constant² + slope²)`: keeps the fit finite where every comparison is won, and
moves a log-odds by less than a hundredth of a standard error otherwise."""


def length_controlled_win_rate(
    outcomes: ArrayLike,
    length_differences: ArrayLike,
    clusters: Sequence[Hashable],
    *,
    confidence: float = 0.95,
) -> LengthControlled:
    """The win rate of a method over a baseline with the effect of length taken out.

    `logit P(win_i) = constant + slope tanh(d_i / s)`, d the length of the method's response minus
    the baseline's to the same prompt, s the standard deviation of d. The length-controlled win rate
    is the prediction at d = 0. One fit a method is the regression on a constant, the method and
    the length difference, in which every method has its own coefficient of length.

    Maximum likelihood with a weak ridge (`RIDGE`), by Newton's method. The standard errors are the
    larger of the model's and of the cluster-robust ones; intervals are `± t_{G-1} se` on the
    log-odds, G the number of clusters.

    What it assumes: the log-odds depend on length through this curve alone, and what else differs
    between the responses does not go with their length. Where a better answer *needs* to be longer,
    a part of its being better is taken out as well.

    Source: Dubois et al. 2024, Length-controlled AlpacaEval (arXiv:2404.04475), Eq. 2. Deviation:
    without its term for the difficulty of each instruction, which is estimated over a leaderboard
    of models; leaving it out makes the constant the log-odds of an average prompt.

    Args:
        outcomes: 1 won, 0 lost, 1/2 tied, (N,).
        length_differences: in any unit, (N,).

    Raises:
        InputError: on unequal lengths, outcomes outside [0, 1], or where all differences are equal:
            then length cannot be told from the method.
    """
    y, d = np.asarray(outcomes, np.float64), np.asarray(length_differences, np.float64)
    if not len(y) == len(d) == len(clusters) or ((y < 0) | (y > 1)).any():
        raise InputError("each comparison needs an outcome within [0, 1], a length and a cluster.")
    if not len(d) or d.std() == 0:
        raise InputError("the length differences are all equal: length cannot be controlled for.")
    design = np.stack([np.ones_like(d), np.tanh(d / d.std())], axis=1)
    weights = logistic_regression(design, y, ridge=RIDGE)
    errors = _standard_errors(design, y, weights, clusters)
    half = _student(confidence, len(set(clusters)) - 1) * errors
    constant, slope = (float(w) for w in weights)
    return LengthControlled(
        n=len(y),
        raw=float(y.mean()),
        win_rate=float(_sigmoid(constant)),
        interval=Interval(float(_sigmoid(constant - half[0])), float(_sigmoid(constant + half[0]))),
        constant=constant,
        slope=slope,
        slope_interval=Interval(slope - float(half[1]), slope + float(half[1])),
        longer=float((d > 0).mean()),
    )


def logistic_regression(design: ArrayLike, outcomes: ArrayLike, *, ridge: float) -> Floats:
    """Weights w, (K,), that maximise `sum_i [y_i log p_i + (1 - y_i) log(1 - p_i)] - ridge |w|²/2`,
    `p = sigmoid(X w)`, by Newton's method with the step halved until the objective grows.

    Args:
        design: X, (N, K), with a column of ones for a constant.
        outcomes: y, (N,), within [0, 1].
        ridge: above 0, so that there is a maximum where the outcomes are separable too.

    >>> w = logistic_regression([[1.0]] * 4, [1, 1, 1, 0], ridge=1e-12)
    >>> round(float(w[0]), 6) == round(math.log(3), 6)
    True
    """
    if not ridge > 0:
        raise InputError(f"ridge must be above 0; got {ridge}.")
    x, y = np.asarray(design, np.float64), np.asarray(outcomes, np.float64)
    weights = np.zeros(x.shape[1])
    value = _log_likelihood(x, y, weights, ridge)
    for _ in range(100):
        p = _sigmoid(x @ weights)
        step = np.linalg.solve(_information(x, p, ridge), x.T @ (y - p) - ridge * weights)
        if np.abs(step).max() < 1e-9:
            return weights
        while (new := _log_likelihood(x, y, weights + step, ridge)) < value - 1e-12 * abs(value):
            step = step / 2
        weights, value = weights + step, new
    raise AssertionError("Newton's method did not settle on a strictly concave function")


def _log_likelihood(x: Floats, y: Floats, weights: Floats, ridge: float) -> float:
    z = x @ weights  # y log p + (1 - y) log(1 - p) = y z - log(1 + e^z)
    return float((y * z - np.logaddexp(0, z)).sum() - ridge * (weights**2).sum() / 2)


def _information(x: Floats, p: Floats, ridge: float) -> Floats:
    """Minus the second derivative of the penalised log-likelihood, (K, K)."""
    found: Floats = (x * (p * (1 - p))[:, None]).T @ x + ridge * np.eye(x.shape[1])
    return found


def _standard_errors(x: Floats, y: Floats, weights: Floats, clusters: Sequence[Hashable]) -> Floats:
    """Of each weight: the larger of the model's and the cluster-robust one (Liang and Zeger 1986),
    which is far too small where nearly every outcome is the same.
    """
    p = _sigmoid(x @ weights)
    covariance = np.linalg.inv(_information(x, p, RIDGE))
    groups = _numbered(clusters)
    num_clusters = int(groups.max()) + 1
    scores = np.zeros((num_clusters, x.shape[1]))
    np.add.at(scores, groups, x * (y - p)[:, None])
    small_sample = num_clusters / max(1, num_clusters - 1)
    robust = covariance @ (small_sample * scores.T @ scores) @ covariance
    errors: Floats = np.sqrt(np.maximum(covariance.diagonal(), robust.diagonal()))
    return errors


def _sigmoid(z: Floats | float) -> Floats:
    """`1 / (1 + e^-z)` without overflow."""
    found: Floats = np.exp(-np.logaddexp(0, -np.asarray(z, np.float64)))
    return found


def _student(confidence: float, degrees: int) -> float:
    """Student's two-sided quantile; infinite where nothing is left to estimate a spread with."""
    from scipy.stats import t

    return float(t.ppf((1 + confidence) / 2, degrees)) if degrees > 0 else math.inf


# -- generations ---------------------------------------------------------------------------------


def distinct_share(responses: Sequence[Sequence[Hashable]], n: int) -> float:
    """Distinct n-grams of all responses over their number, in (0, 1]; 1 where there is none.

    It falls with the amount of text, so compare it only between like numbers of like responses.
    Source: Li et al. 2016 (arXiv:1510.03055), distinct-n.

    >>> distinct_share([["a", "b", "a"], ["a", "b"]], 2)  # ab, ba, ab: two of three
    0.6666666666666666
    """
    grams = [gram for response in responses for gram in _ngrams(response, n)]
    return len(set(grams)) / len(grams) if grams else 1.0


def repeated_share(response: Sequence[Hashable], n: int = 4) -> float:
    """Share of a response's n-grams that occurred in it before, in [0, 1); 0 below n tokens.

    `1 - distinct n-grams / n-grams`. Source: Welleck et al. 2020 (arXiv:1908.04319), seq-rep-n.

    >>> repeated_share("abcdabcd")  # of five 4-grams the last repeats the first
    0.19999999999999996
    """
    grams = _ngrams(response, n)
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def _ngrams(response: Sequence[Hashable], n: int) -> list[tuple[Hashable, ...]]:
    return [tuple(response[i : i + n]) for i in range(len(response) - n + 1)]


# -- subsets -------------------------------------------------------------------------------------


class SubsetAccuracy(NamedTuple):
    """How often a part of the pairs is ordered rightly, and whether that part is another matter."""

    subset: str
    n: int
    accuracy: float
    interval: Interval
    difference: float
    """From the accuracy on all pairs."""
    p: float
    p_holm: float
    """After Holm's correction for the number of subsets."""


def subset_accuracies(
    right: ArrayLike,
    subsets: Sequence[str],
    clusters: Sequence[Hashable],
    *,
    num_permutations: int = 5000,
    seed: int = 0,
) -> list[SubsetAccuracy]:
    """Accuracy of each subset with Wilson's interval, and its difference from the whole.

    The test permutes the subsets' names over the prompts (over a prompt's pairs of one subset as
    one piece): if the name says nothing, every arrangement is as likely. Two-sided, p = (hits + 1)
    / (num_permutations + 1). A subset of the whole is compared with the whole: that differs from it
    exactly if it differs from the rest.

    Args:
        right: 1 where the pair is ordered rightly, else 0, (P,).
        subsets: the subset of each pair.

    Source: Fisher 1935; Phipson and Smyth 2010 (the + 1).

    Raises:
        InputError: on unequal lengths or values other than 0 and 1.
    """
    hits = np.asarray(right, np.float64)
    if not len(hits) == len(subsets) == len(clusters):
        raise InputError("each pair needs a verdict, a subset and a cluster.")
    names = sorted(set(subsets))
    p_values = _permutation_p_values(hits, subsets, clusters, num_permutations, seed)
    found = []
    for name, p, adjusted in zip(names, p_values, holm(p_values), strict=True):
        own = [i for i, subset in enumerate(subsets) if subset == name]
        interval = clustered_wilson_interval(hits[own], [clusters[i] for i in own])
        accuracy = float(hits[own].mean())
        difference = accuracy - float(hits.mean())
        found.append(SubsetAccuracy(name, len(own), accuracy, interval, difference, p, adjusted))
    return found


def _permutation_p_values(
    hits: Floats,
    subsets: Sequence[str],
    clusters: Sequence[Hashable],
    num_permutations: int,
    seed: int,
) -> list[float]:
    """For each subset, in the order of their names, that its accuracy differs from the whole."""
    keys = list(zip(clusters, subsets, strict=True))
    piece = _numbered(keys)
    sums, sizes = np.bincount(piece, weights=hits), np.bincount(piece).astype(np.float64)
    names = np.array([subset for _, subset in dict.fromkeys(keys)])
    membership = (names[:, None] == np.unique(names)).astype(np.float64)  # (pieces, subsets)
    whole = hits.mean()
    observed = np.abs(sums @ membership / (sizes @ membership) - whole)
    rng = np.random.default_rng(seed)
    at_least = np.zeros(membership.shape[1])
    for block in np.array_split(np.arange(num_permutations), max(1, num_permutations // 500)):
        order = rng.permuted(np.tile(np.arange(len(names)), (len(block), 1)), axis=1)
        shuffled = (sums[order] @ membership) / (sizes[order] @ membership)
        at_least += (np.abs(shuffled - whole) >= observed - 1e-12).sum(axis=0)
    return [float(p) for p in (at_least + 1) / (num_permutations + 1)]


# -- calibration ---------------------------------------------------------------------------------


def calibrating_temperature(margins: ArrayLike) -> float:
    """The T for which `sigmoid(margin / T)` is the likeliest account of the labels.

    `argmin_T sum log(1 + exp(-m / T))` over pairs with margins `m = r(preferred) - r(other)`. Above
    1 the rewards are too sure of themselves, below 1 not sure enough. It is convex in 1/T, where
    the root of the derivative `sum m sigmoid(-m/T)` is found. No error to learn from: T = 0; no
    relation to the labels, or the opposite of one (mean margin at most 0): T = infinity.

    Source: Platt 1999, without an offset, which the symmetry of a pair forbids; Guo et al. 2017
    (arXiv:1706.04599), temperature scaling.

    Raises:
        InputError: without a pair, or on a margin that is not finite.

    >>> m = math.log(3.0)  # sure at 3/4, right in 3 of 4
    >>> round(calibrating_temperature([m, m, m, -m]), 9)
    1.0
    """
    from scipy.optimize import brentq

    sample = np.asarray(margins, np.float64)
    if not len(sample) or not np.isfinite(sample).all():
        raise InputError("calibration needs pairs with finite margins.")
    if sample.mean() <= 0:
        return math.inf
    if sample.min() >= 0:
        return 0.0

    def slope(log_inverse: float) -> float:
        return float((sample * _sigmoid(-sample * math.exp(log_inverse))).sum())

    scale = -math.log(float(np.abs(sample).max()))  # 1/T at which the largest margin is 1
    low, high = scale, scale
    while slope(low) <= 0:
        low -= 2.0
    while slope(high) > 0:
        high += 2.0
    return math.exp(-brentq(slope, low, high, xtol=1e-12))
