"""The atlas as tables for a terminal, a pipe or a file."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich.console import Console
from rich.table import Table

from export.atlas import Atlas, EqualRow
from export.bench_rows import CodecRow

WIDTH = 200  # where there is no terminal: a table in a file must not be folded to a width that nobody has
LEFT = ("after", "codec", "best rival", "rank")  # words; the other columns are numbers


def show(atlas: Atlas) -> None:
    """Print everything that was measured."""
    console = Console(highlight=False, markup=False)
    if not console.is_terminal:
        console = Console(width=WIDTH, highlight=False, markup=False)
    if atlas.verdict is not None:
        console.print(atlas.verdict.sentence, style="bold", soft_wrap=True)
        console.print()
    for heading, titles, rows in tables(atlas):
        console.print(heading, soft_wrap=True)
        table = Table(box=None, pad_edge=False, header_style="bold")
        for title in titles:
            table.add_column(title, no_wrap=True, justify="left" if title in LEFT else "right")
        for row in rows:
            table.add_row(*row)
        console.print(table)
        console.print()


def tables(atlas: Atlas) -> Iterable[tuple[str, Sequence[str], list[list[str]]]]:
    """Every table: heading, titles, rows of text. The page shows the same."""
    if atlas.rows and atlas.ceiling is not None:
        ceiling = atlas.ceiling
        yield (
            f"Agreement with the whole float model. The segments without any codec: {_share(ceiling)}, n {ceiling.n}, "
            f"{atlas.distance_is} {ceiling.kl_mean:.3f}",
            (
                "cut",
                "after",
                "codec",
                "rate",
                "bytes p50",
                "p95",
                "mean",
                "agreement [95 %]",
                atlas.distance_is,
                "encode ms",
                "decode ms",
            ),
            [_codec(row) for row in atlas.rows],
        )
    for ways, quality, words in (
        (("features", "picture"), "agreement", "Mean bytes of a frame at equal agreement"),
        (
            ("stream", "video"),
            "kl",
            f"Every frame of a clip sent: mean bytes of one at equal {atlas.distance_is} from the whole model",
        ),
        (("stream", "video"), "agreement", "Every frame of a clip sent: mean bytes of one at equal agreement"),
    ):
        compared = [row for row in atlas.equal if row.way in ways and row.quality == quality]
        # A rival that does not get there, and features as they are beside a codec, are not worth a line.
        rated = {row.cut for row in compared if row.way == ways[0] and row.codec != "raw"}
        rows = [
            row
            for row in compared
            if (row.bytes_mean is not None if row.way == ways[1] else row.codec != "raw" or row.cut not in rated)
        ]
        if rows:
            yield (
                f"{words}, read off the measured curves [95 % of bootstrap draws]",
                (
                    "cut",
                    "after",
                    "codec",
                    atlas.distance_is if quality == "kl" else quality,
                    "bytes",
                    "best rival",
                    "its bytes",
                    "times fewer",
                ),
                [_equal(row) for row in rows],
            )
    if atlas.times:
        yield (
            "What the device has done when features leave",
            ("cut", "after", "ms", "of the time", "of the MACs"),
            [
                [str(row.cut), row.after, f"{row.before_ms:.2f}", f"{row.time_ratio:.0%}", f"{row.macs_ratio:.0%}"]
                for row in atlas.times
            ],
        )
    if atlas.exits:
        yield (
            "Exits as the cascade runs; withheld: an exit is sure, but the frame is unlike those it knows",
            ("wanted", "cut", "after", "threshold", "reached", "answered", "agreement [95 %]", "withheld"),
            [
                [
                    f"{row.target:g}",
                    str(row.cut),
                    row.after,
                    "never" if row.threshold is None else f"{row.threshold:.3f}",
                    str(row.reached),
                    str(row.answered),
                    _agreement(row.agreement, row.low, row.high),
                    str(row.withheld),
                ]
                for row in atlas.exits
            ],
        )
    promised = [row for row in atlas.exits if row.owed is not None]
    if promised:
        yield (
            "What exits up to each cut answer; wanted is the share of frames with something that are not missed",
            ("wanted", "cut", "empty frames answered", "frames with something missed", "at most, 95 %"),
            [
                [
                    f"{row.target:g}",
                    str(row.cut),
                    f"{row.spared} of {row.n - (row.owed or 0)}",
                    f"{row.missed} of {row.owed}",
                    "" if row.missed_high is None else f"{row.missed_high:.2%}",
                ]
                for row in promised
            ],
        )
    if atlas.cascade:
        yield (
            "All exits together; what is wanted is the agreement of the frames that early exits answer",
            (
                "wanted",
                "answered early",
                "their agreement [95 %]",
                "of all frames [95 %]",
                "MACs saved",
                "answered at cut",
            ),
            [
                [
                    f"{row.target:g}",
                    f"{row.answered} of {row.n}",
                    _agreement(row.agreement, row.low, row.high),
                    _agreement(row.all_agreement, row.all_low, row.all_high),
                    f"{row.macs_saved_ratio:.0%}",
                    ", ".join(f"{cut}: {share:.0%}" for cut, share in row.answered_ratio.items()),
                ]
                for row in atlas.cascade
            ],
        )
    if atlas.variants:
        titles = list(atlas.variants[0])
        yield "Variants of segments", titles, [[_value(row.get(key)) for key in titles] for row in atlas.variants]


def _codec(row: CodecRow) -> list[str]:
    return [
        str(row.cut),
        row.after,
        row.name + (" between frames" if row.way == "stream" else ""),
        f"{row.parameter:g}",
        f"{row.bytes_p50:,}",
        f"{row.bytes_p95:,}",
        f"{row.bytes_mean:,.0f}",
        _share(row),
        f"{row.kl_mean:.3f}",
        _ms(row.encode_ms),
        _ms(row.decode_ms),
    ]


def _equal(row: EqualRow) -> list[str]:
    ratio = "" if row.ratio is None else f"{row.ratio:.2f} {_span(row.ratio_low, row.ratio_high, '.2f')}"
    return [
        str(row.cut),
        row.after,
        row.codec,
        f"{row.wanted:.2f}",
        _bytes(row.bytes_mean, row.bytes_low, row.bytes_high, at_most=row.at_most),
        row.rival or "none",
        _bytes(row.rival_bytes_mean, row.rival_bytes_low, row.rival_bytes_high, at_most=row.rival_at_most),
        ratio,
    ]


def _bytes(value: float | None, low: float | None, high: float | None, *, at_most: bool) -> str:
    if value is None:
        return "not reached"
    return f"{'≤ ' if at_most else ''}{value:,.0f} {_span(low, high, ',.0f')}"


def _span(low: float | None, high: float | None, form: str) -> str:
    return f"[{'open' if low is None else format(low, form)}, {'open' if high is None else format(high, form)}]"


def _share(row: CodecRow) -> str:
    return _agreement(row.agreement, row.low, row.high)


def _agreement(value: float | None, low: float | None, high: float | None) -> str:
    return "" if value is None else f"{value:.3f} [{low:.3f}, {high:.3f}]"


def _ms(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _value(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.3f}"
    return "" if value is None else str(value)
