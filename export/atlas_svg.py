"""Figures by matplotlib as SVG that stands inside a page: its text in the page's font, its colours the page's own."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

# Drawn in stand-ins that nothing else uses; in the page each is a variable, so that light and dark need one drawing.
INK, MUTED, GRID, GROUND = "#010001", "#010002", "#010003", "#010004"
SERIES = ("#020001", "#020002", "#020003", "#020004", "#020005", "#020006")
VARIABLES = {INK: "ink", MUTED: "muted", GRID: "grid", GROUND: "ground"} | {
    colour: f"series{place}" for place, colour in enumerate(SERIES)
}
MARKERS = ("o", "s", "D", "^", "v", "P")
PIXELS = 72  # an inch, so that sizes in points are sizes in pixels
BELOW = 48  # for ticks and the words under them
ROW = 17  # of labels
LETTER = 6.9  # the width of one in the page's font, near enough

STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "kinflow",
    "font.family": "DejaVu Sans",
    "font.size": 12,
    "text.color": INK,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": MUTED,
    "axes.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.axisbelow": True,
    "axes.labelsize": 12,
    "axes.linewidth": 0.8,
    "figure.facecolor": "none",
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelsize": 11,
    "ytick.labelsize": 11,
    "ytick.major.size": 0,
    "xtick.minor.size": 0,
    "lines.linewidth": 2,
    "lines.markersize": 6,
    "path.simplify": False,
}


@dataclass(frozen=True, slots=True)
class Label:
    """Words for a point, to be put above the axes with a thin line down to it."""

    x: float
    y: float
    words: str
    colour: str


@contextmanager
def style() -> Iterator[None]:
    """Within it figures are drawn in the page's style."""
    with mpl.rc_context(STYLE):
        yield


def figure(width: int, height: int) -> tuple[Figure, Axes]:
    """A figure of so many pixels with one pair of axes."""
    made = Figure(figsize=(width / PIXELS, height / PIXELS), dpi=PIXELS)
    return made, made.add_subplot()


def series(place: int) -> tuple[str, str]:
    """Colour and marker of the place-th line."""
    return SERIES[place % len(SERIES)], MARKERS[place % len(MARKERS)]


def fit(made: Figure, axes: Axes, labels: Sequence[Label] = (), *, left: int = 66) -> None:
    """Give the axes all of the figure but `left` pixels, a line of words below, and rows for labels above.

    Limits must be final. No label lies over another, each as nearly over its point as can be.
    """
    width, height = (float(value) * PIXELS for value in made.get_size_inches())
    made.subplots_adjust(left=left / width, right=1 - 16 / width, bottom=BELOW / height, top=1 - 10 / height)
    rows = _rows(axes, labels)
    made.subplots_adjust(top=1 - (10 + (ROW * len(rows) + 8 if rows else 0)) / height)
    transform = axes.transData
    top = float(axes.transAxes.transform((0, 1))[1])
    for number, row in enumerate(rows):
        for label, start, end in row:
            x, y = transform.transform((label.x, label.y))
            line = transform.inverted().transform([(x, y), (x, top + 6 + number * ROW)])
            axes.plot(*line.T, color=label.colour, lw=0.8, alpha=0.6, clip_on=False, zorder=1)
            middle, bottom = transform.inverted().transform(((start + end) / 2, top + 8 + number * ROW))
            axes.text(
                middle,
                bottom,
                label.words,
                color=label.colour,
                ha="center",
                va="bottom",
                fontweight="bold" if label.colour in SERIES else "normal",
            )


def _rows(axes: Axes, labels: Sequence[Label]) -> list[list[tuple[Label, float, float]]]:
    """Labels with where each begins and ends, in pixels, row by row from the lowest.

    A label's line down to its point crosses no label of the rows below where that can be helped.
    """
    left, right = (float(x) for x in axes.transAxes.transform([(0, 0), (1, 0)])[:, 0])
    placed: list[tuple[int, float, float, float, Label]] = []  # row, start, end, where its line stands
    for label in sorted(labels, key=lambda label: label.x):
        x = float(axes.transData.transform((label.x, label.y))[0])
        width = LETTER * len(label.words) + 10
        starts = [min(max(x - width * share, left), max(left, right + 10 - width)) for share in (0.5, 0.8, 0.2, 1.1)]

        def fault(place: tuple[int, float], x: float = x, width: float = width) -> float:
            row, start = place
            over = sum(
                8.0 * (row == other and start < end and start + width > begin)
                + (row > other and begin - 3 < x < end + 3)
                + (row < other and start - 3 < line < start + width + 3)
                for other, begin, end, line, _ in placed
            )
            return over + 0.1 * row + 0.002 * abs(start + width / 2 - x)

        row, start = min(((row, start) for row in range(len(labels)) for start in starts), key=fault)
        placed.append((row, start, start + width, x, label))
    rows: list[list[tuple[Label, float, float]]] = [[] for _ in range(max((row for row, *_ in placed), default=-1) + 1)]
    for row, start, end, _, label in placed:
        rows[row].append((label, start, end))
    return rows


def beside(axes: Axes, labels: Sequence[Label]) -> None:
    """Words beside their points, within the axes; none over another or over a point where that can be helped."""
    points = [tuple(map(float, axes.transData.transform((label.x, label.y)))) for label in labels]
    left, right = (float(x) for x in axes.transAxes.transform([(0, 0), (1, 0)])[:, 0])
    taken = [(x - 5, y - 5, x + 5, y + 5) for x, y in points]
    for label, (x, y) in zip(labels, points, strict=True):
        lines = label.words.split("\n")
        width, height = LETTER * max(map(len, lines)), 15.0 * len(lines)
        boxes = [
            (x + 9 if to_right else x - 9 - width, y + up - height / 2, to_right, up)
            for up in (0.0, height * 0.7, -height * 0.7, height * 1.3, -height * 1.3)
            for to_right in (True, False)
        ]

        def fault(box: tuple[float, float, bool, float], width: float = width, height: float = height) -> float:
            start, bottom, _, up = box
            over = sum(
                max(0.0, min(start + width, far) - max(start, near))
                * max(0.0, min(bottom + height, high) - max(bottom, low))
                for near, low, far, high in taken
            )
            outside = max(0.0, left - start) + max(0.0, start + width - right)
            return over + 100 * outside + abs(up) / 10

        start, bottom, to_right, up = min(boxes, key=fault)
        taken.append((start, bottom, start + width, bottom + height))
        axes.annotate(
            label.words,
            (label.x, label.y),
            xytext=(9 if to_right else -9, up),
            textcoords="offset points",
            ha="left" if to_right else "right",
            va="center",
            color=label.colour,
            fontweight="bold" if label.colour in SERIES else "normal",
            linespacing=1.15,
        )


def log_ticks(axis: Axis, low: float, high: float, *, dense: bool) -> None:
    """Ticks at round numbers of a log scale, as plain numbers."""
    steps = (1, 2, 5) if dense else (1, 3)
    exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ticks = [step * 10.0**exponent for exponent in exponents for step in steps]
    axis.set_major_locator(FixedLocator([tick for tick in ticks if low <= tick <= high]))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: plain(value)))


def plain(value: float) -> str:
    """A number for an axis: 20,000 or 0.05."""
    return f"{value:,.0f}" if value >= 1 else f"{value:g}"


def to_svg(made: Figure, prefix: str, words: str) -> str:
    """The figure as an <svg> for a page.

    Args:
        made: drawn within `style`.
        prefix: of every id in it, as ids must be one of a kind in a page.
        words: what it shows, for those who cannot see it.
    """
    buffer = io.StringIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    made.savefig(buffer, format="svg", metadata=nothing)
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'\s+xmlns(:\w+)?="[^"]*"', "", text).replace("xlink:href", "href")
    text = re.sub(r'\bid="', f'id="{prefix}-', text)
    text = re.sub(r'(url\(#|href="#)', rf"\g<1>{prefix}-", text)
    text = re.sub("|".join(VARIABLES), lambda found: f"var(--{VARIABLES[found[0]]})", text)
    text = text.replace("'DejaVu Sans'", "inherit")
    width, height = (round(float(value) * PIXELS) for value in made.get_size_inches())
    opening = f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{words}">'
    return re.sub(r"<svg[^>]*>", lambda _: opening, text, count=1)
