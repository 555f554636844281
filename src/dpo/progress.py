"""Progress on long work, on standard error, only where a person is watching and wants it."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)


@contextmanager
def counting(what: str, total: int, *, done: int = 0, detail: str = "") -> Iterator[Progression]:
    """A bar with count, time passed and time left.

    Args:
        what: the work, e.g. "Generating".
        total: how many pieces there are.
        done: how many were finished before.
        detail: a template for numbers of its own, e.g. "loss {loss:.3f}".
    """
    columns = (
        TextColumn("[bold]{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[detail]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    console = Console(stderr=True)
    first = os.environ.get("RANK", "0") == "0"  # of the processes that a launcher started
    quiet = logging.getLogger("dpo").level > logging.INFO
    hidden = quiet or not (console.is_terminal and first)  # a log file is no place for a bar
    with Progress(*columns, console=console, transient=True, disable=hidden) as bar:
        task = bar.add_task(what, total=total, completed=done, detail="")

        def advance(pieces: int, **numbers: Any) -> None:
            bar.update(task, advance=pieces, detail=detail.format(**numbers))

        yield advance


Progression = Callable[..., None]
"""Called with the number of pieces that were finished, and with the numbers of the detail."""
