"""What a finished reward model leaves for the eye: its curves, its table, and whether its
probabilities are those of what people preferred.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from dpo.core.reward_losses import ordered_margins
from dpo.core.stats import Calibration, pair_calibration, wilson_interval
from dpo.report.runs import finish_run
from dpo.report.style import (
    COLOURS,
    MUTED,
    SINGLE_COLUMN,
    caption,
    new_figure,
    paper_style,
    save_figure,
)
from dpo.train.reward import SCORED


def finish_reward_run(folder: Path) -> None:
    """Draw the run's curves and its calibration, and print its beginning, best and end."""
    calibration_figure(held_out_calibration(folder), folder / "figures" / "calibration")
    finish_run(folder)


def held_out_calibration(folder: Path) -> Calibration:
    """Of a finished run's last model, on its held-out pairs."""
    lines = (folder / "samples" / SCORED).read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    return pair_calibration(
        [margin for row in rows for margin in ordered_margins(row["rewards"], row["ranks"])]
    )


def calibration_figure(calibration: Calibration, out_stem: Path | str) -> list[Path]:
    """Share of right verdicts against the model's confidence, with the number of pairs beneath.

    Bars are 95% Wilson intervals; on the diagonal, confidence is what it says. DeGroot and Fienberg
    1983, the reliability diagram.

    Raises:
        StorageError: when a file cannot be written.
    """
    bins = calibration.bins
    confidence = np.array([b.confidence for b in bins])
    accuracy = np.array([b.accuracy for b in bins])
    ends = np.array([wilson_interval(round(b.accuracy * b.n), b.n) for b in bins])
    num_pairs = sum(b.n for b in bins)
    with paper_style():
        figure = new_figure(SINGLE_COLUMN, 3.2)
        upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
        upper.plot([0.5, 1], [0.5, 1], color=MUTED, lw=0.8, ls=(0, (4, 3)), zorder=1)
        upper.errorbar(
            confidence,
            accuracy,
            yerr=np.maximum([accuracy - ends[:, 0], ends[:, 1] - accuracy], 0),
            color=COLOURS[0],
            marker="o",
            lw=0.9,
            elinewidth=1.1,
            zorder=3,
        )
        upper.set(ylabel="Share of right verdicts", ylim=(min(0.4, ends.min() - 0.03), 1.03))
        lower.bar(confidence, [b.n for b in bins], width=0.03, color=COLOURS[0])
        lower.set(xlabel="Confidence, sigmoid(|margin|)", ylabel="Pairs", xlim=(0.48, 1.02))
        caption(
            figure,
            f"{num_pairs} held-out pairs; bars: 95% Wilson intervals.\n"
            f"Expected calibration error {calibration.error:.3f}, Brier {calibration.brier:.3f}.",
        )
        rows: Sequence[Sequence[object]] = [
            (b.n, b.confidence, b.accuracy, *end)
            for b, end in zip(bins, ends.tolist(), strict=True)
        ]
        return save_figure(figure, out_stem, ["n", "confidence", "accuracy", "low", "high"], rows)
