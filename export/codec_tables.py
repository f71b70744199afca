"""Makes the tables of the transform codec: books of likely groups, their layout at every rate, zstd dictionaries.

Levels are taken as discrete Laplace variables whose scales fall along the coefficients' order. A kind of group stands
for a scale; it holds as many coefficients as carry about GROUP_BITS, and its book lists the likeliest such groups.
"""

from __future__ import annotations

import heapq
from functools import cache

import numpy as np
import zstandard
from numpy.typing import NDArray

from export.transform import Array
from runtime.codec_transform import MAX_LEVEL, Tables
from runtime.levels import BOOK_ROWS, Books, LevelPacker, Levels

GROUP_BITS = 5.2
LARGEST_GROUP = 32
SCALE_RATIO = 1.25  # between one kind and the next
LARGEST_SCALE, LEAST_SCALE = 60.0, 0.08  # in steps
MAGNITUDES = 64
ACTIVITIES = 13  # of differences: the n-th has scales smaller by SCALE_RATIO ** (n - 1)
DRAWN = 80  # frames drawn from the model to train the dictionary of an activity
DICTIONARY_BYTES = 1024
POOL = 64  # neighbours in spread whose levels are counted together

Doubles = NDArray[np.float64]


@cache
def scales() -> Doubles:
    """The scale, in steps, of each kind of group, largest first."""
    count = round(np.log(LARGEST_SCALE / LEAST_SCALE) / np.log(SCALE_RATIO)) + 1
    kinds: Doubles = LARGEST_SCALE * SCALE_RATIO ** -np.arange(count, dtype=np.float64)
    return kinds


def bits(levels: NDArray[np.int64], scale: Doubles | float) -> Doubles:
    """The information in levels whose coefficients are Laplace distributed with `scale` steps and rounded."""
    magnitude = np.abs(levels)
    beyond = -np.expm1(-1 / np.asarray(scale, np.float64))
    zero = -np.log2(-np.expm1(-0.5 / np.asarray(scale, np.float64)))
    other = 1 + (0.5 + magnitude - 1) / scale / np.log(2) - np.log2(beyond)
    information: Doubles = np.where(magnitude == 0, zero, other)
    return information


@cache
def books() -> Books:
    """The books of all kinds; the same for every bundle."""
    rows = []
    for scale in scales():
        levels = np.arange(-MAGNITUDES, MAGNITUDES + 1)
        cost = bits(levels, float(scale))
        entropy = float((2.0**-cost * cost).sum())
        size = int(np.clip(round(GROUP_BITS / max(entropy, 1e-3)), 1, LARGEST_GROUP))
        rows.append(_likeliest(float(scale), size))
    return Books(tuple(rows))


def _likeliest(scale: float, size: int) -> Levels:
    """The BOOK_ROWS likeliest groups of `size` levels of one scale, best first: (rows, size)."""
    cost = bits(np.arange(MAGNITUDES), scale)
    steps = np.diff(cost).tolist()
    start = (0,) * size
    heap: list[tuple[float, tuple[int, ...]]] = [(0.0, start)]
    seen = {start}
    rows: list[list[int]] = []
    while heap and len(rows) < BOOK_ROWS:
        so_far, magnitudes = heapq.heappop(heap)
        places = [place for place, value in enumerate(magnitudes) if value]
        for signs in range(1 << len(places)):
            row = list(magnitudes)
            for bit, place in enumerate(places):
                row[place] *= 1 - 2 * (signs >> bit & 1)
            rows.append(row)
        for place in range(size):
            if magnitudes[place] < MAGNITUDES - 2:
                more = (*magnitudes[:place], magnitudes[place] + 1, *magnitudes[place + 1 :])
                if more not in seen:
                    seen.add(more)
                    heapq.heappush(heap, (so_far + steps[magnitudes[place]], more))
    return np.array(rows[:BOOK_ROWS], np.int16)


def level_scales(coefficients: Array, step: float) -> Doubles:
    """The Laplace scale, in steps, that fits the levels of each coefficient: (n,), falling.

    Coefficients lie in the order of their spread, so neighbours are counted together: the levels of the POOL next to
    each other give one mean magnitude, whatever the shape of their distribution.

    Args:
        coefficients: (frames, n).
        step: in their own units.
    """
    levels = np.abs(np.rint(coefficients / np.float32(step)))
    mean = levels.mean(axis=0, dtype=np.float64)
    count = mean.size
    pool = max(1, min(POOL, count))
    edges = np.arange(0, count, pool)
    # The widest differ much from one another and are never zero: each speaks for itself.
    pooled = np.repeat(np.add.reduceat(mean, edges) / np.diff(edges, append=count), np.diff(edges, append=count))
    magnitude = np.where(mean > 1, mean, pooled)
    falling = np.minimum.accumulate(np.maximum(magnitude, 1e-9))
    grid = np.geomspace(0.01, 4 * LARGEST_SCALE, 2000)
    expected = np.exp(-0.5 / grid) / -np.expm1(-1 / grid)
    fitted: Doubles = np.interp(falling, expected, grid)
    return fitted


def lay_out(scale: Doubles) -> NDArray[np.int32]:
    """How many groups of each kind cover coefficients of falling scale (n,); those of too small a scale are left."""
    kinds = scales()
    wanted = np.rint(np.log(kinds[0] / scale) / np.log(SCALE_RATIO)).astype(np.int64)
    ends = [int(np.searchsorted(wanted, kind, side="right")) for kind in range(kinds.size)]
    counts = np.zeros(kinds.size, np.int32)
    covered = 0
    for kind, (end, size) in enumerate(zip(ends, books().sizes.tolist(), strict=True)):
        if end > covered:
            counts[kind] = -(-(end - covered) // size)
            covered += int(counts[kind]) * size
    return counts


def make_tables(coefficients: Array, steps: Doubles, seed: int) -> Tables:
    """The tables of a cut.

    Args:
        coefficients: (frames, n) of the calibration frames, as `export.transform` orders them.
        steps: of the rates.
        seed: of the draws that stand for differences between frames, of which photos have none.
    """
    count = coefficients.shape[1]
    centroids, groups, expected, dictionaries = [], [], [], []
    for step in steps:
        scale = level_scales(coefficients, float(step))
        centroids.append(centroids_of(coefficients, float(step)))
        alone = np.clip(np.rint(coefficients / np.float32(step)), -MAX_LEVEL, MAX_LEVEL).astype(np.int16)
        generator = np.random.default_rng(seed)
        laid, likely, trained = [], [], []
        for activity in range(ACTIVITIES + 1):
            shrunk = scale * SCALE_RATIO ** -max(0, activity - 1)
            counts = lay_out(shrunk)
            seen = alone if activity == 0 else _draw(shrunk, counts, count, generator)
            laid.append(counts)
            likely.append(np.count_nonzero(seen) / len(seen))
            trained.append(_dictionary(LevelPacker(count, books(), counts.tolist(), b""), seen))
        groups.append(laid)
        expected.append(likely)
        dictionaries.append(tuple(trained))
    return Tables(
        count=count,
        steps=np.asarray(steps, np.float32),
        centroids=np.array(centroids, np.float32),
        books=books(),
        groups=np.array(groups, np.int32),
        expected=np.array(expected, np.float32),
        dictionaries=tuple(dictionaries),
    )


def centroids_of(coefficients: Array, step: float) -> Array:
    """How far outwards of its level a coefficient lies on average, in steps: for levels of 1, and of 2 and more."""
    magnitude = np.abs(coefficients / np.float32(step))
    levels = np.rint(magnitude)
    off = magnitude - levels
    means = [off[rows].mean(dtype=np.float64) if rows.any() else 0.0 for rows in (levels == 1, levels >= 2)]
    return np.array(means, np.float32)


def _draw(scale: Doubles, counts: NDArray[np.int32], count: int, generator: np.random.Generator) -> Levels:
    """Levels (DRAWN, n) from the Laplace model; what no group covers stays zero."""
    covered = min(count, int((counts * books().sizes).sum()))
    drawn = np.zeros((DRAWN, count), np.int16)
    values = generator.laplace(size=(DRAWN, covered)) * scale[:covered]
    drawn[:, :covered] = np.clip(np.rint(values), -MAX_LEVEL, MAX_LEVEL)
    return drawn


def _dictionary(packer: LevelPacker, levels: Levels) -> bytes:
    """A zstd dictionary for what the packer makes of levels (frames, n); empty when there is too little to learn."""
    samples: list[bytes | bytearray | memoryview[int]] = [packer.symbols(row) for row in levels]
    try:
        return zstandard.train_dictionary(DICTIONARY_BYTES, samples, level=19).as_bytes()
    except zstandard.ZstdError:
        return b""
