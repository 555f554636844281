"""Whole runs of PPO: what they log, that they resume, that they get better, what they refuse."""

from __future__ import annotations

import json
import os
import re
import signal
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from small_runs import DATA, FRESH, dpo, forked, merged, outcome, scratch, sft_run, sha256, words_of

from dpo.config import ModelConfig, RewardConfig, SFTConfig
from dpo.config_files import read_config, validate
from dpo.core.ppo import adapted_coefficient
from dpo.errors import InputError, Stopped
from dpo.models.load import find_model, load_model
from dpo.models.reward import open_reward_model
from dpo.online_config import PPOConfig
from dpo.train.jobs import train_sft
from dpo.train.ppo import critic_trunk, train_ppo
from dpo.train.reward import train_reward
from dpo.train.run import Run, read_manifest, read_metrics
from dpo.train.session import open_policy

LIKES_LENGTH = "def f(prompts, responses): return [float(len(r) // 8) for r in responses]\n"
"""A reward that tells the samples of an almost random model apart."""

START = {
    "data": DATA,
    "rounds": 3,
    "prompts_per_round": 6,
    "samples_per_prompt": 2,
    "epochs_per_round": 2,
    "sampling": {"max_new_tokens": 8},
    "batch": {"size": 4},
    "save_every": 1,
    "optimizer": {"learning_rate": 0.003},
    "evaluation": {"max_rows": 8, "num_samples": 2, "max_new_tokens": 8},
}
STEPS = 6
"""Of a round: two passes over twelve responses, four at a time."""


def config_of(out: Path, changes: dict | None = None) -> PPOConfig:
    file = scratch() / "likes_length.py"
    file.write_text(LIKES_LENGTH, "utf-8")
    start = START | {
        "model": {"path": str(sft_run())},
        "out": str(out),
        "reward": {"function": f"{file}:f"},
    }
    return validate(PPOConfig, merged(start, changes or {}))


def steps_of(folder: Path) -> list[dict]:
    return [row for row in read_metrics(folder) if "loss" in row]


def held_out_of(folder: Path) -> list[dict]:
    return [row for row in read_metrics(folder) if "eval/loss" in row]


@cache
def reward_run() -> Path:
    """A reward model from the same SFT model."""
    values = {
        "model": {"path": str(sft_run())},
        "data": DATA,
        "out": str(scratch() / "reward-of-ppo"),
        "max_steps": 2,
        "batch": {"size": 8},
        "evaluation": {"max_rows": 8},
    }
    return train_reward(validate(RewardConfig, values))


# -- what a run logs ---------------------------------------------------------------------------


def test_a_run_writes_its_samples_and_what_it_logs_of_them_is_true(tmp_path):
    folder = tmp_path / "run"
    changes = {"kl": {"coefficient": 0.2}, "value_coefficient": 0.3}
    said = dpo("ppo", *words_of(config_of(folder, changes)))
    assert said.code == 0, said.all
    steps = steps_of(folder)
    assert len(steps) == 3 * STEPS
    for number in range(3):
        file = folder / "samples" / f"round-{number + 1:04d}.jsonl"
        rows = [json.loads(line) for line in file.read_text("utf-8").splitlines()]
        scores = [score for row in rows for score in row["scores"]]
        assert len(scores) == 12
        assert scores == [len(text) // 8 for row in rows for text in row["responses"]]
        logged = steps[number * STEPS : (number + 1) * STEPS]
        for row in logged:
            assert row["samples/reward"] == pytest.approx(sum(scores) / 12)
            assert row["samples/drawn"] == pytest.approx(12 * (number + 1))
            penalised = row["samples/reward"] - 0.2 * row["samples/kl_k1"]
            assert row["samples/penalised_reward"] == pytest.approx(penalised)
            assert 0 < row["samples/entropy"] < 7
            assert 0 <= row["samples/truncated"] <= 1
            assert 1 <= row["samples/tokens"] <= 8
            assert row["ppo/kl_coefficient"] == pytest.approx(0.2)
            parts = row["ppo/policy_loss"] + 0.3 * row["ppo/value_loss"]
            assert row["loss"] == pytest.approx(parts)
        # Before a round's first step the policy is the one that drew its samples.
        assert logged[0]["ppo/approximate_kl"] < 1e-10
        assert logged[0]["ppo/clip_fraction"] == 0
        assert logged[-1]["ppo/approximate_kl"] > 1e-7
    assert steps[0]["samples/kl_k1"] == pytest.approx(0, abs=1e-4)  # the reference itself
    assert steps[-1]["samples/kl_k3"] > 1e-3
    held_out = held_out_of(folder)
    assert [row["step"] for row in held_out] == [0, 6, 12, 18]
    for row in held_out:
        assert row["eval/loss"] == pytest.approx(0.2 * row["eval/kl"] - row["eval/reward"])
        assert row["eval/reward_stderr"] > 0
    assert held_out[0]["eval/kl"] == pytest.approx(0, abs=1e-9)
    manifest = read_manifest(folder)
    assert manifest["best_loss"] == min(row["eval/loss"] for row in held_out)
    load_model(find_model(str(folder)))


def test_a_saved_policy_is_a_language_model_without_the_values(tmp_path):
    folder = train_ppo(config_of(tmp_path / "run", {"rounds": 1}))
    start, trained = (
        load_model(find_model(str(path))).state_dict() for path in (sft_run(), folder)
    )
    assert trained.keys() == start.keys()
    assert any(not torch.equal(trained[name], start[name]) for name in start)
    saved = load_file(max((folder / "checkpoints").glob("step-*")) / "model.safetensors")
    assert {name.split(".")[0] for name in saved} == {"policy", "trunk", "value_head"}
    assert saved["value_head.weight"].any()


@pytest.mark.parametrize("critic", ["separate", "shared"])
def test_a_critic_learns_what_to_expect(critic, tmp_path):
    """From nothing to most of it: the score is the prompt's own, so that all of it can be told."""
    file = tmp_path / "of_prompts.py"
    file.write_text(
        "def f(prompts, responses): return [float('capital' in p) * 2 - 1 for p in prompts]\n"
    )
    changes = {
        "critic": critic,
        "reward": {"function": f"{file}:f"},
        "rounds": 6,
        "prompts_per_round": 24,
        "batch.size": 12,
        "epochs_per_round": 4,
        "value_clip": None,
        "value_coefficient": 1.0,
        "save_every": "epoch",
        "optimizer": {"learning_rate": 0.003, "warmup": 0.0, "schedule": "constant"},
        "evaluation.every": 100,
    }
    steps = steps_of(train_ppo(config_of(tmp_path / "run", changes)))
    explained = [row["ppo/explained_variance"] for row in steps]
    assert explained[0] == pytest.approx(0, abs=1e-9)
    assert explained[-1] > 0.5


def test_a_critic_begins_as_a_copy_of_the_policy_or_of_the_reward_model(tmp_path):
    changes = {"reward": {"model": str(reward_run())}, "rounds": 1}
    policy = open_policy(ModelConfig(path=str(sft_run())), [], 0, False)
    reward_model, _, _ = open_reward_model(str(reward_run()))
    sources = {"separate": policy.model, "reward_model": reward_model}
    for critic, source in sources.items():
        config = config_of(tmp_path / critic, changes | {"critic": critic})
        trunk = critic_trunk(config, policy, False)
        expected = source.base_model
        assert not {id(p) for p in trunk.parameters()} & {id(p) for p in expected.parameters()}
        assert trunk.state_dict().keys() == expected.state_dict().keys()
        for name, x in expected.state_dict().items():
            assert torch.equal(trunk.state_dict()[name], x)
        steps = steps_of(train_ppo(config))
        assert steps[0]["ppo/value_loss"] > 0
    assert critic_trunk(config_of(tmp_path, {"critic": "shared"}), policy, False) is None
    one, other = (source.base_model.h[0].attn.c_attn.weight for source in sources.values())
    assert not torch.equal(one, other)


def test_the_coefficient_follows_the_kl_of_the_round_before(tmp_path):
    changes = {"rounds": 4, "kl": {"coefficient": 0.1, "target": 0.05, "gain": 0.5}}
    steps = steps_of(train_ppo(config_of(tmp_path / "run", changes)))[::STEPS]
    expected = 0.1
    for i, row in enumerate(steps):
        if i > 0:
            kl = steps[i - 1]["samples/kl_k1"]
            expected = adapted_coefficient(expected, kl, target=0.05, gain=0.5)
        assert row["ppo/kl_coefficient"] == pytest.approx(expected)
    assert steps[1]["ppo/kl_coefficient"] == pytest.approx(0.09)  # there was no KL at first
    for row in held_out_of(tmp_path / "run"):
        assert row["eval/loss"] == pytest.approx(0.1 * row["eval/kl"] - row["eval/reward"])


# -- resuming ----------------------------------------------------------------------------------

VARIANTS = {
    "separate critic": {},
    "shared, adapting": {
        "critic": "shared",
        "kl": {"coefficient": 0.1, "target": 0.05, "gain": 0.5},
        "missing_eos_penalty": 1.0,
    },
    "bf16, accumulating, recomputing": {
        "precision": "bf16",
        "batch.max_tokens": 60,
        "gradient_checkpointing": True,
        "kl": {"coefficient": 0.1, "estimator": "k3"},
    },
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_stopped_and_killed_inside_a_round_it_ends_as_if_nothing_had_been(variant, tmp_path):
    sft_run()  # before any fork, so that children share it
    changes = VARIANTS[variant]
    train_ppo(config_of(tmp_path / "whole", changes))
    folder = tmp_path / "run"

    def until(step, number):
        log = Run.log

        def logged(run, row):
            log(run, row)
            if row["step"] == step and "loss" in row:
                os.kill(os.getpid(), number)

        Run.log = logged
        train_ppo(config_of(folder, changes))

    # Rounds have 6 steps, so all three are inside one.
    assert forked(lambda: until(2, signal.SIGTERM)) == Stopped.exit_code
    assert forked(lambda: until(9, signal.SIGKILL)) == -signal.SIGKILL
    assert forked(lambda: until(10, signal.SIGKILL)) == -signal.SIGKILL
    train_ppo(config_of(folder, changes))
    assert outcome(folder) == outcome(tmp_path / "whole")


def test_accumulating_changes_no_step_beyond_rounding(tmp_path):
    whole = steps_of(train_ppo(config_of(tmp_path / "whole", {"rounds": 1})))
    parts = steps_of(train_ppo(config_of(tmp_path / "parts", {"rounds": 1, "batch.max_tokens": 1})))
    assert [row["num_passes"] for row in whole] == [1] * STEPS
    assert [row["num_passes"] for row in parts] == [4] * STEPS
    for a, b in zip(whole, parts, strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-3, abs=1e-5)
        assert b["gradient_norm"] == pytest.approx(a["gradient_norm"], rel=1e-3)


def test_a_run_says_what_its_own_samples_tell(tmp_path):
    said = dpo("ppo", *words_of(config_of(tmp_path / "run", {"rounds": 1})))
    assert said.code == 0, said.all
    found = json.loads((tmp_path / "run" / "diagnostics.json").read_text("utf-8"))
    assert {"kl", "entropy", "repeated_4grams", "truncated"} <= found["numbers"]["on_policy"].keys()
    titles = [reading["title"] for reading in found["readings"]]
    assert {"Distance from the reference", "Diversity", "Repetition"} <= {*titles}
    assert "Diagnostics: " in said.out
    page = (tmp_path / "run" / "index.html").read_text("utf-8")
    assert "Distance from the reference" in page


def test_a_run_goes_on_under_its_own_reward_only(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text("def f(prompts, responses): return [float(len(r)) for r in responses]\n")
    config = config_of(tmp_path / "run", {"reward": {"function": f"{file}:f"}, "rounds": 1})
    assert dpo("ppo", *words_of(config)).code == 0
    before = sha256(tmp_path / "run" / "metrics.jsonl")
    assert dpo("ppo", *words_of(config)).code == 0
    assert sha256(tmp_path / "run" / "metrics.jsonl") == before  # a finished run does nothing
    file.write_text("def f(prompts, responses): return [-float(len(r)) for r in responses]\n")
    said = dpo("ppo", *words_of(config))
    assert said.code == 2
    assert "reward_sha256" in said.err


# -- what is refused ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"reward": {}}, "give either a reward model (model) or a function"),
        ({"rounds": 0}, "rounds"),
        ({"clip": 1.0}, "clip"),
        ({"gamma": 0.0}, "gamma"),
        ({"gae_lambda": 1.5}, "gae_lambda"),
        ({"value_clip": 0}, "value_clip"),
        ({"kl": {"coefficient": -1}}, "kl.coefficient"),
        ({"kl": {"estimator": "k2"}}, "kl.estimator"),
        ({"kl": {"gain": 0.2}}, "gain: has no effect without a target"),
        ({"kl": {"coefficient": 0, "target": 6}}, "0 cannot be adapted to a target"),
        ({"critic": "reward_model"}, "there is no reward model to copy; give reward.model"),
        ({"dropout": True}, "dropout: PPO compares probabilities"),
        ({"sampling": {"temperature": 0.7}}, "PPO samples from the policy itself, at 1"),
        ({"batch": {"size": 13}}, "13 is more than the 12 responses of a round"),
        ({"data.max_length": 64}, "data.max_length: has no effect on samples"),
        ({"model": {"fresh": FRESH}}, "PPO starts from a trained model"),
        ({"loss": {"name": "dpo"}}, "loss: unknown key"),
        ({"sampling": {"max_new_tokens": 128}}, "max_new_tokens: 128 leaves no room"),
    ],
)
def test_a_wrong_configuration_is_refused_in_a_sentence(changes, sentence, tmp_path):
    start = {"out": str(tmp_path / "run"), "reward": {"function": "synthetic"}}
    values = merged(START, start | {"model": {"path": str(sft_run())}} | changes)
    with pytest.raises(InputError) as caught:
        train_ppo(validate(PPOConfig, values))
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_reward_model_of_another_tokenizer_is_no_critic(tmp_path):
    other = {**FRESH, "vocab_size": 280}
    values = {
        "model": {"fresh": other},
        "data": DATA,
        "out": str(tmp_path / "other"),
        "max_steps": 1,
        "evaluation": {"max_rows": 4},
    }
    reward = train_reward(validate(RewardConfig, values))
    values = merged(START, {"model": {"path": str(sft_run())}, "out": str(tmp_path / "run")})
    values |= {"reward": {"model": str(reward)}, "critic": "reward_model"}
    with pytest.raises(InputError, match="has another tokenizer than"):
        train_ppo(validate(PPOConfig, values))


def test_a_setting_is_given_in_a_word():
    words = ["model=runs/sft", "out=runs/ppo", "reward=runs/reward", "kl.coefficient=0.2"]
    config = read_config(PPOConfig, None, words)
    assert (config.reward.model, config.kl.coefficient) == ("runs/reward", 0.2)
    assert read_config(PPOConfig, None, [*words, "value_clip=null"]).value_clip is None


# -- the page ----------------------------------------------------------------------------------

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "ppo.md").read_text(encoding="utf-8")


def test_the_page_names_tests_that_exist():
    sources = "".join(file.read_text(encoding="utf-8") for file in ROOT.glob("tests/*/test_*.py"))
    named = set(re.findall(r"`(test_\w+)`", PAGE))
    assert len(named) > 25
    assert not [name for name in named if f"def {name}(" not in sources]


def test_the_page_tells_the_defaults_as_they_are():
    config = read_config(PPOConfig, None, ["model=m", "out=o", "reward=r"])
    told = re.findall(r"`([a-z_.]+)=([\w.]+)`", PAGE)
    assert len(told) >= 6
    for key, value in told:
        found = config
        for part in key.split("."):
            found = getattr(found, part)
        assert type(found)(value) == found, key


def test_the_page_lists_what_is_logged(tmp_path):
    rows = read_metrics(train_ppo(config_of(tmp_path / "run", {"rounds": 1})))
    logged = {key for row in rows for key in row if key.startswith(("samples/", "ppo/"))}
    assert set(re.findall(r"`((?:samples|ppo)/\w+)`", PAGE)) == logged


# -- that it works -----------------------------------------------------------------------------


def bandit(tmp_path: Path, **changes: object) -> Path:
    """One token to each prompt, and a reward of its own for every token."""
    tmp_path.mkdir(exist_ok=True)
    file = tmp_path / "bandit.py"
    file.write_text(
        "def f(prompts, responses):\n"
        "    return [float('e' in r) - 0.5 * ('a' in r) for r in responses]\n"
    )
    values = {
        "model": {"path": str(sft_run())},
        "data": DATA,
        "out": str(tmp_path / "run"),
        "reward": {"function": f"{file}:f"},
        "rounds": 20,
        "prompts_per_round": 48,
        "sampling": {"max_new_tokens": 1},
        "batch": {"size": 24},
        "kl": {"coefficient": 0.02},
        "optimizer": {"learning_rate": 0.01, "warmup": 0.0},
        "evaluation": {"max_new_tokens": 1, "num_samples": 0, "samples_per_prompt": 4, "every": 20},
    }
    return train_ppo(validate(PPOConfig, merged(values, changes)))


@pytest.mark.parametrize("critic", ["separate", "shared"])
def test_a_bandit_learns_which_arm_pays(critic, tmp_path):
    held_out = held_out_of(bandit(tmp_path, critic=critic))
    assert held_out[0]["eval/reward"] < 0.4
    assert held_out[-1]["eval/reward"] > 0.85


def test_a_huge_penalty_keeps_the_policy_at_the_reference(tmp_path):
    free = held_out_of(bandit(tmp_path / "free", rounds=8))[-1]
    bound = held_out_of(bandit(tmp_path / "bound", rounds=8, **{"kl.coefficient": 1000.0}))[-1]
    assert free["eval/kl"] > 0.5
    assert bound["eval/kl"] < 0.1 * free["eval/kl"]
    assert bound["eval/reward"] < free["eval/reward"]


LANGUAGE = {"test_fraction": 0.25, "synthetic": {"num_facts": 16, "num_rows": 2000}}


@pytest.mark.slow
def test_the_true_reward_rises_on_held_out_prompts(tmp_path):
    fresh = {"width": 64, "layers": 2, "heads": 2, "positions": 128}
    start = {
        "model": {"fresh": fresh},
        "data": LANGUAGE,
        "out": str(tmp_path / "sft"),
        "epochs": 4,
        "optimizer": {"learning_rate": 0.005},
        "batch": {"size": 32},
        "evaluation": {"num_samples": 0},
    }
    values = {
        "model": {"path": str(train_sft(validate(SFTConfig, start)))},
        "data": LANGUAGE,
        "out": str(tmp_path / "run"),
        "reward": {"function": "synthetic"},
        "rounds": 10,
        "prompts_per_round": 128,
        "sampling": {"max_new_tokens": 40},
        "batch": {"size": 32},
        "optimizer": {"learning_rate": 3e-4, "warmup": 0.0},
        "evaluation": {
            "max_new_tokens": 40,
            "samples_per_prompt": 8,
            "num_samples": 0,
            "every": 160,
        },
    }
    held_out = held_out_of(train_ppo(validate(PPOConfig, values)))
    first, last = held_out[0], held_out[-1]
    assert last["eval/reward"] > first["eval/reward"] + 0.7
    assert last["eval/reward_stderr"] < 0.35
    assert 0.1 < last["eval/kl"] < 10
