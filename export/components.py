"""Which channels tell most: nested selections and principal components, from second moments alone."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

HELD = 1 << 22  # values that wait to be summed
KNOWN = 1e-7  # of a channel's variance
EXACT = 1024  # up to so many channels are selected one by one, more of them in groups

Matrix = NDArray[np.float64]


class Moments:
    """Sums over rows, for their covariance; rows are gathered first, as many small products take long."""

    def __init__(self) -> None:
        self._waiting: list[NDArray[np.float32]] = []
        self._count, self._held = 0, 0
        self._total: Matrix = np.zeros(())
        self._outer: Matrix = np.zeros(())

    def add(self, values: NDArray[np.float32]) -> None:
        """Take in rows (places, width)."""
        self._waiting.append(values)
        self._held += values.size
        if self._held > HELD:
            self._flush()

    def _flush(self) -> None:
        values = np.concatenate(self._waiting)
        self._count += len(values)
        self._total = self._total + values.sum(axis=0, dtype=np.float64)
        self._outer = self._outer + values.T @ values
        self._waiting, self._held = [], 0

    def covariance(self) -> tuple[Matrix, Matrix]:
        """Mean (width,) and covariance (width, width)."""
        if self._waiting:
            self._flush()
        mean = self._total / self._count
        return mean, self._outer / self._count - np.outer(mean, mean)


def principal_order(covariance: Matrix, weight: Matrix) -> tuple[NDArray[np.int64], Matrix]:
    """Order channels so that the first ones, with the weights fitted again, give most of `weight` times all of them.

    Greedy: each step takes the channel that leaves least of the error, which is the one with the greatest
    |weight · R[:, i]|² / R[i, i], where R is the covariance of what the channels taken so far do not explain.

    Args:
        covariance: (width, width) of the channels.
        weight: (values, width).

    Returns:
        The order, and the variance of weight · channels that is left when the first w are known: (width + 1,).
    """
    width = len(covariance)
    left, read = covariance.copy(), weight @ covariance
    gram = weight.T @ weight
    # What is left of a channel below this is rounding: the others already tell all of it.
    floor = KNOWN * np.maximum(covariance.diagonal(), max(float(np.trace(covariance)) / width, 1e-30))
    taken: list[int] = []
    errors = [max(0.0, float(np.sum(gram * covariance)))]
    free = np.ones(width, dtype=bool)
    group = -(-width // EXACT)
    while len(taken) < width:
        new = free & (left.diagonal() > floor)
        gains = np.where(free, 0.0, -1.0)
        gains[new] = (read[:, new] ** 2).sum(axis=0) / left.diagonal()[new]
        for channel in np.argsort(-gains, kind="stable")[: min(group, width - len(taken))]:
            free[channel] = False
            taken.append(int(channel))
            gain = 0.0
            pivot = left[:, channel].copy()
            if pivot[channel] > floor[channel]:
                gain = float((read[:, channel] ** 2).sum()) / float(pivot[channel])
                read -= np.outer(read[:, channel] / pivot[channel], pivot)
                left -= np.outer(pivot / pivot[channel], pivot)
            errors.append(max(0.0, errors[-1] - gain))
    return np.array(taken, np.int64), np.array(errors)


def principal_basis(covariance: Matrix, weight: Matrix) -> tuple[Matrix, Matrix]:
    """The components of some channels that tell most of `weight` times all of them: its whitened SVD.

    With L = (weightᵀ weight)^½, these are the eigenvectors V of L · covariance · L, as rows Vᵀ L; each is scaled to a
    variance of one, so that one quantization scale fits all.

    Returns:
        (width, width), and the variance of weight · channels that is left when the first w are known: (width + 1,).
    """
    root = _root(weight.T @ weight)
    values, vectors = np.linalg.eigh(root @ covariance @ root)
    values, vectors = np.maximum(values[::-1], 0.0), vectors[:, ::-1]
    signs = np.where(vectors[np.abs(vectors).argmax(axis=0), np.arange(len(values))] < 0, -1.0, 1.0)
    scale = 1 / np.sqrt(np.maximum(values, 1e-6 * max(float(values[0]), 1e-30)))
    errors = np.concatenate([np.cumsum(values[::-1])[::-1], [0.0]])
    return (vectors * signs * scale).T @ root, errors


def _root(matrix: Matrix) -> Matrix:
    """The symmetric square root, with what is numerically nothing lifted so that it has an inverse."""
    values, vectors = np.linalg.eigh(matrix)
    root: Matrix = (vectors * np.sqrt(np.maximum(values, 1e-9 * max(float(values[-1]), 1e-30)))) @ vectors.T
    return root
