"""The subset of a row: read where the data has it, carried along, and decided upon by nothing."""

import json

import pytest

from dpo.data.rows import PreferenceRow
from dpo.data.sources import as_pairs, as_rankings, as_unpaired, load_rows
from dpo.data.synthetic import World, preferences
from dpo.errors import InputError

PAIR = {"prompt": "Why?", "chosen": "a", "rejected": "b"}


def loaded(tmp_path, *rows, **options):
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return load_rows(str(file), **options)


@pytest.mark.parametrize(
    "row",
    [
        PAIR,
        {"instruction": "Why?", "chosen": "a", "rejected": "b"},
        {"prompt": "Why?", "responses": ["a", "b"]},
        {"prompt": "Why?", "completion": "a", "label": True},
    ],
)
def test_every_kind_of_preference_may_name_its_subset(tmp_path, row):
    found = loaded(tmp_path, {**row, "subset": "chat"}, row)
    assert [r.subset for r in found.rows] == ["chat", ""]
    assert found.ignored_columns == ()
    assert found.rows[0] == found.rows[1]  # it is about the row, not of it


@pytest.mark.parametrize(
    ("value", "expected"),
    [(" chat ", "chat"), (3, "3"), (None, ""), ([1], ""), ({"a": 1}, ""), ("a\x1bb", "a\\x1bb")],
)
def test_a_subset_is_never_wrong_and_always_printable(tmp_path, value, expected):
    assert loaded(tmp_path, {**PAIR, "subset": value}).rows[0].subset == expected


def test_another_column_can_be_named(tmp_path):
    rows = loaded(tmp_path, {**PAIR, "task": "maths"}, columns={"subset": "task"}).rows
    assert rows[0].subset == "maths"


def test_a_demonstration_has_none_and_a_mapping_to_it_is_refused(tmp_path):
    row = {"prompt": "Why?", "response": "a", "task": "maths"}
    with pytest.raises(InputError, match=r"columns\.subset"):
        loaded(tmp_path, row, columns={"subset": "task"})


def test_it_is_kept_when_rows_are_taken_as_another_kind(tmp_path):
    (ranking,) = loaded(
        tmp_path, {"prompt": "Why?", "responses": ["a", "b", "c"], "subset": "s"}
    ).rows
    assert [pair.subset for pair in as_pairs([ranking])] == ["s"] * 3
    (pair,) = loaded(tmp_path, {**PAIR, "subset": "s"}).rows
    assert [row.subset for row in as_rankings([pair])] == ["s"]
    assert [row.subset for row in as_unpaired([pair])] == ["s"] * 2


def test_the_embedded_data_says_what_is_asked_about():
    world = World()
    for row in preferences(num_rows=50, seed=0):
        assert row.subset == world.fact_of[row.prompt].kind


def test_it_changes_no_digest():
    """Digests of data in memory are of the rows' representation."""
    assert repr(PreferenceRow("p", "a", "b", subset="x")) == repr(PreferenceRow("p", "a", "b"))
