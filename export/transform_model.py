"""Writes a fitted transform as two small ONNX graphs: matrix products, and gathers that put things in order."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, TensorProto, helper

from export.graph import OPSET, Shape, constant, finish, halved, tensor_info
from export.transform import Transform, cosines
from export.wires import Wire

FEATURES, COEFFICIENTS = "features", "coefficients"


class _Graph:
    """Nodes in the order they are added, each reading what the one before made unless told otherwise."""

    def __init__(self, first: str) -> None:
        self.nodes: list[NodeProto] = []
        self.constants: list[TensorProto] = []
        self.last = first

    def add(self, kind: str, *inputs: str, outputs: int = 1, **attributes: Any) -> list[str]:
        number = len(self.nodes)
        names = [f"{kind.lower()}{number}" + (f"_{place}" if outputs > 1 else "") for place in range(outputs)]
        self.nodes.append(helper.make_node(kind, list(inputs) or [self.last], names, f"{kind}{number}", **attributes))
        self.last = names[0]
        return names

    def hold(self, value: NDArray[Any]) -> str:
        name = f"constant{len(self.constants)}"
        self.constants.append(constant(name, value))
        return name

    def half(self, value: NDArray[np.float32]) -> str:
        name = f"matrix{len(self.constants)}"
        kept, nodes = halved(name, value)
        self.constants.extend(kept)
        self.nodes.extend(nodes)
        return name

    def reshape(self, *shape: int) -> None:
        self.add("Reshape", self.last, self.hold(np.array(shape, np.int64)))

    def gather(self, places: NDArray[np.int64], axis: int) -> None:
        self.add("Gather", self.last, self.hold(places.astype(np.int64)), axis=axis)

    def split(self, sizes: list[int], axis: int) -> list[str]:
        return self.add("Split", self.last, self.hold(np.array(sizes, np.int64)), outputs=len(sizes), axis=axis)

    def model(self, name: str, source: tuple[str, str, Shape], sink: tuple[str, str, Shape]) -> ModelProto:
        self.nodes[-1].output[0] = sink[0]
        graph = helper.make_graph(self.nodes, name, [tensor_info(*source)], [tensor_info(*sink)], self.constants)
        return finish(helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)]))


def encoder(transform: Transform, wire: Wire | None, shape: Shape) -> ModelProto:
    """The graph from features (1, …) as they travel to coefficients (1, n)."""
    layout = transform.layout
    graph = _Graph(FEATURES)
    if wire is not None:
        graph.add("DequantizeLinear", FEATURES, *_scale(graph, wire), axis=len(shape) if wire.scale.ndim else 1)
    graph.reshape(layout.positions, layout.channels)
    _over_the_grid(graph, transform, inverse=False)
    graph.add("Sub", graph.last, graph.hold(transform.centre))
    graph.gather(layout.by_band, 0)
    _by_band(graph, transform.forward, layout.band_sizes)
    graph.reshape(1, -1)
    graph.gather(transform.order, 1)
    count = layout.positions * layout.channels
    return graph.model("encoder", (FEATURES, _dtype(wire), shape), (COEFFICIENTS, "float32", (count,)))


def decoder(transform: Transform, wire: Wire | None, shape: Shape) -> ModelProto:
    """The graph from coefficients (1, n) to features (1, …) as they travel."""
    layout = transform.layout
    graph = _Graph(COEFFICIENTS)
    graph.gather(np.argsort(transform.order), 1)
    graph.reshape(layout.positions, layout.channels)
    _by_band(graph, transform.backward, layout.band_sizes)
    graph.gather(np.argsort(layout.by_band), 0)
    graph.add("Add", graph.last, graph.hold(transform.centre))
    _over_the_grid(graph, transform, inverse=True)
    graph.reshape(1, *shape)
    if wire is not None:
        graph.add("QuantizeLinear", graph.last, *_scale(graph, wire), axis=len(shape) if wire.scale.ndim else 1)
    count = layout.positions * layout.channels
    return graph.model("decoder", (COEFFICIENTS, "float32", (count,)), (FEATURES, _dtype(wire), shape))


def _over_the_grid(graph: _Graph, transform: Transform, *, inverse: bool) -> None:
    """The cosine transform of (positions, channels) over rows and columns, or its inverse."""
    layout = transform.layout
    rows, columns = cosines(layout.rows), cosines(layout.columns)
    if inverse:
        rows, columns = rows.T, columns.T
    if layout.rows * layout.columns == 1:
        return
    apart = graph.split([layout.extra, layout.rows * layout.columns], 0) if layout.extra else ["", graph.last]
    graph.last = apart[1]
    graph.reshape(layout.rows, layout.columns * layout.channels)
    graph.add("MatMul", graph.hold(np.ascontiguousarray(rows)), graph.last)
    graph.reshape(layout.rows, layout.columns, layout.channels)
    graph.add("MatMul", graph.hold(np.ascontiguousarray(columns)), graph.last)
    graph.reshape(layout.rows * layout.columns, layout.channels)
    if layout.extra:
        graph.add("Concat", apart[0], graph.last, axis=0)


def _by_band(graph: _Graph, matrices: NDArray[np.float32], sizes: list[int]) -> None:
    """(positions by band, channels) times each band's matrix."""
    parts = graph.split(sizes, 0) if len(sizes) > 1 else [graph.last]
    turned = [graph.add("MatMul", part, graph.half(matrix))[0] for part, matrix in zip(parts, matrices, strict=True)]
    if len(turned) > 1:
        graph.add("Concat", *turned, axis=0)


def _scale(graph: _Graph, wire: Wire) -> tuple[str, str]:
    return graph.hold(wire.scale), graph.hold(wire.zero_point)


def _dtype(wire: Wire | None) -> str:
    return "float32" if wire is None else "uint8"
