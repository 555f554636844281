"""The mathematics of the diagnostics: by hand, against scipy, and on data whose truth is known."""

import math
from itertools import combinations

import numpy as np
import pytest
from scipy import optimize, stats

from dpo.core.diagnostics import (
    bootstrap_interval,
    calibrating_temperature,
    difference_spearman,
    displacement,
    distinct_share,
    length_controlled_win_rate,
    logistic_regression,
    repeated_share,
    spearman,
    subset_accuracies,
)
from dpo.core.stats import clustered_mean_interval, clustered_wilson_interval, mean_interval
from dpo.errors import InputError


def sigmoid(z):
    return 1 / (1 + np.exp(-z))


# -- displacement ----------------------------------------------------------------------------------


def test_displacement_by_hand():
    found = displacement([-1.0, -3.0, 2.0, 1e-6], [-2.0, 1.0, -1.0, -1.0], [0, 1, 2, 3])
    assert (found.num_pairs, found.chosen_fell, found.both_fell) == (4, 0.5, 0.25)
    assert found.chosen_mean == pytest.approx((-1 - 3 + 2 + 1e-6) / 4)
    assert found.rejected_interval == mean_interval([-2.0, 1.0, -1.0, -1.0])
    assert found.chosen_fell_interval == clustered_wilson_interval([1, 1, 0, 0], [0, 1, 2, 3])


def test_rounding_is_no_fall():
    changes = [-1e-5, -1e-5, -1.0, -1.0]
    assert displacement(changes, changes, range(4), tolerance=1e-4).chosen_fell == 0.5
    assert displacement(changes, changes, range(4)).chosen_fell == 1.0


# -- rank correlation ------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
def test_spearman_is_that_of_scipy_ties_included(seed):
    rng = np.random.default_rng(seed)
    x = rng.integers(0, 6, 40).astype(float)
    y = x + rng.integers(0, 9, 40)
    assert spearman(x, y) == pytest.approx(stats.spearmanr(x, y).statistic, abs=1e-12)


def test_spearman_of_a_constant_is_not_a_number():
    assert math.isnan(spearman([1.0, 1.0, 1.0], [1.0, 2.0, 3.0]))
    assert math.isnan(spearman([], []))


def test_difference_spearman_does_not_depend_on_which_response_comes_first():
    rng = np.random.default_rng(0)
    dx = rng.normal(size=60)
    dy = dx + rng.normal(size=60)
    flips = rng.choice([-1.0, 1.0], 60)
    assert difference_spearman(dx, dy) == pytest.approx(difference_spearman(flips * dx, flips * dy))


def test_what_all_pairs_share_does_not_hide_a_relation():
    """Longer is better in every pair, by as much as it happens: plain Spearman sees nothing."""
    rng = np.random.default_rng(1)
    length, reward = 10 + rng.random(200), 5 + rng.random(200)
    assert abs(spearman(length, reward)) < 0.2
    assert difference_spearman(length, reward) > 0.7


# -- bootstrap -------------------------------------------------------------------------------------


def test_the_bootstrap_of_a_mean_is_nearly_students_interval():
    values = np.random.default_rng(0).normal(size=300)
    found = bootstrap_interval(lambda places: values[places].mean(), range(300))
    assert found == pytest.approx(mean_interval(values), abs=0.02)


def test_whole_clusters_are_drawn_so_copies_within_a_prompt_prove_nothing():
    values = np.random.default_rng(0).normal(size=100)
    copied, prompts = np.repeat(values, 4), np.repeat(np.arange(100), 4).tolist()
    found = bootstrap_interval(lambda places: copied[places].mean(), prompts)
    assert found == pytest.approx(clustered_mean_interval(copied, prompts), abs=0.03)
    once = bootstrap_interval(lambda places: values[places].mean(), range(100))
    assert found == pytest.approx(once, abs=1e-12)


def test_clusters_of_unequal_size_are_drawn_whole():
    prompts = ["a", "b", "a", "c", "a", "b"]
    seen = []
    bootstrap_interval(lambda places: seen.append(np.bincount(places, minlength=6)) or 0.0, prompts)
    counts = np.array(seen)
    for own in ([0, 2, 4], [1, 5], [3]):
        assert (counts[:, own] == counts[:, own[:1]]).all()
    assert (counts[:, 0] + counts[:, 1] + counts[:, 3] == 3).all()


def test_infinite_values_are_kept_and_undefined_ones_left_out():
    always = bootstrap_interval(lambda places: math.inf, range(5))
    assert always == (math.inf, math.inf)
    draws = iter([math.nan, 1.0] * 500)
    assert bootstrap_interval(lambda places: next(draws), range(5)) == (1.0, 1.0)
    assert bootstrap_interval(lambda places: 0.0, ["one"] * 5) == (-math.inf, math.inf)


# -- length-controlled win rate --------------------------------------------------------------------


def comparisons(rng, n, *, constant, slope, shift):
    """Wins by the model itself: longer by `shift` on average, spread 1."""
    d = shift + rng.normal(size=n)
    p = sigmoid(constant + slope * np.tanh(d / d.std()))
    return (rng.random(n) < p).astype(float), d


def test_where_length_alone_causes_wins_nothing_is_left_of_them():
    wins, d = comparisons(np.random.default_rng(0), 2000, constant=0.0, slope=2.0, shift=1.0)
    found = length_controlled_win_rate(wins, d, range(2000))
    assert found.raw > 0.7
    assert found.interval.low < 0.5 < found.interval.high
    assert found.slope_interval.low > 1


def test_where_length_plays_no_part_the_win_rate_stays():
    wins, d = comparisons(np.random.default_rng(0), 2000, constant=1.0, slope=0.0, shift=1.0)
    found = length_controlled_win_rate(wins, d, range(2000))
    assert found.win_rate == pytest.approx(found.raw, abs=0.03)
    assert found.interval.low > 0.65
    assert found.slope_interval.low < 0 < found.slope_interval.high


def test_a_better_but_shorter_method_wins_more_at_equal_length():
    wins, d = comparisons(np.random.default_rng(0), 2000, constant=1.0, slope=2.0, shift=-1.0)
    found = length_controlled_win_rate(wins, d, range(2000))
    assert found.raw < 0.5 < found.interval.low
    assert found.longer == pytest.approx(stats.norm.cdf(-1), abs=0.03)


def test_its_interval_covers_the_truth_at_its_rate():
    truth = float(sigmoid(0.4))
    rng = np.random.default_rng(0)
    hits = 0
    for _ in range(400):
        wins, d = comparisons(rng, 150, constant=0.4, slope=1.0, shift=0.5)
        low, high = length_controlled_win_rate(wins, d, range(150)).interval
        hits += low <= truth <= high
    assert 0.92 <= hits / 400 <= 0.985


def test_samples_of_one_prompt_are_not_independent():
    """Four equal samples of each prompt leave the interval of one as it is."""
    wins, d = comparisons(np.random.default_rng(0), 200, constant=0.4, slope=1.0, shift=0.5)
    once = length_controlled_win_rate(wins, d, range(200))
    prompts = np.repeat(np.arange(200), 4).tolist()
    four = length_controlled_win_rate(np.repeat(wins, 4), np.repeat(d, 4), prompts)
    assert four.win_rate == pytest.approx(once.win_rate, abs=1e-3)
    assert four.interval == pytest.approx(once.interval, abs=0.01)


def test_where_everything_is_won_the_fit_is_finite_and_unsure():
    d = np.random.default_rng(0).normal(size=40)
    found = length_controlled_win_rate(np.ones(40), d, range(40))
    assert found.raw == 1
    assert 0.9 < found.win_rate < 1
    assert found.interval.low < 0.9


def test_swapping_the_sides_mirrors_everything():
    wins, d = comparisons(np.random.default_rng(2), 300, constant=0.7, slope=-1.0, shift=0.2)
    wins[:20] = 0.5
    found = length_controlled_win_rate(wins, d, range(300))
    mirrored = length_controlled_win_rate(1 - wins, -d, range(300))
    assert mirrored.win_rate == pytest.approx(1 - found.win_rate)
    assert mirrored.interval == pytest.approx([1 - found.interval.high, 1 - found.interval.low])
    assert mirrored.slope == pytest.approx(found.slope)
    assert found.raw == pytest.approx(wins.mean())


def test_the_unit_of_length_does_not_matter():
    wins, d = comparisons(np.random.default_rng(3), 100, constant=0.3, slope=1.0, shift=0.0)
    in_tokens = length_controlled_win_rate(wins, d, range(100))
    in_characters = length_controlled_win_rate(wins, 4.7 * d, range(100))
    assert in_characters.win_rate == pytest.approx(in_tokens.win_rate, abs=1e-9)


@pytest.mark.parametrize(
    ("wins", "lengths"), [([1, 0], [3, 3]), ([], []), ([1, 2], [1, 2]), ([1, 0, 1], [1, 2])]
)
def test_what_cannot_be_controlled_is_an_error(wins, lengths):
    with pytest.raises(InputError):
        length_controlled_win_rate(wins, lengths, range(len(wins)))


def test_newton_finds_the_maximum_that_a_general_minimiser_finds():
    rng = np.random.default_rng(0)
    x = np.column_stack([np.ones(80), rng.normal(size=(80, 2))])
    y = (rng.random(80) < sigmoid(x @ [0.5, -1.0, 2.0])).astype(float)

    def cost(w):
        return np.logaddexp(0, x @ w).sum() - y @ (x @ w) + 0.5 * 0.3 * (w**2).sum()

    expected = optimize.minimize(cost, np.zeros(3), method="Nelder-Mead", options={"xatol": 1e-9})
    found = logistic_regression(x, y, ridge=0.3)
    assert found == pytest.approx(expected.x, abs=1e-4)
    assert cost(found) <= expected.fun + 1e-9


# -- generations -----------------------------------------------------------------------------------


def test_distinct_and_repeated_by_hand():
    assert distinct_share(["aaaa"], 1) == 0.25
    assert distinct_share(["ab", "ab"], 2) == 0.5
    assert distinct_share(["a"], 2) == 1.0
    assert repeated_share("aaaaa") == 0.5  # aaaa twice
    assert repeated_share("abcdefgh") == 0.0
    assert repeated_share("abc") == 0.0
    assert repeated_share("abcabcabc", n=3) == pytest.approx(1 - 3 / 7)


# -- subsets ---------------------------------------------------------------------------------------


def exact_p(hits, size, num_right):
    """P(|accuracy of a random subset - whole| is at least as large), by enumeration."""
    whole = np.mean(hits)
    observed = abs(num_right / size - whole)
    all_subsets = list(combinations(hits, size))
    far = [s for s in all_subsets if abs(np.mean(s) - whole) >= observed - 1e-12]
    return len(far) / len(all_subsets)


def test_the_permutation_test_is_the_exact_one_up_to_chance():
    hits = [1, 1, 1, 1, 0, 1, 0, 0, 0, 1, 0]
    names = ["a"] * 4 + ["b"] * 7
    a, b = subset_accuracies(hits, names, range(11), num_permutations=20_000)
    assert a.p == pytest.approx(exact_p(hits, 4, 4), abs=0.01)
    assert b.p == pytest.approx(a.p, abs=1e-12)  # the whole less a: the same question
    assert (a.accuracy, b.accuracy, a.n, b.n) == (1.0, pytest.approx(2 / 7), 4, 7)
    assert a.difference == pytest.approx(1 - 6 / 11)
    assert a.p_holm == pytest.approx(2 * a.p)


def test_a_planted_subset_is_found_and_names_alone_are_not():
    rng = np.random.default_rng(0)
    names = [f"s{i % 4}" for i in range(400)]
    rate = np.where(np.array(names) == "s2", 0.5, 0.8)
    planted = subset_accuracies((rng.random(400) < rate).astype(float), names, range(400))
    worst = min(planted, key=lambda s: s.p)
    assert (worst.subset, worst.p_holm < 0.01, worst.difference < -0.1) == ("s2", True, True)
    false_alarms = 0
    for seed in range(100):
        hits = (np.random.default_rng(seed).random(80) < 0.7).astype(float)
        found = subset_accuracies(hits, names[:80], range(80), num_permutations=400, seed=seed)
        false_alarms += any(s.p_holm < 0.05 for s in found)
    assert false_alarms <= 11  # 5 are expected of a test at its level; P(more than 11) = 0.4%


def test_pairs_of_one_prompt_move_together():
    """One prompt of 30 wrong pairs among 10 right ones is one surprise, not thirty."""
    hits = [0.0] * 30 + [1.0] * 10
    names = ["odd"] * 30 + ["other"] * 10
    together = subset_accuracies(hits, names, [0] * 30 + list(range(1, 11)))
    apart = subset_accuracies(hits, names, range(40))
    assert apart[0].p < 0.001
    assert together[0].p > 0.05


def test_subsets_need_their_pairs():
    with pytest.raises(InputError):
        subset_accuracies([1.0, 0.0], ["a"], [0, 1])


# -- calibration -----------------------------------------------------------------------------------


def margins_of(rng, n, scale):
    """Margins of rewards that are `scale` times as large as the labels' own log-odds."""
    odds = 2 * rng.normal(size=n)
    return scale * np.where(rng.random(n) < sigmoid(odds), odds, -odds)


@pytest.mark.parametrize("scale", [0.25, 1.0, 5.0])
def test_the_temperature_finds_by_how_much_rewards_are_too_large(scale):
    found = calibrating_temperature(margins_of(np.random.default_rng(0), 20_000, scale))
    assert found == pytest.approx(scale, rel=0.05)


def test_the_temperature_scales_with_the_margins_and_minimises_the_loss():
    margins = margins_of(np.random.default_rng(1), 200, 3.0)
    found = calibrating_temperature(margins)
    assert calibrating_temperature(1000 * margins) == pytest.approx(1000 * found, rel=1e-9)

    def loss(log_t):
        return np.logaddexp(0, -margins / np.exp(log_t)).mean()

    best = optimize.minimize_scalar(loss, bounds=(-5, 5), method="bounded")
    assert math.log(found) == pytest.approx(best.x, abs=1e-4)


def test_without_errors_it_is_0_and_without_a_relation_infinite():
    assert calibrating_temperature([1.0, 2.0, 0.0]) == 0
    assert calibrating_temperature([1.0, -1.0]) == math.inf
    assert calibrating_temperature([-2.0, 1.0]) == math.inf
    assert calibrating_temperature([0.0, 0.0]) == math.inf


@pytest.mark.parametrize("margins", [[], [math.nan, 1.0], [math.inf]])
def test_no_margins_have_no_temperature(margins):
    with pytest.raises(InputError):
        calibrating_temperature(margins)
