"""A study: planned whole before anything runs, every cell from one SFT model, nothing twice."""

from __future__ import annotations

import csv
import json
import shutil

import pytest

from dpo.atomic import lock_folder
from dpo.config_files import validate
from dpo.errors import InputError
from dpo.evaluate import generations
from dpo.evaluate.paired import power_lines
from dpo.experiment.study import evaluate_together, run_study
from dpo.experiment.study_config import StudyConfig, combinations, plan
from dpo.report.page.write import write_page
from experiment.tiny_study import TINY as BASE

TINY = {
    **BASE,
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


# -- the evaluation ------------------------------------------------------------------------------


def generated(monkeypatch):
    """How many responses each call of `generate` was asked for, from now on."""
    asked = []
    generate = generations.generate

    def noted(model, prompts, **options):
        asked.append(len(prompts))
        return generate(model, prompts, **options)

    monkeypatch.setattr(generations, "generate", noted)
    return asked


def bytes_of(folder, *patterns):
    return {
        str(file.relative_to(folder)): file.read_bytes()
        for pattern in patterns
        for file in folder.glob(pattern)
    }


RESULTS = ("*.csv", "*.jsonl", "win_rates.json", "generations/*", "embeddings/*")


@pytest.fixture
def reopened(finished, tmp_path):
    """The configuration and the folder of the finished study, which is put back afterwards."""
    _, folder = finished
    shutil.copytree(folder, tmp_path / "kept")
    yield study_config(folder.parent), folder
    shutil.rmtree(folder)
    shutil.move(tmp_path / "kept", folder)


def test_a_study_that_was_killed_while_it_evaluated_asks_only_for_what_is_missing(
    reopened, monkeypatch
):
    config, folder = reopened
    evaluation = folder / "evaluation"
    expected = bytes_of(evaluation, *RESULTS)
    [lost] = (evaluation / "generations").glob("DPO beta 0.1 seed 1-t1-*.jsonl")
    lost.unlink()
    for file in (*evaluation.glob("*.*"), *evaluation.glob("embeddings/*")):
        file.unlink()
    torn = evaluation / "generations" / f".{lost.name}.123.tmp"
    torn.write_text('{"generated": "ha')
    asked = generated(monkeypatch)
    evaluate_together(plan(config), trust_remote_code=False)
    assert asked == [3]  # one model, one temperature, three prompts
    assert not torn.exists()
    found = bytes_of(evaluation, *RESULTS)
    assert found == expected


def test_two_processes_do_not_evaluate_one_study(reopened):
    config, folder = reopened
    with (
        lock_folder(folder / "evaluation"),
        pytest.raises(InputError, match="another process is working"),
    ):
        evaluate_together(plan(config), trust_remote_code=False)


def test_a_study_finished_by_an_earlier_version_is_opened_without_training_or_sampling(
    finished, reopened, monkeypatch
):
    """It kept no embeddings, no held-out pairs and no diagnostics."""
    config, folder = reopened
    shutil.rmtree(folder / "evaluation" / "embeddings")
    newer = ("diagnostics.json", "held_out.csv", "true_rewards.csv", "displacement.*", ".lock")
    for name in newer:
        for file in [*folder.rglob(name)]:
            file.unlink()
    weights = bytes_of(folder, "runs/*/model/*", "runs/*/metrics.jsonl")
    asked = generated(monkeypatch)
    again = run_study(config)
    assert asked == []
    assert bytes_of(folder, "runs/*/model/*", "runs/*/metrics.jsonl") == weights
    assert again.evaluation.table == finished[0].evaluation.table
    html = write_page(folder).read_text(encoding="utf-8")
    assert "Diagnostics of the runs" in html
    assert not (folder / "runs" / "dpo-beta-0.1-seed0" / "held_out.csv").exists()


def test_the_true_reward_stands_beside_the_win_rates_where_it_is_known(finished):
    study, folder = finished
    with (folder / "evaluation" / "true_rewards.csv").open(encoding="utf-8") as stream:
        rows = list(csv.DictReader(stream))
    assert {row["model"] for row in rows} == {"SFT", "DPO beta 0.1", "DPO beta 1.0"}
    assert {(row["num_prompts"], row["n"]) for row in rows} == {("3", "6")}
    assert len(study.evaluation.rewards) == 3 * 2


def test_judges_compare_the_methods_of_a_study_head_to_head(reopened, monkeypatch):
    _, folder = reopened
    judged = {"judges": ["true_reward"], "comparisons": ["models", "nulls"]}
    config = study_config(folder.parent, evaluation={**TINY["evaluation"], **judged})
    asked = generated(monkeypatch)
    study = run_study(config)
    assert asked == []
    rows = study.evaluation.duels.table
    pairs = {(row.a, row.b) for row in rows if row.family == "models"}
    assert pairs == {
        *(("SFT", "DPO beta 0.1"), ("SFT", "DPO beta 1.0"), ("DPO beta 0.1", "DPO beta 1.0"))
    }
    assert {row.n for row in rows if row.family == "models"} == {6}  # three prompts, two seeds
    drawn = (folder / "figures" / "head_to_head.csv").read_text(encoding="utf-8")
    assert drawn == (folder / "evaluation" / "head_to_head.csv").read_text(encoding="utf-8")
    text = (folder / "README.md").read_text(encoding="utf-8")
    assert "| true_reward | models | SFT | DPO beta 1.0 | 0.5 | 6 |" in text
    assert "figures/head_to_head.png" in text


# -- what is told --------------------------------------------------------------------------------


def test_the_page_says_what_the_tests_can_see(finished):
    study, folder = finished
    text = (folder / "README.md").read_text(encoding="utf-8")
    lines = power_lines(study.evaluation.tests)
    assert [line.split(":")[0] for line in lines] == [
        *("Between models", "Against the best null response")
    ]
    assert all(line in text.splitlines() for line in lines)
    assert "to see a 5-point difference at 80% power" in text
    assert "Head to head" not in text


def test_every_run_of_dpo_and_the_evaluation_are_diagnosed(finished):
    _, folder = finished
    diagnosed = {str(f.parent.relative_to(folder)) for f in folder.rglob("diagnostics.json")}
    runs = [f"runs/dpo-beta-{beta}-seed{seed}" for beta in (0.1, 1.0) for seed in (0, 1)]
    assert diagnosed == {"evaluation", *runs}
    content = json.loads((folder / runs[0] / "diagnostics.json").read_text(encoding="utf-8"))
    assert {"displacement", "accuracy", "calibration", "on_policy"} <= content["numbers"].keys()
    assert (folder / runs[0] / "figures" / "calibration.csv").is_file()
    judged = json.loads((folder / "evaluation" / "diagnostics.json").read_text(encoding="utf-8"))
    assert judged["numbers"]["baseline"] == "SFT"


# -- the plan ------------------------------------------------------------------------------------


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
