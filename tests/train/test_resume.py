"""A run that was stopped, killed or refused comes to the same end, bit for bit."""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from functools import cache

import pytest

from dpo.errors import CheckpointError, DivergedError, Stopped, StorageError
from dpo.train import checkpoint, jobs, loop, reference
from dpo.train import run as run_module
from dpo.train.jobs import train_preference, train_sft
from dpo.train.run import Run, read_manifest, read_metrics
from train.small_runs import (
    dpo,
    dpo_config,
    forked,
    kill_at,
    metrics_of,
    outcome,
    scratch,
    sft_config,
    sft_run,
    sha256,
    words_of,
)

VARIANTS = {
    "sft": (sft_config, {}),
    "sft with dropout": (sft_config, {"dropout": True}),
    "sft in bf16, accumulating": (sft_config, {"precision": "bf16", "batch.max_tokens": 100}),
    "dpo": (dpo_config, {}),
    "dpo with dropout, accumulating": (dpo_config, {"dropout": True, "batch.max_tokens": 200}),
    "dpo in bf16": (dpo_config, {"precision": "bf16"}),
    "dpo with rmsprop": (dpo_config, {"optimizer.name": "rmsprop"}),
}


def train(variant, folder):
    make, changes = VARIANTS[variant]
    job = train_sft if make is sft_config else train_preference
    return job(make(folder, changes))


@cache
def uninterrupted(variant):
    sft_run()  # before any fork, so that children share it
    return outcome(train(variant, scratch() / f"uninterrupted {variant}"))


def stop_at(step, number):
    """From now on, this process gets the signal when that step's metrics are logged."""
    log = Run.log

    def logged(run, row):
        log(run, row)
        if row["step"] == step and "loss" in row:
            os.kill(os.getpid(), number)

    Run.log = logged


def steps(folder):
    rows = metrics_of(folder)
    return (
        [row["step"] for row in rows if "loss" in row],
        [row["step"] for row in rows if "eval/loss" in row],
    )


@pytest.mark.parametrize("variant", VARIANTS)
def test_stopped_by_sigterm_and_killed_by_sigkill_it_ends_as_if_nothing_had_been(variant, tmp_path):
    expected, folder = uninterrupted(variant), tmp_path / "run"

    def stopped():
        stop_at(3, signal.SIGTERM)
        train(variant, folder)

    def killed():
        stop_at(5, signal.SIGKILL)
        train(variant, folder)

    assert forked(stopped) == Stopped.exit_code == 75
    assert steps(folder) == ([1, 2, 3], [0, 3])
    assert (folder / "checkpoints" / "step-00000003").is_dir()  # save_every is 2
    assert not (folder / "model").exists()
    assert forked(killed) == -signal.SIGKILL
    with (folder / "metrics.jsonl").open("a") as stream:
        stream.write('{"step": 6, "lo')  # the line that was being written
    train(variant, folder)
    assert outcome(folder) == expected
    assert steps(folder) == ([1, 2, 3, 4, 5, 6], [0, 3, 6])


MOMENTS = {
    "before the configuration is written": ("sft", {"name": "config.json"}),
    "after the manifest is written": ("sft", {"name": "manifest.json", "after": True}),
    "before the reference is cached": ("dpo", {"name": "", "occurrence": 3}),
    "before the training prompts are written": ("sft", {"name": "train_prompts.safetensors"}),
    "before later metrics are forgotten": ("sft", {"name": "metrics.jsonl"}),
    "before the first checkpoint is in place": ("sft", {"name": "step-00000002"}),
    "inside a checkpoint": ("dpo", {"name": "MANIFEST.json", "occurrence": 2}),
    "while the best model has no name": ("dpo", {"name": ".best.old", "after": True}),
    "after a checkpoint is in place": ("sft", {"name": "step-00000004", "after": True}),
    "before the last checkpoint is in place": ("sft", {"name": "step-00000006"}),
    "before the model is in place": ("sft", {"name": "model"}),
    "after the samples are written": ("sft", {"name": "final.jsonl", "after": True}),
    "before the run is called finished": ("sft", {"name": "manifest.json", "occurrence": 3}),
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_killed_at_any_moment_of_a_save_the_next_start_goes_on_by_itself(moment, tmp_path):
    variant, when = MOMENTS[moment]
    expected, folder = uninterrupted(variant), tmp_path / "run"

    def killed():
        os.environ["DPO_CACHE"] = str(tmp_path / "cache")
        kill_at(**when)
        train(variant, folder)

    assert forked(killed) == -signal.SIGKILL
    train(variant, folder)
    assert outcome(folder) == expected
    assert not [f for f in folder.rglob(".*") if f.name != ".lock"]


def test_killed_again_and_again_at_later_moments_it_still_arrives(tmp_path):
    expected, folder = uninterrupted("sft"), tmp_path / "run"
    kills = 0
    for moment in range(2, 100, 5):

        def killed(moment=moment):
            kill_at("", occurrence=moment)
            train("sft", folder)

        if forked(killed) == 0:
            break
        kills += 1
    assert kills >= 2
    assert read_manifest(folder)["status"] == "finished"
    assert outcome(folder) == expected


def test_a_damaged_newest_checkpoint_costs_its_steps_and_nothing_else(tmp_path):
    expected, folder = uninterrupted("sft"), tmp_path / "run"

    def stopped():
        stop_at(5, signal.SIGTERM)
        train("sft", folder)

    assert forked(stopped) == 75
    weights = folder / "checkpoints" / "step-00000005" / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[len(data) // 2] ^= 1
    weights.write_bytes(data)
    train("sft", folder)
    assert outcome(folder) == expected
    assert steps(folder) == ([1, 2, 3, 4, 5, 6], [0, 3, 6])


def test_a_disk_that_fills_in_the_middle_of_a_run_costs_no_older_step(tmp_path):
    expected, folder = uninterrupted("sft"), tmp_path / "run"

    def filled():
        log = Run.log

        def logged(run, row):
            log(run, row)
            if row["step"] == 4:  # the next save finds room for 10 kB
                resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))

        Run.log = logged
        train("sft", folder)

    assert forked(filled) == StorageError.exit_code == 5
    assert [f.name for f in (folder / "checkpoints").iterdir()] == ["step-00000002"]
    train("sft", folder)
    assert outcome(folder) == expected


def test_no_checkpoint_to_trust_ends_with_exit_code_four_and_resets_nothing(tmp_path):
    folder = tmp_path / "run"

    def stopped():
        stop_at(3, signal.SIGTERM)
        train("sft", folder)

    assert forked(stopped) == 75
    for state in folder.glob("checkpoints/*/optimizer.safetensors"):
        state.unlink()
    before = (folder / "metrics.jsonl").read_bytes()
    said = dpo("sft", *words_of(sft_config(folder)))
    assert said.code == CheckpointError.exit_code == 4
    assert "optimizer.safetensors is missing" in said.err
    assert "Traceback" not in said.all
    assert (folder / "metrics.jsonl").read_bytes() == before


def test_the_best_model_is_kept_though_the_run_went_on(tmp_path):
    """A constant large rate overshoots: the best held-out loss is not the last."""
    changes = {"optimizer.learning_rate": 0.3, "optimizer.schedule": "constant"}
    folder = train_sft(sft_config(tmp_path / "run", changes | {"evaluation.every": 1}))
    losses = {r["step"]: r["eval/loss"] for r in metrics_of(folder) if "eval/loss" in r}
    manifest = read_manifest(folder)
    assert losses[manifest["best_step"]] == min(losses.values()) == manifest["best_loss"]
    assert manifest["best_step"] < 6
    assert sha256(folder / "best" / "model.safetensors") != sha256(
        folder / "model" / "model.safetensors"
    )


def test_at_least_two_checkpoints_are_kept():
    uninterrupted("dpo")
    kept = sorted(f.name for f in (scratch() / "uninterrupted dpo" / "checkpoints").iterdir())
    assert kept == ["step-00000004", "step-00000006"]


def test_cached_and_computed_reference_train_the_same_policy(tmp_path, monkeypatch):
    uninterrupted("dpo")
    monkeypatch.setenv("DPO_CACHE", str(tmp_path / "cache"))
    first = outcome(train("dpo", tmp_path / "computed"))
    second = outcome(train("dpo", tmp_path / "cached"))
    assert first == second == uninterrupted("dpo")


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"loss.beta": 0.7}, ["loss.beta: 0.1 there, 0.7 now"]),
        ({"seed": 3}, ["seed: 0 there, 3 now"]),
        ({"batch.size": 4}, ["batch.size: 8 there, 4 now"]),
        ({"data.synthetic.seed": 5}, ["data.synthetic.seed: 0 there, 5 now", "data_sha256"]),
        ({"max_steps": 7}, ["max_steps: 6 there, 7 now"]),
    ],
)
def test_another_run_in_the_same_folder_is_refused_by_key_and_values(changes, parts, tmp_path):
    uninterrupted("dpo")
    folder = scratch() / "uninterrupted dpo"
    said = dpo("train", *words_of(dpo_config(folder, changes)))
    assert said.code == 2
    assert all(part in said.err for part in parts)
    assert outcome(folder) == uninterrupted("dpo")


def test_other_weights_under_the_same_name_are_refused(tmp_path):
    shutil.copytree(sft_run(), tmp_path / "start")
    config = {"model.path": str(tmp_path / "start")}
    train_preference(dpo_config(tmp_path / "run", config))
    shutil.copytree(sft_run() / "best", tmp_path / "start" / "model", dirs_exist_ok=True)
    other = train_sft(sft_config(tmp_path / "other", {"seed": 8}))
    shutil.copytree(other / "model", tmp_path / "start" / "model", dirs_exist_ok=True)
    said = dpo("train", *words_of(dpo_config(tmp_path / "run", config)))
    assert said.code == 2
    assert "resolved.model_sha256" in said.err
    assert "resolved.reference_sha256" in said.err


def test_other_rows_under_the_same_name_are_refused(tmp_path):
    data = tmp_path / "rows.jsonl"

    def write(answer):
        rows = [{"prompt": f"Say {i}.", "response": f"{i} {answer}"} for i in range(12)]
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))

    config = sft_config(tmp_path / "run", {"data": str(data), "max_steps": 1})
    write("yes")
    assert dpo("sft", *words_of(config)).code == 0
    write("no")
    said = dpo("sft", *words_of(config))
    assert said.code == 2
    assert "resolved.data_sha256" in said.err


def test_a_huge_learning_rate_ends_with_exit_code_three_and_is_logged_as_it_is(tmp_path):
    changes = {"optimizer.learning_rate": 1e37, "evaluation.every": 100, "save_every": 1}
    words = words_of(sft_config(tmp_path / "run", changes))
    said = dpo("sft", *words)
    assert said.code == DivergedError.exit_code == 3
    assert "Step 2: the loss is nan" in said.err
    assert "synthetic:" in said.err  # a row of the batch
    assert "Traceback" not in said.all
    rows = metrics_of(tmp_path / "run")
    assert [row["step"] for row in rows] == [0, 1, 2]
    assert rows[-1]["loss"] == "nan"
    assert "learning_rate" not in rows[-1]  # no update was made
    assert not (tmp_path / "run" / "model").exists()
    assert read_manifest(tmp_path / "run")["status"] == "started"

    again = dpo("sft", *words)  # from the last checkpoint, to the same end
    assert again.code == 3
    assert [row["step"] for row in metrics_of(tmp_path / "run")] == [0, 1, 2]


@pytest.mark.parametrize("every", [1, 100])
def test_an_update_that_overflows_is_never_saved_nor_called_finished(tmp_path, every):
    changes = {
        "optimizer.learning_rate": 1e39,  # beyond float32
        "max_steps": 1,
        "evaluation.every": every,
    }
    said = dpo("sft", *words_of(sft_config(tmp_path / "run", changes)))
    assert said.code == 3
    assert "Step 1:" in said.err
    assert not list(tmp_path.glob("run/checkpoints/step-*"))
    assert not (tmp_path / "run" / "model").exists()


def test_a_model_that_is_not_finite_is_said_before_any_step(tmp_path):
    from safetensors.torch import load_file, save_file

    shutil.copytree(sft_run() / "model", tmp_path / "broken")
    weights = load_file(tmp_path / "broken" / "model.safetensors")
    weights["transformer.ln_f.bias"][0] = float("nan")
    save_file(weights, tmp_path / "broken" / "model.safetensors", metadata={"format": "pt"})
    changes = {"model.path": str(tmp_path / "broken")}
    said = dpo("train", *words_of(dpo_config(tmp_path / "run", changes)))
    assert said.code == 3
    assert "Step 0: the held-out loss is nan" in said.err
    assert [row["eval/loss"] for row in read_metrics(tmp_path / "run")] == ["nan"]
    assert not (tmp_path / "run" / "best").exists()


@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_of_either_kind_ends_at_once(second, tmp_path):
    def stopped_twice():
        step = loop.training_step

        def interrupted(*arguments, **options):
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), second)
            return step(*arguments, **options)

        loop.training_step = interrupted
        train("sft", tmp_path / "run")

    assert forked(stopped_twice) == -second
    train("sft", tmp_path / "run")
    assert outcome(tmp_path / "run") == uninterrupted("sft")


def test_a_signal_in_the_middle_of_a_save_stops_after_the_next_step_which_is_saved(tmp_path):
    def stopped():
        take = checkpoint.snapshot

        def interrupted(policy, optimizer, state, **options):
            if state["step"] == 2:
                os.kill(os.getpid(), signal.SIGTERM)
            return take(policy, optimizer, state, **options)

        checkpoint.snapshot = interrupted
        train("sft", tmp_path / "run")

    assert forked(stopped) == Stopped.exit_code
    kept = sorted(f.name for f in (tmp_path / "run" / "checkpoints").iterdir())
    assert kept == ["step-00000002", "step-00000003"]


def test_a_signal_before_the_first_step_says_how_to_go_on_and_what_is_scored_is_kept(
    tmp_path, monkeypatch
):
    sft_run()
    monkeypatch.setattr(reference, "CHUNK", 16)
    monkeypatch.setenv("DPO_CACHE", str(tmp_path / "other cache"))
    expected = outcome(train("dpo", tmp_path / "whole"))
    monkeypatch.setenv("DPO_CACHE", str(tmp_path / "cache"))
    score, scored = reference.response_logps, []

    def counted(model, sequences, **options):
        scored.append([sequence.ids for sequence in sequences])
        if len(scored) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return score(model, sequences, **options)

    monkeypatch.setattr(reference, "response_logps", counted)
    with pytest.raises(Stopped, match=r"^Stopped by SIGTERM\. The same command goes on from here"):
        train("dpo", tmp_path / "run")
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    assert len(scored) == 3
    train("dpo", tmp_path / "run")
    first, again = scored[:3], scored[3:]
    assert again[0] == first[2]  # it had not ended
    assert len(again) > 3
    assert not [chunk for chunk in again if chunk in first[:2]]
    assert outcome(tmp_path / "run") == expected


def test_a_signal_after_the_last_step_leaves_the_rest_to_the_next_start(tmp_path):
    def stopped():
        jobs.write_samples = lambda *arguments: os.kill(os.getpid(), signal.SIGINT)
        train("sft", tmp_path / "run")

    assert forked(stopped) == Stopped.exit_code
    assert (tmp_path / "run" / "model").is_dir()
    assert read_manifest(tmp_path / "run")["status"] == "started"
    train("sft", tmp_path / "run")
    assert outcome(tmp_path / "run") == uninterrupted("sft")


def test_a_save_tells_its_bytes_and_what_it_cost(tmp_path):
    uninterrupted("dpo")
    folder = scratch() / "uninterrupted dpo"
    saves = {row["step"]: row for row in read_metrics(folder) if "save/bytes" in row}
    assert saves.keys() == {2, 4, 6}
    for step in (4, 6):
        files = (folder / "checkpoints" / f"step-{step:08d}").iterdir()
        assert saves[step]["save/bytes"] == sum(file.stat().st_size for file in files)
    assert all(0 < row["save/seconds"] < 60 for row in saves.values())
    assert all(0 <= row["save/blocked_seconds"] < 60 for row in saves.values())


def test_a_checkpoint_names_what_it_was_made_of():
    uninterrupted("sft")
    folder = scratch() / "uninterrupted sft"
    manifest = json.loads((folder / "checkpoints" / "step-00000006" / "MANIFEST.json").read_text())
    resolved = json.loads((folder / "config.json").read_text())["resolved"]
    assert manifest["origin"].keys() == {"config", "data", "tokenizer", "code"}
    for name in ("data", "tokenizer"):
        assert manifest["origin"][name] == resolved[f"{name}_sha256"]
    assert manifest["origin"]["code"] == read_manifest(folder)["code_sha256"]


def test_checkpoints_of_another_run_are_refused_though_the_folder_was_swapped(tmp_path):
    own, other = tmp_path / "own", tmp_path / "other"

    def stopped(folder, changes):
        stop_at(3, signal.SIGTERM)
        train_sft(sft_config(folder, changes))

    assert forked(lambda: stopped(own, {})) == 75
    assert forked(lambda: stopped(other, {"seed": 1, "data.synthetic.seed": 1})) == 75
    shutil.rmtree(own / "checkpoints")
    shutil.copytree(other / "checkpoints", own / "checkpoints")
    said = dpo("sft", *words_of(sft_config(own)))
    assert said.code == CheckpointError.exit_code
    problem = "by its MANIFEST.json it is of a run with another config and data"
    assert f"step-00000003: {problem}" in said.err
    assert (own / "checkpoints" / "step-00000003").is_dir()


def test_a_run_goes_on_under_other_code_and_says_what_that_means(tmp_path, caplog):
    def stopped():
        run_module.code_digest = lambda: "earlier code"
        stop_at(3, signal.SIGTERM)
        train("sft", tmp_path / "run")

    assert forked(stopped) == 75
    train("sft", tmp_path / "run")
    assert "The checkpoint was written by other code" in caplog.text
    assert outcome(tmp_path / "run") == uninterrupted("sft")


def test_another_tokenizer_under_the_same_name_is_refused(tmp_path):
    shutil.copytree(sft_run() / "model", tmp_path / "start")
    config = {"model.path": str(tmp_path / "start"), "max_steps": 1}
    train_preference(dpo_config(tmp_path / "run", config))
    tokenizer = json.loads((tmp_path / "start" / "tokenizer.json").read_text())
    tokenizer["model"]["merges"] = tokenizer["model"]["merges"][:-1]
    (tmp_path / "start" / "tokenizer.json").write_text(json.dumps(tokenizer))
    said = dpo("train", *words_of(dpo_config(tmp_path / "run", config)))
    assert said.code == 2
    assert "resolved.tokenizer_sha256" in said.err


def test_a_real_process_stops_by_sigterm_with_its_sentence_and_keeps_others_out(tmp_path):
    words = words_of(sft_config(tmp_path / "run", {"max_steps": 100_000, "save_every": 10_000}))
    process = subprocess.Popen(
        [sys.executable, "-m", "dpo.cli", "sft", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    try:
        deadline = time.monotonic() + 90
        while len(read_metrics(tmp_path / "run")) < 4 and time.monotonic() < deadline:
            assert process.poll() is None, process.communicate()
            time.sleep(0.05)
        second = dpo("sft", *words)
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert second.code == 2
    assert "another process is working in" in second.err
    assert process.returncode == 75
    sentence = "the state is saved. The same command goes on from here."
    assert sentence in " ".join(err.split())
    assert "Traceback" not in out + err
    last = read_metrics(tmp_path / "run")[-1]["step"]
    assert (tmp_path / "run" / "checkpoints" / f"step-{last:08d}").is_dir()
