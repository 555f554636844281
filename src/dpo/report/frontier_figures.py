"""The figures of a study of frontiers: means over seeds, with intervals."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dpo.core.frontier import Point, reward_at_kl
from dpo.evaluate.frontier import BestOfN
from dpo.report.exact_figures import with_bars
from dpo.report.exact_study import DPO, ONLINE_DPO, PPO_RM, PPO_TRUE, mean
from dpo.report.exact_study import METHODS as ORDER  # one colour a method in both studies
from dpo.report.figures import KL_LABEL
from dpo.report.frontier_study import (
    FrontierStudy,
    RunResult,
    ShiftResult,
    by_strength,
    points,
)
from dpo.report.style import (
    COLOURS,
    DOUBLE_COLUMN,
    INK,
    MUTED,
    caption,
    look,
    new_figure,
    paper_style,
    save_figure,
)
from dpo.report.tables import seeds_in_words

if TYPE_CHECKING:
    from matplotlib.axes import Axes

TICKS = (0, 0.25, 1, 2, 4, 8, 16, 32, 64, 128)
ON_THE_WAY = (DPO, PPO_RM, PPO_TRUE, ONLINE_DPO)
"""Methods whose training is drawn, each with the strengths of its own."""


def frontier_figure(study: FrontierStudy, stem: Path) -> list[Path]:
    """True reward against KL under the optimum's curve: where methods end, and on the way."""
    with paper_style():
        figure = new_figure(DOUBLE_COLUMN, 4.1)
        left, right = figure.subplots(1, 2, sharey=True)
        most = max(p.kl for seed in study.seeds for m in study.methods() for p in points(seed, m))
        for axes in (left, right):
            axes.set_xscale("function", functions=(np.sqrt, np.square))  # small KLs are seen too
            axes.set_xlim(0, 1.1 * max(most, 4.0))
            axes.set_xticks([x for x in TICKS if x <= 1.1 * max(most, 4.0)])
            axes.xaxis.set_major_formatter("{x:g}")
            axes.set_xlabel(KL_LABEL.replace("reference", "SFT"))
            _optimum(axes, study)
        left.set(ylabel="True reward", title="At the end of training")
        right.set(title="On the way there")
        for method in study.methods():
            index = ORDER.index(method)
            groups = by_strength(study.runs(method))
            _joined(left, groups, index, method)
            if method in ON_THE_WAY:
                _trails(right, groups, index)
            if method in study.seeds[0].best_of:
                _best_of(left, [seed.best_of[method] for seed in study.seeds], index, method)
        lowest = min(seed.reference_reward for seed in study.seeds)
        left.set_ylim(bottom=min(lowest - 0.5, left.get_ylim()[0]))
        figure.legend(*left.get_legend_handles_labels(), loc="outside upper left", ncols=4)
        caption(
            figure,
            f"A marker: one strength, mean over {seeds_in_words(study.seeds)}; bars: 95% "
            "(Student). Right: runs of DPO and PPO.",
        )
        return save_figure(figure, stem, HEADER, _numbers(study))


HEADER = ["seed", "method", "strength", "step", "last", "kl", "kl_stderr", "reward", "stderr"]


def _numbers(study: FrontierStudy) -> list[Sequence[object]]:
    """Every policy of every seed, best-of-n, and corners of the optimum's curve."""
    rows: list[Sequence[object]] = []
    for seed in study.seeds:
        for run in seed.runs:
            strength = "" if run.strength is None else run.strength
            for m in run.trail:
                last = m is run.trail[-1] and not run.diverged
                row = (m.step, last, m.kl, m.kl_stderr, m.reward, m.reward_stderr)
                rows.append((seed.seed, run.method, strength, *row))
        for method, found in seed.best_of.items():
            rows += [(seed.seed, method, b.n, "", True, b.kl, "", b.reward, "") for b in found]
        corners = [Point(0.0, seed.reference_reward), *seed.curve[1::8], seed.curve[-1]]
        rows += [(seed.seed, "optimum", "", "", True, p.kl, "", p.reward, "") for p in corners]
    return rows


def _optimum(axes: Axes, study: FrontierStudy) -> None:
    """Mean over seeds of the most reward at each KL."""
    end = axes.get_xlim()[1]
    kl = np.linspace(0, np.sqrt(end), 300) ** 2
    height = [mean([reward_at_kl(seed.curve, x) for seed in study.seeds]) for x in kl]
    axes.plot(kl, height, color=INK, lw=1.2, label="optimum π*", zorder=1)
    start = mean([seed.reference_reward for seed in study.seeds])
    axes.plot([0], [start], marker="*", ms=8, color=INK, ls="none", label="SFT", clip_on=False)


def _joined(axes: Axes, groups: Sequence[Sequence[RunResult]], index: int, label: str) -> None:
    """Strengths in their order, with intervals over seeds both ways."""
    if not groups:
        return
    kl, kl_bars = with_bars(groups, lambda run: run.last.kl)
    reward, reward_bars = with_bars(groups, lambda run: run.last.reward)
    if kl_bars is not None:
        kl_bars[0] = [min(bar, x) for bar, x in zip(kl_bars[0], kl, strict=True)]
    axes.errorbar(
        kl,
        reward,
        xerr=kl_bars,
        yerr=reward_bars,
        label=label,
        elinewidth=0.6,
        **_style(index),
    )


def _style(index: int) -> dict[str, Any]:
    """Where colours come a second time, markers are hollow and lines dotted."""
    again = index >= len(COLOURS)
    hollow = {"ls": ":", "markerfacecolor": "white"} if again else {}
    return {"lw": 1.0, **look(index), **hollow}


def _trails(axes: Axes, groups: Sequence[Sequence[RunResult]], index: int) -> None:
    """Means over seeds along training, from the SFT model on; a marker where it ends."""
    for runs in groups:
        steps = [m.step for m in runs[0].trail]
        even = [run.trail for run in runs if [m.step for m in run.trail] == steps]
        kl = [0.0, *(mean([t[i].kl for t in even]) for i in range(len(steps)))]
        start = _start_of(axes)
        reward = [start, *(mean([t[i].reward for t in even]) for i in range(len(steps)))]
        style = look(index)
        axes.plot(kl, reward, color=style["color"], lw=0.7, alpha=0.85)
        axes.plot(kl[-1:], reward[-1:], ls="none", ms=3.2, **style)


def _start_of(axes: Axes) -> float:
    """The height of the star: where every trail begins."""
    star = next(line for line in axes.get_lines() if line.get_label() == "SFT")
    return float(np.asarray(star.get_ydata())[0])


def _best_of(axes: Axes, seeds: Sequence[Sequence[BestOfN]], index: int, label: str) -> None:
    kl = [mean([own[i].kl for own in seeds]) for i in range(len(seeds[0]))]
    reward = [mean([own[i].reward for own in seeds]) for i in range(len(seeds[0]))]
    axes.plot(kl, reward, ls="--", lw=0.9, ms=2.5, label=label, **look(index))


def shift_figure(study: FrontierStudy, stem: Path) -> list[Path]:
    """Reward on the kind of questions that preferences left out, with and without them."""
    rows = [row for seed in study.seeds for row in seed.shift]
    methods = list(dict.fromkeys(row.method for row in rows))
    with paper_style():
        figure = new_figure(DOUBLE_COLUMN * 0.75, 2.8)
        panels = figure.subplots(1, 2, sharey=True)
        for axes, on_kind in zip(panels, (False, True), strict=True):
            for index, without in enumerate((False, True)):
                groups = [_of(rows, method, without, on_kind) for method in methods]
                height, bars = with_bars(groups, lambda row: row.reward)
                axes.errorbar(
                    np.arange(len(methods)) + 0.16 * (2 * index - 1),
                    height,
                    yerr=bars,
                    ls="none",
                    elinewidth=0.8,
                    label="preferences without the kind" if without else "preferences on all kinds",
                    **look(index),
                )
            axes.set_xticks(range(len(methods)), [m.replace(", ", ",\n") for m in methods])
            axes.margins(x=0.15)
            axes.set_title("questions of the kind" if on_kind else "questions of the other kinds")
            axes.grid(visible=False, axis="x")
        panels[0].set_ylabel("True reward")
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper left", ncols=2)
        caption(
            figure,
            f"Held-out questions; mean over {seeds_in_words(study.seeds)}, bars: 95% (Student).",
        )
        header = ["seed", "kind", "method", "strength", "without", "on_kind", "kl", "reward"]
        numbers = [[getattr(row, name) for name in header] for row in rows]
        return save_figure(figure, stem, header, numbers)


def _of(
    rows: Sequence[ShiftResult], method: str, without: bool, on_kind: bool
) -> list[ShiftResult]:
    return [r for r in rows if (r.method, r.without, r.on_kind) == (method, without, on_kind)]


def cost_figure(study: FrontierStudy, stem: Path) -> list[Path]:
    """The share of the area under the optimum's curve that a method reaches, by its seconds."""
    from dpo.report.frontier_study import area_shares, seconds

    with paper_style():
        figure = new_figure(DOUBLE_COLUMN * 0.6, 2.9)
        axes = figure.add_subplot()
        rows: list[Sequence[object]] = []
        for method in study.methods():
            time, share = seconds(study, method), area_shares(study, method)
            both = [(time[s], share[s]) for s in time if s in share]
            if not both:
                continue
            rows += [(s, method, time[s], share[s]) for s in time if s in share]
            x, x_bars = with_bars([both], lambda pair: pair[0])
            y, y_bars = with_bars([both], lambda pair: pair[1])
            axes.errorbar(
                x,
                y,
                xerr=x_bars,
                yerr=y_bars,
                ls="none",
                elinewidth=0.7,
                label=method,
                **look(ORDER.index(method)),
            )
        axes.axhline(1, color=MUTED, lw=0.8, ls="--")
        axes.set(xlabel="Seconds of training", ylabel="Area, share of the optimum's")
        axes.set_xlim(left=0)
        figure.legend(loc="outside upper left", ncols=2)
        caption(figure, f"Mean over {seeds_in_words(study.seeds)}; bars: 95% (Student).")
        return save_figure(figure, stem, ["seed", "method", "seconds", "area_share"], rows)
