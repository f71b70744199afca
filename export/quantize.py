"""Quantizes the whole model for a target, so that at every chosen cut it has a uint8 tensor of its own.

The whole is quantized before it is cut: the wire then carries the model's own uint8, and the segments composed give
the whole model's answer bit for bit. Convolutional networks get static QDQ throughout. Networks with attention or
layer normalization keep those in float, and only their convolutions and products with weights are quantized. What a
detector does behind its last layers, decoding and suppression, stays float in any case.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, helper, numpy_helper
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

from export.cuts import Cut
from export.graph import EPILOGUE, FRAME, LAYOUT_OPS, PROLOGUE, Index, Shape, copy_of, finish, replace_input
from export.wires import Wire, add_wire, fused_cuts
from runtime.datatypes import Tensor
from runtime.errors import BundleError

Recipe = Literal["convolutional", "attention"]
RECIPES: Mapping[Recipe, str] = {
    "convolutional": "static QDQ, int8 weights per channel, uint8 activations, MinMax",
    "attention": "static QDQ of Conv, Gemm and MatMul with weights, the rest float; uint8 per channel at the cuts",
}


@dataclass(frozen=True, slots=True)
class Target:
    """How to quantize for one kind of processor."""

    reduce_range: bool  # 7-bit weights
    why: str


TARGETS = {
    "x86-vnni": Target(reduce_range=False, why="x86 with VNNI (2019 and later): int8 weights"),
    "x86-avx2": Target(reduce_range=True, why="older x86: 7-bit weights, as sums of 8-bit products saturate there"),
    "arm64": Target(reduce_range=False, why="Raspberry Pi 4/5, the CPU of a Jetson: int8 weights, no saturation"),
}


@dataclass(frozen=True, slots=True)
class Quantized:
    """The whole model, quantized, and its wires, one for each chosen cut."""

    model: ModelProto
    wires: tuple[Wire, ...]
    recipe: Recipe


def quantize(
    trunk: ModelProto,
    shapes: Mapping[str, Shape],
    cuts: Sequence[Cut],
    frames: Iterable[Tensor],
    ranges: Mapping[str, tuple[Tensor, Tensor]],
    target: str,
) -> Quantized:
    """Quantize `trunk` on calibration frames, each uint8 (1, height, width, 3).

    Args:
        ranges: tensor of a cut → (lowest, highest) per channel, from `channel_ranges`.

    Raises:
        BundleError: ONNX Runtime cannot quantize this graph.
    """
    recipe = recipe_of(trunk)
    model = _static(trunk, frames, recipe, target)
    _float_logits(model)
    fused = fused_cuts(model, cuts)
    wires = tuple(
        add_wire(model, cut, shapes, ranges, fused=cut.tensor in fused, reuse=recipe == "convolutional") for cut in cuts
    )
    _sort(model)
    return Quantized(finish(model), wires, recipe)


def quantize_part(
    part: ModelProto, frames: Iterable[Tensor], recipe: Recipe, target: str, before: Wire | None, behind: Wire | None
) -> ModelProto:
    """Quantize what lies between two tensors of the whole model, so that it takes and gives the bundle's own wires.

    Args:
        part: float, from the frame or the tensor at a cut to the tensor at another, or to the logits.
        frames: calibration inputs of `part`, each (1, …): uint8 frames or float features.
        before: the wire that is read; None: the frame.
        behind: the wire that is made; None: the logits.

    Raises:
        BundleError: ONNX Runtime cannot quantize this graph.
    """
    model = _static(part, frames, recipe, target, before)
    if before is not None:
        _read_wire(model, before)
    if behind is None:
        _float_logits(model)
    else:
        _write_wire(model, behind)
    _sort(model)
    return finish(model)


def _static(
    trunk: ModelProto, frames: Iterable[Tensor], recipe: Recipe, target: str, before: Wire | None = None
) -> ModelProto:
    """Static QDQ of a graph that reads frames or features; what reads a wire of one scale is quantized for it."""
    (source,) = trunk.graph.input
    frame_scale = _frame_scale(trunk)
    overrides: dict[str, Any] = {}
    if frame_scale is not None:
        overrides = {frame_scale[0]: [{"scale": frame_scale[1], "zero_point": frame_scale[2]}]}
    if before is not None and before.scale.size == 1:
        # Biases are quantized by the scale of what is read, and onnxruntime fuses a layer only where that fits.
        read = {"scale": before.scale.reshape(()), "zero_point": before.zero_point.reshape(())}
        overrides = {source.name: [read]}
    options: dict[str, Any] = {"TensorQuantOverrides": overrides}
    op_types: list[str] | None = None
    if recipe == "attention":
        op_types = ["Conv", "Gemm", "MatMul"]
        options |= {"MatMulConstBOnly": True, "OpTypesToExcludeOutputQuantization": ["Gemm", "MatMul"]}
    left = [node.name for node in trunk.graph.node if node.name.startswith((PROLOGUE, EPILOGUE))]
    with tempfile.TemporaryDirectory() as scratch, _quiet():
        path = Path(scratch) / "quantized.onnx"
        try:
            quantize_static(
                copy_of(trunk),
                path,
                _Frames(source.name, frames),
                quant_format=QuantFormat.QDQ,
                op_types_to_quantize=op_types,
                per_channel=True,
                reduce_range=TARGETS[target].reduce_range,
                activation_type=QuantType.QUInt8,
                weight_type=QuantType.QInt8,
                nodes_to_exclude=left,
                extra_options=options,
            )
        except Exception as error:  # the quantizer raises whatever its parts raise
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise BundleError(f"this model cannot be quantized ({reason}); add --float") from error
        model = onnx.load(path)
    if frame_scale is not None:
        _read_frame_directly(model, frame_scale[0])
    return model


def _read_wire(model: ModelProto, wire: Wire) -> None:
    """Let a graph of float features read them as they stand on the wire."""
    (source,) = model.graph.input
    name, shape = source.name, source.type.tensor_type.shape
    index = Index(model)
    stored, read = f"{name}/wire", f"{name}/read"
    for node in index.consumers.get(name, []):
        # A quantizer of its own would round once more, by another scale.
        if node.op_type == "QuantizeLinear":
            for reader in index.consumers.get(node.output[0], []):
                for again in index.consumers.get(reader.output[0], []):
                    replace_input(again, reader.output[0], read)
                model.graph.node.remove(reader)
            model.graph.node.remove(node)
        else:
            replace_input(node, name, read)
    scale, zero_point = _wire_constants(model, f"{name}/wire", wire)
    model.graph.node.append(
        helper.make_node("DequantizeLinear", [stored, scale, zero_point], [read], f"{name}/dequantize", axis=wire.axis)
    )
    source.CopyFrom(helper.make_tensor_value_info(stored, onnx.TensorProto.UINT8, None))
    source.type.tensor_type.shape.CopyFrom(shape)


def _write_wire(model: ModelProto, wire: Wire) -> None:
    """Let a graph that makes float features write them as they stand on the wire."""
    (sink,) = model.graph.output
    index = Index(model)
    name, shape = sink.name, sink.type.tensor_type.shape
    last = index.producer[name]
    features = name
    if last.op_type == "DequantizeLinear":
        quantizer = index.producer[last.input[0]]
        features = quantizer.input[0]
        model.graph.node.remove(last)
        model.graph.node.remove(quantizer)
    stored = f"{name}/wire"
    scale, zero_point = _wire_constants(model, stored, wire)
    model.graph.node.append(
        helper.make_node("QuantizeLinear", [features, scale, zero_point], [stored], f"{name}/quantize", axis=wire.axis)
    )
    sink.CopyFrom(helper.make_tensor_value_info(stored, onnx.TensorProto.UINT8, None))
    sink.type.tensor_type.shape.CopyFrom(shape)


def _wire_constants(model: ModelProto, prefix: str, wire: Wire) -> tuple[str, str]:
    names = f"{prefix}/scale", f"{prefix}/zero_point"
    # The one scale of a tensor is no scale of channels, and onnxruntime fuses some layers with a scalar only.
    shape = () if wire.scale.size == 1 else wire.scale.shape
    scale, zero_point = wire.scale.reshape(shape), wire.zero_point.reshape(shape)
    kept = [numpy_helper.from_array(scale, names[0]), numpy_helper.from_array(zero_point, names[1])]
    model.graph.initializer.extend(kept)
    return names


def recipe_of(trunk: ModelProto) -> Recipe:
    """Which recipe a graph needs: products of two activations, softmax or layer normalization are left in float."""
    index = Index(trunk)
    for node in index.nodes:
        if node.name.startswith(EPILOGUE):
            continue
        if node.op_type in {"Softmax", "LayerNormalization"}:
            return "attention"
        if node.op_type == "MatMul" and all(index.constant(name) is None for name in node.input):
            return "attention"
    return "convolutional"


class _Frames(CalibrationDataReader):  # type: ignore[misc]
    """Hands frames to the quantizer one by one."""

    def __init__(self, name: str, frames: Iterable[Tensor]) -> None:
        self._name = name
        self._frames: Iterator[Tensor] = iter(frames)

    def get_next(self) -> dict[str, Tensor] | None:
        frame = next(self._frames, None)
        return None if frame is None else {self._name: frame}


class _quiet:  # noqa: N801  reads as a statement
    """Mute the quantizer's advice, which goes to the root logger."""

    def __enter__(self) -> None:
        self._disabled = logging.root.manager.disable
        logging.disable(logging.WARNING)

    def __exit__(self, *_: object) -> None:
        logging.disable(self._disabled)


def _float_logits(model: ModelProto) -> None:
    """Take the quantization off the model's output: rounding would make ties of close logits."""
    index = Index(model)
    output = index.outputs[-1]
    last = index.producer[output]
    if last.op_type != "DequantizeLinear":
        return
    quantizer = index.producer.get(last.input[0])
    if quantizer is None or quantizer.op_type != "QuantizeLinear":
        return
    logits = quantizer.input[0]
    producer = index.producer[logits]
    producer.output[list(producer.output).index(logits)] = output
    for node in index.consumers[logits]:
        replace_input(node, logits, output)
    model.graph.node.remove(last)
    model.graph.node.remove(quantizer)


def _frame_scale(trunk: ModelProto) -> tuple[str, NDArray[np.float32], NDArray[np.uint8]] | None:
    """Whether pixels, as they are, read as a uint8 quantization of the network's input: all channels scaled alike."""
    index = Index(trunk)
    scale, bias = index.constant(f"{PROLOGUE}scale"), index.constant(f"{PROLOGUE}bias")
    add = next((node for node in index.nodes if node.name == f"{PROLOGUE}Add"), None)
    if scale is None or bias is None or add is None or np.ptp(scale) != 0 or np.ptp(bias) != 0:
        return None
    zero_point = -float(bias.flat[0]) / float(scale.flat[0])
    # A zero between two grey levels, as of pixels from -1 to 1, shifts all by half a level. Rounding does more harm:
    # halves go to the even neighbour, so that two levels become one.
    if not 0 <= round(zero_point) <= 255:
        return None
    return add.output[0], np.array(scale.flat[0], np.float32), np.array(round(zero_point), np.uint8)


def _read_frame_directly(model: ModelProto, image: str) -> None:
    """Skip cast, scaling and quantization of pixels where together they give the pixels again."""
    index = Index(model)
    readers = index.consumers.get(image, [])
    if len(readers) != 1 or readers[0].op_type != "QuantizeLinear":
        return
    skipped = [readers[0]]
    name = image
    while (node := index.producer[name]).op_type not in {*LAYOUT_OPS, "Gather"}:
        skipped.append(node)
        name = node.input[0]
        if name == FRAME:
            break
    pixels = readers[0].output[0]
    for node in index.consumers[pixels]:
        replace_input(node, pixels, name)
    for node in skipped:
        model.graph.node.remove(node)


def _sort(model: ModelProto) -> None:
    """Put the nodes into topological order again; ties keep the order they had."""
    made = {model.graph.input[0].name, "", *(tensor.name for tensor in model.graph.initializer)}
    waiting = list(model.graph.node)
    ordered: list[NodeProto] = []
    while waiting:
        ready = [node for node in waiting if all(name in made for name in node.input)]
        if not ready:
            raise BundleError("the quantized graph has a cycle; add --float")
        later = []
        for node in waiting:
            if all(name in made for name in node.input):
                ordered.append(node)
                made.update(node.output)
            else:
                later.append(node)
        waiting = later
    del model.graph.node[:]
    model.graph.node.extend(ordered)
