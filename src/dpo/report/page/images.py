"""The figures of a folder, inside the page: what is drawn already, and what can be drawn of its
files.
"""

from __future__ import annotations

import base64
import re
from contextlib import suppress
from dataclasses import fields
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from dpo.errors import InputError
from dpo.evaluate.head_to_head import HeadToHead
from dpo.evaluate.winrate import WinRateRow
from dpo.report.figures import head_to_head_figure, run_curves_figure, win_rate_figure
from dpo.report.page.blocks import Figure
from dpo.report.page.folders import EvaluationFolder, Record, RunFolder
from dpo.report.page.verdict import models_of
from dpo.report.style import DOUBLE_COLUMN, DPI

MAX_BYTES = 2_000_000
"""Of one image in a page; a larger drawing is shown as PNG, and a larger PNG not at all."""

TITLES = {
    "training": "Training: batches and held-out rows",
    "win_rate": "Win rate against sampling temperature",
    "head_to_head": "Head to head: which of two responses each judge prefers",
    "reward_kl": "Reward against KL",
    "frontier": "Reward against KL",
    "cost": "Area under the frontier against seconds",
    "time": "Share of the gain against seconds",
    "shift": "Questions that no pair was about",
    "data": "What decides the order",
    "displacement": "Log-probabilities of chosen and rejected responses",
    "length": "Length of the responses",
    "subsets": "Accuracy by subset",
    "calibration": "Calibration on held-out pairs",
    "length_controlled": "Win rates at equal length",
}
"""What a figure shows, by the name of its file; others are called by that name."""

ORDER = tuple(TITLES)

DIAGNOSTIC = frozenset({"displacement", "length", "subsets", "calibration", "length_controlled"})
"""Those that stand beside the diagnostics."""

KINDS = {".svg": "image/svg+xml", ".png": "image/png"}


def draw_run(run: RunFolder) -> None:
    """The run's curves, where they are not drawn yet or the run went on since."""
    drawn, measured = run.folder / "figures" / "training.svg", run.folder / "metrics.jsonl"
    if not drawn.is_file() or drawn.stat().st_mtime < measured.stat().st_mtime:
        with suppress(InputError):  # nothing was measured that a panel shows
            run_curves_figure(run.metrics, run.folder / "figures" / "training")


def draw_evaluation(evaluation: EvaluationFolder) -> None:
    """The win rates, and those of the judges head to head, where they are not drawn yet."""
    figures = evaluation.folder / "figures"
    if not (figures / "win_rate.svg").is_file() and models_of(evaluation.win_rates):
        win_rate_figure([_win_rate_row(row) for row in evaluation.win_rates], figures / "win_rate")
    if not (figures / "head_to_head.svg").is_file() and evaluation.head_to_head:
        with suppress(ValidationError):  # of another version
            rows = [_head_to_head_row(row) for row in evaluation.head_to_head]
            head_to_head_figure(rows, figures / "head_to_head")


def _win_rate_row(row: Record) -> WinRateRow:
    """A line of win_rates.json, of whichever version."""
    values: dict[str, Any] = {field.name: row.get(field.name) for field in fields(WinRateRow)}
    return WinRateRow(**values)


def _head_to_head_row(row: Record) -> HeadToHead:
    """A line of head_to_head.csv, whose empty cells are None."""
    values = {name: None if text == "" else text for name, text in row.items()}
    return TypeAdapter(HeadToHead).validate_python(values)


def figures_of(folder: Path, *, diagnostic: bool = False, page: Path | None = None) -> list[Figure]:
    """The images in the folder's `figures`, those that are known first; of diagnostics or not.

    Args:
        page: the folder of the page, if it is another one.
    """
    stems = {file.stem for suffix in KINDS for file in folder.glob(f"figures/*{suffix}")}
    stems = stems & DIAGNOSTIC if diagnostic else stems - DIAGNOSTIC
    ordered = sorted(stems, key=lambda stem: (_place(stem), stem))
    found = (figure_of(page or folder, folder / "figures" / stem) for stem in ordered)
    return [figure for figure in found if figure is not None]


def _place(stem: str) -> int:
    return ORDER.index(stem) if stem in ORDER else len(ORDER)


def figure_of(page: Path, stem: Path) -> Figure | None:
    """The drawing of that name, or its PNG where the drawing is too large or missing.

    Args:
        page: the folder of the page, to which the address of the CSV file is relative.
    """
    drawings = [(stem.with_suffix(suffix), kind) for suffix, kind in KINDS.items()]
    small = [(f, kind) for f, kind in drawings if f.is_file() and f.stat().st_size <= MAX_BYTES]
    if not small:
        return None
    file, kind = small[0]
    content = file.read_bytes()
    # In an <img> a drawing can neither run a script nor load anything, whatever it holds.
    source = f"data:{kind};base64,{base64.b64encode(content).decode('ascii')}"
    csv = stem.with_suffix(".csv")
    address = csv.relative_to(page).as_posix() if csv.is_file() else None
    title = TITLES.get(stem.name, stem.name.replace("_", " ").capitalize())
    return Figure(title, source, address, min(1.0, _inches(content) / DOUBLE_COLUMN))


def _inches(content: bytes) -> float:
    """The width of a drawing of matplotlib's, in points, or of an image, in dots of ours."""
    found = re.search(rb'<svg[^>]* width="([\d.]+)pt"', content[:4096])
    if found is not None:
        return float(found.group(1)) / 72
    return int.from_bytes(content[16:20], "big") / DPI
