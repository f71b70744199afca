"""Finds what a detector that suppresses by itself proposes before it does so: all boxes, and their scores."""

from __future__ import annotations

from collections.abc import Iterator

from onnx import ModelProto, TensorProto, shape_inference

from export.detector_layout import Layout
from export.detector_rows import Builder, as_shares
from export.graph import Index, Shape, fixed_shape

# Behind these a score stands for more, or fewer, than one candidate.
CHOOSING = frozenset({"ReduceMax", "ArgMax", "TopK", "NonMaxSuppression", "NonZero", "ScatterND", "ScatterElements"})


def find_candidates(model: ModelProto, build: Builder, layout: Layout, size: tuple[int, int]) -> str | None:
    """Append what makes (1, count, 4 + classes): boxes as in rows, then scores; None where they are not found.

    They are what the graph's NonMaxSuppression reads. Where it has none, or one for candidates that were chosen before:
    boxes are the last table of four columns, and of the most rows, that the answer's boxes are made of; scores the last
    table with as many rows that is made without those boxes, before anything is chosen.
    """
    index = Index(model)
    floats = _float_shapes(model)
    boxes_output = layout.outputs.get("boxes", layout.outputs.get("table", ""))
    scores_output = layout.outputs.get("scores", boxes_output)
    boxes, scores = _suppressed(index, floats)
    if boxes is None:
        boxes = _last_boxes(index, floats, boxes_output)
    if boxes is None:
        return None
    count = _plain(floats[boxes])[0]
    scores = scores or _last_scores(index, floats, scores_output, boxes, count)
    if scores is None:
        return None
    plain = _plain(floats[scores])
    if plain[0] == count:
        classes = plain[1] if len(plain) == 2 else 1
        by_box = build.add("Reshape", scores, build.ints(1, count, classes))
    else:
        by_class = build.add("Reshape", scores, build.ints(1, plain[0], count))
        by_box = build.add("Transpose", by_class, perm=[0, 2, 1])
    flat = build.add("Reshape", boxes, build.ints(1, count, 4))
    shares = as_shares(build, flat, swapped=layout.swapped, size=size if layout.pixels else None)
    return build.add("Concat", shares, by_box, axis=2)


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
