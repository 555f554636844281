"""The figures of a report: pure functions from plain data to PNG, SVG and CSV files."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import astuple, dataclass, fields
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from dpo.core.stats import Interval
from dpo.errors import InputError
from dpo.evaluate.head_to_head import HeadToHead
from dpo.evaluate.winrate import WinRateRow
from dpo.report.style import (
    COLOURS,
    DOUBLE_COLUMN,
    FAINT,
    INK,
    MUTED,
    Boxes,
    caption,
    draw_intervals,
    label_points,
    label_right,
    look,
    name_rows,
    new_figure,
    paper_style,
    plain,
    save_figure,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Floats = NDArray[np.float64]
Line = tuple[Floats, Floats]
"""Steps and values, of equal length."""

KL_LABEL = "KL(policy ‖ reference) (nats)"
LOG_2 = math.log(2.0)
Z_95 = 1.959964


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingCurve:
    """One run's held-out loss and on-policy KL (nats) along x; NaN where it was not measured.

    Curves with the same label are seeds of one setting.
    """

    label: str
    seed: int
    x: Sequence[float]
    loss: Sequence[float]
    kl: Sequence[float]
    kl_stderr: Sequence[float]


@dataclass(frozen=True, slots=True, kw_only=True)
class RewardKLPoint:
    """One trained policy: its true reward and its KL (nats), each with a standard error."""

    method: str
    label: str
    kl: float
    kl_stderr: float
    reward: float
    reward_stderr: float


def win_rate_figure(table: Sequence[WinRateRow], out_stem: Path | str) -> list[Path]:
    """Win rate against sampling temperature, a line per model, and the null responses to beat.

    Bars are the intervals of the table. Models are set a little apart at each temperature. Null
    responses are dashed lines, labelled at the right; the strongest has its interval as a band.

    Raises:
        InputError: when no row of a model has a win rate.
        StorageError: when a file cannot be written.
    """
    rows = [row for row in table if row.win_rate is not None]
    by_model: dict[str, list[WinRateRow]] = {}
    for row in rows:
        if row.kind == "model":
            by_model.setdefault(row.model, []).append(row)
    if not by_model:
        raise InputError("a win-rate figure needs at least one model with a decided response.")
    with paper_style():
        figure = new_figure(DOUBLE_COLUMN, 3.3)
        axes = figure.add_subplot()
        axes.axhline(50, color=INK, lw=0.8, zorder=1)
        _draw_models(axes, by_model)
        _draw_nulls(axes, [row for row in rows if row.kind == "null"])
        axes.set(xlabel="Sampling temperature", ylabel="Win rate (%)")
        figure.legend(loc="outside upper left", ncols=5)
        caption(figure, _win_rate_caption(rows))
        header = [field.name for field in fields(WinRateRow)]
        return save_figure(figure, out_stem, header, [astuple(row) for row in table])


CONTROLS = ("nulls", "labels")
"""Kinds of comparisons that say something of the judge and nothing of a model."""


def head_to_head_figure(table: Sequence[HeadToHead], out_stem: Path | str) -> list[Path]:
    """Win rate of a against b, a row a comparison and in it a point a judge, with the intervals of
    the table; the controls below, in a panel of their own and hollow.

    A judge who called every comparison of a row a tie has no point there.

    Raises:
        InputError: without a comparison.
        StorageError: when a file cannot be written.
    """
    if not table:
        raise InputError("a head-to-head figure needs at least one comparison.")
    judges = list(dict.fromkeys(row.judge for row in table))
    panels = {
        "Models": [row for row in table if row.family not in CONTROLS],
        "Controls: null responses, and the labels of the data": [
            row for row in table if row.family in CONTROLS
        ],
    }
    panels = {title: rows for title, rows in panels.items() if rows}
    names = {title: list(dict.fromkeys(map(_matchup, rows))) for title, rows in panels.items()}
    num_rows = [len(own) for own in names.values()]
    with paper_style():
        height = 1.0 + 0.35 * len(panels) + (0.1 + 0.1 * len(judges)) * sum(num_rows)
        figure = new_figure(DOUBLE_COLUMN, height)
        grid = figure.subplots(len(panels), 1, squeeze=False, sharex=True, height_ratios=num_rows)
        for axes, (title, rows) in zip(grid[:, 0], panels.items(), strict=True):
            axes.axvline(50, color=INK, lw=0.8, zorder=1)
            _draw_matchups(axes, rows, names[title], judges)
            axes.set(title=title, xlim=(-2, 102))
            axes.tick_params(labelbottom=True)
        axes.set_xlabel("Win rate of the one named first (%)")
        _judge_legend(figure, judges)
        caption(figure, _matchup_caption(table))
        header = [field.name for field in fields(HeadToHead)]
        return save_figure(figure, out_stem, header, [astuple(row) for row in table])


def training_curves_figure(
    series: Sequence[TrainingCurve], out_stem: Path | str, *, x_label: str = "Epoch"
) -> list[Path]:
    """Held-out DPO loss and on-policy KL along training, a line per label.

    Lines are means over the seeds of a label, bands their range. Bars on the KL are 1.96 standard
    errors of that mean, from the seeds' own sampling errors. At ln 2 policy equals reference.

    Raises:
        InputError: without a curve, or with one whose lists differ in length.
        StorageError: when a file cannot be written.
    """
    if not series:
        raise InputError("training curves need at least one run.")
    for curve in series:
        if len({len(curve.x), len(curve.loss), len(curve.kl), len(curve.kl_stderr)}) > 1:
            raise InputError(f"curve {curve.label!r}, seed {curve.seed}: lists differ in length.")
    labels = list(dict.fromkeys(curve.label for curve in series))
    with paper_style():
        figure = new_figure(DOUBLE_COLUMN, 2.9)
        loss_axes, kl_axes = figure.subplots(1, 2)
        for index, label in enumerate(labels):
            seeds = [curve for curve in series if curve.label == label]
            x, loss = _aligned(seeds, "loss")
            _, kl = _aligned(seeds, "kl")
            _, stderr = _aligned(seeds, "kl_stderr")
            _draw_seeds(loss_axes, x, loss, None, index, plain(label))
            _draw_seeds(kl_axes, x, kl, stderr, index, None)
        loss_axes.axhline(LOG_2, color=MUTED, lw=0.8, ls="--", zorder=1)
        loss_axes.set(xlabel=x_label, ylabel="DPO loss (nats)", title="Held-out loss")
        kl_axes.set(xlabel=x_label, ylabel=KL_LABEL, title="On-policy KL")
        kl_axes.set_ylim(bottom=0)
        figure.legend(loc="outside upper left", ncols=5)
        caption(figure, _seeds_caption(series))
        label_right(loss_axes, [(LOG_2, "ln 2: policy\n= reference", MUTED)])
        rows = [
            (curve.label, curve.seed, *values)
            for curve in series
            for values in zip(curve.x, curve.loss, curve.kl, curve.kl_stderr, strict=True)
        ]
        header = ["label", "seed", "x", "loss", "kl", "kl_stderr"]
        return save_figure(figure, out_stem, header, rows)


def reward_kl_figure(points: Sequence[RewardKLPoint], out_stem: Path | str) -> list[Path]:
    """True reward against KL, one labelled point per policy, a thin line along each method.

    Bars are 1.96 standard errors, both ways.

    Raises:
        InputError: without points.
        StorageError: when a file cannot be written.
    """
    if not points:
        raise InputError("a reward-KL figure needs at least one policy.")
    by_method: dict[str, list[RewardKLPoint]] = {}
    for point in points:
        by_method.setdefault(point.method, []).append(point)
    for own in by_method.values():
        own.sort(key=lambda point: point.kl)
    with paper_style():
        figure = new_figure(DOUBLE_COLUMN * 0.72, 3.4)
        axes = figure.add_subplot()
        labels: list[tuple[float, float, str, str]] = []
        for index, (method, own) in enumerate(by_method.items()):
            axes.errorbar(
                [p.kl for p in own],
                [p.reward for p in own],
                xerr=[Z_95 * p.kl_stderr for p in own],
                yerr=[Z_95 * p.reward_stderr for p in own],
                label=plain(method),
                lw=0.8,
                elinewidth=0.9,
                **look(index),
            )
            labels += [(p.kl, p.reward, plain(p.label), look(index)["color"]) for p in own]
        axes.margins(0.1)
        axes.set(xlabel=KL_LABEL, ylabel="True reward")
        figure.legend(loc="outside upper left", ncols=4)
        caption(figure, "Bars: 1.96 standard errors.")
        label_points(axes, labels, obstacles=_bars_and_lines(by_method.values()))
        header = [field.name for field in fields(RewardKLPoint)]
        return save_figure(figure, out_stem, header, [astuple(point) for point in points])


_RUN_PANELS: dict[str, dict[str, str]] = {
    "Loss": {"loss": ""},
    "Reward (nats)": {"rewards/chosen": "chosen", "rewards/rejected": "rejected"},
    "Reward margin (nats)": {"rewards/margin": ""},
    "Reward accuracy": {"rewards/accuracy": ""},
    "Response log-prob. (nats)": {"logps/chosen": "chosen", "logps/rejected": "rejected"},
    "Reward of samples": {"samples/reward": "", "reward": ""},
    "On-policy KL (nats)": {"kl": ""},
    "Gradient norm": {"gradient_norm": ""},
    "Learning rate": {"learning_rate": ""},
}
"""Panel -> its metrics -> whose they are; `eval/` + metric is the same on held-out rows."""

_ROLE_COLOURS = {"": INK, "chosen": COLOURS[0], "rejected": COLOURS[1]}

SMOOTH_ABOVE = 100
"""Beyond this many points a line is drawn as its moving average over a pale original."""


def run_curves_figure(metrics: Sequence[Mapping[str, object]], out_stem: Path | str) -> list[Path]:
    """One run's metrics along its steps as small multiples; what was not logged has no panel.

    `metrics` are the rows of metrics.jsonl: each has a `step`, and any of the metrics.

    Raises:
        InputError: when no row has a step and a metric that a panel shows.
        StorageError: when a file cannot be written.
    """
    lines = {
        name: line
        for metrics_of in _RUN_PANELS.values()
        for metric in metrics_of
        for name in (metric, f"eval/{metric}", f"eval/{metric}_stderr")
        if len((line := _metric_line(metrics, name))[0])
    }
    panels = {
        title: roles
        for title, roles in _RUN_PANELS.items()
        if any(metric in lines or f"eval/{metric}" in lines for metric in roles)
    }
    if not panels:
        raise InputError("no row of the metrics has a step and a metric that the figure knows.")
    with paper_style():
        num_columns = min(3, len(panels))
        num_rows = math.ceil(len(panels) / num_columns)
        figure = new_figure(DOUBLE_COLUMN / 3 * num_columns, 0.5 + 1.6 * num_rows)
        grid = figure.subplots(num_rows, num_columns, squeeze=False, sharex=True).ravel()
        for place, (axes, (title, roles)) in enumerate(zip(grid, panels.items(), strict=False)):
            for metric, role in roles.items():
                _draw_metric(axes, lines, metric, _ROLE_COLOURS[role])
            axes.set_title(title)
            axes.yaxis.set_major_formatter("{x:g}")  # no shared factor above the axis
            if place + num_columns >= len(panels):
                axes.set_xlabel("Step")
                axes.tick_params(labelbottom=True)
        for axes in grid[len(panels) :]:
            axes.remove()
        _run_legend(figure, panels, lines)
        rows = [(name, *point) for name, line in lines.items() for point in zip(*line, strict=True)]
        return save_figure(figure, out_stem, ["metric", "step", "value"], rows)


def _draw_models(axes: Axes, by_model: Mapping[str, Sequence[WinRateRow]]) -> None:
    temperatures = sorted({row.temperature or 0.0 for rows in by_model.values() for row in rows})
    width = (temperatures[-1] - temperatures[0]) or 1.0
    dodge = 0.012 * width
    for index, (model, rows) in enumerate(by_model.items()):
        own = sorted(rows, key=lambda row: row.temperature or 0.0)
        rate = np.array([100 * (row.win_rate or 0.0) for row in own])
        low = np.array([100 * row.low for row in own])
        high = np.array([100 * row.high for row in own])
        shift = (index - (len(by_model) - 1) / 2) * dodge
        axes.errorbar(
            [(row.temperature or 0.0) + shift for row in own],
            rate,
            yerr=[rate - low, high - rate],
            label=plain(model),
            lw=0.9,
            elinewidth=1.1,
            zorder=3,
            **look(index),
        )
    axes.set_xticks(temperatures)
    axes.set_xlim(temperatures[0] - 0.08 * width, temperatures[-1] + 0.08 * width)


def _draw_nulls(axes: Axes, nulls: Sequence[WinRateRow]) -> None:
    if not nulls:
        return
    best = max(nulls, key=lambda row: row.win_rate or 0.0)
    axes.axhspan(100 * best.low, 100 * best.high, color=FAINT, alpha=0.6, lw=0, zorder=0)
    labels: list[tuple[float, str, str]] = []
    for row in nulls:
        rate = 100 * (row.win_rate or 0.0)
        colour = INK if row is best else MUTED
        axes.axhline(rate, color=colour, lw=0.7, ls=(0, (4, 3)), zorder=1)
        labels.append((rate, f"{plain(row.model)} {rate:.1f}", colour))
    axes.set_ylim(axes.get_ylim())  # final, before labels are placed by it
    label_right(axes, labels)


def _win_rate_caption(rows: Sequence[WinRateRow]) -> str:
    n = _range_text([row.n for row in rows if row.kind == "model"])
    prompts = _range_text([row.num_prompts for row in rows])
    text = f"n = {n} responses to {prompts} prompts. "
    text += f"Bars: {rows[0].confidence:.0%} Wilson intervals, ties left out."
    if any(row.kind == "null" for row in rows):
        text += " Dashed: null responses; band: interval of the strongest."
    return text


def comparison_name(a: str, b: str, temperature: float | None) -> str:
    """`dpo against sft, t = 0.5`; of the data's own responses there is no temperature."""
    return f"{a} against {b}" + ("" if temperature is None else f", t = {temperature:g}")


def _matchup(row: HeadToHead) -> str:
    return comparison_name(row.a, row.b, row.temperature)


def _draw_matchups(
    axes: Axes, rows: Sequence[HeadToHead], names: Sequence[str], judges: Sequence[str]
) -> None:
    """A row a name; within it the judges from top to bottom."""
    gap = 0.6 / len(judges)
    for index, judge in enumerate(judges):
        own = [row for row in rows if row.judge == judge and row.win_rate is not None]
        below = (index - (len(judges) - 1) / 2) * gap
        draw_intervals(
            axes,
            [-names.index(_matchup(row)) - below for row in own],
            [row.win_rate or 0.0 for row in own],
            [Interval(row.low, row.high) for row in own],
            index,
            filled=not any(row.family in CONTROLS for row in own),
        )
    name_rows(axes, [plain(name) for name in names])


def _judge_legend(figure: Figure, judges: Sequence[str]) -> None:
    from matplotlib.lines import Line2D

    handles = [
        Line2D([], [], ls="", label=f"judge: {plain(judge)}", **look(index))
        for index, judge in enumerate(judges)
    ]
    figure.legend(handles=handles, loc="outside upper left", ncols=4)


def _matchup_caption(table: Sequence[HeadToHead]) -> str:
    n = _range_text([row.n for row in table])
    text = f"n = {n} comparisons a point. Bars: {table[0].confidence:.0%} Wilson intervals, "
    text += "prompts as clusters, ties left out."
    if any(row.win_rate is None for row in table):
        text += " No point: nothing but ties."
    return text


def _range_text(counts: Iterable[int]) -> str:
    low, *_, high = sorted([*counts] * 2)
    return f"{low}" if low == high else f"{low} to {high}"


def _aligned(seeds: Sequence[TrainingCurve], name: str) -> tuple[Floats, Floats]:
    """The union of the seeds' x, (X,), and their values there, (S, X), NaN where one has none."""
    x = np.unique(np.concatenate([np.asarray(curve.x, np.float64) for curve in seeds]))
    values = np.full((len(seeds), len(x)), np.nan)
    for row, curve in zip(values, seeds, strict=True):
        row[np.searchsorted(x, curve.x)] = getattr(curve, name)
    return x, values


def _draw_seeds(
    axes: Axes, x: Floats, values: Floats, stderr: Floats | None, index: int, label: str | None
) -> None:
    """Mean over the seeds where any was measured, their range, and the bars of the mean."""
    measured = np.isfinite(values).any(axis=0)
    if not measured.any():
        return
    x, values = x[measured], values[:, measured]
    mean = np.nanmean(values, axis=0)
    bars = None
    if stderr is not None:
        errors = np.where(np.isfinite(values), stderr[:, measured], np.nan)
        bars = Z_95 * np.sqrt(np.nansum(errors**2, axis=0)) / np.isfinite(values).sum(axis=0)
    if len(values) > 1:
        low, high = np.nanmin(values, axis=0), np.nanmax(values, axis=0)
        axes.fill_between(x, low, high, color=look(index)["color"], alpha=0.18, lw=0)
    axes.errorbar(x, mean, yerr=bars, label=label, elinewidth=0.9, zorder=3, **look(index))


def _seeds_caption(series: Sequence[TrainingCurve]) -> str:
    num_seeds = _range_text(Counter(curve.label for curve in series).values())
    seeds = "One seed each." if num_seeds == "1" else f"Mean and range of {num_seeds} seeds."
    return f"{seeds} Bars on the KL: 1.96 standard errors of sampling."


def _bars_and_lines(methods: Iterable[Sequence[RewardKLPoint]]) -> Boxes:
    """Flat boxes, in data units, over the error bars and along the lines between the points."""
    boxes: list[tuple[float, float, float, float]] = []
    for points in methods:
        for p in points:
            dx, dy = Z_95 * p.kl_stderr, Z_95 * p.reward_stderr
            boxes.append((p.kl - dx, p.reward, p.kl + dx, p.reward))
            boxes.append((p.kl, p.reward - dy, p.kl, p.reward + dy))
        for p, q in pairwise(points):
            xs, ys = np.linspace(p.kl, q.kl, 40), np.linspace(p.reward, q.reward, 40)
            boxes += zip(xs, ys, xs, ys, strict=True)
    return np.array(boxes)


def _metric_line(metrics: Sequence[Mapping[str, object]], name: str) -> Line:
    """Steps and values of the rows that have a finite number under that name."""
    points = [
        (float(step), float(value))
        for row in metrics
        if isinstance(step := row.get("step"), (int, float))
        and isinstance(value := row.get(name), (int, float))
        and math.isfinite(value)
    ]
    steps, values = np.array(points, np.float64).reshape(-1, 2).T
    return steps, values


def _draw_metric(axes: Axes, lines: Mapping[str, Line], metric: str, colour: str) -> None:
    """Training batches as a line, held-out rows dashed with markers."""
    if metric in lines:
        steps, values = lines[metric]
        if len(values) > SMOOTH_ABOVE:
            axes.plot(steps, values, color=colour, alpha=0.2, lw=0.5)
            window = np.ones(len(values) // 25)
            in_window = np.convolve(np.ones(len(values)), window, mode="same")
            values = np.convolve(values, window, mode="same") / in_window
        axes.plot(steps, values, color=colour, lw=1.2)
    if f"eval/{metric}" in lines:
        steps, values = lines[f"eval/{metric}"]
        errors = lines.get(f"eval/{metric}_stderr", (steps, None))[1]
        bars = Z_95 * errors if errors is not None and len(errors) == len(values) else None
        axes.errorbar(steps, values, yerr=bars, color=colour, elinewidth=0.9, **_HELD_OUT)


_HELD_OUT: dict[str, Any] = {"ls": (0, (4, 2)), "lw": 1.0, "marker": "o", "ms": 3.5, "mfc": "white"}


def _run_legend(
    figure: Figure, panels: Mapping[str, Mapping[str, str]], lines: Mapping[str, Line]
) -> None:
    """Colours for chosen and rejected, styles for training and held-out: those that occur."""
    from matplotlib.lines import Line2D

    roles = dict.fromkeys(role for metrics in panels.values() for role in metrics.values() if role)
    handles = [Line2D([], [], color=_ROLE_COLOURS[role], label=role) for role in roles]
    if any(not name.startswith("eval/") for name in lines):
        handles.append(Line2D([], [], color=INK, lw=1.2, label="training batches"))
    if any(name.startswith("eval/") for name in lines):
        handles.append(Line2D([], [], color=INK, label="held-out rows", **_HELD_OUT))
    figure.legend(handles=handles, loc="outside upper left", ncols=4)
    notes = ["Thin: each step; thick: moving average."] if _is_smoothed(lines) else []
    if any(name.endswith("_stderr") for name in lines):
        notes.append("Bars: 1.96 standard errors.")
    if notes:
        caption(figure, " ".join(notes))


def _is_smoothed(lines: Mapping[str, Line]) -> bool:
    return any(
        len(values) > SMOOTH_ABOVE for name, (_, values) in lines.items() if name[:5] != "eval/"
    )
