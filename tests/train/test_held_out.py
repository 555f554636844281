"""The held-out pairs that a run leaves: what is in them, and that a resumed run leaves the same."""

import json
import signal

import pytest
import torch
from small_runs import dpo_config, dpo_run, forked, sft_run, sha256

from dpo.data.tokenize import TokenSequence
from dpo.errors import InputError
from dpo.train.encoded import (
    KINDS,
    EncodedJudgement,
    EncodedPair,
    EncodedRanking,
)
from dpo.train.held_out import (
    HELD_OUT,
    compared,
    held_out_pairs,
    read_held_out,
    sequence_logps,
    token_overlap,
    write_displaced,
)
from dpo.train.jobs import train_preference
from dpo.train.run import Run, read_metrics


def sequence(prompt, response):
    return TokenSequence((*prompt, *response), len(prompt))


def held_out(folder):
    return [row for row in read_metrics(folder) if "eval/loss" in row]


def mean(values):
    return sum(values) / len(values)


# -- the file of a run -----------------------------------------------------------------------------


def test_the_means_of_the_pairs_are_the_metrics_of_the_last_evaluation():
    pairs, last = read_held_out(dpo_run()), held_out(dpo_run())[-1]
    assert len(pairs) == 16  # evaluation.max_rows
    assert mean([p.chosen_logp for p in pairs]) == pytest.approx(last["eval/logps/chosen"])
    assert mean([p.rejected_logp for p in pairs]) == pytest.approx(last["eval/logps/rejected"])
    change = mean([p.chosen_logp - p.reference_chosen_logp for p in pairs])
    assert change == pytest.approx(last["eval/logps/chosen_change"], abs=1e-9)


def test_the_start_is_the_reference_where_training_starts_from_it():
    for pair in read_held_out(dpo_run()):
        assert pair.start_chosen_logp == pytest.approx(pair.reference_chosen_logp, abs=1e-4)
        assert pair.start_rejected_logp == pytest.approx(pair.reference_rejected_logp, abs=1e-4)
        assert pair.chosen_change == pair.chosen_logp - pair.start_chosen_logp != 0


def test_rows_are_told_apart_and_prompts_that_are_equal_are_one():
    pairs = read_held_out(dpo_run())
    assert [pair.row for pair in pairs] == list(range(16))
    assert len({pair.source for pair in pairs}) == 16
    assert {pair.subset for pair in pairs} <= {"capital", "opposite", "young", "past"}
    assert {pair.prompt for pair in pairs} == set(range(len({pair.prompt for pair in pairs})))


def test_a_loss_without_a_reference_knows_its_start_all_the_same(tmp_path):
    folder = train_preference(dpo_config(tmp_path / "run", {"loss.name": "simpo"}))
    pairs, first = read_held_out(folder), held_out(folder)[0]
    assert {pair.reference_chosen_logp for pair in pairs} == {None}
    assert mean([p.start_chosen_logp for p in pairs]) == pytest.approx(first["eval/logps/chosen"])
    assert any(pair.chosen_change != 0 for pair in pairs)


def test_a_run_that_was_killed_leaves_the_same_pairs_bit_for_bit(tmp_path):
    expected, folder = sha256(dpo_run() / HELD_OUT), tmp_path / "run"
    sft_run()
    log = Run.log

    def killed():
        def logged(run, row):
            log(run, row)
            if row["step"] == 5:
                signal.raise_signal(signal.SIGKILL)

        Run.log = logged
        train_preference(dpo_config(folder))

    assert forked(killed) == -signal.SIGKILL
    assert sha256(folder / HELD_OUT) != expected  # that of step 3
    train_preference(dpo_config(folder))
    assert sha256(folder / HELD_OUT) == expected


def test_where_the_start_was_not_written_down_it_is_not_made_up(tmp_path):
    """A run that an older version began."""
    folder = tmp_path / "run"
    sft_run()
    log = Run.log

    def killed():
        def logged(run, row):
            log(run, row)
            if row["step"] == 5:
                (folder / HELD_OUT).unlink()
                signal.raise_signal(signal.SIGKILL)

        Run.log = logged
        train_preference(dpo_config(folder))

    assert forked(killed) == -signal.SIGKILL
    pairs = read_held_out(train_preference(dpo_config(folder)))
    assert {pair.start_chosen_logp for pair in pairs} == {None}
    for pair in pairs:  # the reference stands for it
        assert pair.chosen_change == pair.chosen_logp - pair.reference_chosen_logp


def test_the_most_displaced_pairs_are_shown_as_text_worst_first():
    lines = (dpo_run() / "samples" / "displaced.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    pairs = {pair.row: pair for pair in read_held_out(dpo_run())}
    changes = [row["chosen_change"] for row in rows]
    assert changes == sorted(pair.chosen_change for pair in pairs.values())[:20]
    for row in rows:
        assert pairs[row["row"]].chosen_change == row["chosen_change"]
        assert row["chosen"] != row["rejected"]
        assert row["prompt"].endswith(("?", "."))  # of the embedded language


@pytest.mark.parametrize("text", ["row,source\n1,2\n", "row\nx\n", "nothing"])
def test_a_damaged_file_is_named(tmp_path, text):
    (tmp_path / HELD_OUT).write_text(text + "1\n")
    with pytest.raises(InputError, match=r"held_out\.csv"):
        read_held_out(tmp_path)


def test_without_a_file_there_are_no_pairs(tmp_path):
    assert read_held_out(tmp_path) == []
    write_displaced(tmp_path, None, [], [])
    assert list(tmp_path.iterdir()) == []


# -- pairs of every kind of row --------------------------------------------------------------------

PAIRS = [
    EncodedPair(sequence([1], [2, 3]), sequence([1], [4]), "a:1"),
    EncodedPair(sequence([5, 6], [2]), sequence([5, 6], [3]), "a:2"),
]
RANKINGS = [
    EncodedRanking(tuple(sequence([1], [r]) for r in (2, 3, 4)), (0, 1, 1), "a:1"),
    EncodedRanking(tuple(sequence([5], [r]) for r in (2, 3)), (0, 1), "a:2"),
]
JUDGED = [
    EncodedJudgement(sequence([prompt], [response]), sequence([prompt], [9]), desirable, "a")
    for prompt, response, desirable in (
        (1, 2, False),
        (1, 3, True),
        (5, 2, True),
        (1, 4, True),
        (1, 5, False),
        (6, 2, False),
    )
]


@pytest.mark.parametrize(
    ("kind", "rows", "expected"),
    [
        ("pair", PAIRS, [(0, (2, 3), (4,)), (1, (2,), (3,))]),
        ("list", RANKINGS, [(0, (2,), (3,)), (0, (2,), (4,)), (1, (2,), (3,))]),
        # within prompt 1 the first desirable with the first undesirable one, and so on
        ("unpaired", JUDGED, [(1, (3,), (2,)), (3, (4,), (5,))]),
    ],
)
def test_what_is_compared(kind, rows, expected):
    sequences = KINDS[kind].sequences(rows)
    found = [
        (row, *(sequences[place].ids[sequences[place].prompt_length :] for place in places))
        for row, *places in compared(rows)
    ]
    assert found == expected


@pytest.mark.parametrize(
    ("kind", "rows"), [("pair", PAIRS), ("list", RANKINGS), ("unpaired", JUDGED)]
)
def test_log_probabilities_come_back_in_the_order_of_the_sequences(kind, rows):
    of_kind = KINDS[kind]
    given = torch.arange(len(of_kind.sequences(rows)), dtype=torch.float64)
    tensors = of_kind.tensors(rows, "policy", given) | of_kind.facts(rows, given.device)
    assert sequence_logps(tensors, "policy").tolist() == given.tolist()
    assert sequence_logps(tensors, "reference") is None


def test_a_pair_has_the_numbers_of_its_own_sequences():
    logps = dict(enumerate([-1.0, -2.0, -3.0, -4.0, -5.0]))
    found = held_out_pairs(RANKINGS, KINDS["list"].sequences(RANKINGS), logps, {})
    assert [(p.chosen_logp, p.rejected_logp) for p in found] == [(-1, -2), (-1, -3), (-4, -5)]
    assert [pair.prompt for pair in found] == [0, 0, 1]
    assert {pair.reference_chosen_logp for pair in found} == {None}


def test_overlap_by_hand():
    assert token_overlap([1, 2, 3], [1, 2, 3]) == 1
    assert token_overlap([1, 2], [3]) == 0
    assert token_overlap([1, 1, 2], [1, 3, 3]) == pytest.approx(1 / 3)
