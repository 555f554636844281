"""What scripts read: one JSON object, silence where it is asked for, plain text in a pipe."""

from __future__ import annotations

import io
import json
import logging
import os
import pty
import re
import shutil
import subprocess
import sys

import pytest

from dpo.cli.output import set_up_logging
from dpo.report.results import study_result
from dpo.train.run import read_manifest, read_metrics
from train.small_runs import (
    dpo,
    dpo_config,
    dpo_run,
    evaluate_config,
    evaluation,
    sft_config,
    sft_run,
    words_of,
)

ESCAPE = "\x1b"


def parsed(said):
    """The one object on standard output, and nothing else there."""
    assert said.code == 0, said.all
    (line,) = said.out_lines
    return json.loads(line)


def again(folder):
    """The words that made a run or an evaluation: it is finished, so nothing is done twice."""
    make, command = {
        sft_run(): (sft_config, "sft"),
        dpo_run(): (dpo_config, "train"),
        evaluation(): (evaluate_config, "evaluate"),
    }[folder]
    return [command, *words_of(make(folder))]


# -- JSON ----------------------------------------------------------------------------------------


def test_json_of_a_preference_run_has_its_model_its_metrics_and_what_is_remarkable():
    folder = dpo_run()
    said = dpo(*again(folder), "--json")
    result = parsed(said)
    assert (result["command"], result["folder"]) == ("train", str(folder))
    assert result["model"] == str(folder / "model")
    assert result["page"] == str(folder / "index.html")
    assert result["status"] == "finished"
    assert result["steps"] == read_manifest(folder)["steps"] == 6
    measured = [row for row in read_metrics(folder) if "eval/loss" in row]
    assert result["held_out"]["start"] == measured[0]
    assert result["held_out"]["end"] == measured[-1]
    known = json.loads((folder / "diagnostics.json").read_text(encoding="utf-8"))["readings"]
    assert len(result["findings"]) == sum(reading["level"] != "ok" for reading in known)
    assert "held-out rows" in said.err  # the table that a person would have


def test_json_of_an_sft_run():
    assert parsed(dpo(*again(sft_run()), "--json"))["command"] == "sft"


def test_json_of_an_evaluation_has_every_row_of_its_tables():
    folder = evaluation()
    result = parsed(dpo(*again(folder), "--json"))
    table = (folder / "win_rates.csv").read_text(encoding="utf-8").splitlines()
    assert len(result["win_rates"]) == len(table) - 1
    assert {row["model"] for row in result["win_rates"]} >= {"sft", "dpo"}


def test_json_of_a_comparison_has_the_last_metrics_of_each_run(tmp_path):
    other = shutil.copytree(dpo_run(), tmp_path / "other")
    words = ["compare", dpo_run(), other, "--out", tmp_path / "page"]
    result = parsed(dpo(*words, "--json"))
    assert result["page"] == str(tmp_path / "page" / "index.html")
    last = [row for row in read_metrics(other) if "eval/loss" in row][-1]
    assert [run["held_out"] for run in result["runs"].values()] == [last, last]
    assert [test["difference"] for test in result["tests"]] == [0.0]


def test_json_of_a_diagnosis_is_its_file(tmp_path):
    result = parsed(dpo("diagnose", dpo_run(), "--out", tmp_path, "--json"))
    assert result == json.loads((tmp_path / "diagnostics.json").read_text(encoding="utf-8"))


def test_json_of_a_data_check_has_its_counts(tmp_path):
    file = tmp_path / "prefs.jsonl"
    dpo("data", "synthetic", file, "--rows", 20)
    result = parsed(dpo("data", "check", file, "--tokenizer", sft_run(), "--json"))
    assert (result["num_rows"], result["kind"], result["num_identical_pairs"]) == (
        20,
        "preference",
        0,
    )
    assert result["template"] == "plain"


def test_the_result_of_a_study_is_its_tables_by_the_names_in_their_heads(tmp_path):
    (tmp_path / "study.json").write_text(json.dumps({"config": {"grid": {}}}))
    tables = {"methods": [["method", "KL"], ["DPO", "0.5"], ["IPO", "0.7"]], "cost": []}
    (tmp_path / "tables.json").write_text(json.dumps(tables))
    shutil.copytree(sft_run(), tmp_path / "runs" / "sft-0")
    found = study_result(tmp_path)
    assert found["command"] == "experiment run"
    assert found["tables"] == {
        "methods": [{"method": "DPO", "KL": "0.5"}, {"method": "IPO", "KL": "0.7"}],
        "cost": [],
    }
    assert found["runs"] == [str(tmp_path / "runs" / "sft-0")]


def test_an_error_leaves_standard_output_empty():
    said = dpo("train", "model=./nowhere", "out=x", "--json")
    assert (said.code, said.out) == (2, "")


# -- quiet ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", [0, 1, 2, 3])
def test_quiet_may_stand_anywhere_and_leaves_only_warnings(place):
    words = again(sft_run())
    words.insert(place, "--quiet")
    said = dpo(*words)
    assert (said.code, said.out, said.err) == (0, "", "")


def test_quiet_says_the_warnings_of_the_diagnosis_and_json_with_it_is_all_of_the_output():
    folder = dpo_run()
    said = dpo("-q", *again(folder), "--json")
    warnings = [f for f in parsed(said)["findings"] if f["level"] == "warning"]
    lines = said.err_lines
    assert len(lines) == len(warnings)
    for line, finding in zip(lines, warnings, strict=True):
        assert finding["title"] in line


# -- colours -------------------------------------------------------------------------------------


def run(*words, **environment):
    known = {k: v for k, v in os.environ.items() if k not in ("NO_COLOR", "FORCE_COLOR")}
    command = [sys.executable, "-m", "dpo.cli", *words]
    return command, {**known, "TERM": "xterm-256color", **environment}


def piped(*words):
    command, environment = run(*words)
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    return done.stdout + done.stderr


def in_terminal(*words, **environment):
    """What the command writes to a terminal of its own."""
    command, environment = run(*words, **environment)
    ours, theirs = pty.openpty()
    with subprocess.Popen(command, env=environment, stdout=theirs, stderr=theirs) as process:
        os.close(theirs)
        said = b""
        while True:
            try:
                part = os.read(ours, 4096)
            except OSError:  # the other side is closed
                break
            if not part:
                break
            said += part
        process.wait(timeout=60)
    os.close(ours)
    return said.decode()


COLOUR = re.compile(r"\x1b\[[0-9;]*(?:3[0-7]|9[0-7]|38;)")


@pytest.mark.parametrize("words", [("--help",), ("config", "sft"), ("trian",)], ids=" ".join)
def test_a_pipe_gets_plain_text(words):
    said = piped(*words)
    assert said
    assert ESCAPE not in said


def test_a_terminal_gets_colours_unless_it_says_no():
    assert COLOUR.search(in_terminal("--help"))
    assert not COLOUR.search(in_terminal("--help", NO_COLOR="1"))


def test_a_log_that_nobody_watches_has_a_line_a_message(tmp_path):
    data = tmp_path / ("long-name-" * 12 + ".jsonl")
    dpo("data", "synthetic", data, "--rows", 40)
    said = dpo("sft", "model.fresh={}", f"data={data}", "out=x", "--dry-run")
    assert any(str(data) in line and "40 preference rows" in line for line in said.err_lines)


def test_the_log_goes_to_what_standard_error_is_by_then(monkeypatch):
    log = logging.getLogger("dpo")
    monkeypatch.setattr(log, "propagate", log.propagate)
    monkeypatch.setattr(log, "handlers", log.handlers)
    monkeypatch.setattr(log, "level", log.level)
    first, second = io.StringIO(), io.StringIO()
    monkeypatch.setattr(sys, "stderr", first)
    set_up_logging(logging.INFO)
    log.info("one")
    monkeypatch.setattr(sys, "stderr", second)
    first.close()
    log.info("two")
    assert second.getvalue().endswith("] two\n")
