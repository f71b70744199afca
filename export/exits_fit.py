"""Fits an exit head without labels: a linear map from pooled features to the whole float model's own logits.

The penalty of the ridge regression is chosen by leaving out one group of neighbouring frames at a time, in closed form;
what each frame is told by the head that was fitted without its group is kept, since it is all that can be known of the
head before other frames are seen. The temperature is chosen by the likelihood of the whole model's answers.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

PENALTIES = tuple(10.0**power for power in range(-3, 5))  # relative to the mean variance of a feature

Matrix = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class LinearHead:
    """Logits = pooled features @ weight + bias."""

    weight: NDArray[np.float32]  # (features, classes)
    bias: NDArray[np.float32]
    penalty: float
    held_out: NDArray[np.float32]  # (frames, classes): logits of each frame, from a fit without its group


def fit_head(pooled: NDArray[np.float32], logits: NDArray[np.float32], groups: NDArray[np.int64]) -> LinearHead:
    """Fit a head to the whole model's logits (frames, classes), given pooled features (frames, features)."""
    features = pooled.astype(np.float64)
    # What is added to all logits of a frame changes no answer, so nothing is spent on it.
    target = logits.astype(np.float64) - logits.mean(axis=1, keepdims=True)
    centre, spread = features.mean(axis=0), features.std(axis=0)
    spread = np.where(spread > 1e-6 * max(1e-12, float(spread.max())), spread, 1.0)
    offset = target.mean(axis=0)
    left, singular, right = _decomposed((features - centre) / spread)
    projected = left.T @ (target - offset)
    members = [np.flatnonzero(groups == group) for group in np.unique(groups)]
    best, penalty, residual = np.inf, PENALTIES[0], np.empty_like(target)
    for value in PENALTIES:
        left_out = _held_out_residual(left, singular, projected, target - offset, members, value)
        error = float((left_out**2).sum())
        if error < best:
            best, penalty, residual = error, value, left_out
    weight = (right.T * (singular / (singular**2 + penalty * len(features)))) @ projected
    weight /= spread[:, np.newaxis]
    return LinearHead(
        weight.astype(np.float32),
        (offset - centre @ weight).astype(np.float32),
        penalty,
        (target - residual).astype(np.float32),
    )


def _decomposed(rows: Matrix) -> tuple[Matrix, Matrix, Matrix]:
    """Singular vectors and values, without those that are numerically nothing."""
    if len(rows) < 2 * rows.shape[1]:
        return np.linalg.svd(rows, full_matrices=False)
    # Of many more frames than features the small matrix of products is enough, and several times faster.
    squares, vectors = np.linalg.eigh(rows.T @ rows)
    kept = squares > 1e-10 * squares[-1]
    singular = np.sqrt(squares[kept])
    return rows @ vectors[:, kept] / singular, singular, vectors[:, kept].T


def _held_out_residual(
    left: Matrix,
    singular: Matrix,
    projected: Matrix,
    target: Matrix,
    members: list[NDArray[np.intp]],
    penalty: float,
) -> Matrix:
    shrunk = singular**2 / (singular**2 + penalty * len(left))
    residual = target - (left * shrunk) @ projected
    for rows in members:
        # The mean, fitted as well, takes its own share of every frame: the constant part of the hat matrix.
        hat = (left[rows] * shrunk) @ left[rows].T + 1 / len(left)
        residual[rows] = np.linalg.solve(np.eye(len(hat)) - hat, residual[rows])
    return residual


def choose_temperature(logits: NDArray[np.float32], answers: NDArray[np.int64]) -> float:
    """The temperature under which the whole model's answers are likeliest, by golden-section search."""

    def loss(power: float) -> float:
        scaled = logits.astype(np.float64) / np.exp(power)
        scaled -= scaled.max(axis=1, keepdims=True)
        log_sum = np.log(np.exp(scaled).sum(axis=1))
        return float(np.mean(log_sum - scaled[np.arange(len(answers)), answers]))

    low, high, ratio = np.log(0.02), np.log(50.0), (np.sqrt(5) - 1) / 2
    for _ in range(40):
        left, right = high - ratio * (high - low), low + ratio * (high - low)
        low, high = (low, right) if loss(left) <= loss(right) else (left, high)
    return round(float(np.exp((low + high) / 2)), 4)
