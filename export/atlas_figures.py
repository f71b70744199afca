"""The figures of the atlas: agreement against bytes, bytes against device time, exits, and a clip."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence

from matplotlib.axes import Axes
from matplotlib.ticker import MultipleLocator, PercentFormatter

from export.atlas import Atlas, EqualRow
from export.atlas_svg import GROUND, MUTED, Label, beside, figure, fit, log_ticks, series, style, to_svg
from export.bench_rows import CodecRow

WIDE, NARROW = (1040, 500), (350, 430)
HALF, NARROW_HALF = (505, 400), (350, 350)
DASHES = ((0, (5, 2)), (0, (2, 1.5)), (0, (6, 2, 1.5, 2)), (0, (1, 1)))
FAR = 1.3  # of the whole model's time: where the axis of device time ends
FULL_SIZE = ("JPEG", "WebP", "AVIF")
LEAST_AGREEMENT = 0.8  # a figure reaches down to here, or to the least of the features

Curve = list[CodecRow]


def frontier(atlas: Atlas, prefix: str, *, wide: bool) -> str:
    """Agreement against bytes: a line a cut, pictures in grey."""
    lines = curves_of(row for row in atlas.rows if row.way == "features" and row.cut > 0)
    rivals = curves_of(row for row in atlas.rows if row.way == "picture")
    low = min([LEAST_AGREEMENT, *(row.agreement - 0.02 for rows in lines for row in rows)])
    low = max(0.0, math.floor(low * 20) / 20)
    with style():
        made, axes = figure(*(WIDE if wide else NARROW))
        labels = _rival_lines(axes, rivals, low)
        rated = [rows for rows in lines if not _is_plain(rows, lines)]
        _bytes_axis(
            axes, [row.bytes_mean for rows in (*rated, *rivals) for row in rows if row.agreement >= low], wide=wide
        )
        for rows in lines:
            colour, marker = series(_place(atlas, rows[0].cut))
            sizes, shares = [row.bytes_mean for row in rows], [row.agreement for row in rows]
            if rows not in rated:
                axes.plot(sizes, shares, color=colour, marker=marker, markerfacecolor="none", markeredgewidth=1.5)
                continue
            for row in rows:
                axes.plot([row.bytes_mean] * 2, [row.low, row.high], color=colour, lw=1, alpha=0.35)
            axes.plot(sizes, shares, color=colour, marker=marker, markeredgecolor=GROUND, zorder=4)
            top = max(rows, key=lambda row: (row.agreement, -row.bytes_mean))
            labels.append(Label(top.bytes_mean, top.agreement, _name(rows, rated), colour))
        axes.set_ylim(low, 1.004)
        _percent(axes, "agreement with the whole model")
        if atlas.ceiling is not None and atlas.ceiling.agreement < 1:
            axes.axhline(atlas.ceiling.agreement, color=MUTED, lw=0.8, ls=(0, (1, 2)), zorder=1)
            words = f"segments without codec {atlas.ceiling.agreement:.1%}"
            axes.text(axes.get_xlim()[0], atlas.ceiling.agreement, words, color=MUTED, fontsize=11, va="bottom")
        fit(made, axes, labels)
        return to_svg(made, prefix, "Agreement with the whole model against bytes, a line a cut, pictures in grey")


def trade(atlas: Atlas, wanted: float, prefix: str, *, wide: bool) -> str:
    """Bytes at one agreement against the device's time: where each cut stands between sending and computing."""
    whole = atlas.times[-1].before_ms
    rows = [row for row in cheapest(atlas.equal) if row.wanted == wanted and row.bytes_mean is not None]
    before = {time.cut: time.before_ms for time in atlas.times}
    points = [
        (
            (before[row.cut] + _encode_ms(atlas, row)) / whole,
            row.bytes_mean or 1.0,
            row.bytes_low or row.bytes_mean or 1.0,
            row.bytes_high or row.bytes_mean or 1.0,
            row.after,
            *series(_place(atlas, row.cut)),
        )
        for row in rows
    ]
    for row in atlas.equal:
        if row.way == "picture" and row.wanted == wanted and row.codec in FULL_SIZE and row.bytes_mean is not None:
            encode_ms = _encode_ms(atlas, row)
            words = row.codec if encode_ms < FAR * whole else f"{row.codec}, {encode_ms:.0f} ms"
            low, high = row.bytes_low or row.bytes_mean, row.bytes_high or row.bytes_mean
            points.append((encode_ms / whole, row.bytes_mean, low, high, words, MUTED, "X"))
    sizes = [size for _, size, *_ in points]
    with style():
        made, axes = figure(*(HALF if wide else NARROW_HALF))
        axes.set_yscale("log")
        axes.set_ylim(min(sizes) / 3, max(sizes) * 1.8)
        axes.set_xlim(0, FAR)
        log_ticks(axes.yaxis, min(sizes) / 3, max(sizes) * 1.8, dense=True)
        axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        axes.grid(axis="y")
        axes.axvline(1, color=MUTED, lw=1, ls=(0, (2, 2)), zorder=1)
        axes.text(0.985, min(sizes) / 2.7, "all on the device,\nnothing to send", color=MUTED, ha="right", va="bottom")
        axes.set_xlabel(f"device time: segments and encoding, of {whole:.1f} ms")
        axes.set_ylabel(f"mean bytes at {wanted:.0%} agreement")
        fit(made, axes, left=74)
        for x, size, least, most, _, colour, marker in points:
            if x > FAR:
                marker, x = ">", FAR  # outside, where the words say how far
            axes.plot([x, x], [least, most], color=colour, lw=1.2, alpha=0.5, clip_on=False)
            axes.plot([x], [size], marker=marker, color=colour, markersize=9, markeredgecolor=GROUND, clip_on=False)
        beside(
            axes,
            [
                Label(min(x, FAR), size, f"{words}\n{size:,.0f} bytes", colour)
                for x, size, _, _, words, colour, _ in points
            ],
        )
        return to_svg(made, prefix, f"Bytes at {wanted:.0%} agreement against the time the device works, a point a cut")


def exits(atlas: Atlas, prefix: str, *, wide: bool) -> str:
    """Agreement among answered frames against their share, a line an exit; a dot where its threshold puts it."""
    target = max(row.target for row in atlas.alone)
    # Every exit shows, if only by its best frames.
    low = max(0.0, math.floor(20 * min([target - 0.15, *(max(line.agreement) - 0.05 for line in atlas.sweeps)])) / 20)
    with style():
        made, axes = figure(*(HALF if wide else NARROW_HALF))
        labels: list[Label] = []
        for sweep in atlas.sweeps:
            colour, _ = series(_place(atlas, sweep.cut))
            axes.plot(sweep.coverage, sweep.agreement, color=colour)
            inside = [(x, y) for x, y in zip(sweep.coverage, sweep.agreement, strict=True) if y >= low + 0.01]
            if inside:
                labels.append(Label(*inside[-1], sweep.after, colour))
        for row in atlas.alone:
            if row.agreement is not None and row.target == target:
                colour, marker = series(_place(atlas, row.cut))
                axes.plot([row.coverage] * 2, [row.low or 0, row.high or 1], color=colour, lw=1.2, alpha=0.5)
                axes.plot([row.coverage], [row.agreement], marker=marker, color=colour, markersize=9, mec=GROUND)
        axes.axhline(target, color=MUTED, lw=1, ls=(0, (2, 2)), zorder=1)
        axes.text(1.02, target, f"{target:.0%} wanted", color=MUTED, ha="right", va="bottom", fontsize=11)
        axes.set_xlim(0, 1.02)
        axes.set_ylim(low, 1.004)
        axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        axes.set_xlabel("share of frames that the exit answers")
        _percent(axes, "of them equal to the whole model's")
        fit(made, axes)
        beside(axes, labels)
        return to_svg(made, prefix, "Agreement among answered frames against their share, a line an exit")


def clip(atlas: Atlas, prefix: str, *, wide: bool) -> str:
    """Distance from the whole model against bytes, every frame of a clip sent: features and video codecs."""
    lines = curves_of(row for row in atlas.rows if row.way == "stream")
    rivals = curves_of(row for row in atlas.rows if row.way == "video")
    rows = [row for group in (*lines, *rivals) for row in group]
    values = [max(row.kl_mean, 1e-6) for row in rows]
    with style():
        made, axes = figure(*((WIDE[0], 420) if wide else NARROW))
        labels: list[Label] = []
        for group, dash in zip((*rivals, *lines), (*DASHES[: len(rivals)], *["-"] * len(lines)), strict=True):
            video = group[0].way == "video"
            colour, marker = (MUTED, "") if video else series(_place(atlas, group[0].cut))
            sizes, kl = [row.bytes_mean for row in group], [max(row.kl_mean, 1e-6) for row in group]
            axes.plot(sizes, kl, color=colour, marker=marker, markeredgecolor=GROUND, ls=dash)
            labels.append(Label(sizes[-1], kl[-1], group[0].name if video else _name(group, lines), colour))
        axes.set_yscale("log")
        axes.set_ylim(max(values) * 1.2, min(values) / 1.2)  # better is higher, as in the other figures
        log_ticks(axes.yaxis, min(values) / 1.2, max(values) * 1.2, dense=True)
        _bytes_axis(axes, [row.bytes_mean for row in rows], wide=wide)
        axes.grid(axis="y")
        axes.set_ylabel(f"{atlas.distance_is} from the whole model")
        fit(made, axes, labels)
        return to_svg(made, prefix, f"{atlas.distance_is} from the whole model against bytes of a frame in a clip")


def curves_of(rows: Iterable[CodecRow]) -> list[Curve]:
    """Rows by curve, each in the order of its bytes."""
    grouped: dict[object, Curve] = {}
    for row in rows:
        grouped.setdefault(row.curve, []).append(row)
    return [sorted(group, key=lambda row: row.bytes_mean) for group in grouped.values()]


def cheapest(rows: Sequence[EqualRow]) -> list[EqualRow]:
    """Of the codecs of a cut at each agreement, the one that needs the fewest bytes."""
    best: dict[tuple[int, float], EqualRow] = {}
    for row in rows:
        if row.way == "features" and row.quality == "agreement":
            known = best.get((row.cut, row.wanted))
            if known is None or (row.bytes_mean or math.inf) < (known.bytes_mean or math.inf):
                best[row.cut, row.wanted] = row
    return list(best.values())


def _is_plain(rows: Curve, lines: Sequence[Curve]) -> bool:
    """Whether these are features as they are, at a cut that has a codec with rates as well."""
    return len(rows) == 1 and any(other[0].cut == rows[0].cut and len(other) > 1 for other in lines)


def _rival_lines(axes: Axes, rivals: Sequence[Curve], low: float) -> list[Label]:
    """Pictures in grey: at the model's size with a name each, those shrunk first faint and with one name."""
    labels: list[Label] = []
    dashes = iter(DASHES * len(rivals))
    tops = [max(rows, key=lambda row: row.agreement) for rows in rivals]
    named = {top.side_px: top for top in sorted(tops, key=lambda top: top.agreement)}  # the best of each size
    for rows in rivals:
        sizes, shares = [row.bytes_mean for row in rows], [row.agreement for row in rows]
        top = max(rows, key=lambda row: (row.agreement, -row.bytes_mean))
        if rows[0].side_px is None:
            axes.plot(sizes, shares, color=MUTED, ls=next(dashes), lw=1.6, zorder=2)
            labels.append(Label(top.bytes_mean, top.agreement, top.codec, MUTED))
        else:
            axes.plot(sizes, shares, color=MUTED, lw=0.9, alpha=0.55, zorder=1)
            if top is named[top.side_px] and top.agreement >= low:
                words = f" {top.side_px} px"
                axes.text(top.bytes_mean, top.agreement, words, color=MUTED, alpha=0.8, fontsize=10, va="center")
    return labels


def _bytes_axis(axes: Axes, sizes: Sequence[float], *, wide: bool) -> None:
    low, high = min(sizes) / 1.25, max(sizes) * 1.25
    axes.set_xscale("log")
    axes.set_xlim(low, high)
    log_ticks(axes.xaxis, low, high, dense=wide)
    axes.set_xlabel("mean bytes of a frame on the wire (log scale)")


def _percent(axes: Axes, words: str) -> None:
    low, high = axes.get_ylim()
    axes.yaxis.set_major_locator(MultipleLocator(0.05 if high - low < 0.4 else 0.2))
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.grid(axis="y")
    axes.set_ylabel(words)


def _place(atlas: Atlas, cut: int) -> int:
    """A cut has one colour in every figure."""
    return [time.cut for time in atlas.times].index(cut)


def _name(rows: Curve, lines: Sequence[Curve]) -> str:
    alone = sum(other[0].cut == rows[0].cut for other in lines) == 1
    return rows[0].after if alone else f"{rows[0].after}, {rows[0].codec}"


def _encode_ms(atlas: Atlas, wanted: EqualRow) -> float:
    return _median_ms(
        row for row in atlas.rows if (row.way, row.cut, row.name) == (wanted.way, wanted.cut, wanted.codec)
    )


def _median_ms(rows: Iterable[CodecRow]) -> float:
    return statistics.median([row.encode_ms or 0.0 for row in rows])
