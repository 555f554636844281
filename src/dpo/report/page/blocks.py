"""What a page is made of, as plain values: the template knows how each kind of block looks."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from dpo.report.page.samples import Samples


@dataclass(frozen=True, slots=True)
class Link:
    """A cell of a table that leads to another page; `href` is relative to this one."""

    text: str
    href: str


Cell = str | Link

LONG = 40
"""Lines of a table, above which it is folded up."""


@dataclass(frozen=True, slots=True)
class Prose:
    """Paragraphs."""

    kind: ClassVar[str] = "prose"
    paragraphs: Sequence[str]


@dataclass(frozen=True, slots=True)
class Facts:
    """Names with their values."""

    kind: ClassVar[str] = "facts"
    pairs: Sequence[tuple[str, str]]


@dataclass(frozen=True, slots=True)
class Table:
    """Cells under a head."""

    kind: ClassVar[str] = "table"
    head: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    caption: str = ""
    note: str = ""

    @property
    def is_long(self) -> bool:
        """Whether it is folded up at first."""
        return len(self.rows) > LONG

    @property
    def alignments(self) -> list[str]:
        """For each column "number", set to the right, where all its cells begin as one; else
        "text".
        """
        columns = [[row[i] for row in self.rows if i < len(row)] for i in range(len(self.head))]
        return ["number" if all(map(_is_number, column)) else "text" for column in columns]


def _is_number(cell: Cell) -> bool:
    """`-1.5 [-2, -1]`, `[0, 1]`, `p < 0.001`, `12%`, or nothing."""
    return isinstance(cell, str) and _NUMBER.match(cell) is not None


_NUMBER = re.compile(r"$|[-+−\[(]?\.?\d|p [=<]|nan|inf|[-–]$")


@dataclass(frozen=True, slots=True)
class Figure:
    """An image in the page, `source` a data: address."""

    kind: ClassVar[str] = "figure"
    title: str
    source: str
    csv: str | None
    """The file of the numbers that it was drawn from, relative to the page."""
    share: float
    """Its width as a share of a two-column figure's, so that letters are equally large in all."""


@dataclass(frozen=True, slots=True)
class Code:
    """Text as it stands in a file or on a command line; folded up unless `is_open`."""

    kind: ClassVar[str] = "code"
    title: str
    text: str
    is_open: bool = False


@dataclass(frozen=True, slots=True)
class Reading:
    """One diagnostic in words; `level` is "ok", "note" or "warning"."""

    level: str
    title: str
    sentence: str
    what_to_do: str


@dataclass(frozen=True, slots=True)
class Readings:
    """Diagnostics: what was found and what to do about it."""

    kind: ClassVar[str] = "readings"
    readings: Sequence[Reading]


@dataclass(frozen=True, slots=True)
class SampleBrowser:
    """Samples side by side, to be searched."""

    kind: ClassVar[str] = "samples"
    samples: Samples


Block = Prose | Facts | Table | Figure | Code | Readings | SampleBrowser


@dataclass(frozen=True, slots=True)
class Section:
    """A part of a page with its heading."""

    id: str
    title: str
    blocks: Sequence[Block]


@dataclass(frozen=True, slots=True)
class Page:
    """A whole page: what it is of, the verdict, and the sections that have something to show."""

    title: str
    about: str
    """What it is of, in one line."""
    verdict: Sequence[str]
    sections: Sequence[Section]
    warnings: Sequence[str] = field(default_factory=tuple)
