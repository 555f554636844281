"""The split by prompt: no leak, no dependence on the order of the rows."""

from __future__ import annotations

import hashlib
import random
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dpo.data.rows import DemonstrationRow, Message
from dpo.data.sources import load_rows
from dpo.data.split import near_key, overlap, prompt_digest, prompt_key, split_by_prompt
from dpo.errors import InputError

SHARED_DATA = Path(__file__).parents[2].parent / "shared" / "data"


def rows_of(*prompts):
    return [DemonstrationRow(prompt, str(i)) for i, prompt in enumerate(prompts)]


PROMPTS = st.lists(st.sampled_from("abcdefghij"), min_size=2, max_size=40).filter(
    lambda prompts: len(set(prompts)) > 1
)


@settings(max_examples=100)
@given(PROMPTS, st.floats(0.01, 0.99), st.integers(0, 5))
def test_no_prompt_is_on_both_sides_and_no_row_is_lost(prompts, fraction, seed):
    rows = rows_of(*prompts)
    split = split_by_prompt(rows, test_fraction=fraction, seed=seed)
    assert overlap(split.train, split.test) == ()
    assert Counter(split.train + split.test) == Counter(rows)
    assert split.train
    assert split.test


def test_the_held_out_share_is_the_fraction_up_to_chance():
    split = split_by_prompt(rows_of(*map(str, range(10_000))), test_fraction=0.3, seed=0)
    assert abs(len(split.test) - 3000) < 4 * (10_000 * 0.3 * 0.7) ** 0.5


def test_the_side_of_a_prompt_does_not_depend_on_the_other_prompts():
    everything = split_by_prompt(rows_of(*map(str, range(200))), test_fraction=0.3, seed=1)
    half = split_by_prompt(rows_of(*map(str, range(100))), test_fraction=0.3, seed=1)
    held_out = {row.prompt for row in everything.test}
    assert {row.prompt for row in half.test} == held_out & set(map(str, range(100)))


@settings(max_examples=50)
@given(PROMPTS, st.randoms(use_true_random=False))
def test_the_side_of_a_prompt_depends_on_neither_order_nor_repetition(prompts, shuffler):
    rows = rows_of(*prompts)
    shuffled = [*rows, *rows]
    shuffler.shuffle(shuffled)
    before = split_by_prompt(rows, test_fraction=0.3, seed=1)
    after = split_by_prompt(shuffled, test_fraction=0.3, seed=1)
    assert {row.prompt for row in before.test} == {row.prompt for row in after.test}


def test_each_side_keeps_the_order_of_the_rows():
    rows = rows_of(*(f"prompt {i % 30}" for i in range(90)))
    split = split_by_prompt(rows, test_fraction=0.5, seed=0)
    for side in (split.train, split.test):
        assert [int(row.response) for row in side] == sorted(int(row.response) for row in side)


def test_the_seed_decides_which_prompts_are_held_out():
    rows = rows_of(*map(str, range(100)))
    held_out = [split_by_prompt(rows, test_fraction=0.2, seed=s).test for s in (0, 0, 1)]
    assert held_out[0] == held_out[1] != held_out[2]


def test_the_split_is_the_same_on_every_machine_and_version():
    rows = rows_of(*map(str, range(10)))
    split = split_by_prompt(rows, test_fraction=0.3, seed=7)
    first_bytes = [hashlib.sha256(f'7:"{i}"'.encode()).digest()[0] for i in range(10)]
    assert {int(row.prompt) for row in split.test} == {
        i for i in range(10) if first_bytes[i] < 0.3 * 256
    }


def test_near_duplicate_prompts_land_on_the_same_side():
    variants = [f(f"what is {i}") for i in range(20) for f in (str, str.upper, " {}\n".format)]
    random.Random(0).shuffle(variants)
    split = split_by_prompt(rows_of(*variants), test_fraction=0.5, seed=0)
    sides = [{near_key(row.prompt) for row in side} for side in (split.train, split.test)]
    assert [len(side) for side in sides] == [7, 13]
    assert not sides[0] & sides[1]


def test_near_duplicate_conversations_share_a_key_but_roles_count():
    assert near_key((Message("user", " Why?"),)) == near_key((Message("user", "why?\n"),))
    assert near_key((Message("user", "why?"),)) != near_key((Message("system", "why?"),))


@pytest.mark.parametrize("fraction", [0, 1, -0.1, 1.5, float("nan"), float("inf")])
def test_a_fraction_outside_zero_and_one_is_refused(fraction):
    with pytest.raises(
        InputError, match=f"test_fraction: expected between 0 and 1, got {fraction}"
    ):
        split_by_prompt(rows_of("a", "b"), test_fraction=fraction, seed=0)


def test_one_prompt_cannot_be_split():
    with pytest.raises(InputError, match=r"at least 2 different prompts.*got 1"):
        split_by_prompt(rows_of("a", "A "), test_fraction=0.5, seed=0)


def test_a_text_never_shares_a_key_with_a_conversation_that_it_spells():
    conversation = (Message("user", "a"),)
    assert prompt_key(prompt_key(conversation)) != prompt_key(conversation)
    assert prompt_key((Message("user", 'a"], ["user", "b'),)) != prompt_key(
        (Message("user", "a"), Message("user", "b"))
    )
    assert prompt_key((Message("user", "a"),)) != prompt_key((Message("system", "a"),))


def test_the_digest_is_the_first_eight_bytes_of_the_near_keys_sha256():
    digest = prompt_digest("Why?")
    assert f"{digest:016x}" == hashlib.sha256(b'"why?"').hexdigest()[:16]
    assert prompt_digest(" Why?") == digest != prompt_digest("Why not?")


def test_overlap_names_each_shared_prompt_once_as_the_test_rows_have_it():
    shared = overlap(rows_of("a", "b"), rows_of(" A", "a", "c"))
    assert shared == (" A",)


def test_the_instruction_preferences_split_without_a_leak():
    path = SHARED_DATA / "instruction-preferences.json"
    if not path.exists():
        pytest.skip("instruction-preferences.json is not beside the project (shared/data)")
    rows = load_rows(path).rows
    split = split_by_prompt(rows, test_fraction=0.1, seed=0)
    assert len(split.train) + len(split.test) == 1100
    assert 70 < len({near_key(row.prompt) for row in split.test}) < 145
    assert overlap(split.train, split.test) == ()
