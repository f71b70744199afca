"""Brings any source's graph into one form: uint8 frames in, logits out, no dynamic shapes but an open batch.

The steps: fix the input's shape at a batch of one, remove a final softmax, fold constants (onnxslim), part the
model's own exits from its trunk, put the scaling of pixels in front, and open the batch again where the graph allows.
Constants are folded at a fixed batch because the shape arithmetic of an open one hides most cuts.
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import onnxslim
from onnx import ModelProto, NodeProto, TensorProto, helper, version_converter

from export.graph import (
    FRAME,
    LAYOUT_OPS,
    LOGITS,
    OPSET,
    PROLOGUE,
    Index,
    Shape,
    constant,
    copy_of,
    extract,
    finish,
    opset,
    rename,
    static_shapes,
)
from export.source import Source
from runtime.errors import BundleError

OLDEST_OPSET, NEWEST_OPSET = 13, 21  # per-channel quantization needs 13; onnxruntime 1.18 reads up to 21


@dataclass(frozen=True, slots=True)
class Simplified:
    """A model in the one form that every later stage works on."""

    whole: ModelProto  # FRAME uint8 (batch, height, width, 3) → every own exit's logits, then LOGITS
    shapes: dict[str, Shape]  # of every tensor, for a batch of one
    exits: tuple[str, ...]  # outputs that are the model's own exits, in order
    classes: int
    batchable: bool  # it gives each frame of a batch the answer that it gets alone

    def trunk(self) -> ModelProto:
        """The whole model without its own exits."""
        graph = self.whole.graph
        return extract(self.whole, list(graph.input), [graph.output[-1]], "whole")


def simplify(source: Source) -> Simplified:
    """Bring the source's model into the one form.

    Raises:
        BundleError: the model is no image classifier, or is built of what ONNX Runtime cannot simplify.
    """
    model = with_fixed_input(source)
    for position in range(len(model.graph.output)):
        _drop_softmax(model, position)
    model = slimmed(model, source.name)
    _flatten_outputs(model, source.name)
    add_prologue(model, source)
    rename(model, model.graph.output[-1].name, LOGITS)
    fixed = static_shapes(model)
    shape = fixed.get(LOGITS, ())
    if len(shape) != 2 or shape[0] != 1 or shape[1] < 2:
        raise BundleError(
            f"{source.name} gives an output of shape {shape}; Kinflow exports classifiers: (batch, classes)"
        )
    whole = open_batch(model, fixed)
    exits = tuple(output.name for output in whole.graph.output[:-1])
    for name in exits:
        if fixed.get(name) != shape:
            raise BundleError(
                f"the model's own exit {name} gives {fixed.get(name)}, its last {shape}; they must be equal"
            )
    return Simplified(whole=finish(whole), shapes=fixed, exits=exits, classes=shape[1], batchable=True)


def with_fixed_input(source: Source) -> ModelProto:
    """A copy of the source's model in an opset that is supported, its input of one shape, with a batch of one.

    Raises:
        BundleError: the opset cannot be converted, or the input has another shape than the source says.
    """
    model = _supported_opset(copy_of(source.model))
    _fix_input(model, source)
    return model


def slimmed(model: ModelProto, name: str) -> ModelProto:
    """The model with its constants folded and every node named.

    Raises:
        BundleError: onnxslim fails on it.
    """
    logging.getLogger("onnxslim").setLevel(logging.ERROR)
    try:
        model = onnxslim.slim(onnx.shape_inference.infer_shapes(model))
    except Exception as error:  # onnxslim raises whatever its passes raise
        raise BundleError(f"{name} cannot be simplified: {str(error).splitlines()[0]}") from error
    _name_nodes(model)
    return model


def _supported_opset(model: ModelProto) -> ModelProto:
    if OLDEST_OPSET <= opset(model) <= NEWEST_OPSET:
        return model
    try:
        return version_converter.convert_version(model, OPSET)
    except Exception as error:  # the converter raises bare RuntimeErrors from C++
        raise BundleError(
            f"the model has opset {opset(model)} and cannot be converted; export it with {OPSET}"
        ) from error


def _fix_input(model: ModelProto, source: Source) -> None:
    weights = {tensor.name for tensor in model.graph.initializer}
    (image,) = [info for info in model.graph.input if info.name not in weights]
    height, width = source.preprocess.height, source.preprocess.width
    shape = (1, 3, height, width) if source.layout == "NCHW" else (1, height, width, 3)
    dims = image.type.tensor_type.shape.dim
    for dim, size in zip(dims, shape, strict=True):
        if dim.dim_value not in (0, size):
            raise BundleError(
                f"{source.name} takes an input of another shape than {shape}; fix its input's shape to that"
            )
        dim.Clear()
        dim.dim_value = size
    del model.graph.value_info[:]
    for output in model.graph.output:
        output.type.tensor_type.ClearField("shape")
    rename(model, image.name, "image")


def _drop_softmax(model: ModelProto, position: int) -> None:
    """Let the output come from before a final softmax: logits keep what a softmax rounds away."""
    index = Index(model)
    name = model.graph.output[position].name
    node = index.producer.get(name)
    skipped: list[NodeProto] = []
    while node is not None and node.op_type in LAYOUT_OPS:
        skipped.append(node)
        node = index.producer.get(node.input[0])
    if node is None or node.op_type not in {"Softmax", "LogSoftmax"}:
        return
    logits = node.input[0]
    model.graph.node.remove(node)
    if skipped:
        skipped[-1].input[0] = logits
        return
    for other in model.graph.node:
        for place, output in enumerate(other.output):
            if output == logits:
                other.output[place] = name
        for place, read in enumerate(other.input):
            if read == logits:
                other.input[place] = name


def _name_nodes(model: ModelProto) -> None:
    """Give every node a unique name that does not depend on chance."""
    seen: set[str] = set()
    for position, node in enumerate(model.graph.node):
        if not node.name or node.name in seen:
            node.name = f"{node.op_type}_{position}"
        seen.add(node.name)


def _flatten_outputs(model: ModelProto, name: str) -> None:
    """Make (1, classes, 1, 1) and the like (1, classes)."""
    shapes = static_shapes(model)
    for output in model.graph.output:
        shape = shapes.get(output.name, ())
        if len(shape) <= 2:
            continue
        if math.prod(shape) != max(shape):
            raise BundleError(f"{name} gives an output of shape {shape}; Kinflow exports classifiers: (batch, classes)")
        inner = f"{output.name}_unflattened"
        for node in model.graph.node:
            for place, made in enumerate(node.output):
                if made == output.name:
                    node.output[place] = inner
            for place, read in enumerate(node.input):
                if read == output.name:
                    node.input[place] = inner
        model.graph.node.append(
            helper.make_node("Flatten", [inner], [output.name], name=f"kinflow/flatten/{output.name}", axis=1)
        )
        output.CopyFrom(helper.make_tensor_value_info(output.name, TensorProto.FLOAT, [1, max(shape)]))


def add_prologue(model: ModelProto, source: Source) -> None:
    """Put pixels → what the network was trained on in front: x * scale + bias per channel, then its layout.

    Raises:
        BundleError: the network does not take float32.
    """
    (image,) = model.graph.input
    elem_type = image.type.tensor_type.elem_type
    if elem_type != TensorProto.FLOAT:
        raise BundleError(f"{source.name} takes an input that is not float32; export it with float32 input")
    axes: Shape = (1, 3, 1, 1) if source.layout == "NCHW" else (1, 1, 1, 3)
    scale = 1.0 / (255.0 * np.asarray(source.std, np.float64))
    bias = -np.asarray(source.mean, np.float64) / np.asarray(source.std, np.float64)
    # Where all channels are scaled alike one number does, and is five times as fast once onnxruntime has moved the
    # transposition behind it.
    if np.ptp(scale) == 0 and np.ptp(bias) == 0:
        scale, bias, axes = scale[:1], bias[:1], ()
    weights = [
        constant(f"{PROLOGUE}scale", scale.astype(np.float32).reshape(axes)),
        constant(f"{PROLOGUE}bias", bias.astype(np.float32).reshape(axes)),
    ]
    steps: list[tuple[str, list[str], dict[str, Any]]] = []
    if source.bgr:
        weights.append(constant(f"{PROLOGUE}bgr", np.array([2, 1, 0], np.int64)))
        steps.append(("Gather", [f"{PROLOGUE}bgr"], {"axis": 3}))
    if source.layout == "NCHW":
        steps.append(("Transpose", [], {"perm": [0, 3, 1, 2]}))
    steps.append(("Cast", [], {"to": TensorProto.FLOAT}))
    steps.append(("Mul", [f"{PROLOGUE}scale"], {}))
    steps.append(("Add", [f"{PROLOGUE}bias"], {}))
    nodes: list[NodeProto] = []
    current = FRAME
    for op_type, extra, attributes in steps:
        output = image.name if op_type == "Add" else f"{PROLOGUE}{op_type.lower()}"
        nodes.append(helper.make_node(op_type, [current, *extra], [output], f"{PROLOGUE}{op_type}", **attributes))
        current = output
    rest = list(model.graph.node)
    del model.graph.node[:]
    model.graph.node.extend([*nodes, *rest])
    model.graph.initializer.extend(weights)
    shape = [1, source.preprocess.height, source.preprocess.width, 3]
    image.CopyFrom(helper.make_tensor_value_info(FRAME, TensorProto.UINT8, shape))


def open_batch(model: ModelProto, shapes: dict[str, Shape]) -> ModelProto:
    """Make the batch symbolic: constants that hold a batch of one are rewritten to follow the input."""
    opened = copy_of(model)
    index = Index(opened)
    nodes: list[NodeProto] = []
    for node in index.nodes:
        if node.op_type == "Reshape" and index.constant(node.input[1]) is not None:
            _open_reshape(opened, node, shapes)
        if node.op_type == "Concat":
            nodes.extend(_open_concat(opened, node, index, shapes))
        nodes.append(node)
    del opened.graph.node[:]
    opened.graph.node.extend(nodes)
    for info in [*opened.graph.input, *opened.graph.output]:
        dims = info.type.tensor_type.shape.dim
        known = shapes[info.name]
        if len(dims) != len(known):
            info.CopyFrom(helper.make_tensor_value_info(info.name, info.type.tensor_type.elem_type, known))
        info.type.tensor_type.shape.dim[0].Clear()
        info.type.tensor_type.shape.dim[0].dim_param = "batch"
    del opened.graph.value_info[:]
    return opened


def _open_reshape(model: ModelProto, node: NodeProto, shapes: dict[str, Shape]) -> None:
    # The batch is always the outermost part of the first dimension, so that one is left to follow from the others.
    target = shapes.get(node.output[0])
    if target is None or not target or 0 in target:
        return
    name = f"{node.name}/open_shape"
    model.graph.initializer.append(constant(name, np.array([-1, *target[1:]], np.int64)))
    node.input[1] = name


def _open_concat(model: ModelProto, node: NodeProto, index: Index, shapes: dict[str, Shape]) -> list[NodeProto]:
    """Repeat what is joined to every frame, such as a class token, as often as there are frames."""
    axis = next(attribute.i for attribute in node.attribute if attribute.name == "axis")
    fixed = [place for place, name in enumerate(node.input) if index.constant(name) is not None]
    moving = [name for name in node.input if index.constant(name) is None]
    if axis == 0 or not fixed or not moving:
        return []
    made: list[NodeProto] = []
    prefix = f"{node.name}/open"
    made.append(helper.make_node("Shape", [moving[0]], [f"{prefix}/batch"], f"{prefix}/batch", start=0, end=1))
    for place in fixed:
        shape = shapes[node.input[place]]
        name = f"{prefix}/{place}"
        model.graph.initializer.append(constant(f"{name}/rest", np.array(shape[1:], np.int64)))
        made.append(
            helper.make_node("Concat", [f"{prefix}/batch", f"{name}/rest"], [f"{name}/shape"], f"{name}/shape", axis=0)
        )
        made.append(
            helper.make_node("Expand", [node.input[place], f"{name}/shape"], [f"{name}/value"], f"{name}/value")
        )
        node.input[place] = f"{name}/value"
    return made
