"""Cuts the whole model at its wires: one ONNX file per segment, with one input and one output.

Maps travel with their channels last, as frames and tokens do, whatever the graph computes in: a codec then finds the
channels in one place, and onnxruntime, whose int8 convolutions want channels last, drops the transpositions at both
ends instead of putting its own around every layer near a cut.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from onnx import ModelProto, TensorShapeProto, ValueInfoProto, helper

from export.cuts import Cut
from export.graph import FRAME, LOGITS, Shape, extract, tensor_info
from export.quantize import Quantized


@dataclass(frozen=True, slots=True)
class Chain:
    """The whole model and the segments that it was cut into; both float or both int8."""

    whole: ModelProto
    segments: tuple[ModelProto, ...]
    wires: tuple[str, ...]  # the tensor in `whole` at each cut, from the frame to the logits; maps channels first
    dtypes: tuple[Literal["uint8", "float32"], ...]  # at each cut
    shapes: tuple[Shape, ...]  # on the wire at each cut, without the batch; maps channels last


def slice_float(trunk: ModelProto, cuts: Sequence[Cut], shapes: Mapping[str, Shape]) -> Chain:
    """Cut the float model at its own float tensors."""
    return _chain(trunk, cuts, [cut.tensor for cut in cuts], "float32", shapes)


def slice_quantized(quantized: Quantized, cuts: Sequence[Cut], shapes: Mapping[str, Shape]) -> Chain:
    """Cut the quantized model behind the QuantizeLinear of each cut."""
    return _chain(quantized.model, cuts, [wire.tensor for wire in quantized.wires], "uint8", shapes)


def _chain(
    whole: ModelProto,
    cuts: Sequence[Cut],
    tensors: Sequence[str],
    dtype: Literal["uint8", "float32"],
    shapes: Mapping[str, Shape],
) -> Chain:
    names = (FRAME, *tensors, LOGITS)
    at = (shapes[FRAME][1:], *(cut.shape for cut in cuts), shapes[LOGITS][1:])
    dtypes: tuple[Literal["uint8", "float32"], ...] = ("uint8", *(dtype for _ in cuts), "float32")
    infos = [tensor_info(*entry) for entry in zip(names, dtypes, at, strict=True)]
    segments = tuple(
        channels_last(extract(whole, [infos[index]], [infos[index + 1]], f"segment{index}"), first=index == 0)
        for index in range(len(cuts) + 1)
    )
    return Chain(whole, segments, names, dtypes, (at[0], *map(on_wire, at[1:])))


def on_wire(shape: Shape) -> Shape:
    """How a tensor of the graph, without its batch, travels: (channels, height, width) as (height, width, channels)."""
    return (*shape[1:], shape[0]) if len(shape) == 3 else shape


def in_graph(shape: Shape) -> Shape:
    """The other way round."""
    return (shape[-1], *shape[:-1]) if len(shape) == 3 else shape


def channels_last(segment: ModelProto, *, first: bool) -> ModelProto:
    """Give a segment ends that take and give maps with their channels last; the frame is so already."""
    graph = segment.graph
    source, sink = graph.input[0], graph.output[0]
    if not first and len(source.type.tensor_type.shape.dim) == 4:
        graph.node.insert(0, helper.make_node("Transpose", ["wire/in"], [source.name], "wire/read", perm=[0, 3, 1, 2]))
        _rename(source, "wire/in")
    if len(sink.type.tensor_type.shape.dim) == 4:
        graph.node.append(helper.make_node("Transpose", [sink.name], ["wire/out"], "wire/write", perm=[0, 2, 3, 1]))
        _rename(sink, "wire/out")
    return segment


def _rename(end: ValueInfoProto, name: str) -> None:
    """Rename an end of a graph, its channels now last."""
    dims = end.type.tensor_type.shape.dim
    batch, channels, height, width = (_copy(dim) for dim in dims)
    del dims[:]
    dims.extend([batch, height, width, channels])
    end.name = name


def _copy(dim: TensorShapeProto.Dimension) -> TensorShapeProto.Dimension:
    copied = TensorShapeProto.Dimension()
    copied.CopyFrom(dim)
    return copied
