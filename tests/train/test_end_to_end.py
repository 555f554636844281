"""What a user has after `dpo sft`, `dpo train` and `dpo evaluate` on the embedded data."""

import csv
import gc
import json
import math
import re
import weakref

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from dpo.data.split import prompt_digest
from dpo.data.synthetic import preferences
from dpo.models.load import weights_digest
from dpo.train import adapters, jobs, session
from dpo.train.jobs import train_preference, train_sft
from dpo.train.prepare import load_preferences
from dpo.train.run import load_train_prompts, read_manifest, read_metrics
from dpo.train.session import open_policy
from train.small_runs import (
    CANARY,
    SAVE,
    dpo,
    dpo_config,
    dpo_run,
    evaluate_config,
    evaluation,
    sft_config,
    sft_run,
    sha256,
    words_of,
)

MODEL_FILES = [
    "README.md",
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "prompt_template.json",
    "tokenizer.json",
    "tokenizer_config.json",
]
CHECKPOINT_FILES = ["MANIFEST.json", "model.safetensors", "optimizer.safetensors", "state.json"]
RUN_FILES = {
    ".lock",
    "config.json",
    "data.json",
    "index.html",
    "manifest.json",
    "metrics.jsonl",
    "train_prompts.safetensors",
    "samples/final.jsonl",
    *(f"figures/training.{suffix}" for suffix in ("csv", "png", "svg")),
    *(f"{folder}/{file}" for folder in ("model", "best") for file in MODEL_FILES),
    *(f"checkpoints/step-0000000{n}/{file}" for n in (4, 6) for file in CHECKPOINT_FILES),
}
DIAGNOSES = ("displacement", "length", "subsets", "calibration")
PREFERENCE_RUN_FILES = RUN_FILES | {
    "held_out.csv",
    "diagnostics.json",
    "samples/displaced.jsonl",
    *(f"figures/{name}.{suffix}" for name in DIAGNOSES for suffix in ("csv", "png", "svg")),
}
FILES = {"sft": RUN_FILES, "dpo": PREFERENCE_RUN_FILES}
EVALUATION_FILES = {
    ".lock",
    "diagnostics.json",
    "index.html",
    "win_rates.csv",
    "win_rates.json",
    "paired_tests.csv",
    "scored.jsonl",
    "true_rewards.csv",
    *(
        f"figures/{name}.{suffix}"
        for name in ("win_rate", "length_controlled")
        for suffix in ("csv", "png", "svg")
    ),
}
RUNS = {"sft": sft_run, "dpo": dpo_run}


def files_of(folder):
    files = (f.relative_to(folder).as_posix() for f in folder.rglob("*") if f.is_file())
    return {f for f in files if not f.startswith(("tensorboard/", "generations/", "embeddings/"))}


def held_out(folder):
    return [row for row in read_metrics(folder) if "eval/loss" in row]


@pytest.mark.parametrize("name", RUNS)
def test_a_run_directory_has_exactly_the_promised_files(name):
    assert files_of(RUNS[name]()) == FILES[name]
    assert list((RUNS[name]() / "tensorboard").glob("events.*"))


def test_an_evaluation_has_exactly_the_promised_files():
    assert files_of(evaluation()) == EVALUATION_FILES
    generations = [re.sub(r"-\w{16}", "", f.name) for f in (evaluation() / "generations").iterdir()]
    assert sorted(generations) == [
        "dpo-t0.5.jsonl",
        "dpo-t1.jsonl",
        "sft-t0.5.jsonl",
        "sft-t1.jsonl",
    ]


@pytest.mark.parametrize("name", RUNS)
def test_configuration_and_manifest_say_what_decides_the_result(name):
    config = json.loads((RUNS[name]() / "config.json").read_text())
    assert config["command"] == {"sft": "sft", "dpo": "train"}[name]
    assert config["seed"] == 0
    assert "out" not in config
    resolved = config["resolved"]
    assert re.fullmatch("[0-9a-f]{64}", resolved["data_sha256"])
    assert re.fullmatch("[0-9a-f]{64}", resolved["model_sha256"])
    assert resolved["template"] == {"name": "plain", "text": "{prompt}"}
    assert resolved["max_length"] == 128  # the model's positions, below data.max_length
    manifest = read_manifest(RUNS[name]())
    assert (manifest["status"], manifest["steps"]) == ("finished", 6)
    assert {"torch", "transformers", "direct-preference-optimization"} <= manifest[
        "versions"
    ].keys()


def test_the_manifest_digest_is_that_of_the_weights_it_started_from():
    resolved = json.loads((dpo_run() / "config.json").read_text())["resolved"]
    start = AutoModelForCausalLM.from_pretrained(sft_run() / "model", dtype=torch.float32)
    assert resolved["model_sha256"] == resolved["reference_sha256"] == weights_digest(start)


def test_metrics_have_the_promised_keys_and_finite_numbers():
    every_step = {
        *("step", "epoch", "loss", "gradient_norm", "learning_rate", "num_rows", "num_tokens"),
        *("num_passes", "seconds", "tokens_per_second", "rows_per_second", "peak_memory_bytes"),
    }
    pairs = {
        *("rewards/chosen", "rewards/rejected", "rewards/margin", "rewards/accuracy"),
        *("rewards/ties", "logps/chosen", "logps/rejected", "logps/chosen_change"),
        "logps/rejected_change",
    }
    always = {"step", "epoch", "eval/loss", "eval/seconds"}
    uncertain = ("kl", "entropy", "sample_tokens", "repeated_4grams")
    samples = {f"eval/{name}{end}" for name in uncertain for end in ("", "_stderr")}
    samples |= {"eval/truncated", "eval/empty", "eval/distinct_2grams"}
    expected = {
        "sft": (every_step, always | {"eval/perplexity"}),
        "dpo": (every_step | pairs, always | samples | {f"eval/{name}" for name in pairs}),
    }
    for name, (train_keys, eval_keys) in expected.items():
        for row in read_metrics(RUNS[name]()):
            if "save/bytes" in row:
                assert row.keys() == {"step"} | SAVE
            else:
                assert row.keys() == (train_keys if "loss" in row else eval_keys)
            assert all(math.isfinite(value) for value in row.values())


def test_sft_learns_its_held_out_loss_falls_and_perplexity_is_its_exponential():
    losses = [row["eval/loss"] for row in held_out(sft_run())]
    assert losses == sorted(losses, reverse=True)
    assert losses[0] == pytest.approx(math.log(300), abs=0.2)  # random weights: uniform tokens
    assert losses[-1] < losses[0] - 0.5
    for row in held_out(sft_run()):
        assert row["eval/perplexity"] == pytest.approx(math.exp(row["eval/loss"]))


def test_dpo_begins_at_log_two_with_all_ties_and_no_kl():
    first = held_out(dpo_run())[0]
    assert first["step"] == 0
    assert first["eval/loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert first["eval/rewards/margin"] == pytest.approx(0, abs=1e-6)
    assert (first["eval/rewards/ties"], first["eval/rewards/accuracy"]) == (1, 0)
    assert first["eval/kl"] == pytest.approx(0, abs=1e-6)


def test_dpo_learns_its_held_out_margin_grows_and_the_policy_moves():
    first, *_, last = held_out(dpo_run())
    assert last["eval/rewards/margin"] > 0.01
    assert last["eval/loss"] < first["eval/loss"]
    assert last["eval/rewards/ties"] < 1
    assert last["eval/kl"] > 0
    margin = last["eval/rewards/chosen"] - last["eval/rewards/rejected"]
    assert last["eval/rewards/margin"] == pytest.approx(margin)
    change = last["eval/logps/chosen_change"] - last["eval/logps/rejected_change"]
    assert last["eval/rewards/margin"] == pytest.approx(0.1 * change)


def test_the_reference_is_the_start_and_training_never_writes_to_it():
    before = sha256(sft_run() / "model" / "model.safetensors")
    dpo_run()
    assert sha256(sft_run() / "model" / "model.safetensors") == before


def test_the_reference_in_memory_keeps_its_weights_through_training(tmp_path, monkeypatch):
    sft_run()
    seen = []

    def remember(*arguments, **options):
        policy = open_policy(*arguments, **options)
        seen.append((policy.model, weights_digest(policy.model)))
        return policy

    monkeypatch.setattr(adapters, "open_policy", remember)
    monkeypatch.setattr(session, "open_policy", remember)
    train_preference(dpo_config(tmp_path / "run", {"max_steps": 2}))
    (policy, policy_before), (reference, reference_before) = seen
    assert policy_before == reference_before
    assert weights_digest(reference) == reference_before
    assert weights_digest(policy) != policy_before
    assert all(parameter.grad is None for parameter in reference.parameters())


@pytest.mark.parametrize(("kl_prompts", "models"), [(3, 2), (0, 1)])
def test_a_reference_that_nothing_asks_again_is_let_go(kl_prompts, models, tmp_path, monkeypatch):
    sft_run()
    opened, alive = weakref.WeakSet(), []

    def remember(*arguments, **options):
        policy = open_policy(*arguments, **options)
        opened.add(policy.model)
        return policy

    monkeypatch.setattr(adapters, "open_policy", remember)
    monkeypatch.setattr(session, "open_policy", remember)
    monkeypatch.setattr(jobs, "fit", lambda *_: alive.append((gc.collect(), len(opened))[1]))
    changes = {"evaluation.kl_prompts": kl_prompts, "evaluation.num_samples": 0}
    train_preference(dpo_config(tmp_path / "run", changes))
    assert alive == [models]


def test_another_reference_than_the_start_is_used_when_named(tmp_path):
    other = train_sft(sft_config(tmp_path / "other", {"max_steps": 9}))
    changes = {"reference": str(other), "max_steps": 1}
    run = train_preference(dpo_config(tmp_path / "run", changes))
    first = held_out(run)[0]
    assert first["eval/loss"] != pytest.approx(math.log(2), abs=1e-4)
    assert first["eval/kl"] > 1e-3
    resolved = json.loads((run / "config.json").read_text())["resolved"]
    assert resolved["reference_sha256"] != resolved["model_sha256"]


@pytest.mark.parametrize("name", RUNS)
@pytest.mark.parametrize("which", ["model", "best"])
def test_the_model_folder_loads_and_generates_with_transformers_alone(name, which):
    folder = RUNS[name]() / which
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert len(tokenizer) == model.get_input_embeddings().weight.shape[0] == 300
    ids = tokenizer("What is the capital of Peru?", return_tensors="pt")
    output = model.generate(**ids, max_new_tokens=3)
    assert output.shape[1] <= ids.input_ids.shape[1] + 3
    assert model.generation_config.eos_token_id in (
        tokenizer.eos_token_id,
        [tokenizer.eos_token_id],
    )


def test_the_saved_model_is_the_trained_one():
    from safetensors.torch import load_file

    model = load_file(dpo_run() / "model" / "model.safetensors")
    last = load_file(dpo_run() / "checkpoints" / "step-00000006" / "model.safetensors")
    start = load_file(sft_run() / "model" / "model.safetensors")
    assert all(torch.equal(model[name], last[name]) for name in model)
    assert any(not torch.equal(model[name], start[name]) for name in model)


def test_samples_show_held_out_prompts_beside_what_the_data_has():
    held = {row.prompt: row for row in load_preferences(dpo_config("x").data).test}
    lines = (dpo_run() / "samples" / "final.jsonl").read_text().splitlines()
    assert len(lines) == 2
    for line in map(json.loads, lines):
        assert line.keys() == {"prompt", "generated", "truncated", "chosen", "rejected"}
        assert line["prompt"] in held


def test_train_prompts_are_those_trained_on_and_none_held_out():
    data = load_preferences(dpo_config("x").data)
    digests = load_train_prompts(dpo_run())
    assert {prompt_digest(row.prompt) for row in data.train} <= digests
    assert not digests & {prompt_digest(row.prompt) for row in data.test}


def test_a_dpo_run_remembers_the_prompts_of_the_sft_run_that_it_comes_from():
    assert load_train_prompts(sft_run()) <= load_train_prompts(dpo_run())
    assert load_train_prompts(sft_run()) < load_train_prompts(dpo_run())


def test_win_rates_carry_nulls_counts_intervals_and_ties():
    rows = list(csv.DictReader((evaluation() / "win_rates.csv").read_text().splitlines()))
    by_kind = {kind: [row for row in rows if row["kind"] == kind] for kind in ("model", "null")}
    assert [(row["model"], float(row["temperature"])) for row in by_kind["model"]] == [
        *(("sft", 0.5), ("sft", 1.0)),
        *(("dpo", 0.5), ("dpo", 1.0)),
    ]
    assert len(by_kind["null"]) == 6
    for row in rows:
        assert int(row["wins"]) + int(row["losses"]) + int(row["ties"]) == int(row["n"]) == 12
        assert 0 <= float(row["low"]) < float(row["high"]) <= 1
        assert float(row["confidence"]) == 0.95


def test_win_rates_json_says_how_they_came_to_be():
    content = json.loads((evaluation() / "win_rates.json").read_text())
    meta = content["meta"]
    assert "all-MiniLM-L6-v2" in meta["sentence_model"]
    assert (meta["num_prompts"], meta["seed"]) == (12, 0)
    assert re.fullmatch("[0-9a-f]{64}", meta["data_sha256"])
    assert {test["family"] for test in content["paired_tests"]} == {"models", "null"}


def test_evaluated_prompts_are_held_out_from_both_models():
    trained = load_train_prompts(dpo_run()) | load_train_prompts(sft_run())
    scored = [json.loads(x) for x in (evaluation() / "scored.jsonl").read_text().splitlines()]
    assert scored
    assert not {prompt_digest(row["prompt"]) for row in scored} & trained
    pairs = {row.prompt: row for row in preferences(num_rows=96, seed=0)}
    assert {row["prompt"] for row in scored} <= pairs.keys()


@pytest.mark.parametrize("name", RUNS)
def test_running_a_finished_run_again_does_nothing(name):
    folder = RUNS[name]()
    kept = [f for f in folder.rglob("*") if f.is_file() and f.parent.name != "figures"]
    kept = [f for f in kept if f.name != ".lock"]
    before = {f: (f.stat().st_mtime_ns, sha256(f)) for f in kept}
    command = {"sft": "sft", "dpo": "train"}[name]
    config = {"sft": sft_config, "dpo": dpo_config}[name](folder)
    said = dpo(command, *words_of(config))
    assert said.code == 0
    assert "is finished; nothing to do" in said.err
    assert {f: (f.stat().st_mtime_ns, sha256(f)) for f in kept} == before
    assert files_of(folder) == FILES[name]


def test_two_runs_of_one_configuration_are_equal_bit_for_bit(tmp_path):
    from train.small_runs import outcome

    assert outcome(train_sft(sft_config(tmp_path / "again"))) == outcome(sft_run())


def test_no_file_of_a_run_holds_a_pickle():
    """Pickles begin with protocol 2 to 5, torch's archives with PK."""
    looked_at = 0
    for folder in (sft_run(), dpo_run(), evaluation()):
        for file in folder.rglob("*"):
            if file.is_file():
                head = file.read_bytes()[:2]
                assert not head.startswith(b"PK"), file
                assert not re.match(rb"\x80[\x02-\x05]", head), file
                assert file.suffix not in {".pt", ".pth", ".bin", ".pkl", ".ckpt", ".npy"}, file
                looked_at += 1
    assert looked_at > 60


def test_no_file_of_a_run_holds_a_secret_of_the_environment():
    for folder in (sft_run(), dpo_run(), evaluation()):
        for file in folder.rglob("*"):
            if file.is_file():
                assert CANARY.encode() not in file.read_bytes(), file


def test_the_model_card_names_no_folder_of_this_machine():
    card = (dpo_run() / "model" / "README.md").read_text().split("## Settings")[0]
    assert "| started from | `sft` |" in card
    assert str(dpo_run().parent) not in card


def test_losses_logged_while_training_are_those_of_the_batches():
    losses = [row["loss"] for row in read_metrics(dpo_run()) if "loss" in row]
    assert losses[0] == pytest.approx(math.log(2), abs=1e-6)
    assert np.std(losses[1:]) > 0


def test_evaluating_again_gives_the_same_tables_byte_for_byte():
    tables = [
        evaluation() / name for name in ("win_rates.json", "scored.jsonl", "true_rewards.csv")
    ]
    before = [sha256(table) for table in tables]
    said = dpo("evaluate", *words_of(evaluate_config(evaluation())))
    assert said.code == 0
    assert [sha256(table) for table in tables] == before
