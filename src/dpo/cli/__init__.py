"""The command line: parse, then import; what is heavy is loaded only by what needs it."""

from __future__ import annotations

import sys
import traceback

import typer

from dpo.cli import data, evaluation, experiments, explaining, init, planning, training
from dpo.cli.common import DATA, EXPLAIN, MEASURE, TRAIN, TeachingCommand, app
from dpo.errors import DPOError, StorageError

__all__ = ["GROUPS", "PANELS", "app", "main"]

GROUPS = (training, planning, evaluation, experiments, data, init, explaining)
"""Each adds its commands to the application when it is imported."""

PANELS = (DATA, TRAIN, MEASURE, EXPLAIN)
app.registered_commands.sort(key=lambda command: PANELS.index(str(command.rich_help_panel)))
for command in app.registered_commands:
    command.cls = TeachingCommand


ANYWHERE = ("--debug", "--quiet", "-q")
"""Options that may stand before a command, behind it or among its words."""


def main() -> None:
    """Run the command; a user's mistake is one sentence on standard error, with its exit code."""
    debug = "--debug" in sys.argv
    try:
        # False before True: they come first, and the other words keep their order.
        words = sorted(sys.argv[1:], key=lambda word: word not in ANYWHERE)
        app(args=words, prog_name="dpo")
    except DPOError as error:
        _leave(error, debug=debug)
    except OSError as error:
        if error.filename is None:  # no file, so nothing that the user can see to
            raise
        told = StorageError(f"{error.filename}: {error.strerror}.")
        _leave(told.with_traceback(error.__traceback__), debug=debug)


def _leave(error: DPOError, *, debug: bool) -> None:
    """End the process with an error's message and code."""
    from dpo.data.files import printable

    if debug:
        traceback.print_exception(error)
    for line in str(error).split("\n"):  # it may quote a file, which must not drive the terminal
        typer.echo(printable(line, limit=len(line)), err=True)
    raise SystemExit(error.exit_code) from None
