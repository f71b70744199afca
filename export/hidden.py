"""Finds hidden channels, which one layer makes, others treat one by one, and one reads, and takes some of them away.

The channels between the expand and the project convolution of an inverted residual, those inside an MLP, those between
two convolutions of a bottleneck: nothing else in the graph knows them, so any of them may go without changing a shape
that others see.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto

from export.graph import Index, Shape, constant
from export.layers import VALUE_WEIGHT, Layer, attributes, biased_output, cost, layer_of, write_bias, write_weight

# fmt: off
ALONE = frozenset({
    "Abs", "Celu", "Clip", "Elu", "Erf", "Exp", "Gelu", "HardSigmoid", "HardSwish", "Identity", "LeakyRelu", "Mish",
    "Neg", "Relu", "Selu", "Sigmoid", "Softplus", "Softsign", "Sqrt", "Tanh",
})
# fmt: on
TOGETHER = frozenset({"Add", "Div", "Max", "Min", "Mul", "PRelu", "Pow", "Sub"})
POOLS = frozenset({"MaxPool", "AveragePool", "GlobalAveragePool"})


@dataclass(frozen=True, slots=True)
class Hidden:
    """Channels that only the nodes named here know."""

    maker: str  # the layer that makes them
    between: tuple[str, ...]  # nodes that treat each channel for itself
    reader: str  # the layer that reads them
    tensor: str  # what the reader reads
    target: str  # behind the reader and, where one follows, the Add of a residual: what must stay as it was
    residual: str | None  # the other side of that Add
    width: int


def find_hidden(model: ModelProto, shapes: Mapping[str, Shape]) -> list[Hidden]:
    """Every set of hidden channels, in the graph's order."""
    index = Index(model)
    layers = {node.name: layer for node in index.nodes if (layer := layer_of(node, index)) is not None}
    found = []
    for layer in layers.values():
        grown = _grow(layer, index, layers)
        if grown is not None:
            between, reader, tensor = grown
            target, residual = _target(reader, index, shapes)
            names = tuple(node.name for node in between)
            found.append(Hidden(layer.node.name, names, reader.name, tensor, target, residual, layer.outputs))
    return found


def single(layer: Layer, index: Index, shapes: Mapping[str, Shape]) -> Hidden:
    """What a layer makes, without its bias, as channels between two layers that it could be split into."""
    target, residual = _target(layer.node, index, shapes)
    name = layer.node.name
    return Hidden(name, (), name, layer.node.output[0], target, residual, layer.outputs)


def narrow(model: ModelProto, hidden: Hidden, kept: NDArray[np.int64]) -> None:
    """Leave only the channels `kept` (positions, in the order they are to have), with the weights they had."""
    index = Index(model)
    nodes = {node.name: node for node in index.nodes}
    maker, reader = nodes[hidden.maker], nodes[hidden.reader]
    layer, last = layer_of(maker, index), layer_of(reader, index)
    assert layer is not None, "found among the layers"
    assert last is not None, "as well"
    write_weight(model, maker, layer.weight[kept].astype(np.float64), f"{maker.name}/narrow/weight")
    if maker.op_type != "MatMul" and len(maker.input) > 2:
        _slice(model, index, maker, 2, 0, kept, "bias")
    from_right = 3 if maker.op_type == "Conv" else 1
    for name in hidden.between:
        node = nodes[name]
        if node.op_type == "Conv":
            for place in range(1, len(node.input)):
                _slice(model, index, node, place, 0, kept, str(place))
            next(attribute for attribute in node.attribute if attribute.name == "group").i = len(kept)
            continue
        for place, read in enumerate(node.input):
            value = index.constant(read) if read else None
            if value is not None and value.ndim >= from_right and value.shape[-from_right] > 1:
                _slice(model, index, node, place, value.ndim - from_right, kept, str(place))
    write_weight(model, reader, last.weight[:, kept].astype(np.float64), f"{reader.name}/narrow/weight")


def rewrite(model: ModelProto, hidden: Hidden, weight: NDArray[np.float64], bias: NDArray[np.float64]) -> None:
    """Give the reader a weight, in the one form of `export.layers`, and a bias."""
    reader = next(node for node in model.graph.node if node.name == hidden.reader)
    write_weight(model, reader, weight, f"{reader.name}/refit/weight")
    write_bias(model, reader, bias, f"{reader.name}/refit/bias")


def channel_cost(model: ModelProto, hidden: Hidden, shapes: Mapping[str, Shape]) -> float:
    """What one hidden channel costs, as `layers.cost` has it."""
    nodes = {node.name: node for node in model.graph.node}
    reader = nodes[hidden.reader]
    maker_cost = cost(nodes[hidden.maker], shapes)[0]
    if hidden.maker == hidden.reader:  # the second layer would have no kernel: a product for each value it makes
        return maker_cost / hidden.width + float(np.prod(shapes[reader.output[0]]))
    total = maker_cost
    for name in hidden.between:
        grows, stays = cost(nodes[name], shapes)
        # A node that treats channels one by one reads fewer of them as well; its gathering stays.
        total += grows + min(stays, VALUE_WEIGHT * float(np.prod(shapes[nodes[name].input[0]])))
    grows, stays = cost(reader, shapes)
    grows -= VALUE_WEIGHT * float(np.prod(shapes[reader.output[0]]))
    return (total + grows + min(stays, VALUE_WEIGHT * float(np.prod(shapes[reader.input[0]])))) / hidden.width


def _slice(
    model: ModelProto, index: Index, node: NodeProto, place: int, axis: int, kept: NDArray[np.int64], what: str
) -> None:
    value = index.constant(node.input[place])
    assert value is not None, "a constant, as `_channelwise` found"
    name = f"{node.name}/narrow/{what}"
    model.graph.initializer.append(constant(name, value.take(kept, axis=axis)))
    node.input[place] = name


def _grow(maker: Layer, index: Index, layers: Mapping[str, Layer]) -> tuple[list[NodeProto], NodeProto, str] | None:
    """Follow what a layer makes through nodes that keep channels apart, to the one layer that reads it."""
    inside = {maker.node.output[0]}
    between: dict[str, NodeProto] = {}
    readers: dict[str, tuple[NodeProto, str]] = {}
    changed = True
    while changed:
        changed = False
        for tensor in tuple(inside):
            if tensor in index.outputs:
                return None
            for node in index.consumers.get(tensor, []):
                if node.name in between or node.name in readers:
                    continue
                if node.name in layers and node.input[0] == tensor and layers[node.name].inputs == maker.outputs:
                    readers[node.name] = (node, tensor)
                    changed = True
                elif _channelwise(node, inside, maker, index):
                    between[node.name] = node
                    inside.update(filter(None, node.output))
                    changed = True
    touched = {node.name for tensor in inside for node in index.consumers.get(tensor, [])}
    if len(readers) != 1 or touched - set(between) - set(readers):
        return None
    ((reader, tensor),) = readers.values()
    if (reader.op_type == "Conv") != (maker.node.op_type == "Conv"):
        return None
    return [node for node in index.nodes if node.name in between], reader, tensor


def _channelwise(node: NodeProto, inside: set[str], maker: Layer, index: Index) -> bool:
    """Whether each channel of what a node makes depends on that channel alone."""
    computed = [name for name in node.input if name and index.constant(name) is None]
    if not all(name in inside for name in computed):
        return False
    if node.op_type in ALONE:
        return True
    if node.op_type == "Conv":
        weight = index.constant(node.input[1])
        options = attributes(node)
        return weight is not None and options.get("group", 1) == maker.outputs == weight.shape[0] == options.get(
            "group"
        )
    if node.op_type in POOLS:
        return maker.node.op_type == "Conv"
    if node.op_type not in TOGETHER:
        return False
    from_right = 3 if maker.node.op_type == "Conv" else 1
    values = [value for name in node.input if (value := index.constant(name)) is not None]
    return all(
        value.size == 1
        or (value.ndim >= from_right and value.shape[-from_right] in (1, maker.outputs))
        or (value.ndim < from_right and from_right == 3)
        for value in values
    )


def _target(reader: NodeProto, index: Index, shapes: Mapping[str, Shape]) -> tuple[str, str | None]:
    made = biased_output(reader, index)
    after = index.consumers.get(made, [])
    if len(after) == 1 and after[0].op_type == "Add" and made not in index.outputs:
        others = [name for name in after[0].input if name != made]
        same = shapes.get(made) == shapes.get(after[0].output[0])
        if (
            len(others) == 1
            and index.constant(others[0]) is None
            and same
            and shapes.get(others[0]) == shapes.get(made)
        ):
            return after[0].output[0], others[0]
    return made, None
