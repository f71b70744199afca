"""Every way in which a device could treat a frame, and what each would give and cost now. Pure.

A *candidate* names all that can be chosen: the variant of the first segment, how many segments run locally, the row of
exit thresholds, and then cut, codec and rate, or nothing at all that goes up. What a bundle has measured of them stands
in arrays that are made once; a prediction is a few products of these with what is known at the moment, so that it
costs a fraction of a millisecond for hundreds of candidates.

What is taken for granted: agreements of an early exit, a variant and a rate are taken as if their errors fell together
by chance, so that they multiply; a rate's bytes are the manifest's, times what frames of this codec have lately cost
beside theirs; and a rate that was measured worse than a cheaper one of its codec counts as equal to it (both take the
mean of the two, as in isotonic regression), since with some dozens of judged frames that is noise.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from runtime.estimates import UNKNOWN, LinkEstimate
from runtime.ladder import Limits
from runtime.manifest import Bundle, ExitSpec
from runtime.packet import HEADER
from runtime.plan_rates import NOTHING, Rate, Way, answered, measured, threshold, variant_agreement, whole_agreement
from runtime.variant import with_variant

Floats = NDArray[np.float64]

LINK_SHARE = 0.9  # of the goodput that is planned with; the rest is for what was not foreseen
LEAST_SHARE = 0.25  # of the goodput that frames get, whatever else goes up: the link sends frames before results
NODE_MS = 5.0  # beside its segments, before the first reply has told
ENCODE_MS = 2.0  # before the first frame was encoded
FREE_LOSS = 0.05  # of frames, up to which losses are no reason to keep frames here


@dataclass(frozen=True, slots=True)
class Candidate:
    """One way to treat frames."""

    variant: int  # of the first segment
    last_segment: int  # the deepest that runs locally before anything goes up; -1: none does
    row: float | None  # of the exits' table of agreements; None: no early exit answers
    way: Way | None  # None: nothing goes up, the deepest local exit answers whatever no other has
    parameter: float = 0.0  # of the rate, as people write it

    def words(self) -> str:
        """The candidate in a few words."""
        if self.way is None:
            return f"local answers after segment {self.last_segment}" + (
                f", variant {self.variant}" if self.variant else ""
            )
        text = self.way.codec if self.way.codec == "raw" else f"{self.way.codec}:{self.parameter:g}"
        text += f" at cut {self.way.cut}"
        text += f", variant {self.variant}" if self.variant else ""
        return text + (f", exits at {self.row:g}" if self.row is not None else "")


@dataclass(frozen=True, slots=True)
class Estimates:
    """What is known now. Whatever is missing is guessed from the bundle, on the careful side."""

    link: LinkEstimate = UNKNOWN
    stage_ms: Mapping[str, float] = field(default_factory=dict)  # of this device: `segmentK`, `segment0.vN`, `exitK`, …
    node_ms: Mapping[str, float] = field(default_factory=dict)  # of what is above: `segmentK` and `rest`
    frames_per_second: float = 10.0
    unsure_share: float = 0.0  # of the frames computed lately, those that no exit has answered
    other_bytes: float = 0.0  # a second, that go up beside frames: results, events, previews, what the device tells
    max_packet_bytes: float = math.inf  # that the broker takes, all of MQTT counted
    # codec → what frames lately cost beside the manifest's median, and the costliest tenth beside its 95th percentile
    bytes_ratio: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    # cut of a local exit → how often it says what comes from above, of frames that it was not sure of
    local_agreement: Mapping[int, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Predictions:
    """What each candidate would give; arrays by candidate."""

    latency_ms: Floats  # 95th percentile of grab to answer
    steady_ms: Floats  # the same on a link without jitter, and without an answer at the limit
    bytes: Floats  # mean of a frame, those that exits answer counted as none
    agreement: Floats
    local_ms: Floats  # of work on this device
    transfer_ms: Floats  # of a large frame (95th percentile of bytes) on the link
    share: Floats  # of the frames no exit answers: what the link can carry
    wanted: Floats  # bytes a second that would go up while frames come that no exit answers
    frame_bytes: Floats  # as `bytes`, were the link to carry all of them
    large_bytes: Floats  # of a large frame's message
    fits: NDArray[np.bool_]  # whether that is no more than the broker takes


class Tables:
    """The candidates of a bundle, and what it has measured of them.

    Args:
        bundle: with no variant in force.
        overhead_bytes: of MQTT around a packet, topic included.
        deepest: the deepest segment that may run locally.
        above: the deepest cut that the node above takes.
        rows: of the exits' table that may be chosen.
        early: whether early exits may answer.
    """

    def __init__(
        self,
        bundle: Bundle,
        *,
        overhead_bytes: int,
        deepest: int,
        above: int,
        rows: Sequence[float],
        early: bool = True,
    ) -> None:
        self._bundle = bundle
        manifest = bundle.manifest
        self.whole = whole_agreement(bundle)
        self.candidates: list[Candidate] = []
        self._rates: list[Rate] = []
        self._exits: list[tuple[float, float]] = []  # what exits answer, and how often rightly, of all frames
        variants = range(len(manifest.segments[0].variants) + 1)
        self._factor = {number: variant_agreement(bundle, number, self.whole) / self.whole for number in variants}
        seen = {number: with_variant(bundle, number).manifest.exits for number in variants}
        table: list[float | None] = [*rows] if early and rows else [None]
        overhead = overhead_bytes + HEADER.size
        rates = [measured(cut, spec, self.whole, overhead) for cut, spec in enumerate(manifest.cuts[:-1])]
        for rate in rates[0]:
            self._add(Candidate(0, -1, None, rate.way, rate.parameter), rate, (0.0, 0.0))
        for number in variants:
            for last in range(min(deepest, len(manifest.segments) - 1) + 1):
                for row in _different(seen[number], last, table):
                    exits = answered(seen[number], last, row)
                    if any(spec.cut <= last + 1 for spec in seen[number]):
                        self._add(Candidate(number, last, row, None), NOTHING, exits)
                    for rate in rates[last + 1] if last + 1 <= above and last + 1 < len(rates) else ():
                        self._add(Candidate(number, last, row, rate.way, rate.parameter), rate, exits)
        self._size = {rate.way: (rate.p50, rate.p95) for at_cut in rates for rate in at_cut}
        self._arrays(seen)

    def __len__(self) -> int:
        return len(self.candidates)

    def predict(self, known: Estimates, limit_ms: float = math.inf) -> Predictions:
        """What each candidate would give now, where a local exit answers at `limit_ms` what comes later."""
        local = self._uses @ np.array([self._stage_ms(stage, known) for stage in self._stages])
        ratios = [known.bytes_ratio.get(codec, (1.0, 1.0)) for codec in self._codecs]
        typical = self._bytes_p50 * np.array([ratio[0] for ratio in ratios])[self._codec]
        large = self._bytes_p95 * np.array([ratio[1] for ratio in ratios])[self._codec]
        large = np.where(self._sends, np.maximum(large, typical), 0.0)
        typical = np.where(self._sends, typical, 0.0)
        link = known.link
        goodput = math.inf if link.goodput is None else max(link.goodput, 1e-3)
        goes_up = (1 - self._coverage) * self._sends
        # Frames that exits leave come in bursts: on average the link may carry what it cannot carry now.
        bursts = np.maximum(goes_up, known.unsure_share * self._sends)
        wanted = bursts * typical * max(known.frames_per_second, 1e-3)
        carried = max(LEAST_SHARE * goodput, LINK_SHARE * goodput - known.other_bytes)
        share = np.minimum(1.0, carried / np.maximum(wanted, 1e-9))
        transfer_ms = large / goodput * 1000
        above_ms = self._above @ np.array([self._node_ms(stage, known) for stage in self._above_stages])
        steady_ms = local + np.where(self._sends, transfer_ms + (link.rtt_ms or 0.0) + above_ms, 0.0)
        fallback = self._last_words(known)
        arrives = share * (1 - max(0.0, link.loss_ratio - FREE_LOSS))
        rest = np.where(self._sends, arrives * self._up + (1 - arrives) * fallback, fallback)
        return Predictions(
            latency_ms=np.maximum(steady_ms, np.minimum(steady_ms + link.jitter_ms * self._sends, limit_ms)),
            steady_ms=steady_ms,
            bytes=goes_up * typical * share,
            agreement=self._covered + (1 - self._coverage) * rest,
            local_ms=local,
            transfer_ms=transfer_ms,
            share=share,
            wanted=wanted,
            frame_bytes=goes_up * typical,
            large_bytes=large,
            fits=large <= known.max_packet_bytes,
        )

    def size(self, way: Way) -> tuple[float, float] | None:
        """Bytes of a frame's message by the manifest, median and 95th percentile; None: not measured."""
        return self._size.get(way)

    @property
    def sending(self) -> NDArray[np.bool_]:
        """Which candidates send anything."""
        return self._sends

    def allowed(self, said: Predictions, limits: Limits) -> NDArray[np.bool_]:
        """Which candidates these limits leave; where they leave none, those with the least work here."""
        found = said.fits.copy()
        if not limits.sends:
            found &= ~self._sends
        if limits.max_bytes < math.inf:
            least = said.frame_bytes[self._sends].min(initial=math.inf) + 1e-6
            found &= said.frame_bytes <= max(limits.max_bytes, least)
        if limits.deepest:
            found &= (self._lasts == self._lasts[self._sends].max(initial=-1)) | ~self._sends
        if limits.fastest:
            for sending in (self._sends, ~self._sends):
                rows = found & sending
                if rows.any():
                    found &= ~sending | (said.local_ms <= said.local_ms[rows].min() * 1.001)
        return found if found.any() else said.local_ms <= said.local_ms.min() * 1.001

    def _add(self, candidate: Candidate, rate: Rate, exits: tuple[float, float]) -> None:
        self.candidates.append(candidate)
        self._rates.append(rate)
        self._exits.append(exits)

    def _arrays(self, seen: Mapping[int, Sequence[ExitSpec]]) -> None:
        segments = len(self._bundle.manifest.segments)
        uses = [_stages(candidate, seen[candidate.variant]) for candidate in self.candidates]
        self._stages = sorted({stage for stages in uses for stage in stages})
        self._uses = np.array([[stage in stages for stage in self._stages] for stages in uses], np.float64)
        self._above_stages = ["rest", *(f"segment{index}" for index in range(segments))]
        self._above = np.array(
            [
                [
                    candidate.way is not None and (stage == "rest" or int(stage[7:]) >= candidate.way.cut)
                    for stage in self._above_stages
                ]
                for candidate in self.candidates
            ],
            np.float64,
        )
        self._codecs = ["", *sorted({c.way.codec for c in self.candidates if c.way is not None})]
        self._codec = np.array([self._codecs.index("" if c.way is None else c.way.codec) for c in self.candidates])
        self._sends = np.array([candidate.way is not None for candidate in self.candidates])
        self._bytes_p50 = np.array([rate.p50 for rate in self._rates])
        self._bytes_p95 = np.array([rate.p95 for rate in self._rates])
        self._lasts = np.array([candidate.last_segment for candidate in self.candidates])
        factor = np.array([self._factor[candidate.variant] for candidate in self.candidates])
        self._up = np.array([rate.agreement for rate in self._rates]) * factor
        self._coverage = np.array([coverage for coverage, _ in self._exits])
        self._covered = np.array([covered for _, covered in self._exits])
        # The deepest local exit of each, which speaks when nothing comes from above.
        exits = [spec.cut for spec in self._bundle.manifest.exits]
        self._last_exit = np.array(
            [max((cut for cut in exits if cut <= max(c.last_segment, 0) + 1), default=0) for c in self.candidates]
        )
        self._ends = self._last_exit == segments  # the model's own exit: as good as the whole
        self._whole = self.whole * factor

    def _last_words(self, known: Estimates) -> Floats:
        told = np.array([known.local_agreement.get(cut, 0.0) for cut in range(len(self._bundle.manifest.cuts))])
        return np.where(self._ends, self._whole, told[self._last_exit])

    def _stage_ms(self, stage: str, known: Estimates) -> float:
        ms = known.stage_ms.get(stage)
        if ms is not None:
            return ms
        if stage.startswith("encode"):
            return ENCODE_MS
        plain = stage.partition(".")[0]
        return known.stage_ms.get(plain, 0.0)

    def _node_ms(self, stage: str, known: Estimates) -> float:
        ms = known.node_ms.get(stage)
        if ms is not None:
            return ms
        # A node is no slower than the device, else nobody would put one there.
        return NODE_MS if stage == "rest" else known.stage_ms.get(stage, 0.0)


def encode_stage(way: Way) -> str:
    """The name under which the time of encoding is kept."""
    return f"encode{way.cut}.{way.codec}"


def _different(exits: Sequence[ExitSpec], last: int, table: Sequence[float | None]) -> list[float | None]:
    """The rows that differ in what the exits up to segment `last` answer."""
    found: dict[tuple[float | None, ...], float | None] = {}
    for row in table:
        here = [spec for spec in exits[:-1] if spec.cut <= last + 1]
        found.setdefault(tuple(None if row is None else threshold(spec, row) for spec in here), row)
    return list(found.values())


def _stages(candidate: Candidate, exits: Sequence[ExitSpec]) -> set[str]:
    """What runs on this device for a candidate."""
    found = {"preprocess"}
    for index in range(candidate.last_segment + 1):
        found.add(f"segment{index}" + (f".v{candidate.variant}" if index == 0 and candidate.variant else ""))
    for spec in exits:
        asked = candidate.row is not None and threshold(spec, candidate.row) is not None
        last = candidate.way is None and spec.cut == max(
            (other.cut for other in exits if other.cut <= candidate.last_segment + 1), default=-1
        )
        if spec.cut <= candidate.last_segment + 1 and (asked or last):
            found.add(f"exit{spec.cut}")
    if candidate.way is not None:
        found.add(encode_stage(candidate.way))
    return found
