"""The atlas: what each cut, codec, exit and variant of a bundle costs and gives, and whether splitting pays. Pure.

`atlas.json` and `atlas.html` lie in the bundle beside the contract (NOTES in runtime/manifest.py), since measurements
differ from machine to machine.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import msgspec

from export.atlas_curves import Cost, Equal, compare
from export.bench_rows import CodecRow, Point, Way, curves
from export.exits_judge import ExitRow

AGREEMENTS = (0.90, 0.95, 0.98)
DIVERGENCES = (0.2, 0.1, 0.05, 0.02)  # mean KL in nats
DECIDING = (0.95, 0.90)  # where it is decided whether splitting pays: the highest at which some cut surely does
LATE_RATIO = 0.9  # of the whole model's time on the device: what takes longer leaves nothing worth handing over


class EqualRow(msgspec.Struct, frozen=True, kw_only=True):
    """A cut's codec, or a rival, beside the best rival at equal quality, read off the measured curves.

    Bytes are those of a mean frame.
    """

    way: Way
    cut: int
    after: str
    codec: str  # of a rival with its size
    quality: Literal["agreement", "kl"]
    wanted: float
    bytes_mean: float | None  # None: not reached by any rate
    bytes_low: float | None  # 95 % of bootstrap draws of the frames; None: open
    bytes_high: float | None
    at_most: bool  # the cheapest rate is better than asked: less might do
    rival: str | None  # None: no rival reaches it
    rival_bytes_mean: float | None
    rival_bytes_low: float | None
    rival_bytes_high: float | None
    rival_at_most: bool
    ratio: float | None  # rival's bytes by ours
    ratio_low: float | None
    ratio_high: float | None
    encode_ms: float  # median over the curve's rates
    n: int


class CutTime(msgspec.Struct, frozen=True, kw_only=True):
    """What the device has done when features leave at a cut."""

    cut: int
    after: str
    before_ms: float  # the segments before the cut, median of single frames
    time_ratio: float  # of all segments' time
    macs_ratio: float


class Alone(msgspec.Struct, frozen=True, kw_only=True):
    """One exit asked about all judged frames, whatever the exits before it said, at one row of its table."""

    target: float  # the agreement that the threshold was chosen to keep
    cut: int
    coverage: float
    agreement: float | None  # among the answered; None when there were none
    low: float | None
    high: float | None
    answered: int
    n: int


class Sweep(msgspec.Struct, frozen=True, kw_only=True):
    """How an exit's agreement falls as it is made to answer more: its most confident frames first."""

    cut: int
    after: str
    coverage: tuple[float, ...]
    agreement: tuple[float, ...]


class CascadeRow(msgspec.Struct, frozen=True, kw_only=True):
    """All exits together at one target: every frame is answered by the first that dares.

    The target is a promise about the frames that early exits answer.
    """

    target: float
    coverage: float  # of all early exits
    agreement: float | None  # among the frames that early exits answer
    low: float | None
    high: float | None
    answered: int
    n: int
    all_agreement: float  # over all frames
    all_low: float
    all_high: float
    macs_saved_ratio: float  # of the whole model's, over a mean frame; heads that were asked are charged
    answered_ratio: dict[int, float]  # by exit's cut


class Frames(msgspec.Struct, frozen=True, kw_only=True):
    """What was judged on."""

    n: int
    left_out: int  # had a say in the bundle
    checked: bool  # False: the bundle does not tell which frames had
    sources: tuple[str, ...]


class Verdict(msgspec.Struct, frozen=True, kw_only=True):
    """Whether splitting pays, in one sentence."""

    split: bool
    cut: int | None
    wanted: float  # the agreement at which it was decided
    sentence: str


class Atlas(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Everything that was measured; what was not is left out."""

    format: int
    name: str
    bundle: str  # id
    source: str
    target: str
    quantization: str
    machine: dict[str, str]
    threads: int
    frames: Frames
    agreement_is: str  # in words
    distance_is: str  # what `kl_mean` and `kl_p50` of the rows are called
    clip: Frames | None = None
    verdict: Verdict | None = None
    ceiling: CodecRow | None = None  # the segments without any codec
    times: tuple[CutTime, ...] = ()
    rows: tuple[CodecRow, ...] = ()
    equal: tuple[EqualRow, ...] = ()
    exits: tuple[ExitRow, ...] = ()  # as the cascade runs
    alone: tuple[Alone, ...] = ()
    cascade: tuple[CascadeRow, ...] = ()
    sweeps: tuple[Sweep, ...] = ()
    variants: tuple[dict[str, Any], ...] = ()


def to_json(atlas: Atlas) -> bytes:
    """The atlas as JSON, indented."""
    return msgspec.json.format(msgspec.json.encode(atlas), indent=1)


def equal_quality(
    points: Sequence[Point],
    ours: Sequence[Way],
    rivals: Sequence[Way],
    wanted: Sequence[float],
    *,
    by_kl: bool = False,
    seed: int = 0,
) -> tuple[EqualRow, ...]:
    """Every curve beside the best rival curve, at every quality that is `wanted`; rivals among themselves as well."""
    first = {point.row.curve: point.row for point in points}
    everything = curves(points, by_kl=by_kl)
    # Pictures at cut 0 are rivals, whoever encodes them.
    mine = {str(key): curve for key, curve in everything.items() if key[0] in rivals or (key[0] in ours and key[1] > 0)}
    theirs = {first[key].name: curve for key, curve in everything.items() if key[0] in rivals}
    if not mine:
        return ()
    rows: list[EqualRow] = []
    keys = {str(key): key for key in everything}
    encode_ms = {
        name: statistics.median([point.row.encode_ms or 0.0 for point in points if point.row.curve == keys[name]])
        for name in mine
    }
    for level in wanted:
        found = compare(mine, theirs, level, kl=by_kl, seed=seed)
        rows += [
            _equal_row(first[keys[name]], level, equal, encode_ms[name], by_kl=by_kl) for name, equal in found.items()
        ]
    return tuple(rows)


def cut_times(afters: Sequence[str], segment_ms: Sequence[float], macs: Sequence[int]) -> tuple[CutTime, ...]:
    """The share of the work before every cut that lies between two segments.

    Args:
        afters: of every cut, the frame and the output included.
        segment_ms: of every segment.
        macs: of every segment.
    """
    return tuple(
        CutTime(
            cut=cut,
            after=afters[cut],
            before_ms=round(sum(segment_ms[:cut]), 4),
            time_ratio=round(sum(segment_ms[:cut]) / sum(segment_ms), 4),
            macs_ratio=round(sum(macs[:cut]) / sum(macs), 4),
        )
        for cut in range(1, len(segment_ms) + 1)
    )


def judge(equal: Sequence[EqualRow], times: Sequence[CutTime], ceiling: CodecRow, *, rivals: bool) -> Verdict:
    """Say whether splitting pays: at an equal agreement fewer bytes than any picture, before most of the work is done.

    Of the cuts for which that holds beyond the error of measurement, at the highest of DECIDING that has any, the
    one with the least product of bytes and device time is named.

    Args:
        equal: rows at equal agreement.
        times: of all cuts, the last being the whole model.
        ceiling: the segments without codec.
        rivals: whether pictures were measured.
    """
    reached = {level: _features(equal, level) for level in DECIDING}
    smaller = {level: [row for row in rows if _is_smaller(row)] for level, rows in reached.items()}
    early = {level: [row for row in rows if _device_ratio(row, times) <= LATE_RATIO] for level, rows in smaller.items()}
    wanted = next((level for level in DECIDING if early[level]), None)
    if rivals and wanted is not None:
        best = min(early[wanted], key=lambda row: (row.bytes_mean or math.inf) * _device_ratio(row, times))
        return Verdict(split=True, cut=best.cut, wanted=wanted, sentence=_pays(best, times))
    wanted = next((level for level in DECIDING if reached[level]), DECIDING[-1])
    sentence = _pays_not(wanted, reached, smaller, times, ceiling, rivals=rivals)
    return Verdict(split=False, cut=None, wanted=wanted, sentence=sentence)


def _features(equal: Sequence[EqualRow], level: float) -> list[EqualRow]:
    rows = [row for row in equal if row.way == "features" and row.quality == "agreement" and row.wanted == level]
    return [row for row in rows if row.bytes_mean is not None]


def _is_smaller(row: EqualRow) -> bool:
    """Beyond the error of measurement; where no picture reaches the agreement, any features that do are worth it."""
    return row.rival is None or (row.ratio_low is not None and row.ratio_low > 1)


def _device_ms(row: EqualRow, times: Sequence[CutTime]) -> float:
    return next(time.before_ms for time in times if time.cut == row.cut) + row.encode_ms


def _device_ratio(row: EqualRow, times: Sequence[CutTime]) -> float:
    """What the device works for a frame that it sends, of what the whole model would take it."""
    return _device_ms(row, times) / times[-1].before_ms


def _pays(best: EqualRow, times: Sequence[CutTime]) -> str:
    versus = "while no picture codec reaches it"
    if best.ratio is not None and best.rival is not None:
        versus = f"{best.ratio:.1f} times fewer{_interval(best)} than {best.rival}, the best picture codec"
    return (
        f"Splitting pays: after {best.after}, {_bytes(best.bytes_mean)} a frame hold an agreement of {best.wanted:.2f}"
        f", {versus}, and the device works {_device_ms(best, times):.1f} ms for it here, encoding included, "
        f"instead of {times[-1].before_ms:.1f}."
    )


def _pays_not(
    wanted: float,
    reached: Mapping[float, Sequence[EqualRow]],
    smaller: Mapping[float, Sequence[EqualRow]],
    times: Sequence[CutTime],
    ceiling: CodecRow,
    *,
    rivals: bool,
) -> str:
    whole_ms = times[-1].before_ms
    otherwise = f"Send pictures, or run all of it on the device ({whole_ms:.1f} ms here)."
    if not reached[wanted]:
        return (
            f"Do not split: no cut's features reach an agreement of {wanted:.2f} at any rate "
            f"(the segments alone: {ceiling.agreement:.3f}). {otherwise}"
        )
    smallest = min(reached[wanted], key=lambda row: row.bytes_mean or math.inf)
    if not rivals:
        return (
            f"Undecided, since no picture codec was measured: after {smallest.after}, {_bytes(smallest.bytes_mean)} "
            f"a frame hold an agreement of {wanted:.2f}."
        )
    late = next((rows for rows in smaller.values() if rows), None)
    if late is not None:
        row = min(late, key=lambda row: _device_ratio(row, times))
        return (
            f"Do not split: features are smaller than any picture only after {row.after}, when the device has worked "
            f"{_device_ms(row, times):.1f} ms, encoding included; all of the model takes it {whole_ms:.1f} ms."
        )
    doubt = ""
    if smallest.ratio is not None and smallest.ratio > 1:
        doubt = f"; {smallest.n} frames are too few to tell them apart"
    return (
        f"Do not split: at an agreement of {wanted:.2f} the smallest features (after {smallest.after}) take "
        f"{_bytes(smallest.bytes_mean)} a frame, {smallest.rival}, the best picture codec, "
        f"{_bytes(smallest.rival_bytes_mean)}{doubt}. {otherwise}"
    )


def _equal_row(row: CodecRow, wanted: float, equal: Equal, encode_ms: float, *, by_kl: bool) -> EqualRow:
    return EqualRow(
        way=row.way,
        cut=row.cut,
        after=row.after,
        codec=row.name,
        quality="kl" if by_kl else "agreement",
        wanted=wanted,
        **_fields(equal.cost, ""),
        rival=equal.rival,
        **_fields(equal.rival_cost, "rival_"),
        ratio=_finite(equal.ratio, 3) or None,  # 0 where ours does not get there
        ratio_low=_finite(equal.ratio_low, 3),
        ratio_high=_finite(equal.ratio_high, 3),
        encode_ms=round(encode_ms, 4),
        n=row.n,
    )


def _fields(cost: Cost, prefix: str) -> Mapping[str, Any]:
    return {
        f"{prefix}bytes_mean": _finite(cost.at, 1),
        f"{prefix}bytes_low": _finite(cost.low, 1),
        f"{prefix}bytes_high": _finite(cost.high, 1),
        f"{prefix}at_most": cost.bound and math.isfinite(cost.at),
    } | ({"at_most": cost.bound and math.isfinite(cost.at)} if not prefix else {})


def _finite(value: float, digits: int) -> float | None:
    return round(value, digits) if math.isfinite(value) else None


def _bytes(value: float | None) -> str:
    return f"{value:,.0f} bytes"


def _interval(row: EqualRow) -> str:
    if row.ratio_low is None:
        return ""
    return f" [{row.ratio_low:.1f}, {'open' if row.ratio_high is None else f'{row.ratio_high:.1f}'}]"
