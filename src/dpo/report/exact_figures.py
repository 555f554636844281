"""The figures of a study of exact worlds: means over seeds, with intervals."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from dpo.core.stats import mean_interval
from dpo.report.exact_study import (
    DPO,
    FRONTIER,
    MAX_KL,
    METHODS,
    ONLINE_DPO,
    PAIRS,
    PPO_RM,
    PPO_TRUE,
    RM_SOLVED,
    ExactStudy,
    PolicyRow,
    exact_rewards_at,
    grouped,
    mean,
)
from dpo.report.figures import KL_LABEL
from dpo.report.style import (
    DOUBLE_COLUMN,
    INK,
    caption,
    look,
    new_figure,
    paper_style,
    save_figure,
)
from dpo.report.tables import seeds_in_words

if TYPE_CHECKING:
    from matplotlib.axes import Axes

LEAST_EFFICIENCY = 0.75

Row = TypeVar("Row")
Value = Callable[[PolicyRow], float]


def frontier_figure(study: ExactStudy, stem: Path) -> list[Path]:
    """Reward against KL under the exact frontier, and beside it the share of what is possible."""
    with paper_style():
        figure = new_figure(DOUBLE_COLUMN, 3.7)
        left, right = figure.subplots(1, 2)
        kl = np.linspace(0, MAX_KL * 1.25, 201)
        best = [mean(exact_rewards_at(study, float(x))) for x in kl]
        left.plot(kl, best, color=INK, lw=1.0, label="π*, exact", zorder=1)
        right.axhline(1, color=INK, lw=1.0, zorder=1)
        for index, method in enumerate(m for m in METHODS if m != RM_SOLVED):
            for group in grouped_by_step(study, method):
                values = ([_kl(row) for row in group], [_reward(row) for row in group])
                left.plot(*map(mean, values), ms=2, alpha=0.35, mew=0, **look(index))
            groups = grouped(study.final(method=method))
            _points(left, groups, _kl, _reward, index, label=method, lw=0)
            _points(right, groups, _kl, _efficiency, index, lw=0.8)
        left.set(xlabel=KL_LABEL, ylabel="Expected true reward", xlim=(0, MAX_KL * 1.25))
        right.set(xlabel=KL_LABEL, ylabel="Efficiency (reward gained / possible)")
        right.set(xlim=(0, MAX_KL * 1.25), ylim=(LEAST_EFFICIENCY, 1.01))
        figure.legend(loc="outside upper left", ncols=4)
        caption(
            figure,
            "Large: a method at the end of its training, at one strength. Small: on the way there. "
            f"Mean over\n{seeds_in_words(study.seeds)}; bars: 95% (Student). Efficiencies below "
            f"{LEAST_EFFICIENCY:g} are not drawn.",
        )
        rows = [
            (
                row.seed,
                row.method,
                "" if row.strength is None else row.strength,
                row.step,
                row.last,
                row.measured.kl,
                row.measured.reward,
                row.measured.efficiency,
            )
            for row in study.rows(FRONTIER)
        ]
        rows += [
            (seed.seed, "π*", beta, 0, True, x, y, 1.0)
            for seed in study.seeds
            for beta, x, y in seed.frontier
        ]
        header = ["seed", "method", "strength", "step", "last", "kl", "reward", "efficiency"]
        return save_figure(figure, stem, header, rows)


def grouped_by_step(study: ExactStudy, method: str) -> list[list[PolicyRow]]:
    """Policies on the way, those of all seeds after the same step of the same training together."""
    groups: dict[tuple[float | None, int], list[PolicyRow]] = {}
    for row in study.rows(FRONTIER, method):
        groups.setdefault((row.strength, row.step), []).append(row)
    return list(groups.values())


def data_figure(study: ExactStudy, stem: Path) -> list[Path]:
    """How far DPO ends from its optimum: against the number of pairs, and against beta."""
    main = study.config["pairs"]
    at_main = study.at_beta(DPO)
    counted = [(row, float(main)) for row in at_main]
    counted += [(row, float(row.varied or 0)) for row in study.final(PAIRS)]
    with paper_style():
        figure = new_figure(DOUBLE_COLUMN, 2.7)
        left, right = figure.subplots(1, 2)
        of_count = {
            x: [row for row, own in counted if own == x] for x in sorted({c for _, c in counted})
        }
        _line(left, of_count, _kl_to_optimum, 0, "")
        left.set(xscale="log", yscale="log", xlabel="Number of pairs")
        left.set(ylabel="KL(policy ‖ π*) (nats)", title=f"DPO, beta {study.beta:g}")
        of_beta: dict[float, list[PolicyRow]] = {}
        for row in sorted(study.final(method=DPO), key=lambda row: row.strength or 0.0):
            of_beta.setdefault(row.strength or 0.0, []).append(row)
        _line(right, of_beta, _error_seen, 0, "responses in the pairs")
        _line(right, of_beta, _error_unseen, 1, "responses that are not")
        right.set(xscale="log", xlabel="beta", title=f"DPO, {main:,} pairs")
        right.set(ylabel="Error of the implicit reward (rms)")
        right.set_ylim(bottom=0)
        right.legend()
        caption(figure, f"Mean over {seeds_in_words(study.seeds)}; bars: 95% (Student).")
        header = [
            "seed",
            "pairs",
            "beta",
            "coverage",
            "kl_to_optimum",
            "error_seen",
            "error_unseen",
        ]
        rows = [
            (
                row.seed,
                int(count),
                row.strength,
                row.measured.coverage,
                row.measured.kl_to_optimum,
                row.measured.error_seen,
                row.measured.error_unseen,
            )
            for row, count in [
                *counted,
                *((r, main) for r in study.final(method=DPO) if r not in at_main),
            ]
        ]
        return save_figure(figure, stem, header, rows)


def time_figure(study: ExactStudy, stem: Path) -> list[Path]:
    """What share of the objective's gain a method has after how many seconds, at one beta."""
    with paper_style():
        figure = new_figure(DOUBLE_COLUMN * 0.62, 2.9)
        axes = figure.add_subplot()
        rows = []
        for method in (DPO, PPO_RM, PPO_TRUE, ONLINE_DPO):
            own = [row for row in study.rows(method=method) if row.strength == study.beta]
            by_step = {
                step: [r for r in own if r.step == step] for step in sorted({r.step for r in own})
            }
            at = [by_step[step] for step in by_step]
            _points(axes, at, lambda row: row.seconds, _gain, METHODS.index(method), label=method)
            rows += [(r.seed, method, r.step, r.seconds, r.measured.gain) for r in own]
        axes.axhline(1, color=INK, lw=1.0, zorder=1)
        axes.set(
            xscale="log",
            xlabel="Processor seconds of training",
            ylabel="Share of the possible gain",
        )
        axes.set_ylim(max(-0.1, axes.get_ylim()[0]), 1.05)
        figure.legend(loc="outside upper left", ncols=2)
        caption(
            figure,
            f"beta {study.beta:g}; the reward model's training counts.\n"
            f"Mean over {seeds_in_words(study.seeds)}; bars: 95% (Student).",
        )
        return save_figure(figure, stem, ["seed", "method", "step", "seconds", "gain"], rows)


def _points(
    axes: Axes,
    groups: Sequence[Sequence[PolicyRow]],
    x: Value,
    y: Value,
    index: int,
    *,
    label: str | None = None,
    lw: float = 0.8,
) -> None:
    """A marker for each group of seeds, joined by a line of that width, with both intervals."""
    known = [g for g in groups if all(math.isfinite(x(row) + y(row)) for row in g)]
    drawn = sorted(known, key=lambda group: mean([x(row) for row in group]))
    if not drawn:
        return
    xs, x_bars = with_bars(drawn, x)
    ys, y_bars = with_bars(drawn, y)
    axes.errorbar(
        xs, ys, xerr=x_bars, yerr=y_bars, label=label, lw=lw, elinewidth=0.7, **look(index)
    )


def _line(
    axes: Axes, groups: dict[float, list[PolicyRow]], y: Value, index: int, label: str
) -> None:
    known = {x: g for x, g in groups.items() if all(math.isfinite(y(row)) for row in g)}
    if not known:
        return
    ys, bars = with_bars(list(known.values()), y)
    axes.errorbar(list(known), ys, yerr=bars, label=label or None, elinewidth=0.9, **look(index))


def with_bars(
    groups: Sequence[Sequence[Row]], value: Callable[[Row], float]
) -> tuple[list[float], list[list[float]] | None]:
    """Means, and how far Student's intervals go below and above; none where a group has one."""
    values = [[value(row) for row in group] for group in groups]
    means = [mean(own) for own in values]
    if min(len(own) for own in values) < 2:
        return means, None
    ends = [mean_interval(own) for own in values]
    below = [centre - low for centre, (low, _) in zip(means, ends, strict=True)]
    above = [high - centre for centre, (_, high) in zip(means, ends, strict=True)]
    return means, [below, above]


def _kl(row: PolicyRow) -> float:
    return row.measured.kl


def _reward(row: PolicyRow) -> float:
    return row.measured.reward


def _efficiency(row: PolicyRow) -> float:
    return _number(row.measured.efficiency)


def _gain(row: PolicyRow) -> float:
    return _number(row.measured.gain)


def _kl_to_optimum(row: PolicyRow) -> float:
    return row.measured.kl_to_optimum


def _error_seen(row: PolicyRow) -> float:
    return _number(row.measured.error_seen)


def _error_unseen(row: PolicyRow) -> float:
    return _number(row.measured.error_unseen)


def _number(value: float | None) -> float:
    return float("nan") if value is None else value
