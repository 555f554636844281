"""The figure of the sentiment study: as Figure 2 (left) of the DPO paper."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dpo.core.frontier import reward_at_kl
from dpo.core.stats import mean_interval
from dpo.report.exact_study import METHODS as ORDER  # one colour a method in all studies
from dpo.report.exact_study import mean
from dpo.report.figures import KL_LABEL
from dpo.report.frontier_study import FrontierStudy, RunResult, by_strength, points
from dpo.report.style import (
    COLOURS,
    DOUBLE_COLUMN,
    INK,
    caption,
    look,
    new_figure,
    paper_style,
    save_figure,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

TICKS = (0, 0.25, 1, 2, 4, 8, 16, 32, 64, 128)
NORMAL_95 = 1.96


def plane_figure(study: FrontierStudy, stem: Path) -> list[Path]:
    """Reward against KL: where every run ends, and on its way there from the SFT model."""
    with paper_style():
        figure = new_figure(DOUBLE_COLUMN, 3.9)
        axes = figure.add_subplot()
        most = max(p.kl for seed in study.seeds for m in study.methods() for p in points(seed, m))
        axes.set_xscale("function", functions=(np.sqrt, np.square))  # small KLs are seen too
        axes.set_xlim(0, 1.1 * max(most, 1.0))
        axes.set_xticks([x for x in TICKS if x <= 1.1 * max(most, 1.0)])
        axes.xaxis.set_major_formatter("{x:g}")
        axes.set(xlabel=KL_LABEL.replace("reference", "SFT"), ylabel="Reward (log-odds)")
        start = mean([seed.reference_reward for seed in study.seeds])
        _optimum(axes, study)
        axes.plot([0], [start], marker="*", ms=8, color=INK, ls="none", label="SFT", clip_on=False)
        for method in study.methods():
            if method in study.seeds[0].best_of:
                _best_of(axes, study, method)
            else:
                _runs(axes, by_strength(study.runs(method)), method, start)
        figure.legend(*axes.get_legend_handles_labels(), loc="outside upper left", ncols=4)
        seeds = len(study.seeds)
        caption(
            figure,
            "A marker: a strength at the end of training; thin lines: on the way there. Bars: 95%, "
            + (f"Student, over {seeds} seeds." if seeds > 1 else "one seed, over prefixes."),
        )
        return save_figure(figure, stem, HEADER, _numbers(study))


HEADER = ["seed", "method", "strength", "step", "kl", "kl_stderr", "reward", "reward_stderr"]


def _numbers(study: FrontierStudy) -> list[Sequence[object]]:
    """Every policy of every seed, best-of-n, and the optimum's curve as far as it is known."""
    rows: list[Sequence[object]] = []
    for seed in study.seeds:
        for run in seed.runs:
            for m in run.trail:
                measured = (m.kl, m.kl_stderr, m.reward, m.reward_stderr)
                rows.append((seed.seed, run.method, run.strength, m.step, *measured))
        for method, found in seed.best_of.items():
            rows += [(seed.seed, method, b.n, "", b.kl, "", b.reward, "") for b in found]
        rows += [
            (seed.seed, "optimum", "", "", kl, "", reward_at_kl(seed.curve, kl), "")
            for kl in np.linspace(0, study.known_kl, 21).tolist()
        ]
    return rows


def _optimum(axes: Axes, study: FrontierStudy) -> None:
    kl = np.linspace(0, np.sqrt(study.known_kl), 100) ** 2
    height = [mean([reward_at_kl(seed.curve, x) for seed in study.seeds]) for x in kl]
    axes.plot(kl, height, color=INK, lw=1.2, label="optimum π*, as far as known", zorder=1)


def _best_of(axes: Axes, study: FrontierStudy, method: str) -> None:
    seeds = [seed.best_of[method] for seed in study.seeds]
    numbers = range(len(seeds[0]))
    kl = [mean([own[i].kl for own in seeds]) for i in numbers]
    reward = [mean([own[i].reward for own in seeds]) for i in numbers]
    axes.plot(kl, reward, label=method, **{**_style(method), "ls": "--", "ms": 2.5})


def _runs(axes: Axes, groups: Sequence[Sequence[RunResult]], method: str, start: float) -> None:
    """Strengths in their order, with bars both ways, and the ways there."""
    if not groups:
        return
    style = _style(method)
    for runs in groups:
        steps = min(len(run.trail) for run in runs)
        kl = [0.0, *(mean([run.trail[i].kl for run in runs]) for i in range(steps))]
        reward = [start, *(mean([run.trail[i].reward for run in runs]) for i in range(steps))]
        axes.plot(kl, reward, color=style["color"], lw=0.6, alpha=0.6)
    ends = [[run.last for run in runs] for runs in groups]
    kl = [mean([m.kl for m in own]) for own in ends]
    reward = [mean([m.reward for m in own]) for own in ends]
    kl_bars = [_bar([m.kl for m in own], own[0].kl_stderr) for own in ends]
    axes.errorbar(
        kl,
        reward,
        xerr=[[min(bar, x) for bar, x in zip(kl_bars, kl, strict=True)], kl_bars],
        yerr=[_bar([m.reward for m in own], own[0].reward_stderr) for own in ends],
        label=method,
        elinewidth=0.6,
        **style,
    )


def _bar(values: Sequence[float], stderr: float) -> float:
    """Half of the 95% interval: over seeds, or over prefixes where there is one seed."""
    if len(values) < 2:
        return NORMAL_95 * stderr
    low, high = mean_interval(values)
    return (high - low) / 2


def _style(method: str) -> dict[str, Any]:
    """Where colours come a second time, markers are hollow and lines dotted."""
    index = ORDER.index(method)
    hollow = {"ls": ":", "markerfacecolor": "white"} if index >= len(COLOURS) else {}
    return {"lw": 1.0, **look(index), **hollow}
