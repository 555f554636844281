"""What a finished run or evaluation leaves for the eye: figures in its folder, a table on the
screen.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from dpo.errors import InputError
from dpo.evaluate.jobs import Evaluation
from dpo.evaluate.paired import PairedTest, power_lines
from dpo.evaluate.tables import render_win_rates
from dpo.evaluate.true_reward import RewardRow
from dpo.report.figures import head_to_head_figure, run_curves_figure, win_rate_figure
from dpo.report.judges import agreement_table, head_to_head_table
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
        table.add_column(f"{name} (step {row['step']})", justify="right", overflow="fold")
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


def finish_evaluation(evaluation: Evaluation) -> None:
    """Draw the win rates, those of the other judges too, and print the tables."""
    evaluation_figures(evaluation, evaluation.folder / "figures")
    console = Console()
    console.print(render_win_rates(evaluation.table))
    if evaluation.rewards:
        console.print(reward_table(evaluation.rewards))
    if evaluation.tests:
        console.print(tests_table(evaluation.tests))
    for line in power_lines(evaluation.tests):
        console.print(Text(line))
    if evaluation.duels:
        console.print(head_to_head_table(evaluation.duels.table))
        if evaluation.duels.agreement:
            console.print(agreement_table(evaluation.duels.agreement))
    console.print(Text(f"Tables and figures: {evaluation.folder}"))


def evaluation_figures(evaluation: Evaluation, figures: Path) -> None:
    """The win rates, and head to head where judges were asked."""
    win_rate_figure(evaluation.table, figures / "win_rate")
    if evaluation.duels and evaluation.duels.table:
        head_to_head_figure(evaluation.duels.table, figures / "head_to_head")


def reward_table(rows: list[RewardRow]) -> Table:
    """True reward with its interval, and what it is made of."""
    table = Table(title="True reward (embedded data)")
    table.add_column("model", overflow="fold")
    for name in ("temperature", "n", "reward", "95% interval", "right", "polite", "rude"):
        table.add_column(name, justify="right", overflow="fold")
    for row in rows:
        table.add_row(
            Text(row.model),
            f"{row.temperature:g}",
            str(row.n),
            f"{row.reward:.2f}",
            f"[{row.low:.2f}, {row.high:.2f}]".replace("[", r"\["),
            f"{row.right:.0%}",
            f"{row.polite:.0%}",
            f"{row.rude:.0%}",
        )
    return table


def tests_table(tests: list[PairedTest]) -> Table:
    """Differences of win rates on the same prompts, with tests corrected for their number."""
    table = Table(title="Paired tests on the same prompts (p values after Holm's correction)")
    for name in ("a", "b"):
        table.add_column(name, overflow="fold")
    for name in (
        "temperature",
        "prompts",
        "win rate a - b",
        "95% interval",
        "McNemar p",
        "margin p",
    ):
        table.add_column(name, justify="right", overflow="fold")
    for test in tests:
        difference = "" if test.difference is None else f"{test.difference:+.1%}"
        table.add_row(
            Text(test.model_a),
            Text(test.model_b),
            "" if test.temperature is None else f"{test.temperature:g}",
            str(test.num_prompts),
            difference,
            Text(f"[{test.low:+.1%}, {test.high:+.1%}]"),
            f"{test.mcnemar_p_holm:.3f}",
            f"{test.permutation_p_holm:.3f}",
        )
    return table
