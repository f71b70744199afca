"""What detections are made of, how they are compared, and what the codec's sensitivity makes of that."""

from __future__ import annotations

import dataclasses

import msgspec
import numpy as np
import onnx
import onnxruntime as ort
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from onnx import ModelProto, TensorProto, helper, numpy_helper

from export.agreement import clopper_pearson, per_frame, pooled
from export.evidence import EVIDENCE, LEAST, WORTH, evidence_model
from export.exits_judge import Seen, judge_seen
from export.exits_where import CELLS, covered, where_front
from export.graph import FRAME, OPSET, finish, tensor_info
from export.pipeline import Exported
from export.risk import Words, choose, loosest
from export.sensitivity import Tail, by_gradients, by_probes
from export.task_detect import DetectJudge
from export.transform import layout_of
from runtime.datatypes import Tensor
from runtime.manifest import Bundle, ExitSpec
from tests.runtime.test_task_detect import LAST, as_detector

COUNT, CLASSES, SIDE = 5, 2, 4


def candidates() -> ModelProto:
    """A frame's pixels, scaled, are read as candidates: boxes, then scores."""
    nodes = [
        helper.make_node("Cast", [FRAME], ["float"], to=TensorProto.FLOAT),
        helper.make_node("Div", ["float", "most"], ["shares"]),
        helper.make_node("Reshape", ["shares", "shape"], ["candidates"]),
    ]
    graph = helper.make_graph(
        nodes,
        "candidates",
        [helper.make_tensor_value_info(FRAME, TensorProto.UINT8, ["batch", 1, 10, 3])],
        [helper.make_tensor_value_info("candidates", TensorProto.FLOAT, ["batch", COUNT, 4 + CLASSES])],
        [
            numpy_helper.from_array(np.array(255, np.float32), "most"),
            numpy_helper.from_array(np.array([-1, COUNT, 4 + CLASSES], np.int64), "shape"),
        ],
    )
    return finish(helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)]))


def frames(count: int) -> list[Tensor]:
    generator = np.random.default_rng(0)
    made = generator.integers(0, 256, (count, 1, 1, 10, 3), dtype=np.uint8)
    # The last candidate never scores.
    made.reshape(count, COUNT, 4 + CLASSES)[:, -1, 4:] = 0
    return list(made)


def test_evidence_is_angles_of_scores_and_weighed_corners_of_candidates_that_ever_scored() -> None:
    fit = frames(20)
    model = evidence_model(candidates(), fit)
    onnx.checker.check_model(model)
    (found,) = ort.InferenceSession(model.SerializeToString()).run([EVIDENCE], {FRAME: np.concatenate(fit[:3])})
    tables = np.concatenate(fit).reshape(20, COUNT, 4 + CLASSES).astype(np.float64) / 255
    kept = tables[:, :-1]
    angles = 2 * np.arcsin(np.sqrt(np.clip(kept[:3, :, 4:], LEAST, 1 - LEAST))).reshape(3, -1)
    sides = np.abs(kept[:, :, [2, 3]] - kept[:, :, [0, 1]]).mean(axis=0)
    likely = np.sqrt(kept[:, :, 4:].mean(axis=0).max(axis=1))[:, np.newaxis]
    weights = np.tile(likely / (0.1 * sides), 2)
    corners = (kept[:3, :, :4] * weights).reshape(3, -1)
    assert WORTH > 0
    assert found == pytest.approx(np.concatenate([angles, corners], axis=1), rel=1e-3)


def linear(weight: NDArray[np.float32]) -> Tail:
    graph = helper.make_graph(
        [
            helper.make_node("GlobalAveragePool", ["x"], ["pooled"]),
            helper.make_node("Flatten", ["pooled"], ["flat"]),
            helper.make_node("Gemm", ["flat", "weight"], [EVIDENCE]),
        ],
        "tail",
        [tensor_info("x", "float32", (len(weight), SIDE, SIDE))],
        [tensor_info(EVIDENCE, "float32", (weight.shape[1],))],
        [numpy_helper.from_array(weight, "weight")],
    )
    made = finish(helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)]))
    return Tail(made, 10_000, 8, maps=True, evidence=True)


@pytest.mark.parametrize("method", [by_gradients, by_probes])
def test_sensitivity_to_evidence_is_its_squared_change(method: object) -> None:
    weight = np.zeros((3, 4), np.float32)
    weight[0], weight[1, 0] = (3, 0, 0, 0), 0.5
    features = np.random.default_rng(1).normal(size=(400, SIDE * SIDE, 3)).astype(np.float32)
    found = method(linear(weight), features, layout_of((SIDE, SIDE, 3)), 0)[0]  # type: ignore[operator]
    expected = weight @ weight.T / SIDE**2  # of the mean over a map, which is its lowest frequency
    assert found == pytest.approx(expected, rel=0.25, abs=0.03)


@pytest.fixture(scope="module")
def bundle(exported: Exported) -> Bundle:
    return as_detector(exported.bundle, boxes=3)


def rows(*boxes: tuple[float, ...]) -> NDArray[np.float32]:
    return np.array([*boxes, *[(0.0,) * 6] * (3 - len(boxes))], np.float32)


ONE, TWO, FAINT = (0, 0, 0.5, 0.5, 0.9, 0), (0.5, 0.5, 1, 1, 0.8, 1), (0, 0, 0.5, 0.5, 0.2, 0)
WANTED = np.stack([rows(ONE, TWO), rows(ONE), rows(FAINT), rows()])


def test_agreement_of_detections_is_f1_over_all_boxes(bundle: Bundle) -> None:
    judge = DetectJudge(bundle)
    said = np.stack([rows(ONE), rows(ONE), rows(ONE), rows()])
    assert judge.marks(said, WANTED).tolist() == [[2, 3], [2, 2], [0, 1], [1, 1]]
    assert judge.divergence(WANTED, said) == pytest.approx([1 / 3, 0, 1, 0])
    assert judge.like(said, WANTED) == pytest.approx(5 / 7)
    found = pooled(judge.marks(said, WANTED))
    assert found.share == pytest.approx(5 / 7)
    assert found.n == 4
    assert 0 <= found.low < found.share < found.high <= 1
    assert per_frame(judge.marks(said, WANTED)).mean() == pytest.approx(5 / 7)


def test_exits_learn_whether_a_box_that_counts_is_there(bundle: Bundle) -> None:
    judge = DetectJudge(bundle)
    assert judge.keys(WANTED).tolist() == [1, 1, 0, 0]
    logits = judge.head_logits(WANTED)
    assert logits.argmax(axis=1).tolist() == [1, 1, 0, 0]
    assert judge.owed(judge.keys(WANTED)).tolist() == [True, True, False, False]
    half = judge.head_logits(rows((0, 0, 1, 1, 0.5, 0))[np.newaxis])
    assert half[0, 0] == half[0, 1]


@given(st.lists(st.booleans(), min_size=1, max_size=200))
def test_frames_that_agree_or_not_keep_their_exact_interval(hits: list[bool]) -> None:
    marks = np.array([(int(hit), 1) for hit in hits], np.int64)
    found = pooled(marks)
    assert (found.low, found.high) == clopper_pearson(sum(hits), len(hits))


def words(nothing: NDArray[np.float64], there: NDArray[np.bool_]) -> Words:
    """An exit that says `nothing` with this confidence, or nothing that can stand."""
    confidence = np.where(nothing >= 0.5, nothing, -np.inf)
    agrees = np.where(nothing >= 0.5, ~there, there)
    shape = (1, len(there))
    return Words(confidence.reshape(shape), agrees.reshape(shape), np.ones(shape, np.bool_), there)


def test_the_promise_of_nothing_is_about_the_frames_with_something() -> None:
    generator = np.random.default_rng(0)
    there = np.arange(4000) % 4 == 0
    # Sure of most empty frames, and of one frame in a hundred with something.
    nothing = np.where(there, generator.uniform(0, 0.5, 4000), generator.uniform(0.6, 1, 4000))
    nothing[there] += np.where(generator.random(1000) < 0.01, 0.5, 0.0)
    pilot, tested = words(nothing[:2000], there[:2000]), words(nothing[2000:], there[2000:])
    (threshold,) = choose(pilot, tested, 0.95, [1.0])
    assert threshold is not None
    answered = nothing >= threshold
    assert answered[~there].mean() > 0.8
    assert answered[there].mean() <= 0.05


def test_what_cannot_stand_is_never_let_in() -> None:
    confidence = np.array([0.9, 0.8, -np.inf])
    assert loosest(confidence, np.ones(3, np.bool_), 0.99, owed=100) == 0.8


def test_rows_of_a_detectors_exits_count_what_was_missed(bundle: Bundle) -> None:
    exits = [ExitSpec(cut=1, file="exits/1.onnx", temperature=1.0, threshold=0.9, agreement=0.95), LAST]
    manifest = msgspec.structs.replace(bundle.manifest, exits=tuple(exits))
    wanted = np.array([1, 1, 1, 0, 0, 0])
    seen = Seen(
        cuts=(1, 3),
        answers=np.array([[0, 1, 0, 0, 0, 0], wanted]),
        confidence=np.array([[0.95, -np.inf, 0.6, 0.95, 0.99, 0.8], [1.0] * 6]),
        distance=np.full((2, 6), np.nan),
    )
    first, last = judge_seen(dataclasses.replace(bundle, manifest=manifest), seen, wanted)
    assert (first.answered, first.owed, first.missed, first.spared) == (3, 3, 1, 2)
    assert first.missed_high == pytest.approx(clopper_pearson(1, 3)[1])
    assert (last.answered, last.owed) == (3, None)


def test_a_front_that_looks_where_finds_the_one_cell() -> None:
    generator = np.random.default_rng(3)
    height, width, channels = 6, 8, 4
    features = generator.normal(size=(200, channels, height, width)).astype(np.float32)
    outputs = np.zeros((200, 2, 6), np.float32)
    for frame in range(0, 200, 2):  # something stands there, and channel 2 shows it
        row, column = int(generator.integers(height)), int(generator.integers(width))
        features[frame, 2, row, column] += 8
        outputs[frame, 0] = (column / width, row / height, (column + 1) / width, (row + 1) / height, 0.9, 0)
    assert (covered(outputs, height, width) > 0).sum() == 100
    assert where_front(None, (height, width, channels), features[:8], outputs[:8]) is None
    made = where_front(None, (height, width, channels), features, outputs)
    assert made is not None
    onnx.checker.check_model(made)
    session = ort.InferenceSession(made.SerializeToString())
    wire = np.ascontiguousarray(features.transpose(0, 2, 3, 1))
    (found,) = session.run(None, {session.get_inputs()[0].name: wire})
    assert found.shape == (200, CELLS)
    assert (np.diff(found, axis=1) <= 0).all()
    assert found[::2, 0].min() > found[1::2, 0].max()
