"""A guard beside an exit's confidence: how unlike a frame is those that the head was fitted on.

It looks at each channel's mean and the logarithm of its spread over the map, and takes the greatest of several scores.
One is the distance of Mahalanobis under probabilistic principal components (Tipping and Bishop 1999): each leading
direction by its own variance, all that is left by one, as in ViM (Wang et al. 2022), whose residual finds what lies off
the subspace of known frames. It knows of no direction, so what shifts many channels a little stays within it. The
others are filters matched to kinds of damage that the fit frames were given (outlier exposure, Hendrycks et al. 2019):
the direction in which that damage moves a frame, whitened by how known frames differ anyway. The limit is what a stated
share of frames stays below when their group has no part in the fit (cross-conformal prediction, Vovk 2015).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import cv2
import numpy as np
from numpy.typing import NDArray

from runtime.datatypes import Tensor

HELD_BACK = 0.05  # share of frames like the fitted ones that lies beyond the limit
DIRECTIONS = 64  # at most
FRAMES_A_DIRECTION = 8
FOLDS = 5
SHRINKAGE = 0.05  # of the whitening, in variances of a statistic
UNIT = 0.98  # every score is counted in its own quantile of this, so that none drowns the others
STILL = 0.05  # a statistic that hardly stirs is taken to spread by this share of the mean spread

Matrix = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Guard:
    """distance = greatest of the Mahalanobis distance and the filters' scores, each in its own unit."""

    logged: int  # so many statistics, the last, are spreads and taken as logarithms
    floor: NDArray[np.float32]  # (logged,): added before the logarithm
    centre: NDArray[np.float32]  # (statistics,)
    scale: NDArray[np.float32]  # (statistics,): 1 / spread
    basis: NDArray[np.float32]  # (statistics, directions), orthonormal
    direction_scale: NDArray[np.float32]  # (directions,): 1 / spread along each
    rest_scale: float  # 1 / spread of what is left
    filters: NDArray[np.float32]  # (statistics, damages)
    units: NDArray[np.float32]  # (1 + damages,)

    def distance(self, statistics: NDArray[np.float32]) -> Matrix:
        """Of each frame's statistics (frames, statistics): (frames,)."""
        found: Matrix = (self.scores(statistics) / self.units).max(axis=1)
        return found

    def scores(self, statistics: NDArray[np.float32]) -> Matrix:
        """(frames, 1 + damages)."""
        scaled = (_taken(statistics, self.logged, self.floor) - self.centre) * self.scale
        along = scaled @ self.basis
        rest = (scaled - along @ self.basis.T) * self.rest_scale
        squares = ((along * self.direction_scale) ** 2).sum(axis=1) + (rest**2).sum(axis=1)
        return np.column_stack([np.sqrt(squares / len(self.scale)), scaled @ self.filters])


def fit_guard(
    statistics: NDArray[np.float32],
    groups: NDArray[np.int64],
    damaged: Sequence[tuple[NDArray[np.float32], NDArray[np.int64]]],
    *,
    logged: int,
) -> tuple[Guard, Matrix]:
    """Fit to the statistics (frames, statistics) of known frames, and of damaged copies of some, by kind of damage.

    Args:
        groups: of frames near each other in time, of the known frames and of the damaged ones.
        logged: how many statistics, the last, are spreads.

    Returns:
        The guard, and the distance of each known frame under guards that were fitted without its fold: (frames,).
    """
    names = np.unique(groups)
    count = min(FOLDS, len(names))
    folds = np.searchsorted(names, groups) * count // len(names)
    scores = np.zeros((len(groups), 1 + len(damaged)))
    for fold in range(count if count > 1 else 0):
        out = names[(np.arange(len(names)) * count // len(names)) == fold]
        kept = [rows[~np.isin(members, out)] for rows, members in damaged]
        scores[folds == fold] = _fit(statistics[folds != fold], kept, logged).scores(statistics[folds == fold])
    guard = _fit(statistics, [rows for rows, _ in damaged], logged)
    if count <= 1:
        scores = guard.scores(statistics)
    units = np.quantile(scores, UNIT, axis=0)
    # A damage that leaves no trace in these features gives a filter of nothing.
    units = np.where(units > 1e-6, units, np.inf)
    guard = replace(guard, units=units.astype(np.float32))
    return guard, (scores / units).max(axis=1)


def distance_limit(distances: Matrix, held_back: float = HELD_BACK) -> float:
    """The limit that a further frame like these lies beyond with a chance of `held_back`: a conformal quantile."""
    rank = min(len(distances), math.ceil((len(distances) + 1) * (1 - held_back)))
    return float(np.sort(distances)[rank - 1])


def damages(generator: np.random.Generator) -> Mapping[str, Callable[[Tensor], Tensor]]:
    """Kinds of damage to a frame, uint8 (1, height, width, 3): what a bad sensor, lens, line or light does."""
    return {
        "noise": lambda frame: _bytes(frame + generator.normal(0, 16, frame.shape)),
        "blur": lambda frame: cv2.GaussianBlur(frame[0], (0, 0), 1 + min(frame.shape[1:3]) / 100)[np.newaxis],
        "blocks": lambda frame: _jpeg(frame, 15),
        "haze": lambda frame: _bytes(frame.mean() + 0.35 * (frame - frame.mean())),
    }


def _bytes(values: NDArray[np.floating]) -> Tensor:
    whole: Tensor = np.clip(np.rint(values), 0, 255).astype(np.uint8)
    return whole


def _jpeg(frame: Tensor, quality: int) -> Tensor:
    _, data = cv2.imencode(".jpg", frame[0], [cv2.IMWRITE_JPEG_QUALITY, quality])
    return np.asarray(cv2.imdecode(data, cv2.IMREAD_COLOR), np.uint8)[np.newaxis]


def _taken(statistics: NDArray[np.float32], logged: int, floor: NDArray[np.floating]) -> Matrix:
    values = statistics.astype(np.float64)
    if logged:
        values[:, -logged:] = np.log(values[:, -logged:] + floor)
    return values


def _fit(statistics: NDArray[np.float32], damaged: Sequence[NDArray[np.float32]], logged: int) -> Guard:
    spreads = statistics[:, statistics.shape[1] - logged :]
    floor: Matrix = np.zeros(0)
    if logged:
        floor = 1e-6 + STILL * (spreads.mean(axis=0, dtype=np.float64) + 0.1 * float(spreads.mean()))
    values = _taken(statistics, logged, floor)
    centre, spread = values.mean(axis=0), values.std(axis=0)
    spread = np.maximum(spread, max(1e-6, STILL * float(spread.mean())))
    scaled = (values - centre) / spread
    _, singular, right = np.linalg.svd(scaled, full_matrices=False)
    variance = singular**2 / len(values)
    count = max(1, min(DIRECTIONS, len(values) // FRAMES_A_DIRECTION, len(variance) - 1))
    rest = max(float(variance[count:].sum()) / max(1, values.shape[1] - count), 1e-3)
    moved = [((_taken(rows, logged, floor) - centre) / spread).mean(axis=0) for rows in damaged]
    whitening = scaled.T @ scaled / len(values) + SHRINKAGE * np.eye(len(centre))
    filters = np.linalg.solve(whitening, np.array(moved).reshape(len(moved), len(centre)).T)
    return Guard(
        logged,
        floor.astype(np.float32),
        centre.astype(np.float32),
        (1 / spread).astype(np.float32),
        right[:count].T.astype(np.float32),
        (1 / np.sqrt(np.maximum(variance[:count], rest))).astype(np.float32),
        1 / math.sqrt(rest),
        filters.astype(np.float32),
        np.ones(1 + len(moved), np.float32),
    )
