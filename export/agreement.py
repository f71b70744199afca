"""How often an answer equals the whole float model's, and how sure that number is."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from runtime.manifest import Measured

CONFIDENCE = 0.95
RESAMPLED = 2000


def clopper_pearson(hits: int, count: int, confidence: float = CONFIDENCE) -> tuple[float, float]:
    """The exact interval for a share of which `hits` of `count` were seen."""
    if not 0 <= hits <= count or count == 0:
        raise ValueError(f"{hits} of {count} is no share")
    tail = (1 - confidence) / 2
    low = 0.0 if hits == 0 else _solve(lambda p: _at_least(hits, count, p) < tail)
    high = 1.0 if hits == count else _solve(lambda p: 1 - _at_least(hits + 1, count, p) > tail)
    return low, high


@dataclass(frozen=True, slots=True)
class Share:
    """Agreement, with its 95 % interval: Clopper and Pearson's where frames agree or do not, else by resampling."""

    share: float
    low: float
    high: float
    n: int  # frames


def pooled(marks: NDArray[np.int64]) -> Share:
    """The agreement of frames whose answers have marks[:, 0] of marks[:, 1] in common: (frames, 2).

    Intervals of parts that are pooled, as boxes are, come from RESAMPLED draws of as many frames with replacement.
    """
    same, total = marks[:, 0], marks[:, 1]
    if (total == 1).all():
        hits = int(same.sum())
        low, high = clopper_pearson(hits, len(marks))
    else:
        draws = np.random.default_rng(0).integers(0, len(marks), (RESAMPLED, len(marks)))
        low, high = np.percentile(same[draws].sum(axis=1) / total[draws].sum(axis=1), (2.5, 97.5))
    return Share(float(same.sum() / total.sum()), float(low), float(high), len(marks))


def per_frame(marks: NDArray[np.int64]) -> NDArray[np.float64]:
    """What each frame adds to the agreement of all: (frames,), whose mean is `pooled`'s share."""
    parts: NDArray[np.float64] = marks[:, 0] / marks[:, 1].mean()
    return parts


def measure(answered: NDArray[np.bool_], agrees: NDArray[np.bool_]) -> Measured:
    """Coverage, and agreement among the answered with its interval."""
    count, said = answered.size, int(answered.sum())
    if said == 0:
        return Measured(coverage=0.0, agreement=None, agreement_low=None, agreement_high=None, answered=0, n=count)
    hits = int((answered & agrees).sum())
    low, high = clopper_pearson(hits, said)
    return Measured(
        coverage=_rounded(said / count),
        agreement=_rounded(hits / said),
        agreement_low=_rounded(low),
        agreement_high=_rounded(high),
        answered=said,
        n=count,
    )


def cosine(left: NDArray[np.float32], right: NDArray[np.float32]) -> float:
    """The mean cosine between two sets of logits (frames, classes); not a number when one is all zero."""
    a, b = left.astype(np.float64), right.astype(np.float64)
    norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    with np.errstate(invalid="ignore", divide="ignore"):
        return float(np.mean((a * b).sum(axis=1) / norms))


def _solve(below: Callable[[float], bool]) -> float:
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if below(middle) else (low, middle)
    return (low + high) / 2


def _at_least(hits: int, count: int, p: float) -> float:
    """The chance of `hits` or more of `count`."""
    if p <= 0 or p >= 1:
        return float(p >= 1 or hits == 0)
    logs = [
        math.lgamma(count + 1)
        - math.lgamma(k + 1)
        - math.lgamma(count - k + 1)
        + k * math.log(p)
        + (count - k) * math.log1p(-p)
        for k in range(hits, count + 1)
    ]
    return min(1.0, math.fsum(map(math.exp, logs)))


def _rounded(value: float) -> float:
    return round(value, 6)
