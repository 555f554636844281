"""What all commands share: the application, its options, and how settings are read."""

from __future__ import annotations

import io
import json
import logging
import os
import sys
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dpo import __version__
from dpo.cli.completion import complete_setting
from dpo.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

FIRST_STEPS = (
    ("dpo demo", "The whole method in minutes, without a network."),
    ("dpo data check prefs.jsonl", "Is the data what you think it is?"),
    ("dpo init data=prefs.jsonl model=gpt2", "A commented recipe for your data and model."),
    ("dpo train recipe.yaml --dry-run", "What it would do: rows, tokens, steps."),
    ("dpo train recipe.yaml", "Train."),
    ("dpo evaluate models.dpo=runs/prefs-dpo data=prefs.jsonl out=runs/wins", "Is it better?"),
)

CONFIGURATION = (
    "[bold]Configuration.[/bold] An optional YAML file, then key=value on top, dotted for "
    "sections: [cyan]loss.beta=0.3 batch.size=16[/cyan]. Unknown keys are errors. "
    "[cyan]dpo config COMMAND[/cyan] lists every key."
)


def teach(what: str, *examples: tuple[str, str], more: str = "", title: str = "Examples") -> str:
    """The help of a command: what it does, commands to copy with what they are for, and more.

    A blank line is a paragraph's end, a single one is kept.
    """
    shown = [f"  [cyan]{_plain(command)}[/cyan]\n      {_plain(why)}" for command, why in examples]
    return "\n\n".join([what, f"[bold]{title}[/bold]", "\n".join(shown), more]).rstrip()


def _plain(text: str) -> str:
    """Text whose brackets are no markup."""
    return text.replace("[", r"\[")


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

log = logging.getLogger("dpo")


def _version(asked: bool) -> None:
    if asked:
        typer.echo(__version__)
        raise typer.Exit


DISTRIBUTED = ("sft", "train", "reward")
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
    _set_up_logging(logging.WARNING if quiet else logging.INFO)


def refuse_launcher(what: str) -> None:
    """Refuse several processes for what one does alone.

    Raises:
        InputError: a launcher started more than this one.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise InputError(f"{what} is one process; start it without torchrun or accelerate.")


def _set_up_logging(level: int) -> None:
    """Our own lines on standard error; the libraries' only when they warn."""
    log.handlers = [_log_handler()]
    log.setLevel(level)
    log.propagate = False
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")


def _log_handler() -> logging.Handler:
    """Coloured and folded for a person; where nobody watches, a line a message."""
    from rich.console import Console
    from rich.logging import RichHandler

    console = Console(stderr=True)
    if console.is_terminal:
        return RichHandler(
            console=console, show_path=False, show_level=False, log_time_format="[%X]"
        )
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("[%(asctime)s] %(message)s", "%X"))
    return handler


def is_quiet() -> bool:
    """Whether `--quiet` was given."""
    return log.level > logging.INFO


@contextmanager
def on_screen(*, as_json: bool) -> Iterator[None]:
    """What is printed inside is for a person: with `--quiet` nobody reads it, and with `--json` it
    leaves standard output to the result.
    """
    with redirect_stdout(io.StringIO() if is_quiet() else sys.stderr if as_json else sys.stdout):
        yield


def print_json(result: dict[str, Any]) -> None:
    """One object on one line."""
    from dpo.atomic import jsonable

    typer.echo(json.dumps(jsonable(result)))


def finish(result_of: Callable[[], dict[str, Any]], *, as_json: bool) -> None:
    """Give a script its object; with `--quiet`, say the warnings that the screen would have had."""
    if not (as_json or is_quiet()):
        return
    from dpo.report.results import warnings_of

    result = result_of()
    if as_json:
        print_json(result)
    if is_quiet():
        for line in warnings_of(result):
            log.warning("%s", line)


def quiet_transformers() -> None:
    """Our progress bars replace those of the library."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()


def _split_settings(settings: Sequence[str] | None) -> tuple[Path | None, list[str]]:
    """The configuration file, if the first word is one, and the settings."""
    words = list(settings or [])
    if words and "=" not in words[0]:
        return Path(words[0]), words[1:]
    return None, words


def read(schema: type[Any], settings: Sequence[str] | None) -> Any:
    from dpo.config import read_config

    file, overrides = _split_settings(settings)
    return read_config(schema, file, overrides)


def leave_page(folder: Path, study: Any = None) -> None:
    """Write the page of what has just come to its end; of a study, its configuration too."""
    from dpo.report.page.write import leave_page

    leave_page(folder, study)
