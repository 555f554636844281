"""`dpo init` writes a recipe that explains itself and that the command takes as it is."""

from __future__ import annotations

import json

import pytest
import yaml

from dpo.config import PreferenceConfig, SFTConfig
from dpo.config_files import read_config
from dpo.data.guess import guess_columns
from dpo.loss_config import LOSS_CONFIGS
from dpo.train.recipe import SCHEMAS, WIDTH
from dpo.train.run import read_manifest
from train.small_runs import dpo, sft_run

PAIR = {"prompt": "What is {}?", "chosen": "It is {}.", "rejected": "No idea, {}."}
RANKED = {"prompt": "What is {}?", "responses": ["It is {}.", "No idea, {}."]}
JUDGED = {"prompt": "What is {}?", "completion": "It is {}.", "label": True}
SHOWN = {"prompt": "What is {}?", "response": "It is {}."}


def filled(value, number):
    if isinstance(value, dict):
        return {key: filled(inner, number) for key, inner in value.items()}
    if isinstance(value, list):
        return [filled(inner, number) for inner in value]
    if isinstance(value, bool):
        return number % 2 == 0
    return value.format(number)


def rows(folder, row, num_rows=40, name="mine.jsonl"):
    file = folder / name
    file.write_text("".join(json.dumps(filled(row, i)) + "\n" for i in range(num_rows)))
    return file


def written(folder, *words, name="recipe.yaml"):
    """What `dpo init` says, and the recipe's text and values."""
    file = folder / name
    said = dpo("init", *words, f"out={file}")
    assert said.code == 0, said.all
    text = file.read_text(encoding="utf-8")
    return said, text, yaml.safe_load(text)


def test_a_recipe_of_pairs_is_taken_by_dpo_train_as_it_is_and_trains(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data = rows(tmp_path, PAIR)
    said, _, values = written(tmp_path, f"data={data}", f"model={sft_run()}")
    assert said.out.endswith(f"Next: dpo train {tmp_path / 'recipe.yaml'} --dry-run")
    assert values["loss"] == {"name": "dpo", "beta": 0.1}
    short = ["evaluation.max_new_tokens=8", "evaluation.kl_prompts=2", "epochs=1"]
    trained = dpo("train", tmp_path / "recipe.yaml", *short, "--json")
    assert trained.code == 0, trained.all
    folder = tmp_path / "runs" / "mine-dpo"
    assert json.loads(trained.out)["folder"] == "runs/mine-dpo"
    assert read_manifest(folder)["status"] == "finished"


@pytest.mark.parametrize(
    ("row", "command", "loss"),
    [
        (PAIR, "train", "dpo"),
        (RANKED, "train", "plackett_luce"),
        (JUDGED, "train", "kto"),
        (SHOWN, "sft", None),
    ],
    ids=["pairs", "rankings", "judgements", "demonstrations"],
)
def test_the_rows_decide_the_command_and_the_loss(tmp_path, row, command, loss):
    file = tmp_path / "recipe.yaml"
    said, text, values = written(tmp_path, f"data={rows(tmp_path, row)}", f"model={sft_run()}")
    assert f"a recipe for dpo {command}," in said.out
    assert "40 " in said.out
    config = read_config(SCHEMAS[command], file)
    assert config.data.path == str(tmp_path / "mine.jsonl")
    assert values.get("loss", {}).get("name") == loss
    assert f"dpo {command} {file} --dry-run" in text
    if loss is not None:
        assert f"# {LOSS_CONFIGS[loss].__doc__.splitlines()[0]}" in text


def test_prompts_alone_get_no_recipe_and_a_prompt_with_odd_names_beside_it_is_no_prompt_alone(
    tmp_path,
):
    model = f"model={sft_run()}"
    alone = rows(tmp_path, {"prompt": "What is {}?"}, name="alone.jsonl")
    refused = dpo("init", f"data={alone}", model, f"out={tmp_path / 'x.yaml'}")
    assert refused.code == 2
    assert "prompts alone are for dpo online and dpo ppo" in refused.err
    odd = {"prompt": "What is {}?", "better": "It is {}.", "worse": "No idea, {}."}
    _, _, values = written(tmp_path, f"data={rows(tmp_path, odd)}", model)
    assert values["data"]["columns"] == {"chosen": "better", "rejected": "worse"}


def test_a_command_that_is_asked_for_and_one_that_cannot_take_the_rows(tmp_path):
    pairs, shown = rows(tmp_path, PAIR), rows(tmp_path, SHOWN, name="shown.jsonl")
    model = f"model={sft_run()}"
    _, _, values = written(tmp_path, f"data={pairs}", model, "command=reward")
    assert values["loss"] == "bradley_terry"
    _, _, values = written(tmp_path, f"data={pairs}", model, "command=sft", name="sft.yaml")
    assert "loss" not in values
    refused = dpo("init", f"data={shown}", model, "command=train", f"out={tmp_path / 'x.yaml'}")
    assert refused.code == 2
    assert refused.err == (
        "command: train does not take demonstration rows; sft does: leave it out."
    )
    assert "did you mean train?" in dpo("init", "data=x", "model=y", "command=trian").err


def descriptions(schema_or_config, values, before=""):
    """Each key of the values with the description that its schema has."""
    for name, value in values.items():
        field = type(schema_or_config).model_fields[name]
        inner = getattr(schema_or_config, name)
        if isinstance(value, dict) and hasattr(inner, "model_fields_set"):
            yield from descriptions(inner, value, f"{before}{name}.")
        else:
            yield before + name, field.description


def test_every_key_is_explained_in_the_words_of_its_schema_and_no_line_is_too_long(tmp_path):
    data = rows(tmp_path, PAIR)
    for command in ("sft", "train", "reward"):
        file = tmp_path / f"{command}.yaml"
        words = (f"data={data}", f"model={sft_run()}", f"command={command}")
        _, text, values = written(tmp_path, *words, name=file.name)
        words_of_text = " ".join(text.replace("#", " ").split())
        explained = dict(descriptions(read_config(SCHEMAS[command], file), values))
        assert len(explained) > 15
        for key, description in explained.items():
            if key != "loss.name":
                assert description, key
                assert " ".join(description.split()) in words_of_text, key
        paths = (str(data), str(file), str(sft_run()))
        long = [line for line in text.splitlines() if len(line) > WIDTH]
        assert all(any(path in line for path in paths) for line in long)


def test_columns_of_usual_names_are_guessed_and_said(tmp_path):
    row = {"question": "What is {}?", "better answer": "It is {}.", "worse answer": "No, {}."}
    said, text, values = written(tmp_path, f"data={rows(tmp_path, row)}", f"model={sft_run()}")
    assert values["data"]["columns"] == {
        "prompt": "question",
        "chosen": "better answer",
        "rejected": "worse answer",
    }
    assert "The columns were guessed: prompt is question" in said.out
    assert "The columns were guessed" in text
    given = {"data.columns.prompt": "question", "data.columns.chosen": "better answer"}
    words = [f"{key}={value}" for key, value in given.items()]
    _, _, values = written(
        tmp_path,
        f"data={tmp_path / 'mine.jsonl'}",
        *words,
        "data.columns.rejected=worse answer",
        f"model={sft_run()}",
        name="given.yaml",
    )
    assert values["data"]["columns"]["rejected"] == "worse answer"


@pytest.mark.parametrize(
    ("columns", "meant"),
    [
        (["question", "answer"], {"prompt": "question", "response": "answer"}),
        (["Query", "completions"], {"prompt": "Query", "responses": "completions"}),
        (
            ["query", "reply", "liked"],
            {"prompt": "query", "completion": "reply", "label": "liked"},
        ),
        (["question", "chosen", "rejected"], {"prompt": "question"}),
        (["prompt", "chosen", "rejected"], {}),
        (["a", "b"], {}),
    ],
)
def test_guesses(columns, meant):
    assert guess_columns(columns) == meant


def test_rows_that_cannot_be_read_are_named_as_everywhere(tmp_path):
    file = tmp_path / "bad.jsonl"
    file.write_text(json.dumps(PAIR) + "\n" + json.dumps({"prompt": "x", "chosen": "y"}) + "\n")
    said = dpo("init", f"data={file}", "model=gpt2", f"out={tmp_path / 'r.yaml'}")
    assert said.code == 2
    assert "bad.jsonl:2" in said.err
    assert not (tmp_path / "r.yaml").exists()


def test_an_existing_file_stays(tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_text("precious")
    said = dpo("init", f"data={rows(tmp_path, PAIR)}", "model=gpt2", f"out={file}")
    assert (said.code, said.err) == (
        2,
        f"out: {file} exists; name another file, e.g. out=another.yaml.",
    )
    assert file.read_text() == "precious"


def test_a_model_from_a_hub_needs_none_to_be_written_down_and_is_told_to_learn_first(tmp_path):
    said, _, values = written(tmp_path, f"data={rows(tmp_path, PAIR)}", "model=gpt2")
    assert values["model"] == {"path": "gpt2"}
    assert "fine-tune it first (dpo init command=sft" in said.out
    assert (
        "fine-tune it first"
        not in written(
            tmp_path, f"data={tmp_path / 'mine.jsonl'}", f"model={sft_run()}", name="b.yaml"
        )[1]
    )
    missing = dpo("init", f"data={tmp_path / 'mine.jsonl'}", "model=./nowhere", "out=x.yaml")
    assert missing.err.startswith("model: there is no folder ./nowhere")


def test_lengths_and_batches_follow_the_data_and_the_model(tmp_path):
    long = {"prompt": "word " * 600 + "{}", "chosen": "a {}", "rejected": "b {}"}
    file = rows(tmp_path, long, 200)
    _, _, values = written(tmp_path, f"data={file}", "model=gpt2")
    assert values["data"]["max_length"] == 1024  # 3,000 characters
    assert values["data"]["test_fraction"] == 0.1
    assert values["batch"]["size"] == 8
    _, _, values = written(tmp_path, f"data={file}", f"model={sft_run()}", name="b.yaml")
    assert values["data"]["max_length"] == 128  # the model has no more positions


def test_a_fresh_model_and_the_embedded_data(tmp_path):
    words = ("model.fresh.width=32", "data=synthetic", "data.synthetic.num_rows=300")
    _, _, values = written(tmp_path, *words, "command=sft")
    assert values["model"] == {"fresh": {"width": 32}}
    assert values["data"]["synthetic"] == {"num_rows": 300}
    assert read_config(SFTConfig, tmp_path / "recipe.yaml").data.synthetic.num_rows == 300
    refused = dpo("init", *words, f"out={tmp_path / 'x.yaml'}")
    assert refused.err == "DPO starts from a trained model; model.fresh is for dpo sft"
    assert PreferenceConfig
