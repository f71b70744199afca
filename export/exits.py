"""Builds exit heads as graphs: features as they stand on the wire in, logits and the guard's distance out.

A head is made of a front, which turns the features into one row of numbers, and of one linear layer (`exits_fit`). The
front pools the features themselves, or, in a scalable branch, what the trunk's next layers make of them: EE-LLM
(2312.04916) and Balcony (2503.05005) hang a whole layer of the trunk's kind before an exit, ADP-C (2104.00749)
redesigns its exits as more than one linear layer. A model's own exits are taken over as they are.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, TensorProto, helper

from export.exits_fit import LinearHead
from export.exits_guard import Guard
from export.graph import (
    LOGITS,
    OPSET,
    Index,
    Shape,
    constant,
    copy_of,
    extract,
    finish,
    halved,
    macs,
    opset,
    static_shapes,
    tensor_info,
)
from export.slicing import on_wire
from export.wires import Wire

DISTANCE = "distance"  # a head's second output: float32 (batch,)
FEATURES = "features"  # its input
ROW = "row"  # what a front gives: float32 (batch, numbers)
PREFIX = "kinflow/exit/"

Shapes = tuple[Shape, Shape]
Pooling = Literal["mean", "moments", "grid"]
POOLINGS: dict[Pooling, str] = {
    "mean": "linear on means",
    "moments": "linear on means and spreads",
    "grid": "linear on means, spreads and a 2x2 grid",
}


@dataclass(slots=True)
class Parts:
    """Nodes and weights of a graph that grows."""

    opset: int = OPSET
    prefix: str = PREFIX  # of all names, so that they are no others' of the graph
    nodes: list[NodeProto] = field(default_factory=list)
    weights: list[TensorProto] = field(default_factory=list)

    def add(self, op_type: str, inputs: Sequence[str], **attributes: Any) -> str:
        """Append a node; the name of its only output."""
        name = f"{self.prefix}{len(self.nodes)}"
        self.nodes.append(helper.make_node(op_type, list(inputs), [name], f"{name}/{op_type}", **attributes))
        return name

    def hold(self, value: NDArray[Any]) -> str:
        """Append a constant; its name."""
        name = f"{self.prefix}constant{len(self.weights)}"
        self.weights.append(constant(name, value))
        return name

    def mean(self, values: str, axes: Sequence[int]) -> str:
        """The mean over axes, which opset 18 made an input."""
        if self.opset >= 18:
            return self.add("ReduceMean", [values, self.hold(np.array(axes, np.int64))], keepdims=0)
        return self.add("ReduceMean", [values], axes=list(axes), keepdims=0)

    def greatest(self, values: str, output: str) -> NodeProto:
        """A node that gives the greatest of each row of (batch, numbers), as `output`."""
        name = f"{self.prefix}{output}"
        if self.opset >= 18:
            return helper.make_node(
                "ReduceMax", [values, self.hold(np.array([1], np.int64))], [output], name, keepdims=0
            )
        return helper.make_node("ReduceMax", [values], [output], name, axes=[1], keepdims=0)


def pooled_front(wire: Wire | None, shape: Shape, pooling: Pooling) -> ModelProto:
    """Pools features of `shape` on the wire: (height, width, channels), (tokens, channels) or (channels,)."""
    parts = Parts()
    row = _pool_wire(parts, wire, shape, pooling)
    return front_model(parts, wire, shape, row)


def branch(whole: ModelProto, tensor: str, made: str, kind: Literal["float32", "uint8"], shapes: Shapes) -> ModelProto:
    """The layers of a whole model between the tensor at a cut and the float tensor they make, as a graph.

    `shapes` are those of both in the graph, without the batch.
    """
    ends = tensor_info(tensor, kind, shapes[0]), tensor_info(made, "float32", shapes[1])
    return extract(copy_of(whole), [ends[0]], [ends[1]], "branch")


def branch_front(layers: ModelProto, wire: Wire | None, shapes: Shapes, pooling: Pooling) -> ModelProto:
    """Pools what a branch's layers make of the features; they may read floats or the wire's own uint8."""
    source, made = layers.graph.input[0], layers.graph.output[0].name
    reading, parts = Parts(opset(layers), f"{PREFIX}wire/"), Parts(opset(layers))
    values = FEATURES
    if source.type.tensor_type.elem_type == TensorProto.FLOAT:
        values = read_wire(reading, wire, on_wire(shapes[0]))
    nodes = [*reading.nodes, _channels_first(values, source.name, shapes[0]), *layers.graph.node]
    made = parts.add("Transpose", [made], perm=[0, 2, 3, 1]) if len(shapes[1]) == 3 else made
    row = _pool(parts, made, on_wire(shapes[1]), pooling)
    return front_model(parts, wire, on_wire(shapes[0]), row, nodes, [*reading.weights, *layers.graph.initializer])


def statistics_front(wire: Wire | None, shape: Shape) -> ModelProto:
    """What a guard looks at: each channel's mean and spread over the map or the tokens."""
    return pooled_front(wire, shape, "moments")


def head_model(front: ModelProto, head: LinearHead, name: str) -> ModelProto:
    """A front and the linear layer behind it."""
    weights, nodes = halved(f"{name}/weight", head.weight)
    weights.append(constant(f"{name}/bias", head.bias))
    classify = helper.make_node("Gemm", [ROW, f"{name}/weight", f"{name}/bias"], [LOGITS], f"{name}/classify")
    graph = helper.make_graph(
        [*front.graph.node, *nodes, classify],
        name,
        list(front.graph.input),
        [helper.make_tensor_value_info(LOGITS, TensorProto.FLOAT, ["batch", len(head.bias)])],
        [*front.graph.initializer, *weights],
    )
    return finish(helper.make_model(graph, opset_imports=list(front.opset_import)))


def head_macs(model: ModelProto) -> int:
    """The multiply-accumulates of a head, or of a front, for one frame."""
    fixed = copy_of(model)
    fixed.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 1
    shapes = static_shapes(fixed)
    return sum(macs(node, shapes) for node in fixed.graph.node)


def own_part(whole: ModelProto, output: str, cut_tensor: str, shape: Shape, name: str) -> ModelProto:
    """What lies between a cut and the model's own exit `output`; `shape`: the cut's in the graph, without the batch."""
    declared = next(info for info in whole.graph.output if info.name == output)
    return extract(copy_of(whole), [tensor_info(cut_tensor, "float32", shape)], [declared], name)


def own_head(part: ModelProto, wire: Wire | None, shape: Shape) -> ModelProto:
    """The model's own exit as a graph that reads the features as they stand on the wire.

    `part` reads floats, or the wire's own uint8 where it is quantized, of `shape` in the graph, without the batch.
    """
    source = part.graph.input[0]
    parts = Parts(opset(part))
    floats = source.type.tensor_type.elem_type == TensorProto.FLOAT
    read = read_wire(parts, wire, on_wire(shape)) if floats else FEATURES
    nodes = [*parts.nodes, _channels_first(read, source.name, shape), *part.graph.node]
    kind = "float32" if wire is None else "uint8"
    graph = helper.make_graph(
        nodes,
        part.graph.name,
        [tensor_info(FEATURES, kind, on_wire(shape))],
        list(part.graph.output),
        [*parts.weights, *part.graph.initializer],
    )
    return finish(helper.make_model(graph, opset_imports=list(part.opset_import)))


def guarded(head: ModelProto, guard: Guard, wire: Wire | None, shape: Shape) -> ModelProto:
    """A head with its guard beside it, as a second output; `shape` is that of the features on the wire."""
    parts = Parts(opset(head), "guard/")
    row = _pool_wire(parts, wire, shape, "moments", guard.floor if guard.logged else None)
    scaled = parts.add("Mul", [parts.add("Sub", [row, parts.hold(guard.centre)]), parts.hold(guard.scale)])
    along = parts.add("MatMul", [scaled, parts.hold(guard.basis)])
    # The basis is orthonormal, so the square of what is off it is that of the row less that of what is along it.
    rest, kept = guard.rest_scale**2, np.square(guard.direction_scale, dtype=np.float64)
    parts_of = np.concatenate([np.full(len(guard.scale), rest), kept - rest])[:, np.newaxis]
    shares = (parts_of / len(guard.scale) / float(guard.units[0]) ** 2).astype(np.float32)
    both = parts.add("Concat", [scaled, along], axis=1)
    square = parts.add("MatMul", [parts.add("Mul", [both, both]), parts.hold(shares)])
    scores = [parts.add("Sqrt", [parts.add("Relu", [square])])]  # what rounding makes less than nothing has no root
    if guard.filters.shape[1]:
        scores.append(parts.add("MatMul", [scaled, parts.hold(guard.filters / guard.units[1:])]))
    together = parts.add("Concat", scores, axis=1)
    nodes = [*head.graph.node, *parts.nodes, parts.greatest(together, DISTANCE)]
    graph = helper.make_graph(
        nodes,
        head.graph.name,
        list(head.graph.input),
        [head.graph.output[0], helper.make_tensor_value_info(DISTANCE, TensorProto.FLOAT, ["batch"])],
        [*head.graph.initializer, *parts.weights],
    )
    return finish(helper.make_model(graph, opset_imports=list(head.opset_import)))


def front_model(
    parts: Parts,
    wire: Wire | None,
    shape: Shape,
    row: str,
    nodes: Sequence[NodeProto] = (),
    weights: Sequence[TensorProto] = (),
) -> ModelProto:
    """The front whose row of numbers is the tensor `row` of `parts`; `nodes` and their weights come before."""
    last = helper.make_node("Identity", [row], [ROW], f"{PREFIX}{ROW}")
    graph = helper.make_graph(
        [*nodes, *parts.nodes, last],
        "front",
        [tensor_info(FEATURES, "float32" if wire is None else "uint8", shape)],
        [helper.make_tensor_value_info(ROW, TensorProto.FLOAT, ["batch", None])],
        [*weights, *parts.weights],
    )
    return finish(helper.make_model(graph, opset_imports=[helper.make_opsetid("", parts.opset)]))


def read_wire(parts: Parts, wire: Wire | None, shape: Shape) -> str:
    """The features as float, channels last."""
    if wire is None:
        return FEATURES
    names = [parts.hold(wire.scale), parts.hold(wire.zero_point)]
    return parts.add("DequantizeLinear", [FEATURES, *names], axis=len(shape))


def _channels_first(values: str, tensor: str, shape: Shape) -> NodeProto:
    """Gives what was on the wire the layout and the name it has in the graph; `shape` is that of the graph."""
    name = f"{PREFIX}read"
    if on_wire(shape) != shape:
        return helper.make_node("Transpose", [values], [tensor], name, perm=[0, 3, 1, 2])
    return helper.make_node("Identity", [values], [tensor], name)


def _pool_wire(
    parts: Parts, wire: Wire | None, shape: Shape, pooling: Pooling, floor: NDArray[np.float32] | None = None
) -> str:
    """`_pool` of the features on the wire: of their bytes as they are, as the row is the same and far shorter."""
    values = FEATURES if wire is None else parts.add("Cast", [FEATURES], to=TensorProto.FLOAT)
    return _pool(parts, values, shape, pooling, floor, wire)


def _pool(
    parts: Parts,
    values: str,
    shape: Shape,
    pooling: Pooling,
    floor: NDArray[np.float32] | None = None,
    wire: Wire | None = None,
) -> str:
    """The row of numbers that a front or a guard works on; with a `floor` spreads are taken as logarithms.

    With a wire, `values` are its bytes.
    """

    def scaled(name: str, *, spread: bool = False) -> str:
        """A row of channels in the features' own unit."""
        if wire is None:
            return name
        if not spread:
            name = parts.add("Sub", [name, parts.hold(wire.zero_point.astype(np.float32))])
        return parts.add("Mul", [name, parts.hold(wire.scale)])

    axes = list(range(1, len(shape)))
    if not axes:
        return scaled(values)
    places = math.prod(shape[:-1])
    # As a product with a row of equal weights a mean takes half the time of a reduction.
    rows_of = parts.add("Reshape", [values, parts.hold(np.array([0, places, shape[-1]], np.int64))])
    weights = parts.hold(np.full((1, places), 1 / places, np.float32))
    mean = parts.add("MatMul", [weights, rows_of])
    flat = scaled(parts.add("Flatten", [mean], axis=1))
    if pooling == "mean":
        return flat
    away = parts.add("Sub", [rows_of, mean])
    square = parts.add("MatMul", [weights, parts.add("Mul", [away, away])])
    spread = scaled(parts.add("Sqrt", [parts.add("Flatten", [square], axis=1)]), spread=True)
    if floor is not None:
        spread = parts.add("Log", [parts.add("Add", [spread, parts.hold(floor)])])
    rows = [flat, spread]
    if pooling == "grid" and len(shape) == 3:
        halves = [[(0, side // 2), (side - side // 2, side)] for side in shape[:2]]
        for top, bottom in halves[0]:
            for left, right in halves[1]:
                bounds = [parts.hold(np.array(value, np.int64)) for value in ([top, left], [bottom, right], [1, 2])]
                rows.append(scaled(parts.mean(parts.add("Slice", [values, *bounds]), axes)))
    elif pooling == "grid":
        # Of tokens the first, where transformers gather what they answer with.
        bounds = [parts.hold(np.array([value], np.int64)) for value in (0, 1, 1)]
        rows.append(scaled(parts.mean(parts.add("Slice", [values, *bounds]), axes)))
    return parts.add("Concat", rows, axis=1)


def own_exit_cut(whole: ModelProto, output: str, tensors: list[str]) -> str | None:
    """The deepest of `tensors` (in the trunk's order) through which alone an own exit sees the frame."""
    index = Index(whole)
    source = whole.graph.input[0].name
    for tensor in reversed(tensors):
        rest = index.ancestors([output], stop=[tensor])
        through = any(tensor in node.input for node in rest) or tensor == output
        if through and not any(source in node.input for node in rest):
            return tensor
    return None
