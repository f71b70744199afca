"""A bundle that finds a lamp where a picture is bright, and pictures for it: events on demand."""

from __future__ import annotations

import hashlib
from pathlib import Path

import cv2
import msgspec
import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from runtime import manifest
from runtime.gate_spec import GateSpec
from runtime.manifest import ExitSpec, FileSpec, SegmentSpec, TierSpec

SIDE = 16


def lamp_detector() -> bytes:
    """One box in the middle whose score is the picture's mean brightness: uint8 (n, 16, 16, 3) to (n, 2, 6)."""
    box = np.array([[[0.25, 0.25, 0.75, 0.75, 0, 0], [0, 0, 0, 0, 0, 0]]], np.float32)
    score = np.array([[[0, 0, 0, 0, 1 / 255, 0], [0, 0, 0, 0, 0, 0]]], np.float32)
    nodes = [
        helper.make_node("Cast", ["in"], ["float"], to=TensorProto.FLOAT),
        helper.make_node("ReduceMean", ["float"], ["mean"], axes=[1, 2, 3], keepdims=0),
        helper.make_node("Reshape", ["mean", "shape"], ["column"]),
        helper.make_node("Mul", ["column", "score"], ["scores"]),
        helper.make_node("Add", ["scores", "box"], ["out"]),
    ]
    graph = helper.make_graph(
        nodes,
        "lamp",
        [helper.make_tensor_value_info("in", TensorProto.UINT8, ["N", SIDE, SIDE, 3])],
        [helper.make_tensor_value_info("out", TensorProto.FLOAT, ["N", 2, 6])],
        [
            numpy_helper.from_array(np.array([-1, 1, 1], np.int64), "shape"),
            numpy_helper.from_array(box, "box"),
            numpy_helper.from_array(score, "score"),
        ],
    )
    data: bytes = helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9
    ).SerializeToString()
    onnx.checker.check_model(onnx.load_model_from_string(data))
    return data


def as_lamp(path: Path, gate: GateSpec | None = None) -> Path:
    """Turn the tiny bundle at `path` into a detector of one segment."""
    made = manifest.load(path).manifest
    for name, data in {"segments/0.onnx": lamp_detector(), made.labels: b"lamp\n"}.items():
        (path / name).write_bytes(data)
    kept = [made.labels, made.golden, "segments/0.onnx"]
    files = {name: (path / name).read_bytes() for name in kept}
    changed = msgspec.structs.replace(
        made,
        task="detect",
        settings={"score_threshold": 0.5},
        gate=gate,
        segments=(SegmentSpec(file="segments/0.onnx", macs=1, max_batch_size=8),),
        cuts=(made.cuts[0], msgspec.structs.replace(made.cuts[-1], shape=(2, 6))),
        exits=(ExitSpec(cut=1, file=None, temperature=1.0, threshold=0.0, agreement=1.0),),
        tiers=(TierSpec(name="device", last_segment=0),),
        files=tuple(
            FileSpec(path=name, size_bytes=len(data), sha256=hashlib.sha256(data).hexdigest())
            for name, data in files.items()
        ),
    )
    manifest.save(changed, path)
    return path


def pictures(folder: Path, brightness: list[int]) -> Path:
    """A picture of 64x48 pixels for each brightness."""
    folder.mkdir()
    for number, value in enumerate(brightness):
        cv2.imwrite(str(folder / f"{number:03}.png"), np.full((48, 64, 3), value, np.uint8))
    return folder
