"""Finds, or makes, the uint8 tensor that goes over the wire at a cut of a quantized model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx
import onnxruntime as ort
from numpy.typing import NDArray
from onnx import ModelProto, helper

from export.cuts import Cut
from export.graph import FRAME, LAYOUT_OPS, Index, Shape, constant, copy_of, replace_input
from runtime.datatypes import Tensor
from runtime.errors import BundleError
from runtime.segment_onnx import session_options


@dataclass(frozen=True, slots=True)
class Wire:
    """What goes over the wire at a cut: the tensor's name in the quantized model, and how it reads as float."""

    tensor: str
    scale: NDArray[np.float32]  # () or (channels,)
    zero_point: NDArray[np.uint8]
    axis: int  # of the channels


def channel_ranges(
    trunk: ModelProto, cuts: Sequence[Cut], frames: Iterable[Tensor], threads: int
) -> dict[str, tuple[Tensor, Tensor]]:
    """The lowest and highest value of each channel at each cut over the frames."""
    if not cuts:
        return {}
    probe = copy_of(trunk)
    elem = onnx.TensorProto.FLOAT
    probe.graph.output.extend(helper.make_tensor_value_info(cut.tensor, elem, None) for cut in cuts)
    session = ort.InferenceSession(probe.SerializeToString(), session_options(threads))
    names = [cut.tensor for cut in cuts]
    found: dict[str, tuple[Tensor, Tensor]] = {}
    for frame in frames:
        for name, value in zip(names, session.run(names, {FRAME: frame}), strict=True):
            rest = tuple(axis for axis in range(value.ndim) if axis != channel_axis(value.ndim))
            low, high = value.min(axis=rest), value.max(axis=rest)
            known = found.get(name)
            found[name] = (low, high) if known is None else (np.minimum(known[0], low), np.maximum(known[1], high))
    return found


def channel_axis(rank: int) -> int:
    """Where the channels lie: (batch, channels, height, width), (batch, tokens, channels) or (batch, channels)."""
    return 1 if rank == 4 else rank - 1


def add_wire(
    model: ModelProto,
    cut: Cut,
    shapes: Mapping[str, Shape],
    ranges: Mapping[str, tuple[Tensor, Tensor]],
    *,
    fused: bool,
    reuse: bool,
) -> Wire:
    """Find the uint8 tensor at a cut, or make one that every reader reads."""
    index = Index(model)
    readers = index.consumers.get(cut.tensor, [])
    quantizers = [node for node in readers if node.op_type == "QuantizeLinear"]
    if len(quantizers) == 1 and (fused or reuse):
        quantizer = quantizers[0]
        dequantized = index.consumers[quantizer.output[0]][0].output[0]
    else:
        prefix = f"{cut.tensor}/cut"
        low, high = ranges[cut.tensor]
        if fused:
            low, high = low.min(), high.max()
        low, high = np.minimum(low, 0), np.maximum(high, 0)
        scale = np.maximum((high - low) / 255, 1e-8).astype(np.float32)
        zero_point = np.clip(np.rint(-low / scale), 0, 255).astype(np.uint8)
        model.graph.initializer.append(constant(f"{prefix}/scale", scale))
        model.graph.initializer.append(constant(f"{prefix}/zero_point", zero_point))
        axis = channel_axis(len(shapes[cut.tensor]))
        names = [f"{prefix}/scale", f"{prefix}/zero_point"]
        dequantized = f"{prefix}/dequantized"
        quantizer = helper.make_node(
            "QuantizeLinear", [cut.tensor, *names], [f"{prefix}/quantized"], f"{prefix}/quantize", axis=axis
        )
        model.graph.node.append(quantizer)
        model.graph.node.append(
            helper.make_node(
                "DequantizeLinear", [f"{prefix}/quantized", *names], [dequantized], f"{prefix}/dequantize", axis=axis
            )
        )
        index = Index(model)
    for node in readers:
        if node is not quantizer:
            replace_input(node, cut.tensor, dequantized)
    scale_value, zero_value = index.constant(quantizer.input[1]), index.constant(quantizer.input[2])
    if scale_value is None or zero_value is None or zero_value.dtype != np.uint8:
        raise BundleError(f"the cut after {cut.after} has no uint8 tensor; choose another with --cuts or add --float")
    return Wire(
        quantizer.output[0],
        scale_value.astype(np.float32),
        zero_value.astype(np.uint8),
        channel_axis(len(shapes[cut.tensor])),
    )


def fused_cuts(model: ModelProto, cuts: Sequence[Cut]) -> set[str]:
    """The cut tensors that onnxruntime will fuse with the layer before or behind them.

    It fuses any layer between DequantizeLinear and QuantizeLinear, even through reshapes and transpositions, and then
    fails when one of them is per channel.
    """
    index = Index(model)
    tensors = {cut.tensor for cut in cuts}
    fused: set[str] = set()
    for tensor in tensors:
        reads = [_origin(index, name) for name in index.producer[tensor].input if name in index.producer]
        quantized = [
            name for name in reads if name in index.producer and index.producer[name].op_type == "DequantizeLinear"
        ]
        if reads and all(name in tensors or name in quantized for name in reads):
            fused.update([tensor, *(name for name in reads if name in tensors)])
        elif quantized:
            fused.add(tensor)
    return fused


def _origin(index: Index, name: str) -> str:
    """The tensor that `name` only rearranges."""
    while name in index.producer and index.producer[name].op_type in LAYOUT_OPS:
        name = index.producer[name].input[0]
    return name
