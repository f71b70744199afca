"""A guard beside an exit's confidence: how far a frame's features lie from those of the frames the head was fitted on.

The distance is that of Mahalanobis under probabilistic principal components (Tipping and Bishop 1999) of the channels'
means and spreads over the map: each of the leading directions by its own variance, all that is left by one, as in ViM
(Wang et al. 2022), whose residual finds what lies off the subspace of known frames. The limit is the distance that a
stated share of frames stays below when its group has no part in the fit (cross-conformal prediction, Vovk 2015).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

HELD_BACK = 0.05  # share of frames like the fitted ones that lies beyond the limit
DIRECTIONS = 64  # at most
FRAMES_A_DIRECTION = 8
FOLDS = 5

Matrix = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Guard:
    """distance = root of the mean over statistics of (direction / its spread)² and (what is left / its spread)²."""

    centre: NDArray[np.float32]  # (statistics,)
    scale: NDArray[np.float32]  # (statistics,): 1 / spread
    basis: NDArray[np.float32]  # (statistics, directions), orthonormal
    direction_scale: NDArray[np.float32]  # (directions,): 1 / spread along each
    rest_scale: float

    def distance(self, statistics: NDArray[np.float32]) -> Matrix:
        """Of each frame's statistics (frames, statistics): (frames,)."""
        scaled = (statistics.astype(np.float64) - self.centre) * self.scale
        along = scaled @ self.basis
        rest = (scaled - along @ self.basis.T) * self.rest_scale
        found: Matrix = np.sqrt(
            (((along * self.direction_scale) ** 2).sum(axis=1) + (rest**2).sum(axis=1)) / len(self.scale)
        )
        return found


def fit_guard(statistics: NDArray[np.float32]) -> Guard:
    """Fit to the statistics (frames, statistics) of known frames."""
    values = statistics.astype(np.float64)
    centre, spread = values.mean(axis=0), values.std(axis=0)
    # A channel that never stirred says nothing while it is still, and much as soon as it stirs.
    spread = np.maximum(spread, max(1e-6, 0.05 * float(spread.mean())))
    _, singular, right = np.linalg.svd((values - centre) / spread, full_matrices=False)
    variance = singular**2 / len(values)
    count = max(1, min(DIRECTIONS, len(values) // FRAMES_A_DIRECTION, len(variance) - 1))
    left = values.shape[1] - count
    rest = max(float(variance[count:].sum()) / max(1, left), 1e-3)
    return Guard(
        centre.astype(np.float32),
        (1 / spread).astype(np.float32),
        right[:count].T.astype(np.float32),
        (1 / np.sqrt(np.maximum(variance[:count], rest))).astype(np.float32),
        1 / math.sqrt(rest),
    )


def held_out_distances(statistics: NDArray[np.float32], groups: NDArray[np.int64]) -> Matrix:
    """The distance of each frame under a guard fitted without its fold, which is made of whole groups: (frames,)."""
    names = np.unique(groups)
    folds = np.searchsorted(names, groups) * min(FOLDS, len(names)) // len(names)
    found = np.zeros(len(groups))
    for fold in np.unique(folds):
        rows = folds == fold
        found[rows] = fit_guard(statistics[~rows] if not rows.all() else statistics).distance(statistics[rows])
    return found


def distance_limit(distances: Matrix, held_back: float = HELD_BACK) -> float:
    """The limit that a further frame like these lies beyond with a chance of `held_back`: a conformal quantile."""
    rank = min(len(distances), math.ceil((len(distances) + 1) * (1 - held_back)))
    return float(np.sort(distances)[rank - 1])
