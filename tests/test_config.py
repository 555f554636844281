"""Every wrong setting is told at once, by its dotted path, before anything runs."""

import math
import re

import pytest
from pydantic import ValidationError

from dpo.config import PreferenceConfig, RewardConfig, SFTConfig
from dpo.config_files import known_keys, read_config, read_yaml, validate
from dpo.errors import InputError
from dpo.evaluation_config import EvaluateConfig

SFT = ("model=gpt2", "out=runs/x")


def train(*words, file=None):
    return read_config(PreferenceConfig, file, [*SFT, *words])


def problem(*words, schema=PreferenceConfig, start=SFT):
    with pytest.raises(InputError) as caught:
        read_config(schema, None, [*start, *words])
    assert caught.value.exit_code == 2
    return str(caught.value)


def test_shorthands_name_a_path():
    config = train("data=prefs.jsonl")
    assert (config.model.path, config.data.path) == ("gpt2", "prefs.jsonl")
    assert train("data=[a.jsonl, b.jsonl]").data.path == ["a.jsonl", "b.jsonl"]


def test_a_shorthand_and_a_dotted_key_of_the_same_section_go_together():
    config = train("model.revision=v2", "data=prefs.jsonl", "data.max_length=64")
    assert (config.model.path, config.model.revision) == ("gpt2", "v2")
    assert (config.data.path, config.data.max_length) == ("prefs.jsonl", 64)


def test_the_last_of_two_settings_counts():
    assert train("loss.beta=0.1", "loss.beta=0.2").loss.beta == 0.2


@pytest.mark.parametrize(("text", "value"), [("epoch", "epoch"), ("7", 7)])
def test_intervals_are_epochs_or_steps(text, value):
    config = train(f"save_every={text}", f"evaluation.every={text}")
    assert (config.save_every, config.evaluation.every) == (value, value)


@pytest.mark.parametrize("text", ["1e-6", "1E-6", "0.000001", "1.0e-6"])
def test_small_numbers_are_read_right_however_they_are_written(text, tmp_path):
    assert train(f"optimizer.learning_rate={text}").optimizer.learning_rate == 1e-6
    file = tmp_path / "c.yaml"
    file.write_text(f"optimizer:\n  learning_rate: {text}\n")
    assert train(file=file).optimizer.learning_rate == 1e-6


@pytest.mark.parametrize(
    ("schema", "rate"), [(SFTConfig, 2e-5), (PreferenceConfig, 5e-6), (RewardConfig, 1e-5)]
)
def test_a_commands_own_learning_rate_stays_when_another_key_of_the_optimizer_is_set(schema, rate):
    for words in ([], ["optimizer.schedule=cosine"]):
        config = read_config(schema, None, ["model=gpt2", "out=runs/x", *words])
        assert config.optimizer.learning_rate == rate


WRONG = {
    "loss.beta": ["0", "-1", "nan", ".nan", "inf", "high"],
    "loss.label_smoothing": ["0.5", "-0.1", ".nan", "nan"],
    "loss.name": ["ippo", "5", "null", "[dpo]"],
    "optimizer.learning_rate": ["0", "-1e-6", ".nan", ".inf"],
    "optimizer.warmup": ["1.5", "-0.1", ".nan", ".inf"],
    "optimizer.weight_decay": ["-1", ".nan"],
    "optimizer.schedule": ["stairs"],
    "optimizer.max_grad_norm": ["0", ".inf"],
    "optimizer.beta2": ["1", ".nan"],
    "batch.size": ["0", "1.5", "many"],
    "batch.max_tokens": ["0"],
    "data.test_fraction": ["0", "1", ".nan"],
    "data.max_length": ["1"],
    "data.max_dropped": ["1.1", "-0.1", ".nan"],
    "data.synthetic.num_facts": ["0", "81"],
    "epochs": ["0", ".nan", ".inf"],
    "max_steps": ["0"],
    "seed": ["-1", "9223372036854775808"],
    "precision": ["fp16"],
    "dropout": ["perhaps"],
    "save_every": ["0", "never", "true"],
    "evaluation.every": ["0", "1.5"],
    "data.path": ["5", "[]", "[1]"],
    "moving_reference.mix": ["0", "1.5", ".nan"],
    "moving_reference.every": ["0", "1.5"],
    "evaluation.kl_prompts": ["-1"],
    "evaluation.sample_temperature": ["-0.1", ".nan"],
}


@pytest.mark.parametrize(
    ("key", "value"), [(key, value) for key, values in WRONG.items() for value in values]
)
def test_a_wrong_value_is_refused_by_its_dotted_path_with_what_came(key, value):
    message = problem(f"{key}={value}")
    assert message.startswith(key)
    assert "got" in message
    assert "\n" not in message


def test_all_wrong_values_are_told_at_once():
    # Without a right name nothing is known about the other options of the loss.
    left_out = ("max_steps", "loss.name")
    words = [f"{key}={values[0]}" for key, values in WRONG.items() if key not in left_out]
    message = problem(*words, "lerning_rate=1", "optimizer.lr=3")
    head, *lines = message.split("\n")
    assert head == f"{len(words) + 2} problems in the configuration:"
    told = {line.strip().partition(":")[0] for line in lines}
    assert {word.partition("=")[0] for word in words} <= told
    assert {"lerning_rate", "optimizer.lr"} <= told


@pytest.mark.parametrize(
    ("word", "meant"),
    [
        ("optimizer.learning_rat=1", "optimizer.learning_rate"),
        ("learning_rate=1", "optimizer.learning_rate"),
        ("beta=0.1", "loss.beta"),
        ("batch.sizes=3", "batch.size"),
        ("evaluation.max_row=3", "evaluation.max_rows"),
        ("data.test_fractoin=0.1", "data.test_fraction"),
        ("sede=1", "seed"),
        ("moving_reference.evry=1", "moving_reference.every"),
    ],
)
def test_an_unknown_key_is_an_error_that_guesses_what_was_meant(word, meant):
    key = word.partition("=")[0]
    assert problem(word) == f"{key}: unknown key; did you mean {meant}?"


def test_an_unknown_key_like_no_other_is_an_error_without_a_guess():
    assert problem("zzzzqqqq=1") == "zzzzqqqq: unknown key"


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["data=x.jsonl", "data.synthetic.num_rows=5"], "data.synthetic has no effect"),
        (["data=x.jsonl", "data.test=y.jsonl", "data.test_fraction=0.2"], "test_fraction and"),
        (["data=x.jsonl", "data.test=y.jsonl", "data.split_seed=1"], "have no effect when"),
        (["data=synthetic", "data.test=y.jsonl"], "data.test has no effect"),
        (["data=synthetic", "data.split=train"], "data.split has no effect"),
        (["data=synthetic", "data.revision=v1"], "data.revision has no effect"),
        (["data.columns={prompt: q}"], "data.columns has no effect"),
        (["epochs=2", "max_steps=10"], "either epochs or max_steps, not both"),
        (["model.fresh.width=8"], "not both"),
        (["model=null", "model.fresh.width=8"], "model.fresh is for dpo sft"),
        (["reference.fresh.width=8"], "model.fresh is for dpo sft"),
    ],
)
def test_an_option_without_effect_is_an_error(words, says):
    assert says in problem(*words)


def test_a_fresh_model_takes_no_tokenizer_of_another():
    start = ("model.fresh={}", "out=x")
    assert "no effect with model.fresh" in problem(
        "model.tokenizer=gpt2", schema=SFTConfig, start=start
    )


@pytest.mark.parametrize("key", ["max_length", "max_dropped"])
def test_training_options_have_no_effect_in_an_evaluation(key):
    start = ("models.a=runs/a", "out=x")
    message = problem(
        f"data.{key}=1" if key == "max_dropped" else "data.max_length=9",
        schema=EvaluateConfig,
        start=start,
    )
    assert message == f"data.{key} has no effect in an evaluation"


@pytest.mark.parametrize(
    ("words", "what"),
    [
        (("evaluation.num_samples=0", "evaluation.sample_temperature=0.3"), "num_samples"),
        (("evaluation.kl_prompts=0", "evaluation.kl_samples=4"), "kl_prompts"),
    ],
)
def test_settings_of_samples_that_are_not_drawn_have_no_effect(words, what):
    start = ("model=runs/sft", "out=x")
    message = problem(*words, schema=PreferenceConfig, start=start)
    assert f"has no effect when {what} is 0" in message
    assert read_config(PreferenceConfig, None, [*start, words[0]])


def test_sft_takes_no_options_of_dpo():
    assert problem("loss.beta=0.1", schema=SFTConfig).startswith("loss: unknown key")


@pytest.mark.parametrize(("missing", "example"), [("model", "model=gpt2"), ("out", "out=runs/one")])
def test_what_is_required_is_asked_for(missing, example):
    words = [word for word in SFT if not word.startswith(missing)]
    assert problem(start=words) == f"{missing}: is required, e.g. {example}"


@pytest.mark.parametrize(
    "name", ["../x", "a/b", ".hidden", "..", "a\\b", "", "a\nb", "/etc", "[red]", "a\x1b[31m", "~"]
)
def test_a_models_name_cannot_leave_its_folder(name):
    with pytest.raises(InputError, match="must not begin with"):
        validate(EvaluateConfig, {"models": {name: "runs/a"}, "out": "x"})


@pytest.mark.parametrize("name", ["dpo", "beta 0.1", "v1.2_b-3+", "\u03b2"])
def test_a_plain_name_is_accepted(name):
    validate(EvaluateConfig, {"models": {name: "runs/a"}, "out": "x"})


def test_an_evaluation_needs_models_and_different_temperatures():
    start = ("models.a=runs/a", "out=x")
    assert "name at least one" in problem("models={}", schema=EvaluateConfig, start=("out=x",))
    message = problem("temperatures=[0.5, 0.50]", schema=EvaluateConfig, start=start)
    assert message == "temperatures: expected different ones, got [0.5, 0.5]"
    assert problem("temperatures=[]", schema=EvaluateConfig, start=start).startswith("temperatures")
    assert problem("max_prompts=1", schema=EvaluateConfig, start=start).startswith("max_prompts")


@pytest.mark.parametrize("word", ["data", "--beta", "=3", " =3", ""])
def test_a_word_that_is_no_setting_says_what_is_expected(word):
    assert "expected key=value" in problem(word)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(InputError, match=r"There is no configuration file .*none\.yaml"):
        train(file=tmp_path / "none.yaml")


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"- a\n- b\n", "expected keys and values"),
        (b"just text", "expected keys and values"),
        (b"1: 2", "expected keys and values"),
        (b"a: [1", "not valid YAML"),
        (b"a: b: c", "not valid YAML"),
        (b"\tkey: 1", "not valid YAML"),
        (b"a: \xff\xfe", "cannot be read as a UTF-8 text file"),
        (b"a: \x00", "not valid YAML"),
    ],
)
def test_a_broken_file_is_named_with_the_reason(tmp_path, content, says):
    file = tmp_path / "c.yaml"
    file.write_bytes(content)
    with pytest.raises(InputError) as caught:
        train(file=file)
    assert str(caught.value).startswith(f"{file}: {says}")


def test_a_folder_is_no_configuration_file(tmp_path):
    with pytest.raises(InputError, match="is a folder, expected a YAML file; settings are key=val"):
        train(file=tmp_path)


@pytest.mark.parametrize("content", ["", "# nothing\n", "---\n"])
def test_an_empty_file_sets_nothing(tmp_path, content):
    file = tmp_path / "c.yaml"
    file.write_text(content)
    assert train(file=file) == train()


@pytest.mark.parametrize(
    "tag",
    [
        "!!python/object/apply:os.mkdir ['{place}']",
        "!!python/object/new:os.mkdir ['{place}']",
        "!!python/name:os.system",
    ],
)
def test_a_file_that_asks_to_run_code_is_refused_and_runs_none(tmp_path, tag):
    place, file = tmp_path / "made", tmp_path / "c.yaml"
    file.write_text(f"out: {tag.format(place=place)}\n")
    with pytest.raises(InputError, match="not valid YAML"):
        read_yaml(file)
    train(f"model.revision={tag.format(place=place)}")  # plain text there
    assert not place.exists()


def test_words_override_the_file_and_the_file_is_named_in_errors(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("loss: {beta: 0.3}\nbatch:\n  size: 4\nevaluation:\n")
    config = train("loss.beta=0.4", "evaluation.every=7", file=file)
    assert (config.loss.beta, config.batch.size, config.evaluation.every) == (0.4, 4, 7)
    file.write_text("loss: {beta: -1}\n")
    with pytest.raises(InputError, match=rf"^{re.escape(str(file))}: loss\.beta: "):
        train(file=file)


def test_a_configuration_cannot_be_changed_afterwards():
    config = train()
    with pytest.raises(ValidationError, match="frozen"):
        config.seed = 3
    with pytest.raises(ValidationError, match="frozen"):
        config.loss.beta = 3.0


def test_known_keys_are_the_dotted_leaves_and_sections():
    keys = known_keys(PreferenceConfig)
    assert {"loss", "loss.beta", "model.fresh.width", "reference.path", "data.synthetic.seed"} <= {
        *keys
    }
    assert "moving_reference.mix" in keys
    assert len(keys) == len(set(keys))


def test_known_keys_of_the_loss_are_those_of_dpo():
    """Other losses have pages of their own (`dpo losses NAME`)."""
    keys = {key for key in known_keys(PreferenceConfig) if key.startswith("loss.")}
    assert keys == {"loss.name", "loss.beta", "loss.label_smoothing"}


@pytest.mark.parametrize("schema", [SFTConfig, PreferenceConfig, EvaluateConfig])
def test_a_configuration_survives_its_own_json(schema):
    start = {"models": {"a": "b"}} if schema is EvaluateConfig else {"model": {"path": "gpt2"}}
    config = validate(schema, {**start, "out": "x"})
    again = validate(schema, config.model_dump(mode="json", exclude_unset=True))
    assert again == config


def test_defaults_are_finite_and_positive():
    config = train()
    assert math.isfinite(config.optimizer.learning_rate)
    assert config.loss.beta > 0
    assert config.dropout is False
    assert config.loss.label_smoothing == 0
