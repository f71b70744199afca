"""Every layout of a detector's outputs becomes the same rows, and goes through the stages of an export."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnxruntime as ort
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import ModelProto, TensorProto, helper

from export.cuts import default_cuts, list_cuts
from export.detector import CANDIDATES, LEAST_SCORE, Detector, simplify_detector
from export.detector_layout import Output, recognize
from export.detector_rows import Builder, Candidates, suppress
from export.graph import EPILOGUE, FRAME, LOGITS, Index
from export.quantize import quantize
from export.slicing import Chain, slice_float, slice_quantized
from export.source import DetectorOptions
from export.timing import time_chain
from export.torch_graph import TorchGraph
from export.wires import channel_ranges
from runtime.errors import BundleError
from tests.export import detectors
from tests.export.detectors import CELLS, CLASSES, SIDE, Array, frames, source_of, suppressed

NAMED = DetectorOptions(names=("cat", "dog", "bird"))


def rows_of(detector: Detector, frame: Array) -> Array:
    rows: Array = run(detector.simplified.whole, frame)[0]
    return rows


def run(model: ModelProto, frame: Array) -> Array:
    made: Array = ort.InferenceSession(model.SerializeToString()).run(None, {FRAME: frame})[0]
    return made


def corners(boxes: Array) -> Array:
    half = boxes[:, 2:] / 2
    return np.concatenate([boxes[:, :2] - half, boxes[:, :2] + half], axis=1) / np.float32(SIDE)


@pytest.mark.parametrize("objectness", [False, True])
def test_a_yolo_head_is_decoded_and_suppressed(objectness: bool) -> None:
    model = detectors.yolo_v5() if objectness else detectors.yolo_v8()
    detector = simplify_detector(source_of(model), DetectorOptions(iou_threshold=0.45))
    assert detector.raw is not None
    assert detector.source.preprocess.fit == "letterbox"
    assert detector.source.labels == ("class 0", "class 1", "class 2")
    assert detector.simplified.classes == CLASSES
    assert detector.simplified.batchable
    most = min(100, CELLS * (3 if objectness else 1))
    assert detector.simplified.shapes[LOGITS] == (1, most, 6)
    for frame in frames(4):
        (table,) = detectors.run(model, frame)
        table = table[0] if objectness else table[0].T
        scores = table[:, 5:] * table[:, 4:5] if objectness else table[:, 4:]
        expected = suppressed(corners(table[:, :4]), scores, 0.45, LEAST_SCORE, most)
        assert (expected[:, 4] > 0).sum() > 5
        np.testing.assert_allclose(rows_of(detector, frame), expected, atol=2e-6)
        raw = run(detector.raw, frame)[0]
        np.testing.assert_allclose(raw, np.concatenate([corners(table[:, :4]), scores], axis=1), atol=2e-6)


def test_rows_in_pixels_become_shares() -> None:
    model = detectors.yolo_v10()
    detector = simplify_detector(source_of(model), NAMED)
    assert detector.raw is not None
    assert detector.source.preprocess.fit == "letterbox"
    for frame in frames(3):
        (table,) = detectors.run(model, frame)
        told = [[*(row[:4] / SIDE), *row[4:]] for row in table[0] if row[4] > LEAST_SCORE]
        np.testing.assert_allclose(rows_of(detector, frame), detectors.padded(told, 25), atol=1e-6)
        raw = run(detector.raw, frame)[0]
        assert raw.shape == (CELLS, 4 + CLASSES)
        best = raw[:, 4:].max(axis=1).argmax()
        np.testing.assert_allclose(np.clip(raw[best, :4], 0, 1), rows_of(detector, frame)[0, :4], atol=1e-6)
        assert raw[best, 4:].argmax() == table[0, 0, 5]


def test_torchvisions_lists_are_padded() -> None:
    model = detectors.torchvision()
    detector = simplify_detector(source_of(model), NAMED)
    assert detector.source.preprocess.fit == "stretch"
    assert detector.simplified.shapes[LOGITS] == (1, 100, 6)
    for frame in frames(3):
        boxes, labels, scores = detectors.run(model, frame)
        told = [[*box / SIDE, score, label - 1] for box, label, score in zip(boxes, labels, scores, strict=True)]
        np.testing.assert_allclose(rows_of(detector, frame), detectors.padded(told, 100), atol=1e-6)


def test_a_background_among_the_names_keeps_the_numbers() -> None:
    model = detectors.torchvision()
    detector = simplify_detector(source_of(model), DetectorOptions(names=("__background__", "a", "b", "c")))
    (frame,) = frames(1)
    _, labels, _ = detectors.run(model, frame)
    assert np.array_equal(rows_of(detector, frame)[: len(labels), 5], labels)


def test_tensorflows_lists_end_at_their_number() -> None:
    model = detectors.tensorflow(number=7)
    detector = simplify_detector(source_of(model), NAMED)
    assert detector.raw is not None
    assert not detector.simplified.batchable
    for frame in frames(3):
        boxes, scores, classes, _ = (values[0] for values in detectors.run(model, frame))
        table = [[*boxes[place][[1, 0, 3, 2]], scores[place], classes[place] - 1] for place in range(7)]
        np.testing.assert_allclose(rows_of(detector, frame), detectors.padded(table, 100), atol=1e-6)
        raw = run(detector.raw, frame)[0]
        best = raw[:, 4:].max(axis=1).argmax()
        np.testing.assert_allclose(raw[best, :4], table[0][:4], atol=1e-6)
        assert raw[best, 4:].max() == pytest.approx(scores[0])


def test_the_order_of_sides_can_be_said() -> None:
    model = detectors.torchvision()
    (frame,) = frames(1)
    usual = rows_of(simplify_detector(source_of(model), NAMED), frame)
    swapped = rows_of(simplify_detector(source_of(model), replace(NAMED, boxes="yxyx-pixels")), frame)
    assert np.array_equal(swapped[:, [1, 0, 3, 2]], usual[:, :4])
    assert not np.array_equal(swapped, usual)


SESSION: dict[str, ort.InferenceSession] = {}
COUNT, KEPT = 24, 16


def suppression(classes: int, batch: int) -> ort.InferenceSession:
    build = Builder()
    rows = suppress(build, Candidates("boxes", "scores", COUNT, classes), 0.4, 0.2, KEPT)
    info = helper.make_tensor_value_info
    graph = helper.make_graph(
        build.nodes,
        "rows",
        [info("boxes", 1, ["batch", COUNT, 4]), info("scores", 1, ["batch", COUNT, classes])],
        [info(rows, 1, None)],
        build.constants,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    key = f"{classes} {batch}"
    if key not in SESSION:
        SESSION[key] = ort.InferenceSession(model.SerializeToString())
    return SESSION[key]


@settings(max_examples=40)
@given(st.integers(0, 2**32), st.sampled_from([1, 3]), st.integers(1, 3))
def test_suppression_is_that_of_the_textbook(seed: int, classes: int, batch: int) -> None:
    generator = np.random.default_rng(seed)
    starts = generator.random((batch, COUNT, 2))
    boxes = np.concatenate([starts, starts + generator.random((batch, COUNT, 2)) * 0.6], axis=2).astype(np.float32)
    scores = generator.random((batch, COUNT, classes)).astype(np.float32)
    (found,) = suppression(classes, batch).run(None, {"boxes": boxes, "scores": scores})
    for place in range(batch):
        expected = suppressed(boxes[place], scores[place], 0.4, 0.2, KEPT)
        np.testing.assert_allclose(np.clip(found[place, :, :4], 0, 1), expected[:, :4], atol=1e-6)
        assert np.array_equal(found[place, :, 4:], expected[:, 4:])
        assert (np.diff(found[place, :, 4]) <= 0).all()


def test_nothing_found_is_rows_of_zeros() -> None:
    boxes, scores = np.ones((1, COUNT, 4), np.float32), np.full((1, COUNT, 3), 0.1, np.float32)
    (found,) = suppression(3, 1).run(None, {"boxes": boxes, "scores": scores})
    assert not found.any()


MODELS = {"yolo": detectors.yolo_v8, "tensorflow": detectors.tensorflow}


@pytest.mark.parametrize("kind", list(MODELS))
def test_every_stage_takes_a_detector(kind: str) -> None:
    detector = simplify_detector(source_of(MODELS[kind]()), NAMED)
    trunk, shapes = detector.simplified.trunk(), detector.simplified.shapes
    cuts = list_cuts(trunk, shapes)
    assert [cut.shape for cut in cuts][-1] == (12, 8, 8)  # where the first head begins
    assert not any(cut.tensor.startswith(EPILOGUE) for cut in cuts)
    chosen = default_cuts(cuts, 3) or cuts[-1:]
    shown = frames(12)
    floating = slice_float(trunk, chosen, shapes)
    whole = [run(trunk, frame) for frame in shown[:4]]
    for frame, expected in zip(shown, whole, strict=False):
        np.testing.assert_allclose(composed(floating, frame), expected, atol=1e-5)
    ranges = channel_ranges(trunk, chosen, shown, 1)
    quantized = quantize(trunk, shapes, chosen, shown, ranges, "x86-vnni")
    chain = slice_quantized(quantized, chosen, shapes)
    for frame in shown[:4]:
        assert np.array_equal(composed(chain, frame), run(quantized.model, frame))
    assert quantized.recipe == "convolutional"
    convolutions, rest = quantized_nodes(quantized.model)
    assert convolutions == {"Conv"}
    assert {"NonMaxSuppression", "TopK", "GatherND", "Sigmoid", "Exp", "Concat"} <= rest
    assert len(time_chain(chain, shown[0])[1]) == len(chosen) + 1


def composed(chain: Chain, frame: Array) -> Array:
    tensor = frame
    for segment in chain.segments:
        session = ort.InferenceSession(segment.SerializeToString())
        (tensor,) = session.run(None, {session.get_inputs()[0].name: tensor})
    return tensor


def quantized_nodes(model: ModelProto) -> tuple[set[str], set[str]]:
    """The operators that read integers as numbers, and those of the detector's end, which should not."""
    index = Index(model)
    reading = {
        node.op_type
        for node in index.nodes
        if node.op_type not in ("QuantizeLinear", "DequantizeLinear", "Relu", "Transpose", "Reshape")
        and any(
            index.producer[name].op_type == "DequantizeLinear" and name not in index.constants
            for name in node.input[:1]
            if name in index.producer
        )
        and not node.name.startswith(EPILOGUE)
    }
    end = {node.op_type for node in index.nodes if node.name.startswith(EPILOGUE)}
    ends = [name for node in index.nodes if node.name.startswith(EPILOGUE) for name in node.output]
    assert not any(reader.op_type == "QuantizeLinear" for name in ends for reader in index.consumers.get(name, [])), (
        "nothing behind the last layers is rounded"
    )
    return reading, end


def test_gradients_flow_through_the_candidates() -> None:
    import torch

    detector = simplify_detector(source_of(detectors.tensorflow()), NAMED)
    assert detector.raw is not None
    assert [output.name for output in detector.raw.graph.output] == [CANDIDATES]
    (frame,) = frames(1)
    made = TorchGraph(detector.raw)(torch.from_numpy(frame))
    np.testing.assert_allclose(made.numpy(), run(detector.raw, frame), atol=1e-4)


TFLITE = [
    (f"TFLite_Detection_PostProcess{end}", shape)
    for end, shape in (("", (1, 10, 4)), (":1", (1, 10)), (":2", (1, 10)), (":3", (1,)))
]


@pytest.mark.parametrize(
    ("outputs", "kind"),
    [
        ([("output0", (1, 84, 8400))], "yolo"),
        ([("output0", (1, 5, 8400))], "yolo"),
        ([("output", (1, 25200, 85))], "yolo with objectness"),
        ([("output", (1, 25200, 6))], "yolo with objectness"),
        ([("output0", (1, 300, 6))], "rows"),
        (TFLITE, "lists"),
        ([("bboxes", (1, 200, 4)), ("labels", (1, 200)), ("scores", (1, 200))], "lists"),
    ],
)
def test_layouts_are_told_by_their_shapes(outputs: list[tuple[str, tuple[int, ...]]], kind: str) -> None:
    listed = [Output(name, shape, is_float=True) for name, shape in outputs]
    assert recognize("it", listed, (640, 640)).kind == kind


@pytest.mark.parametrize(
    "outputs",
    [
        [("logits", (1, 1000))],
        [("output0", (1, 300, 84))],  # RT-DETR: shares, no objectness
        [("boxes", (1, 100, 4)), ("scores", (1, 100))],
        [("boxes", (1, 100, 5)), ("scores", (1, 100)), ("labels", (1, 100))],
        [("a", (1, 100, 4)), ("b", (1, 100)), ("c", (1, 100))],
        [("out", None)],
    ],
)
def test_any_other_layout_is_refused_in_a_sentence(outputs: list[tuple[str, tuple[int, ...] | None]]) -> None:
    listed = [Output(name, shape, is_float=True) for name, shape in outputs]
    with pytest.raises(BundleError, match=f"it gives {outputs[0][0]} .* is no layout of a detector .*YOLOv8") as caught:
        recognize("it", listed, (640, 640))
    assert "\n" not in str(caught.value)


def test_names_come_from_the_model_and_must_fit() -> None:
    model = detectors.yolo_v8()
    model.metadata_props.add(key="names", value="{0: 'cat', 1: 'dog', 2: 'bird'}")
    assert simplify_detector(source_of(model), DetectorOptions()).source.labels == ("cat", "dog", "bird")
    with pytest.raises(BundleError, match="3 classes, but 2 names"):
        simplify_detector(source_of(model), DetectorOptions(names=("cat", "dog")))
    with pytest.raises(BundleError, match="add --classes FILE"):
        simplify_detector(source_of(detectors.torchvision()), DetectorOptions())
    with pytest.raises(BundleError, match="leave out --boxes"):
        simplify_detector(source_of(model), DetectorOptions(boxes="yxyx"))


def test_control_flow_is_refused() -> None:
    net = detectors.Net()
    info = helper.make_tensor_value_info
    body = helper.make_graph(
        [helper.make_node("Identity", ["go"], ["went"]), helper.make_node("Relu", ["state"], ["next"])],
        "body",
        [info("turn", TensorProto.INT64, []), info("go", TensorProto.BOOL, []), info("state", 1, None)],
        [info("went", TensorProto.BOOL, []), info("next", 1, None)],
    )
    turns = net.build.value(np.array(3, np.int64))
    scores = net.build.add("Loop", turns, "", net.scores, body=body)
    table = net.build.add("Concat", net.boxes, scores, axis=2)
    net.gives("output0", net.build.add("Transpose", table, perm=[0, 2, 1]))
    with pytest.raises(BundleError, match="has Loop inside; export it without control flow"):
        simplify_detector(source_of(net.model()), NAMED)
