"""The files of an evaluation."""

import csv
import json
from dataclasses import asdict

import pytest
from verdicts import A, B, scored

from dpo.errors import StorageError
from dpo.evaluate.paired import paired_tests, power_of
from dpo.evaluate.tables import write_results
from dpo.evaluate.winrate import win_rate_table


def written(folder, records):
    table, tests = win_rate_table(records), paired_tests(records)
    write_results(folder, scored=records, table=table, tests=tests, meta={"seed": 3})
    return table, tests


def test_the_files_hold_the_table_the_tests_and_every_response(tmp_path):
    records = scored("a", A) + scored("b", ["tie"] * 8, prompt="caf\u00e9 \u2028 \ud800")
    table, tests = written(tmp_path / "evaluation", records)
    names = {path.name for path in (tmp_path / "evaluation").iterdir()}
    assert names == {"win_rates.csv", "win_rates.json", "paired_tests.csv", "scored.jsonl"}

    content = json.loads((tmp_path / "evaluation/win_rates.json").read_text("utf-8"))
    meta = content["meta"]
    assert (meta["seed"], meta["num_prompts"], meta["num_responses"]) == (3, 8, 16)
    assert content["win_rates"][0]["low"] == table[0].low
    assert content["win_rates"][1]["win_rate"] is None
    assert content["paired_tests"][0]["mcnemar_p"] == tests[0].mcnemar_p

    with (tmp_path / "evaluation/win_rates.csv").open(newline="") as file:
        first, second = csv.DictReader(file)
    assert float(first["win_rate"]) == table[0].win_rate
    assert second["win_rate"] == ""

    lines = (tmp_path / "evaluation/scored.jsonl").read_text("utf-8").split("\n")
    responses = [json.loads(line) for line in lines if line]
    assert len(responses) == 16
    assert responses[8]["prompt"] == "caf\u00e9 \u2028 \ud800"
    assert responses[0]["verdict"] == "win"


def test_the_json_file_states_the_families_and_what_they_can_see(tmp_path):
    null = scored("null", B, kind="null", temperature=None)
    hot = [*scored("a", A, temperature=1.0), *scored("b", B, temperature=1.0)]
    _, tests = written(tmp_path, scored("a", A) + scored("b", B) + hot + null)
    meta = json.loads((tmp_path / "win_rates.json").read_text("utf-8"))["meta"]
    assert meta["holm_families"] == {
        "models": {"compares": "between models", "num_tests": 2, "temperatures": [0.7, 1.0]},
        "null": {
            "compares": "against the best null response",
            "num_tests": 4,
            "temperatures": [0.7, 1.0],
        },
    }
    asked = {name: meta["power"][name] for name in ("difference", "power", "level")}
    assert asked == {"difference": 0.05, "power": 0.8, "level": 0.05}
    assert meta["power"]["families"] == [asdict(power) for power in power_of(tests)]


def test_the_bootstrap_and_the_ties_are_columns_and_unknown_ones_are_empty(tmp_path):
    written(tmp_path, scored("a", A) + scored("b", ["win"] * 8))
    with (tmp_path / "win_rates.csv").open(newline="") as file:
        mixed, unanimous = csv.DictReader(file)
    assert float(mixed["bootstrap_low"]) < 6 / 7 <= float(mixed["bootstrap_high"])
    assert float(mixed["tie_half"]) == 6.5 / 8
    assert (unanimous["bootstrap_low"], unanimous["bootstrap_high"]) == ("", "")
    assert float(unanimous["low"]) < 1.0


def test_a_file_that_cannot_be_written_is_one_sentence_and_leaves_no_part(tmp_path):
    (tmp_path / "scored.jsonl").mkdir()
    with pytest.raises(
        StorageError,
        match=r"scored\.jsonl cannot be written: a folder of that name is in the way\.",
    ):
        written(tmp_path, scored("a", A))
    assert [path.name for path in tmp_path.iterdir()] == ["scored.jsonl"]
