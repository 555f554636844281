"""The curves of several runs in one figure, a panel a metric."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dpo.report.style import DOUBLE_COLUMN, look, new_figure, paper_style, plain, save_figure


@dataclass(frozen=True, slots=True)
class MetricCurve:
    """One run's held-out metric along its optimizer steps."""

    panel: str
    run: str
    steps: Sequence[float]
    values: Sequence[float]


def compared_curves_figure(curves: Sequence[MetricCurve], out_stem: Path | str) -> list[Path]:
    """A panel for each metric, a line for each run, the same colour and marker in every panel.

    Raises:
        StorageError: a file cannot be written.
    """
    panels = list(dict.fromkeys(curve.panel for curve in curves))
    runs = list(dict.fromkeys(curve.run for curve in curves))
    num_columns = min(3, len(panels))
    num_rows = math.ceil(len(panels) / num_columns)
    with paper_style():
        figure = new_figure(DOUBLE_COLUMN, 0.6 + 0.15 * len(runs) / 3 + 1.8 * num_rows)
        grid = figure.subplots(num_rows, num_columns, squeeze=False, sharex=True).ravel()
        for place, (axes, panel) in enumerate(zip(grid, panels, strict=False)):
            for curve in (curve for curve in curves if curve.panel == panel):
                axes.plot(curve.steps, curve.values, lw=1.1, **look(runs.index(curve.run)))
            axes.set_title(panel)
            axes.yaxis.set_major_formatter("{x:g}")
            if place + num_columns >= len(panels):
                axes.set_xlabel("Optimizer step")
                axes.tick_params(labelbottom=True)
        for axes in grid[len(panels) :]:
            axes.remove()
        handles = [
            grid[0].plot([], [], label=plain(run), **look(index))[0]
            for index, run in enumerate(runs)
        ]
        figure.legend(handles=handles, loc="outside upper left", ncols=3)
        rows = [
            (curve.panel, curve.run, step, value)
            for curve in curves
            for step, value in zip(curve.steps, curve.values, strict=True)
        ]
        return save_figure(figure, out_stem, ["metric", "run", "step", "value"], rows)
