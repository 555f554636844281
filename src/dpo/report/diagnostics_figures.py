"""The figures of a diagnosis, and what of it is said on the screen."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.text import Text

from dpo.core.stats import pair_calibration
from dpo.data.files import printable
from dpo.evaluate.diagnostics import DIAGNOSTICS, diagnose, write_diagnosis
from dpo.evaluate.held_out_pairs import HeldOut
from dpo.evaluate.readings import Diagnosis
from dpo.report.figures import comparison_name
from dpo.report.reward import calibration_figure
from dpo.report.runs import finish_run
from dpo.report.style import (
    COLOURS,
    DOUBLE_COLUMN,
    INK,
    MUTED,
    SINGLE_COLUMN,
    caption,
    draw_intervals,
    look,
    name_rows,
    new_figure,
    paper_style,
    plain,
    save_figure,
)

SIDES = ("chosen", "rejected")
NUM_BINS = 30
STYLES = {"warning": "bold yellow", "note": "bold cyan"}


def finish_preference_run(folder: Path) -> None:
    """Diagnose a finished run, draw its curves, print its table and what is remarkable."""
    diagnosis = leave_diagnosis(folder)
    finish_run(folder)
    print_readings(diagnosis, folder)


def leave_diagnosis(folder: Path, out: Path | None = None) -> Diagnosis:
    """Write `diagnostics.json` and the figures of a run or an evaluation from its files alone.

    Args:
        folder: a run's or an evaluation's.
        out: where they go, if not there.

    Raises:
        InputError: there is nothing to diagnose, or a file is damaged.
        StorageError: a file cannot be written.
    """
    out = out or folder
    diagnosis = diagnose(folder)
    out.mkdir(parents=True, exist_ok=True)
    write_diagnosis(diagnosis, out)
    figures = out / "figures"
    if diagnosis.kind == "evaluation":
        if diagnosis.numbers["length_controlled"]:
            rows = diagnosis.numbers["length_controlled"]
            length_controlled_figure(rows, figures / "length_controlled")
        return diagnosis
    pairs = HeldOut.of_run(folder)
    if "displacement" in diagnosis.numbers:
        over_training = diagnosis.numbers["displacement"]["over_training"]
        displacement_figure(pairs, over_training, figures / "displacement")
    if "length" in diagnosis.numbers:
        length_figure(pairs, diagnosis.numbers["length"]["spearman"], figures / "length")
    if "subsets" in diagnosis.numbers:
        subsets_figure(
            diagnosis.numbers["subsets"]["subsets"],
            by=diagnosis.numbers["subsets"]["by"],
            whole=diagnosis.numbers["accuracy"]["accuracy"],
            out_stem=figures / "subsets",
        )
    if pairs.num:
        calibration_figure(pair_calibration(pairs.margins), figures / "calibration")
    return diagnosis


def print_readings(diagnosis: Diagnosis, folder: Path) -> None:
    """Warnings and notes, each with what to do; where there are none, one line."""
    console = Console()
    for reading in diagnosis.remarkable:
        head = Text(f"{reading.level.capitalize()}: ", style=STYLES[reading.level])
        said = f"{reading.title}. {reading.sentence} {reading.what_to_do}".strip()
        console.print(head + Text(printable(said, limit=len(said)), style="not bold"))
    ok = sum(reading.level == "ok" for reading in diagnosis.readings)
    console.print(Text(f"Diagnostics: {ok} checks without a finding; {folder / DIAGNOSTICS}"))


def displacement_figure(
    pairs: HeldOut, over_training: Sequence[dict[str, float]], out_stem: Path | str
) -> list[Path]:
    """How the log-probabilities of chosen and rejected responses changed: the means along the
    steps, and the distribution over the held-out pairs at the end.

    Raises:
        StorageError: when a file cannot be written.
    """
    changes = dict(zip(SIDES, pairs.changes, strict=True))
    edges = np.histogram_bin_edges(np.concatenate(pairs.changes), NUM_BINS)
    rows: list[tuple[object, ...]] = []
    with paper_style():
        figure = new_figure(DOUBLE_COLUMN, 2.8)
        left, right = figure.subplots(1, 2)
        for index, (side, change) in enumerate(changes.items()):
            steps = [row["step"] for row in over_training]
            means = [row[side] for row in over_training]
            left.plot(steps, means, label=side, **look(index))
            counts, _ = np.histogram(change, edges)
            colour = look(index)["color"]
            right.stairs(counts, edges, fill=True, color=colour, alpha=0.2)
            right.stairs(counts, edges, color=colour, lw=1.2)
            right.axvline(float(change.mean()), color=colour, lw=1.2, ls="--")
            rows += [("mean", side, *point, "") for point in zip(steps, means, strict=True)]
            bins = zip(edges[:-1], counts, edges[1:], strict=True)
            rows += [("pairs", side, low, count, high) for low, count, high in bins]
        left.axhline(0, color=INK, lw=0.8, zorder=1)
        right.axvline(0, color=INK, lw=0.8)
        left.set(xlabel="Step", ylabel="Mean change of log-prob. (nats)", title="Over training")
        right.set(
            xlabel="Change of log-prob. (nats a response)",
            ylabel="Held-out pairs",
            title="At the end",
        )
        figure.legend(loc="outside upper left", ncols=2)
        fell = float((changes["chosen"] < 0).mean())
        caption(
            figure,
            f"{pairs.num} held-out pairs; dashed: means. Chosen became less likely in {fell:.0%}.",
        )
        header = ["panel", "side", "x", "value", "x_end"]
        return save_figure(figure, out_stem, header, rows)


def length_figure(pairs: HeldOut, spearman: float, out_stem: Path | str) -> list[Path]:
    """Difference of the implicit rewards against difference in length, a point a pair.

    Raises:
        StorageError: when a file cannot be written.
    """
    x, y = pairs.length_differences, pairs.margins
    with paper_style():
        figure = new_figure(SINGLE_COLUMN, 2.9)
        axes = figure.add_subplot()
        axes.axhline(0, color=MUTED, lw=0.8, zorder=1)
        axes.axvline(0, color=MUTED, lw=0.8, zorder=1)
        axes.scatter(x, y, s=8, color=COLOURS[0], alpha=0.5, linewidths=0, zorder=2)
        axes.set(
            xlabel="Tokens of chosen minus rejected", ylabel="Implicit reward, chosen − rejected"
        )
        caption(
            figure,
            f"{pairs.num} held-out pairs. Above 0 the policy agrees with the label.\n"
            f"Rank correlation within pairs: {spearman:+.2f}.",
        )
        rows = [
            (pair.row, pair.source, *point)
            for pair, *point in zip(pairs.pairs, x.tolist(), y.tolist(), strict=True)
        ]
        header = ["row", "source", "length_difference_tokens", "margin"]
        return save_figure(figure, out_stem, header, rows)


def subsets_figure(
    subsets: Sequence[dict[str, Any]], *, by: str, whole: float, out_stem: Path | str
) -> list[Path]:
    """Accuracy of each subset with its interval, and of all pairs as a line.

    Raises:
        StorageError: when a file cannot be written.
    """
    with paper_style():
        figure = new_figure(SINGLE_COLUMN * 1.3, 1.2 + 0.24 * len(subsets))
        axes = figure.add_subplot()
        axes.axvline(100 * whole, color=MUTED, lw=0.9, ls=(0, (4, 3)), zorder=1)
        intervals = [subset["interval"] for subset in subsets]
        labels = [f"{plain(subset['subset'])} ({subset['n']})" for subset in subsets]
        heights = [-row for row in range(len(labels))]
        draw_intervals(axes, heights, [s["accuracy"] for s in subsets], intervals, 0)
        name_rows(axes, labels)
        axes.set(xlabel="Pairs ordered rightly (%)", xlim=(0, 102))
        caption(
            figure,
            f"By {plain(by)} (pairs). Bars: 95% Wilson intervals; dashed: all pairs, {whole:.0%}.",
        )
        rows = [
            (
                *(s[name] for name in ("subset", "n", "accuracy")),
                *s["interval"],
                *(s[name] for name in ("difference", "p", "p_holm")),
            )
            for s in subsets
        ]
        header = ["subset", "n", "accuracy", "low", "high", "difference", "p", "p_holm"]
        return save_figure(figure, out_stem, header, rows)


def length_controlled_figure(rows: Sequence[dict[str, Any]], out_stem: Path | str) -> list[Path]:
    """Raw and length-controlled win rate of every comparison, with their intervals.

    Raises:
        StorageError: when a file cannot be written.
    """
    labels = [_comparison(row) for row in rows]
    with paper_style():
        figure = new_figure(DOUBLE_COLUMN * 0.8, 1.3 + 0.34 * len(rows))
        axes = figure.add_subplot()
        axes.axvline(50, color=INK, lw=0.8, zorder=1)
        for index, (name, rate, interval) in enumerate(
            (("as judged", "raw", "raw_interval"), ("at equal length", "win_rate", "interval"))
        ):
            rates, intervals = [row[rate] for row in rows], [row[interval] for row in rows]
            heights = [(0.13, -0.13)[index] - row for row in range(len(rows))]
            draw_intervals(axes, heights, rates, intervals, index, label=name)
        name_rows(axes, labels)
        axes.set(xlabel="Win rate (%), a tie counting half")
        figure.legend(loc="outside upper left", ncols=2)
        caption(figure, "Bars: 95% intervals over prompts.")
        numbers = [name for name in rows[0] if not name.endswith("interval")]
        spans = [name for name in rows[0] if name.endswith("interval")]
        header = [*numbers, *(f"{s}_{end}" for s in spans for end in ("low", "high"))]
        values = [
            (*(row[name] for name in numbers), *(end for s in spans for end in row[s]))
            for row in rows
        ]
        return save_figure(figure, out_stem, header, values)


def _comparison(row: dict[str, Any]) -> str:
    named = comparison_name(row["a"], row["b"], row["temperature"])
    return plain(f"{named} ({row['judge']})")
