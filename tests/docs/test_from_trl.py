"""The page for readers who come from TRL names what both programs have, with their defaults."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import re
from pathlib import Path

import pytest

from dpo.config import PreferenceConfig
from dpo.config_files import ELSEWHERE, known_keys, read_config
from dpo.loss_config import LOSS_CONFIGS, OPTION_KEYS

trl = pytest.importorskip("trl", reason="needs TRL, to compare with (pip install trl)")
transformers = pytest.importorskip("transformers")

PAGE = Path(__file__).parents[2] / "docs" / "tutorials" / "from-trl.md"
TEXT = PAGE.read_text(encoding="utf-8")
THEIRS = {field.name: field for field in dataclasses.fields(trl.DPOConfig)}
GENERAL = {field.name for field in dataclasses.fields(transformers.TrainingArguments)}
OURS = {*known_keys(PreferenceConfig), *OPTION_KEYS, "loss.mix"}


def table(title: str) -> list[list[str]]:
    """The cells of the table under a heading, without their backticks."""
    section = TEXT.split(f"## {title}\n")[1].split("\n## ")[0]
    lines = re.findall(r"^\| (`.*) \|$", section, flags=re.MULTILINE)
    return [[cell.strip().strip("`") for cell in line.split("|")] for line in lines]


def default_of(field: dataclasses.Field) -> str:
    factory = field.default_factory
    value = field.default if factory is dataclasses.MISSING else factory()
    return str(getattr(value, "value", value))


TABLES = ("Keys of DPOConfig itself", "Keys that DPOConfig has from TrainingArguments")


@pytest.mark.parametrize("title", TABLES)
def test_their_keys_have_these_defaults(title):
    rows = table(title)
    assert len(rows) > 20
    assert {row[0]: row[1] for row in rows} == {row[0]: default_of(THEIRS[row[0]]) for row in rows}


@pytest.mark.parametrize("title", TABLES)
def test_our_keys_exist_and_have_these_defaults(title):
    config = read_config(
        PreferenceConfig, None, ["model=a", "out=b", "moving_reference.mix=0.6", "loss.name=dpo"]
    )
    discopop = LOSS_CONFIGS["discopop"]()
    for _, _, key, default, *_ in table(title):
        assert not key or key in OURS, key
        if not default or default == "required":
            continue
        value = discopop if key == "loss.tau" else config
        for part in key.split(".")[1:] if key == "loss.tau" else key.split("."):
            value = getattr(value, part)
        assert str(value) == default, key


def test_who_writes_their_key_is_told_ours():
    ours = {row[0]: row[2] for title in TABLES for row in table(title)}
    ours |= {row[0]: row[1] for row in table("The trainer's arguments")}
    for theirs in ELSEWHERE.keys() & ours.keys():
        assert ours[theirs].startswith(ELSEWHERE[theirs]), theirs
    assert len(ELSEWHERE.keys() & ours.keys()) > 15


def test_every_key_that_dpoconfig_adds_is_there():
    assert {row[0] for row in table(TABLES[0])} == THEIRS.keys() - GENERAL
    assert {row[0] for row in table(TABLES[1])} <= THEIRS.keys() & GENERAL


def test_every_argument_of_the_trainer_is_there():
    arguments = [*inspect.signature(trl.DPOTrainer.__init__).parameters][1:]
    rows = table("The trainer's arguments")
    assert sorted(row[0] for row in rows) == sorted(arguments)
    assert {row[1] for row in rows} - {""} <= {*OURS, "reference.path"}


def test_every_name_of_a_loss_is_there():
    said = THEIRS["loss_type"].metadata["help"]
    names = re.findall(r"`'(\w+)'`", said)
    rows = table("Names of losses")
    assert sorted(row[0] for row in rows) == sorted(["loss_type", *names])
    assert {row[1] for row in rows} - {"loss.name"} <= LOSS_CONFIGS.keys()


def test_the_example_gives_dpoconfig_keys_that_it_has():
    example = re.search(r"```python\n(.*?)```", TEXT, flags=re.DOTALL)
    assert example is not None
    calls = [n for n in ast.walk(ast.parse(example[1])) if isinstance(n, ast.Call)]
    given = {call.func.id: call for call in calls if isinstance(call.func, ast.Name)}
    assert {key.arg for key in given["DPOConfig"].keywords} <= THEIRS.keys()
    assert {key.arg for key in given["DPOTrainer"].keywords} <= set(
        inspect.signature(trl.DPOTrainer.__init__).parameters
    )
