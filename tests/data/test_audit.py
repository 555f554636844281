"""What `dpo data check` counts and how it shows it."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from dpo.data.audit import audit, drop_identical, preview, render, visible
from dpo.data.rows import (
    DemonstrationRow,
    Message,
    PreferenceRow,
    PromptRow,
    RankedRow,
    UnpairedRow,
)
from dpo.data.sources import load_rows
from dpo.data.tokenize import EncodedRow, TokenSequence

SHARED_DATA = Path(__file__).parents[2].parent / "shared" / "data"
END = 0


def encode(prompt, responses):
    """One token a character, and an end token."""
    given = tuple(map(ord, prompt))
    sequences = (TokenSequence((*given, *map(ord, r), END), len(given)) for r in responses)
    return EncodedRow(tuple(sequences), prompt_truncated=False, responses_truncated=0)


def token_text(token):
    return "<end>" if token == END else chr(token)


def shown(renderable, *, color=False):
    out = io.StringIO()
    system = "standard" if color else None
    Console(file=out, width=200, color_system=system, force_terminal=color).print(renderable)
    return out.getvalue()


ROWS = (
    PreferenceRow("abc", "same", "same"),
    PreferenceRow("ABC ", "good", ""),
    PreferenceRow("abc", "same", "same", source="another place"),
    PreferenceRow("de", "x" * 9, " \n"),
)


def test_counts_are_those_of_the_rows():
    found = audit(ROWS)
    assert found.num_rows_by_kind == {"preference": 4}
    assert (found.num_unique_prompts, found.num_distinct_prompts) == (3, 2)
    assert found.num_duplicate_rows == 1
    assert found.num_identical_pairs == 2
    assert (found.num_empty_responses, found.num_responses) == (2, 8)


def test_rows_are_equal_where_their_texts_scores_and_labels_are():
    def num_duplicates(*rows):
        return audit(rows).num_duplicate_rows

    pair = PreferenceRow("p", "a", "b", scores=(1.0, 0.0))
    assert num_duplicates(pair, replace(pair, scores=(1, -0.0), subset="s", source="here")) == 1
    assert num_duplicates(pair, replace(pair, scores=None), replace(pair, scores=(1.0, 0.5))) == 0
    assert num_duplicates(pair, RankedRow("p", ("a", "b"), (1.0, 0.0))) == 0
    assert num_duplicates(UnpairedRow("p", "a", True), UnpairedRow("p", "a", False)) == 0
    assert num_duplicates(UnpairedRow("p", "a", True), UnpairedRow("p", "a", True)) == 1
    assert num_duplicates(DemonstrationRow("p", "a"), DemonstrationRow("p", "a", "there")) == 1


def test_responses_that_begin_with_their_prompt_are_counted():
    rows = (
        PreferenceRow(" Why? ", "Why? So.", "Because"),
        PreferenceRow((Message("user", "Why?"),), "Why? So.", "Because"),
    )
    assert audit(rows).num_repeated_prompts == 1
    assert "1 of 4 responses begin with their prompt" in shown(render(audit(rows)))
    assert "begin with their prompt" not in shown(render(audit(ROWS)))


def test_labels_are_counted_where_there_are_labels_and_pairs_where_there_are_pairs():
    labelled = audit([UnpairedRow("p", "a", True), UnpairedRow("p", "b", False)])
    assert "1 of 2 responses are desirable" in shown(render(labelled))
    assert "chosen equal to rejected" not in shown(render(labelled))
    assert audit(ROWS).num_desirable is None


def test_prompts_alone_are_counted_measured_and_shown():
    rows = [PromptRow("abc", "here:1")]
    found = audit(rows, encode=encode, max_length=2)
    assert found.num_responses == found.num_too_long == 0
    lengths = [(part.part, part.unit, part.at_percentiles[0]) for part in found.lengths]
    assert lengths == [("prompt", "characters", 3), ("prompt", "tokens", 3)]
    assert "response" not in shown(render(found))
    assert "exceed" not in shown(render(found))
    text = shown(preview(rows, 1, encode=encode, token_text=token_text))
    assert [line.strip() for line in text.splitlines()] == ["here:1", "prompt: 3 tokens", "a|b|c"]


def test_nothing_to_count_is_counted_as_nothing():
    found = audit([], test_rows=[])
    assert (found.num_rows, found.num_unique_prompts, found.num_overlapping_prompts) == (0, 0, 0)


def test_what_was_not_asked_for_is_none_and_not_zero():
    found = audit(ROWS)
    assert found.num_overlapping_prompts is None
    assert found.num_too_long is None
    assert found.num_merged_boundaries is None
    assert "test prompts" not in shown(render(found))


def test_overlap_with_the_test_rows_is_counted_by_prompt():
    test_rows = [DemonstrationRow("Abc", "y"), DemonstrationRow("abc", "z")]
    assert audit(ROWS, test_rows=test_rows).num_overlapping_prompts == 1


def test_every_kind_of_row_is_counted_with_all_its_responses():
    rows = (
        RankedRow((Message("user", "abcd"),), ("a", "bb", "")),
        UnpairedRow("p", "ccc", True),
        DemonstrationRow("p", "dddd"),
    )
    found = audit(rows)
    assert found.num_rows_by_kind == {"ranked": 1, "unpaired": 1, "demonstration": 1}
    assert (found.num_responses, found.num_empty_responses) == (5, 1)
    by_part = {lengths.part: lengths for lengths in found.lengths}
    assert by_part["prompt"].at_percentiles[-1] == 4
    assert by_part["response"].num_parts == 4
    assert by_part["completion"].at_percentiles == (3,) * 8


def test_percentiles_are_nearest_ranks_of_actual_lengths():
    rows = [DemonstrationRow("p", "x" * n) for n in range(1, 101)]
    (_, responses) = audit(rows).lengths
    assert responses.at_percentiles == (1, 5, 25, 50, 75, 95, 99, 100)
    (_, responses) = audit(rows[:3]).lengths
    assert responses.at_percentiles == (1, 1, 1, 2, 3, 3, 3, 3)


def test_token_lengths_count_the_end_token_in_the_response():
    row = PreferenceRow("abc", "de", "f")
    measured = audit([row], encode=encode).lengths
    tokens = {m.part: m.at_percentiles[0] for m in measured if m.unit == "tokens"}
    assert tokens == {"prompt": 3, "chosen": 3, "rejected": 2}


def test_sequences_longer_than_the_limit_are_counted():
    row = PreferenceRow("abc", "de", "f")  # 6 and 5 tokens with their end tokens
    counts = [audit([row], encode=encode, max_length=n).num_too_long for n in (4, 5, 6)]
    assert counts == [2, 1, 0]


def test_merged_boundaries_are_counted_per_sequence():
    found = audit(ROWS, merges=lambda prompt, response: response == "same")
    assert found.num_merged_boundaries == 4
    assert "4 of 8 sequences have a boundary" in shown(render(found))


def test_identical_pairs_are_dropped_and_other_rows_kept():
    demonstration = DemonstrationRow("a", "b")
    assert drop_identical([*ROWS, demonstration]) == ((ROWS[1], ROWS[3], demonstration), 2)


def test_the_rendered_audit_says_every_count():
    text = shown(render(audit(ROWS, encode=encode, max_length=8, test_rows=[])))
    for line in (
        "4 rows (4 preference)",
        "3 different prompts, 2 up to case and white space",
        "1 rows equal an earlier one",
        "2 pairs have chosen equal to rejected",
        "2 of 8 responses are empty",
        "0 test prompts are among these rows",
        "2 of 8 sequences exceed 8 tokens",
    ):
        assert line in text, line


def test_no_rows_are_counted_as_none():
    assert audit([]).lengths == ()
    assert "0 rows" in shown(render(audit([])))


def test_the_preview_marks_the_scored_tokens_and_the_end():
    text = shown(
        preview([DemonstrationRow("ab", "c", "f:1")], 1, encode=encode, token_text=token_text)
    )
    assert text.splitlines() == ["f:1", "response: 2 prompt tokens, 2 scored", "a|b|c|<end>"]


def test_the_preview_shows_scored_tokens_in_another_style_than_the_prompt():
    (*_, marked) = preview(
        [DemonstrationRow("ab", "c")], 1, encode=encode, token_text=token_text
    ).renderables
    styles = {marked.plain[s.start : s.end]: s.style for s in marked.spans}
    assert styles["a"] == styles["b"] == "dim"
    assert styles["c"] == styles["<end>"] == "bold green"


def test_the_preview_stops_after_the_rows_asked_for():
    assert "row 3" not in shown(preview(ROWS, 2, encode=encode, token_text=token_text))


def test_data_can_neither_drive_the_terminal_nor_be_read_as_markup():
    row = DemonstrationRow("[red]\x1b[31m", "\x07\u202e[/red]", source="\x1b]0;title\x07:1")
    text = shown(preview([row], 1, encode=encode, token_text=token_text))
    assert not set(text) & {"\x1b", "\x07", "\u202e"}
    assert "[|r|e|d|]|\\x1b|[|3|1|m" in text
    assert "\\u202e" in text


def test_visible_leaves_ordinary_text_alone():
    assert visible("naïve 語 🙂") == "naïve 語 🙂"
    assert visible("a\nb\u2028") == "a\\nb\\u2028"


def test_the_instruction_preferences_have_their_known_counts():
    path = SHARED_DATA / "instruction-preferences.json"
    if not path.exists():
        pytest.skip("instruction-preferences.json is not beside the project (shared/data)")
    found = audit(load_rows(path).rows)
    assert found.num_rows == 1100
    assert found.num_identical_pairs == 6
    assert found.num_unique_prompts == 1075
    assert found.num_empty_responses == 0
