"""What is written of judgements, what is read back, and what it sums up to."""

from __future__ import annotations

import errno
import json
import os
from dataclasses import replace

import pytest

from dpo.core.stats import clustered_wilson_interval
from dpo.errors import InputError, StorageError
from dpo.evaluate.arena.judgements import (
    Judgement,
    JudgementFile,
    Retraction,
    describe,
    read_events,
    read_judgements,
    standing_judgements,
    summarise,
    summary_of,
)

NOW = "2026-01-02T03:04:05+00:00"


def judgement(pair="1", verdict="win", *, prompt="p", left="a", annotator="ann", **others):
    values = {"a": "A", "b": "B", "temperature": 1.0, "sample": 0, "seconds": 2.0, **others}
    return Judgement(
        pair=pair,
        prompt_digest=prompt,
        left=left,
        verdict=verdict,
        annotator=annotator,
        timestamp=NOW,
        **values,
    )


def retraction(pair="1", annotator="ann"):
    return Retraction(retracts=pair, annotator=annotator, timestamp=NOW)


def written(path, *events):
    file = JudgementFile(path)
    for event in events:
        file.append(event)
    file.close()
    return path


# -- the file --------------------------------------------------------------------------------------


def test_a_line_holds_one_judgement_with_all_its_fields(tmp_path):
    path = written(tmp_path / "j.jsonl", judgement(sentence_bert="loss"))
    assert json.loads(path.read_text()) == {
        "pair": "1",
        "prompt_digest": "p",
        "a": "A",
        "b": "B",
        "temperature": 1.0,
        "sample": 0,
        "left": "a",
        "verdict": "win",
        "annotator": "ann",
        "seconds": 2.0,
        "timestamp": NOW,
        "sentence_bert": "loss",
    }


def test_what_is_written_is_read_back(tmp_path):
    events = [judgement(), retraction(), judgement(verdict="skip"), judgement("2", left=None)]
    assert read_events(written(tmp_path / "j.jsonl", *events)) == (events, 0)


def test_a_retraction_is_one_more_line_and_no_line_changes(tmp_path):
    path = written(tmp_path / "j.jsonl", judgement())
    before = path.read_bytes()
    written(path, retraction())
    assert path.read_bytes().startswith(before)
    assert len(path.read_text().splitlines()) == 2
    assert read_judgements([path]) == []


def test_the_last_word_on_a_pair_counts_and_is_the_latest():
    one, two, again = judgement("1"), judgement("2"), judgement("1", "loss")
    assert standing_judgements([one, two, again]) == [two, again]
    assert standing_judgements([one, two, retraction("1")]) == [two]
    assert standing_judgements([one, retraction("1", "somebody else")]) == [one]
    other = replace(one, annotator="bob")
    assert standing_judgements([one, other, retraction("1")]) == [other]


def test_a_file_that_is_open_is_refused_to_a_second_writer(tmp_path):
    file = JudgementFile(tmp_path / "j.jsonl")
    with pytest.raises(InputError, match="another dpo arena is writing to it"):
        JudgementFile(tmp_path / "j.jsonl")
    file.close()
    JudgementFile(tmp_path / "j.jsonl").close()


@pytest.mark.parametrize("kept", [1, 30, -1])
def test_a_torn_last_line_was_never_kept_and_the_next_stands_alone(tmp_path, kept):
    path = written(tmp_path / "j.jsonl", judgement("1"), judgement("2"))
    first, second = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(first + second[:-1][:kept])
    assert read_judgements([path]) == [judgement("1")]
    written(path, judgement("3"))
    assert read_judgements([path]) == [judgement("1"), judgement("3")]
    assert path.read_bytes().startswith(first)


def test_a_last_line_that_only_lacks_its_end_counts(tmp_path):
    path = written(tmp_path / "j.jsonl", judgement("1"))
    path.write_bytes(path.read_bytes()[:-1])
    assert read_judgements([path]) == [judgement("1")]
    written(path, judgement("2"))
    assert read_judgements([path]) == [judgement("1"), judgement("2")]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b'{"prompt": "p", "chosen": "c"}\n', "j.jsonl:1: not a line of dpo arena"),
        (b'{"prompt": "p", "chosen": "c"}', "j.jsonl:1: not a line of dpo arena"),
        (b"\xff\xfe\n", "j.jsonl:1: not a line of dpo arena"),
    ],
    ids=["data", "data without a line end", "no text"],
)
def test_a_file_of_something_else_is_refused_and_left_as_it_was(tmp_path, content, says):
    path = tmp_path / "j.jsonl"
    path.write_bytes(content)
    with pytest.raises(InputError, match=says):
        JudgementFile(path)
    assert path.read_bytes() == content


def test_a_damaged_line_in_the_middle_is_named(tmp_path):
    path = written(tmp_path / "j.jsonl", judgement("1"), judgement("2"), judgement("3"))
    lines = path.read_text().splitlines(keepends=True)
    path.write_text(lines[0] + lines[1].replace('"win"', '"draw"') + lines[2])
    with pytest.raises(InputError, match=r"j\.jsonl:2: not a line of dpo arena: .*verdict"):
        read_judgements([path])


def test_only_a_jsonl_name_is_taken(tmp_path):
    with pytest.raises(InputError, match="expected a name that ends in"):
        JudgementFile(tmp_path / "model.safetensors")
    assert not [*tmp_path.iterdir()]


def test_a_place_that_cannot_be_written_is_one_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="cannot be written"):
        JudgementFile(tmp_path / "file" / "j.jsonl")


def test_a_full_disk_leaves_no_half_line(tmp_path, monkeypatch):
    file = JudgementFile(tmp_path / "j.jsonl")
    file.append(judgement("1"))
    before = file.path.read_bytes()

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        with pytest.raises(StorageError, match="the disk is full"):
            file.append(judgement("2"))
    assert file.path.read_bytes() == before
    file.append(judgement("3"))
    file.close()
    assert read_judgements([file.path]) == [judgement("1"), judgement("3")]


def test_people_of_one_name_in_two_files_are_two_people(tmp_path):
    one = written(tmp_path / "1.jsonl", judgement("1"), judgement("2", annotator="bob"))
    two = written(tmp_path / "2.jsonl", judgement("1"))
    names = [x.annotator for x in read_judgements([one, two])]
    assert names == [f"ann ({one})", "bob", f"ann ({two})"]


def test_a_file_that_is_not_there_is_said(tmp_path):
    with pytest.raises(InputError, match=r"missing\.jsonl: cannot be read: No such file"):
        read_judgements([tmp_path / "missing.jsonl"])


# -- the summary -----------------------------------------------------------------------------------

COUNTED = [
    judgement("1", "win", prompt="p1", left="a", seconds=1.0),
    judgement("2", "win", prompt="p1", left="b", seconds=4.0, sample=1),
    judgement("3", "loss", prompt="p2", left="a", seconds=2.0),
    judgement("4", "win", prompt="p3", left="b", seconds=9.0),
    judgement("5", "tie", prompt="p4", left="b", seconds=3.0),
    judgement("6", "tie", prompt="p5", left=None, seconds=None),
    judgement("7", "skip", prompt="p6", left="a", seconds=60.0),
]
"""Wins 3 of 4 decided on three prompts; on the left won: the first alone."""


def test_the_summary_is_what_is_counted_by_hand():
    summary = summary_of("A", "B", COUNTED)
    assert (summary.wins, summary.losses, summary.ties) == (3, 1, 1)
    assert (summary.identical, summary.skipped, summary.num_prompts) == (1, 1, 4)
    assert summary.win_rate.value == 0.75
    assert summary.win_rate.n == 4
    won, prompts = [1, 1, 0, 1], ["p1", "p1", "p2", "p3"]
    assert summary.win_rate.interval == clustered_wilson_interval(won, prompts)
    assert summary.win_rate.interval != clustered_wilson_interval(won, range(4))
    assert (summary.prompts_a, summary.prompts_b) == (2, 1)
    assert summary.sign_test_p == 1.0  # 2 of 3 fair coins or more, twice: 8/8
    assert summary.left_wins.value == 0.25
    assert summary.median_seconds == 3.0
    assert summary.annotators == ("ann",)


def test_the_sign_test_has_one_vote_a_prompt():
    samples = [judgement(f"{i}", "win", prompt="p", sample=i) for i in range(20)]
    others = [judgement(f"x{i}", "win", prompt=f"p{i}") for i in range(4)]
    summary = summary_of("A", "B", [*samples, *others])
    assert (summary.prompts_a, summary.prompts_b) == (5, 0)
    assert summary.sign_test_p == pytest.approx(2 / 2**5)


def test_a_prompt_won_as_often_as_lost_has_no_vote():
    both = [judgement("1", "win"), judgement("2", "loss", sample=1)]
    summary = summary_of("A", "B", both)
    assert (summary.prompts_a, summary.prompts_b, summary.sign_test_p) == (0, 0, 1.0)


def test_each_two_responders_have_their_own_summary():
    others = [judgement("1", "loss", b="C"), judgement("2", "win", b="C", prompt="q")]
    first, second = summarise([judgement(), *others])
    assert (first.a, first.b, first.wins, first.losses) == ("A", "B", 1, 0)
    assert (second.a, second.b, second.wins, second.losses) == ("A", "C", 1, 1)


def test_an_identical_pair_counts_once_however_many_annotators_there_are():
    pair = judgement("1", "tie", left=None, seconds=None)
    assert summary_of("A", "B", [pair, replace(pair, annotator="bob")]).identical == 1


def test_nothing_judged_is_said_and_not_divided_by():
    summary = summary_of("A", "B", [])
    assert summary.win_rate.value is None
    assert summary.median_seconds is None
    assert dict(describe(summary))["Win rate of A against B"] == "nothing decided"


def verdicts(annotator, *said):
    return [
        judgement(f"{i}", verdict, prompt=f"p{i}", annotator=annotator)
        for i, verdict in enumerate(said)
        if verdict is not None
    ]


def test_two_annotators_agree_by_cohens_kappa_on_the_pairs_of_both():
    ann = verdicts("ann", "win", "win", "loss", "tie", "win", None)
    bob = verdicts("bob", "win", "loss", "loss", "tie", "skip", "win")
    (row,) = summary_of("A", "B", [*ann, *bob]).agreements
    assert (row.judge_a, row.judge_b, row.n) == ("ann", "bob", 4)
    assert row.agreement == 0.75
    # Chance: 1/2 * 1/4 + 1/4 * 1/2 + 1/4 * 1/4 = 5/16.
    assert row.kappa == pytest.approx((3 / 4 - 5 / 16) / (1 - 5 / 16))


def test_answers_that_changed_between_two_annotators_are_not_the_same_comparison():
    said = [judgement("before"), judgement("after", "loss", annotator="bob")]
    (row,) = summary_of("A", "B", said).agreements
    assert (row.n, row.agreement) == (0, None)
    text = dict(describe(summary_of("A", "B", said)))["ann and bob agree"]
    assert text == "no pair judged by both"


def test_people_are_compared_with_sentence_bert_where_it_has_a_verdict():
    said = [
        judgement("1", "win", prompt="p1", sentence_bert="win"),
        judgement("2", "win", prompt="p2", sentence_bert="loss"),
        judgement("3", "loss", prompt="p3", sentence_bert="loss"),
        judgement("4", "loss", prompt="p4"),
    ]
    (row,) = summary_of("A", "B", said).agreements
    assert (row.judge_a, row.judge_b, row.n) == ("ann", "Sentence-BERT", 3)
    assert row.agreement == pytest.approx(2 / 3)
    text = dict(describe(summary_of("A", "B", said)))["ann and Sentence-BERT agree"]
    assert text.startswith("66.7% of 3 pairs; Cohen's kappa 0.40")


def test_the_description_says_every_number():
    lines = dict(describe(summary_of("A", "B", COUNTED)))
    assert lines["Win rate of A against B"].startswith("75.0% [")
    assert lines["Win rate of A against B"].endswith("], n = 4")
    assert lines["Verdicts"].startswith("3 won, 1 lost, 1 tied, on 4 prompts")
    assert lines["Sign test over prompts"] == "2 to A, 1 to B, p = 1.000"
    assert lines["Answer on the left won"].startswith("25.0% [")
    assert lines["Identical answers"].startswith("1 pairs")
    assert lines["Skipped"].startswith("1;")
    assert lines["Median time for a pair"] == "3.0 s"
