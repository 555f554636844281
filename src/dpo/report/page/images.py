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

from dpo.errors import InputError
from dpo.evaluate.winrate import WinRateRow
from dpo.report.figures import run_curves_figure, win_rate_figure
from dpo.report.page.blocks import Figure
from dpo.report.page.folders import EvaluationFolder, Record, RunFolder
from dpo.report.page.verdict import models_of
from dpo.report.style import DOUBLE_COLUMN, DPI

MAX_BYTES = 2_000_000
"""Of one image in a page; a larger drawing is shown as PNG, and a larger PNG not at all."""

TITLES = {
    "training": "Training: batches and held-out rows",
    "win_rate": "Win rate against sampling temperature",
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
    """The win rates, where they are not drawn yet."""
    stem = evaluation.folder / "figures" / "win_rate"
    if not stem.with_suffix(".svg").is_file() and models_of(evaluation.win_rates):
        win_rate_figure([_win_rate_row(row) for row in evaluation.win_rates], stem)


def _win_rate_row(row: Record) -> WinRateRow:
    """A line of win_rates.json, of whichever version."""
    values: dict[str, Any] = {field.name: row.get(field.name) for field in fields(WinRateRow)}
    return WinRateRow(**values)


def figures_of(folder: Path, *, diagnostic: bool = False) -> list[Figure]:
    """The images in the folder's `figures`, those that are known first; of diagnostics or not."""
    stems = {file.stem for suffix in KINDS for file in folder.glob(f"figures/*{suffix}")}
    stems = stems & DIAGNOSTIC if diagnostic else stems - DIAGNOSTIC
    ordered = sorted(stems, key=lambda stem: (_place(stem), stem))
    found = (figure_of(folder, folder / "figures" / stem) for stem in ordered)
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
