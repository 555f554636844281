"""One annotator's way through the pairs: blind, resumable, and back again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from arena_folders import NAMES, evaluation_folder, scored, write_evaluation
from dpo.errors import InputError, StorageError
from dpo.evaluate.arena.judgements import JudgementFile, read_events, read_judgements
from dpo.evaluate.arena.pairs import deal, make_pairs, read_answers
from dpo.evaluate.arena.session import Session


class Clock:
    """Seconds that pass when told to."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


class Table:
    """A session on a folder, left and sat down at again as often as one likes."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.path = folder, folder / "judgements.jsonl"
        self.clock = Clock()
        self.file: JudgementFile | None = None

    def sit_down(self, *, annotator="ann", seed=0) -> Session:
        self.leave()
        self.file = JudgementFile(self.path)
        pairs = deal(make_pairs(read_answers([self.folder]), *NAMES), seed=seed)
        return Session(pairs, self.file, annotator=annotator, seed=seed, clock=self.clock)

    def leave(self) -> None:
        if self.file is not None:
            self.file.close()

    def lines(self) -> list[dict]:
        return [json.loads(line) for line in self.path.read_text().splitlines()]


@pytest.fixture
def table(tmp_path):
    made = Table(evaluation_folder(tmp_path / "e"))
    yield made
    made.leave()


def judge(session, choice):
    shown = session.state()["pair"]
    session.judge(shown["id"], choice)
    return shown


def judge_all(session, choice="left"):
    while session.state()["pair"] is not None:
        judge(session, choice)


# -- what is told and what is written --------------------------------------------------------------


def test_names_are_told_only_when_every_pair_is_judged(table):
    session = table.sit_down()
    for _ in range(4):
        told = json.dumps(session.state())
        assert "Question" in told
        assert not any(name in told for name in NAMES)
        assert "chosen" not in told
        judge(session, "left")
    told = json.dumps(session.state())
    assert all(name in told for name in NAMES)


def test_the_answers_of_one_model_stand_on_both_sides(tmp_path):
    table = Table(evaluation_folder(tmp_path / "e", num_prompts=30))
    session = table.sit_down()
    first_on_the_left = [judge(session, "tie")["left"].startswith("Answer x") for _ in range(30)]
    table.leave()
    assert 5 < sum(first_on_the_left) < 25
    assert [line["left"] for line in table.lines()] == [
        "a" if first else "b" for first in first_on_the_left
    ]


@pytest.mark.parametrize("choice", ["left", "right", "tie", "skip"])
def test_a_choice_is_written_from_the_side_of_a(table, choice):
    session = table.sit_down()
    for number in range(4):
        shown = judge(session, choice)
        line = table.lines()[number]
        better = shown.get(choice, "")
        said = "win" if better.startswith("Answer x") else "loss"
        assert line["verdict"] == (choice if choice in ("tie", "skip") else said)
        assert (line["a"], line["b"]) == NAMES
        assert line["pair"] == shown["id"]
        assert line["sentence_bert"] == "win"  # the first model has the larger margin
        assert (line["temperature"], line["sample"], line["annotator"]) == (1.0, 0, "ann")
    assert {line["left"] for line in table.lines()} == {"a", "b"}


def test_seconds_are_those_from_shown_to_judged(table):
    session = table.sit_down()
    table.clock.now = 10.0
    pair = session.state()["pair"]["id"]
    table.clock.now = 12.5
    session.state()  # the page was loaded again: the pair was seen before
    table.clock.now = 14.25
    session.judge(pair, "tie")
    table.clock.now = 20.0
    judge(session, "tie")
    assert [line["seconds"] for line in table.lines()] == [4.25, 0.0]


def test_a_pair_that_comes_back_is_timed_anew(table):
    session = table.sit_down()
    judge_all(session)
    session.state()
    table.clock.now = 100.0
    session.undo()
    shown = session.state()["pair"]["id"]
    table.clock.now = 103.0
    session.judge(shown, "tie")
    assert table.lines()[-1]["seconds"] == 3.0


def test_a_pair_that_is_not_shown_is_not_judged(table):
    session = table.sit_down()
    first = judge(session, "left")
    with pytest.raises(InputError, match="no longer the one to judge"):
        session.judge(first["id"], "right")
    assert len(table.lines()) == 1


def test_progress_counts_up_to_all(table):
    session = table.sit_down()
    seen = []
    while True:
        state = session.state()
        seen.append((state["done"], state["total"]))
        if state["pair"] is None:
            break
        judge(session, "right")
    assert seen == [(0, 4), (1, 4), (2, 4), (3, 4), (4, 4)]


# -- identical answers -----------------------------------------------------------------------------


def test_identical_answers_are_ties_that_nobody_is_shown(tmp_path):
    records = [
        scored(name, i, f"Same {i}." if i < 2 else f"{name}") for name in NAMES for i in (0, 1, 2)
    ]
    table = Table(write_evaluation(tmp_path / "e", records))
    session = table.sit_down()
    assert (session.state()["total"], session.state()["identical"]) == (1, 2)
    judge_all(session)
    summary = session.summary()
    assert (summary.ties, summary.identical, summary.num_prompts) == (0, 2, 1)
    table.sit_down()
    table.leave()
    assert [line["left"] is None for line in table.lines()] == [True, True, False]  # once


def test_an_identical_tie_is_never_undone(tmp_path):
    table = Table(write_evaluation(tmp_path / "e", [scored(name, 0, "Same.") for name in NAMES]))
    session = table.sit_down()
    assert session.state()["pair"] is None
    with pytest.raises(InputError, match="nothing to undo"):
        session.undo()
    table.leave()


# -- going on --------------------------------------------------------------------------------------


def test_a_restart_shows_no_pair_again(table):
    session = table.sit_down()
    shown = [judge(session, "left")["id"] for _ in range(2)]
    session = table.sit_down()
    assert session.state()["done"] == 2
    while (pair := session.state()["pair"]) is not None:
        assert pair["id"] not in shown
        shown.append(judge(session, "right")["id"])
    assert len(set(shown)) == 4


def test_a_restart_with_another_seed_shows_no_pair_again(table):
    session = table.sit_down()
    shown = {judge(session, "left")["id"] for _ in range(2)}
    session = table.sit_down(seed=5)
    shown |= {judge(session, "left")["id"] for _ in range(2)}
    assert session.state()["pair"] is None
    assert len(shown) == 4


def test_another_annotator_starts_anew_in_the_same_file(table):
    judge_all(table.sit_down())
    session = table.sit_down(annotator="bob")
    assert session.state()["done"] == 0
    judge_all(session, "right")
    assert session.summary().annotators == ("ann", "bob")
    assert session.summary().agreements[0].n == 4


def test_answers_that_changed_are_judged_anew(table):
    judge_all(table.sit_down())
    file = table.folder / "scored.jsonl"
    file.write_text(file.read_text().replace("Answer x0.", "A new answer."))
    session = table.sit_down()
    assert (session.state()["done"], session.state()["total"]) == (3, 4)
    assert session.state()["pair"]["prompt"] == "Question 0?"


def test_a_skipped_pair_comes_back_at_the_next_start_and_not_before(table):
    session = table.sit_down()
    skipped = judge(session, "skip")["id"]
    judge_all(session)
    assert session.summary().skipped == 1
    session = table.sit_down()
    assert session.state()["pair"]["id"] == skipped
    judge(session, "tie")
    assert session.summary().skipped == 0
    assert session.state()["pair"] is None


# -- back again ------------------------------------------------------------------------------------


def test_undo_takes_back_the_last_and_shows_it_again(table):
    session = table.sit_down()
    judge(session, "left")
    second = judge(session, "left")
    session.undo()
    assert session.state()["pair"] == second
    assert session.state()["done"] == 1
    assert table.lines()[-1]["retracts"] == second["id"]
    session.judge(second["id"], "tie")
    assert [x.verdict for x in read_judgements([table.path])][-1] == "tie"
    events, _ = read_events(table.path)
    assert len(events) == 4


def test_undo_goes_back_beyond_a_restart(table):
    first = judge(table.sit_down(), "left")
    session = table.sit_down()
    session.undo()
    assert session.state()["pair"] == first
    assert read_judgements([table.path]) == []
    session = table.sit_down()
    assert session.state()["done"] == 0


def test_undo_at_the_end_and_after_a_skip(table):
    session = table.sit_down()
    judge_all(session, "skip")
    session.undo()
    assert session.state()["pair"] is not None
    judge(session, "left")
    assert session.summary().skipped == 3


def test_a_verdict_that_cannot_be_written_is_not_made(table, monkeypatch):
    session = table.sit_down()
    shown = session.state()["pair"]

    def full(event):
        raise StorageError("the disk is full")

    with monkeypatch.context() as patched:
        patched.setattr(table.file, "append", full)
        with pytest.raises(StorageError):
            session.judge(shown["id"], "left")
    assert session.state()["pair"] == shown
    session.judge(shown["id"], "left")
    assert len(table.lines()) == 1
