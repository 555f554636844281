"""Figures: the numbers in them, the files beside them, and nothing clipped or overlapping."""

import csv
import errno
import math
import os
import subprocess
import sys
from itertools import combinations, pairwise
from xml.etree import ElementTree

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.text import Text

from dpo.core.stats import wilson_interval
from dpo.errors import InputError, StorageError
from dpo.evaluate.head_to_head import HeadToHead
from dpo.evaluate.winrate import WinRateRow
from dpo.report import figures
from dpo.report.figures import (
    RewardKLPoint,
    TrainingCurve,
    head_to_head_figure,
    reward_kl_figure,
    run_curves_figure,
    training_curves_figure,
    win_rate_figure,
)
from dpo.report.style import COLOURS, spread

NULLS = {
    "another prompt's chosen": 0.473,
    "another prompt's rejected": 0.431,
    "constant polite sentence": 0.609,
    "constant rude sentence": 0.309,
    "prompt echoed": 0.571,
    "empty string": 0.317,
}


def win_rate_row(model, temperature, rate, *, kind="model", n=220):
    wins = round(rate * n)
    interval = wilson_interval(wins, n)
    return WinRateRow(
        model=model,
        kind=kind,
        temperature=temperature,
        num_prompts=n,
        n=n,
        wins=wins,
        losses=n - wins,
        ties=0,
        win_rate=wins / n,
        tie_half=wins / n,
        low=interval.low,
        high=interval.high,
        bootstrap_low=interval.low,
        bootstrap_high=interval.high,
        confidence=0.95,
        mean_margin=0.01,
        truncated_share=0.0,
        mean_tokens=None if kind == "null" else 31.5,
    )


def win_rate_rows():
    models = {"SFT": 0.55, "DPO \u03b2 = 0.1": 0.64, "DPO \u03b2 = 0.5": 0.6}
    rows = [
        win_rate_row(model, temperature, rate - 0.05 * temperature)
        for model, rate in models.items()
        for temperature in (0.0, 0.25, 0.5, 1.0)
    ]
    return rows + [win_rate_row(name, None, rate, kind="null") for name, rate in NULLS.items()]


def head_to_head_row(judge, family, a, b, temperature, rate, n=80):
    wins = None if rate is None else round(rate * n)
    interval = wilson_interval(wins or 0, 0 if rate is None else n)
    return HeadToHead(
        judge=judge,
        family=family,
        a=a,
        b=b,
        temperature=temperature,
        num_prompts=n,
        n=n,
        wins=wins or 0,
        losses=0 if rate is None else n - wins,
        ties=n if rate is None else 0,
        win_rate=None if rate is None else wins / n,
        low=interval.low,
        high=interval.high,
        confidence=0.95,
        prompts_won=wins or 0,
        prompts_lost=0 if rate is None else n - wins,
        sign_p=0.5,
        sign_p_holm=1.0,
    )


def head_to_head_rows():
    """Two judges; the second calls every pair of the two models a tie."""
    asked = [
        *(("chosen", model, "chosen", t) for model in ("SFT", "DPO $x$") for t in (0.5, 1.0)),
        *(("models", "DPO $x$", "SFT", t) for t in (0.5, 1.0)),
        *(("nulls", name, "chosen", None) for name in NULLS),
        ("labels", "chosen", "rejected", None),
    ]
    return [
        head_to_head_row(
            judge, *what, None if (judge, what[0]) == ("endpoint", "models") else 0.2 + i / 20
        )
        for judge in ("sentence_bert", "endpoint")
        for i, what in enumerate(asked)
    ]


def training_curves():
    rng = np.random.default_rng(0)
    x = np.arange(7) / 2
    return [
        TrainingCurve(
            label=f"\u03b2 = {beta:g}",
            seed=seed,
            x=x,
            loss=math.log(2) - 0.2 * (1 - np.exp(-x)) + rng.normal(0, 0.005, 7) * (x > 0),
            kl=kl * (1 - np.exp(-x)),
            kl_stderr=0.05 * kl * (x > 0),
        )
        for beta, kl in ((0.05, 18), (0.1, 9), (0.5, 2))
        for seed in range(3)
    ]


def reward_points():
    return [
        RewardKLPoint(
            method=method,
            label=f"\u03b2 = {beta:g}",
            kl=2.2 / beta**0.7,
            kl_stderr=0.06 / beta**0.7,
            reward=height * (1 - math.exp(-0.4 / beta**0.7)),
            reward_stderr=0.03,
        )
        for method, height in (("DPO", 2.0), ("PPO", 1.5))
        for beta in (0.05, 0.1, 0.25, 0.5, 1.0)
    ]


def run_metrics():
    rng = np.random.default_rng(0)
    rows = [
        {
            "step": step,
            "loss": 0.69 * math.exp(-step / 200) + rng.normal(0, 0.05),
            "rewards/chosen": rng.normal(-0.1, 0.1),
            "rewards/rejected": rng.normal(-1.0, 0.1),
            "gradient_norm": rng.uniform(1, 3),
            "learning_rate": 5e-6 * (1 - step / 300),
        }
        for step in range(300)
    ]
    return rows + [
        {"step": step, "eval/loss": 0.6, "eval/kl": step / 50, "eval/kl_stderr": 0.3}
        for step in range(0, 300, 50)
    ]


DRAWINGS = {
    "win_rates": lambda stem: win_rate_figure(win_rate_rows(), stem),
    "head_to_head": lambda stem: head_to_head_figure(head_to_head_rows(), stem),
    "training": lambda stem: training_curves_figure(training_curves(), stem),
    "reward_kl": lambda stem: reward_kl_figure(reward_points(), stem),
    "run": lambda stem: run_curves_figure(run_metrics(), stem),
}
every_figure = pytest.mark.parametrize("draw", DRAWINGS.values(), ids=DRAWINGS)


@pytest.fixture
def drawn(monkeypatch, tmp_path):
    """Draw, and give the figure as it was saved."""

    def capture(draw):
        saved = []

        def save(figure, *args):
            saved.append(figure)
            return save_figure(figure, *args)

        save_figure = figures.save_figure
        monkeypatch.setattr(figures, "save_figure", save)
        draw(tmp_path / "figure")
        return saved[0]

    return capture


def read_csv(path):
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def texts(figure):
    """Every visible text with its box in pixels."""
    found = [text for text in figure.findobj(Text) if text.get_visible() and text.get_text()]
    boxes = [(text, Text.get_window_extent(text)) for text in found]
    # Ticks outside the limits exist but are not drawn.
    ticks = {
        tick
        for axes in figure.axes
        for axis in (axes.xaxis, axes.yaxis)
        for kind in ("major", "minor")
        for tick in axis.get_ticklabels(which=kind)
    }
    return [(text.get_text(), box) for text, box in boxes if text not in ticks]


@every_figure
def test_a_figure_is_png_svg_and_csv(draw, tmp_path):
    paths = draw(tmp_path / "new" / "beta0.1")
    assert [path.name for path in paths] == ["beta0.1.png", "beta0.1.svg", "beta0.1.csv"]
    assert paths[0].read_bytes().startswith(b"\x89PNG")
    assert ElementTree.parse(paths[1]).getroot().tag.endswith("svg")
    assert len(read_csv(paths[2])) > 5


@every_figure
def test_the_same_data_give_the_same_bytes(draw, tmp_path):
    first, second = draw(tmp_path / "first"), draw(tmp_path / "second")
    for one, other in zip(first, second, strict=True):
        assert one.read_bytes() == other.read_bytes()


@every_figure
def test_no_text_is_clipped_and_no_texts_overlap(draw, drawn):
    figure = drawn(draw)
    figure.draw_without_rendering()
    page = figure.bbox
    for text, box in texts(figure):
        inside = page.x0 <= box.x0 and box.x1 <= page.x1 and page.y0 <= box.y0 and box.y1 <= page.y1
        assert inside, f"{text!r} is clipped"
    for (text, box), (other, other_box) in combinations(texts(figure), 2):
        assert not box.padded(-1).overlaps(other_box.padded(-1)), f"{text!r} covers {other!r}"


def test_figures_need_no_pyplot(tmp_path):
    code = (
        "import sys; from dpo.report.figures import run_curves_figure as draw;"
        "draw([{'step': s, 'loss': 1.0} for s in range(3)], sys.argv[1]);"
        "sys.exit('matplotlib.pyplot' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "figure")], check=True)
    assert (tmp_path / "figure.png").exists()


def error_bars(axes, index):
    """Ends of the index-th error-bar series of the axes, (N, 2)."""
    (*_, bars) = axes.containers[index].lines[2]
    return np.array([segment[:, 1] for segment in bars.get_segments()])


def row_bars(axes, index):
    """Height of the points and ends of the bars of the index-th series, (N, 3)."""
    points, _, (bars,) = axes.containers[index].lines
    ends = np.array([segment[:, 0] for segment in bars.get_segments()]).reshape(-1, 2)
    return np.column_stack([np.asarray(points.get_ydata(), float), ends])


def test_every_comparison_has_a_row_and_in_it_every_judge_a_bar_which_is_its_interval(drawn):
    figure = drawn(DRAWINGS["head_to_head"])
    models, controls = figure.axes
    for axes, families in ((models, ("chosen", "models")), (controls, ("nulls", "labels"))):
        names = [label.get_text() for label in axes.get_yticklabels()]
        for index, judge in enumerate(("sentence_bert", "endpoint")):
            rows = [r for r in head_to_head_rows() if r.judge == judge and r.family in families]
            known = [row for row in rows if row.win_rate is not None]
            found = row_bars(axes, index)
            assert found[:, 1:] == pytest.approx(
                np.array([(100 * row.low, 100 * row.high) for row in known])
            )
            for row, height in zip(known, found[:, 0], strict=True):
                name = names[-round(height)].replace("\\$", "$")
                assert name.startswith(f"{row.a} against {row.b}")
                assert (row.temperature is None) == ("t =" not in name)
    assert len(models.get_yticklabels()) == 6
    assert len(controls.get_yticklabels()) == 7
    assert len(row_bars(models, 1)) == 4  # nothing but ties: no point


def test_controls_are_hollow_and_models_are_not(drawn):
    models, controls = drawn(DRAWINGS["head_to_head"]).axes
    for index in range(2):
        faces = [
            axes.containers[index].lines[0].get_markerfacecolor() for axes in (models, controls)
        ]
        assert faces == [COLOURS[index], "white"]


def test_a_head_to_head_figure_says_what_its_axis_is_and_holds_the_whole_table(tmp_path, drawn):
    rows = head_to_head_rows()
    figure = drawn(lambda stem: head_to_head_figure(rows, stem))
    assert figure.axes[-1].get_xlabel() == "Win rate of the one named first (%)"
    said = " ".join(text for text, _ in texts(figure))
    assert "n = 80 comparisons" in said
    assert "nothing but ties" in said
    lines = read_csv(tmp_path / "figure.csv")
    assert [(line["judge"], line["a"], line["b"]) for line in lines] == [
        (row.judge, row.a, row.b) for row in rows
    ]
    assert [line["win_rate"] for line in lines] == [
        "" if row.win_rate is None else str(row.win_rate) for row in rows
    ]


def test_without_controls_there_is_one_panel(drawn):
    rows = [row for row in head_to_head_rows() if row.family == "models"]
    assert len(drawn(lambda stem: head_to_head_figure(rows, stem)).axes) == 1


def test_win_rate_bars_are_the_intervals_of_the_table(drawn):
    axes = drawn(DRAWINGS["win_rates"]).axes[0]
    rows = [row for row in win_rate_rows() if row.model == "SFT"]
    expected = [(100 * row.low, 100 * row.high) for row in rows]
    assert error_bars(axes, 0) == pytest.approx(np.array(expected))


def test_win_rate_figure_draws_each_null_response_and_the_fifty_percent_line(drawn):
    figure = drawn(DRAWINGS["win_rates"])
    flat = [line for line in figure.axes[0].lines if len(set(line.get_ydata())) == 1]
    heights = {round(float(line.get_ydata()[0]), 1) for line in flat}
    assert 50.0 in heights
    assert {round(100 * round(rate * 220) / 220, 1) for rate in NULLS.values()} <= heights
    labels = " ".join(text for text, _ in texts(figure))
    assert all(name in labels for name in NULLS)
    assert "n = 220 responses" in labels


def test_the_win_rate_csv_holds_the_table(tmp_path):
    *_, numbers = DRAWINGS["win_rates"](tmp_path / "w")
    rows, table = read_csv(numbers), win_rate_rows()
    assert [float(row["win_rate"]) for row in rows] == [row.win_rate for row in table]
    assert rows[-1]["temperature"] == ""


def test_one_temperature_and_no_nulls_is_a_figure_too(tmp_path):
    assert win_rate_figure([win_rate_row("m", 0.7, 0.5)], tmp_path / "w")[0].exists()


def test_names_with_dollars_and_control_characters_are_drawn_as_text(drawn):
    row = win_rate_row("$x_1$ costs $5\x1b[2J\n_m", 0.7, 0.5)
    figure = drawn(lambda stem: win_rate_figure([row], stem))
    (label,) = (text for text, _ in texts(figure) if "costs" in text)
    assert label == r"\$x_1\$ costs \$5?[2J?_m"


def test_seeds_are_drawn_as_their_mean_and_range(drawn):
    loss_axes, _ = drawn(DRAWINGS["training"]).axes
    runs = np.array([curve.loss for curve in training_curves()[:3]])
    assert loss_axes.containers[0].lines[0].get_ydata() == pytest.approx(runs.mean(axis=0))
    band = loss_axes.collections[0].get_paths()[0].vertices[:, 1]
    assert (band.min(), band.max()) == pytest.approx((runs.min(), runs.max()))


def test_kl_bars_are_the_standard_error_of_the_mean_over_seeds(drawn):
    _, kl_axes = drawn(DRAWINGS["training"]).axes
    low, high = error_bars(kl_axes, 0).T
    assert (high - low) / 2 == pytest.approx(1.96 * training_curves()[0].kl_stderr / 3**0.5, 1e-4)


def test_ln_2_is_drawn_on_the_loss_panel_and_named(drawn):
    figure = drawn(DRAWINGS["training"])
    flat = [line.get_ydata() for line in figure.axes[0].lines if len(set(line.get_ydata())) == 1]
    assert [list(heights) for heights in flat] == [[math.log(2)] * 2]
    assert any("policy\n= reference" in text for text, _ in texts(figure))


def test_a_seed_that_stopped_early_or_skipped_a_measurement_still_counts(drawn):
    nan = math.nan
    runs = [
        TrainingCurve(
            label="a", seed=0, x=[0, 1, 2], loss=[3, 2, 1], kl=[0, nan, 4], kl_stderr=[0] * 3
        ),
        TrainingCurve(label="a", seed=1, x=[0, 1], loss=[3, 4], kl=[0, nan], kl_stderr=[0, 0]),
    ]
    loss_axes, kl_axes = drawn(lambda stem: training_curves_figure(runs, stem)).axes
    assert loss_axes.containers[0].lines[0].get_ydata().tolist() == [3, 3, 1]
    assert kl_axes.containers[0].lines[0].get_xdata().tolist() == [0, 2]


def test_reward_kl_points_have_bars_both_ways_and_one_label_each(drawn):
    figure = drawn(DRAWINGS["reward_kl"])
    (axes,) = figure.axes
    assert all(container.has_xerr and container.has_yerr for container in axes.containers)
    assert sum(text.startswith("\u03b2 = ") for text, _ in texts(figure)) == 10


def test_run_curves_skip_what_was_not_logged(drawn):
    figure = drawn(DRAWINGS["run"])
    titles = [axes.get_title(loc="left") for axes in figure.axes]
    assert titles == [
        "Loss",
        "Reward (nats)",
        "On-policy KL (nats)",
        "Gradient norm",
        "Learning rate",
    ]


def test_run_curves_leave_out_values_that_are_not_finite_numbers(tmp_path):
    values = [0.7, math.nan, math.inf, None, "NaN", 0.6]
    rows = [{"step": step, "loss": value} for step, value in enumerate(values)]
    *_, numbers = run_curves_figure([*rows, {"event": "saved"}], tmp_path / "run")
    assert [(row["step"], row["value"]) for row in read_csv(numbers)] == [
        ("0.0", "0.7"),
        ("5.0", "0.6"),
    ]


@pytest.mark.parametrize(
    "draw",
    [
        lambda stem: win_rate_figure([win_rate_row("null", None, 0.5, kind="null")], stem),
        lambda stem: training_curves_figure([], stem),
        lambda stem: training_curves_figure(
            [TrainingCurve(label="a", seed=0, x=[0], loss=[1, 2], kl=[0], kl_stderr=[0])], stem
        ),
        lambda stem: reward_kl_figure([], stem),
        lambda stem: run_curves_figure([{"step": 1, "unknown": 2.0}], stem),
    ],
)
def test_nothing_to_draw_is_an_input_error_and_no_file(draw, tmp_path):
    with pytest.raises(InputError):
        draw(tmp_path / "figure")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_made_is_a_storage_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="cannot be written: a file of that name"):
        reward_kl_figure(reward_points(), tmp_path / "file" / "figure")


def test_a_figure_that_cannot_be_written_leaves_the_older_one_and_no_part(tmp_path, monkeypatch):
    drawn = reward_kl_figure(reward_points(), tmp_path / "figure")
    before = {path.name: path.read_bytes() for path in drawn}

    def full(descriptor):
        raise OSError(errno.ENOSPC, "")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageError, match=r"figure\.png cannot be written: the disk is full\."):
        reward_kl_figure(reward_points()[:1], tmp_path / "figure")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@given(st.lists(st.floats(0, 1), max_size=12), st.floats(0.001, 0.2))
def test_spread_labels_keep_their_order_and_distance(positions, gap):
    moved = spread(positions, gap)
    order = sorted(range(len(positions)), key=lambda i: positions[i])
    for below, above in pairwise(order):
        assert moved[above] - moved[below] >= gap - 1e-9
    assert sum(moved) == pytest.approx(sum(positions))


def test_labels_with_room_stay_where_they_are():
    assert spread([0.9, 0.1, 0.5], 0.3) == [0.9, 0.1, 0.5]


def test_the_colours_are_distinct():
    assert len(set(COLOURS)) == len(COLOURS)
