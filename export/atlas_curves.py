"""What a quality costs: monotone curves through measured points, read off at equal quality. Pure.

A curve is fitted by isotonic regression (pool adjacent violators; Barlow et al., Statistical Inference under Order
Restrictions, 1972), so that a lucky point does not make its neighbour look wasteful, and read off linearly between
points, bytes on a log scale. Intervals come from a paired bootstrap: frames are drawn again with replacement, the same
ones for every curve, and everything down to the choice of the best rival is done anew (Efron & Tibshirani, An
Introduction to the Bootstrap, 1993).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Values = NDArray[np.float64]

DRAWS = 400
TAIL = 0.025  # of the draws on either side of an interval
LEAST_KL = 1e-9


@dataclass(frozen=True, slots=True)
class Curve:
    """One codec at one place at several rates, frame by frame. Rows are rates, in any order."""

    sizes: Values  # (rates, frames) bytes on the wire
    quality: Values  # (rates, frames), the more the better: 1 where the answer agrees, else 0; or minus the KL


@dataclass(frozen=True, slots=True)
class Cost:
    """The bytes of a mean frame at one quality."""

    at: float  # infinite where no rate reaches it
    low: float
    high: float
    bound: bool = False  # the cheapest rate is better than asked, so that `at` is an upper bound


@dataclass(frozen=True, slots=True)
class Equal:
    """One curve beside the best of its rivals at one quality."""

    cost: Cost
    rival: str | None  # None where no rival reaches it
    rival_cost: Cost
    ratio: float  # the rival's bytes by ours; infinite or 0 where only one of them gets there, NaN where neither does
    ratio_low: float
    ratio_high: float


def isotonic(values: Sequence[float] | Values) -> Values:
    """The non-decreasing sequence nearest `values`, by least squares."""
    means: list[float] = []
    counts: list[int] = []
    for value in values:
        means.append(float(value))
        counts.append(1)
        while len(means) > 1 and means[-2] >= means[-1]:
            count = counts[-2] + counts[-1]
            means[-2:] = [(means[-2] * counts[-2] + means[-1] * counts[-1]) / count]
            counts[-2:] = [count]
    return np.repeat(np.array(means), counts)


def bytes_at(sizes: Sequence[float] | Values, quality: Sequence[float] | Values, wanted: float) -> tuple[float, bool]:
    """The bytes at which the monotone curve through (sizes, quality) reaches `wanted`.

    Returns:
        The bytes, infinite where the curve stays below; and whether its cheapest point is already as good, so that
        less might do.
    """
    order = np.argsort(np.asarray(sizes), kind="stable")
    logs = np.log(np.asarray(sizes, np.float64)[order])
    fitted = isotonic(np.asarray(quality, np.float64)[order])
    reached = np.flatnonzero(fitted >= wanted)
    if not reached.size:
        return math.inf, False
    place = int(reached[0])
    if place == 0:
        return math.exp(logs[0]), bool(fitted[0] > wanted)
    share = (wanted - fitted[place - 1]) / (fitted[place] - fitted[place - 1])
    return math.exp(logs[place - 1] + share * (logs[place] - logs[place - 1])), False


def kl_quality(kl: Values) -> Values:
    """Mean divergences as a quality that is nearly straight against the log of bytes: minus the log."""
    return -np.log(np.maximum(kl, LEAST_KL))


def compare(
    ours: Mapping[str, Curve], rivals: Mapping[str, Curve], wanted: float, *, kl: bool = False, seed: int = 0
) -> dict[str, Equal]:
    """Every one of `ours` beside the best rival at the quality `wanted`: an agreement, or with `kl` a mean KL in nats.

    All curves must have been measured on the same frames.
    """
    frames = next(curve.sizes.shape[1] for curve in (*ours.values(), *rivals.values()))
    generator = np.random.default_rng(seed)
    draws = [np.full(frames, 1 / frames)]
    draws += [np.bincount(generator.integers(0, frames, frames), minlength=frames) / frames for _ in range(DRAWS)]
    weights = np.stack(draws, axis=1)
    level = float(kl_quality(np.array(wanted))) if kl else wanted
    found = {name: _costs(curve, weights, level, kl=kl) for name, curve in {**rivals, **ours}.items()}
    nothing = np.full(DRAWS + 1, math.inf)
    best = np.min([found[name][0] for name in rivals], axis=0) if rivals else nothing
    winner = min(rivals, key=lambda name: found[name][0][0]) if rivals else None
    if winner is None or math.isinf(best[0]):
        rival, rival_cost = None, _cost(best, bound=False)
    else:
        rival, rival_cost = winner, _cost(best, bound=found[winner][1])
    return {name: _equal(found[name], rival, rival_cost, best) for name in ours}


def _costs(curve: Curve, weights: Values, level: float, *, kl: bool) -> tuple[Values, bool]:
    """The bytes at `level` for all frames, then for every draw; and whether the first is a bound."""
    sizes, quality = curve.sizes @ weights, curve.quality @ weights
    if kl:
        quality = kl_quality(-quality)
    costs = [bytes_at(sizes[:, draw], quality[:, draw], level) for draw in range(weights.shape[1])]
    return np.array([cost for cost, _ in costs]), costs[0][1]


def _equal(found: tuple[Values, bool], rival: str | None, rival_cost: Cost, best: Values) -> Equal:
    costs, bound = found
    with np.errstate(invalid="ignore"):
        ratios = best / costs  # infinite by infinite is no ratio
    known = ratios[1:][~np.isnan(ratios[1:])]
    low, high = _interval(known) if known.size else (math.nan, math.nan)
    return Equal(_cost(costs, bound=bound), rival, rival_cost, float(ratios[0]), low, high)


def _cost(costs: Values, *, bound: bool) -> Cost:
    low, high = _interval(costs[1:])
    return Cost(float(costs[0]), low, high, bound)


def _interval(values: Values) -> tuple[float, float]:
    # Of values that may be infinite, only such percentiles make sense as need no arithmetic between neighbours.
    low, high = np.percentile(values, [100 * TAIL, 100 * (1 - TAIL)], method="nearest")
    return float(low), float(high)
