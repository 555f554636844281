"""What a finished run leaves for the eye: figures in its folder, a table on the screen."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from dpo.errors import InputError
from dpo.report.figures import run_curves_figure
from dpo.train.held_out import HELD_OUT
from dpo.train.run import read_manifest, read_metrics

SUMMARY = (
    ("eval/loss", "held-out loss"),
    ("eval/perplexity", "perplexity"),
    ("eval/rewards/accuracy", "reward accuracy"),
    ("eval/rewards/ties", "ties"),
    ("eval/rewards/margin", "reward margin"),
    ("eval/rewards/mean", "mean reward"),
    ("eval/calibration_error", "calibration error"),
    ("eval/brier", "Brier score"),
    ("eval/logps/chosen_change", "log pi(chosen), change"),
    ("eval/logps/rejected_change", "log pi(rejected), change"),
    ("eval/reward", "reward of samples"),
    ("eval/reward_stderr", "  its standard error"),
    ("eval/kl", "KL(policy || reference)"),
    ("eval/kl_stderr", "  its standard error"),
)


def finish_run(folder: Path) -> None:
    """Draw the run's curves and print its beginning, best and end.

    A fall of log pi(chosen) while the margin grows is common in DPO and explained in the table.
    """
    metrics = read_metrics(folder)
    last = run_ends(folder, metrics)["end"]
    run_curves_figure(metrics, folder / "figures" / "training")
    console = Console()
    console.print(run_table(folder, metrics))
    diagnosed = (folder / HELD_OUT).is_file()  # then its readings say this, pair by pair
    fell = last.get("eval/logps/chosen_change", 0.0) < 0 < last.get("eval/rewards/margin", 0.0)
    if fell and not diagnosed:
        console.print(
            "The chosen responses became less likely while the margin grew: DPO's loss looks only "
            "at the difference, and rejected responses fell further. Watch KL and samples."
        )
    console.print(Text(f"Model: {folder / 'model'}   figures: {folder / 'figures'}"))


def _held_out(metrics: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [row for row in metrics if "eval/loss" in row]


def run_table(folder: Path, metrics: list[dict[str, Any]]) -> Table:
    """Held-out metrics before training, at the best step and at the end."""
    ends = run_ends(folder, metrics)
    table = Table(title=Text(str(folder)))
    table.add_column("held-out rows")
    for name, row in ends.items():
        table.add_column(f"{name} (step {row['step']})", justify="right")
    for key, name in SUMMARY:
        if key in ends["start"]:
            table.add_row(name, *(f"{float(row[key]):.4g}" for row in ends.values()))
    return table


def run_ends(folder: Path, metrics: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The held-out metrics at the start, at the best step and at the end of a run.

    Raises:
        InputError: there are none.
    """
    held_out = _held_out(metrics)
    if not held_out:
        raise InputError(f"{folder / 'metrics.jsonl'}: expected a run's metrics; it is damaged.")
    best_step = read_manifest(folder).get("best_step", 0)
    best = next((row for row in held_out if row["step"] == best_step), held_out[-1])
    return {"start": held_out[0], "best": best, "end": held_out[-1]}
