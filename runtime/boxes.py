"""Boxes of two answers, matched: which objects both have found. Pure.

Rows are what a detector's last cut has: (n, 6) floats x1, y1, x2, y2, score, class index, in any one unit of length;
rows with a score of 0 are padding and are no boxes. Matching is that of PASCAL VOC (Everingham et al. 2010): boxes of
the left answer choose in the order of falling score, each the free box of its class on the right that it overlaps most,
if by at least half.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from runtime.datatypes import Tensor

LEAST_IOU = 0.5
COLUMNS = 6
SCORE, LABEL = 4, 5  # columns


@dataclass(frozen=True, slots=True)
class Matched:
    """What two answers have in common."""

    pairs: tuple[tuple[int, int], ...]  # (row on the left, row on the right), by falling score of the left
    left_only: tuple[int, ...]  # rows, rising
    right_only: tuple[int, ...]

    @property
    def f1(self) -> float:
        """Twice the matched boxes over all boxes of both; 1 where neither has any."""
        count = 2 * len(self.pairs) + len(self.left_only) + len(self.right_only)
        return 1.0 if count == 0 else 2 * len(self.pairs) / count


def iou(left: Tensor, right: Tensor) -> NDArray[np.float64]:
    """Intersection over union of every box with every box; 0 where a box has no area.

    Args:
        left: float (n, 4 or more), the first columns x1, y1, x2, y2.
        right: float (m, 4 or more).

    Returns:
        float64 (n, m), 0..1.
    """
    ones, twos = np.asarray(left, np.float64)[:, np.newaxis], np.asarray(right, np.float64)[np.newaxis]
    sides = np.minimum(ones[..., 2:4], twos[..., 2:4]) - np.maximum(ones[..., :2], twos[..., :2])
    common = np.prod(np.maximum(sides, 0.0), axis=-1)
    either = _areas(ones) + _areas(twos) - common
    shares: NDArray[np.float64] = np.divide(common, either, out=np.zeros_like(common), where=either > 0)
    return np.minimum(shares, 1.0)


def match(left: Tensor, right: Tensor, least_iou: float = LEAST_IOU) -> Matched:
    """Match the boxes of two answers, each to one of the same class at most.

    Args:
        left: float (n, 6); its scores say who chooses first. Of two equal ones the upper row does.
        right: float (m, 6).
        least_iou: overlap from which two boxes are one object, above 0.
    """
    overlaps = iou(left, right)
    possible = (overlaps >= least_iou) & (left[:, LABEL, np.newaxis] == right[np.newaxis, :, LABEL])
    free = right[:, SCORE] > 0
    pairs: list[tuple[int, int]] = []
    for row in map(int, np.argsort(-left[:, SCORE], kind="stable")):
        choice = np.flatnonzero(possible[row] & free)
        if left[row, SCORE] > 0 and len(choice):
            best = int(choice[np.argmax(overlaps[row, choice])])
            free[best] = False
            pairs.append((row, best))
    taken = {row for row, _ in pairs}
    left_only = (int(row) for row in np.flatnonzero(left[:, SCORE] > 0) if row not in taken)
    return Matched(tuple(pairs), tuple(left_only), tuple(map(int, np.flatnonzero(free))))


def _areas(boxes: NDArray[np.float64]) -> NDArray[np.float64]:
    areas: NDArray[np.float64] = np.prod(np.maximum(boxes[..., 2:4] - boxes[..., :2], 0.0), axis=-1)
    return areas
