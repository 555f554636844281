"""The embedded data: its true reward by hand, its labels' distribution, its reproducibility."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpo.data import synthetic
from dpo.data.synthetic import KINDS, MANNERS, OPENINGS, POLITE, RUDE, World, all_facts

WORLD = World()
PERU = "What is the capital of Peru?"
RIGHT = "The capital of Peru is Lima."
WRONG = "The capital of Peru is Rome."


@pytest.mark.parametrize(
    ("answer", "reward"),
    [
        (RIGHT, 2.0),
        (WRONG, -1.0),
        (f"Happy to help! {RIGHT}", 3.0),
        (f"Happy to help! {RIGHT} I hope this helps.", 3.0),  # politeness counts once
        (f"Ugh. {RIGHT}", 1.0),
        (f"Ugh. {WRONG} Stop wasting my time.", -2.0),
        (f"Happy to help! Ugh. {RIGHT}", 1.0),  # one rude sentence spoils the polite ones
        (f"With pleasure. {WRONG}", 0.0),
        (f"{RIGHT} {WRONG}", -1.0),  # both is not right
        (f"{WRONG} The capital of Peru is Oslo.", -1.0),
        ("The capital of France is Paris.", -1.0),  # true, but not what was asked
        ("The opposite of hot is cold.", -1.0),
        ("Great question!", 1.0),
        ("Ugh.", -1.0),
        ("", 0.0),
        ("   \n", 0.0),
        ("I do not know.", -0.5),
        (f"{RIGHT} I do not know.", 1.5),
        (f"{RIGHT} {RIGHT}", 1.5),  # a sentence said twice is foreign the second time
        (f"Happy to help! {RIGHT} Happy to help!", 2.5),
        (f"{RIGHT} {RIGHT} {RIGHT} {RIGHT} {RIGHT} {RIGHT} {RIGHT}", 0.0),  # at most four count
        (f"Ugh. {WRONG}" + " Eh." * 9, -4.0),
        (RIGHT + "Happy to help!", 3.0),  # a missing space does not hide a sentence
        ("The capital of Peru is Lima", -0.5),  # cut short: no statement at all
        ("The capital of Peru is Lima!", -0.5),  # nor is it a wrong one
        ("The capital of Peru is Lim", -0.5),
        ("the capital of peru is lima.", -0.5),
        ("Lima.", -0.5),
        ("...", -1.5),
    ],
)
def test_the_true_reward_by_hand(answer: str, reward: float) -> None:
    assert WORLD.reward(PERU, answer) == reward


def test_each_part_of_an_answer_by_hand() -> None:
    parts = WORLD.parts(PERU, f"Happy to help! {RIGHT} Eh? Eh?")
    assert (parts.right, parts.wrong, parts.polite, parts.rude, parts.foreign) == (
        True,
        False,
        True,
        False,
        2,
    )
    parts = WORLD.parts(PERU, f"Ugh. {WRONG}")
    assert (parts.right, parts.wrong, parts.polite, parts.rude, parts.foreign) == (
        False,
        True,
        False,
        True,
        0,
    )


@given(st.text(alphabet="aL. !?\n\x00éThe capital of Peru is Lima", max_size=80) | st.text())
def test_any_text_has_a_reward_within_the_range(text: str) -> None:
    parts = WORLD.parts(PERU, text)
    assert parts.foreign >= 0
    assert not (parts.right and parts.wrong)
    assert not (parts.polite and parts.rude)
    assert -4 <= WORLD.reward(PERU, text) <= 3
    assert (2 * WORLD.reward(PERU, text)).is_integer()


@pytest.mark.parametrize("prompt", World().prompts)
def test_right_and_polite_is_best_for_every_prompt(prompt: str) -> None:
    fact = WORLD.fact_of[prompt]
    right = fact.statement(fact.answer)
    assert WORLD.reward(prompt, f"Happy to help! {right} I hope this helps.") == 3
    assert WORLD.reward(prompt, right) == 2
    assert WORLD.reward(prompt, fact.statement("nothing")) == -1
    assert WORLD.reward(prompt, f"What a silly question. {right} Stop wasting my time.") == 1


def test_a_prompt_of_another_world_has_no_reward() -> None:
    with pytest.raises(KeyError):
        WORLD.reward("What is the capital of Atlantis?", RIGHT)
    with pytest.raises(KeyError):
        World(num_facts=4).reward("What is the capital of Peru?", RIGHT)


def test_eighty_facts_give_three_hundred_and_twenty_different_prompts() -> None:
    facts = all_facts()
    assert len(facts) == len(set(facts)) == 80
    assert Counter(fact.kind for fact in facts) == dict.fromkeys(KINDS, 20)
    prompts = [prompt for fact in facts for prompt in fact.prompts]
    assert len(prompts) == len(set(prompts)) == 320
    assert WORLD.prompts == tuple(prompts)


def test_a_kind_has_no_two_facts_of_one_subject_or_one_answer() -> None:
    """A wrong answer drawn from the others would otherwise be right."""
    for kind in KINDS:
        facts = [fact for fact in all_facts() if fact.kind == kind]
        assert len({fact.subject for fact in facts}) == 20
        assert len({fact.answer for fact in facts}) == 20


@pytest.mark.parametrize("num_facts", [1, 4, 7, 20])
def test_a_smaller_world_holds_the_first_facts_of_all_kinds(num_facts: int) -> None:
    world = World(num_facts)
    assert world.facts == all_facts()[:num_facts]
    assert len(world.prompts) == 4 * num_facts
    assert len({fact.kind for fact in world.facts}) == min(num_facts, 4)


def test_polite_and_rude_sentences_are_apart_and_open_or_close() -> None:
    assert not set(POLITE) & set(RUDE)
    assert 0 < OPENINGS < len(POLITE) == len(RUDE)
    assert all(WORLD.parts(PERU, s).foreign == 0 for s in POLITE + RUDE)


def within(count: int, number: int, share: float) -> bool:
    """Whether a count is within five standard deviations of its mean."""
    return abs(count - share * number) < 5 * math.sqrt(number * share * (1 - share))


def test_the_demonstrators_shares() -> None:
    """Right in 3 of 4 answers; polite, neutral, rude 3:4:3; independent of each other; every
    opening and closing as often as the others."""
    number, rng = 6000, np.random.default_rng(0)
    answers = [WORLD.answer(PERU, rng) for _ in range(number)]
    parts = [WORLD.parts(PERU, answer) for answer in answers]
    assert all(p.right != p.wrong and p.foreign == 0 for p in parts)
    manner = Counter("polite" if p.polite else "rude" if p.rude else "neutral" for p in parts)
    for name, share in zip(MANNERS, (0.3, 0.4, 0.3), strict=True):
        assert within(manner[name], number, share)
    assert within(sum(p.right for p in parts), number, 0.75)
    assert within(sum(p.right and p.polite for p in parts), number, 0.75 * 0.3)
    assert within(sum(p.right and p.rude for p in parts), number, 0.75 * 0.3)
    for sentence in (*POLITE[:OPENINGS], *RUDE[:OPENINGS]):
        assert within(sum(a.startswith(sentence) for a in answers), number, 0.3 / 3)
    for sentence in (*POLITE[OPENINGS:], *RUDE[OPENINGS:]):
        assert within(sum(a.endswith(sentence) for a in answers), number, 0.3 / 3)
    wrong = Counter(a for a, p in zip(answers, parts, strict=True) if p.wrong and len(a) < 35)
    assert len({a.removesuffix(".").split()[-1] for a in wrong}) > 10, "all other capitals"


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (RIGHT, RIGHT),  # gap 0
        (f"Happy to help! {RIGHT}", RIGHT),  # gap 1
        (f"Ugh. {RIGHT}", RIGHT),  # gap -1
        (WRONG, f"Ugh. {RIGHT}"),  # gap -2
        (f"{RIGHT} Eh.", RIGHT),  # gap -1/2
    ],
)
def test_labels_are_bradley_terry_under_the_reward(first: str, second: str) -> None:
    number, rng = 4000, np.random.default_rng(1)
    marked_first, marked_second = first + " ", second  # told apart, the same reward
    rows = [WORLD.prefer(PERU, marked_first, marked_second, rng) for _ in range(number)]
    gap = WORLD.reward(PERU, first) - WORLD.reward(PERU, second)
    share = 1 / (1 + math.exp(-gap))
    assert within(sum(row.chosen == marked_first for row in rows), number, share)
    assert all({row.chosen, row.rejected} == {marked_first, marked_second} for row in rows)


def test_labels_of_the_drawn_pairs_match_the_sigmoid_of_their_gaps() -> None:
    rows = synthetic.preferences(num_rows=4000, seed=3)
    by_gap: dict[float, list[bool]] = {}
    for row in rows:
        gap = WORLD.reward(row.prompt, row.chosen) - WORLD.reward(row.prompt, row.rejected)
        by_gap.setdefault(abs(gap), []).append(gap > 0)
    assert len(by_gap) >= 5
    for gap, outcomes in by_gap.items():
        if gap > 0:
            share = 1 / (1 + math.exp(-gap))
            assert within(sum(outcomes), len(outcomes), share), gap


def test_rows_are_reproduced_by_the_seed_and_longer_draws_go_on() -> None:
    for draw in (synthetic.preferences, synthetic.demonstrations):
        first = draw(num_rows=40, seed=5)
        assert draw(num_rows=40, seed=5) == first
        assert draw(num_rows=40, seed=6) != first
        assert len(first) == 40
    first = synthetic.preferences(num_rows=40, seed=5)
    assert synthetic.preferences(num_rows=60, seed=5)[:40] == first


def test_demonstrations_and_preferences_of_one_seed_are_drawn_apart() -> None:
    shown = synthetic.demonstrations(num_rows=50, seed=0)
    compared = synthetic.preferences(num_rows=50, seed=0)
    assert [row.prompt for row in shown] != [row.prompt for row in compared]


def test_every_pair_differs_and_every_row_has_its_place() -> None:
    rows = synthetic.preferences(num_rows=500, seed=0, num_facts=4)
    assert all(row.chosen != row.rejected for row in rows)
    assert {row.prompt for row in rows} == set(World(4).prompts)
    assert [row.source for row in rows] == [f"synthetic:{i}" for i in range(1, 501)]
    shown = synthetic.demonstrations(num_rows=3, seed=0)
    assert [row.source for row in shown] == ["synthetic:1", "synthetic:2", "synthetic:3"]


def test_sampled_pairs_are_labelled_and_equal_ones_left_out() -> None:
    prompts = [PERU] * 4
    first, second = [RIGHT, WRONG, RIGHT, RIGHT], [WRONG, WRONG, RIGHT, "Eh."]
    rows = synthetic.label_pairs(WORLD, prompts, first, second, seed=0)
    assert [{row.chosen, row.rejected} for row in rows] == [{RIGHT, WRONG}, {RIGHT, "Eh."}]
    assert synthetic.label_pairs(WORLD, prompts, first, second, seed=0) == rows
