"""What `kinflow bench` measures of one codec at one rate: frame by frame, and summed up as a row."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import msgspec
import numpy as np
from numpy.typing import NDArray

from export.agreement import per_frame, pooled
from export.atlas_curves import Curve
from export.task import Judge, Marks, Outputs
from runtime.manifest import Bundle
from runtime.packet import HEADER
from runtime.topics import Subtree, publish_bytes

Way = Literal["features", "stream", "picture", "video"]


class CodecRow(msgspec.Struct, frozen=True, kw_only=True):
    """One place, codec and rate on the judged frames. Bytes count all of MQTT; `agreement` has a 95 % interval."""

    way: Way  # features or pictures frame by frame; between frames of a clip: features (stream), or a video codec
    cut: int  # cut 0 is the frame; codecs that are not the bundle's stand there as well
    after: str
    codec: str
    rate: int  # the index in the manifest; for a rival the place in its list of settings
    parameter: float  # the codec's own: a quality, a step, a CRF
    side_px: int | None = None  # the shorter side to which a rival's picture was shrunk first
    bytes_p50: int
    bytes_p95: int
    bytes_mean: float
    payload_bytes_p50: int
    agreement: float
    low: float
    high: float
    n: int
    kl_mean: float  # KL(whole || split) in nats; for boxes the mean of 1 - F1
    kl_p50: float
    encode_ms: float | None = None  # medians; the processor's time when there is one thread, see `clock`
    decode_ms: float | None = None

    @property
    def curve(self) -> tuple[Way, int, str, int | None]:
        """What the rates of one curve have in common."""
        return self.way, self.cut, self.codec, self.side_px

    @property
    def name(self) -> str:
        """The codec as a person calls it."""
        return self.codec if self.side_px is None else f"{self.codec} at {self.side_px} px"


@dataclass(slots=True)
class Samples:
    """One row in the making: what became of every frame, in the order of the frames."""

    payload_bytes: list[int] = field(default_factory=list)
    wire_bytes: list[int] = field(default_factory=list)
    marks: list[Marks] = field(default_factory=list)
    divergence: list[NDArray[np.float64]] = field(default_factory=list)
    encode_ms: list[float] = field(default_factory=list)
    decode_ms: list[float] = field(default_factory=list)

    def sent(self, payload_bytes: int, wire_bytes: int) -> None:
        """A frame was encoded to so many bytes."""
        self.payload_bytes.append(payload_bytes)
        self.wire_bytes.append(wire_bytes)

    def judge(self, judge: Judge, said: Outputs, whole: Outputs) -> None:
        """The next frames became `said`, which the whole float model answers by `whole`; both (frames, …)."""
        self.marks.append(judge.marks(said, whole))
        self.divergence.append(judge.divergence(whole, said))


@dataclass(frozen=True, slots=True)
class Point:
    """A row, and the frames behind it."""

    row: CodecRow
    wire_bytes: NDArray[np.float64]  # (frames,)
    agrees: NDArray[np.float64]  # (frames,), 0 or 1; for boxes what each frame adds to the agreement of all
    kl: NDArray[np.float64]  # (frames,) nats; for boxes 1 - F1 of the frame


def summarize(samples: Samples, **place: object) -> Point:
    """Sum up one rate; `place` are the fields of CodecRow that say what was measured."""
    marks, divergence = np.concatenate(samples.marks), np.concatenate(samples.divergence)
    found = pooled(marks)
    row = msgspec.convert(
        {
            **place,
            "bytes_p50": _percentile(samples.wire_bytes, 50),
            "bytes_p95": _percentile(samples.wire_bytes, 95),
            "bytes_mean": round(float(np.mean(samples.wire_bytes)), 1),
            "payload_bytes_p50": _percentile(samples.payload_bytes, 50),
            "agreement": round(found.share, 6),
            "low": round(found.low, 6),
            "high": round(found.high, 6),
            "n": found.n,
            "kl_mean": round(float(divergence.mean()), 6),
            "kl_p50": round(float(np.median(divergence)), 6),
            "encode_ms": _median(samples.encode_ms),
            "decode_ms": _median(samples.decode_ms),
        },
        CodecRow,
    )
    return Point(row, np.array(samples.wire_bytes, np.float64), per_frame(marks), divergence)


def curves(points: Sequence[Point], *, by_kl: bool = False) -> dict[tuple[Way, int, str, int | None], Curve]:
    """The measured points as curves; quality is agreement, or minus the KL."""
    grouped: dict[tuple[Way, int, str, int | None], list[Point]] = {}
    for point in points:
        grouped.setdefault(point.row.curve, []).append(point)
    return {
        key: Curve(
            np.stack([point.wire_bytes for point in group]),
            np.stack([-point.kl if by_kl else point.agrees for point in group]),
        )
        for key, group in grouped.items()
    }


def clock(threads: int) -> Callable[[], float]:
    """What to time with, in seconds: on one thread the processor's time, which other processes disturb little."""
    return time.process_time if threads == 1 else time.perf_counter


def wire_bytes(bundle: Bundle, cut: int, payload_bytes: int) -> int:
    """What features cost on the wire: MQTT's framing, a device's topic, the packet's header and the payload."""
    topic = Subtree("home", "d", "device").request(bundle.key8, cut)
    return publish_bytes(topic, HEADER.size + payload_bytes)


def rival_bytes(bundle: Bundle, payload_bytes: int) -> int:
    """What a picture costs on the same topic, without the packet's header, which is ours."""
    return publish_bytes(Subtree("home", "d", "device").request(bundle.key8, 0), payload_bytes)


def _percentile(sizes: list[int], percent: float) -> int:
    return int(np.percentile(sizes, percent, method="higher"))


def _median(times: list[float]) -> float | None:
    return round(float(np.median(times)), 4) if times else None
