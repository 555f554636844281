"""Paired tests on the same prompts, their families, and what they can see."""

import itertools

import numpy as np
import pytest
from verdicts import A, B, embed, generation, scored

from dpo.core.stats import (
    detectable_difference,
    holm,
    mcnemar_exact,
    paired_permutation,
    paired_proportion_interval,
    required_n_for_difference,
)
from dpo.evaluate.paired import paired_tests, power_lines, power_of
from dpo.evaluate.winrate import score_generations


def test_paired_test_by_hand():
    (test,) = paired_tests(scored("a", A) + scored("b", B))
    assert (test.model_a, test.model_b, test.num_prompts) == ("a", "b", 8)
    assert (test.num_decided, test.num_unshared) == (6, 0)  # each has a tie, on different prompts
    assert (test.wins_only_a, test.wins_only_b) == (4, 1)
    assert test.disagreement == pytest.approx(5 / 6)
    assert test.mcnemar_p == mcnemar_exact(4, 1) == test.mcnemar_p_holm
    differences = [0.0, 1.0, 1.0, -1.0, 1.0, 1.0]
    assert test.difference == pytest.approx(0.5)
    assert (test.low, test.high) == paired_proportion_interval(differences)
    margins = [0.0, 2.0, 2.0, -2.0, 2.0, -1.0, 1.0, 2.0]
    assert test.margin_difference == pytest.approx(0.75)
    assert test.permutation_p == pytest.approx(paired_permutation(margins))


def test_swapping_the_models_mirrors_the_test():
    (ab,) = paired_tests(scored("a", A) + scored("b", B))
    (ba,) = paired_tests(scored("b", B) + scored("a", A))
    assert (ba.difference, ba.low, ba.high) == pytest.approx((-ab.difference, -ab.high, -ab.low))
    assert (ba.mcnemar_p, ba.permutation_p) == pytest.approx((ab.mcnemar_p, ab.permutation_p))


def test_a_model_never_differs_from_itself():
    (test,) = paired_tests(scored("a", A) + scored("copy", A))
    assert (test.difference, test.mcnemar_p, test.permutation_p) == (0.0, 1.0, 1.0)
    assert test.low < 0 < test.high


def test_models_are_compared_at_equal_temperatures_only_and_holm_covers_them_all():
    records = [
        record
        for model, verdicts in {"a": A, "b": B, "c": ["loss"] * 8}.items()
        for temperature in (0.0, 1.0)
        for record in scored(model, verdicts, temperature=temperature)
    ]
    tests = paired_tests(records)
    assert [test.family_size for test in tests] == [6] * 6  # three pairs at two temperatures
    assert all(test.family == "models" for test in tests)
    for name in ("mcnemar_p", "permutation_p"):
        adjusted = [getattr(test, f"{name}_holm") for test in tests]
        assert adjusted == holm([getattr(test, name) for test in tests])
    smallest = min(tests, key=lambda test: test.mcnemar_p)
    assert smallest.mcnemar_p_holm == pytest.approx(min(1.0, 6 * smallest.mcnemar_p))


def test_each_model_is_tested_against_the_best_null_response():
    weak, strong = (
        scored(name, verdicts, kind="null", temperature=None)
        for name, verdicts in (("weak", ["loss"] * 8), ("strong", ["win"] * 6 + ["loss"] * 2))
    )
    tests = paired_tests(scored("a", A) + weak + strong)
    assert [(t.family, t.model_a, t.model_b, t.temperature) for t in tests] == [
        ("null", "a", "strong", 0.7)
    ]


def test_tests_between_models_and_against_the_null_are_families_of_their_own():
    null = scored("null", ["loss"] * 6 + ["win"] * 2, kind="null", temperature=None)
    models = [
        record
        for model, verdicts in {"a": A, "b": B}.items()
        for temperature in (0.0, 0.5, 1.0)
        for record in scored(model, verdicts, temperature=temperature)
    ]
    sizes = {test.family: test.family_size for test in paired_tests(models + null)}
    assert sizes == {"models": 3, "null": 6}


def test_equal_models_at_eight_temperatures_are_seldom_called_different():
    """All verdicts are coins. Uncorrected, a quarter of the evaluations find a difference."""
    rng = np.random.default_rng(0)
    found, uncorrected = 0, 0
    for _ in range(80):
        records = []
        for model, temperature in itertools.product("ab", range(8)):
            coins = rng.choice(["win", "loss"], size=40).tolist()
            records += scored(model, coins, temperature=float(temperature))
        tests = paired_tests(records, num_permutations=1)
        found += any(test.mcnemar_p_holm <= 0.05 for test in tests)
        uncorrected += any(test.mcnemar_p <= 0.05 for test in tests)
    assert found <= 0.1 * 80
    assert uncorrected >= 0.15 * 80


def test_several_samples_are_one_prompt_in_a_paired_test():
    samples = {"a": ["win", "win", "loss"], "b": ["loss", "loss", "tie"]}
    records = [
        generation(model, i, verdict, sample=k)
        for model, verdicts in samples.items()
        for i in range(6)
        for k, verdict in enumerate(verdicts)
    ]
    (test,) = paired_tests(score_generations(records, embed))
    assert (test.num_prompts, test.wins_only_a, test.wins_only_b) == (6, 6, 0)
    assert test.difference == pytest.approx(2 / 3)
    assert test.mcnemar_p == pytest.approx(2 / 2**6)


def test_copies_of_a_response_add_nothing_to_a_paired_test():
    def copied(model, verdicts):
        return [
            generation(model, i, verdict, sample=k)
            for i, verdict in enumerate(verdicts)
            for k in range(5)
        ]

    (once,) = paired_tests(scored("a", A) + scored("b", B))
    (several,) = paired_tests(score_generations(copied("a", A) + copied("b", B), embed))
    assert several == once


def test_prompts_that_only_one_model_answered_are_counted():
    (test,) = paired_tests(scored("a", A) + scored("b", B[:5]))
    assert (test.num_prompts, test.num_unshared) == (5, 3)
    elsewhere = score_generations([generation("b", 99, "win")], embed)
    (test,) = paired_tests(scored("a", A) + elsewhere)
    assert (test.num_prompts, test.difference, test.mcnemar_p) == (0, None, 1.0)


# -- power ----------------------------------------------------------------------------------------


def split(num_prompts, only_a, only_b):
    """Verdicts of two models that disagree on `only_a + only_b` prompts."""
    both = num_prompts - only_a - only_b
    a = ["win"] * (only_a + both) + ["loss"] * only_b
    b = ["loss"] * only_a + ["win"] * (both + only_b)
    return scored("a", a) + scored("b", b)


def test_the_power_of_a_family_comes_from_its_observed_disagreement():
    tests = paired_tests(split(200, 36, 24))
    (power,) = power_of(tests)
    assert (power.family, power.num_tests, power.num_prompts) == ("models", 1, 200)
    assert power.disagreement == 0.3
    assert power.prompts_needed == required_n_for_difference(0.5, 0.05, discordant=0.3) == 940
    assert power.smallest_difference == detectable_difference(200, discordant=0.3)
    assert power.prompts_needed_corrected == power.prompts_needed  # one test, no correction


def test_power_is_that_of_the_pair_that_disagrees_most_at_the_level_of_the_whole_family():
    agreeing = [record for record in split(200, 0, 2) if record.model == "b"]
    third = [generation("c", record.prompt_index, record.verdict) for record in agreeing]
    tests = paired_tests(split(200, 36, 24) + score_generations(third, embed))
    (power,) = power_of(tests)
    assert power.num_tests == 3
    assert power.disagreement == max(test.disagreement for test in tests)
    expected = required_n_for_difference(0.5, 0.05, alpha=0.05 / 3, discordant=power.disagreement)
    assert power.prompts_needed_corrected == expected > power.prompts_needed
    assert power.smallest_difference_corrected > power.smallest_difference


def test_models_that_hardly_disagree_could_still_differ_by_five_points():
    (power,) = power_of(paired_tests(split(200, 1, 1)))
    assert power.disagreement == 0.01
    assert power.prompts_needed == required_n_for_difference(0.5, 0.05, discordant=0.05)
    (never,) = power_of(paired_tests(split(200, 0, 0)))
    assert never.prompts_needed == power.prompts_needed
    assert never.smallest_difference == detectable_difference(200, discordant=0.0) > 0


def test_the_prompts_said_to_be_needed_show_five_points_with_the_power_said():
    """Models of 5 points that disagree as was observed: McNemar's own test finds four in five."""
    (power,) = power_of(paired_tests(split(200, 36, 24)))
    rng = np.random.default_rng(1)
    chances = [(0.3 + 0.05) / 2, (0.3 - 0.05) / 2, 0.7]
    draws = rng.multinomial(power.prompts_needed, chances, size=1500)
    found = np.mean([mcnemar_exact(int(a), int(b)) <= 0.05 for a, b, _ in draws])
    assert 0.75 <= found <= 0.83


def test_the_smallest_difference_is_seen_with_the_power_said_and_half_of_it_is_not():
    (power,) = power_of(paired_tests(split(400, 72, 48)))

    def seen(difference):
        chances = [(0.3 + difference) / 2, (0.3 - difference) / 2, 0.7]
        draws = np.random.default_rng(2).multinomial(power.num_prompts, chances, size=1500)
        return np.mean([mcnemar_exact(int(a), int(b)) <= 0.05 for a, b, _ in draws])

    assert 0.75 <= seen(power.smallest_difference) <= 0.83
    assert seen(power.smallest_difference / 2) < 0.4


def test_each_family_says_its_power_in_a_sentence():
    null = scored("n", ["loss", "win"] * 100, kind="null", temperature=None)
    models, against_null = power_lines(paired_tests(split(200, 36, 24) + null))
    assert models == (
        "Between models: prompts needed to see a 5-point difference at 80% power: 940; "
        "these 200 can see 10.8 points."
    )
    assert against_null.startswith(
        "Against the best null response: prompts needed to see a 5-point"
    )
    assert (
        "with Holm's correction over 2 tests, all temperatures together); these 200" in against_null
    )


def test_too_few_prompts_can_see_nothing_and_no_test_has_no_power():
    (line,) = power_lines(paired_tests(split(3, 1, 1)))
    assert line.endswith("these 3 can see none.")
    assert power_of(paired_tests(scored("a", A))) == []
    assert power_of(paired_tests(scored("a", ["tie"] * 4) + scored("b", ["win"] * 4))) == []
