"""One look for every figure: sizes, colours, labels that do not overlap, and the files on disk.

Figures are built from `Figure` objects, never through pyplot, so that nothing is global and no
display is needed. Each figure is saved as PNG and SVG, beside the CSV it was drawn from.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from dpo.atomic import replace_file, storage_errors, write_text
from dpo.core.stats import Interval

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.text import Annotation

Boxes = NDArray[np.float64]
"""Rows of (left, bottom, right, top), (N, 4)."""

SINGLE_COLUMN, DOUBLE_COLUMN = 3.4, 7.0
"""Widths in inches, as in most two-column papers."""

DPI = 160

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""Okabe and Ito 2008, Color universal design, without the yellow that vanishes on white."""

MARKERS = ("o", "s", "^", "D", "v", "P", "X")
"""One for each colour, so that a grey print still tells the lines apart."""

INK, MUTED, FAINT = "0.15", "0.42", "0.88"
"""Greys for text, for what is in the background, and for the grid."""

_RC: dict[str, Any] = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],  # ships with matplotlib: the same on every machine
    "font.size": 8.0,
    "axes.titlesize": 8.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.labelsize": 8.0,
    "axes.labelcolor": INK,
    "axes.edgecolor": MUTED,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": FAINT,
    "grid.linewidth": 0.5,
    "xtick.labelsize": 7.5,
    "ytick.labelsize": 7.5,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "xtick.major.size": 2.5,
    "ytick.major.size": 2.5,
    "lines.linewidth": 1.4,
    "lines.markersize": 4.0,
    "legend.frameon": False,
    "legend.fontsize": 7.5,
    "legend.handlelength": 1.6,
    "legend.columnspacing": 1.4,
    "text.color": INK,
    "svg.hashsalt": "dpo",  # the same data give the same bytes
}


@contextmanager
def paper_style() -> Iterator[None]:
    """Everything made and saved inside the block has the look."""
    import matplotlib

    with matplotlib.rc_context(_RC):  # type: ignore[arg-type]
        yield


def new_figure(width: float, height: float) -> Figure:
    """An empty figure, sizes in inches, that makes room for whatever stands around its axes."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def look(index: int) -> dict[str, Any]:
    """Colour and marker of the series with that index; beyond seven the pairing shifts."""
    shift = index // len(COLOURS)
    return {
        "color": COLOURS[index % len(COLOURS)],
        "marker": MARKERS[(index + shift) % len(MARKERS)],
    }


def plain(text: str) -> str:
    """User text for a figure: no mathematics between dollars, no control characters."""
    return "".join(c if c.isprintable() else "?" for c in text).replace("$", r"\$")


def caption(figure: Figure, text: str) -> None:
    """A small grey line under the figure: what the bars are, and n."""
    figure.supxlabel(text, x=0.01, ha="left", fontsize=6.8, color=MUTED)


def draw_intervals(
    axes: Axes,
    heights: Sequence[float],
    shares: Sequence[float],
    intervals: Sequence[Interval],
    index: int,
    *,
    label: str | None = None,
    filled: bool = True,
) -> None:
    """Shares with their intervals, in per cent, as points with bars at those heights; colour and
    marker are those of the series with that index.
    """
    values = 100 * np.array(shares)
    ends = 100 * np.array([tuple(interval) for interval in intervals]).reshape(-1, 2)
    errors = np.maximum([values - ends[:, 0], ends[:, 1] - values], 0)
    style = look(index) | {"ls": ""} | ({} if filled else {"mfc": "white"})
    axes.errorbar(values, heights, xerr=errors, label=label, elinewidth=1.1, zorder=3, **style)


def name_rows(axes: Axes, labels: Sequence[str]) -> None:
    """Make room for a row for each label, the first on top at height 0, the next at -1, ..."""
    axes.set_yticks(-np.arange(len(labels)), labels)
    axes.set_ylim(-len(labels) + 0.4, 0.6)


def label_right(axes: Axes, labels: Sequence[tuple[float, str, str]]) -> None:
    """Write (y, text, colour) labels beside the right edge, moved apart where they would overlap.

    A moved label keeps a thin line to its y. The limits of the axes must be final.
    """
    _lay_out(axes)
    height = axes.get_window_extent().height
    to_fraction = axes.transData + axes.transAxes.inverted()
    at = [float(to_fraction.transform((axes.get_xlim()[0], y))[1]) for y, _, _ in labels]
    gap = 7.5 * 1.3 * axes.figure.dpi / 72 / height
    for (_, text, colour), y, moved in zip(labels, at, spread(at, gap), strict=True):
        axes.annotate(
            text,
            xy=(1.0, y),
            xytext=(1.045, moved),
            xycoords="axes fraction",
            textcoords="axes fraction",
            va="center",
            fontsize=7.0,
            color=colour,
            arrowprops={"arrowstyle": "-", "lw": 0.5, "color": MUTED, "shrinkA": 1, "shrinkB": 0},
        )


def spread(positions: Sequence[float], gap: float) -> list[float]:
    """Move positions as little as it takes to be at least `gap` apart, keeping their order.

    Neighbours that are too near form a block around their mean; blocks that touch are joined.

    >>> spread([0.0, 1.0, 1.0], gap=0.5)
    [0.0, 0.75, 1.25]
    """
    blocks: list[list[int]] = []

    def placed(block: list[int]) -> list[float]:
        centre = sum(positions[i] for i in block) / len(block)
        return [centre + (k - (len(block) - 1) / 2) * gap for k in range(len(block))]

    for i in sorted(range(len(positions)), key=lambda i: positions[i]):
        blocks.append([i])
        while len(blocks) > 1 and placed(blocks[-1])[0] < placed(blocks[-2])[-1] + gap - 1e-12:
            last = blocks.pop()
            blocks[-1] += last
    moved = {i: y for block in blocks for i, y in zip(block, placed(block), strict=True)}
    return [moved[i] for i in range(len(positions))]


def label_points(
    axes: Axes, points: Sequence[tuple[float, float, str, str]], *, obstacles: Boxes
) -> None:
    """Write each (x, y, text, colour) beside its point, where it covers least.

    It should cover no other label, no marker, nothing outside the axes, and, ten times less
    important, no obstacle: boxes in data units, flat ones included. Greedy, in the order given. A
    label that found no room close by keeps a thin line to its point. The limits of the axes must be
    final.
    """
    _lay_out(axes)
    obstacles = _in_pixels(axes, obstacles, pad=2)
    solid = _in_pixels(axes, np.array([(x, y, x, y) for x, y, *_ in points]), pad=6)
    inside = np.array([axes.get_window_extent().extents])
    for x, y, text, colour in points:
        label = axes.annotate(
            text,
            (x, y),
            (0, 0),
            textcoords="offset points",
            fontsize=7.0,
            color=colour,
            arrowprops={"arrowstyle": "-", "lw": 0.5, "color": colour, "shrinkA": 0, "shrinkB": 3},
        )
        label.set_in_layout(False)  # placed in the layout as it is: it must not change it
        boxes = np.array([_moved(label, offset) for offset in _LABEL_OFFSETS])
        outside = _shared(boxes, boxes).diagonal() - _shared(boxes, inside)[:, 0]
        covered = _shared(boxes, solid).sum(axis=1) + outside
        best = int(np.argmin(10 * covered + _shared(boxes, obstacles).sum(axis=1)))
        solid = np.vstack([solid, _moved(label, _LABEL_OFFSETS[best])])
        if label.arrow_patch is not None:
            label.arrow_patch.set_visible(max(map(abs, _LABEL_OFFSETS[best])) > 10)


def _lay_out(axes: Axes) -> None:
    """Let the figure find the places of its parts, so that sizes in pixels are known."""
    from matplotlib.figure import Figure

    figure = axes.figure
    assert isinstance(figure, Figure)
    figure.draw_without_rendering()


_LABEL_OFFSETS = [
    (distance * side, distance * up)
    for distance, side, up in product((5, 10, 16, 24, 32), (1, -1, 0), (1, -1, 0))
    if (side, up) != (0, 0)
]


def _moved(label: Annotation, offset: tuple[int, int]) -> tuple[float, ...]:
    """Put the label at that offset in points, aligned away from its point; its box in pixels."""
    from matplotlib.text import Text

    right, up = offset
    label.xyann = offset
    label.set_horizontalalignment("left" if right > 0 else "right" if right < 0 else "center")
    label.set_verticalalignment("bottom" if up > 0 else "top" if up < 0 else "center")
    label.get_window_extent()  # moves the text; its own box has the line to the point in it
    return Text.get_window_extent(label).extents


def _in_pixels(axes: Axes, boxes: Boxes, *, pad: float) -> Boxes:
    corners = axes.transData.transform(boxes.reshape(-1, 2)).reshape(-1, 4)
    return corners + pad * np.array([-1, -1, 1, 1])


def _shared(boxes: Boxes, others: Boxes) -> NDArray[np.float64]:
    """Area that each box shares with each other one, (N, M)."""
    low = np.maximum(boxes[:, None, :2], others[None, :, :2])
    high = np.minimum(boxes[:, None, 2:], others[None, :, 2:])
    area: NDArray[np.float64] = np.prod(np.maximum(high - low, 0.0), axis=2)
    return area


def save_figure(
    figure: Figure, stem: Path | str, header: Sequence[str], rows: Sequence[Sequence[object]]
) -> list[Path]:
    """Write stem.png, stem.svg and, with the numbers that were drawn, stem.csv, each whole.

    Raises:
        StorageError: when a file cannot be written.
    """
    paths = [Path(f"{stem}{suffix}") for suffix in (".png", ".svg", ".csv")]
    image, drawing, numbers = paths
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    with storage_errors(image.parent):
        image.parent.mkdir(parents=True, exist_ok=True)
    with replace_file(image) as temporary:
        figure.savefig(temporary, format="png", dpi=DPI)
    with replace_file(drawing) as temporary:
        figure.savefig(temporary, format="svg", metadata={"Date": None})
    write_text(numbers, text.getvalue(), errors="backslashreplace")
    return paths
