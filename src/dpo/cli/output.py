"""What goes where: our own lines, tables for a person, one JSON object for a script."""

from __future__ import annotations

import io
import json
import logging
import os
import sys
from contextlib import contextmanager, redirect_stdout
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

log = logging.getLogger("dpo")


def set_up_logging(level: int) -> None:
    """Our own lines on standard error; the libraries' only when they warn."""
    log.handlers = [_log_handler()]
    log.setLevel(level)
    log.propagate = False
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")


class _StandardError(logging.StreamHandler[Any]):
    """Writes to what standard error is by then, not to what it was when logging was set up."""

    def emit(self, record: logging.LogRecord) -> None:
        self.stream = sys.stderr
        super().emit(record)


def _log_handler() -> logging.Handler:
    """Coloured and folded for a person; where nobody watches, a line a message."""
    from rich.console import Console
    from rich.logging import RichHandler

    console = Console(stderr=True)
    if console.is_terminal:
        return RichHandler(
            console=console, show_path=False, show_level=False, log_time_format="[%X]"
        )
    handler = _StandardError()
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


def leave_page(folder: Path, study: Any = None) -> None:
    """Write the page of what has just come to its end; of a study, its configuration too."""
    from dpo.report.page.write import leave_page

    leave_page(folder, study)
