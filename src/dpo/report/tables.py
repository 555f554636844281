"""Tables as lines of text: what pages print as Markdown, and the report as it likes.

The first line of a table is its head. Numbers are means over seeds with Student's interval.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence, Sized
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from dpo.atomic import write_json
from dpo.core.stats import mean_interval
from dpo.data.files import printable

Cells = list[str]
"""A line of a table."""

Tables = dict[str, list[Cells]]
"""A study's tables by name."""


def spread(values: Iterable[float | None], digits: int = 2, *, signed: bool = False) -> str:
    """Mean and Student's interval; the number alone of one seed; empty where it does not apply.

    >>> spread([1.0, 2.0, 3.0])
    '2.00 [-0.48, 4.48]'
    """
    known = [value for value in values if value is not None]
    if not known:
        return ""
    sign = "+" if signed else ""
    centre = f"{sum(known) / len(known):{sign}.{digits}f}"
    if len(known) < 2:
        return centre
    low, high = mean_interval(known)
    return f"{centre} [{low:{sign}.{digits}f}, {high:{sign}.{digits}f}]"


def seeds_in_words(seeds: Sized) -> str:
    """How many there are."""
    return "one seed" if len(seeds) == 1 else f"{len(seeds)} seeds"


def markdown(table: Sequence[Sequence[str]]) -> str:
    """A table whose first line is its head."""
    head, *rows = table
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def columns(table: Sequence[Sequence[str]], names: Sequence[str]) -> list[Cells]:
    """Some columns of a table, by the names in its head."""
    places = [table[0].index(name) for name in names]
    return [[line[place] for place in places] for line in table]


def on_screen(
    title: str, table: Sequence[Sequence[str]], *, num_names: int = 1, note: str = ""
) -> Table:
    """The same for a terminal: where it is narrow, what does not fit goes to the next line. The
    first columns are names, and are text, never markup or control sequences.
    """
    head, *rows = table
    shown = Table(
        title=Text(title),
        caption=Text(note),
        caption_justify="left",
        box=SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    for number, name in enumerate(head):
        shown.add_column(name, justify="left" if number < num_names else "right", overflow="fold")
    for row in rows:
        shown.add_row(*(Text(_lines(cell)) for cell in row))
    return shown


def _lines(cell: str) -> str:
    return "\n".join(printable(line, limit=1000) for line in cell.split("\n"))


def save_tables(folder: Path, tables: Mapping[str, Sequence[Sequence[str]]]) -> None:
    """tables.json in a study's folder: the tables of its page, for the report to print.

    Raises:
        StorageError: it cannot be written.
    """
    write_json(folder / "tables.json", dict(tables))
