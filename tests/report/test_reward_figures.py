"""The reliability diagram of a reward model and the numbers under it."""

import csv
import json
import math

import pytest

from dpo.core.stats import pair_calibration
from dpo.report.reward import calibration_figure, held_out_calibration


def logit(p):
    return math.log(p / (1 - p))


def test_the_figure_and_its_numbers(tmp_path):
    found = pair_calibration([logit(0.9), -logit(0.9), logit(0.6)])
    files = calibration_figure(found, tmp_path / "calibration")
    assert [f.suffix for f in files] == [".png", ".svg", ".csv"]
    assert all(f.stat().st_size > 0 for f in files)
    rows = list(csv.DictReader(files[2].read_text().splitlines()))
    assert [(r["n"], float(r["accuracy"])) for r in rows] == [("1", 1.0), ("2", 0.5)]
    assert float(rows[1]["confidence"]) == pytest.approx(0.9)
    assert all(float(r["low"]) <= float(r["accuracy"]) <= float(r["high"]) for r in rows)


def test_one_bin_is_drawn_as_well(tmp_path):
    assert calibration_figure(pair_calibration([0.0, 0.0]), tmp_path / "calibration")


def test_the_pairs_of_a_run_are_the_ordered_ones_of_its_samples(tmp_path):
    (tmp_path / "samples").mkdir()
    rows = [
        {"rewards": [1.0, 0.0, 2.0], "ranks": [0, 1, 1]},
        {"rewards": [3.0, 1.0], "ranks": [0, 1]},
    ]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "samples" / "held_out.jsonl").write_text(text)
    assert held_out_calibration(tmp_path) == pair_calibration([1.0, -1.0, 2.0])
