"""Reads and cuts ONNX graphs: who makes and reads a tensor, its shape and cost, and the part between two tensors."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, TensorProto, ValueInfoProto, helper, numpy_helper

FRAME = "frame"  # input of the whole model: uint8 (batch, height, width, 3)
LOGITS = "logits"  # its output: float32 (batch, classes)
PROLOGUE = "kinflow/prologue/"  # names of the nodes that turn pixels into what the network was trained on
EPILOGUE = "kinflow/detect/"  # names of the nodes that turn a detector's last layers into rows; they stay float
OPSET = 17
# Layers that rearrange values without computing new ones.
LAYOUT_OPS = frozenset({"Reshape", "Transpose", "Flatten", "Squeeze", "Unsqueeze", "Identity"})

Shape = tuple[int, ...]


class Index:
    """Who makes and who reads each tensor of a graph."""

    def __init__(self, model: ModelProto) -> None:
        self.nodes: list[NodeProto] = list(model.graph.node)
        self.constants: dict[str, TensorProto] = {tensor.name: tensor for tensor in model.graph.initializer}
        self.producer: dict[str, NodeProto] = {name: node for node in self.nodes for name in node.output if name}
        self.consumers: dict[str, list[NodeProto]] = {}
        for node in self.nodes:
            for name in dict.fromkeys(filter(None, node.input)):
                self.consumers.setdefault(name, []).append(node)
        self.outputs = [output.name for output in model.graph.output]

    def constant(self, name: str) -> NDArray[np.generic] | None:
        """The value of an initializer, or None when the tensor is computed."""
        tensor = self.constants.get(name)
        return None if tensor is None else numpy_helper.to_array(tensor)

    def ancestors(self, outputs: Iterable[str], stop: Iterable[str] = ()) -> list[NodeProto]:
        """The nodes that `outputs` need, in the graph's order; what makes a tensor of `stop` is left out."""
        needed: set[int] = set()
        seen = set(stop)
        todo = [name for name in outputs if name not in seen]
        while todo:
            name = todo.pop()
            if name in seen:
                continue
            seen.add(name)
            node = self.producer.get(name)
            if node is not None and id(node) not in needed:
                needed.add(id(node))
                todo.extend(filter(None, node.input))
        return [node for node in self.nodes if id(node) in needed]


def static_shapes(model: ModelProto) -> dict[str, Shape]:
    """Every tensor's shape, where shape inference finds it; the model's input must have a fixed shape."""
    inferred = onnx.shape_inference.infer_shapes(model, strict_mode=False, data_prop=True)
    shapes: dict[str, Shape] = {tensor.name: tuple(tensor.dims) for tensor in model.graph.initializer}
    for info in [*inferred.graph.input, *inferred.graph.value_info, *inferred.graph.output]:
        shape = fixed_shape(info)
        if shape is not None:
            shapes[info.name] = shape
    return shapes


def fixed_shape(info: ValueInfoProto) -> Shape | None:
    """The declared shape, or None when any dimension is open."""
    if not info.type.tensor_type.HasField("shape"):
        return None
    dims = info.type.tensor_type.shape.dim
    return tuple(dim.dim_value for dim in dims) if all(dim.HasField("dim_value") for dim in dims) else None


def macs(node: NodeProto, shapes: Mapping[str, Shape]) -> int:
    """Multiply-accumulates of one node for one frame; 0 for everything that is not a sum of products."""
    if node.op_type not in {"Conv", "ConvTranspose", "Gemm", "MatMul"}:
        return 0
    left, right, out = (shapes.get(name) for name in (node.input[0], node.input[1], node.output[0]))
    if left is None or right is None or out is None:
        return 0
    if node.op_type == "Conv":
        return math.prod(out) * math.prod(right[1:])
    if node.op_type == "ConvTranspose":
        return math.prod(left) * math.prod(right[1:])
    if node.op_type == "Gemm":
        transposed = any(attribute.name == "transA" and attribute.i for attribute in node.attribute)
        return math.prod(out) * left[0 if transposed else 1]
    return math.prod(out) * left[-1]


def extract(
    model: ModelProto,
    inputs: Sequence[ValueInfoProto],
    outputs: Sequence[ValueInfoProto],
    name: str,
) -> ModelProto:
    """The part of `model` between tensors, as a model of its own that holds only the weights it needs."""
    index = Index(model)
    nodes = index.ancestors([info.name for info in outputs], stop=[info.name for info in inputs])
    read = {name for node in nodes for name in node.input}
    weights = [tensor for key, tensor in index.constants.items() if key in read]
    graph = helper.make_graph(nodes, name, list(inputs), list(outputs), weights)
    return finish(helper.make_model(graph, opset_imports=list(model.opset_import)))


def finish(model: ModelProto) -> ModelProto:
    """Stamp a model so that its bytes depend on its content only and onnxruntime 1.18 can read it."""
    model.ir_version = 8 if opset(model) <= 18 else 10
    model.producer_name, model.producer_version, model.doc_string = "kinflow", "", ""
    del model.metadata_props[:]
    for node in model.graph.node:
        node.doc_string = ""
        del node.metadata_props[:]
    del model.graph.value_info[:]
    return model


def opset(model: ModelProto) -> int:
    """The version of the standard operators."""
    return next(int(entry.version) for entry in model.opset_import if entry.domain in {"", "ai.onnx"})


def tensor_info(name: str, dtype: str, shape: Shape) -> ValueInfoProto:
    """Declare a tensor with an open batch; `shape` is without the batch."""
    kind = {"uint8": TensorProto.UINT8, "float32": TensorProto.FLOAT}[dtype]
    return helper.make_tensor_value_info(name, kind, ["batch", *shape])


def rename(model: ModelProto, old: str, new: str) -> None:
    """Give a tensor another name wherever it stands."""
    for node in model.graph.node:
        for names in (node.input, node.output):
            for position, name in enumerate(names):
                if name == old:
                    names[position] = new
    for info in [*model.graph.input, *model.graph.output]:
        if info.name == old:
            info.name = new


def copy_of(model: ModelProto) -> ModelProto:
    """A model that may be changed without changing `model`."""
    copy = ModelProto()
    copy.CopyFrom(model)
    return copy


def write(model: ModelProto, path: Path) -> None:
    """Write a model so that the same model gives the same bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(model.SerializeToString(deterministic=True))


def constant(name: str, value: NDArray[np.generic]) -> TensorProto:
    """An initializer of one dimension at least."""
    return numpy_helper.from_array(np.ascontiguousarray(value), name)


def halved(name: str, value: NDArray[np.float32]) -> tuple[list[TensorProto], list[NodeProto]]:
    """A large constant kept in 16 bits, and the nodes that make `name` of it; onnxruntime folds them when it loads."""
    scale = np.float32(max(float(np.abs(value).max()), 1e-30))
    kept = [
        constant(f"{name}/half", (value / scale).astype(np.float16)),
        constant(f"{name}/scale", np.array(scale)),
    ]
    nodes = [
        helper.make_node("Cast", [f"{name}/half"], [f"{name}/cast"], f"{name}/widen", to=TensorProto.FLOAT),
        helper.make_node("Mul", [f"{name}/cast", f"{name}/scale"], [name], f"{name}/rescale"),
    ]
    return kept, nodes


def replace_input(node: NodeProto, old: str, new: str) -> None:
    """Let a node read another tensor."""
    for place, name in enumerate(node.input):
        if name == old:
            node.input[place] = new
