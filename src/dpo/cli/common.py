"""What all commands share: the application, its options, and how settings are read."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dpo import __version__
from dpo.cli.completion import complete_setting
from dpo.cli.output import set_up_logging
from dpo.cli.teaching import FIRST_STEPS, teach
from dpo.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Sequence

app = typer.Typer(
    name="dpo",
    no_args_is_help=True,
    add_completion=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    help=teach(
        "Direct Preference Optimization: train on preferences, compare, explain.",
        *FIRST_STEPS,
        title="First steps",
        more="[cyan]dpo COMMAND --help[/cyan] has examples. --debug and --quiet go with every "
        "command, anywhere among its words.",
    ),
)
DATA, TRAIN, MEASURE, EXPLAIN = "Data and recipes", "Train", "Measure", "Explain"
"""What the help lists commands under, in this order."""

Settings = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[CONFIG] [KEY=VALUE]...",
        help="A YAML file, then settings.",
        show_default=False,
        autocompletion=complete_setting,
    ),
]
TrustRemoteCode = Annotated[
    bool,
    typer.Option("--trust-remote-code", help="Run code that comes with a model from the hub."),
]
AsJSON = Annotated[
    bool,
    typer.Option(
        "--json",
        help="The result as one JSON object on standard output, all else on standard error.",
    ),
]


def _version(asked: bool) -> None:
    if asked:
        typer.echo(__version__)
        raise typer.Exit


DISTRIBUTED = ("sft", "train", "reward", "online", "ppo")
"""The commands that torchrun or accelerate may start several times over."""


@app.callback()
def options(
    context: typer.Context,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks of errors.")] = False,
    quiet: Annotated[
        bool,
        typer.Option("--quiet", "-q", help="Warnings and errors only: no progress, no tables."),
    ] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Say the version.")
    ] = False,
) -> None:
    """Set up what all commands share."""
    command = context.invoked_subcommand
    if command not in DISTRIBUTED:
        refuse_launcher(f"dpo {command}")
    set_up_logging(logging.WARNING if quiet else logging.INFO)


def refuse_launcher(what: str) -> None:
    """Refuse several processes for what one does alone.

    Raises:
        InputError: a launcher started more than this one.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise InputError(f"{what} is one process; start it without torchrun or accelerate.")


def _split_settings(settings: Sequence[str] | None) -> tuple[Path | None, list[str]]:
    """The configuration file, if the first word is one, and the settings."""
    words = list(settings or [])
    if words and "=" not in words[0]:
        return Path(words[0]), words[1:]
    return None, words


def read(schema: type[Any], settings: Sequence[str] | None) -> Any:
    from dpo.config_files import read_config

    file, overrides = _split_settings(settings)
    return read_config(schema, file, overrides)
