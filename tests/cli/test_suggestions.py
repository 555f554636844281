"""What was meant by a word that is not known: commands, keys, values, files."""

from __future__ import annotations

from pathlib import Path

import pytest

from dpo.errors import did_you_mean, did_you_mean_path
from train.small_runs import dpo

RUN = ("model=./x", "out=./y")


@pytest.mark.parametrize(
    ("words", "meant"),
    [
        (("trian",), "Did you mean 'train'?"),
        (("data", "chekc"), "Did you mean 'check'?"),
        (("experiment", "fronteer"), "Did you mean 'frontier'?"),
        (("sft", "--trust-remote-cod"), "--trust-remote-code"),
        (("config", "trian"), "; did you mean train?"),
        (("losses", "simp"), "did you mean simpo"),
        (("train", "loss.name=simp", *RUN), "did you mean simpo"),
        (("train", "lerning_rate=1", *RUN), "did you mean optimizer.learning_rate?"),
        (("train", "optimizer.schedule=cosin", *RUN), "(got 'cosin'); did you mean cosine?"),
        (("train", "precision=BF16", *RUN), "(got 'BF16'); did you mean bf16?"),
        (("ppo", "critic=sepparate", "reward=x", *RUN), "did you mean separate?"),
        (("evaluate", "judges=[sentence_bart]", "models.a=x", "out=y"), "mean sentence_bert?"),
        (("train", "lr=1", *RUN), "lr: unknown key; did you mean optimizer.learning_rate?"),
        (("sft", "num_train_epochs=3", *RUN), "did you mean epochs?"),
        (("train", "--beta", "0.3", *RUN), "--beta: a setting is key=value, without dashes: loss"),
        (("train", "--learning-rate=1", *RUN), "without dashes: optimizer.learning_rate=..."),
        (("theory", "V05-simpo-targt"), "; did you mean V"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_a_word_that_is_nearly_known_is_answered_with_the_known_one(words, meant):
    said = dpo(*words)
    assert said.code == 2
    assert meant in said.err


def test_what_is_near_to_nothing_gets_no_guess():
    said = dpo("train", "precision=quick", *RUN)
    assert said.err.endswith("(got 'quick')")


def test_keys_that_a_command_does_not_have_are_not_suggested():
    assert dpo("sft", "loss_type=ipo", *RUN).err == "loss_type: unknown key"
    assert dpo("reward", "beta=0.1", *RUN).err == "beta: unknown key"


def test_a_template_that_is_nearly_known():
    said = dpo("sft", "model.fresh={}", "data.template=alpacca", "out=./y", "--dry-run")
    assert said.code == 2
    assert said.err.endswith("in it exactly once; did you mean alpaca?")


def test_files_and_folders_that_are_nearly_there(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prefs.jsonl").write_text("")
    (tmp_path / "recipe.yaml").write_text("")
    (tmp_path / "model").mkdir()
    for words, meant in (
        (("train", "recipy.yaml"), "There is no configuration file recipy.yaml; did you mean"),
        (("data", "check", "./perfs.jsonl"), "; did you mean prefs.jsonl?"),
        (("train", "model=./modle", "out=y"), "; did you mean model?"),
    ):
        said = dpo(*words)
        assert said.code == 2
        assert meant in said.err
        assert said.err.endswith("?")


def test_a_setting_without_its_value_is_not_taken_for_a_file():
    assert (
        dpo("train", "loss.beta", "0.3").err == "loss.beta: expected key=value, e.g. loss.beta=..."
    )
    late = dpo("train", "model=x", "recipe.yaml").err
    assert late.endswith("e.g. loss.beta=0.1; a configuration file comes first.")


def test_the_ends_of_the_sentences(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert did_you_mean("cosin", ["linear", "cosine"]) == "; did you mean cosine?"
    assert did_you_mean("x", ["linear", "cosine"]) == ""
    Path("rows.jsonl").touch()
    assert did_you_mean_path("other.jsonl") == ""  # alike in nothing but their ending
    assert did_you_mean_path("no/such/folder/at/all") == ""
    assert did_you_mean_path("nul\0l") == ""
