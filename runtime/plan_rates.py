"""What a bundle has measured of its rates and exits, as numbers to plan with. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from runtime.manifest import Bundle, CodecSpec, CutSpec, ExitSpec


@dataclass(frozen=True, slots=True)
class Way:
    """What goes up, and how: a place in the manifest."""

    cut: int
    codec: str
    rate: int  # index into the codec's rates


@dataclass(frozen=True, slots=True)
class _Point:
    """What was measured of a rate: bytes of the payload, and agreement."""

    parameter: float
    p50: float
    p95: float
    agreement: float

    def at(self, overhead: int) -> tuple[float, float, float, float]:
        return self.parameter, self.p50 + overhead, self.p95 + overhead, self.agreement


@dataclass(frozen=True, slots=True)
class Rate:
    """A rate at a cut; bytes of the whole message."""

    way: Way
    parameter: float
    p50: float
    p95: float
    agreement: float


NOTHING = Rate(Way(0, "", 0), 0.0, 0.0, 0.0, 0.0)


def threshold(spec: ExitSpec, row: float) -> float | None:
    """Of an exit in a row of its table; None: it never answers there."""
    if spec.file is None:
        return 0.0
    found = next((point for point in spec.points if point.agreement == row), None)
    if found is not None:
        return found.threshold
    return spec.threshold if spec.agreement == row else None


def answered(exits: Sequence[ExitSpec], last: int, row: float | None) -> tuple[float, float]:
    """The share of frames that early exits up to segment `last` answer, and the share that they answer rightly."""
    coverage = covered = 0.0
    for spec in exits[:-1]:
        if row is None or spec.cut > last + 1 or threshold(spec, row) is None:
            continue
        point = next((point for point in spec.points if point.agreement == row), None)
        measured = spec.measured if point is None else point.measured
        if measured is not None and measured.agreement is not None:
            coverage += measured.coverage
            covered += measured.coverage * measured.agreement
    return min(coverage, 1.0), min(covered, 1.0)


def whole_agreement(bundle: Bundle) -> float:
    """How often the whole written model agrees with the float model."""
    measured = bundle.manifest.exits[-1].measured
    if "whole_agreement" in bundle.manifest.proof:
        return float(bundle.manifest.proof["whole_agreement"])
    return 1.0 if measured is None or measured.agreement is None else measured.agreement


def variant_agreement(bundle: Bundle, number: int, whole: float) -> float:
    """How often the whole chain with a variant agrees with the float model, never more than `whole`."""
    return whole if number == 0 else min(whole, bundle.manifest.segments[0].variants[number - 1].agreement)


def measured(number: int, cut: CutSpec, whole: float, overhead: int) -> list[Rate]:
    """The rates at a cut that something is known of."""
    return [
        Rate(Way(number, spec.name, index), *rate.at(overhead))
        for spec in cut.codecs
        for index, rate in _rates(cut, spec, whole).items()
    ]


def _rates(cut: CutSpec, spec: CodecSpec, whole: float) -> dict[int, _Point]:
    """A codec's rates by index. One that nobody measured is none, but raw changes nothing and is no larger than what
    it carries."""
    if spec.name == "raw":
        size = math.prod(cut.shape) * np.dtype(cut.dtype).itemsize
        return {
            0: _Point(spec.rates[0].parameter, spec.rates[0].bytes_p50 or size, spec.rates[0].bytes_p95 or size, whole)
        }
    known = {
        index: _Point(rate.parameter, rate.bytes_p50, rate.bytes_p95 or rate.bytes_p50, rate.agreement)
        for index, rate in enumerate(spec.rates)
        if rate.agreement is not None and rate.bytes_p50 is not None
    }
    order = sorted(known, key=lambda index: known[index].p50)
    smooth = rising([known[index].agreement for index in order])
    return {index: replace(known[index], agreement=value) for index, value in zip(order, smooth, strict=True)}


def rising(values: Sequence[float]) -> list[float]:
    """The rising sequence nearest to `values` in squares: pools adjacent violators (Ayer et al. 1955)."""
    pools: list[tuple[float, int]] = []
    for value in values:
        mean, count = value, 1
        while pools and pools[-1][0] > mean:
            before, many = pools.pop()
            mean, count = (mean * count + before * many) / (count + many), count + many
        pools.append((mean, count))
    return [mean for mean, count in pools for _ in range(count)]
