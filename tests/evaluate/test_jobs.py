"""`dpo evaluate` from configuration to tables: honest prompts, reused generations, whole files."""

import copy
import json
import shutil
from dataclasses import replace

import numpy as np
import pytest

from dpo.atomic import lock_folder
from dpo.config_files import validate
from dpo.data.prompts import resolve_template
from dpo.data.rows import PreferenceRow
from dpo.data.tokenize import Encoder
from dpo.errors import InputError, StorageError
from dpo.evaluate import generations, jobs
from dpo.evaluate.generations import Sampling, sample_responses
from dpo.evaluate.jobs import check_held_out, evaluate, held_out_rows
from dpo.evaluation_config import EvaluateConfig
from dpo.models.fresh import fresh_gpt2
from dpo.train.prepare import SplitData
from dpo.train.run import save_train_prompts
from train.small_runs import (
    dpo,
    dpo_config,
    dpo_run,
    evaluate_config,
    sft_config,
    sft_run,
    words_of,
)

ROWS = [PreferenceRow(f"What is {i}?", f"It is {i}.", "No.") for i in range(4)]
SAMPLING = Sampling(
    temperatures=(0.5, 1.0),
    samples_per_prompt=2,
    max_new_tokens=6,
    batch_size=3,
    precision="fp32",
    seed=0,
)


class Judge:
    """Embeds a text by its letters; no network, no weights."""

    name = digest = "letters"

    def __call__(self, texts):
        return np.array([[text.count(c) for c in "aeiouthns "] for text in texts], np.float32)


@pytest.fixture
def model(tokenizer):
    return fresh_gpt2(width=16, layers=1, heads=2, positions=64, tokenizer=tokenizer, seed=0)


@pytest.fixture
def encoder(tokenizer):
    return Encoder(tokenizer, resolve_template("plain"), 64)


@pytest.fixture
def calls(monkeypatch):
    """How many prompts each call of `generate` sampled for."""
    counted = []
    generate = generations.generate

    def counting(model, prompts, **options):
        counted.append(len(prompts))
        return generate(model, prompts, **options)

    monkeypatch.setattr(generations, "generate", counting)
    return counted


@pytest.fixture
def judged(monkeypatch):
    monkeypatch.setattr(jobs, "load_sentence_model", lambda name: Judge())


def sample(model, encoder, folder, name="m", rows=ROWS, **changes):
    return sample_responses(name, model, encoder, rows, replace(SAMPLING, **changes), folder)


def test_responses_come_by_temperature_row_and_sample(model, encoder, tmp_path):
    found = sample(model, encoder, tmp_path)
    expected = [(t, i, s) for t in (0.5, 1.0) for i in range(4) for s in range(2)]
    assert [(g.temperature, g.prompt_index, g.sample) for g in found] == expected
    for g in found:
        row = ROWS[g.prompt_index]
        assert (g.prompt, g.chosen, g.rejected) == (row.prompt, row.chosen, row.rejected)
        assert 1 <= g.num_tokens <= 6


def test_responses_are_reused_by_content_and_equal(model, encoder, tmp_path, calls):
    first = sample(model, encoder, tmp_path)
    assert calls == [8, 8]
    assert sample(model, encoder, tmp_path) == first
    assert sample(model, encoder, tmp_path, batch_size=7) == first  # cosmetic
    assert calls == [8, 8]


def test_only_the_temperature_that_is_new_is_sampled(model, encoder, tmp_path, calls):
    first = sample(model, encoder, tmp_path)
    found = sample(model, encoder, tmp_path, temperatures=(0.5, 0.7, 1.0))
    assert calls == [8, 8, 8]
    assert [g for g in found if g.temperature != 0.7] == first


@pytest.mark.parametrize(
    "changes",
    [{"seed": 1}, {"max_new_tokens": 5}, {"samples_per_prompt": 1}, {"precision": "bf16"}],
)
def test_other_settings_are_never_answered_from_older_responses(
    model, encoder, tmp_path, calls, changes
):
    sample(model, encoder, tmp_path)
    sample(model, encoder, tmp_path, **changes)
    assert len(calls) == 4


def test_other_weights_prompts_or_template_are_never_answered_from_older_responses(
    model, encoder, tmp_path, calls
):
    sample(model, encoder, tmp_path)
    model.transformer.ln_f.bias.data[0] += 1e-3
    sample(model, encoder, tmp_path)
    sample(model, encoder, tmp_path, rows=ROWS[:3])
    sample(model, replace(encoder, template=resolve_template("question")), tmp_path)
    assert len(calls) == 8


def changed_config(model, encoder):
    model.config.layer_norm_epsilon = 0.5
    return model, encoder


def changed_tokenizer(model, encoder):
    other = copy.deepcopy(encoder.tokenizer)
    other.add_tokens(["a token that no prompt has"])
    return model, replace(encoder, tokenizer=other)


@pytest.mark.parametrize("change", [changed_config, changed_tokenizer])
def test_other_settings_of_a_model_or_tokens_are_never_answered_from_older_responses(
    model, encoder, tmp_path, calls, change
):
    sample(model, encoder, tmp_path)
    sample(*change(model, encoder), tmp_path)
    assert len(calls) == 4


def test_where_a_model_lies_is_no_part_of_it(model, encoder, tmp_path, calls):
    sample(model, encoder, tmp_path)
    model.config._name_or_path = "elsewhere"
    sample(model, encoder, tmp_path)
    assert len(calls) == 2


def test_a_stop_within_a_temperature_costs_the_chunk_at_hand_only(
    model, encoder, tmp_path, calls, monkeypatch
):
    """Of 16 responses in chunks of 4 batches of one, two chunks are there when the third fails."""
    many = {"temperatures": (1.0,), "samples_per_prompt": 4, "batch_size": 1}
    whole = sample(model, encoder, tmp_path / "whole", **many)
    counting = generations.generate

    def interrupted(model, prompts, **options):
        if len(calls) == 4 + 2:
            raise KeyboardInterrupt
        return counting(model, prompts, **options)

    monkeypatch.setattr(generations, "generate", interrupted)
    with pytest.raises(KeyboardInterrupt):
        sample(model, encoder, tmp_path / "stopped", **many)
    monkeypatch.setattr(generations, "generate", counting)
    (file,) = (tmp_path / "stopped").iterdir()
    assert len(file.read_text().splitlines()) == 8
    assert sample(model, encoder, tmp_path / "stopped", **many) == whole
    assert calls == [4] * 8
    assert file.read_text() == next((tmp_path / "whole").iterdir()).read_text()


def test_progress_counts_what_was_there_and_what_is_new(model, encoder, tmp_path):
    def counted(**changes):
        steps = []
        settings = replace(SAMPLING, **changes)
        sample_responses("m", model, encoder, ROWS, settings, tmp_path, progress=steps.append)
        return sum(steps)

    assert counted(temperatures=(1.0,)) == 8
    assert counted(temperatures=(1.0, 0.5)) == 16


@pytest.mark.parametrize("damage", ["fewer lines", "torn line", "other keys", "not utf-8", "empty"])
def test_damaged_responses_are_sampled_again(model, encoder, tmp_path, calls, damage):
    first = sample(model, encoder, tmp_path, temperatures=(1.0,))
    (file,) = tmp_path.iterdir()
    text = file.read_text()
    lines = text.splitlines(keepends=True)
    damaged = {
        "fewer lines": "".join(lines[:-1]).encode(),
        "torn line": text[:-9].encode(),
        "other keys": text.replace("num_tokens", "n").encode(),
        "not utf-8": b"\xff" + text.encode(),
        "empty": b"",
    }
    file.write_bytes(damaged[damage])
    assert sample(model, encoder, tmp_path, temperatures=(1.0,)) == first
    assert len(calls) == 2
    assert file.read_text() == text


def test_a_stop_between_two_temperatures_costs_only_the_second(
    model, encoder, tmp_path, monkeypatch
):
    whole = sample(model, encoder, tmp_path / "whole")
    generate, done = generations.generate, []

    def interrupted(model, prompts, **options):
        if options["temperature"] == 1.0 and not done:
            done.append(True)
            raise KeyboardInterrupt
        return generate(model, prompts, **options)

    monkeypatch.setattr(generations, "generate", interrupted)
    with pytest.raises(KeyboardInterrupt):
        sample(model, encoder, tmp_path / "stopped")
    assert [f.name.partition("-t")[2][:3] for f in (tmp_path / "stopped").iterdir()] == ["0.5"]
    assert sample(model, encoder, tmp_path / "stopped") == whole


def test_responses_do_not_depend_on_the_batch(model, encoder, tmp_path):
    one = sample(model, encoder, tmp_path / "1", batch_size=1)
    eight = sample(model, encoder, tmp_path / "8", batch_size=8)
    assert one == eight


def test_samples_of_one_prompt_differ(model, encoder, tmp_path):
    found = sample(model, encoder, tmp_path, temperatures=(1.0,))
    texts = {(g.prompt_index, g.generated) for g in found}
    assert len(texts) == len(found)


def test_truncated_responses_are_marked(model, encoder, tmp_path):
    found = sample(model, encoder, tmp_path)
    assert any(g.truncated for g in found)
    assert all(g.num_tokens == 6 for g in found if g.truncated)


def test_prompts_that_are_cut_for_room_are_said(model, encoder, tmp_path, caplog):
    sample(model, encoder, tmp_path, rows=[PreferenceRow("word " * 90, "a", "b"), *ROWS])
    assert "1 of 5 prompts lost their beginning" in caplog.text


def test_more_new_tokens_than_positions_is_an_error_that_says_the_limit(model, encoder, tmp_path):
    with pytest.raises(InputError, match="use at most 63"):
        sample(model, encoder, tmp_path, max_new_tokens=64)


# -- held-out honesty ---------------------------------------------------------------------------


def held_out(rows, most=100, seed=0):
    return held_out_rows(SplitData((), tuple(rows), "preference", False, ""), most, seed)


def test_each_prompt_counts_once_whatever_case_and_space_with_its_first_pair():
    rows = [
        PreferenceRow("What is one?", "a", "b"),
        PreferenceRow("what is  ONE? ", "c", "d"),
        PreferenceRow("What is two?", "e", "f"),
    ]
    assert held_out(rows) == [rows[0], rows[2]]


def test_identical_pairs_judge_nothing_and_are_left_out():
    rows = [PreferenceRow("x", "same", "same"), PreferenceRow("x", "a", "b"), *ROWS]
    assert held_out(rows) == rows[1:]


@pytest.mark.parametrize("rows", [[], [PreferenceRow("x", "a", "a")], ROWS[:1]])
def test_fewer_than_two_prompts_are_refused_before_anything_is_generated(rows):
    with pytest.raises(InputError, match=r"data: [01] held-out prompts have a pair"):
        held_out(rows)


def test_the_choice_of_prompts_is_seeded():
    rows = [PreferenceRow(f"p{i}", "a", "b") for i in range(50)]
    assert held_out(rows, 5, 1) == held_out(rows, 5, 1) != held_out(rows, 5, 2)
    assert len(held_out(rows, 5, 1)) == 5


@pytest.mark.parametrize("place", ["", "model", "best"])
def test_a_model_is_refused_on_prompts_it_was_trained_on(tmp_path, place, caplog):
    from dpo.data.split import prompt_digest

    save_train_prompts(tmp_path, [prompt_digest("WHAT is  1?"), prompt_digest("other")])
    path = str(tmp_path / place)
    with pytest.raises(InputError) as caught:
        check_held_out("m", path, ROWS, allow=False)
    assert f"models.m: {path} was trained on 1 of the 4 held-out prompts" in str(caught.value)
    assert "allow_overlap=true" in str(caught.value)
    check_held_out("m", path, ROWS, allow=True)
    assert "models.m was trained on 1 of the 4 prompts" in caplog.text
    check_held_out("m", path, ROWS[2:], allow=False)


def test_a_model_whose_training_prompts_are_unknown_is_said_to_be_so(tmp_path, caplog):
    caplog.set_level("INFO", "dpo")
    check_held_out("m", str(tmp_path), ROWS, allow=False)
    assert "does not say which prompts it was trained on" in caplog.text


def test_another_split_than_the_one_trained_with_is_refused_on_the_command_line(tmp_path, judged):
    changes = {
        "data.split_seed": 1,
        "models": {"sft": str(sft_run())},
        "temperatures": [1.0],
        "max_prompts": 100,
    }
    words = words_of(evaluate_config(tmp_path / "out", changes))
    said = dpo("evaluate", *words)
    assert said.code == 2
    assert "use the split it was trained with (data.test_fraction, data.split_seed)" in said.err
    assert not (tmp_path / "out").exists()
    allowed = dpo("evaluate", *words, "allow_overlap=true")
    assert allowed.code == 0
    assert "models.sft was trained on" in allowed.err


def test_a_dpo_model_is_refused_on_prompts_that_its_sft_stage_was_trained_on(tmp_path):
    from dpo.train.jobs import train_preference, train_sft

    quick = {"max_steps": 1, "evaluation.num_samples": 0, "evaluation.max_rows": 4}
    sft = train_sft(sft_config(tmp_path / "sft", quick | {"data.split_seed": 1}))
    run = train_preference(dpo_config(tmp_path / "dpo", quick | {"model.path": str(sft)}))
    said = dpo(
        "evaluate", *words_of(evaluate_config(tmp_path / "out", {"models": {"m": str(run)}}))
    )
    assert said.code == 2
    assert "was trained on" in said.err


# -- the whole command --------------------------------------------------------------------------


def config(out, **changes):
    quick = {"temperatures": [1.0], "max_prompts": 5, "max_new_tokens": 4}
    return evaluate_config(out, quick | {"models": {"m": str(sft_run())}} | changes)


def test_a_model_that_is_nowhere_is_refused_before_data_or_judge_are_read(tmp_path, monkeypatch):
    monkeypatch.setattr(jobs, "load_preferences", None)  # calling it would fail
    monkeypatch.setattr(jobs, "load_sentence_model", None)
    models = {"good": str(sft_run()), "gone": str(tmp_path / "gone")}
    with pytest.raises(InputError, match=r"models\.gone: there is no folder"):
        evaluate(config(tmp_path / "out", models=models))


def test_an_output_that_is_a_file_is_refused_before_anything_is_generated(
    tmp_path, judged, monkeypatch
):
    (tmp_path / "out").write_text("")
    monkeypatch.setattr(jobs, "generate_with", None)
    with pytest.raises(StorageError, match="a file of that name is in the way"):
        evaluate(config(tmp_path / "out"))


def test_true_rewards_are_given_for_the_embedded_data_only(tmp_path, judged):
    assert evaluate(config(tmp_path / "embedded")).rewards[0].n == 5
    assert (tmp_path / "embedded" / "true_rewards.csv").exists()
    data = tmp_path / "rows.jsonl"
    rows = [{"prompt": r.prompt, "chosen": r.chosen, "rejected": r.rejected} for r in ROWS * 3]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    values = {"path": str(data), "test_fraction": 0.9, "template": "plain"}
    found = evaluate(config(tmp_path / "own", data=values))
    assert found.rewards == []
    assert not (tmp_path / "own" / "true_rewards.csv").exists()


def test_every_model_has_its_row_and_the_nulls_theirs(tmp_path, judged):
    models = {"a": str(sft_run()), "b": str(sft_run() / "best")}
    found = evaluate(config(tmp_path / "out", models=models, samples_per_prompt=2))
    assert [(row.model, row.n) for row in found.table if row.kind == "model"] == [
        ("a", 10),
        ("b", 10),
    ]
    assert len([row for row in found.table if row.kind == "null"]) == 6
    meta = json.loads((tmp_path / "out" / "win_rates.json").read_text())["meta"]
    assert meta["sentence_model"] == "letters"
    assert "out" not in meta


def files_of(folder):
    """The results of an evaluation, by name."""
    names = ("scored.jsonl", "win_rates.csv", "win_rates.json", "paired_tests.csv")
    return {name: (folder / name).read_bytes() for name in (*names, "true_rewards.csv")}


def test_a_second_evaluation_generates_and_embeds_nothing_and_writes_the_same(
    tmp_path, judged, calls, monkeypatch
):
    evaluate(config(tmp_path / "out"))
    before, num_calls = files_of(tmp_path / "out"), len(calls)
    monkeypatch.setattr(Judge, "__call__", None)  # calling it would fail
    evaluate(config(tmp_path / "out"))
    assert files_of(tmp_path / "out") == before
    assert len(calls) == num_calls


@pytest.mark.parametrize("change", ["weights", "config"])
def test_another_model_at_the_same_path_is_noticed_and_asked_again(tmp_path, judged, calls, change):
    model = tmp_path / "model"
    shutil.copytree(sft_run() / "model", model)
    evaluate(config(tmp_path / "out", models={"m": str(model)}))
    first = files_of(tmp_path / "out")
    if change == "weights":
        shutil.copy(dpo_run() / "model" / "model.safetensors", model)
    else:
        settings = json.loads((model / "config.json").read_text())
        (model / "config.json").write_text(json.dumps(settings | {"layer_norm_epsilon": 0.5}))
    evaluate(config(tmp_path / "out", models={"m": str(model)}))
    assert len(calls) == 2
    assert files_of(tmp_path / "out") != first
    evaluate(config(tmp_path / "fresh", models={"m": str(model)}))
    assert files_of(tmp_path / "out") == files_of(tmp_path / "fresh")


def test_a_second_process_in_the_folder_is_refused(tmp_path, judged):
    (tmp_path / "out").mkdir()
    with lock_folder(tmp_path / "out"), pytest.raises(InputError, match="another process is work"):
        evaluate(config(tmp_path / "out"))
    evaluate(config(tmp_path / "out"))


def test_torn_files_of_a_killed_evaluation_go_and_those_of_others_stay(tmp_path, judged):
    foreign = tmp_path / "out" / ".mine.tmp"
    foreign.parent.mkdir()
    foreign.touch()
    evaluate(config(tmp_path / "out"))
    assert foreign.exists()
    torn = [tmp_path / "out" / ".scored.jsonl.1.tmp", tmp_path / "out/generations/.m.jsonl.1.tmp"]
    for file in torn:
        file.touch()
    evaluate(config(tmp_path / "out"))
    assert not any(file.exists() for file in torn)


def test_the_template_of_training_is_used_and_another_refused(tmp_path, judged):
    model = tmp_path / "model"
    shutil.copytree(sft_run() / "model", model)
    (model / "prompt_template.json").write_text('{"name": "hh", "text": "\\n\\nHuman: {prompt}"}')
    with pytest.raises(InputError, match="the model was trained with the template"):
        evaluate(config(tmp_path / "out", models={"m": str(model)}, **{"data.template": "alpaca"}))


def test_a_single_model_needs_no_data_section():
    validate(EvaluateConfig, {"models": {"m": "runs/a"}, "out": "x"})
