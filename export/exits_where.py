"""A front for exits of detectors that looks where: how likely an object stands on each cell of the map.

One 3x3 convolution gives every cell of the features a number, and the row that the head reads is the highest of these.
The convolution is distilled without labels from the whole model's own boxes: a cell's target is the greatest score of
a box whose inner half covers it, fitted by weighted ridge regression in closed form. What stands in one corner shows in
one cell, where a mean over the map would drown it. (Weak supervision by the greatest of many parts is multiple-instance
learning, Dietterich et al. 1997; here the places are known, from the whole model's answer.)
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto, helper

from export.exits import Parts, front_model, read_wire
from export.graph import Shape
from export.wires import Wire
from runtime.boxes import SCORE

KIND = "highest cells of a 3x3 convolution"
CELLS = 8  # of the map, that the row holds
SIDE = 3  # of the convolution
FAINT = 0.3  # boxes with a lower score cover nothing
RARE = 20.0  # a covered cell weighs so much more than an empty one
SHRINK = 1e-3  # ridge, as a share of the mean square of a standardized number
LEAST_COVERED = 50  # cells, below which nothing can be fitted

Array = NDArray[np.float32]


def where_front(wire: Wire | None, shape: Shape, features: Array, outputs: Array) -> ModelProto | None:
    """The front for a map on the wire; None where it is no map, or hardly anything was ever found.

    Args:
        wire: how the features stand on the wire; None: as floats.
        shape: (height, width, channels).
        features: of fit frames, float (frames, channels, height, width).
        outputs: the whole float model's boxes for them, (frames, n, 6).
    """
    if len(shape) != 3 or shape[0] * shape[1] < CELLS:
        return None
    height, width, _ = shape
    target = covered(outputs, height, width)
    if np.count_nonzero(target) < LEAST_COVERED:
        return None
    centre, weight, bias = _fit(features, target)
    parts = Parts()
    values = parts.add("Transpose", [read_wire(parts, wire, shape)], perm=[0, 3, 1, 2])
    # So that what the convolution pads with is the mean, as it was fitted.
    values = parts.add("Sub", [values, parts.hold(centre)])
    cells = parts.add("Conv", [values, parts.hold(weight), parts.hold(bias)], pads=[SIDE // 2] * 4)
    flat = parts.add("Flatten", [cells], axis=1)
    most = parts.hold(np.array([CELLS], np.int64))
    row, place = f"{parts.prefix}row", f"{parts.prefix}place"
    parts.nodes.append(helper.make_node("TopK", [flat, most], [row, place], f"{parts.prefix}highest", axis=1))
    return front_model(parts, wire, shape, row)


def covered(outputs: Array, height: int, width: int) -> Array:
    """By cell the greatest score of a box whose inner half covers it: (frames, height, width)."""
    found = np.zeros((len(outputs), height, width), np.float32)
    for cells, rows in zip(found, outputs, strict=True):
        for x1, y1, x2, y2, score, _ in rows[rows[:, SCORE] >= FAINT]:
            left, right = ((3 * x1 + x2) / 4 * width, (x1 + 3 * x2) / 4 * width)
            top, bottom = ((3 * y1 + y2) / 4 * height, (y1 + 3 * y2) / 4 * height)
            columns = slice(int(np.clip(left, 0, width - 1)), int(np.clip(right, 0, width - 1)) + 1)
            rows_covered = slice(int(np.clip(top, 0, height - 1)), int(np.clip(bottom, 0, height - 1)) + 1)
            part = cells[rows_covered, columns]
            np.maximum(part, score, out=part)
    return found


def _fit(features: Array, target: Array) -> tuple[Array, Array, Array]:
    """What is taken off first (1, channels, 1, 1), and weight (1, channels, 3, 3) and bias (1,) of the convolution."""
    channels, (height, width) = features.shape[1], target.shape[1:]
    centre = features.mean(axis=(0, 2, 3), dtype=np.float64)
    spread = features.std(axis=(0, 2, 3), dtype=np.float64) + 1e-6
    size = channels * SIDE * SIDE + 1
    gram, right, total = np.zeros((size, size)), np.zeros(size), 0.0
    for frame, wanted in zip(features, target, strict=True):
        scaled = (frame - centre[:, np.newaxis, np.newaxis]) / spread[:, np.newaxis, np.newaxis]
        padded = np.pad(scaled, ((0, 0), (SIDE // 2,) * 2, (SIDE // 2,) * 2))
        patches = np.lib.stride_tricks.sliding_window_view(padded, (SIDE, SIDE), axis=(1, 2))
        rows = patches.transpose(1, 2, 0, 3, 4).reshape(height * width, -1)
        rows = np.concatenate([rows, np.ones((len(rows), 1))], axis=1)
        weights = np.where(wanted.ravel() > 0, RARE, 1.0)
        gram += (rows * weights[:, np.newaxis]).T @ rows
        right += (rows * weights[:, np.newaxis]).T @ wanted.ravel()
        total += float(weights.sum())
    gram[np.diag_indices(size - 1)] += SHRINK * total
    found = np.linalg.solve(gram, right)
    weight = found[:-1].reshape(1, channels, SIDE, SIDE) / spread[np.newaxis, :, np.newaxis, np.newaxis]
    centre = centre.reshape(1, channels, 1, 1).astype(np.float32)
    return centre, weight.astype(np.float32), np.array([found[-1]], np.float32)
