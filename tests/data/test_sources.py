"""What a user's files become, and what is said about the rows that cannot be used."""

from __future__ import annotations

import csv
import gzip
import hashlib
import json
import os
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dpo.data.rows import (
    DemonstrationRow,
    Message,
    PreferenceRow,
    PromptRow,
    RankedRow,
    UnpairedRow,
)
from dpo.data.sources import (
    as_demonstrations,
    as_pairs,
    as_rankings,
    as_unpaired,
    load_rows,
    write_jsonl,
)
from dpo.errors import InputError, StorageError

SHARED_DATA = Path(__file__).parents[2].parent / "shared" / "data"

GOOD = {"prompt": "Why?", "chosen": "Because.", "rejected": "No."}
PREFERENCE = PreferenceRow("Why?", "Because.", "No.")
USER = {"role": "user", "content": "Why?"}
CHAT = (Message("user", "Why?"),)


def says(text):
    return {"role": "assistant", "content": text}


def jsonl(*values):
    return "".join(json.dumps(value) + "\n" for value in values).encode()


@pytest.fixture
def load(tmp_path, monkeypatch):
    """Write a file of that name into an empty working folder, and load it by its bare name."""
    monkeypatch.chdir(tmp_path)

    def write_and_load(data, name="prefs.jsonl", **options):
        Path(name).write_bytes(data if isinstance(data, bytes) else jsonl(*data))
        return load_rows(name, **options)

    return write_and_load


@pytest.fixture
def complaints(load):
    """The lines of the error that loading ends in."""

    def lines_of_error(data, name="prefs.jsonl", **options):
        with pytest.raises(InputError) as caught:
            load(data, name, **options)
        return str(caught.value).splitlines()

    return lines_of_error


# -- shapes ------------------------------------------------------------------------------------


def test_prompt_chosen_rejected_text_gives_preference_rows_that_know_their_line(load):
    loaded = load([GOOD, {**GOOD, "prompt": "How?", "chosen": ""}])
    assert loaded.rows == (PREFERENCE, PreferenceRow("How?", "", "No."))
    assert [row.source for row in loaded.rows] == ["prefs.jsonl:1", "prefs.jsonl:2"]
    assert (loaded.kind, loaded.shape) == ("preference", "prompt/chosen/rejected, text")


@pytest.mark.parametrize(
    "values",
    [
        {"prompt": [USER], "chosen": [says("Because.")], "rejected": [says("No.")]},
        {"prompt": [USER], "chosen": "Because.", "rejected": "No."},
        {"chosen": [USER, says("Because.")], "rejected": [USER, says("No.")]},
        {"prompt": "Why?", "chosen": [USER, says("Because.")], "rejected": [USER, says("No.")]},
        {"prompt": [USER], "chosen": [USER, says("Because.")], "rejected": [USER, says("No.")]},
    ],
)
def test_every_conversational_layout_gives_the_same_row(load, values):
    loaded = load([values])
    assert loaded.rows == (PreferenceRow(CHAT, "Because.", "No."),)
    assert loaded.shape.endswith(", conversations")


def test_a_text_prompt_that_is_not_in_its_conversations_is_an_error(complaints):
    row = {"prompt": "Who?", "chosen": [USER, says("a")], "rejected": [USER, says("b")]}
    assert complaints([row]) == [
        "prefs.jsonl:1: 'prompt' does not occur in the conversations of chosen and rejected."
    ]


def test_conversations_that_part_before_the_last_message_are_an_error(complaints):
    other = {"role": "user", "content": "How?"}
    row = {"chosen": [USER, says("a")], "rejected": [other, says("b")]}
    assert complaints([row]) == [
        "prefs.jsonl:1: 'rejected' differs from 'chosen' before the last message."
    ]


def test_hh_dialogues_are_cut_after_the_last_common_assistant_marker(load):
    start = "\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: Why?\n\nAssistant:"
    row = {"chosen": start + " Because of A.", "rejected": start + " Because of B."}
    loaded = load([row])
    assert loaded.rows == (PreferenceRow(start, " Because of A.", " Because of B."),)


def test_an_hh_dialogue_that_goes_on_after_the_common_prompt_is_an_error(complaints):
    start = "\n\nHuman: Why?\n\nAssistant:"
    row = {"chosen": start + " A\n\nHuman: So?\n\nAssistant: B", "rejected": start + " A"}
    assert complaints([row]) == [
        "prefs.jsonl:1: 'chosen' has another Human turn after the common prompt."
    ]


def test_chosen_and_rejected_alone_must_be_dialogues(complaints):
    (line,) = complaints([{"chosen": "Yes", "rejected": "No"}])
    assert line.startswith(
        "prefs.jsonl:1: 'chosen' and 'rejected' are not dialogues with a common beginning"
    )


def test_an_input_is_set_under_the_alpaca_heading_and_an_empty_one_is_not(load):
    row = {"instruction": "Add.", "input": "1, 2", "output": "3", "chosen": "3!", "rejected": "4"}
    loaded = load([row, {**row, "input": ""}, {**row, "input": None}])
    assert [row.prompt for row in loaded.rows] == ["Add.\n\n### Input:\n1, 2", "Add.", "Add."]
    assert loaded.shape == "instruction/chosen/rejected, text"
    assert loaded.ignored_columns == ("output",)
    assert "ignored columns: output" in str(loaded)


def test_scores_sort_a_ranking_and_equal_scores_keep_their_order(load):
    row = {"prompt": "Why?", "responses": ["a", "b", "c", "d"], "scores": [1, 2.5, 1, 2.5]}
    loaded = load([row, {"prompt": "How?", "responses": ["x", "y"]}])
    assert loaded.rows == (
        RankedRow("Why?", ("b", "d", "a", "c"), (2.5, 2.5, 1.0, 1.0)),
        RankedRow("How?", ("x", "y"), None),
    )
    assert loaded.kind == "ranked"


def test_labels_may_be_booleans_numbers_or_words(load):
    labels = [True, 0, 1.0, "true", "False", "1"]
    loaded = load([{"prompt": "Why?", "completion": "a", "label": label} for label in labels])
    assert [row.label for row in loaded.rows] == [True, False, True, True, False, True]
    assert loaded.rows[0] == UnpairedRow("Why?", "a", True)


@pytest.mark.parametrize(
    ("values", "row"),
    [
        ({"prompt": "Why?", "response": "a"}, DemonstrationRow("Why?", "a")),
        ({"prompt": "Why?", "completion": "a"}, DemonstrationRow("Why?", "a")),
        ({"instruction": "Why?", "output": "a"}, DemonstrationRow("Why?", "a")),
        ({"messages": [USER, says("a")]}, DemonstrationRow(CHAT, "a")),
    ],
)
def test_each_demonstration_layout_is_recognised(load, values, row):
    assert load([values]).rows == (row,)


@pytest.mark.parametrize(("prompt", "read"), [("Why?", "Why?"), ([USER], CHAT)])
def test_a_prompt_alone_is_a_row_and_is_written_as_one(load, tmp_path, prompt, read):
    loaded = load([{"prompt": prompt, "id": 1}])
    assert loaded.rows == (PromptRow(read),)
    assert (loaded.kind, loaded.ignored_columns) == ("prompt", ("id",))
    write_jsonl(loaded.rows, tmp_path / "again.jsonl")
    assert load_rows(tmp_path / "again.jsonl").rows == loaded.rows


def test_a_prompt_whose_response_is_missing_is_no_prompt_alone(complaints):
    half = {"prompt": "Why?", "chosen": "Because."}
    (line,) = complaints([half])
    assert "no row has a shape that can be recognised (found: prompt, chosen)" in line
    assert complaints([{"prompt": "How?"}, half, {"prompt": "Who?"}]) == [
        "prefs.jsonl:2: has no known shape (found: prompt, chosen), the others prompt."
    ]


@pytest.mark.parametrize("convert", [as_pairs, as_rankings, as_unpaired, as_demonstrations])
def test_prompts_alone_are_refused_where_responses_are_needed(convert):
    with pytest.raises(InputError, match=r"here:1: expected .* got prompt rows; every row needs"):
        convert([PromptRow("Why?", "here:1")])


def test_columns_are_renamed_and_a_column_that_bears_a_mapped_name_gives_way(load):
    row = {"question": "Why?", "prompt": "an old one", "better": "Because.", "rejected": "No."}
    loaded = load([row], columns={"prompt": "question", "chosen": "better"})
    assert loaded.rows == (PREFERENCE,)
    assert loaded.ignored_columns == ("prompt",)


def test_errors_name_the_users_own_columns(complaints):
    rows = [{"q": "Why?", "chosen": "a", "rejected": "b"}, {"q": None, "chosen": "a"}]
    rows.append({"q": 3, "chosen": "a", "rejected": "b"})
    assert complaints(rows, columns={"prompt": "q"})[1:] == [
        "  prefs.jsonl:2: 'rejected' is missing; every row needs q, chosen and rejected "
        "(found: q, chosen).",
        "  prefs.jsonl:3: 'q' is a number, expected text.",
    ]


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (
            {"prompt": "question"},
            "columns.prompt: there is no column 'question' (found: prompt, chosen, rejected).",
        ),
        ({"prompts": "prompt"}, "columns: 'prompts' is not one of our names: prompt, chosen,"),
    ],
)
def test_a_mapping_that_cannot_take_effect_is_refused(complaints, columns, message):
    assert complaints([GOOD], columns=columns)[0].startswith(message)


def test_a_mapped_column_that_the_shape_does_not_have_is_refused(complaints):
    row = {**GOOD, "good": True}
    assert complaints([row], columns={"label": "good"}) == [
        "columns.label: without effect, for the rows have the shape prompt/chosen/rejected."
    ]


def test_keys_of_messages_beyond_role_and_content_are_reported_as_ignored(load):
    assert load([{"messages": [USER, {**says("a"), "weight": 0}]}]).ignored_columns == (
        "messages[].weight",
    )


# -- bytes -------------------------------------------------------------------------------------


def test_crlf_bom_and_blank_lines_give_the_same_rows(load):
    plain = jsonl(GOOD, {**GOOD, "prompt": "How?"})
    first, second, _ = plain.split(b"\n")
    expected = load(plain)
    assert load(plain.replace(b"\n", b"\r\n")).rows == expected.rows
    assert load(b"\xef\xbb\xbf" + plain).rows == expected.rows
    assert load(plain.rstrip(b"\n")).rows == expected.rows
    spaced = load(b"\n" + first + b"\r\n  \n\n" + second + b"\n\n")
    assert spaced.rows == expected.rows
    assert (expected.num_blank_lines, spaced.num_blank_lines) == (0, 4)
    assert [row.source for row in spaced.rows] == ["prefs.jsonl:2", "prefs.jsonl:5"]


def test_every_format_gives_the_same_rows(load, tmp_path):
    rows = [{**GOOD, "prompt": f'Why "{i}", é\n?'} for i in range(3)]
    expected = load(rows).rows
    with Path("prefs.csv").open("w", newline="", encoding="utf-8-sig") as file:
        writer = csv.DictWriter(file, fieldnames=list(GOOD))
        writer.writeheader()
        writer.writerows(rows)
    table = Path("prefs.csv").read_bytes()
    lists = json.dumps(rows, indent=2).encode()
    assert load(table, "prefs.csv").rows == expected
    assert load(table.replace(b"\r\n", b"\n").replace(b"\n", b"\r\n"), "crlf.csv").rows == expected
    assert load(lists, "prefs.json").rows == expected
    assert load(b"\xef\xbb\xbf" + lists.replace(b"\n", b"\r\n"), "bom.json").rows == expected
    assert load(json.dumps({"version": 1, "data": rows}).encode(), "d.json").rows == expected
    assert load(jsonl(*rows), "lines.json").rows == expected
    assert load(gzip.compress(jsonl(*rows)), "prefs.jsonl.gz").rows == expected
    assert load(gzip.compress(lists), "prefs.json.gz").rows == expected
    assert load(gzip.compress(table), "prefs.CSV.GZ").rows == expected


def test_parquet_rows_equal_jsonl_rows_and_are_named_by_number(load):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    rows = [GOOD, {**GOOD, "rejected": None}]
    parquet.write_table(pyarrow.Table.from_pylist(rows[:1]), "prefs.parquet")
    assert load(Path("prefs.parquet").read_bytes(), "prefs.parquet").rows == (PREFERENCE,)
    parquet.write_table(pyarrow.Table.from_pylist(rows), "prefs.parquet")
    with pytest.raises(InputError) as caught:
        load_rows("prefs.parquet")
    assert str(caught.value) == "prefs.parquet row 2: 'rejected' is null, expected text."


def test_a_broken_parquet_file_is_an_input_error(complaints):
    (line,) = complaints(b"PAR1 nonsense", "prefs.parquet")
    assert line.startswith("prefs.parquet: not a readable Parquet file: ")


def test_the_line_of_a_json_row_is_the_line_where_it_opens(complaints):
    rows = [GOOD, {**GOOD, "chosen": None}]
    text = json.dumps({"about": "x\n", "rows": rows}, indent=2).encode()
    line = 1 + text[: text.rindex(b"{")].count(b"\n")
    assert complaints(text, "prefs.json") == [
        f"prefs.json:{line}: 'chosen' is null, expected text."
    ]


def test_csv_errors_name_the_first_line_of_their_row(complaints):
    text = b'prompt,chosen,rejected\n"two\nlines",a,b\n\nonly,two\n,a,b\n"open,a,b\n'
    assert complaints(text, "prefs.csv") == [
        "prefs.csv: 3 of 4 rows cannot be used:",
        "  prefs.csv:5: expected 3 cells, as in the header, found 2.",
        "  prefs.csv:6: 'prompt' is empty.",
        "  prefs.csv:7: not valid CSV: unexpected end of data.",
    ]


def test_a_csv_cell_may_be_longer_than_pythons_default_limit(load):
    long = "x" * 200_000
    text = f"prompt,chosen,rejected\nWhy?,{long},b\n".encode()
    assert load(text, "prefs.csv").rows[0].chosen == long


def test_the_sha256_is_that_of_the_file(load):
    data = jsonl(GOOD)
    assert load(data).sha256 == hashlib.sha256(data).hexdigest()
    zipped = gzip.compress(data)
    assert load(zipped, "prefs.jsonl.gz").sha256 == hashlib.sha256(zipped).hexdigest()


def test_a_folder_is_read_in_order_of_name_without_hidden_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = Path("data")
    folder.mkdir()
    (folder / "b.json").write_text(json.dumps([{**GOOD, "prompt": "second"}]))
    (folder / "a.jsonl").write_bytes(jsonl({**GOOD, "prompt": "first"}))
    (folder / ".hidden.jsonl").write_bytes(b"not json")
    (folder / "README.md").write_text("about")
    loaded = load_rows(folder)
    assert [row.prompt for row in loaded.rows] == ["first", "second"]
    assert [row.source for row in loaded.rows] == ["data/a.jsonl:1", "data/b.json:1"]
    assert loaded.notes == ("left out of data: README.md",)
    assert load_rows(["data/a.jsonl", "data/b.json"]).sha256 == loaded.sha256
    assert load_rows(["data/b.json", "data/a.jsonl"]).sha256 != loaded.sha256


def test_a_folder_without_data_is_an_input_error(tmp_path):
    with pytest.raises(InputError, match=r"no data file in this folder"):
        load_rows(tmp_path)


def test_a_limit_looks_at_the_first_rows_only(load, complaints):
    assert load([GOOD, GOOD, {"bad": 1}], limit=2).rows == (PREFERENCE, PREFERENCE)
    assert complaints([GOOD], limit=0) == ["limit: expected at least 1 row, got 0."]


# -- what is wrong -----------------------------------------------------------------------------


def test_a_missing_field_is_said_with_line_need_and_what_was_found(complaints):
    rows = [GOOD] * 416 + [{"prompt": "Why?", "chosen": "a"}] + [GOOD]
    assert complaints(rows) == [
        "prefs.jsonl:417: 'rejected' is missing; every row needs prompt, chosen and rejected "
        "(found: prompt, chosen)."
    ]


def test_all_problems_of_a_row_and_all_rows_are_said_at_once(complaints):
    rows = [GOOD, {**GOOD, "chosen": None, "rejected": 3}, [1], {**GOOD, "prompt": " \n"}]
    assert complaints(rows) == [
        "prefs.jsonl: 3 of 4 rows cannot be used:",
        "  prefs.jsonl:2: 'chosen' is null, expected text; 'rejected' is a number, expected text.",
        "  prefs.jsonl:3: expected an object with named fields, found a list.",
        "  prefs.jsonl:4: 'prompt' is empty.",
    ]


def test_twenty_problems_are_shown_and_the_rest_counted(complaints):
    lines = complaints([GOOD] + [{**GOOD, "chosen": None}] * 25)
    assert lines[0] == "prefs.jsonl: 25 of 26 rows cannot be used:"
    assert len(lines) == 22
    assert lines[20].startswith("  prefs.jsonl:21: ")
    assert lines[21] == "  and 5 more"


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"prompt" "Why?"}', "not valid JSON: Expecting ':' delimiter (column 11)."),
        (b'{"prompt": "Why?"} x', "not valid JSON: more text after the object (column 19)."),
        (
            b'{"prompt": "\xff"}',
            "not UTF-8 (byte 0xff at 12: invalid start byte); save it as UTF-8.",
        ),
        (b'{"prompt": "a", "prompt": "b"}', "repeated key: prompt."),
        (b'{"prompt": ' + b"9" * 5000 + b"}", "an integer of 5000 digits."),
        (b"[" * 100_000, "not valid JSON: nested too deeply (column 1)."),
        (
            b'{"prompt": "\\ud800", "chosen": "a", "rejected": "b"}',
            "'prompt' has a lone surrogate \\ud800 at character 0.",
        ),
    ],
)
def test_a_line_that_cannot_be_read_is_one_problem_among_good_rows(complaints, line, reason):
    data = jsonl(GOOD) + line + b"\n" + jsonl(GOOD)
    assert complaints(data) == [f"prefs.jsonl:2: {reason}"]


def test_a_truncated_last_line_is_said_to_be_one(complaints):
    data = jsonl(GOOD, GOOD)[:-20]
    (line,) = complaints(data)
    assert line.startswith("prefs.jsonl:2: not valid JSON: ")
    assert line.endswith("; the file may have been cut off here.")


def test_a_truncated_gzip_file_is_an_input_error(complaints):
    (line,) = complaints(gzip.compress(jsonl(GOOD) * 50)[:-10], "prefs.jsonl.gz")
    assert line.startswith("prefs.jsonl.gz: not a whole gzip file (")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (b'[{"prompt": "a"},\n{]', "prefs.json:2: not valid JSON: Expecting property name"),
        (b"[]\n[]", "prefs.json:1: not valid JSON: more text after the value"),
        (
            b'{"a": [{}], "b": [{}]}',
            "prefs.json:1: expected a list of objects, or an object with one such list; found an "
            "object with a, b; make a file of each.",
        ),
        (b"[" * 100_000, "prefs.json:1: not valid JSON: nested too deeply"),
        (b'"\n\xff"', "prefs.json:2: not UTF-8 (byte 0xff"),
    ],
)
def test_a_json_file_that_cannot_be_read_is_one_sentence(complaints, text, expected):
    (line,) = complaints(text, "prefs.json")
    assert line.startswith(expected)


def test_a_json_list_goes_on_after_a_bad_element(complaints):
    text = b'[{"prompt": 1, "prompt": 2},\n3,\n' + jsonl(GOOD).strip() + b"]"
    assert complaints(text, "prefs.json")[1:] == [
        "  prefs.json:1: repeated key: prompt.",
        "  prefs.json:2: expected an object with named fields, found a number.",
    ]


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("prefs.jsonl", b""),
        ("prefs.jsonl", b"\n \n"),
        ("prefs.json", b""),
        ("prefs.json", b"[]"),
        ("prefs.csv", b"prompt,chosen,rejected\n"),
    ],
)
def test_no_rows_is_an_input_error(complaints, name, data):
    assert complaints(data, name) == [f"{name}: there are no rows; expected at least one."]


def test_rows_of_another_shape_are_problems(complaints):
    rows = [
        GOOD,
        {"prompt": "Why?", "response": "a"},
        {"prompt": [USER], "chosen": "a", "rejected": "b"},
        {"instruction": "Why?", **GOOD},
        GOOD,
    ]
    assert complaints(rows) == [
        "prefs.jsonl: 2 of 5 rows cannot be used:",
        "  prefs.jsonl:2: 'chosen' is missing; every row needs prompt, chosen and rejected "
        "(found: prompt, response); 'rejected' is missing; every row needs prompt, chosen and "
        "rejected (found: prompt, response).",
        "  prefs.jsonl:3: 'prompt' is a conversation, in the other rows text; "
        "a source must have one form.",
    ]


def test_a_row_with_the_columns_of_two_shapes_is_a_problem_where_others_have_one(complaints):
    demonstration = {"prompt": "Why?", "completion": "a"}
    rows = [demonstration, demonstration, {**demonstration, "label": True}]
    assert complaints(rows) == [
        "prefs.jsonl:3: has the shape prompt/completion/label, the others prompt/completion."
    ]


def test_unknown_columns_are_named_with_what_was_expected(complaints):
    (line,) = complaints([{"question": "Why?", "evil\x1b[31m": 1}])
    assert "(found: question, evil\\x1b[31m)" in line
    assert "one of prompt/chosen/rejected, instruction/chosen/rejected, " in line
    assert "told by data.columns.prompt=question (dpo data check: --column prompt=que" in line


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ([], "'prompt' is an empty conversation."),
        ([says("a")], "'prompt' ends with the assistant's message, expected the user's."),
        (["Why?"], "'prompt[0]' needs role and content (found: text)."),
        ([{"from": "human"}], "'prompt[0]' needs role and content (found: from)."),
        (
            [{"role": "human", "content": "Why?"}],
            "'prompt[0]' has the role 'human', expected system, user or assistant.",
        ),
        (
            [{"role": "user", "content": ["Why?"]}],
            "'prompt[0].content' is a list, expected text.",
        ),
        ([{"role": "user", "content": " "}], "'prompt' ends with an empty message."),
    ],
)
def test_a_wrong_conversation_is_said_to_the_message(complaints, messages, reason):
    rows = [{"prompt": messages, "chosen": "a", "rejected": "b"}]
    assert complaints(rows) == [f"prefs.jsonl:1: {reason}"]


def test_a_response_of_several_messages_is_an_error(complaints):
    row = {"prompt": [USER], "chosen": [says("a"), USER, says("b")], "rejected": "b"}
    assert complaints([row]) == [
        "prefs.jsonl:1: 'chosen' must be the assistant's one message after 'prompt' "
        "(assistant, user, assistant)."
    ]


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ('"responses": ["a"]', "'responses' has 1 of at least 2 responses."),
        ('"responses": "ab"', "'responses' is text, expected a list of texts."),
        ('"responses": ["a", null]', "'responses[1]' is null, expected text."),
        (
            '"responses": ["a", "b"], "scores": [1, NaN]',
            "'scores[1]' is nan, expected a finite number.",
        ),
        (
            '"responses": ["a", "b"], "scores": [1, 1e999]',
            "'scores[1]' is inf, expected a finite number.",
        ),
        (
            '"responses": ["a", "b"], "scores": [1]',
            "'scores' has 1 numbers for 2 responses.",
        ),
        (
            '"responses": ["a", "b"], "scores": [true, 1]',
            "'scores[0]' is true, expected a number.",
        ),
    ],
)
def test_a_wrong_ranking_is_said(complaints, fields, reason):
    line = '{"prompt": "Why?", ' + fields + "}\n"
    assert complaints(line.encode()) == [f"prefs.jsonl:1: {reason}"]


@pytest.mark.parametrize(
    ("label", "shown"), [(2, "a number"), (None, "null"), ("yes", "'yes'"), ([1], "a list")]
)
def test_a_wrong_label_is_said(complaints, label, shown):
    assert complaints([{"prompt": "Why?", "completion": "a", "label": label}]) == [
        f"prefs.jsonl:1: 'label' is {shown}, expected true or false (1 or 0)."
    ]


# -- where rows come from ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["none.jsonl", "./none", "/none/there", "~/none-such", "a/b/c", "data/none.csv", "none"]
)
def test_a_path_that_does_not_exist_never_reaches_the_hub(monkeypatch, name):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(InputError) as caught:
        load_rows(name)
    assert str(caught.value) == (
        f"{name}: there is no such file or folder, and it is no hub id (owner/name)."
    )


def test_a_path_object_is_never_a_hub_id(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(InputError, match=r"^owner/name: there is no such file or folder"):
        load_rows(Path("owner/name"))


def test_yaml_is_not_a_source(complaints):
    (line,) = complaints(b"- prompt: a", "prefs.yaml")
    assert line.startswith("prefs.yaml: not a data file; expected one of .jsonl, .json, .csv")


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root reads every file")
def test_a_file_that_may_not_be_read_is_an_input_error(tmp_path):
    path = tmp_path / "prefs.jsonl"
    path.write_bytes(jsonl(GOOD))
    path.chmod(0)
    with pytest.raises(InputError, match=r"prefs\.jsonl: cannot be read: Permission denied\."):
        load_rows(path)


@pytest.fixture
def hub(monkeypatch):
    """A hub that answers with `hub.answer` (raised, if it is an error) and keeps the calls."""
    fake = SimpleNamespace(answer=[GOOD], calls=[])

    def load_dataset(name, *, split, revision):
        fake.calls.append((name, split, revision))
        if isinstance(fake.answer, Exception):
            raise fake.answer
        return fake.answer

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    return fake


def test_a_hub_id_is_loaded_with_its_split_and_revision(hub):
    loaded = load_rows("owner/name", split="train", revision="abc")
    assert hub.calls == [("owner/name", "train", "abc")]
    assert loaded.rows == (PREFERENCE,)
    assert loaded.rows[0].source == "owner/name:train row 1"
    assert loaded.notes == ("hub data set owner/name:train at abc",)


def test_the_sha256_of_a_hub_data_set_changes_with_its_rows(hub):
    first = load_rows("owner/name", split="train").sha256
    assert load_rows("owner/name", split="train").sha256 == first
    hub.answer = [{**GOOD, "chosen": "Other."}]
    assert load_rows("owner/name", split="train").sha256 != first


def test_a_hub_data_set_of_several_splits_needs_one_named(hub):
    hub.answer = {"train": [GOOD], "test": [GOOD]}
    with pytest.raises(InputError, match=r"owner/name: has the splits train, test; name one"):
        load_rows("owner/name")
    hub.answer = {"train": [GOOD]}
    assert load_rows("owner/name").rows[0].source == "owner/name:train row 1"


def test_a_hub_that_cannot_be_reached_is_one_sentence(hub):
    hub.answer = ConnectionError("Couldn't reach 'owner/name' on the Hub\nlong\ntrace")
    with pytest.raises(InputError) as caught:
        load_rows("owner/name")
    assert str(caught.value) == (
        "owner/name: neither a file or folder here nor a data set that can be read from the hub: "
        "Couldn't reach 'owner/name' on the Hub"
    )


@pytest.mark.parametrize("option", ["split", "revision"])
def test_hub_options_for_a_local_file_are_refused(complaints, option):
    assert complaints([GOOD], **{option: "train"}) == [
        f"{option}: only a hub data set has one; prefs.jsonl is local."
    ]


# -- our own JSONL -----------------------------------------------------------------------------

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
FILLED = TEXT.filter(str.strip)
TURNS = st.lists(st.builds(Message, st.sampled_from(["system", "user", "assistant"]), TEXT))
CONVERSATION = st.builds(
    lambda turns, last: (*turns, Message("user", last)), TURNS.map(lambda t: t[:3]), FILLED
)
SCORE = st.floats(allow_nan=False, allow_infinity=False)


def rows_with(prompt):
    responses = st.lists(TEXT, min_size=2, max_size=4).map(tuple)
    ranked = responses.flatmap(
        lambda texts: st.builds(
            RankedRow,
            prompt,
            st.just(texts),
            st.none()
            | st.lists(SCORE, min_size=len(texts), max_size=len(texts)).map(
                lambda scores: tuple(sorted(scores, reverse=True))
            ),
        )
    )
    kinds = (
        st.builds(PreferenceRow, prompt, TEXT, TEXT),
        ranked,
        st.builds(UnpairedRow, prompt, TEXT, st.booleans()),
        st.builds(DemonstrationRow, prompt, TEXT),
    )
    return st.one_of(*(st.lists(kind, min_size=1, max_size=3).map(tuple) for kind in kinds))


@settings(max_examples=100)
@given(rows_with(FILLED) | rows_with(CONVERSATION))
def test_written_rows_are_read_back_the_same(rows):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.jsonl"
        write_jsonl(rows, path)
        assert load_rows(path).rows == rows
        assert [file.name for file in Path(folder).iterdir()] == ["rows.jsonl"]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ((), "expected rows of one type, got none"),
        (
            (PREFERENCE, DemonstrationRow("Why?", "a")),
            "got demonstration rows with a text prompt and preference rows with a text prompt",
        ),
        ((PREFERENCE, PreferenceRow(CHAT, "a", "b")), "rows with a conversation and preference"),
        ((PreferenceRow("\ud800", "a", "b"),), "a row has a lone surrogate"),
    ],
)
def test_rows_that_could_not_be_read_back_are_not_written(tmp_path, rows, message):
    path = tmp_path / "rows.jsonl"
    path.write_text("before")
    with pytest.raises(InputError, match=message):
        write_jsonl(rows, path)
    assert path.read_text() == "before"


def test_a_failed_write_leaves_the_old_file_and_no_temporary_one(tmp_path, monkeypatch):
    path = tmp_path / "rows.jsonl"
    path.write_text("before")

    def full_disk(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(StorageError, match=r"cannot be written: the disk is full"):
        write_jsonl([PREFERENCE], path)
    assert path.read_text() == "before"
    assert list(tmp_path.iterdir()) == [path]


# -- one type of row to another ----------------------------------------------------------------


def test_a_ranking_gives_every_pair_whose_order_is_strict():
    ranked = RankedRow("Why?", ("a", "b", "c"), (2.0, 1.0, 1.0), source="f:1")
    unscored = RankedRow("How?", ("x", "y", "z"))
    assert as_pairs([ranked, unscored, PREFERENCE]) == (
        PreferenceRow("Why?", "a", "b", scores=(2.0, 1.0)),
        PreferenceRow("Why?", "a", "c", scores=(2.0, 1.0)),
        PreferenceRow("How?", "x", "y"),
        PreferenceRow("How?", "x", "z"),
        PreferenceRow("How?", "y", "z"),
        PREFERENCE,
    )
    assert as_pairs([ranked])[0].source == "f:1"


def test_pairs_may_carry_scores_of_both_responses_or_of_none(tmp_path):
    rows = [
        {"prompt": "p", "chosen": "a", "rejected": "b", "chosen_score": 3, "rejected_score": 1.5},
        {"prompt": "q", "chosen": "a", "rejected": "b"},
    ]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    loaded = load_rows(str(file))
    assert [row.scores for row in loaded.rows] == [(3.0, 1.5), None]
    write_jsonl(loaded.rows, tmp_path / "again.jsonl")
    assert load_rows(str(tmp_path / "again.jsonl")).rows == loaded.rows
    rows[1]["rejected_score"] = 2
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    with pytest.raises(InputError, match=r"rows.jsonl:2: .*chosen_score.* is missing"):
        load_rows(str(file))


def test_pairs_serve_as_rankings_and_as_judged_responses():
    pair = PreferenceRow("Why?", "a", "b", source="f:1", scores=(2.0, 1.0))
    assert as_rankings([pair]) == (RankedRow("Why?", ("a", "b"), (2.0, 1.0)),)
    assert as_unpaired([pair]) == (UnpairedRow("Why?", "a", True), UnpairedRow("Why?", "b", False))
    with pytest.raises(InputError, match=r"^f:1: chosen_score 1 is below rejected_score 2"):
        as_rankings([PreferenceRow("Why?", "a", "b", source="f:1", scores=(1.0, 2.0))])
    with pytest.raises(InputError, match="all have one label"):
        as_unpaired([UnpairedRow("Why?", "a", True)])


def test_rows_without_a_preference_give_no_pairs():
    with pytest.raises(InputError, match=r"^f:3: expected preference or ranked rows, got unpaired"):
        as_pairs([UnpairedRow("Why?", "a", True, source="f:3")])
    with pytest.raises(InputError, match="no pair of responses"):
        as_pairs([RankedRow("Why?", ("a", "b"), (1.0, 1.0))])


def test_demonstrations_are_the_better_responses_and_undesirable_rows_drop_out():
    rows = (
        PREFERENCE,
        RankedRow("Why?", ("best", "worst")),
        UnpairedRow("Why?", "good", True),
        UnpairedRow("Why?", "bad", False),
    )
    assert [row.response for row in as_demonstrations(rows)] == ["Because.", "best", "good"]
    rejected = as_demonstrations(rows, response="rejected")
    assert [row.response for row in rejected] == ["No.", "worst", "bad"]


def test_a_demonstration_has_no_rejected_response():
    row = DemonstrationRow("Why?", "a", source="f:2")
    assert as_demonstrations([row]) == (row,)
    with pytest.raises(InputError, match=r"^f:2: a demonstration has no rejected response"):
        as_demonstrations([row], response="rejected")
    with pytest.raises(InputError, match="no chosen response to imitate"):
        as_demonstrations([UnpairedRow("Why?", "bad", False)])


# -- real data ---------------------------------------------------------------------------------


def shared(name):
    path = SHARED_DATA / name
    if not path.exists():
        pytest.skip(f"{name} is not beside the project (shared/data)")
    return path


def test_the_instruction_preferences_are_read_whole():
    path = shared("instruction-preferences.json")
    loaded = load_rows(path)
    originals = json.loads(path.read_text(encoding="utf-8"))
    assert len(loaded.rows) == 1100
    assert loaded.ignored_columns == ("output",)
    assert sum(row.chosen == row.rejected for row in loaded.rows) == 6
    assert len({row.prompt for row in loaded.rows}) == 1075
    assert [row.chosen for row in loaded.rows] == [original["chosen"] for original in originals]


def test_no_character_of_the_hh_dialogues_is_lost():
    path = shared("hh-harmless-sample.jsonl")
    loaded = load_rows(path)
    originals = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
    assert len(loaded.rows) == len(originals) == 1156
    assert loaded.shape == "chosen/rejected, text"
    for row, original in zip(loaded.rows, originals, strict=True):
        assert row.prompt + row.chosen == original["chosen"], row.source
        assert row.prompt + row.rejected == original["rejected"], row.source
        assert row.prompt.endswith("\n\nAssistant:"), row.source
