"""An evaluation on the screen: a line for each model or pair, a column for each temperature.

Its files and its page have every number; here is what is read first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from rich.console import Console
from rich.table import Table
from rich.text import Text

from dpo.evaluate.agreement import Agreement
from dpo.evaluate.head_to_head import HeadToHead
from dpo.evaluate.jobs import Evaluation
from dpo.evaluate.paired import LEVEL, PairedTest, power_lines
from dpo.evaluate.true_reward import RewardRow
from dpo.evaluate.winrate import WinRateRow
from dpo.report.figures import head_to_head_figure, win_rate_figure
from dpo.report.tables import Cells, on_screen

Row = TypeVar("Row")


def finish_evaluation(evaluation: Evaluation) -> None:
    """Draw the win rates, those of the other judges too, and print the tables."""
    evaluation_figures(evaluation, evaluation.folder / "figures")
    console = Console()
    for table in evaluation_tables(evaluation):
        console.print(table, "")
    for line in power_lines(evaluation.tests):
        console.print(Text(line))
    console.print(Text(f"Tables and figures: {evaluation.folder}"))


def evaluation_figures(evaluation: Evaluation, figures: Path) -> None:
    """The win rates, and head to head where judges were asked."""
    win_rate_figure(evaluation.table, figures / "win_rate")
    if evaluation.duels and evaluation.duels.table:
        head_to_head_figure(evaluation.duels.table, figures / "head_to_head")


def evaluation_tables(evaluation: Evaluation) -> list[Table]:
    """Win rates, null responses, true rewards, paired tests, verdicts and their agreement: those
    that the evaluation has.
    """
    duels = evaluation.duels
    found = [
        win_rate_table([row for row in evaluation.table if row.kind == "model"]),
        null_table([row for row in evaluation.table if row.kind == "null"]),
        reward_table(evaluation.rewards),
        differences_table(evaluation.tests),
        head_to_head_table(duels.table if duels else []),
        agreement_table(duels.agreement if duels else []),
    ]
    return [table for table in found if table is not None]


def win_rate_table(rows: Sequence[WinRateRow]) -> Table | None:
    """Wins among decided responses, and how long the responses are."""
    if not rows:
        return None
    lines = by_temperature(rows, lambda row: (row.model,), _rate, head=("model",))
    more = [["tokens", "cut off"]]
    for name in dict.fromkeys(row.model for row in rows):
        own = [row for row in rows if row.model == name]
        lengths = [row.mean_tokens for row in own if row.mean_tokens is not None]
        cut = [row.truncated_share for row in own]
        more.append([_range(lengths, ".0f"), _range(cut, ".0%")])
    prompts = max(row.num_prompts for row in rows)
    return on_screen(
        f"Sentence-BERT win rates by temperature, {prompts} held-out prompts",
        [[*line, *rest] for line, rest in zip(lines, more, strict=True)],
        note=f"Per cent of decided responses, {rows[0].confidence:.0%} interval. {_ties(rows)}",
    )


def null_table(rows: Sequence[WinRateRow]) -> Table | None:
    """What responses that know nothing would win."""
    if not rows:
        return None
    lines = [["response", "win rate"], *([row.model, _rate(row)] for row in rows)]
    return on_screen("Responses that know nothing of the prompt", lines, note=_ties(rows))


def reward_table(rows: Sequence[RewardRow]) -> Table | None:
    """True reward with its interval, and what it is made of."""
    if not rows:
        return None
    head = ["model", "temperature", "n", "reward, 95% interval", "right", "polite", "rude"]
    lines = [
        [
            row.model,
            f"{row.temperature:g}",
            str(row.n),
            f"{row.reward:.2f} [{row.low:.2f}, {row.high:.2f}]",
            *(f"{share:.0%}" for share in (row.right, row.polite, row.rude)),
        ]
        for row in rows
    ]
    return on_screen("True reward (embedded data)", [head, *lines])


def differences_table(tests: Sequence[PairedTest]) -> Table | None:
    """Differences of win rates on the same prompts, those that are told from 0 marked."""
    if not tests:
        return None

    def difference(test: PairedTest) -> str:
        if test.difference is None:
            return "-"
        interval = f"[{100 * test.low:+.0f}, {100 * test.high:+.0f}]"
        return f"{100 * test.difference:+.0f} {interval}{_mark(test.mcnemar_p_holm)}"

    pairs = by_temperature(
        tests, lambda test: (test.model_a, test.model_b), difference, head=("first", "second")
    )
    return on_screen(
        "First minus second, points of win rate on the same prompts, by temperature",
        pairs,
        num_names=2,
        note=f"{tests[0].confidence:.0%} interval. *: p < {LEVEL:g} by McNemar's test after Holm's "
        "correction.",
    )


def head_to_head_table(rows: Sequence[HeadToHead]) -> Table | None:
    """Win rates of the first against the second by each judge."""
    if not rows:
        return None
    lines = by_temperature(
        rows,
        lambda row: (row.judge, row.a, row.b),
        lambda row: _rate(row) + _mark(row.sign_p_holm),
        head=("judge", "first", "second"),
    )
    return on_screen(
        "Head to head: wins of the first, by temperature",
        lines,
        num_names=3,
        note=f"Per cent of decided responses, {rows[0].confidence:.0%} interval. *: p < {LEVEL:g} "
        f"by the sign test after Holm's correction. {_ties(rows)}",
    )


def agreement_table(rows: Sequence[Agreement]) -> Table | None:
    """How far every two judges agree, over all verdicts and over those that neither calls a tie."""
    if not rows:
        return None
    head = ["judges", "comparisons", "n", "agree", "kappa", "both decide", "agree", "kappa"]
    lines = [
        [
            f"{row.judge_a}, {row.judge_b}",
            row.family,
            str(row.n),
            *_agreed(row.agreement, row.kappa, row.low, row.high),
            str(row.decided_n),
            *_agreed(row.decided_agreement, row.decided_kappa, row.decided_low, row.decided_high),
        ]
        for row in rows
    ]
    title = "Agreement of the judges (Cohen's kappa, bootstrap over prompts)"
    return on_screen(title, [head, *lines], num_names=2)


def by_temperature(
    rows: Sequence[Row],
    names: Callable[[Row], tuple[str, ...]],
    cell: Callable[[Row], str],
    *,
    head: tuple[str, ...],
) -> list[Cells]:
    """A line for what has the same names, in the rows' order, with a cell for each temperature;
    empty where there is no row.
    """
    found: dict[tuple[str, ...], dict[float | None, str]] = {}
    for row in rows:
        found.setdefault(names(row), {})[_temperature(row)] = cell(row)
    temperatures = list(dict.fromkeys(map(_temperature, rows)))
    top = [*head, *("any" if t is None else f"{t:g}" for t in temperatures)]
    return [top, *([*name, *(c.get(t, "") for t in temperatures)] for name, c in found.items())]


def _temperature(row: Any) -> float | None:
    temperature: float | None = row.temperature
    return temperature


def _rate(row: WinRateRow | HeadToHead) -> str:
    if row.win_rate is None:
        return "-"
    return f"{100 * row.win_rate:.0f} [{100 * row.low:.0f}, {100 * row.high:.0f}]"


def _mark(p: float) -> str:
    """A place for the mark, so that numbers stand under one another."""
    return "*" if p < LEVEL else " "


def _ties(rows: Iterable[WinRateRow | HeadToHead]) -> str:
    rows = list(rows)
    ties, responses = sum(row.ties for row in rows), sum(row.n for row in rows)
    return f"Ties: {ties:,} of {responses:,}."


def _range(values: Sequence[float], form: str) -> str:
    """The smallest and the largest, once where they look the same."""
    if not values:
        return ""
    ends = dict.fromkeys((format(min(values), form), format(max(values), form)))
    return " to ".join(ends)


def _agreed(
    agreement: float | None, kappa: float | None, low: float | None, high: float | None
) -> tuple[str, str]:
    interval = "" if low is None or high is None else f" [{low:.2f}, {high:.2f}]"
    return (
        "-" if agreement is None else f"{agreement:.0%}",
        "-" if kappa is None else f"{kappa:.2f}{interval}",
    )
