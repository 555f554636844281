"""Online DPO: what is sampled, what is made of it, that it gets better, and that it resumes."""

from __future__ import annotations

import json
import math
import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from small_runs import (
    DATA,
    EVALUATION,
    FRESH,
    dpo,
    forked,
    merged,
    outcome,
    scratch,
    sft_run,
    sha256,
    words_of,
)

from dpo.config import PreferenceConfig, SFTConfig
from dpo.config_files import read_config, validate
from dpo.data.order import batch_rows
from dpo.data.tokenize import TokenSequence
from dpo.errors import InputError, Stopped
from dpo.online_config import OnlineConfig
from dpo.train import jobs, online
from dpo.train.encoded import sequences_of
from dpo.train.online import rows_of_step, train_online
from dpo.train.reward_source import open_reward
from dpo.train.run import Run, read_metrics
from dpo.train.samples import Samples, make_pairs, make_rankings

LIKES_LENGTH = "def f(prompts, responses): return [float(len(r) // 8) for r in responses]\n"
"""A reward that tells the samples of an almost random model apart, with some ties."""

START = {
    "data": DATA,
    "rounds": 3,
    "prompts_per_round": 12,
    "samples_per_prompt": 3,
    "sampling": {"max_new_tokens": 8},
    "batch": {"size": 4},
    "save_every": 1,
    "optimizer": {"learning_rate": 0.003},
    "loss": {"beta": 0.5},
    "evaluation": {"max_rows": 8, "num_samples": 2, "max_new_tokens": 8},
}


def config_of(out: Path, changes: dict | None = None) -> OnlineConfig:
    file = scratch() / "likes_length.py"
    file.write_text(LIKES_LENGTH, "utf-8")
    reward = {"function": f"{file}:f"}
    start = START | {"model": {"path": str(sft_run())}, "out": str(out)}
    return validate(OnlineConfig, merged(start, {"reward": reward} | (changes or {})))


# -- what is made of samples -----------------------------------------------------------------------


def samples_of(rewards, tokens=None):
    """Samples of one-token prompts, each response the tokens given (all different by default)."""
    rewards = torch.tensor(rewards, dtype=torch.float64)
    count = rewards.numel()
    tokens = tokens or [[10 + i] for i in range(count)]
    many = rewards.shape[1]
    sequences = [TokenSequence((i // many, *ids), 1) for i, ids in enumerate(tokens)]
    return Samples(sequences, rewards, torch.zeros(count, dtype=torch.bool))


def pairs_of(samples, pairs="best_worst", labels="hard", seed=0):
    draws = np.random.default_rng(seed)
    made = make_pairs(samples, pairs=pairs, labels=labels, draws=draws, source="s.jsonl")
    return [(p.chosen.ids[1] - 10, p.rejected.ids[1] - 10, p.scores, p.source) for p in made]


def test_the_best_is_paired_with_the_worst_and_equal_rewards_make_no_pair():
    samples = samples_of([[0.0, 2.0, -1.0, 1.0], [5.0, 5.0, 5.0, 5.0], [1.0, 0.0, 1.0, 0.0]])
    assert pairs_of(samples) == [
        (1, 2, (2.0, -1.0), "s.jsonl:1"),
        (8, 11, (1.0, 0.0), "s.jsonl:3"),  # the first of the best, the last of the worst
    ]


def test_all_pairs_are_those_of_a_strict_order():
    samples = samples_of([[0.0, 2.0, 2.0]])
    assert [pair[:2] for pair in pairs_of(samples, "all")] == [(1, 0), (2, 0)]
    assert len(pairs_of(samples_of([[3.0, 1.0, 4.0, 1.5]]), "all")) == 6


def test_two_responses_of_the_same_tokens_make_no_pair():
    samples = samples_of([[1.0, 0.0]], tokens=[[10], [10]])
    assert pairs_of(samples) == []
    assert pairs_of(samples, labels="bradley_terry") == []


def test_bradley_terry_labels_have_the_models_probabilities():
    prompts = 4000
    samples = samples_of([[0.0, 1.5]] * prompts)
    made = pairs_of(samples, labels="bradley_terry")
    assert len(made) == prompts
    share = sum(pair[2] == (1.5, 0.0) for pair in made) / prompts
    p = 1 / (1 + math.exp(-1.5))
    assert share == pytest.approx(p, abs=4 * math.sqrt(p * (1 - p) / prompts))
    equal = pairs_of(samples_of([[1.0, 1.0]] * prompts), labels="bradley_terry")
    assert len(equal) == prompts  # a tie says that both are as good, and is kept
    first = sum(pair[0] % 2 == 0 for pair in equal) / prompts
    assert first == pytest.approx(0.5, abs=2 / math.sqrt(prompts))


def test_rankings_go_by_reward_with_ties_and_none_where_all_are_equal():
    samples = samples_of([[0.0, 2.0, 2.0, -1.0], [1.0] * 4])
    (ranking,) = make_rankings(samples, source="s.jsonl")
    assert [s.ids[1] - 10 for s in ranking.sequences] == [1, 2, 0, 3]
    assert ranking.ranks == (0, 0, 1, 2)
    assert ranking.scores == (2.0, 2.0, 0.0, -1.0)
    assert ranking.source == "s.jsonl:1"


def test_samples_survive_a_checkpoint():
    samples = samples_of([[0.25, 1.0], [2.0, -1.0]], tokens=[[1], [1, 2, 3], [], [4]])
    again = Samples.from_tensors(samples.as_tensors())
    assert again.sequences == samples.sequences
    assert torch.equal(again.rewards, samples.rewards)
    assert torch.equal(again.truncated, samples.truncated)
    assert again.metrics() == samples.metrics()


def test_metrics_of_samples_are_what_they_say():
    samples = samples_of([[0.0, 2.0], [1.0, 1.0]], tokens=[[1], [1, 2, 3], [5], [4]])
    samples.truncated[1] = True
    assert samples.metrics() == {
        "samples/reward": 1.0,
        "samples/reward_best": 1.5,
        "samples/equal_rewards": 0.5,
        "samples/truncated": 0.25,
        "samples/tokens": 1.5,
    }


@pytest.mark.parametrize(("planned", "size"), [(20, 8), (24, 8), (7, 1), (5, 16)])
@pytest.mark.parametrize("share", [1.0, 0.9, 0.5, 0.2])
def test_a_pass_has_the_planned_steps_and_each_row_once_however_many_rows_came(
    planned, size, share
):
    steps, rows = -(-planned // size), max(1, int(share * planned))
    for epoch in range(2):
        batches = [
            rows_of_step(
                epoch * steps + i, num_rows=rows, num_planned=planned, batch_size=size, seed=3
            )
            for i in range(steps)
        ]
        assert all(1 <= len(batch) <= size for batch in batches)
        assert {row for batch in batches for row in batch} == set(range(rows))
        if rows >= steps * 2:
            assert sum(map(len, batches)) == rows


def test_with_all_rows_the_batches_are_those_of_a_plain_run():
    for step in range(9):
        expected = batch_rows(step, num_rows=20, batch_size=8, seed=1)
        assert rows_of_step(step, num_rows=20, num_planned=20, batch_size=8, seed=1) == expected


# -- offline DPO is the case of one round ----------------------------------------------------------


def test_one_round_on_given_pairs_is_offline_dpo_bit_for_bit(tmp_path, monkeypatch):
    """The same pairs as `dpo train`, two passes: the same weights and optimizer to the last bit.

    Only the reference's log-probabilities are computed apart: `dpo train` sends the held-out rows
    through the model together with the training rows, and a batch of other rows rounds otherwise.
    """
    common = {
        "model": {"path": str(sft_run())},
        "data": {"test_fraction": 0.25, "synthetic": {"num_rows": 40}},
        "batch": {"size": 8},
        "optimizer": {"learning_rate": 0.003},
    }
    offline = validate(
        PreferenceConfig,
        merged(
            common,
            {
                "out": str(tmp_path / "offline"),
                "epochs": 2,
                "evaluation": EVALUATION | {"kl_prompts": 0},
            },
        ),
    )
    methods = []
    make = jobs._preference_method

    def kept(config, objective, data, policy, reference, *others):
        method = make(config, objective, data, policy, reference, *others)
        method.train_reference = online.score_all(
            reference.model, sequences_of(method.train), precision="fp32", max_tokens=4096
        )
        methods.append(method)
        return method

    monkeypatch.setattr(jobs, "_preference_method", kept)
    jobs.train_preference(offline)
    pairs = methods[0].train

    def given(policy, number):
        assert number == 0
        both = [s for pair in pairs for s in pair.sequences]
        rewards = torch.tensor([[1.0, 0.0]] * len(pairs), dtype=torch.float64)
        return Samples(both, rewards, torch.zeros(len(both), dtype=torch.bool))

    monkeypatch.setattr(online, "make_sampler", lambda *a: GivenSampler(given, len(pairs)))
    one_round = validate(
        OnlineConfig,
        merged(
            common,
            {
                "out": str(tmp_path / "online"),
                "rounds": 1,
                "epochs_per_round": 2,
                "samples_per_prompt": 2,
                "reward": {"function": "synthetic"},
                "evaluation": {"max_rows": 4, "num_samples": 1, "max_new_tokens": 8},
            },
        ),
    )
    train_online(one_round)
    newest = [max((tmp_path / n / "checkpoints").glob("step-*")) for n in ("offline", "online")]
    assert newest[0].name == newest[1].name == f"step-{2 * math.ceil(len(pairs) / 8):08d}"
    for file in ("model.safetensors", "optimizer.safetensors"):
        assert sha256(newest[0] / file) == sha256(newest[1] / file)
    losses = [
        [row["loss"] for row in read_metrics(tmp_path / n) if "loss" in row]
        for n in ("offline", "online")
    ]
    assert losses[0] == losses[1]
    assert losses[0][-1] < losses[0][0] == pytest.approx(math.log(2), abs=1e-5)


class GivenSampler:
    """A sampler that has its samples already."""

    def __init__(self, draw, num_prompts):
        self.draw, self.prompts = draw, range(num_prompts)

    def __call__(self, policy, number):
        return self.draw(policy, number)


# -- whole runs ------------------------------------------------------------------------------------


def test_a_run_writes_its_samples_and_what_it_logs_of_them_is_true(tmp_path):
    config = config_of(tmp_path / "run")
    said = dpo("online", *words_of(config))
    assert said.code == 0, said.all
    metrics = read_metrics(tmp_path / "run")
    steps = [row for row in metrics if "loss" in row]
    assert len(steps) == 3 * 3  # rounds of 12 prompts, batches of 4
    prompts = []
    for number in range(3):
        file = tmp_path / "run" / "samples" / f"round-{number + 1:04d}.jsonl"
        rows = [json.loads(line) for line in file.read_text("utf-8").splitlines()]
        prompts.append([row["prompt"] for row in rows])
        scores = [row["scores"] for row in rows]
        assert len(rows) == 12
        for row in rows:
            assert len(row["responses"]) == 3
            assert row["scores"] == sorted(row["scores"], reverse=True)
            assert row["scores"] == [len(response) // 8 for response in row["responses"]]
        logged = [row for row in steps if (row["step"] - 1) // 3 == number]
        equal = sum(s[0] == s[-1] for s in scores)
        for row in logged:
            assert row["samples/reward"] == pytest.approx(np.mean(scores))
            assert row["samples/reward_best"] == pytest.approx(np.mean([s[0] for s in scores]))
            assert row["samples/equal_rewards"] == pytest.approx(equal / 12)
            assert row["samples/rows"] == pytest.approx(12 - equal)
        assert 0 < equal < 9
        assert sum(row["num_rows"] for row in logged) == 12 - equal
    assert not set(prompts[0]) & set(prompts[1])  # in turn: none again before all were
    held_out = [row for row in metrics if "eval/loss" in row]
    assert [row["step"] for row in held_out] == [0, 3, 6, 9]
    for row in held_out:
        assert row["eval/loss"] == pytest.approx(0.5 * row["eval/kl"] - row["eval/reward"])
    assert held_out[0]["eval/kl"] == pytest.approx(0, abs=1e-9) != held_out[-1]["eval/kl"]


VARIANTS = {
    "online": {},
    "all pairs, labelled, twice": {
        "pairs": "all",
        "labels": "bradley_terry",
        "epochs_per_round": 2,
        "batch.size": 16,
    },
    "iterative": {"reset_reference_each_round": True},
    "moving": {"moving_reference": {"mix": 0.5, "every": 2}},
    "rankings": {"loss": {"name": "plackett_luce", "beta": 0.5}},
    "dropout": {"dropout": True, "batch.max_tokens": 100},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_stopped_and_killed_inside_a_round_it_ends_as_if_nothing_had_been(variant, tmp_path):
    sft_run()  # before any fork, so that children share it
    changes = VARIANTS[variant]
    train_online(config_of(tmp_path / "whole", changes))
    folder = tmp_path / "run"

    def until(step, number):
        log = Run.log

        def logged(run, row):
            log(run, row)
            if row["step"] == step and "loss" in row:
                os.kill(os.getpid(), number)

        Run.log = logged
        train_online(config_of(folder, changes))

    # Rounds have 3 steps or more, so both are inside one.
    assert forked(lambda: until(2, signal.SIGTERM)) == Stopped.exit_code
    assert forked(lambda: until(5, signal.SIGKILL)) == -signal.SIGKILL
    train_online(config_of(folder, changes))
    assert outcome(folder) == outcome(tmp_path / "whole")
    for file in (tmp_path / "whole" / "samples").iterdir():
        assert sha256(folder / "samples" / file.name) == sha256(file)


def test_iterative_dpo_starts_every_round_at_log_two_and_online_dpo_only_the_first(tmp_path):
    """At the beginning of a round the policy is the reference where this is reset."""
    first = {}
    for name, reset in (("iterative", True), ("online", False)):
        train_online(config_of(tmp_path / name, {"reset_reference_each_round": reset}))
        losses = [row["loss"] for row in read_metrics(tmp_path / name) if "loss" in row]
        first[name] = losses[::3]
    assert first["iterative"] == pytest.approx([math.log(2)] * 3, abs=1e-5)
    assert first["online"][0] == pytest.approx(math.log(2), abs=1e-5)
    assert abs(first["online"][1] - math.log(2)) > 1e-3
    kls = [
        [row["eval/kl"] for row in read_metrics(tmp_path / name) if "eval/kl" in row]
        for name in first
    ]
    assert kls[0][-1] > 0.01  # to the model it started from, however often the reference moved


def test_rankings_and_losses_without_a_reference_train_online_too(tmp_path):
    for loss in ({"name": "lipo_lambda"}, {"name": "simpo"}, {"name": "rpo"}):
        config = config_of(tmp_path / loss["name"], {"loss": loss, "rounds": 1})
        assert dpo("online", *words_of(config)).code == 0
        last = [row for row in read_metrics(tmp_path / loss["name"]) if "eval/kl" in row][-1]
        assert last["eval/kl"] > 0
        if loss["name"] == "simpo":
            assert last["eval/loss"] == pytest.approx(-last["eval/reward"])


def test_a_reward_that_likes_everything_is_refused_in_a_sentence(tmp_path):
    (tmp_path / "flat.py").write_text("def f(prompts, responses): return [1.0] * len(prompts)\n")
    config = config_of(tmp_path / "run", {"reward": {"function": f"{tmp_path / 'flat.py'}:f"}})
    said = dpo("online", *words_of(config))
    assert said.code == 2
    assert "Round 1: the responses to every prompt have equal rewards" in said.err


def test_a_run_says_what_its_own_samples_tell(tmp_path):
    said = dpo("online", *words_of(config_of(tmp_path / "run", {"rounds": 1})))
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
    assert dpo("online", *words_of(config)).code == 0
    assert dpo("online", *words_of(config)).code == 0
    file.write_text("def f(prompts, responses): return [-float(len(r)) for r in responses]\n")
    said = dpo("online", *words_of(config))
    assert said.code == 2
    assert "reward_sha256" in said.err


def test_what_is_held_out_can_be_measured_by_another_reward_than_that_trained_on(tmp_path):
    (tmp_path / "mine.py").write_text("def f(prompts, responses): return [0.25] * len(prompts)\n")
    other = {"evaluation.reward": {"function": f"{tmp_path / 'mine.py'}:f"}, "rounds": 1}
    config = config_of(tmp_path / "run", other)
    assert dpo("online", *words_of(config)).code == 0
    metrics = read_metrics(tmp_path / "run")
    held_out = [row for row in metrics if "eval/reward" in row]
    assert {row["eval/reward"] for row in held_out} == {0.25}
    assert held_out[-1]["eval/loss"] == pytest.approx(0.5 * held_out[-1]["eval/kl"] - 0.25)
    assert {row["samples/reward"] for row in metrics if "samples/reward" in row} != {0.25}


def test_a_reward_model_of_this_package_scores_the_samples(tmp_path):
    words = [f"model={sft_run()}", f"data={json.dumps(DATA)}", f"out={tmp_path / 'reward'}"]
    words += ["max_steps=2", "batch.size=4", "evaluation.max_rows=4"]
    said = dpo("reward", *words)
    assert said.code == 0, said.all
    reward = {"model": str(tmp_path / "reward")}
    config = config_of(tmp_path / "run", {"reward": reward, "rounds": 1})
    assert dpo("online", *words_of(config)).code == 0
    rows = (tmp_path / "run" / "samples" / "round-0001.jsonl").read_text("utf-8").splitlines()
    row = json.loads(rows[0])
    score = open_reward(config.reward)
    again = score([row["prompt"]] * len(row["responses"]), row["responses"])
    assert again.tolist() == pytest.approx(row["scores"], abs=1e-4)
    assert len(set(row["scores"])) > 1


def test_a_response_drawn_twice_is_scored_once(tmp_path):
    (tmp_path / "mine.py").write_text(
        "def f(prompts, responses):\n"
        "    both = list(zip(prompts, responses))\n"
        "    assert len(set(both)) == len(both)\n"
        "    return [float(len(r)) for r in responses]\n"
    )
    changes = {
        "reward": {"function": f"{tmp_path / 'mine.py'}:f"},
        "sampling": {"max_new_tokens": 2},
        "samples_per_prompt": 12,
        "rounds": 1,
        "evaluation.max_rows": 1,
    }
    said = dpo("online", *words_of(config_of(tmp_path / "run", changes)))
    assert said.code == 0, said.all
    rows = (tmp_path / "run" / "samples" / "round-0001.jsonl").read_text("utf-8").splitlines()
    assert any(len(set(json.loads(row)["responses"])) < 12 for row in rows)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"reward": {}}, "give either a reward model (model) or a function"),
        ({"samples_per_prompt": 1}, "samples_per_prompt"),
        ({"rounds": 0}, "rounds"),
        ({"loss": {"name": "kto"}}, "kto takes judged responses"),
        ({"loss": {"name": "sppo_soft"}}, "sppo_soft takes winning probabilities"),
        ({"loss": {"name": "odpo"}, "labels": "bradley_terry"}, "odpo takes pairs whose chosen"),
        ({"loss": {"name": "plackett_luce"}, "labels": "hard"}, "labels: has no effect"),
        ({"loss": {"name": "simpo"}, "reset_reference_each_round": True}, "has no effect, simpo"),
        (
            {"reset_reference_each_round": True, "moving_reference": {"mix": 0.5}},
            "not both",
        ),
        ({"reset_reference_each_round": True, "rounds": 1}, "has no effect with one round"),
        ({"data.max_length": 64}, "data.max_length: has no effect on samples"),
        ({"sampling": {"temperature": 0}}, "sampling.temperature"),
        ({"model": {"fresh": FRESH}}, "starts from a trained model"),
        ({"epochs": 2}, "epochs: unknown key"),
        ({"sampling": {"max_new_tokens": 128}}, "max_new_tokens: 128 leaves no room"),
    ],
)
def test_a_wrong_configuration_is_refused(changes, sentence, tmp_path):
    start = {"out": str(tmp_path / "run"), "reward": {"function": "synthetic"}}
    values = merged(START, start | {"model": {"path": str(sft_run())}})
    for key, value in changes.items():
        if key in ("reward", "model"):
            values[key] = value
        else:
            values = merged(values, {key: value})
    with pytest.raises(InputError) as caught:
        train_online(validate(OnlineConfig, values))
    assert sentence in str(caught.value)
    assert not (tmp_path / "run" / "manifest.json").exists() or "room" in sentence


def test_a_shorthand_names_a_reward_model():
    words = ["model=runs/sft", "out=runs/online", "reward=runs/reward"]
    assert read_config(OnlineConfig, None, words).reward.model == "runs/reward"
    labelled = read_config(OnlineConfig, None, [*words, "reward.label=POSITIVE"]).reward
    assert (labelled.model, labelled.label) == ("runs/reward", "POSITIVE")


# -- that it works ---------------------------------------------------------------------------------

LANGUAGE = {"test_fraction": 0.25, "synthetic": {"num_facts": 16, "num_rows": 2000}}


def learnt_language() -> Path:
    """An SFT model that speaks the embedded language well enough to be made better."""
    fresh = {"width": 64, "layers": 2, "heads": 2, "positions": 128}
    values = {
        "model": {"fresh": fresh},
        "data": LANGUAGE,
        "out": str(scratch() / "learnt"),
        "epochs": 4,
        "optimizer": {"learning_rate": 0.005},
        "batch": {"size": 32},
        "evaluation": {"num_samples": 0},
    }
    return jobs.train_sft(validate(SFTConfig, values))


def test_six_rounds_under_the_true_reward_raise_it_on_held_out_prompts(tmp_path):
    values = {
        "model": {"path": str(learnt_language())},
        "data": LANGUAGE,
        "out": str(tmp_path / "run"),
        "reward": {"function": "synthetic"},
        "rounds": 6,
        "samples_per_prompt": 4,
        "sampling": {"max_new_tokens": 40},
        "loss": {"beta": 0.3},
        "optimizer": {"learning_rate": 3e-4, "schedule": "constant"},
        "batch": {"size": 8},
        "evaluation": {"max_new_tokens": 40, "samples_per_prompt": 8, "num_samples": 0},
    }
    train_online(validate(OnlineConfig, values))
    metrics = read_metrics(tmp_path / "run")
    held_out = [row for row in metrics if "eval/reward" in row]
    first, last = held_out[0], held_out[-1]
    assert last["eval/reward"] > first["eval/reward"] + 0.7
    assert last["eval/reward_stderr"] < 0.35
    assert 0.1 < last["eval/kl"] < 5
    sampled = [row["samples/reward"] for row in metrics if "samples/reward" in row]
    assert sampled[-1] > sampled[0] + 0.5
    margins = [row["rewards/margin"] for row in metrics if "rewards/margin" in row]
    assert margins[-1] > margins[0] == pytest.approx(0, abs=1e-4)
