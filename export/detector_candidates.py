"""Finds what a detector that suppresses by itself proposes before it does so: all boxes, and their scores."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray
from onnx import ModelProto, TensorProto, helper, shape_inference

from export.detector_layout import Layout
from export.detector_rows import Builder, as_shares
from export.graph import Index, Shape, copy_of, fixed_shape
from runtime.segment_onnx import session_options

Array = NDArray[np.float32]

# Behind these a score stands for more, or fewer, than one candidate.
CHOOSING = frozenset({"ReduceMax", "ArgMax", "TopK", "NonMaxSuppression", "NonZero", "ScatterND", "ScatterElements"})
NEAR = 1e-3  # of the input: how near a listed box must lie to the candidate that it is
MOST = 0.9  # of the listed boxes; of two that are equal a graph may move one


@dataclass(frozen=True, slots=True)
class Found:
    """Tables of all candidates, as the graph has them."""

    boxes: str
    scores: str
    count: int
    classes: int
    by_class: bool  # scores are (classes, count), else (count, classes)


def find_candidates(model: ModelProto, layout: Layout) -> Found | None:
    """What the graph's NonMaxSuppression reads.

    Where it has none, or one for candidates that were chosen before: boxes are the last table of four columns, and of
    the most rows, that the answer's boxes are made of; scores the last table with as many rows that is made without
    those boxes, before anything is chosen. None: there are no such tables.
    """
    index = Index(model)
    floats = _float_shapes(model)
    boxes_output = layout.outputs.get("boxes", layout.outputs.get("table", ""))
    boxes, scores = _suppressed(index, floats)
    boxes = boxes or _last_boxes(index, floats, boxes_output)
    if boxes is None:
        return None
    count = _plain(floats[boxes])[0]
    scores = scores or _last_scores(index, floats, layout.outputs.get("scores", boxes_output), boxes, count)
    if scores is None:
        return None
    plain = _plain(floats[scores])
    classes = math.prod(plain) // count
    return Found(boxes, scores, count, classes, by_class=plain[0] != count)


def append_candidates(
    model: ModelProto, build: Builder, found: Found, layout: Layout, size: tuple[int, int]
) -> str | None:
    """Append what makes (1, count, 4 + classes): boxes as in rows, then scores.

    A graph may suppress boxes in pixels and list them in shares, or turn their sides round, so it is tried on noise how
    the candidates have to be read for the listed boxes to be among them. None: in no way.
    """
    read = _format(model, found, layout, size)
    if read is None:
        return None
    swapped, pixels = read
    flat = build.add("Reshape", found.boxes, build.ints(1, found.count, 4))
    shares = as_shares(build, flat, swapped=swapped, size=size if pixels else None)
    if found.by_class:
        by_class = build.add("Reshape", found.scores, build.ints(1, found.classes, found.count))
        scores = build.add("Transpose", by_class, perm=[0, 2, 1])
    else:
        scores = build.add("Reshape", found.scores, build.ints(1, found.count, found.classes))
    return build.add("Concat", shares, scores, axis=2)


def _format(model: ModelProto, found: Found, layout: Layout, size: tuple[int, int]) -> tuple[bool, bool] | None:
    """Whether the candidates' sides are swapped, and whether they are in pixels."""
    listed, candidates = _on_noise(model, found, layout)
    usual = (layout.swapped, layout.pixels)
    if not len(listed):
        return usual
    wanted = _shares(listed, *usual, size)
    ways = sorted(product((False, True), (False, True)), key=lambda way: way != usual)
    for way in ways:
        shares = _shares(candidates, *way, size)
        nearest = np.array([np.abs(shares - box).max(axis=1).min() for box in wanted])
        if np.mean(nearest <= NEAR) >= MOST:
            return way
    return None


def _on_noise(model: ModelProto, found: Found, layout: Layout) -> tuple[Array, Array]:
    """The boxes (n, 4) that the graph lists for noise, and all candidates (count, 4)."""
    probe = copy_of(model)
    probe.graph.output.append(helper.make_tensor_value_info(found.boxes, TensorProto.FLOAT, None))
    session = ort.InferenceSession(probe.SerializeToString(), session_options(1))
    (image,) = session.get_inputs()
    noise = np.random.default_rng(0).random(image.shape, np.float32)
    names = [layout.outputs.get("boxes", layout.outputs.get("table", "")), found.boxes]
    if "number" in layout.outputs:
        names.append(layout.outputs["number"])
    listed, candidates, *number = session.run(names, {image.name: noise})
    listed = listed.reshape(-1, listed.shape[-1])[:, :4]
    if number:
        listed = listed[: int(number[0].flat[0])]
    return listed[np.ptp(listed, axis=1) > 0], candidates.reshape(-1, 4)


def _shares(boxes: Array, swapped: bool, pixels: bool, size: tuple[int, int]) -> Array:
    """Boxes as x1, y1, x2, y2 in shares of the input, clipped to it, as a graph may have clipped what it lists."""
    ordered = boxes[:, [1, 0, 3, 2]] if swapped else boxes
    height, width = size if pixels else (1, 1)
    clipped: Array = np.clip(ordered / np.array([width, height, width, height], np.float32), 0, 1)
    return clipped


def _float_shapes(model: ModelProto) -> dict[str, Shape]:
    """Shapes of the float tensors whose shape is fixed."""
    inferred = shape_inference.infer_shapes(model, strict_mode=False, data_prop=True)
    infos = [*inferred.graph.value_info, *inferred.graph.output]
    found = {info.name: fixed_shape(info) for info in infos if info.type.tensor_type.elem_type == TensorProto.FLOAT}
    return {name: shape for name, shape in found.items() if shape is not None}


def _plain(shape: Shape) -> Shape:
    return tuple(side for side in shape if side != 1)


def _made(index: Index, output: str) -> Iterator[str]:
    """What `output` is made of, in the graph's order."""
    for node in index.ancestors([output]):
        yield from (name for name in node.output if name and name != output)


def _suppressed(index: Index, floats: dict[str, Shape]) -> tuple[str, str] | tuple[None, None]:
    """What the only NonMaxSuppression of the graph reads, if that is all candidates."""
    nodes = [node for node in index.nodes if node.op_type == "NonMaxSuppression"]
    if len(nodes) != 1:
        return None, None
    boxes, scores = nodes[0].input[:2]
    if boxes not in floats or scores not in floats or floats[boxes][0] != 1 or len(_plain(floats[boxes])) != 2:
        return None, None
    return boxes, scores


def _last_boxes(index: Index, floats: dict[str, Shape], output: str) -> str | None:
    tables = [name for name in _made(index, output) if len(_plain(floats.get(name, ()))) == 2]
    tables = [name for name in tables if _plain(floats[name])[1] == 4 and floats[name][-1] == 4]
    most = max((_plain(floats[name])[0] for name in tables), default=0)
    answered = floats.get(output, (0, 0, 0))
    if most <= answered[-2]:
        return None
    return next(name for name in reversed(tables) if _plain(floats[name])[0] == most)


def _last_scores(index: Index, floats: dict[str, Shape], output: str, boxes: str, count: int) -> str | None:
    chosen: set[str] = {boxes}  # and everything that depends on it
    for node in index.nodes:
        if node.op_type in CHOOSING or any(name in chosen for name in node.input):
            chosen.update(node.output)
    needed = {name for node in index.ancestors([boxes]) for name in node.output}
    found = None
    for name in _made(index, output):
        plain = _plain(floats.get(name, ()))
        if count in plain and len(plain) <= 2 and name not in chosen and name not in needed:
            found = name
    return found
