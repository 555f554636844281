"""Every loss of the family trains through the same loop, and its state survives a stop."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from small_runs import COMMON, EVALUATION, dpo, forked, kill_at, merged, outcome, sft_run, words_of

from dpo.config import PreferenceConfig
from dpo.config_files import validate
from dpo.core.family import LOSSES
from dpo.loss_config import MixLossConfig
from dpo.train import jobs
from dpo.train.objective import WHOLE_BATCH, make_objective
from dpo.train.run import read_metrics

# Numbers that suit a model of one layer and 96 rows; everything else is the loss's default.
LEARNING_RATE = {"slic": 1e-4, "sppo": 1e-5, "sppo_soft": 1e-5, "squared_po": 1e-4}
ANSWERS = [" is polite: certainly!", " is plain.", " is rude: no.", " says nothing"]


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> dict[str, Path]:
    """Rows of every kind, with scores and ties."""
    folder = tmp_path_factory.mktemp("rows")
    lists, pairs, judged = [], [], []
    for number in range(24):
        prompt = f"What is number {number}?"
        responses = [f"Number {number}{answer}" for answer in ANSWERS]
        scores = [1.0, 0.6, 0.6 if number % 3 else 0.4, 0.1]
        lists.append({"prompt": prompt, "responses": responses[: 3 + number % 2]})
        lists[-1]["scores"] = scores[: 3 + number % 2]
        pair = {"prompt": prompt, "chosen": responses[0], "rejected": responses[2]}
        pairs.append({**pair, "chosen_score": 0.9, "rejected_score": 0.2})
        judged.append({"prompt": prompt, "completion": responses[number % 2 * 2]})
        judged[-1]["label"] = number % 2 == 0
    files = {"list": lists, "pair": pairs, "unpaired": judged}
    for name, content in files.items():
        lines = "".join(json.dumps(row) + "\n" for row in content)
        (folder / f"{name}.jsonl").write_text(lines, "utf-8")
    return {name: folder / f"{name}.jsonl" for name in files}


def config_of(out: Path, rows: Path, changes: dict) -> PreferenceConfig:
    start = {
        "model": {"path": str(sft_run())},
        "out": str(out),
        "data": {"path": str(rows), "test_fraction": 0.25},
        "optimizer": {"learning_rate": 0.002},
        "max_steps": 4,
        "evaluation": EVALUATION | {"every": 4, "kl_prompts": 0, "num_samples": 1},
    }
    common = {key: value for key, value in COMMON.items() if key != "data"}
    return validate(PreferenceConfig, merged(common | start, changes))


@pytest.mark.parametrize("name", LOSSES)
def test_every_loss_trains_on_its_kind_of_rows_and_its_held_out_loss_falls(
    name: str, rows, tmp_path: Path
) -> None:
    loss = LOSSES[name]
    config = config_of(
        tmp_path / "run",
        rows[loss.kind],
        {
            "loss": {"name": name},
            "max_steps": 12,
            "evaluation.every": 12,
            "optimizer": {
                "learning_rate": LEARNING_RATE.get(name, 0.003),
                "schedule": "constant",
                "warmup": 0.0,
            },
        },
    )
    said = dpo("train", *words_of(config))
    assert said.code == 0, said.all
    metrics = read_metrics(tmp_path / "run")
    before, after = (row for row in metrics if "eval/loss" in row)
    if name == "alpha_dpo":  # its target moves with the policy: on pairs this alike, faster than it
        assert after["eval/rewards/margin"] > before["eval/rewards/margin"] + 1
    else:
        assert after["eval/loss"] < before["eval/loss"]
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text("utf-8"))
    free = "reference_sha256" not in json.dumps(manifest) + (
        tmp_path / "run" / "config.json"
    ).read_text("utf-8")
    assert free == (not make_objective(config.loss).needs_reference)


def test_a_loss_without_a_reference_is_compared_with_its_start_only_where_that_is_asked_for(
    rows, tmp_path: Path
) -> None:
    found = {}
    for name, more in (("asked", {"evaluation.kl_prompts": 3}), ("not asked", {})):
        config = config_of(tmp_path / name, rows["pair"], {"loss": {"name": "simpo"}} | more)
        assert dpo("train", *words_of(config)).code == 0
        found[name] = [row for row in read_metrics(tmp_path / name) if "eval/loss" in row]
    before, after = found["asked"]
    assert before["eval/kl"] == pytest.approx(0, abs=1e-6)
    assert after["eval/kl"] > 1e-3
    assert not any("eval/kl" in row for row in found["not asked"])
    losses = [[row["eval/loss"] for row in found[name]] for name in found]
    assert losses[0] == losses[1]
    by_default = {"model": "m", "out": "o", "loss": {"name": "simpo"}}
    assert not validate(PreferenceConfig, by_default).opens_reference


@pytest.mark.parametrize(
    "loss",
    [
        {"name": "plackett_luce"},
        {"name": "kto"},
        {"name": "bco"},
        {"name": "beta_dpo"},
        {"name": "alpha_dpo"},
        {"name": "tdpo2"},
        {"name": "simpo"},
        {"mix": [{"name": "dpo", "weight": 0.8}, {"name": "bco_pair", "weight": 0.2}]},
    ],
    ids=lambda loss: loss.get("name", "mix"),
)
def test_killed_in_the_middle_a_loss_ends_as_if_nothing_had_been(loss, rows, tmp_path) -> None:
    """Running means are a part of the state: a run that lost them would end elsewhere."""
    kind = LOSSES[loss["name"]].kind if "name" in loss else "pair"
    changes = {"loss": loss, "save_every": 1, "batch": {"size": 4}}
    whole = config_of(tmp_path / "whole", rows[kind], changes)
    assert dpo("train", *words_of(whole)).code == 0
    stopped = config_of(tmp_path / "stopped", rows[kind], changes)

    def until_killed() -> None:
        kill_at("step-00000002", after=True)
        jobs.train_preference(stopped)

    assert forked(until_killed) == -9
    assert dpo("train", *words_of(stopped)).code == 0
    assert outcome(tmp_path / "stopped") == outcome(tmp_path / "whole")


def test_a_moving_reference_moves_and_survives_a_kill(rows, tmp_path) -> None:
    changes = {"moving_reference": {"mix": 0.5, "every": 2}, "save_every": 1, "max_steps": 6}
    whole = config_of(tmp_path / "whole", rows["pair"], changes)
    assert dpo("train", *words_of(whole)).code == 0
    stopped = config_of(tmp_path / "stopped", rows["pair"], changes)

    def until_killed() -> None:
        kill_at("step-00000003", after=True)  # between two moves
        jobs.train_preference(stopped)

    assert forked(until_killed) == -9
    assert dpo("train", *words_of(stopped)).code == 0
    assert outcome(tmp_path / "stopped") == outcome(tmp_path / "whole")
    frozen = config_of(tmp_path / "frozen", rows["pair"], {"max_steps": 6})
    assert dpo("train", *words_of(frozen)).code == 0
    losses = [
        [row["loss"] for row in read_metrics(tmp_path / name) if "loss" in row]
        for name in ("whole", "frozen")
    ]
    assert losses[0][:2] == pytest.approx(losses[1][:2], abs=1e-6)
    assert abs(losses[0][-1] - losses[1][-1]) > 1e-4


def test_a_reference_that_copies_the_policy_after_every_step_keeps_all_losses_at_log_two(
    rows, tmp_path
) -> None:
    changes = {"moving_reference": {"mix": 1.0, "every": 1}}
    config = config_of(tmp_path / "run", rows["pair"], changes)
    assert dpo("train", *words_of(config)).code == 0
    losses = [row["loss"] for row in read_metrics(tmp_path / "run") if "loss" in row]
    assert losses == pytest.approx([0.693147] * 4, abs=1e-5)


def test_a_list_of_two_trains_exactly_as_its_pairs_do(rows, tmp_path) -> None:
    """Plackett-Luce for K = 2 is DPO, through the whole pipeline."""
    found = []
    for name in ("dpo", "plackett_luce"):
        config = config_of(tmp_path / name, rows["pair"], {"loss": {"name": name}})
        assert dpo("train", *words_of(config)).code == 0
        found.append([row["loss"] for row in read_metrics(tmp_path / name) if "loss" in row])
    assert found[0] == pytest.approx(found[1], abs=2e-6)
    assert len(set(found[0])) == 4


def test_a_mixture_is_the_weighted_sum_of_its_losses() -> None:
    parts = [{"name": "dpo", "weight": 0.8, "beta": 0.3}, {"name": "nll", "weight": 2.0}]
    mixed = make_objective(MixLossConfig(mix=parts))
    draw = torch.Generator().manual_seed(0)
    tensors = {
        name: torch.randn(5, generator=draw, dtype=torch.float64)
        for name in (
            "policy_chosen_logps",
            "policy_rejected_logps",
            "reference_chosen_logps",
            "reference_rejected_logps",
        )
    } | {"chosen_lengths": torch.arange(1, 6)}
    dpo_loss, nll = (term.loss.function for term in mixed.terms)
    four = list(tensors.values())[:4]
    expected = 0.8 * dpo_loss(*four, beta=0.3, label_smoothing=0.0)
    expected = expected + 2.0 * nll(four[0], tensors["chosen_lengths"])
    torch.testing.assert_close(mixed(tensors), expected)


def test_losses_that_need_the_whole_batch_get_it_and_say_so(rows, tmp_path) -> None:
    changes = {"loss": {"name": "aot"}, "batch": {"size": 8, "max_tokens": 40}}
    said = dpo("train", *words_of(config_of(tmp_path / "run", rows["pair"], changes)))
    assert said.code == 0
    assert "compares the rows of a batch" in said.all
    steps = [row for row in read_metrics(tmp_path / "run") if "num_passes" in row]
    assert {row["num_passes"] for row in steps} == {1}


def test_whole_batch_losses_are_those_that_depend_on_their_neighbours() -> None:
    assert set(LOSSES) >= WHOLE_BATCH


@pytest.mark.parametrize(
    ("name", "kind", "sentence"),
    [
        ("kto", "list", "expected unpaired or preference rows, got ranked rows"),
        ("dpo", "unpaired", "expected preference or ranked rows, got unpaired rows"),
        ("plackett_luce", "unpaired", "expected ranked or preference rows, got unpaired rows"),
    ],
)
def test_rows_of_another_kind_are_refused_in_a_sentence(
    name, kind, sentence, rows, tmp_path
) -> None:
    said = dpo(
        "train", *words_of(config_of(tmp_path / "run", rows[kind], {"loss": {"name": name}}))
    )
    assert said.code == 2
    assert sentence in said.err


def test_a_loss_of_scores_names_the_first_row_without_any(rows, tmp_path) -> None:
    bare = tmp_path / "bare.jsonl"
    lines = [json.loads(line) for line in rows["pair"].read_text("utf-8").splitlines()]
    for line in lines:
        del line["chosen_score"], line["rejected_score"]
    bare.write_text("".join(json.dumps(line) + "\n" for line in lines), "utf-8")
    said = dpo("train", *words_of(config_of(tmp_path / "run", bare, {"loss": {"name": "odpo"}})))
    assert said.code == 2
    assert "the loss odpo takes scores" in said.err
    assert "bare.jsonl:" in said.err
