from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime import manifest
from runtime.datatypes import Tensor
from runtime.errors import BundleError, PacketError
from runtime.manifest import Bundle, ExitSpec
from runtime.task import open_task
from runtime.task_detect import NOTHING, SOMETHING, Box, Detect, Detections

LAST = ExitSpec(cut=3, file=None, temperature=1.0, threshold=0.0, agreement=1.0)
EARLY = ExitSpec(cut=1, file="exits/1.onnx", temperature=2.0, threshold=0.9, agreement=0.99)
PERSON = (0.25, 0.5, 0.5, 1.0, 0.75, 0.0)


def as_detector(bundle: Bundle, boxes: int = 4, **settings: Any) -> Bundle:
    cuts = (*bundle.manifest.cuts[:-1], msgspec.structs.replace(bundle.manifest.cuts[-1], shape=(boxes, 6)))
    made = msgspec.structs.replace(bundle.manifest, task="detect", cuts=cuts, settings=settings)
    return dataclasses.replace(bundle, manifest=made, labels=("person", "dog"))


@pytest.fixture
def bundle(shared_bundle: Path) -> Bundle:
    return as_detector(manifest.load(shared_bundle))


def rows(*boxes: tuple[float, ...]) -> Tensor:
    return np.array([*boxes, *[(0.0,) * 6] * (4 - len(boxes))], np.float32)


def test_boxes_from_the_least_score_on_are_the_answer(bundle: Bundle) -> None:
    output = open_task(bundle).read(rows(PERSON, (0, 0, 0.5, 0.5, 0.25, 1)), LAST)
    assert output.answer == Detections(boxes=(Box(0, 0.75, 0.25, 0.5, 0.5, 1.0),), presence=0.75)
    assert (output.exit, output.confidence, output.partial) == (3, 0.75, False)
    loose = open_task(as_detector(bundle, score_threshold=0.2)).read(rows(PERSON, (0, 0, 0.5, 0.5, 0.25, 1)), LAST)
    assert isinstance(loose.answer, Detections)
    assert [box.label_index for box in loose.answer.boxes or ()] == [0, 1]


def test_nothing_is_as_sure_as_the_best_candidate_is_poor(bundle: Bundle) -> None:
    output = open_task(bundle).read(rows((0, 0, 0.5, 0.5, 0.25, 1)), LAST)
    assert output.answer == Detections(boxes=(), presence=0.25)
    assert output.confidence == 0.75


def test_an_early_exit_says_nothing_or_something_and_only_nothing_may_stand(bundle: Bundle) -> None:
    task = open_task(bundle)
    empty = task.read(np.array([4.0, -4.0], np.float32), EARLY)
    assert (empty.answer, empty.partial) == (Detections(boxes=(), presence=1 - empty.confidence), False)
    assert empty.confidence == pytest.approx(1 / (1 + np.exp(-4.0)))
    full = task.read(np.array([-4.0, 4.0], np.float32), EARLY)
    assert isinstance(full.answer, Detections)
    assert (full.answer.boxes, full.partial) == (None, True)
    assert (task.key(empty.answer), task.key(full.answer)) == (NOTHING, SOMETHING)
    assert (task.words(empty.answer), task.words(full.answer)) == ("nothing", "something")


finite = st.floats(width=32, allow_nan=False, allow_infinity=False)


@given(finite, finite)
def test_no_logits_are_too_large(shared_bundle: Path, nothing: float, something: float) -> None:
    task = open_task(as_detector(manifest.load(shared_bundle)))
    output = task.read(np.array([nothing, something], np.float32), EARLY)
    assert 0.5 <= output.confidence <= 1
    assert output.partial == (task.key(output.answer) == SOMETHING)


def test_words_count_by_label(bundle: Bundle) -> None:
    task = open_task(bundle)
    dog, person = Box(1, 0.9, 0, 0, 1, 1), Box(0, 0.8, 0, 0, 1, 1)
    assert task.words(Detections(boxes=(person,), presence=0.8)) == "person"
    assert task.words(Detections(boxes=(dog, person, person), presence=0.9)) == "1 dog, 2 person"
    assert task.words(Detections(boxes=(), presence=0.1)) == "nothing"


def test_boxes_are_told_in_pixels_of_the_frame_and_end_at_its_border(bundle: Bundle) -> None:
    # The tiny bundle crops the centre, so of 640x480 pixels it sees the columns from 80 on.
    seen = Detections(boxes=(Box(0, 0.75, -0.25, 0.5, 0.5, 1.0),), presence=0.75)
    assert open_task(bundle).told(seen, 480, 640) == {
        "boxes": [{"label": "person", "score": 0.75, "box": [0, 240.0, 320.0, 480.0]}],
        "presence": 0.75,
        "size": [640, 480],
    }
    assert open_task(bundle).told(Detections(boxes=None, presence=0.75), 480, 640)["boxes"] is None


def test_answers_are_compared_box_by_box(bundle: Bundle) -> None:
    task = open_task(bundle)
    one, far = Box(0, 0.9, 0, 0, 0.5, 0.5), Box(0, 0.9, 0.5, 0.5, 1, 1)
    both, first = Detections(boxes=(one, far), presence=0.9), Detections(boxes=(one,), presence=0.9)
    empty, unknown = Detections(boxes=(), presence=0.1), Detections(boxes=None, presence=0.9)
    assert task.compare(both, both) == (4, 4)
    assert task.compare(first, both) == (2, 3)
    assert task.compare(empty, empty) == (1, 1)
    assert task.compare(unknown, first) == (0, 1)


scores, sides = st.floats(0, 1), st.floats(-1, 2)
boxes = st.builds(Box, st.integers(0, 1), scores, sides, sides, sides, sides)
answers = st.builds(Detections, boxes=st.none() | st.lists(boxes, max_size=5).map(tuple), presence=scores)


@given(answers)
def test_an_answer_comes_back_from_the_wire_to_the_last_bit(shared_bundle: Path, answer: Detections) -> None:
    task = open_task(as_detector(manifest.load(shared_bundle)))
    assert task.decode(msgspec.Raw(msgspec.json.encode(answer))) == answer


@pytest.mark.parametrize(
    "answer",
    [
        {"topk": [[0, 1.0]]},
        {"boxes": [[0, 1.5, 0, 0, 1, 1]], "presence": 1},
        {"boxes": [[0, 0.5, 0, 0, 1]], "presence": 1},
        {"boxes": [[0, 0.5, 0, 0, 1, 1e9]], "presence": 1},
        {"boxes": [[2, 0.5, 0, 0, 1, 1]], "presence": 1},
        {"boxes": [[0, 0.5, 0, 0, 1, 1]] * 1025, "presence": 1},
        {"boxes": []},
    ],
    ids=lambda answer: json.dumps(answer)[:40],
)
def test_what_is_no_answer_of_this_bundle_is_refused(bundle: Bundle, answer: object) -> None:
    with pytest.raises(PacketError, match="the reply"):
        open_task(bundle).decode(msgspec.Raw(json.dumps(answer).encode()))


def test_numbers_without_sense_are_told(bundle: Bundle) -> None:
    with pytest.raises(BundleError, match="a value that is no number"):
        open_task(bundle).read(rows((np.nan, 0, 1, 1, 0.9, 0)), LAST)
    with pytest.raises(BundleError, match="a class beyond the 2 labels"):
        open_task(bundle).read(rows((0, 0, 1, 1, 0.9, 7)), LAST)


def test_a_bundle_that_is_no_detector_is_refused(shared_bundle: Path, bundle: Bundle) -> None:
    with pytest.raises(BundleError, match=r"last cut has shape \(boxes, 6\)"):
        Detect(manifest.load(shared_bundle))
    with pytest.raises(BundleError, match="settings do not fit the task detect"):
        Detect(as_detector(bundle, score_threshold=2))
    with pytest.raises(BundleError, match="settings do not fit the task detect"):
        Detect(as_detector(bundle, scores=0.5))
