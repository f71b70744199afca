"""Brings any detector's graph into one form: uint8 frames in, rows (batch, rows, 6) out, suppression inside.

A row is x1, y1, x2, y2 in shares of the model's input, score, class index; rows come by falling score and are padded
with zeros. So a detector is a chain with one input and one output like any other model. Everything behind the last
layer with weights keeps its numbers in float: its nodes are named by EPILOGUE.
"""

from __future__ import annotations

import ast
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import msgspec
import numpy as np
import onnxruntime as ort
from onnx import ModelProto, NodeProto, TensorProto, ValueInfoProto, helper

from export.detector_candidates import append_candidates, find_candidates
from export.detector_layout import Layout, Output, recognize
from export.detector_rows import (
    FIELDS,
    ROWS,
    Builder,
    Candidates,
    as_shares,
    best_rows,
    corners,
    suppress,
    within_input,
)
from export.graph import (
    EPILOGUE,
    FRAME,
    LAYOUT_OPS,
    LOGITS,
    Index,
    Shape,
    extract,
    rename,
    static_shapes,
)
from export.simplify import Simplified, add_prologue, open_batch, slimmed, with_fixed_input
from export.source import DetectorOptions, Source
from runtime.errors import BundleError
from runtime.segment_onnx import session_options

CANDIDATES = "candidates"  # output of the raw model
LEAST_SCORE = 0.05  # candidates up to this make no row, whatever a bundle's threshold for showing them
LAYERS = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul"})
BATCH_TOLERANCE = 1e-5  # between a frame's rows alone and in a batch


@dataclass(frozen=True, slots=True)
class Detector:
    """A detector in the one form that every later stage works on."""

    source: Source  # with the preprocessing and the labels that its layout implies
    simplified: Simplified  # LOGITS is (batch, rows, 6)
    raw: ModelProto | None  # FRAME → CANDIDATES (batch, count, 4 + classes): boxes as in rows, scores; None: not found
    layout: str  # in words


def simplify_detector(source: Source, options: DetectorOptions) -> Detector:
    """Bring the source's detector into the one form.

    Raises:
        BundleError: its outputs have none of the layouts that are understood, or it is built of what ONNX Runtime
            cannot simplify.
    """
    model = slimmed(with_fixed_input(source), source.name)
    control = sorted({node.op_type for node in model.graph.node} & {"If", "Loop", "Scan", "SequenceMap"})
    if control:
        raise BundleError(f"{source.name} has {' and '.join(control)} inside; export it without control flow")
    size = source.preprocess.height, source.preprocess.width
    shapes = static_shapes(model)
    outputs = [Output(info.name, shapes.get(info.name), _is_float(info)) for info in model.graph.output]
    layout = recognize(source.name, outputs, size, options.boxes)
    labels = _labels(source, layout, options)
    _name_epilogue(model)
    build = Builder()
    candidates: str | None = None
    if layout.kind in ("yolo", "yolo with objectness"):
        found = _yolo(build, layout, shapes, size)
        rows, count = suppress(build, found, options.iou_threshold, LEAST_SCORE), min(ROWS, found.count)
        candidates = build.add("Concat", found.boxes, found.scores, axis=2)
    else:
        rows, count = _listed(build, layout, shapes, size, labels)
        proposed = find_candidates(model, layout)
        if proposed is not None:
            candidates = append_candidates(model, build, proposed, layout, size)
    rows = within_input(build, rows)
    build.append_to(model)
    _declare(model, {CANDIDATES: (candidates, None), LOGITS: (rows, (1, count, FIELDS))})
    add_prologue(model, source)
    shapes = static_shapes(model)
    opened = open_batch(model, shapes)
    whole = extract(opened, list(opened.graph.input), [opened.graph.output[-1]], "whole")
    raw = None
    if candidates is not None:
        raw = extract(opened, list(opened.graph.input), [opened.graph.output[0]], "raw")
    fit = options.fit or ("stretch" if layout.kind == "lists" else "letterbox")
    return Detector(
        source=replace(source, labels=labels, preprocess=msgspec.structs.replace(source.preprocess, fit=fit)),
        simplified=Simplified(whole, shapes, (), len(labels), batchable=_takes_batch(whole, shapes[FRAME])),
        raw=raw,
        layout=layout.kind,
    )


def _is_float(info: ValueInfoProto) -> bool:
    return bool(info.type.tensor_type.elem_type == TensorProto.FLOAT)


def _labels(source: Source, layout: Layout, options: DetectorOptions) -> tuple[str, ...]:
    """The classes' names: those given, those that came with the model, else numbers."""
    labels = options.names or source.labels or _named_inside(source.model)
    if labels is None and layout.classes is None:
        raise BundleError(f"{source.name} does not say what its classes are; add --classes FILE, one name a line")
    if labels is None:
        return tuple(f"class {index}" for index in range(layout.classes or 0))
    if layout.classes not in (None, len(labels)):
        raise BundleError(f"{source.name} has {layout.classes} classes, but {len(labels)} names; give one for each")
    return labels


def _named_inside(model: ModelProto) -> tuple[str, ...] | None:
    """The names that Ultralytics writes into a model's metadata: {0: 'person', 1: 'bicycle'}."""
    text = next((entry.value for entry in model.metadata_props if entry.key == "names"), None)
    try:
        names = ast.literal_eval(text or "")
    except (ValueError, SyntaxError):
        return None
    if not isinstance(names, dict) or sorted(names) != list(range(len(names))):
        return None
    return tuple(str(names[index]) for index in range(len(names)))


def _name_epilogue(model: ModelProto) -> None:
    """Mark the nodes that no layer with weights needs: decoding and suppression."""
    index = Index(model)
    layers = [node for node in index.nodes if node.op_type in LAYERS and not _is_expectation(node, index)]
    needed = {id(node) for node in index.ancestors([name for node in layers for name in node.output])}
    for node in index.nodes:
        if id(node) not in needed:
            node.name = f"{EPILOGUE}{node.name}"


def _is_expectation(node: NodeProto, index: Index) -> bool:
    """A convolution that takes the mean of a distribution, as YOLOv8 decodes distances (Li et al., 2020)."""
    name = node.input[0]
    while name in index.producer and index.producer[name].op_type in LAYOUT_OPS:
        name = index.producer[name].input[0]
    weight = index.constants.get(node.input[1])
    softmax = name in index.producer and index.producer[name].op_type == "Softmax"
    return node.op_type == "Conv" and softmax and weight is not None and weight.dims[0] == 1


def _yolo(build: Builder, layout: Layout, shapes: Mapping[str, Shape], size: tuple[int, int]) -> Candidates:
    """Candidates of one output with centre, size and scores side by side."""
    table = layout.outputs["table"]
    shape = shapes[table]
    classes = layout.classes or 0
    if layout.kind == "yolo":
        shape = (shape[0], shape[2], shape[1])
        table = build.add("Transpose", table, perm=[0, 2, 1])
    first = shape[2] - classes
    scores = build.columns(table, *range(first, shape[2]))
    if layout.kind == "yolo with objectness":
        scores = build.add("Mul", scores, build.columns(table, 4))
    boxes = corners(build, build.columns(table, 0, 1, 2, 3))
    return Candidates(as_shares(build, boxes, swapped=False, size=size), scores, shape[1], classes)


def _listed(
    build: Builder, layout: Layout, shapes: Mapping[str, Shape], size: tuple[int, int], labels: tuple[str, ...]
) -> tuple[str, int]:
    """Rows of a graph that suppresses by itself, and how many they are."""
    pixels = size if layout.pixels else None
    if layout.kind == "rows":
        table = layout.outputs["table"]
        boxes = as_shares(build, build.columns(table, 0, 1, 2, 3), swapped=layout.swapped, size=pixels)
        rows = build.add("Concat", boxes, build.columns(table, 4, 5), axis=2)
        count: int | None = shapes[table][1]
    else:
        boxes = as_shares(build, layout.outputs["boxes"], swapped=layout.swapped, size=pixels)
        columns = []
        for role in ("scores", "classes"):
            values = build.add("Cast", layout.outputs[role], to=TensorProto.FLOAT)
            columns.append(build.add("Unsqueeze", values, build.ints(-1)))
        # Detectors that know a background class call it 0, and a list of names seldom has it.
        if layout.background and labels[0].strip("_").lower() != "background":
            columns[1] = build.add("Sub", columns[1], build.scalar(1.0))
        rows = build.add("Concat", boxes, *columns, axis=-1)
        shape = shapes.get(layout.outputs["boxes"])
        count = shape[-2] if shape is not None else None
        if layout.flat:
            rows = build.add("Unsqueeze", rows, build.ints(0))
        if "number" in layout.outputs and count is not None:
            number = build.add("Reshape", layout.outputs["number"], build.ints(-1, 1, 1))
            place = build.value(np.arange(count, dtype=np.float32).reshape(1, count, 1))
            counted = build.add("Less", place, build.add("Cast", number, to=TensorProto.FLOAT))
            rows = build.add("Where", counted, rows, build.scalar(0.0))
    if count is None:
        # So that there are enough to choose from.
        rows = build.add("Concat", rows, build.value(np.zeros((1, ROWS, FIELDS), np.float32)), axis=1)
    most = min(ROWS, count or ROWS)
    return best_rows(build, rows, LEAST_SCORE, most), most


def _declare(model: ModelProto, made: Mapping[str, tuple[str | None, Shape | None]]) -> None:
    """Make these tensors, where there are any, the graph's outputs by their new names; a shape of None is inferred."""
    del model.graph.output[:]
    for name, (tensor, shape) in made.items():
        if tensor is not None:
            model.graph.output.append(helper.make_tensor_value_info(tensor, TensorProto.FLOAT, shape))
            rename(model, tensor, name)


def _takes_batch(whole: ModelProto, shape: Shape) -> bool:
    """Whether two frames at once get the rows that they get alone; a graph's own suppression may know one only."""
    session = ort.InferenceSession(whole.SerializeToString(), session_options(1))
    frames = np.random.default_rng(0).integers(0, 256, (2, *shape[1:]), dtype=np.uint8)
    alone = [session.run(None, {FRAME: frame[np.newaxis]})[0] for frame in frames]
    try:
        (together,) = session.run(None, {FRAME: frames})
    except Exception:  # noqa: BLE001  onnxruntime's own errors share no public base class; any means: not this batch
        return False
    expected: Any = np.concatenate(alone)
    return bool(together.shape == expected.shape and np.abs(together - expected).max() <= BATCH_TOLERANCE)
