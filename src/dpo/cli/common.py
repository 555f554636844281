"""What all commands share: the application, its options, and how settings are read."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dpo import __version__
from dpo.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Sequence

CONFIGURATION = (
    "\n\n[bold]Configuration.[/bold] An optional YAML file, then key=value on top, dotted for "
    "sections: [cyan]loss.beta=0.3 batch.size=16[/cyan]. Unknown keys are errors. "
    "[cyan]dpo config COMMAND[/cyan] lists every key."
)

app = typer.Typer(
    name="dpo",
    no_args_is_help=True,
    add_completion=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    help="Direct Preference Optimization: train on preferences, compare, explain.",
)

Settings = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[CONFIG] [KEY=VALUE]...", help="A YAML file, then settings.", show_default=False
    ),
]
TrustRemoteCode = Annotated[
    bool,
    typer.Option("--trust-remote-code", help="Run code that comes with a model from the hub."),
]


def _version(asked: bool) -> None:
    if asked:
        typer.echo(__version__)
        raise typer.Exit


DISTRIBUTED = ("sft", "train", "reward")
"""The commands that torchrun or accelerate may start several times over."""


@app.callback()
def options(
    context: typer.Context,
    debug: Annotated[  # taken out of the words by main(), so that it may stand anywhere
        bool, typer.Option("--debug", help="Show tracebacks of errors.")
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Warnings and errors only.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Say the version.")
    ] = False,
) -> None:
    """Set up what all commands share."""
    command = context.invoked_subcommand
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and command not in DISTRIBUTED:
        raise InputError(f"dpo {command} is one process; start it without torchrun or accelerate.")
    _set_up_logging(logging.WARNING if quiet else logging.INFO)


def _set_up_logging(level: int) -> None:
    """Our own lines on standard error; the libraries' only when they warn."""
    from rich.console import Console
    from rich.logging import RichHandler

    handler = RichHandler(
        console=Console(stderr=True), show_path=False, show_level=False, log_time_format="[%X]"
    )
    log = logging.getLogger("dpo")
    log.handlers = [handler]
    log.setLevel(level)
    log.propagate = False
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")


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
