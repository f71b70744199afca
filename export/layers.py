"""Reads and writes the layers that multiply by a constant weight: Conv, Gemm and MatMul in one form.

The one form is a weight (outputs, inputs, …) with the kernel behind, and a bias (outputs,), wherever the graph keeps
them: a MatMul's bias stands in the Add behind it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, helper

from export.graph import Index, Shape, constant, copy_of, fixed_shape, macs, static_shapes
from runtime.datatypes import Tensor

LAYERS = frozenset({"Conv", "Gemm", "MatMul"})
# Time by parts, in products of a dense layer, as measured for int8 on onnxruntime 1.31 (x86, one thread): a product of
# a layer with few inputs to an output (depthwise, the first); a value read or written; a place that is gathered.
FEW_INPUTS, FEW_WEIGHT, VALUE_WEIGHT, PLACE_WEIGHT = 4, 6, 20, 300


@dataclass(frozen=True, slots=True)
class Layer:
    """One layer with a constant weight, not depthwise."""

    node: NodeProto
    weight: NDArray[np.float32]  # (outputs, inputs) or (outputs, inputs, kernel height, kernel width)

    @property
    def outputs(self) -> int:
        """How many channels it makes."""
        return int(self.weight.shape[0])

    @property
    def inputs(self) -> int:
        """How many channels it reads."""
        return int(self.weight.shape[1])

    @property
    def flat(self) -> NDArray[np.float64]:
        """The weight as a matrix (outputs, inputs · kernel)."""
        return self.weight.reshape(self.outputs, -1).astype(np.float64)


def layer_of(node: NodeProto, index: Index) -> Layer | None:
    """The layer that a node is, or None: it multiplies by no constant, is depthwise, or has options we leave alone."""
    if node.op_type not in LAYERS:
        return None
    weight = index.constant(node.input[1])
    if weight is None or weight.dtype != np.float32 or index.constant(node.input[0]) is not None:
        return None
    options = attributes(node)
    if node.op_type == "Conv":
        plain = weight.ndim == 4 and options.get("group", 1) == 1 and options.get("auto_pad", b"NOTSET") == b"NOTSET"
        return Layer(node, _float(weight)) if plain else None
    if node.op_type == "Gemm":
        if options.get("transA", 0) or options.get("alpha", 1.0) != 1.0 or options.get("beta", 1.0) != 1.0:
            return None
        return Layer(node, _float(weight if options.get("transB", 0) else weight.T))
    return Layer(node, _float(weight.T)) if weight.ndim == 2 else None


def write_weight(model: ModelProto, node: NodeProto, weight: NDArray[np.float64], name: str) -> None:
    """Give a layer another weight, in the one form; the old one stays in the model until it is extracted."""
    stored = weight.astype(np.float32)
    if node.op_type == "MatMul" or (node.op_type == "Gemm" and not attributes(node).get("transB", 0)):
        stored = stored.T
    model.graph.initializer.append(constant(name, stored))
    node.input[1] = name


def bias_of(node: NodeProto, index: Index) -> NDArray[np.float64] | None:
    """A layer's bias (outputs,), or None where it has none; that of a MatMul stands in the Add that alone reads it."""
    if node.op_type == "MatMul":
        add = _bias_add(node, index)
        return None if add is None else _flat_constant(add, index)
    if len(node.input) < 3 or not node.input[2]:
        return None
    value = index.constant(node.input[2])
    return None if value is None else value.astype(np.float64).reshape(-1)


def write_bias(model: ModelProto, node: NodeProto, bias: NDArray[np.float64], name: str) -> None:
    """Give a layer a bias (outputs,); a MatMul that has none gets an Add behind it."""
    model.graph.initializer.append(constant(name, bias.astype(np.float32)))
    if node.op_type != "MatMul":
        del node.input[2:]
        node.input.append(name)
        return
    add = _bias_add(node, Index(model))
    if add is not None:
        place = 0 if add.input[1] == node.output[0] else 1
        add.input[place] = name
        return
    made, inner = node.output[0], f"{name}/product"
    node.output[0] = inner
    position = next(place for place, other in enumerate(model.graph.node) if other is node)
    model.graph.node.insert(position + 1, helper.make_node("Add", [inner, name], [made], f"{name}/add"))


def split(model: ModelProto, layer: Layer, basis: NDArray[np.float64], back: NDArray[np.float64]) -> str:
    """Let another layer make `basis` (rank, outputs) times what `layer` makes, and `layer` only `back` times that.

    Returns:
        The name of the other layer, which is that of what it makes as well.
    """
    node, inner = layer.node, f"{layer.node.name}/rank"
    weight = (basis @ layer.flat).reshape(len(basis), *layer.weight.shape[1:])
    front = helper.make_node(node.op_type, [node.input[0], ""], [inner], inner)
    if node.op_type == "Conv":
        front.attribute.extend(node.attribute)
        kept = [attribute for attribute in node.attribute if attribute.name == "group"]
        del node.attribute[:]
        node.attribute.extend([*kept, helper.make_attribute("kernel_shape", [1, 1])])
    elif node.op_type == "Gemm":
        front.attribute.append(helper.make_attribute("transB", 1))
    position = next(place for place, other in enumerate(model.graph.node) if other is node)
    model.graph.node.insert(position, front)
    write_weight(model, model.graph.node[position], weight, f"{inner}/weight")
    node = model.graph.node[position + 1]
    node.input[0] = inner
    shape = (layer.outputs, len(basis), *(1 for _ in layer.weight.shape[2:]))
    write_weight(model, node, back.reshape(shape), f"{inner}/back")
    return inner


def biased_output(node: NodeProto, index: Index) -> str:
    """The tensor that a layer makes, its bias included."""
    add = _bias_add(node, index) if node.op_type == "MatMul" else None
    return str((node if add is None else add).output[0])


def cost(node: NodeProto, shapes: Mapping[str, Shape]) -> tuple[float, float]:
    """A stand-in for the time of a node that is the same on every machine, in products.

    Returns:
        The part that grows with the number of channels it makes, and the part that does not.
    """
    made, read = shapes.get(node.output[0]), shapes.get(node.input[0]) if node.input else None
    if made is None or read is None:
        return 0.0, 0.0
    weight = shapes.get(node.input[1]) if node.op_type == "Conv" else None
    few = weight is not None and weight[1] <= FEW_INPUTS
    grows = macs(node, shapes) * (FEW_WEIGHT if few else 1) + VALUE_WEIGHT * float(np.prod(made))
    stays = VALUE_WEIGHT * float(np.prod(read))
    if weight is not None and np.prod(weight[2:]) > 1:
        stays += PLACE_WEIGHT * float(np.prod(made[2:]) * np.prod(weight[2:]))
    return grows, stays


def shapes_of(model: ModelProto) -> dict[str, Shape]:
    """Every tensor's shape for one frame, of a model whose batch is open."""
    one = copy_of(model)
    for info in [*one.graph.input, *one.graph.output]:
        if fixed_shape(info) is None and info.type.tensor_type.HasField("shape"):
            info.type.tensor_type.shape.dim[0].Clear()
            info.type.tensor_type.shape.dim[0].dim_value = 1
    return static_shapes(one)


def attributes(node: NodeProto) -> dict[str, Any]:
    """A node's options by name."""
    return {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}


def places_of(value: Tensor, node: NodeProto) -> int:
    """At how many places a layer's output stands: positions of a map, tokens of a sequence."""
    return int(np.prod([value.shape[0], *value.shape[2:]] if node.op_type == "Conv" else value.shape[:-1]))


def rows(value: Tensor, node: NodeProto, places: NDArray[np.int64]) -> NDArray[np.float32]:
    """The channels of a layer's output at some places of the one frame: (places, channels)."""
    if node.op_type != "Conv":
        return value.reshape(-1, value.shape[-1])[places]
    return value.reshape(value.shape[1], -1)[:, places].T


def patches(value: Tensor, layer: Layer, places: NDArray[np.int64]) -> NDArray[np.float32]:
    """What a layer multiplies with its weight at some places of its output: (places, inputs · kernel).

    Args:
        value: (1, inputs, height, width) for a Conv, (1, …, inputs) for others.
    """
    node = layer.node
    if node.op_type != "Conv":
        return rows(value, node, places)
    options = attributes(node)
    top, left, bottom, right = options.get("pads", (0, 0, 0, 0))
    down, across = options.get("strides", (1, 1))
    tall, wide = options.get("dilations", (1, 1))
    high, broad = layer.weight.shape[2:]
    padded = value[0]
    if any((top, left, bottom, right)):
        padded = np.pad(padded, ((0, 0), (top, bottom), (left, right)))
    made_width = (padded.shape[2] - wide * (broad - 1) - 1) // across + 1
    y, x = np.divmod(places, made_width)
    kernel_y, kernel_x = np.divmod(np.arange(high * broad), broad)
    ys = y[:, np.newaxis] * down + kernel_y * tall  # (places, kernel)
    xs = x[:, np.newaxis] * across + kernel_x * wide
    seen: NDArray[np.float32] = padded[:, ys, xs].transpose(1, 0, 2).reshape(len(places), -1)
    return seen


def _bias_add(node: NodeProto, index: Index) -> NodeProto | None:
    readers = index.consumers.get(node.output[0], [])
    if len(readers) != 1 or readers[0].op_type != "Add" or node.output[0] in index.outputs:
        return None
    flat = _flat_constant(readers[0], index)
    weight = index.constant(node.input[1])
    return readers[0] if flat is not None and weight is not None and len(flat) == weight.shape[-1] else None


def _flat_constant(add: NodeProto, index: Index) -> NDArray[np.float64] | None:
    values = [value for name in add.input if (value := index.constant(name)) is not None]
    if len(values) != 1 or values[0].ndim == 0 or values[0].size != values[0].shape[-1]:
        return None
    return values[0].astype(np.float64).reshape(-1)


def _float(weight: NDArray[np.generic]) -> NDArray[np.float32]:
    return weight.astype(np.float32)
