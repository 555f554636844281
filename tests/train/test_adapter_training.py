"""Runs that train an adapter: what they start from, are compared with, keep, write and resume."""

from __future__ import annotations

import json
import math
import os
import re
import shlex
import signal
from functools import cache
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

from dpo.config import PreferenceConfig, RewardConfig, SFTConfig
from dpo.config_files import read_config, validate
from dpo.data.tokenize import TokenSequence
from dpo.errors import InputError, Stopped
from dpo.models.adapters import AdapterSettings, PolicyAtStart, has_adapter, open_model
from dpo.models.load import find_model, load_model, weights_digest
from dpo.models.reward import open_reward_model, sequence_scores
from dpo.online_config import OnlineConfig, PPOConfig
from dpo.train import adapters as train_adapters
from dpo.train.jobs import train_preference, train_sft
from dpo.train.online import train_online
from dpo.train.ppo import train_ppo
from dpo.train.reward import train_reward
from dpo.train.run import load_train_prompts, read_manifest, read_metrics
from train.small_runs import (
    COMMON,
    DATA,
    dpo,
    dpo_config,
    evaluate_config,
    forked,
    merged,
    outcome,
    scratch,
    sft_config,
    sft_run,
    words_of,
)
from train.test_resume import steps, stop_at

ROOT = Path(__file__).parents[2]
ROUNDING = 1e-7
"""Of a loss of float32 log-probabilities whose batches are composed otherwise."""
RANK = {"adapter.rank": 3}


def lora_sft_config(out: Path, changes: dict | None = None) -> SFTConfig:
    """Another SFT, of an adapter, on the model of `sft_run()`."""
    start = {"model": {"path": str(sft_run())}, "seed": 1, **RANK}
    return sft_config(out, start | (changes or {}))


@cache
def lora_sft() -> Path:
    """A finished run of an adapter; nobody writes to it."""
    folder = scratch() / "lora sft"
    said = dpo("sft", *words_of(lora_sft_config(folder)))
    assert said.code == 0, said.all
    assert re.search(r"Adapter: [\d,]+ of [\d,]+ parameters are trained \(\d+\.\d\d%\)", said.err)
    return folder


@cache
def lora_dpo() -> Path:
    """A finished run that trains that adapter further."""
    folder = scratch() / "lora dpo"
    changes = {"model.path": str(lora_sft()), "adapter": {"kind": "lora"}}
    said = dpo("train", *words_of(dpo_config(folder, changes)))
    assert said.code == 0, said.all
    return folder


def first(folder: Path) -> dict:
    """What was measured before the first step."""
    return next(row for row in read_metrics(folder) if "eval/loss" in row)


def opened(folder: Path) -> torch.nn.Module:
    return open_model(find_model(str(folder)))


# -- what a run starts from and is compared with -------------------------------------------------


@pytest.mark.parametrize("kind", ["lora", "dora", "rslora"])
def test_dpo_starts_at_its_reference_exactly_and_ends_elsewhere(kind, tmp_path) -> None:
    folder = train_preference(dpo_config(tmp_path / "run", {"adapter": {"kind": kind, "rank": 3}}))
    start = first(folder)
    assert start["eval/loss"] == pytest.approx(math.log(2), abs=ROUNDING)
    assert start["eval/rewards/margin"] == pytest.approx(0, abs=ROUNDING)
    assert start["eval/kl"] == 0
    last = [row for row in read_metrics(folder) if "eval/kl" in row][-1]
    assert last["eval/kl"] > 0
    assert last["eval/loss"] != start["eval/loss"]
    resolved = json.loads((folder / "config.json").read_text())["resolved"]
    plain = load_model(find_model(str(sft_run())))
    assert resolved["reference_sha256"] == weights_digest(plain) != resolved["model_sha256"]


def test_an_sft_adapter_goes_on_against_itself_and_not_against_the_base() -> None:
    start = first(lora_dpo())
    assert start["eval/loss"] == pytest.approx(math.log(2), abs=ROUNDING)
    assert start["eval/rewards/margin"] == pytest.approx(0, abs=ROUNDING)
    assert start["eval/kl"] == 0
    config = json.loads((lora_dpo() / "config.json").read_text())
    base = weights_digest(load_model(find_model(str(sft_run()))))
    model = open_model(find_model(str(lora_sft())), adapter=AdapterSettings())
    assert config["resolved"]["reference_sha256"] != base
    view = PolicyAtStart(model, continued=True)
    assert config["resolved"]["reference_sha256"] == weights_digest(view)
    saved = json.loads((lora_dpo() / "model" / "adapter_config.json").read_text())
    assert saved["r"] == 3
    assert Path(saved["base_model_name_or_path"]) == (sft_run() / "model").resolve()


def test_no_second_model_is_opened_for_the_reference(tmp_path, monkeypatch) -> None:
    opened_apart = []
    monkeypatch.setattr(train_adapters, "open_reference", lambda *args: opened_apart.append(args))
    train_preference(dpo_config(tmp_path / "run", {**RANK, "max_steps": 1}))
    assert opened_apart == []


def test_a_reference_that_is_named_is_opened_and_measured(tmp_path) -> None:
    changes = {**RANK, "reference": {"path": str(lora_sft())}, "max_steps": 1}
    folder = train_preference(dpo_config(tmp_path / "run", changes))
    assert first(folder)["eval/kl"] > 0


def test_without_adapter_an_adapters_folder_is_a_model_as_any(tmp_path) -> None:
    changes = {"model.path": str(lora_sft()), "max_steps": 1}
    folder = train_preference(dpo_config(tmp_path / "run", changes))
    assert (folder / "model" / "model.safetensors").is_file()
    assert first(folder)["eval/loss"] == pytest.approx(math.log(2), abs=ROUNDING)


@pytest.mark.parametrize("loss", ["kto", "tdpo2"])
def test_losses_that_ask_the_reference_at_every_step_have_it(loss, tmp_path) -> None:
    changes = {**RANK, "loss": {"name": loss}, "adapter.dropout": 0.3, "max_steps": 2}
    folder = train_preference(dpo_config(tmp_path / "run", changes))
    assert first(folder)["eval/kl"] == 0
    assert all(math.isfinite(row["loss"]) for row in read_metrics(folder) if "loss" in row)


# -- what it keeps and writes --------------------------------------------------------------------


def test_a_checkpoint_holds_the_trained_weights_and_their_state_alone() -> None:
    (newest, *_) = sorted((lora_sft() / "checkpoints").glob("step-*"), reverse=True)
    weights = load_file(newest / "model.safetensors")
    parameters = {n for n, p in weights.items() if p.requires_grad or ".lora_" in n}
    model = open_model(find_model(str(lora_sft())), adapter=AdapterSettings())
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert parameters == trained
    assert weights.keys() - parameters == {name for name, _ in model.named_buffers()}
    state = load_file(newest / "optimizer.safetensors")
    assert {name.rpartition("/")[0] for name in state} == trained
    whole = (sft_run() / "model" / "model.safetensors").stat().st_size
    assert (newest / "model.safetensors").stat().st_size < whole / 3


def test_the_manifest_counts_what_is_trained() -> None:
    manifest, whole = read_manifest(lora_sft()), read_manifest(sft_run())
    assert whole["trained_parameters"] == whole["parameters"]
    added = sum(
        p.numel() for p in load_file(lora_sft() / "model" / "adapter_model.safetensors").values()
    )
    assert manifest["trained_parameters"] == added
    assert manifest["parameters"] == whole["parameters"] + added


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # in peft
@pytest.mark.parametrize("name", ["model", "best"])
@torch.no_grad()
def test_a_runs_folders_load_in_peft_and_in_transformers(name) -> None:
    folder = lora_dpo() / name
    assert not (folder / "model.safetensors").exists()
    base = AutoModelForCausalLM.from_pretrained(sft_run() / "model")
    theirs = peft.PeftModel.from_pretrained(base, folder).eval()
    auto = AutoModelForCausalLM.from_pretrained(folder).eval()
    ours = opened(folder)
    ids = torch.tensor([AutoTokenizer.from_pretrained(folder)("What is the").input_ids])
    for model in (theirs, auto):
        torch.testing.assert_close(model(ids).logits, ours(ids).logits, rtol=1e-4, atol=1e-5)


def test_the_text_generation_pipeline_takes_the_folder() -> None:
    generate = pipeline("text-generation", model=str(lora_dpo() / "model"))
    (said,) = generate("What is the", max_new_tokens=4, do_sample=False)
    assert said["generated_text"].startswith("What is the")


def test_an_evaluation_takes_adapters(tmp_path) -> None:
    changes = {"models": {"sft": str(lora_sft()), "dpo": str(lora_dpo())}, "temperatures": [1.0]}
    said = dpo("evaluate", *words_of(evaluate_config(tmp_path / "evaluation", changes)))
    assert said.code == 0, said.all
    assert (tmp_path / "evaluation" / "win_rates.csv").is_file()


@torch.no_grad()
def test_merged_it_is_a_whole_model_that_remembers_its_prompts(tmp_path) -> None:
    said = dpo("merge", lora_dpo(), "--out", tmp_path / "merged")
    assert said.code == 0, said.all
    whole = load_model(find_model(str(tmp_path / "merged")))
    model = open_model(find_model(str(lora_dpo())), adapter=AdapterSettings())
    ids = torch.tensor([[5, 6, 7, 8]])
    torch.testing.assert_close(whole(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-5)
    base = load_model(find_model(str(sft_run())))
    assert (whole(ids).logits - base(ids).logits).abs().max() > 1e-3
    assert load_train_prompts(tmp_path / "merged") == load_train_prompts(lora_dpo()) != set()
    names = {f.name for f in (tmp_path / "merged").iterdir()}
    assert {"model.safetensors", "config.json", "tokenizer.json", "prompt_template.json"} <= names
    assert not [name for name in names if "adapter" in name]
    again = dpo("merge", lora_dpo(), "--out", tmp_path / "merged")
    assert again.code == 2
    assert "is there already; name a new folder" in again.err
    nothing = dpo("merge", sft_run(), "--out", tmp_path / "other")
    assert nothing.code == 2
    assert "holds no adapter (expected adapter_config.json)" in nothing.err


def test_an_adapter_whose_base_was_trained_again_is_refused(tmp_path) -> None:
    start = tmp_path / "start"
    train_sft(sft_config(start, {"max_steps": 1}))
    config = {"model.path": str(start), "max_steps": 1, **RANK}
    train_preference(dpo_config(tmp_path / "run", config))
    load_model(find_model(str(sft_run()))).save_pretrained(start / "model")
    with pytest.raises(InputError, match="was trained on other weights than"):
        opened(tmp_path / "run")


# -- every method --------------------------------------------------------------------------------

SAMPLED = {
    "data": DATA,
    "reward": {"function": "synthetic"},
    "rounds": 2,
    "prompts_per_round": 6,
    "samples_per_prompt": 3,
    "sampling": {"max_new_tokens": 8},
    "batch": {"size": 4},
    "optimizer": {"learning_rate": 0.003},
    "save_every": 1,
    "evaluation": {"max_rows": 8, "num_samples": 2, "max_new_tokens": 8},
    "adapter": {"rank": 3},
}


def sampled_config(schema: type, out: Path, changes: dict):
    start = SAMPLED | {"model": {"path": str(lora_sft())}, "out": str(out)}
    return validate(schema, merged(start, changes))


SAMPLING_RUNS = {
    "online": (OnlineConfig, train_online, {"prompts_per_round": 12, "loss": {"beta": 0.5}}),
    "ppo": (PPOConfig, train_ppo, {"epochs_per_round": 1}),
    "ppo with one trunk": (PPOConfig, train_ppo, {"epochs_per_round": 1, "critic": "shared"}),
}


@pytest.mark.parametrize("name", SAMPLING_RUNS)
def test_methods_that_sample_train_an_adapter_against_its_start(name, tmp_path) -> None:
    schema, train, changes = SAMPLING_RUNS[name]
    folder = train(sampled_config(schema, tmp_path / "run", changes))
    measured = [row for row in read_metrics(folder) if "eval/kl" in row]
    assert measured[0]["eval/kl"] == 0 < measured[-1]["eval/kl"]
    assert (folder / "model" / "adapter_model.safetensors").is_file()
    newest = max((folder / "checkpoints").glob("step-*"))
    weights = load_file(newest / "model.safetensors")
    assert all(".lora_" in n or "value_head" in n for n in weights)
    manifest = read_manifest(folder)
    assert manifest["trained_parameters"] < manifest["parameters"] / 2


def test_a_reward_model_is_trained_by_an_adapter_and_written_whole(tmp_path) -> None:
    start = {
        "model": {"path": str(sft_run())},
        "out": str(tmp_path / "run"),
        "optimizer": {"learning_rate": 0.003},
        "evaluation": {"every": 3, "max_rows": 16},
        "adapter": {"rank": 3},
    }
    folder = train_reward(validate(RewardConfig, merged(COMMON, start)))
    weights = load_file(max((folder / "checkpoints").glob("step-*")) / "model.safetensors")
    assert all(".lora_" in n or n == "score.weight" for n in weights)
    model, tokenizer, _ = open_reward_model(str(folder))
    assert not has_adapter(model)
    lines = (folder / "samples" / "held_out.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(lines) == 16  # scored by the model with its adapter
    for row in map(json.loads, lines):
        prompt = tokenizer(row["prompt"]).input_ids
        ends = [[*tokenizer(r).input_ids, tokenizer.eos_token_id] for r in row["responses"]]
        sequences = [TokenSequence((*prompt, *end), len(prompt)) for end in ends]
        found = sequence_scores(model, sequences).tolist()
        assert found == pytest.approx(row["rewards"], abs=1e-5)


@pytest.mark.parametrize(
    ("schema", "changes", "sentence"),
    [
        (SFTConfig, {"model": {"fresh": {}}}, "adapter: random weights (model.fresh) are trained"),
        (PreferenceConfig, {"moving_reference": {}}, "moving_reference: with an adapter the"),
        (OnlineConfig, {"moving_reference": {}}, "moving_reference: with an adapter the"),
        (OnlineConfig, {"reset_reference_each_round": True}, "reset_reference_each_round: with"),
        (PPOConfig, {"adapter": {"dropout": 0.1}}, "adapter.dropout: PPO compares probabilities"),
        (PPOConfig, {"critic": "reward_model"}, "critic: reward_model is trained whole"),
        (SFTConfig, {"adapter": {"kind": "ia3"}}, "adapter.kind: "),
        (SFTConfig, {"adapter": {"rank": 0}}, "adapter.rank: "),
        (SFTConfig, {"adapter": {"target_modules": []}}, "adapter.target_modules: "),
        (SFTConfig, {"adapter": {"quantize": "2bit"}}, "adapter.quantize: "),
        (SFTConfig, {"adapter": {"modules_to_save": ["lm_head"]}}, "modules_to_save: unknown key"),
    ],
)
def test_what_an_adapter_does_not_go_with_is_refused_in_a_sentence(
    schema, changes, sentence
) -> None:
    start = {"model": {"path": "gpt2"}, "out": "runs/x", "adapter": {}}
    if schema in (OnlineConfig, PPOConfig):
        start["reward"] = {"model": "runs/reward"}
    with pytest.raises(InputError) as error:
        validate(schema, start | changes)
    assert sentence in str(error.value)


def test_adapter_may_be_one_word() -> None:
    words = ["model=m", "out=o"]
    for given in (["adapter=dora"], ["adapter.kind=dora"]):
        assert read_config(SFTConfig, None, [*words, *given]).adapter.kind == "dora"
    both = read_config(SFTConfig, None, [*words, "adapter=dora", "adapter.rank=8"])
    assert (both.adapter.kind, both.adapter.rank) == ("dora", 8)
    assert read_config(SFTConfig, None, words).adapter is None


# -- kills ---------------------------------------------------------------------------------------


def adapter_dpo_config(out: Path, changes: dict) -> PreferenceConfig:
    return dpo_config(out, {"model.path": str(lora_sft()), **changes})


VARIANTS = {
    "sft with dropout": (lora_sft_config, train_sft, {"adapter.dropout": 0.2}),
    "dora, accumulating": (
        dpo_config,
        train_preference,
        {"adapter": {"kind": "dora", "rank": 3}, "batch.max_tokens": 200},
    ),
    "going on with dropout": (
        adapter_dpo_config,
        train_preference,
        {"adapter": {"dropout": 0.2}, "loss": {"name": "tdpo2"}},
    ),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_stopped_and_killed_it_ends_bit_for_bit_as_if_nothing_had_been(variant, tmp_path) -> None:
    make, train, changes = VARIANTS[variant]
    expected = outcome(train(make(tmp_path / "whole", changes)))
    folder = tmp_path / "run"

    def interrupted(step: int, number: int) -> None:
        stop_at(step, number)
        train(make(folder, changes))

    assert forked(lambda: interrupted(3, signal.SIGTERM)) == Stopped.exit_code
    assert forked(lambda: interrupted(5, signal.SIGKILL)) == -signal.SIGKILL
    train(make(folder, changes))
    assert outcome(folder) == expected
    assert steps(folder) == ([1, 2, 3, 4, 5, 6], [0, 3, 6])
    names = [name for name in expected if name.startswith(("model/", "best/"))]
    assert names == ["best/adapter_model.safetensors", "model/adapter_model.safetensors"]


# -- the document --------------------------------------------------------------------------------


def test_the_commands_of_the_document_run_as_they_stand(tmp_path, monkeypatch) -> None:
    """On a tiny model in place of the one that they name, and with a few steps each."""
    text = (ROOT / "docs" / "adapters.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```bash\n(# A whole sequence.*?)```", text, flags=re.DOTALL)
    lines = [line for line in block.replace("\\\n", " ").splitlines() if line.startswith("dpo ")]
    assert [shlex.split(line)[1] for line in lines] == [
        "data",
        "sft",
        "sft",
        "train",
        "evaluate",
        "merge",
    ]
    monkeypatch.chdir(tmp_path)
    small = {
        "sft": ["max_steps=2", "evaluation.max_rows=8", "evaluation.num_samples=1"],
        "train": ["max_steps=2", "evaluation.max_rows=8", "evaluation.kl_prompts=2"],
        "evaluate": ["max_prompts=4", "max_new_tokens=4", "sentence_model=offline"],
    }
    for line in lines:
        words = shlex.split(line, comments=True)[1:]
        said = dpo(*words, *small.get(words[0], []))
        assert said.code == 0, f"{line}: {said.all}"
    whole = load_model(find_model("runs/dpo-merged"))
    assert not has_adapter(whole)
    assert os.listdir("runs/dpo/model").count("adapter_model.safetensors") == 1
