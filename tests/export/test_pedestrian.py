"""What scripts/build_pedestrian does without TensorFlow: boxes from anchors, the layout, and the comparison."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
from onnx import ModelProto, TensorProto, helper

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent / "scripts"))

from pedestrian_graph import FIELDS, INPUT, SIZE, Answers, assemble, differences

from export.detector import simplify_detector
from export.detector_rows import Builder
from export.graph import LOGITS
from export.source import DetectorOptions, InputOptions, open_source
from runtime.errors import BundleError
from tests.export.detectors import overlap

ANCHORS = 9


def heads() -> ModelProto:
    """Encoded boxes and logits of nine anchors, each from the mean of a third by a third of the image."""
    build, generator = Builder(prefix="Tower/"), np.random.default_rng(3)
    pooled = build.add("AveragePool", "Preprocessor/sub:0", kernel_shape=[100, 100], strides=[100, 100])
    for name, width in (("concat:0", 4), ("concat_1:0", 2)):
        weight = build.value(generator.normal(0, 3, (width, 3, 1, 1)).astype(np.float32))
        head = build.add("Conv", pooled, weight)
        head = build.add("Transpose", head, perm=[0, 2, 3, 1])
        shape = (1, ANCHORS, 1, 4) if width == 4 else (1, ANCHORS, 2)
        made = build.add("Reshape", head, build.ints(*shape))
        build.nodes.append(helper.make_node("Identity", [made], [name], f"Tower/{name}"))
    info = helper.make_tensor_value_info
    graph = helper.make_graph(
        build.nodes,
        "heads",
        [info("Preprocessor/sub:0", TensorProto.FLOAT, [1, 3, SIZE, SIZE])],
        [info("concat:0", 1, [1, ANCHORS, 1, 4]), info("concat_1:0", 1, [1, ANCHORS, 2])],
        build.constants,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def anchors() -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    rows, columns = np.mgrid[0:3, 0:3].reshape(2, -1) / 3
    return np.stack([rows, columns, rows + 0.45, columns + 0.4], axis=1).astype(np.float32)


def image() -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    coarse = np.random.default_rng(4).uniform(-1, 1, (1, 3, 3, 3)).astype(np.float32)
    return coarse.repeat(100, axis=2).repeat(100, axis=3)


def test_boxes_are_those_of_the_box_coder() -> None:
    encoded, logits = ort.InferenceSession(heads().SerializeToString()).run(None, {"Preprocessor/sub:0": image()})
    model = assemble(heads(), anchors())
    boxes, scores, classes, number = ort.InferenceSession(model.SerializeToString()).run(None, {INPUT: image()})
    wanted = []
    for (y, x, h, w), (_, person), (top, left, bottom, right) in zip(
        encoded[0, :, 0], logits[0], anchors(), strict=True
    ):
        height, width = bottom - top, right - left
        middle_y, middle_x = (top + bottom) / 2 + y / 10 * height, (left + right) / 2 + x / 10 * width
        half_y, half_x = height * np.exp(h / 5) / 2, width * np.exp(w / 5) / 2
        box = np.array([middle_y - half_y, middle_x - half_x, middle_y + half_y, middle_x + half_x])
        wanted.append((1 / (1 + np.exp(-person)), box))
    kept: list[tuple[float, np.ndarray[tuple[int, ...], np.dtype[np.float64]]]] = []
    for score, box in sorted(wanted, key=lambda pair: -pair[0]):
        if all(overlap(box.astype(np.float32), other.astype(np.float32)) <= 0.6 for _, other in kept):
            kept.append((score, box))
    assert number.item() == len(kept)
    np.testing.assert_allclose(scores[0, : len(kept)], [score for score, _ in kept], atol=1e-6)
    np.testing.assert_allclose(boxes[0, : len(kept)], np.clip([box for _, box in kept], 0, 1), atol=1e-6)
    assert (classes == 1).all()


def test_the_export_takes_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(BundleError, match="run scripts/build_pedestrian"):
        open_source("pedestrian", InputOptions())
    (tmp_path / "kinflow").mkdir()
    (tmp_path / "kinflow" / "pedestrian.onnx").write_bytes(assemble(heads(), anchors()).SerializeToString())
    detector = simplify_detector(open_source("pedestrian", InputOptions()), DetectorOptions())
    assert detector.source.labels == ("person",)
    assert detector.source.preprocess.fit == "stretch"
    assert detector.simplified.shapes[LOGITS] == (1, ANCHORS, 6)
    assert detector.simplified.batchable


def test_differences_are_those_of_the_rows_that_count() -> None:
    shapes = {"boxes": (2, 5, 4), "scores": (2, 5), "classes": (2, 5), "number": (2,)}
    wanted = Answers(**{name: np.full(shape, 0.5, np.float32) for name, shape in shapes.items()})
    wanted.scores[:, 3:] = 0.01
    said = replace(wanted, boxes=wanted.boxes.copy(), scores=wanted.scores.copy(), classes=wanted.classes.copy())
    said.boxes[1, 2, 3] += 0.25
    said.boxes[0, 4] = 0  # noise
    said.scores[0, 0] -= 0.125
    apart = differences(said, wanted)
    assert (apart.boxes, apart.scores, apart.rows) == (0.25, 0.125, 6)
    said.classes[0, 0] = 2
    assert differences(said, wanted).boxes == np.inf
    assert tuple(f"detection_{name}" for name in shapes)[:3] == FIELDS[:3]
