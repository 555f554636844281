"""Head-to-head comparisons and the agreement of their judges, for the screen."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table
from rich.text import Text

from dpo.evaluate.agreement import Agreement
from dpo.evaluate.head_to_head import HeadToHead


def head_to_head_table(rows: Sequence[HeadToHead]) -> Table:
    """Win rates of a against b by each judge, with p-values after Holm's correction."""
    table = Table(title="Head to head (wins of a among decided; p of the sign test after Holm's)")
    for name in ("judge", "a", "b"):
        table.add_column(name, overflow="fold")
    confidence = f"{rows[0].confidence:.0%} " if rows else ""
    for name in ("temperature", "n", "win rate", f"{confidence}interval", "ties", "p"):
        table.add_column(name, justify="right", overflow="fold")
    for row, previous in zip(rows, [None, *rows], strict=False):
        if previous and (row.judge, row.family) != (previous.judge, previous.family):
            table.add_section()
        table.add_row(
            row.judge,
            Text(row.a),
            Text(row.b),
            "" if row.temperature is None else f"{row.temperature:g}",
            str(row.n),
            "-" if row.win_rate is None else f"{row.win_rate:.1%}",
            Text(f"[{100 * row.low:.1f}, {100 * row.high:.1f}]"),
            str(row.ties),
            f"{row.sign_p_holm:.3f}",
        )
    return table


def agreement_table(rows: Sequence[Agreement]) -> Table:
    """How far every two judges agree, over all verdicts and over those that neither calls a tie."""
    table = Table(title="Agreement of the judges (Cohen's kappa, bootstrap over prompts)")
    table.add_column("judges", min_width=14)
    table.add_column("comparisons", no_wrap=True)
    for name in ("n", "agree", "kappa", "both decide", "agree", "kappa"):
        table.add_column(name, justify="right", no_wrap=name == "kappa")
    for row in rows:
        decided = (row.decided_agreement, row.decided_kappa, row.decided_low, row.decided_high)
        table.add_row(
            f"{row.judge_a}, {row.judge_b}",
            row.family,
            *_cells(row.n, row.agreement, row.kappa, row.low, row.high),
            *_cells(row.decided_n, *decided),
        )
    return table


def _cells(
    n: int, agreement: float | None, kappa: float | None, low: float | None, high: float | None
) -> list[str | Text]:
    interval = "" if low is None or high is None else f" [{low:.2f}, {high:.2f}]"
    return [
        str(n),
        "-" if agreement is None else f"{agreement:.0%}",
        Text("-" if kappa is None else f"{kappa:.2f}{interval}"),
    ]
