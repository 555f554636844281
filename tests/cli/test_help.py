"""Help teaches with commands that work, and a shell completes them."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys

import pytest
from typer.main import get_command

from dpo.cli import PANELS, app
from dpo.config_files import read_config
from dpo.experiment.study_config import StudyConfig
from dpo.plan_config import PLANS
from dpo.schemas import SCHEMAS
from dpo.train.recipe import InitConfig
from train.small_runs import dpo


def commands(group=None, before=()):
    """The words of every command there is."""
    for name, command in (group or get_command(app)).commands.items():
        if hasattr(command, "commands"):
            yield from commands(command, (*before, name))
        else:
            yield (*before, name)


def examples(words):
    """The commands in the help of a command."""
    said = dpo(*words, "--help")
    assert said.code == 0
    lines = [re.sub(r"^ {3}(?! )", "", line.rstrip()) for line in said.out_lines]
    return [line for line in lines if line.startswith("dpo ")]


@pytest.mark.parametrize("words", list(commands()), ids=" ".join)
def test_every_command_has_examples_of_itself(words):
    found = examples(words)
    assert found
    for line in found:
        assert line.startswith(f"dpo {' '.join(words)}")


def given():
    """Every example, and the first steps, with the command that it is of."""
    for words in [(), *commands()]:
        yield from examples(words)


@pytest.mark.parametrize("line", dict.fromkeys(given()))
def test_every_example_is_understood(line, tmp_path):
    words = shlex.split(line)[1:]
    group = get_command(app)
    path = []
    while hasattr(group, "commands"):
        path.append(words.pop(0))
        group = group.commands[path[-1]]
    parsed = group.make_context(" ".join(path), list(words), resilient_parsing=False)
    settings = parsed.params.get("settings") or []
    if path[0] == "init":
        assert read_config(InitConfig, overrides=settings)
    elif path[0] == "plan" and settings[0] in PLANS:
        assert read_config(PLANS[settings[0]], overrides=settings[1:])
    elif path[0] in SCHEMAS and "=" in settings[0]:
        assert read_config(SCHEMAS[path[0]], overrides=settings)
    elif path[0] in SCHEMAS:  # on top of a recipe of the user's
        own = [word for word in settings[1:] if not word.startswith("out=")]
        base = ["model=m", "out=o", *(["reward=r"] if path[0] in ("online", "ppo") else [])]
        assert read_config(SCHEMAS[path[0]], overrides=[*base, *own])
    elif path == ["experiment", "run"]:
        assert all(word.split("=")[0] == "data.path" for word in settings[1:])
        assert StudyConfig


def test_the_help_begins_with_the_first_steps_and_lists_commands_by_what_they_are_for():
    said = dpo("--help")
    assert said.out.index("First steps") < said.out.index("dpo init data=prefs.jsonl model=gpt2")
    places = [said.out.index(f"─ {panel} ─") for panel in PANELS]
    assert places == sorted(places)


# -- completion ----------------------------------------------------------------------------------


def completed(shell, *words):
    """What a shell is offered for the last of the words."""
    environment = {**os.environ, "_DPO_COMPLETE": f"complete_{shell}"}
    if shell == "bash":
        environment |= {"COMP_WORDS": "\n".join(words), "COMP_CWORD": str(len(words) - 1)}
    else:
        environment |= {"_TYPER_COMPLETE_ARGS": " ".join(words)}
        environment |= {"_TYPER_COMPLETE_FISH_ACTION": "get-args"}
    done = subprocess.run(
        [sys.executable, "-m", "dpo.cli"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    return done.stdout.split()


@pytest.mark.parametrize(
    ("shell", "words", "offered"),
    [
        ("bash", ("dpo", "tr"), ["train"]),
        ("bash", ("dpo", "train", "loss.be"), ["loss.beta="]),
        ("bash", ("dpo", "train", "optimizer.schedule", "=", "co"), ["cosine", "constant"]),
        ("fish", ("dpo", "train", "optimizer.schedule=co"), 2),
        ("zsh", ("dpo", "train", "loss.name=ip"), ["_arguments", "'*:", ':(("loss.name=ipo"))\'']),
    ],
)
def test_a_shell_completes_commands_keys_and_values(shell, words, offered):
    found = completed(shell, *words)
    if isinstance(offered, int):
        assert found == ["optimizer.schedule=cosine", "optimizer.schedule=constant"]
    else:
        assert found == offered


def test_the_script_that_installs_completion_is_for_this_command():
    done = subprocess.run(
        [sys.executable, "-m", "dpo.cli", "--show-completion", "bash"],
        env={**os.environ, "_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert "complete -o default -F _dpo_completion dpo" in done.stdout
