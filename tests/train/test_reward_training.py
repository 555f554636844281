"""`dpo reward`: it learns a reward that is known, by the loss that was asked for, and comes to the
same end wherever it was stopped."""

import json
import math
import os
import signal
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch

import tiny_models
from dpo.config import RewardConfig
from dpo.config_files import validate
from dpo.core.stats import pair_calibration
from dpo.data.synthetic import World
from dpo.data.tokenize import Encoder
from dpo.errors import InputError, Stopped
from dpo.models.reward import from_causal, open_reward_model, sequence_scores
from dpo.train.encoded import EncodedRanking
from dpo.train.reward import SCORED, RewardMethod, train_reward
from dpo.train.run import read_metrics
from models.scored_data import VOCAB, random_pairs
from models.test_packed import random_trees
from train.small_runs import (
    COMMON,
    dpo,
    forked,
    kill_at,
    merged,
    outcome,
    scratch,
    sft_run,
    words_of,
)
from train.test_resume import steps, stop_at

EVALUATION = {"every": 3, "max_rows": 16}


def reward_config(out, changes=None):
    start = {
        "model": {"path": str(sft_run())},
        "out": str(out),
        "optimizer": {"learning_rate": 0.003},
        "evaluation": EVALUATION,
    }
    return validate(RewardConfig, merged(COMMON | start, changes or {}))


@cache
def reward_run():
    """A finished run of `dpo reward`; nobody writes to it."""
    folder = scratch() / "reward"
    said = dpo("reward", *words_of(reward_config(folder)))
    assert said.code == 0, said.all
    assert "calibration error" in said.out
    return folder


def scored(folder):
    lines = (folder / "samples" / SCORED).read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def ranked_rows(tmp_path, num_rows=40):
    """Rankings of three by the true reward, some of them tied, with scores."""
    world, rng = World(8), np.random.default_rng(0)
    file = tmp_path / "ranked.jsonl"
    rows = []
    while len(rows) < num_rows:
        prompt = world.prompts[rng.integers(len(world.prompts))]
        responses = list(dict.fromkeys(world.answer(prompt, rng) for _ in range(3)))
        scores = [world.reward(prompt, response) for response in responses]
        if len(set(scores)) > 1:
            rows.append({"prompt": prompt, "responses": responses, "scores": scores})
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def of_file(file, changes=None):
    return {"data": {"path": str(file), "test_fraction": 0.25}} | (changes or {})


def file_config(out, file, changes=None):
    base = reward_config(out).model_dump(mode="json", exclude_unset=True)
    return validate(RewardConfig, merged({**base, **of_file(file)}, changes or {}))


# -- what it learns ------------------------------------------------------------------------------


def test_it_learns_the_reward_that_the_labels_came_from(tmp_path):
    """From noisy Bradley-Terry labels, which the true reward itself tells in 85 of 100 held-out
    pairs. Differences of two responses to one prompt, so nothing is gained by knowing prompts.
    """
    settings = {
        "model": {"fresh": {"width": 48}},
        "data": {
            "test_fraction": 0.25,
            "split_seed": 1,
            "synthetic": {"num_rows": 1500, "num_facts": 8},
        },
        "out": str(tmp_path / "run"),
        "optimizer": {"learning_rate": 0.003},
        "batch": {"size": 16},
        "max_steps": 150,
        "evaluation": {"every": 150},
        "save_every": 150,
    }
    folder = train_reward(validate(RewardConfig, settings))
    last = [row for row in read_metrics(folder) if "eval/loss" in row][-1]
    world, rows = World(8), scored(folder)
    true = np.array(
        [np.subtract(*(world.reward(row["prompt"], y) for y in row["responses"])) for row in rows]
    )
    found = np.array([np.subtract(*row["rewards"]) for row in rows])
    assert len({row["prompt"] for row in rows}) == 6
    assert (true > 0).mean() + (true == 0).mean() / 2 == pytest.approx(0.85, abs=0.005)
    assert last["eval/rewards/accuracy"] > 0.75
    assert np.corrcoef(true, found)[0, 1] > 0.7
    assert last["eval/calibration_error"] < 0.1


def test_centring_takes_the_mean_reward_to_zero_and_nothing_else_does(tmp_path):
    ends = {}
    for centre in (0.0, 0.3):
        folder = tmp_path / str(centre)
        train_reward(reward_config(folder, {"centre": centre, "max_steps": 40}))
        ends[centre] = [
            abs(r["eval/rewards/mean"]) for r in read_metrics(folder) if "eval/loss" in r
        ]
    assert ends[0.0][0] == ends[0.3][0] > 0.15  # the same head, not centred yet
    assert ends[0.3][-1] < 0.05
    assert ends[0.0][-1] > 2 * ends[0.3][-1]


# -- the loss that was asked for -----------------------------------------------------------------


def method(rows, **settings):
    return RewardMethod(
        train=rows,
        test=rows,
        **{
            "loss_name": "bradley_terry",
            "margin": False,
            "centre": 0.0,
            "precision": "fp32",
            "max_tokens": 4096,
            "save": lambda model, folder: None,
            **settings,
        },
    )


def model_for(rows):
    model = from_causal(tiny_models.make("gpt2", VOCAB), seed=0)
    model.config.pad_token_id = VOCAB  # none of theirs
    return model


def one_by_one(model, row):
    return [model(torch.tensor([s.ids])).logits[0, 0].item() for s in row.sequences]


def test_the_loss_of_pairs_with_margins_and_centring_is_the_formula():
    rows = [replace(row, scores=(float(i), 0.0)) for i, row in enumerate(random_pairs())]
    model = model_for(rows)
    expected = []
    for row in rows:
        chosen, rejected = one_by_one(model, row)
        margin = row.scores[0] - row.scores[1]
        expected.append(
            math.log1p(math.exp(-(chosen - rejected - margin))) + 0.1 * (chosen + rejected) ** 2
        )
    found = method(rows, margin=True, centre=0.1).loss(model, range(len(rows)))
    assert found.loss.item() == pytest.approx(sum(expected), abs=1e-4)


def test_the_loss_of_rankings_is_plackett_luce_and_the_metrics_are_of_ordered_pairs():
    sequences = {}
    for s in random_trees():
        sequences.setdefault(s.ids[: s.prompt_length], []).append(s)
    lists = [tuple(dict.fromkeys(group)) for group in sequences.values() if len(set(group)) > 2]
    rows = [EncodedRanking(own, tuple(range(len(own))), "") for own in lists]
    model, by_hand = model_for(rows), 0.0
    margins, means = [], []
    for row in rows:
        rewards = one_by_one(model, row)
        means.append(np.mean(rewards))
        places = range(len(rewards))
        by_hand += sum(math.log(sum(map(math.exp, rewards[k:]))) - rewards[k] for k in places)
        margins.append([rewards[i] - rewards[j] for i in places for j in places if i < j])
    ranked = method(rows, loss_name="plackett_luce")
    result = ranked.loss(model, range(len(rows)))
    assert result.loss.item() == pytest.approx(by_hand, abs=1e-4)
    with torch.no_grad():
        found = ranked.evaluate(model)
    accuracy = np.mean([np.mean(np.array(own) > 0) for own in margins])
    assert found["eval/rewards/accuracy"] == pytest.approx(accuracy)
    assert found["eval/rewards/margin"] == pytest.approx(
        np.mean([np.mean(m) for m in margins]), abs=1e-5
    )
    assert found["eval/rewards/mean"] == pytest.approx(np.mean(means), abs=1e-5)
    brier = pair_calibration([m for own in margins for m in own]).brier
    assert found["eval/brier"] == pytest.approx(brier, abs=1e-5)


def test_a_reward_of_nothing_but_ties_says_so():
    rows = random_pairs()
    model = model_for(rows)
    with torch.no_grad():
        model.score.weight.zero_()
        found = method(rows).evaluate(model)
    assert found["eval/loss"] == pytest.approx(math.log(2))
    assert (found["eval/rewards/ties"], found["eval/rewards/accuracy"]) == (1.0, 0.0)
    assert (found["eval/calibration_error"], found["eval/brier"]) == (0.0, 0.25)


def test_batches_of_any_split_have_one_gradient():
    rows = random_pairs()
    model = model_for(rows)
    gradients = []
    for parts in ([range(6)], [range(2), range(2, 6)], [[i] for i in range(6)]):
        model.zero_grad()
        for part in parts:
            method(rows).loss(model, list(part)).loss.backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    for other in gradients[1:]:
        assert (other - gradients[0]).norm() <= 1e-5 * gradients[0].norm()


def test_tokens_are_counted_with_the_last_ones():
    (row,) = random_pairs()[:1]  # a prompt of one token, responses of one and six
    assert (len(row.chosen), len(row.rejected)) == (2, 7)
    assert method([row]).num_tokens(0) == 1 + 1 + 6


# -- runs ----------------------------------------------------------------------------------------


def test_the_saved_folder_gives_the_rewards_of_the_samples_and_the_last_metrics():
    rows = scored(reward_run())
    model, tokenizer, template = open_reward_model(str(reward_run()))
    encoder = Encoder(tokenizer, template, 128)
    last = [row for row in read_metrics(reward_run()) if "eval/loss" in row][-1]
    for row in rows:
        encoded = encoder.encode(row["prompt"], row["responses"])
        with torch.no_grad():
            rewards = sequence_scores(model, encoded.sequences)
        assert rewards.tolist() == pytest.approx(row["rewards"], abs=1e-5)
    margins = [row["rewards"][0] - row["rewards"][1] for row in rows]
    assert last["eval/rewards/margin"] == pytest.approx(np.mean(margins), abs=1e-6)
    assert last["eval/rewards/accuracy"] == np.mean(np.array(margins) > 0)
    assert last["eval/calibration_error"] == pytest.approx(pair_calibration(margins).error)
    assert len(rows) == 16
    assert {(*row["ranks"],) for row in rows} == {(0, 1)}


def test_a_run_leaves_figures_a_card_and_the_digests_of_its_prompts():
    folder = reward_run()
    for name in ("training.png", "training.svg", "calibration.png", "calibration.csv"):
        assert (folder / "figures" / name).stat().st_size > 0
    card = (folder / "model" / "README.md").read_text(encoding="utf-8")
    assert "pipeline_tag: text-classification" in card
    assert "bradley_terry" in card
    assert (folder / "train_prompts.safetensors").is_file()


VARIANTS = {
    "pairs": {},
    "rankings": {"loss": "plackett_luce", "centre": 0.1},
    "dropout, accumulating": {"dropout": True, "batch.max_tokens": 200},
    "bf16, recomputing": {"precision": "bf16", "gradient_checkpointing": True},
}


@cache
def uninterrupted(variant):
    sft_run()
    return outcome(train_reward(reward_config(scratch() / f"reward {variant}", VARIANTS[variant])))


@pytest.mark.parametrize("variant", VARIANTS)
def test_stopped_and_killed_it_ends_as_if_nothing_had_been(variant, tmp_path):
    expected, folder = uninterrupted(variant), tmp_path / "run"
    config = reward_config(folder, VARIANTS[variant])

    def stopped():
        stop_at(3, signal.SIGTERM)
        train_reward(config)

    def killed():
        stop_at(5, signal.SIGKILL)
        train_reward(config)

    assert forked(stopped) == Stopped.exit_code == 75
    assert steps(folder) == ([1, 2, 3], [0, 3])
    assert forked(killed) == -signal.SIGKILL
    train_reward(config)
    assert outcome(folder) == expected


@pytest.mark.parametrize("moment", [{"name": "model"}, {"name": SCORED}, {"name": "step-00000004"}])
def test_killed_at_the_end_it_goes_on_too(moment, tmp_path):
    expected, folder = uninterrupted("pairs"), tmp_path / "run"

    def killed():
        kill_at(**moment)
        train_reward(reward_config(folder))

    assert forked(killed) == -signal.SIGKILL
    train_reward(reward_config(folder))
    assert outcome(folder) == expected


def test_a_finished_run_is_left_alone_and_other_settings_are_refused_with_the_difference():
    before = os.stat(reward_run() / "model" / "model.safetensors")
    said = dpo("reward", *words_of(reward_config(reward_run())))
    assert said.code == 0
    assert os.stat(reward_run() / "model" / "model.safetensors") == before
    said = dpo("reward", *words_of(reward_config(reward_run(), {"centre": 0.5})))
    assert said.code == 2
    assert "centre: 0.0 there, 0.5 now" in said.err


def test_rankings_of_a_file_train_by_their_scores_with_ties(tmp_path):
    file = ranked_rows(tmp_path)
    config = file_config(tmp_path / "run", file, {"loss": "plackett_luce"})
    rows = scored(train_reward(config))
    assert any(len(set(row["ranks"])) < len(row["ranks"]) for row in rows)
    assert all(row["ranks"] == sorted(row["ranks"]) for row in rows)
    assert all(len(row["rewards"]) == len(row["responses"]) for row in rows)


def test_pairs_of_rankings_have_their_margins(tmp_path):
    file = ranked_rows(tmp_path)
    with_margin, without = (
        read_metrics(train_reward(file_config(tmp_path / name, file, changes)))[0]["eval/loss"]
        for name, changes in (("with", {"margin": "scores"}), ("without", {}))
    )
    assert with_margin > without + 0.3  # nothing is ahead by its margin yet


# -- what is refused -----------------------------------------------------------------------------


def pair_file(tmp_path, **more):
    file = tmp_path / "pairs.jsonl"
    rows = [
        {"prompt": f"What is {i}?", "chosen": "This.", "rejected": "That.", **more}
        for i in range(9)
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def test_unpaired_rows_are_refused_in_one_sentence(tmp_path):
    file = tmp_path / "judged.jsonl"
    row = {"prompt": "Why?", "completion": "Because.", "label": True}
    file.write_text(f"{json.dumps(row)}\n" * 3)
    for loss in ("bradley_terry", "plackett_luce"):
        said = dpo("reward", *words_of(file_config(tmp_path / "run", file, {"loss": loss})))
        assert said.code == 2
        assert "judged.jsonl:1: expected" in said.err
        assert "got unpaired rows" in said.err
    assert not (tmp_path / "run").exists()


def test_margins_without_scores_or_against_the_preference_are_refused(tmp_path):
    margin = {"margin": "scores"}
    with pytest.raises(InputError, match=r"pairs\.jsonl:\d+: margin=scores takes scores"):
        train_reward(file_config(tmp_path / "run", pair_file(tmp_path), margin))
    file = pair_file(tmp_path, chosen_score=1, rejected_score=2)
    with pytest.raises(InputError, match="chosen_score 1 is below rejected_score 2"):
        train_reward(file_config(tmp_path / "run", file, margin))
    assert not (tmp_path / "run").exists()


EFFECTLESS = {
    "margin: has no effect, plackett_luce": {"margin": "scores", "loss": "plackett_luce"},
    "evaluation.num_samples: has no effect": {"evaluation.num_samples": 3},
    "batch.max_logit_mib: has no effect": {"batch.max_logit_mib": 3},
    "centre: input should be greater than or equal to 0": {"centre": -1},
    "loss: input should be": {"loss": "dpo"},
}


@pytest.mark.parametrize("message", EFFECTLESS)
def test_options_that_mean_nothing_are_errors(message, tmp_path):
    with pytest.raises(InputError, match=message):
        reward_config(tmp_path, EFFECTLESS[message])


def test_a_reward_model_is_no_language_model_to_start_from(tmp_path):
    said = dpo(
        "reward", *words_of(reward_config(tmp_path / "run", {"model.path": str(reward_run())}))
    )
    assert said.code == 2
    assert "it is a reward model or classifier (GPT2ForSequenceClassification)" in said.err
