"""Metrics reach the services that are named, and a run is itself whoever hears of it.

The services are stand-ins that take the same calls; where the real packages are installed, MLflow
with a store in a file and Weights & Biases offline are tried too.
"""

from __future__ import annotations

import json
import logging
import sys
from importlib.util import find_spec

import pytest

from dpo.config import SFTConfig
from dpo.config_files import validate
from dpo.errors import InputError, Stopped
from dpo.train import trackers
from dpo.train.jobs import train_preference, train_sft
from dpo.train.run import Run, read_manifest, read_metrics
from train.small_runs import dpo, dpo_config, outcome, sft_config, sft_run
from train.stand_ins import install

SERVICES = ["wandb", "mlflow", "trackio"]


def numbers_of(row):
    return {k: float(v) for k, v in row.items() if k != "step" and isinstance(v, int | float)}


def merged(rows):
    """All numbers that were told for each step."""
    steps = {}
    for row in rows:
        steps.setdefault(row["step"], {}).update(numbers_of(row))
    return {step: numbers for step, numbers in steps.items() if numbers}


@pytest.mark.parametrize("name", SERVICES)
def test_a_service_is_told_every_number_of_the_metrics(name, tmp_path, monkeypatch):
    book = install(monkeypatch, name)
    folder = train_preference(dpo_config(tmp_path / "run", {"report_to": [name]}))
    ((run, how),) = book.begun
    assert merged(book.told[run]) == merged(read_metrics(folder))
    assert how["name"].startswith("run")
    assert how["config"].get("loss.beta", how["config"].get("loss", {})) in (
        "0.1",
        {"name": "dpo", "beta": 0.1, "label_smoothing": 0.0},
    )
    assert book.ended == [run]
    assert read_manifest(folder)["reported_to"] == {name: run}


def test_who_hears_of_a_run_is_no_part_of_what_it_is(tmp_path, monkeypatch):
    alone = train_sft(sft_config(tmp_path / "alone"))
    for name in SERVICES:
        install(monkeypatch, name)
    heard = train_sft(sft_config(tmp_path / "heard", {"report_to": SERVICES}))
    assert outcome(heard) == outcome(alone)
    configs = [json.loads((f / "config.json").read_text()) for f in (alone, heard)]
    assert configs[0] == configs[1]
    assert "report_to" not in configs[1]
    cards = [(f / "model" / "README.md").read_text() for f in (alone, heard)]
    assert cards[0].replace("alone", "heard") == cards[1]


@pytest.mark.parametrize("name", SERVICES)
def test_a_run_that_goes_on_is_the_same_run_to_the_service(name, tmp_path, monkeypatch):
    book = install(monkeypatch, name)
    config = sft_config(tmp_path / "run", {"report_to": name})
    log = Run.log

    def stopped_at_3(run, row):
        log(run, row)
        if row["step"] == 3:
            raise Stopped("as by a signal")

    with monkeypatch.context() as patch:
        patch.setattr(Run, "log", stopped_at_3)
        with pytest.raises(Stopped):
            train_sft(config)
    folder = train_sft(config)
    assert len(book.told) == 1
    (run,) = book.told
    assert [begun for begun, _ in book.begun] == [run, run]
    assert merged(book.told[run]).keys() == merged(read_metrics(folder)).keys()


def test_a_finished_run_is_not_begun_again(tmp_path, monkeypatch):
    book = install(monkeypatch, "wandb")
    config = sft_config(tmp_path / "run", {"report_to": "wandb"})
    train_sft(config)
    train_sft(config)
    assert len(book.begun) == 1


def test_a_service_that_fails_costs_a_warning_and_no_training(tmp_path, monkeypatch, caplog):
    book = install(monkeypatch, "wandb")
    book.fail = True
    caplog.set_level(logging.WARNING, logger="dpo")
    folder = train_sft(sft_config(tmp_path / "run", {"report_to": "wandb"}))
    assert read_manifest(folder)["status"] == "finished"
    said = [r.getMessage() for r in caplog.records if "told no more" in r.getMessage()]
    assert said == [
        "wandb failed and is told no more (no route to the service); metrics.jsonl has everything."
    ]


def test_a_service_that_cannot_be_begun_is_one_sentence_before_the_first_step(
    tmp_path, monkeypatch
):
    first = install(monkeypatch, "trackio")
    install(monkeypatch, "wandb")
    monkeypatch.setattr(sys.modules["wandb"], "init", lambda **how: 1 / 0)
    config = sft_config(tmp_path / "run", {"report_to": ["trackio", "wandb"]})
    with pytest.raises(InputError) as error:
        train_sft(config)
    assert str(error.value) == (
        "report_to: wandb cannot be begun (division by zero); mend that, or leave wandb out."
    )
    assert len(first.ended) == 1
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
    train_sft(sft_config(tmp_path / "run"))  # the folder is free for the mended command


@pytest.mark.parametrize("name", SERVICES)
def test_a_package_that_is_missing_is_named_with_its_extra(name, monkeypatch, tmp_path):
    monkeypatch.setattr("dpo.config.find_spec", lambda package: None)
    said = dpo("sft", "model.fresh.width=16", f"out={tmp_path / 'run'}", f"report_to=[{name}]")
    assert said.code == 2
    assert said.err == (
        f"report_to: {name} is not installed; pip install "
        f"'direct-preference-optimization[{name}]', or leave it out"
    )


def test_names_are_checked(monkeypatch):
    values = {"model": {"fresh": {}}, "out": "runs/x"}
    with pytest.raises(InputError, match=r"report_to.0: .*'wandb', 'mlflow' or 'trackio'"):
        validate(SFTConfig, {**values, "report_to": "comet"})
    monkeypatch.setattr("dpo.config.find_spec", lambda package: package)
    with pytest.raises(InputError, match="report_to: expected different ones, got wandb, wandb"):
        validate(SFTConfig, {**values, "report_to": ["wandb", "wandb"]})
    assert trackers.SERVICES.keys() == set(SERVICES)


def test_only_the_first_rank_reports(tmp_path, monkeypatch):
    book = install(monkeypatch, "wandb")
    other = Run(tmp_path, None, origin=None)
    other.report_to(["wandb"], {})
    assert (other.trackers, book.begun) == ([], [])


# -- the real packages, where they are installed ---------------------------------------------------


@pytest.mark.skipif(find_spec("mlflow") is None, reason="mlflow is not installed")
@pytest.mark.filterwarnings("ignore")
def test_mlflow_with_a_store_in_a_file(tmp_path, monkeypatch):
    from mlflow import MlflowClient

    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"file:{tmp_path / 'store'}")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "reviews")
    folder = train_sft(sft_config(tmp_path / "run", {"report_to": "mlflow"}))
    client = MlflowClient()
    (run,) = client.search_runs([client.get_experiment_by_name("reviews").experiment_id])
    assert run.info.run_id == read_manifest(folder)["reported_to"]["mlflow"]
    assert (run.info.run_name, run.info.status) == ("run", "FINISHED")
    assert run.data.params["model.fresh.width"] == "16"
    losses = client.get_metric_history(run.info.run_id, "loss")
    rows = [(row["step"], row["loss"]) for row in read_metrics(folder) if "loss" in row]
    assert [(m.step, m.value) for m in losses] == rows


@pytest.mark.skipif(find_spec("wandb") is None, reason="wandb is not installed")
@pytest.mark.filterwarnings("ignore")
def test_wandb_offline(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    sft_run()
    folder = train_preference(dpo_config(tmp_path / "run", {"report_to": "wandb"}))
    run = read_manifest(folder)["reported_to"]["wandb"]
    (file,) = (folder / "wandb").glob(f"offline-run-*-{run}/run-{run}.wandb")
    assert b"eval/loss" in file.read_bytes()
