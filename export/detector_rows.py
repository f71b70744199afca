"""Builds the end of a detector in ONNX: candidates → non-maximum suppression → rows, with an open batch throughout.

A row is x1, y1, x2, y2 in shares of the model's input, score, class index. Rows come by falling score and are padded
with zeros. Only the best class of a candidate counts, and suppression is within a class, as in Ultralytics' and
TensorFlow's detectors with one label a box. All operators are standard and mean the same from opset 13 to 21.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, TensorProto, helper

from export.graph import EPILOGUE, constant

ROWS = 100  # at most; what TensorFlow's detectors give, and more than a camera's scene holds
FIELDS = 6  # of a row


@dataclass(slots=True)
class Builder:
    """Nodes and constants that are appended to a graph, all named under one prefix."""

    prefix: str = EPILOGUE
    nodes: list[NodeProto] = field(default_factory=list)
    constants: list[TensorProto] = field(default_factory=list)

    def add(self, op_type: str, *inputs: str, outputs: int = 1, **attributes: Any) -> str:
        """Append a node and name its first output; the others have the same name with a number."""
        name = f"{self.prefix}{op_type.lower()}_{len(self.nodes)}"
        names = [name, *(f"{name}_{place}" for place in range(1, outputs))]
        self.nodes.append(helper.make_node(op_type, list(inputs), names, name, **attributes))
        return name

    def value(self, value: NDArray[np.generic]) -> str:
        """Append a constant."""
        name = f"{self.prefix}constant_{len(self.constants)}"
        self.constants.append(constant(name, value))
        return name

    def ints(self, *values: int) -> str:
        """Append a list of integers."""
        return self.value(np.array(values, np.int64))

    def floats(self, *values: float) -> str:
        """Append a list of floats."""
        return self.value(np.array(values, np.float32))

    def scalar(self, value: float) -> str:
        """Append one float."""
        return self.value(np.array(value, np.float32))

    def columns(self, values: str, *wanted: int) -> str:
        """Some entries of the last axis, in the given order."""
        return self.add("Gather", values, self.ints(*wanted), axis=-1)

    def append_to(self, model: ModelProto) -> None:
        """Put everything behind the nodes of `model`."""
        model.graph.node.extend(self.nodes)
        model.graph.initializer.extend(self.constants)


@dataclass(frozen=True, slots=True)
class Candidates:
    """What the network proposes before anything is suppressed, as names of float tensors."""

    boxes: str  # (batch, count, 4)
    scores: str  # (batch, count, classes), each from 0 to 1
    count: int
    classes: int


def suppress(build: Builder, found: Candidates, iou_threshold: float, least_score: float, rows: int = ROWS) -> str:
    """Rows (batch, at most `rows`, 6) of what non-maximum suppression leaves; boxes stay as the candidates have them.

    Args:
        iou_threshold: of two boxes of one class that overlap by more than this the one with the lower score goes.
        least_score: candidates with a score up to this are dropped.
    """
    by_class, best, label = found.scores, found.scores, None
    if found.classes > 1:
        # TopK gives value and place at once, and unlike ReduceMax has one form in all opsets.
        best = build.add("TopK", found.scores, build.ints(1), outputs=2, axis=-1)
        label = f"{best}_1"
        mine = build.add("Equal", label, build.ints(*range(found.classes)))
        by_class = build.add("Where", mine, found.scores, build.scalar(0.0))
    selected = build.add(
        "NonMaxSuppression",
        found.boxes,
        build.add("Transpose", by_class, perm=[0, 2, 1]),
        build.ints(rows),
        build.floats(iou_threshold),
        build.floats(least_score),
    )
    # A mask instead of a list: its length does not depend on what was found, and it holds for any batch.
    flat = build.add("Squeeze", best, build.ints(2))
    how_many = build.add("Gather", build.add("Shape", selected), build.ints(0), axis=0)
    one = helper.make_tensor("one", TensorProto.FLOAT, [1], [1.0])
    kept = build.add(
        "ScatterND",
        build.add("Mul", flat, build.scalar(0.0)),  # not from the shape: that would be folded into a batch of one
        build.columns(selected, 0, 2),
        build.add("ConstantOfShape", how_many, value=one),
    )
    scores = build.add("Unsqueeze", build.add("Mul", flat, kept), build.ints(2))
    fields = [found.boxes, scores]
    if label is not None:
        fields.append(build.add("Cast", label, to=TensorProto.FLOAT))
    else:
        fields.append(build.add("Mul", scores, build.scalar(0.0)))
    return best_rows(build, build.add("Concat", *fields, axis=2), 0.0, min(rows, found.count))


def best_rows(build: Builder, rows: str, least_score: float, most: int) -> str:
    """The `most` rows of (batch, count, 6) with the highest scores, zeros for those with a score up to `least_score`.

    `count` must not be below `most`.
    """
    scores = build.add("Squeeze", build.columns(rows, 4), build.ints(2))
    order = build.add("TopK", scores, build.ints(most), outputs=2, axis=1)
    chosen = build.add("GatherND", rows, build.add("Unsqueeze", f"{order}_1", build.ints(2)), batch_dims=1)
    valid = build.add("Greater", build.columns(chosen, 4), build.scalar(least_score))
    # Not a product: zero times a box that is not finite would not be zero.
    return build.add("Where", valid, chosen, build.scalar(0.0))


def as_shares(build: Builder, boxes: str, *, swapped: bool, size: tuple[int, int] | None) -> str:
    """Boxes (batch, n, 4) as x1, y1, x2, y2 in shares of the input.

    Args:
        swapped: they are y1, x1, y2, x2.
        size: (height, width) of the input when they are in pixels.
    """
    if swapped:
        boxes = build.columns(boxes, 1, 0, 3, 2)
    if size is not None:
        height, width = size
        boxes = build.add("Mul", boxes, build.floats(1 / width, 1 / height, 1 / width, 1 / height))
    return boxes


def corners(build: Builder, boxes: str) -> str:
    """Boxes (batch, n, 4) of centre x, centre y, width, height as x1, y1, x2, y2."""
    centre, size = build.columns(boxes, 0, 1), build.columns(boxes, 2, 3)
    half = build.add("Mul", size, build.scalar(0.5))
    return build.add("Concat", build.add("Sub", centre, half), build.add("Add", centre, half), axis=-1)


def within_input(build: Builder, rows: str) -> str:
    """Rows with their boxes clipped to the input."""
    boxes = build.add("Clip", build.columns(rows, 0, 1, 2, 3), build.scalar(0.0), build.scalar(1.0))
    return build.add("Concat", boxes, build.columns(rows, 4, 5), axis=-1)
