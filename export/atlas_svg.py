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
    """Labels with where each begins and ends, in pixels, row by row from the lowest."""
    left, right = axes.transAxes.transform([(0, 0), (1, 0)])[:, 0]
    rows: list[list[tuple[Label, float, float]]] = []
    for label in sorted(labels, key=lambda label: label.x):
        x = float(axes.transData.transform((label.x, label.y))[0])
        width = LETTER * len(label.words) + 10
        start = min(max(x - width / 2, left), max(left, right - width))
        free = [row for row in rows if all(start >= end or start + width <= other for _, other, end in row)]
        if not free:
            free = [[]]
            rows += free
        free[0].append((label, start, start + width))
    return rows


def beside(axes: Axes, x: float, y: float, words: str, colour: str) -> None:
    """Words beside a point: to its right, or to its left where there is no room."""
    share = float(axes.transAxes.inverted().transform(axes.transData.transform((x, y)))[0])
    right = share < 0.62
    axes.annotate(
        words,
        (x, y),
        xytext=(9 if right else -9, 0),
        textcoords="offset points",
        ha="left" if right else "right",
        va="center",
        color=colour,
        fontweight="bold" if colour in SERIES else "normal",
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
