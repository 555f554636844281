"""Training on pairs in a store computes what training on pairs in memory does, bit for bit."""

import json
import os
import signal
from functools import cache

import pytest

from dpo.config import DataConfig, RewardConfig
from dpo.config_files import validate
from dpo.data import store, synthetic
from dpo.data.sources import write_jsonl
from dpo.errors import InputError
from dpo.evaluate.jobs import held_out_rows
from dpo.train.jobs import train_preference, train_sft
from dpo.train.prepare import load_preferences
from dpo.train.reward import train_reward
from dpo.train.run import Run
from train.several_ranks import start, wait
from train.several_ranks import train as train_on_ranks
from train.small_runs import (
    COMMON,
    dpo,
    dpo_config,
    forked,
    merged,
    outcome,
    scratch,
    sft_config,
    sft_run,
    words_of,
)

SAME_BYTES = ("config.json", "data.json", "train_prompts.safetensors", "model/README.md")


@pytest.fixture(autouse=True)
def small_batches(monkeypatch):
    monkeypatch.setattr(store, "BATCH", 16)


@cache
def prefs():
    """96 pairs, in a file; four of them twice, four without a difference."""
    file = scratch() / "prefs.jsonl"
    write_jsonl(synthetic.preferences(num_rows=96, seed=0), file)
    lines = file.read_text().splitlines(keepends=True)
    rows = [json.loads(line) for line in lines[:4]]
    lines += [*lines[4:8], *(json.dumps(r | {"rejected": r["chosen"]}) + "\n" for r in rows)]
    file.write_text("".join(lines))
    return file


def changes(kept, folder, **more):
    data = {"path": str(prefs()), "test_fraction": 0.25, "max_length": 20, "max_dropped": 0.2}
    if kept == "arrow":
        data |= {"store": "arrow", "cache": str(folder / "store")}
    return {"data": data, **more}


def config_of(kept, folder, **more):
    given = changes(kept, folder, **more)
    data = given.pop("data")
    config = dpo_config(folder / "run", given)
    return config.model_copy(update={"data": validate(DataConfig, data)})


@cache
def uninterrupted():
    """The run in memory, and what it said."""
    return train_preference(config_of("memory", scratch() / "in memory"))


def assert_same_run(folder, expected):
    assert outcome(folder) == outcome(expected)
    for name in SAME_BYTES:
        found, wanted = (f / name for f in (folder, expected))
        assert found.read_bytes() == wanted.read_bytes(), name


def messages(caplog):
    """What was said, but for where the data are and how long things took."""
    about = (
        "training rows:",
        "held-out rows:",
        "rows are",
        "responses are",
        "rows, split",
        "Data ",
    )
    said = [record.getMessage() for record in caplog.records if record.name == "dpo"]
    return [line for line in said if any(part in line for part in about) and "tokens " not in line]


def test_a_run_from_the_store_equals_one_from_memory_in_all_it_writes_and_says(tmp_path, caplog):
    sft_run()
    caplog.set_level("INFO", "dpo")
    in_memory = train_preference(config_of("memory", tmp_path / "memory"))
    said = messages(caplog)
    assert any("lost their beginning" in line for line in said)  # max_length cuts
    assert any("rows are dropped" in line for line in said)
    caplog.clear()
    stored = train_preference(config_of("arrow", tmp_path))
    assert_same_run(stored, in_memory)
    assert messages(caplog) == said
    assert json.loads((stored / "data.json").read_text())["num_duplicate_rows"] > 0
    assert "written to the store" in caplog.text
    caplog.clear()
    again = config_of("arrow", tmp_path).model_copy(update={"out": str(tmp_path / "2" / "run")})
    assert_same_run(train_preference(again), in_memory)
    assert "written to" not in caplog.text
    assert messages(caplog) == said


def test_killed_while_it_trains_or_tokenises_a_run_from_the_store_ends_the_same(tmp_path):
    expected = uninterrupted()
    config = config_of("arrow", tmp_path)

    def killed_tokenising():
        from dpo.data.tokenize import Encoder

        encode, seen = Encoder.encode, []

        def deadly(encoder, prompt, responses):
            seen.append(prompt)
            if len(seen) == 50:
                os.kill(os.getpid(), signal.SIGKILL)
            return encode(encoder, prompt, responses)

        Encoder.encode = deadly
        train_preference(config)

    def killed_training():
        log = Run.log

        def logged(run, row):
            log(run, row)
            if row["step"] == 3 and "loss" in row:
                os.kill(os.getpid(), signal.SIGKILL)

        Run.log = logged
        train_preference(config)

    assert forked(killed_tokenising) == -signal.SIGKILL
    assert forked(killed_training) == -signal.SIGKILL
    assert_same_run(train_preference(config), expected)


def test_a_run_may_be_begun_in_memory_and_ended_from_the_store(tmp_path):
    expected = uninterrupted()

    def begun():
        log = Run.log

        def logged(run, row):
            log(run, row)
            if row["step"] == 3 and "loss" in row:
                os.kill(os.getpid(), signal.SIGTERM)

        Run.log = logged
        train_preference(config_of("memory", tmp_path))

    assert forked(begun) == 75
    assert_same_run(train_preference(config_of("arrow", tmp_path)), expected)


def test_two_processes_train_on_one_store(tmp_path):
    alone, both = (tmp_path / name for name in ("memory", "arrow"))
    sft_run()
    for kept, folder in (("memory", alone), ("arrow", both)):
        config = config_of(kept, folder)
        started = start(2, lambda rank, config=config: train_on_ranks(config))
        assert wait(started, seconds=300) == [0, 0]
    assert_same_run(both / "run", alone / "run")


@pytest.mark.parametrize("margin", [None, "scores"])
def test_a_reward_model_from_the_store_equals_one_from_memory(tmp_path, margin):
    rated = tmp_path / "rated.jsonl"
    rows = [json.loads(line) for line in prefs().read_text().splitlines()]
    rated.write_text(
        "".join(json.dumps(r | {"chosen_score": 2, "rejected_score": 0.5}) + "\n" for r in rows)
    )
    done = []
    for kept in ("memory", "arrow"):
        given = changes(kept, tmp_path)["data"] | {"path": str(rated)}
        values = {
            "model": {"path": str(sft_run())},
            "out": str(tmp_path / kept / "run"),
            "margin": margin,
            "evaluation": {"every": 3, "max_rows": 16},
        }
        common = {k: v for k, v in COMMON.items() if k not in ("data", "evaluation")}
        config = validate(RewardConfig, merged(common | values, {"data": given}))
        done.append(train_reward(config))
    assert_same_run(done[1], done[0])


def test_evaluation_has_the_same_held_out_rows(tmp_path):
    chosen = []
    for kept in ("memory", "arrow"):
        data = load_preferences(config_of(kept, tmp_path).data)
        chosen.append(held_out_rows(data, max_prompts=7, seed=1))
    assert chosen[0] == chosen[1]
    assert [row.source for row in chosen[0]] == [row.source for row in chosen[1]]


def test_the_store_is_in_the_users_cache_unless_it_is_named(tmp_path):
    data = validate(DataConfig, {"path": str(prefs()), "store": "arrow"})
    load_preferences(data)
    assert len(list((store.cache_folder() / "rows").glob("*/train.arrow"))) == 1


def test_what_is_no_pair_cannot_be_stored_and_one_sentence_says_so(tmp_path):
    arrow = {"path": str(prefs()), "store": "arrow"}
    jobs = [
        (train_sft, sft_config(tmp_path / "a")),
        (train_preference, dpo_config(tmp_path / "b", {"loss.name": "plackett_luce"})),
        (train_preference, dpo_config(tmp_path / "c", {"loss.name": "kto"})),
    ]
    for job, config in jobs:
        config = config.model_copy(update={"data": validate(DataConfig, arrow)})
        with pytest.raises(InputError, match=r"^data\.store: arrow keeps preference pairs .*\.$"):
            job(config)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["data.store=arrow"], "data.store has no effect when data is 'synthetic'"),
        (["data=x.jsonl", "data.cache=c"], "data.cache has no effect unless data.store is arrow"),
        (["data=x.jsonl", "data.store=parquet"], "data.store"),
    ],
)
def test_settings_of_the_store_without_effect_are_errors(words, said, tmp_path):
    answer = dpo("train", f"model={tmp_path}", f"out={tmp_path / 'out'}", *words)
    assert answer.code == 2
    assert said in answer.all


def test_the_command_line_takes_a_store(tmp_path):
    config = config_of("arrow", tmp_path)
    assert dpo("train", *words_of(config)).code == 0
    assert_same_run(tmp_path / "run", uninterrupted())
