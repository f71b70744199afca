"""Cuts the whole model at its wires: one ONNX file per segment, with one input and one output."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from onnx import ModelProto

from export.cuts import Cut
from export.graph import FRAME, LOGITS, Shape, extract, tensor_info
from export.quantize import Quantized


@dataclass(frozen=True, slots=True)
class Chain:
    """The whole model and the segments that it was cut into; both float or both int8."""

    whole: ModelProto
    segments: tuple[ModelProto, ...]
    wires: tuple[str, ...]  # the tensor in `whole` at each cut, from the frame to the logits
    dtypes: tuple[Literal["uint8", "float32"], ...]  # at each cut
    shapes: tuple[Shape, ...]  # at each cut, without the batch


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
        extract(whole, [infos[index]], [infos[index + 1]], f"segment{index}") for index in range(len(cuts) + 1)
    )
    return Chain(whole, segments, names, dtypes, at)
