"""What the pages of runs, evaluations and studies have in common.

A part that a folder does not hold has no block, and a section without blocks is not there.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from urllib.parse import quote

import yaml

from dpo.report.page import samples
from dpo.report.page.blocks import (
    Block,
    Code,
    Facts,
    Link,
    Prose,
    Reading,
    Readings,
    SampleBrowser,
    Section,
    Table,
)
from dpo.report.page.folders import Margin, Record, number
from dpo.report.page.images import figures_of
from dpo.report.page.verdict import accuracy_interval
from dpo.report.page.words import decimal, interval_of_shares, share
from dpo.report.tables import Cells

MAX_ROWS = 300
"""Lines of a table in a page, at most."""


def page_title(folder: Path) -> str:
    """The folder's name, whatever it was called by."""
    return folder.resolve().name


def sections(*parts: tuple[str, str, Iterable[Block | None]]) -> list[Section]:
    """The sections that have something to show."""
    made = [Section(id, title, [b for b in blocks if b is not None]) for id, title, blocks in parts]
    return [section for section in made if section.blocks]


def model_name(model: object) -> str:
    """What a model section names."""
    if not isinstance(model, dict):
        return str(model or "")
    if model.get("fresh"):
        shape = ", ".join(f"{key} {value}" for key, value in model["fresh"].items())
        return f"random weights ({shape})"
    named = model.get("path") or model.get("model") or model.get("function") or ""
    revision = model.get("revision")
    return f"{named} at {revision}" if revision else str(named)


def data_name(data: object) -> str:
    """What a data section names, and what is held out."""
    if not isinstance(data, dict):
        return ""
    path = data.get("path")
    named = ", ".join(map(str, path)) if isinstance(path, list) else str(path)
    if data.get("test"):
        return f"{named}; held out: {data['test']}"
    return f"{named}; {share(data.get('test_fraction'))} of the prompts held out"


def metric(row: Record, key: str, margins: Sequence[Margin] = ()) -> str:
    """A metric with its standard error, or an accuracy with the interval that its held-out pairs
    give; empty where it was not measured.
    """
    value = number(row.get(key))
    if math.isnan(value):
        return ""
    if key == "eval/rewards/accuracy":
        ends = interval_of_shares(*accuracy_interval(value, margins)) if margins else ""
        return f"{share(value)} {ends}".strip()
    error = number(row.get(f"{key}_stderr"))
    return decimal(value) if math.isnan(error) else f"{decimal(value)} ± {error:.2g}"


def people_blocks(judgements: Sequence[Record]) -> list[Block]:
    """What people said in `dpo arena`, a summary for each two responders."""
    return [
        block
        for summary in judgements
        for block in (Prose([summary["pair"]]), Facts(summary["lines"]))
    ]


def diagnostics_blocks(
    folder: Path, diagnostics: Record, *, page: Path | None = None
) -> list[Block | None]:
    """The readings, warnings first, their figures, and the numbers that they were made of.

    Args:
        page: the folder of the page, if it is not that of the diagnostics.
    """
    fields = ("level", "title", "sentence", "what_to_do")
    readings = [
        Reading(*(str(reading.get(field, "")) for field in fields))
        for reading in diagnostics.get("readings") or []
    ]
    readings.sort(key=lambda reading: LEVELS.get(reading.level, len(LEVELS)))
    return [
        Readings(readings) if readings else None,
        *figures_of(folder, diagnostic=True, page=page),
        as_yaml("Numbers", diagnostics.get("numbers") or {}),
    ]


LEVELS = {"warning": 0, "note": 1, "ok": 2}
"""What is to be read first."""


def as_yaml(title: str, values: Record) -> Code | None:
    """Settings as YAML, folded up."""
    if not values:
        return None
    return Code(title, yaml.safe_dump(values, sort_keys=False, allow_unicode=True, width=100))


def browser(found: samples.Samples | None) -> SampleBrowser | None:
    return None if found is None else SampleBrowser(found)


def plain_table(table: Sequence[Cells], caption: str, note: str = "") -> Table | None:
    """A table as it stands in a file, long numbers cut to four digits; emphasis marks dropped."""
    head, *lines = table or [[]]
    if not lines:
        return None
    if len(lines) > MAX_ROWS:
        note = f"{note} The first {MAX_ROWS} of {len(lines):,} lines.".strip()
    rows = [[decimal(cell.replace("**", "")) for cell in line] for line in lines[:MAX_ROWS]]
    return Table([name.replace("_", " ") for name in head], rows, caption, note)


def run_link(page: Path, run: Path) -> Link:
    """From a page's folder to the page of a run. The address begins with a dot, so that no name
    can make it anything but a file.
    """
    relative = Path(os.path.relpath(run, page)).as_posix()
    return Link(relative, f"./{quote(relative)}/index.html")
