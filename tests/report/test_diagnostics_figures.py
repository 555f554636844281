"""The figures of a diagnosis with their numbers, what is printed, and `dpo diagnose`."""

import csv
import json
import shutil

import numpy as np
import pytest

from dpo.evaluate.diagnostics import diagnose
from dpo.evaluate.held_out_pairs import HeldOut
from dpo.evaluate.readings import Diagnosis, Reading
from dpo.report.diagnostics_figures import (
    displacement_figure,
    leave_diagnosis,
    length_controlled_figure,
    print_readings,
    subsets_figure,
)
from dpo.train.held_out import read_held_out
from train.small_runs import dpo, dpo_run, evaluation, sha256

FIGURES = ("displacement", "length", "subsets", "calibration")


def table(file):
    return list(csv.DictReader(file.read_text(encoding="utf-8").splitlines()))


@pytest.fixture(scope="module")
def copied(tmp_path_factory):
    """What a diagnosis reads of a run, and nothing else."""
    folder = tmp_path_factory.mktemp("copied")
    for name in ("held_out.csv", "metrics.jsonl", "config.json"):
        shutil.copy(dpo_run() / name, folder)
    (folder / "samples").mkdir()
    shutil.copy(dpo_run() / "samples" / "final.jsonl", folder / "samples")
    return folder


def test_dpo_train_leaves_what_dpo_diagnose_makes_of_its_files(copied, tmp_path):
    said = dpo("diagnose", copied, "--out", tmp_path / "out")
    assert said.code == 0, said.all
    assert sha256(tmp_path / "out" / "diagnostics.json") == sha256(dpo_run() / "diagnostics.json")
    for name in FIGURES:
        for suffix in ("png", "svg", "csv"):
            there, here = (
                d / "figures" / f"{name}.{suffix}" for d in (dpo_run(), tmp_path / "out")
            )
            assert sha256(there) == sha256(here)
    assert not (copied / "diagnostics.json").exists()
    assert "checks without a finding" in said.out


def test_an_evaluation_is_diagnosed_where_it_is(tmp_path):
    folder = tmp_path / "evaluation"
    folder.mkdir()
    shutil.copy(evaluation() / "scored.jsonl", folder)
    said = dpo("diagnose", folder)
    assert said.code == 0, said.all
    content = json.loads((folder / "diagnostics.json").read_text())
    assert {row["model"] for row in content["numbers"]["generations"]} == {"sft", "dpo"}
    rows = table(folder / "figures" / "length_controlled.csv")
    assert [row["a"] for row in rows] == ["dpo", "dpo"]  # at both temperatures
    for row, numbers in zip(rows, content["numbers"]["length_controlled"], strict=True):
        assert float(row["win_rate"]) == numbers["win_rate"]
        assert [float(row[f"interval_{end}"]) for end in ("low", "high")] == numbers["interval"]


def test_a_folder_that_is_neither_is_refused_in_a_sentence(tmp_path):
    said = dpo("diagnose", tmp_path)
    assert said.code == 2
    assert "nothing to diagnose" in said.err


def test_the_histogram_holds_every_pair_once_and_the_lines_are_the_metrics(tmp_path):
    pairs = HeldOut.of_run(dpo_run())
    along = diagnose(dpo_run()).numbers["displacement"]["over_training"]
    rows = table(displacement_figure(pairs, along, tmp_path / "displacement")[-1])
    for side, changes in zip(("chosen", "rejected"), pairs.changes, strict=True):
        bins = [row for row in rows if (row["panel"], row["side"]) == ("pairs", side)]
        assert sum(int(row["value"]) for row in bins) == pairs.num == len(changes)
        below = sum(int(row["value"]) for row in bins if float(row["x_end"]) <= np.median(changes))
        assert below <= pairs.num / 2
        means = [row for row in rows if (row["panel"], row["side"]) == ("mean", side)]
        assert [float(row["x"]) for row in means] == [0, 3, 6]
        assert float(means[-1]["value"]) == pytest.approx(changes.mean(), abs=1e-3)


def test_the_points_of_the_length_figure_name_their_rows():
    rows = table(dpo_run() / "figures" / "length.csv")
    pairs = read_held_out(dpo_run())
    assert [row["source"] for row in rows] == [pair.source for pair in pairs]
    for row, pair in zip(rows, pairs, strict=True):
        assert float(row["length_difference_tokens"]) == pair.chosen_tokens - pair.rejected_tokens


def test_subsets_are_drawn_whatever_their_names(tmp_path):
    subsets = [
        {"subset": name, "n": 3, "accuracy": 2 / 3, "interval": (0.2, 0.9)}
        | {"difference": 0.0, "p": 1.0, "p_holm": 1.0}
        for name in ("$x$", "a_b^c", "\x1b[31m", "")
    ]
    files = subsets_figure(subsets, by="subset", whole=0.5, out_stem=tmp_path / "subsets")
    assert [row["subset"] for row in table(files[-1])][:2] == ["$x$", "a_b^c"]
    assert all(file.stat().st_size > 0 for file in files)


def test_a_single_comparison_is_drawn(tmp_path):
    row = {"judge": "cosines", "a": "dpo", "b": "sft", "temperature": None, "n": 5, "raw": 0.6}
    row |= {"raw_interval": (0.4, 0.8), "win_rate": 0.5, "interval": (0.3, 0.7)}
    assert length_controlled_figure([row], tmp_path / "figure")


def test_only_warnings_and_notes_are_printed_the_graver_first(tmp_path, capsys):
    readings = [
        Reading("ok", "Fine", "Nothing here."),
        Reading("note", "Of note", "So it is.", "Perhaps this."),
        Reading("warning", "Grave", "It \x1b[31mis [bold]so[/bold].", "Do that."),
    ]
    print_readings(Diagnosis("run", {}, readings), tmp_path)
    out = " ".join(capsys.readouterr().out.split())
    assert out.index("Warning: Grave.") < out.index("Note: Of note.")
    assert "Fine" not in out
    assert "\x1b[31m" not in out
    assert "[bold]so[/bold]" in out
    assert "Do that." in out
    assert "1 checks without a finding" in out


def test_a_run_of_judged_responses_without_pairs_is_diagnosed_by_what_it_has(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 0, "eval/loss": 0.5}\n')
    found = leave_diagnosis(tmp_path)
    assert (found.numbers, found.readings) == ({}, [])
    assert not (tmp_path / "figures").exists()
