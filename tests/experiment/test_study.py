"""A study: planned whole before anything runs, every cell from one SFT model, nothing twice."""

from __future__ import annotations

import csv
import json

import pytest

from dpo.config import validate
from dpo.errors import InputError
from dpo.experiment.study import run_study
from dpo.experiment.study_config import StudyConfig, combinations, plan

TINY = {
    "model": {"fresh": {"width": 16, "layers": 1, "heads": 2, "positions": 96, "vocab_size": 300}},
    "data": {
        "path": "synthetic",
        "template": "question",
        "test_fraction": 0.3,
        "max_length": 96,
        "synthetic": {"num_facts": 8, "num_rows": 60},
    },
    "seeds": [0, 1],
    "sft": {"max_steps": 3, "evaluation": {"num_samples": 1, "max_new_tokens": 8}},
    "dpo": {
        "max_steps": 2,
        "evaluation": {"num_samples": 0, "kl_prompts": 2, "max_new_tokens": 8},
        "optimizer": {"learning_rate": 1e-3},
    },
    "grid": {"loss.beta": [0.1, 1.0]},
    "evaluation": {
        "temperatures": [0.5, 1.0],
        "max_new_tokens": 8,
        "max_prompts": 3,
        "sentence_model": "offline",
    },
}


def study_config(tmp_path, **changes):
    return validate(StudyConfig, {**TINY, **changes, "out": str(tmp_path / "study")})


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("module")
    return run_study(study_config(folder)), folder / "study"


def test_every_cell_of_a_seed_starts_from_that_seeds_sft_model_as_its_reference(finished):
    _, folder = finished
    starts = {}
    for run in sorted((folder / "runs").glob("dpo-*")):
        config = json.loads((run / "config.json").read_text(encoding="utf-8"))
        resolved = config["resolved"]
        assert resolved["model_sha256"] == resolved["reference_sha256"]
        starts.setdefault(config["seed"], set()).add(resolved["model_sha256"])
    assert {seed: len(digests) for seed, digests in starts.items()} == {0: 1, 1: 1}
    assert starts[0] != starts[1]


def test_dpo_starts_at_log_2_at_every_beta(finished):
    study, _ = finished
    dpo = [result for result in study.results if result.label.startswith("DPO")]
    assert len(dpo) == 4
    assert all(result.loss[0] == pytest.approx(0.6931472, abs=1e-6) for result in dpo)
    assert all(result.kl[0] == 0 for result in dpo)


def test_seeds_of_a_method_are_pooled_and_the_nulls_stand_beside_them(finished):
    study, _ = finished
    by_name = {(row.model, row.temperature): row for row in study.evaluation.table}
    assert by_name["SFT", 1.0].n == 6  # 3 prompts, 2 seeds
    assert by_name["DPO beta 0.1", 0.5].num_prompts == 3
    nulls = [row.model for row in study.evaluation.table if row.kind == "null"]
    assert {"constant polite sentence", "prompt echoed", "empty string"} <= set(nulls)


def test_the_folder_holds_table_figures_samples_and_page(finished):
    _, folder = finished
    with (folder / "table.csv").open(encoding="utf-8") as stream:
        rows = list(csv.DictReader(stream))
    assert [row["method"] for row in rows] == ["SFT", "DPO beta 0.1", "DPO beta 1.0"]
    for name in ("training.png", "training.csv", "win_rate.png", "win_rate.csv"):
        assert (folder / "figures" / name).stat().st_size > 100
    lines = (folder / "samples.jsonl").read_text(encoding="utf-8").splitlines()
    expected = {"prompt", "chosen", "rejected", "temperature", "SFT", "DPO beta 0.1"}
    assert expected <= json.loads(lines[0]).keys()
    assert "figures/win_rate.png" in (folder / "README.md").read_text(encoding="utf-8")


def test_a_finished_study_is_not_trained_again(finished):
    study, folder = finished
    weights = sorted((folder / "runs").glob("*/model/model.safetensors"))
    before = [file.stat().st_mtime_ns for file in weights]
    again = run_study(study_config(folder.parent))
    assert [file.stat().st_mtime_ns for file in weights] == before
    assert again.evaluation.table == study.evaluation.table


def test_every_combination_of_the_grid_is_a_cell():
    cells = combinations({"loss.beta": [0.1, 1], "optimizer.learning_rate": [1e-5]})
    assert [label for _, label in cells] == [
        "beta 0.1 learning_rate 1e-05",
        "beta 1 learning_rate 1e-05",
    ]


def test_a_wrong_setting_of_any_run_is_said_before_anything_runs(tmp_path):
    with pytest.raises(InputError, match=r"beta -1.*loss\.beta: input should be greater than 0"):
        plan(study_config(tmp_path, grid={"loss.beta": [0.1, -1]}))
    with pytest.raises(InputError, match=r"sft: epoch: unknown key; did you mean epochs\?"):
        plan(study_config(tmp_path, sft={"epoch": 1}))
    assert not (tmp_path / "study").exists()


@pytest.mark.parametrize(
    ("section", "key"), [("sft", "seed"), ("dpo", "reference"), ("evaluation", "models")]
)
def test_what_the_study_decides_cannot_be_set_in_its_sections(tmp_path, section, key):
    config = study_config(tmp_path, **{section: {key: 1}})
    with pytest.raises(InputError, match=rf"{section}\.{key}: the study sets this itself"):
        plan(config)
