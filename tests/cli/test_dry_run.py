"""`--dry-run` says what training would do, and does nothing."""

from __future__ import annotations

import json

import pytest
import yaml

from dpo.config import PreferenceConfig, SFTConfig
from dpo.config_files import read_config
from dpo.models import load
from dpo.train import prepare, session
from dpo.train.dry_run import dry_run
from dpo.train.run import read_metrics
from train.small_runs import FRESH, dpo, dpo_config, dpo_run, sft_config, sft_run, words_of

SYNTHETIC = "data.synthetic.num_rows=96"


@pytest.fixture
def no_weights(monkeypatch):
    """From here on, any attempt to read or make a model fails the test."""
    sft_run()

    def forbidden(*arguments, **options):
        pytest.fail("weights were read")

    for name in ("open_model", "fresh_gpt2"):
        monkeypatch.setattr(session, name, forbidden)
    monkeypatch.setattr(load.AutoModelForCausalLM, "from_pretrained", forbidden)


def plan_of(*words):
    said = dpo(*words, "--dry-run", "--json")
    assert said.code == 0, said.all
    return json.loads(said.out)


def test_it_counts_the_steps_and_tokens_that_training_then_has(tmp_path):
    words = words_of(
        dpo_config(tmp_path / "out", {"batch.size": 5, "max_steps": None, "epochs": 2})
    )
    plan = plan_of("train", *words)
    assert not (tmp_path / "out").exists()
    said = dpo("train", *words, "--json")
    assert said.code == 0, said.all
    steps = [row for row in read_metrics(tmp_path / "out") if "num_tokens" in row]
    assert plan["steps"]["total"] == json.loads(said.out)["steps"] == len(steps)
    first = [row["num_tokens"] for row in steps[: plan["steps"]["each_pass"]]]
    assert plan["train"]["tokens"] == sum(first)
    assert plan["steps"]["most_tokens"] == max(first)
    assert plan["steps"]["mean_tokens"] == pytest.approx(sum(first) / len(first))


def test_counts_by_hand(tmp_path, no_weights):
    rows = [
        {"prompt": "ab", "chosen": "c", "rejected": "de"},
        {"prompt": "ab", "chosen": "same", "rejected": "same"},
        {"prompt": "x" * 40, "chosen": "c" * 40, "rejected": "d"},
    ]
    train, test = tmp_path / "train.jsonl", tmp_path / "test.jsonl"
    train.write_text("".join(json.dumps(row) + "\n" for row in rows))
    test.write_text(json.dumps({"prompt": "q", "chosen": "a", "rejected": "b"}) + "\n")
    config = read_config(
        SFTConfig,
        overrides=[
            f"model.fresh={json.dumps(FRESH | {'vocab_size': 257})}",  # a token is a byte
            f"data.path={train}",
            f"data.test={test}",
            "data.max_length=20",
            "batch.size=2",
            "batch.max_tokens=10",
            "epochs=3",
            f"out={tmp_path / 'out'}",
        ],
    )
    found = dry_run(config)
    # prompt + response + end token: 2+1+1, 2+4+1 and, cut, 10+10; the last token is no input.
    assert found.train.tokens == 3 + 6 + 19
    assert found.train.scored_tokens == 2 + 5 + 10
    assert (found.train.prompts_cut, found.train.responses_cut) == (1, 1)
    assert (found.train.kept, found.held_out.kept, found.held_out.tokens) == (3, 1, 2)
    assert (found.steps.total, found.steps.each_pass, found.steps.rows) == (6, 2, 2)
    assert found.steps.mean_tokens == 28 / 2
    assert found.reference_tokens == 0


def test_pairs_of_the_same_tokens_are_dropped_and_too_many_refused(tmp_path, no_weights):
    rows = [{"prompt": f"{i}", "chosen": "a", "rejected": "ab"[i % 2]} for i in range(20)]
    file = tmp_path / "prefs.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["train", f"model={sft_run()}", f"data={file}", f"out={tmp_path / 'out'}"]
    plan = plan_of(*words, "data.max_dropped=0.9")
    assert plan["train"]["rows"] == plan["train"]["kept"] + plan["train"]["dropped"]
    assert plan["train"]["dropped"] + plan["held_out"]["dropped"] == 10
    refused = dpo(*words, "--dry-run")
    assert refused.code == 2
    assert "data.max_dropped=" in refused.err


@pytest.mark.parametrize(
    ("command", "words", "steps"),
    [
        ("sft", [f"model.fresh={json.dumps(FRESH)}", "batch.size=20"], 5),  # 87 rows
        ("train", ["model={sft}", "batch.size=20"], 5),  # 88 rows
        ("train", ["model={sft}", "loss.name=kto", "batch.size=20"], 9),  # two judgements a pair
        ("train", ["model={sft}", "loss.name=plackett_luce", "max_steps=3"], 3),
        ("reward", ["model={sft}", "batch.size=20"], 5),
        (
            "online",
            ["model={sft}", "reward.function=synthetic", "batch.size=20", "rounds=2"],
            8,  # 77 different prompts: 4 steps a round
        ),
        (
            "ppo",
            ["model={sft}", "reward.function=synthetic", "rounds=3", "prompts_per_round=32"],
            12,  # 32 responses are one batch, four times a round
        ),
    ],
    ids=["sft", "train", "kto", "plackett_luce", "reward", "online", "ppo"],
)
def test_every_training_command_says_its_steps_without_reading_weights(
    tmp_path, no_weights, command, words, steps
):
    words = [word.format(sft=sft_run()) if "{sft}" in word else word for word in words]
    short = [] if command in ("sft", "train", "reward") else ["sampling.max_new_tokens=8"]
    short += [] if command == "reward" else ["evaluation.max_new_tokens=8"]
    words = [command, *words, *short, SYNTHETIC, f"out={tmp_path / 'out'}"]
    assert plan_of(*words)["steps"]["total"] == steps
    said = dpo(*words, "--dry-run")
    assert said.code == 0
    assert f"{steps} optimizer steps" in said.out
    assert "no weights were read, nothing was trained or written" in said.out
    assert not (tmp_path / "out").exists()


def test_the_configuration_that_it_prints_is_the_resolved_one(tmp_path, no_weights):
    config = dpo_config(tmp_path / "out")
    said = dpo("train", *words_of(config), "--dry-run")
    start = said.out_lines.index("dpo train, every setting resolved") + 1
    text = "\n".join(said.out_lines[start : said.out_lines.index("", start)])
    assert yaml.safe_load(text) == config.model_dump(mode="json")
    assert plan_of("train", *words_of(config))["config"] == config.model_dump(mode="json")


def test_it_says_what_the_output_folder_is(tmp_path):
    assert dry_run(dpo_config(dpo_run())).state == "finished"
    assert dry_run(dpo_config(tmp_path / "new")).state == "new"
    (tmp_path / "refused").mkdir()
    (tmp_path / "refused" / ".lock").touch()  # what a run leaves that was refused
    assert dry_run(dpo_config(tmp_path / "refused")).state == "new"
    (tmp_path / "precious.txt").write_text("")
    assert dry_run(dpo_config(tmp_path)).state == "not a run"


def test_an_adapters_folder_has_the_positions_of_its_base(tmp_path):
    changes = {"adapter": {"kind": "lora", "rank": 2}, "max_steps": 1, "evaluation.kl_prompts": 0}
    config = dpo_config(tmp_path / "adapter", changes)
    assert dpo("train", *words_of(config)).code == 0
    onward = dpo_config(tmp_path / "out", {"model.path": str(tmp_path / "adapter")})
    assert dry_run(onward).max_length == FRESH["positions"]


def test_a_launcher_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    said = dpo("sft", *words_of(sft_config(tmp_path / "out")), "--dry-run")
    assert said.err == "a dry run is one process; start it without torchrun or accelerate."


def test_the_reference_is_passed_over_once_where_it_stays(tmp_path, no_weights):
    plan = dry_run(dpo_config(tmp_path / "out"))
    assert plan.reference_tokens == plan.train.tokens + plan.held_out.tokens
    words = ["loss.name=simpo", f"model={sft_run()}", SYNTHETIC, f"out={tmp_path / 'out'}"]
    assert dry_run(read_config(PreferenceConfig, overrides=words)).reference_tokens == 0


def test_rows_are_read_once(tmp_path, no_weights, monkeypatch):
    read = []
    load_rows = prepare.load_rows
    monkeypatch.setattr(prepare, "load_rows", lambda *a, **k: read.append(a) or load_rows(*a, **k))
    file = tmp_path / "prefs.jsonl"
    assert dpo("data", "synthetic", file, "--rows", 40).code == 0
    plan = plan_of("train", f"model={sft_run()}", f"data={file}", f"out={tmp_path / 'out'}")
    assert any("seconds a step" in line for line in plan["estimate"])
    assert len(read) == 1


def test_a_warm_up_longer_than_the_run_is_said_before_it(tmp_path, no_weights):
    words = words_of(dpo_config(tmp_path / "out", {"optimizer": {"warmup": 50}}))
    said = dpo("train", *words, "--dry-run")
    assert said.code == 0, said.all
    assert "optimizer.warmup: 50 steps are more than the run's 6" in said.err


def test_a_store_of_rows_is_not_written(tmp_path, no_weights):
    file = tmp_path / "prefs.jsonl"
    assert dpo("data", "synthetic", file, "--rows", 40).code == 0
    words = ["train", f"model={sft_run()}", f"data={file}", f"out={tmp_path / 'out'}"]
    stored = plan_of(*words, "data.store=arrow", f"data.cache={tmp_path / 'cache'}")
    assert stored["config"]["data"]["store"] == "arrow"
    assert not (tmp_path / "cache").exists()
    plain = plan_of(*words)
    for part in ("train", "held_out", "steps"):
        assert stored[part] == plain[part]
