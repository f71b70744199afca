"""A bundle of three tiny segments, made of real ONNX, for tests that need no real network."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from runtime import manifest
from runtime.manifest import (
    CodecSpec,
    CutSpec,
    ExitSpec,
    FileSpec,
    Manifest,
    PreprocessSpec,
    Provenance,
    RateSpec,
    SegmentSpec,
    TierSpec,
)

CLASSES = 5
RAW = CodecSpec(name="raw", rates=(RateSpec(parameter=0),))
JPEG = CodecSpec(name="jpeg", rates=tuple(RateSpec(parameter=quality) for quality in (50, 75, 90)))


def graph(
    nodes: Sequence[onnx.NodeProto],
    constants: Mapping[str, Any],
    source: tuple[int, Sequence[int]],
    sink: tuple[int, Sequence[int]],
    *more: onnx.ValueInfoProto,
) -> bytes:
    """A checked model with one input "in" and one output "out", each of a type and a shape without its batch."""
    made = helper.make_graph(
        list(nodes),
        "segment",
        [helper.make_tensor_value_info("in", source[0], ["N", *source[1]])],
        [helper.make_tensor_value_info("out", sink[0], ["N", *sink[1]]), *more],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    onnx.checker.check_model(model)
    data: bytes = model.SerializeToString()
    return data


def _scalar(value: float, dtype: type[np.generic]) -> np.ndarray:
    return np.array(value, dtype)


def _files(rng: np.random.Generator, logit_scale: float, *, guarded: bool) -> dict[str, bytes]:
    pixels, eight, four = (
        (TensorProto.UINT8, (16, 16, 3)),
        (TensorProto.UINT8, (4, 8, 8)),
        (TensorProto.UINT8, (6, 4, 4)),
    )
    node = helper.make_node

    def weights(*shape: int) -> np.ndarray:
        return rng.normal(0, 0.4, shape).astype(np.float32)

    def conv(channels_in: int, channels_out: int, head: list[onnx.NodeProto], start: str) -> list[onnx.NodeProto]:
        return [
            *head,
            node("Conv", [start, "weight"], ["conv"], strides=[2, 2], pads=[1, 1, 1, 1]),
            node("Relu", ["conv"], ["relu"]),
            node("QuantizeLinear", ["relu", "scale", "zero"], ["out"]),
        ]

    prologue = [
        node("Transpose", ["in"], ["nchw"], perm=[0, 3, 1, 2]),
        node("Cast", ["nchw"], ["cast"], to=TensorProto.FLOAT),
        node("Mul", ["cast", "norm"], ["float"]),
    ]
    dequantize = [node("DequantizeLinear", ["in", "scale", "zero"], ["float"])]
    head = [
        *dequantize,
        node("GlobalAveragePool", ["float"], ["pool"]),
        node("Flatten", ["pool"], ["flat"]),
        node("Gemm", ["flat", "weight"], ["out"], transB=1),
    ]
    guard = [node("ReduceMax", ["flat"], ["distance"], axes=[1], keepdims=0)] if guarded else []
    distance = [helper.make_tensor_value_info("distance", TensorProto.FLOAT, ["N"])] if guarded else []
    logits = (TensorProto.FLOAT, (CLASSES,))
    quantizer = {"scale": _scalar(0.05, np.float32), "zero": _scalar(0, np.uint8)}
    norm = {"norm": _scalar(1 / 64, np.float32)}
    return {
        "segments/0.onnx": graph(
            conv(3, 4, prologue, "float"), {**quantizer, **norm, "weight": weights(4, 3, 3, 3)}, pixels, eight
        ),
        "segments/1.onnx": graph(
            conv(4, 6, dequantize, "float"), {**quantizer, "weight": weights(6, 4, 3, 3)}, eight, four
        ),
        "segments/2.onnx": graph(
            head, {**quantizer, "weight": weights(CLASSES, 6) * np.float32(8 * logit_scale)}, four, logits
        ),
        "exits/1.onnx": graph(
            [*head, *guard], {**quantizer, "weight": weights(CLASSES, 4) * 4}, eight, logits, *distance
        ),
        "exits/2.onnx": graph(
            [*head, *guard], {**quantizer, "weight": weights(CLASSES, 6) * 4}, four, logits, *distance
        ),
        "labels.txt": "\n".join(f"label {index}" for index in range(CLASSES)).encode(),
    }


def write_tiny_bundle(
    path: Path,
    *,
    thresholds: tuple[float | None, float | None] = (0.6, 0.6),
    heads: bool = True,
    logit_scale: float = 1.0,
    distance_limit: float | None = None,
) -> Path:
    """Write the tiny bundle to `path`: uint8 cuts of 4x8x8 and 6x4x4, five classes, 16x16 pixels.

    With a `distance_limit` its exits have a guard, whose distance is the greatest of the pooled features.
    """
    rng = np.random.default_rng(0)
    files = _files(rng, logit_scale, guarded=distance_limit is not None)
    golden = io.BytesIO()
    np.savez(golden, frames=rng.integers(0, 256, (2, 16, 16, 3), np.uint8))
    files["golden/golden.npz"] = golden.getvalue()
    for name, data in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(data)
    cuts = [((16, 16, 3), "uint8"), ((4, 8, 8), "uint8"), ((6, 4, 4), "uint8"), ((CLASSES,), "float32")]
    manifest.save(
        Manifest(
            format=manifest.FORMAT,
            name="tiny",
            task="classify",
            labels="labels.txt",
            preprocess=PreprocessSpec(height=16, width=16),
            segments=tuple(SegmentSpec(file=f"segments/{index}.onnx", macs=1, max_batch_size=8) for index in range(3)),
            cuts=tuple(
                CutSpec(
                    after=f"layer {index}",
                    tensor=f"t{index}",
                    shape=shape,
                    dtype=dtype,  # type: ignore[arg-type]
                    codecs=(RAW, JPEG) if index == 0 else (RAW,) if index < 3 else (),
                )
                for index, (shape, dtype) in enumerate(cuts)
            ),
            exits=(
                *(
                    ExitSpec(
                        cut=cut,
                        file=f"exits/{cut}.onnx",
                        temperature=1.0,
                        threshold=threshold,
                        agreement=0.9,
                        distance_limit=distance_limit,
                    )
                    for cut, threshold in enumerate(thresholds, 1)
                    if heads
                ),
                ExitSpec(cut=3, file=None, temperature=1.0, threshold=0.0, agreement=1.0),
            ),
            tiers=tuple(
                TierSpec(name=name, last_segment=index) for index, name in enumerate(("device", "edge", "cloud"))
            ),
            golden="golden/golden.npz",
            proof={},
            provenance=Provenance(
                source="made by hand",
                tools={},
                target="any",
                quantization="uint8 cuts",
                opset=17,
                seed=0,
                frames={},
                frames_sha256="",
            ),
            files=tuple(
                FileSpec(path=name, size_bytes=len(data), sha256=hashlib.sha256(data).hexdigest())
                for name, data in files.items()
            ),
        ),
        path,
    )
    return path
