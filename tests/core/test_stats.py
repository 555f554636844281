"""Intervals and paired tests against hand-derived values, scipy, brute force and simulation."""

import itertools
import math

import numpy as np
import pytest
from scipy import stats as scipy_stats

from dpo.core.stats import (
    Interval,
    clustered_bootstrap_interval,
    clustered_mean_interval,
    clustered_wilson_interval,
    detectable_difference,
    holm,
    mcnemar_exact,
    mean_interval,
    paired_permutation,
    paired_proportion_interval,
    required_n_for_difference,
    wilson_interval,
)
from dpo.errors import InputError


def coverage(intervals, truth):
    return np.mean([interval.low <= truth <= interval.high for interval in intervals])


def test_wilson_interval_of_no_wins_in_n_is_zero_to_z2_over_n_plus_z2():
    z2 = scipy_stats.norm.ppf(0.975) ** 2
    assert wilson_interval(0, 10) == pytest.approx((0.0, z2 / (10 + z2)))
    assert wilson_interval(10, 10) == pytest.approx((10 / (10 + z2), 1.0))


@pytest.mark.parametrize(("wins", "n"), [(0, 1), (1, 3), (50, 100), (653, 1094), (7, 7)])
@pytest.mark.parametrize("confidence", [0.5, 0.95, 0.999])
def test_wilson_interval_equals_scipys(wins, n, confidence):
    expected = scipy_stats.binomtest(wins, n).proportion_ci(confidence, method="wilson")
    actual = wilson_interval(wins, n, confidence=confidence)
    assert actual == pytest.approx((expected.low, expected.high), abs=1e-12)


def test_wilson_interval_of_a_null_win_rate_is_the_published_one():
    low, high = wilson_interval(653, 1094)  # 59.7% [56.8, 62.6]
    assert (round(100 * low, 1), round(100 * high, 1)) == (56.8, 62.6)


def test_wilson_interval_without_observations_knows_nothing():
    assert wilson_interval(0, 0) == (0.0, 1.0)


@pytest.mark.parametrize("p", [0.1, 0.5, 0.93])
def test_wilson_95_percent_interval_covers_95_percent(p):
    wins = np.random.default_rng(0).binomial(200, p, size=2000)
    assert 0.93 <= coverage([wilson_interval(int(w), 200) for w in wins], p) <= 0.97


def clustered_successes(rng, num_prompts, samples_per_prompt):
    """Prompts of which each has its own win probability: mean 0.5, strongly dependent samples."""
    rates = rng.beta(0.5, 0.5, size=num_prompts)
    return rng.binomial(1, rates[:, None], size=(num_prompts, samples_per_prompt)).ravel()


def test_clustered_wilson_covers_where_counting_every_sample_does_not():
    rng = np.random.default_rng(1)
    clusters = np.repeat(np.arange(40), 8).tolist()
    draws = [clustered_successes(rng, 40, 8) for _ in range(600)]
    assert 0.92 <= coverage([clustered_wilson_interval(d, clusters) for d in draws], 0.5) <= 0.98
    assert coverage([wilson_interval(int(d.sum()), len(d)) for d in draws], 0.5) < 0.75


def test_clustered_wilson_with_one_sample_a_prompt_is_wilson():
    successes = [1, 0, 1, 1, 0]
    assert clustered_wilson_interval(successes, list("abcde")) == wilson_interval(3, 5)


def test_clustered_wilson_of_unanimous_clusters_has_the_width_of_the_cluster_count():
    interval = clustered_wilson_interval([1] * 12, [i // 4 for i in range(12)])
    t2 = scipy_stats.t.ppf(0.975, 2) ** 2
    assert interval == pytest.approx((3 / (3 + t2), 1.0))


def test_the_clustered_bootstrap_covers_where_drawing_samples_does_not():
    rng = np.random.default_rng(11)
    clusters = np.repeat(np.arange(40), 8).tolist()
    draws = [clustered_successes(rng, 40, 8) for _ in range(300)]
    by_prompt = [clustered_bootstrap_interval(d, clusters, num_resamples=500) for d in draws]
    by_sample = [clustered_bootstrap_interval(d, range(320), num_resamples=500) for d in draws]
    assert 0.9 <= coverage(by_prompt, 0.5) <= 0.98
    assert coverage(by_sample, 0.5) < 0.75


@pytest.mark.parametrize("p", [0.5, 0.9])
def test_the_bootstrap_of_single_verdicts_covers(p):
    draws = np.random.default_rng(12).binomial(1, p, size=(400, 100))
    intervals = [clustered_bootstrap_interval(d, range(100), num_resamples=500) for d in draws]
    assert 0.91 <= coverage(intervals, p) <= 0.98


def test_the_bootstrap_comes_near_what_theory_gives_for_large_samples():
    wins = np.repeat([1, 0], [1200, 800])
    found = clustered_bootstrap_interval(wins, range(2000))
    assert found == pytest.approx(wilson_interval(1200, 2000), abs=0.002)
    values = np.random.default_rng(13).exponential(size=600)
    clusters = np.repeat(range(200), 3).tolist()
    expected = clustered_mean_interval(values, clusters)
    assert clustered_bootstrap_interval(values, clusters) == pytest.approx(expected, abs=0.02)


def test_the_bootstrap_is_skewed_as_the_sample_is():
    """Of few losses, the lower end is further from the win rate than the upper one."""
    low, high = clustered_bootstrap_interval([1] * 95 + [0] * 5, range(100))
    assert 0.95 - low > 1.2 * (high - 0.95)


def test_the_bootstrap_is_decided_by_its_seed_and_blind_to_the_order_and_copies_of_values():
    values = [1.0, 0.0, 1.0, 1.0, 0.0, 1.0]
    first, again, other = (
        clustered_bootstrap_interval(values, range(6), seed=seed, num_resamples=99)
        for seed in (0, 0, 5)
    )
    assert first == again != other
    copies = clustered_bootstrap_interval(
        np.repeat(values, 3), np.repeat(range(6), 3).tolist(), num_resamples=99
    )
    assert copies == first


@pytest.mark.parametrize("values", [[], [1.0], [1.0, 1.0, 1.0]])
def test_the_bootstrap_of_what_never_varies_is_none(values):
    assert clustered_bootstrap_interval(values, range(len(values))) is None


def test_copies_of_a_sample_add_nothing_to_a_clustered_interval():
    values = np.random.default_rng(2).normal(size=30)
    copies = clustered_mean_interval(np.repeat(values, 5), np.repeat(range(30), 5).tolist())
    assert copies == pytest.approx(mean_interval(values))


def test_clustered_mean_interval_by_hand():
    # Clusters (0, 2), (4, 6): mean 3, sums of deviations -4 and 4, v = 2/1 * 32 / 16 = 4.
    half = scipy_stats.t.ppf(0.975, 1) * 2.0
    interval = clustered_mean_interval([0.0, 2.0, 4.0, 6.0], ["a", "a", "b", "b"])
    assert interval == pytest.approx((3 - half, 3 + half))


def test_mean_interval_equals_scipys_one_sample_t_interval():
    values = np.random.default_rng(3).normal(2.0, 3.0, size=17)
    expected = scipy_stats.ttest_1samp(values, 0.0).confidence_interval(0.9)
    assert mean_interval(values, confidence=0.9) == pytest.approx((expected.low, expected.high))


def test_mean_interval_covers_at_small_n():
    draws = np.random.default_rng(4).normal(1.0, 2.0, size=(2000, 3))
    assert 0.935 <= coverage([mean_interval(d) for d in draws], 1.0) <= 0.965


@pytest.mark.parametrize("values", [[], [1.0]])
def test_one_value_gives_no_interval_for_a_mean(values):
    assert mean_interval(values) == Interval(-math.inf, math.inf)
    assert clustered_mean_interval(values, values) == Interval(-math.inf, math.inf)


def test_equal_values_give_a_mean_interval_of_no_width():
    assert mean_interval([2.0, 2.0, 2.0]) == (2.0, 2.0)


def test_paired_proportion_interval_is_bonett_and_prices():
    both, only_a, only_b = 40, 25, 10  # of n = 75
    differences = [0.0] * both + [1.0] * only_a + [-1.0] * only_b
    p_a, p_b, n = (only_a + 1) / 77, (only_b + 1) / 77, 77
    half = scipy_stats.norm.ppf(0.975) * math.sqrt((p_a + p_b - (p_a - p_b) ** 2) / n)
    expected = (p_a - p_b - half, p_a - p_b + half)
    assert paired_proportion_interval(differences) == pytest.approx(expected)


def test_paired_proportion_interval_covers():
    rng = np.random.default_rng(5)
    draws = rng.choice([1.0, 0.0, -1.0], p=[0.2, 0.7, 0.1], size=(2000, 60))
    assert 0.93 <= coverage([paired_proportion_interval(d) for d in draws], 0.1) <= 0.97


def test_paired_proportion_interval_of_no_disagreement_keeps_a_width():
    low, high = paired_proportion_interval([0.0] * 20)
    assert low == pytest.approx(-high)
    assert 0.05 < high < 0.2


def test_mcnemar_by_hand():
    assert mcnemar_exact(1, 3) == pytest.approx(2 * (1 + 4) / 16)
    assert mcnemar_exact(3, 1) == mcnemar_exact(1, 3)
    assert mcnemar_exact(4, 4) == 1.0
    assert mcnemar_exact(0, 0) == 1.0


def test_permutation_test_enumerates_small_samples():
    differences = np.array([0.3, -0.1, 0.8, 0.45, 0.2, -0.25])
    signs = np.array(list(itertools.product([1, -1], repeat=6)))
    extreme = np.abs(signs @ differences) >= abs(differences.sum()) - 1e-12
    p = paired_permutation(differences, num_permutations=64)
    assert p == pytest.approx(extreme.mean())


def test_permutation_test_of_many_pairs_is_seeded_and_never_zero():
    differences = np.random.default_rng(6).normal(1.0, 0.5, size=200)
    p = paired_permutation(differences, num_permutations=999, seed=3)
    assert p == pytest.approx(2 * 1 / 1000)
    noise = differences - differences.mean() + 0.05
    first, again, other = (
        paired_permutation(noise, num_permutations=999, seed=seed) for seed in (3, 3, 4)
    )
    assert first == again != other


def test_permutation_p_agrees_with_the_t_test_on_normal_differences():
    differences = np.random.default_rng(7).normal(0.12, 1.0, size=300)
    expected = scipy_stats.ttest_1samp(differences, 0.0).pvalue
    assert paired_permutation(differences, num_permutations=20_000) == pytest.approx(
        expected, abs=0.01
    )


def test_permutation_test_of_no_difference_is_one():
    assert paired_permutation([0.0, 0.0, 0.0]) == 1.0
    assert paired_permutation([]) == 1.0


def test_permutation_p_values_are_uniform_under_the_null():
    draws = np.random.default_rng(8).standard_t(3, size=(300, 12))
    rejected = [paired_permutation(d, num_permutations=400) <= 0.1 for d in draws]
    assert 0.06 <= np.mean(rejected) <= 0.14


def test_holm_by_hand_and_in_the_given_order():
    # Sorted 0.005, 0.01, 0.03, 0.04: times 4, 3, 2, 1, then the running maximum.
    assert holm([0.03, 0.005, 0.04, 0.01]) == pytest.approx([0.06, 0.02, 0.06, 0.03])
    assert holm([0.7, 0.9]) == [1.0, 1.0]
    assert holm([]) == []


def test_holm_rejects_exactly_what_the_step_down_procedure_rejects():
    rng = np.random.default_rng(9)
    for _ in range(100):
        p = rng.uniform(0, 0.06, size=6)
        rejected = set()
        for step, index in enumerate(np.argsort(p)):
            if p[index] > 0.05 / (6 - step):
                break
            rejected.add(index)
        assert {i for i, adjusted in enumerate(holm(p)) if adjusted <= 0.05} == rejected


def test_required_n_for_half_against_sixty_percent_is_the_textbooks():
    assert required_n_for_difference(0.5, 0.1) == 388
    assert required_n_for_difference(0.6, -0.1) == 388


def test_required_pairs_reach_the_power_asked_for():
    n = required_n_for_difference(0.5, 0.1, discordant=0.3)
    rng = np.random.default_rng(10)
    only_a, only_b, _ = rng.multinomial(n, [0.2, 0.1, 0.7], size=1000).T
    z = (only_a - only_b) / np.sqrt(only_a + only_b)  # McNemar's asymptotic statistic
    assert 0.76 <= np.mean(np.abs(z) > 1.96) <= 0.84


@pytest.mark.parametrize("discordant", [0.05, 0.3, 1.0])
@pytest.mark.parametrize("delta", [0.02, 0.05])
@pytest.mark.parametrize("options", [{}, {"power": 0.9, "alpha": 0.01}])
def test_the_detectable_difference_inverts_the_required_number(discordant, delta, options):
    n = required_n_for_difference(0.5, delta, discordant=discordant, **options)
    assert detectable_difference(n, discordant=discordant, **options) <= delta * (1 + 1e-9)
    assert detectable_difference(n - 1, discordant=discordant, **options) > delta * (1 - 1e-9)


def test_a_difference_is_never_above_what_is_discordant():
    """Where all discordant prompts go one way, they are as many as the difference needs."""
    difference = detectable_difference(500, discordant=0.001)
    assert difference > 0.001
    assert required_n_for_difference(0.5, difference, discordant=difference) in (500, 501)
    assert detectable_difference(500, discordant=0.0) == difference


def test_so_few_prompts_show_no_difference_at_all():
    assert detectable_difference(0, discordant=0.3) is None
    assert detectable_difference(3, discordant=1.0) is None
    assert detectable_difference(4, discordant=1.0) == pytest.approx(1.0, abs=0.01)
    by_n = [detectable_difference(n, discordant=0.3) for n in range(4, 300)]
    assert by_n == sorted(by_n, reverse=True)


@pytest.mark.parametrize(
    "call",
    [
        lambda: clustered_bootstrap_interval([1.0, 0.0], ["a"]),
        lambda: clustered_bootstrap_interval([1.0, 0.0], ["a", "b"], num_resamples=0),
        lambda: clustered_bootstrap_interval([1.0, 0.0], ["a", "b"], confidence=0.0),
        lambda: detectable_difference(-1, discordant=0.3),
        lambda: detectable_difference(10, discordant=1.3),
        lambda: detectable_difference(10, discordant=0.3, power=1.0),
        lambda: wilson_interval(3, 2),
        lambda: wilson_interval(-1, 2),
        lambda: wilson_interval(1, 2, confidence=1.0),
        lambda: mean_interval([1.0, math.nan]),
        lambda: mean_interval([[1.0], [2.0]]),
        lambda: clustered_mean_interval([1.0, 2.0], ["a"]),
        lambda: clustered_wilson_interval([0.5, 1.0], ["a", "b"]),
        lambda: paired_proportion_interval([2.0]),
        lambda: mcnemar_exact(-1, 2),
        lambda: paired_permutation([1.0], num_permutations=0),
        lambda: holm([1.5]),
        lambda: required_n_for_difference(0.5, 0.0),
        lambda: required_n_for_difference(0.95, 0.1),
        lambda: required_n_for_difference(0.5, 0.1, discordant=0.05),
    ],
)
def test_impossible_input_is_refused(call):
    with pytest.raises(InputError):
        call()


def test_the_wilson_interval_holds_the_observed_share_whatever_the_rounding():
    for n in range(1, 200):
        for wins in range(n + 1):
            low, high = wilson_interval(wins, n)
            assert 0 <= low <= wins / n <= high <= 1
