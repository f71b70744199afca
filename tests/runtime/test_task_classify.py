from __future__ import annotations

import json
from pathlib import Path

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime import manifest
from runtime.datatypes import Logits
from runtime.errors import BundleError, PacketError
from runtime.manifest import ExitSpec
from runtime.task import open_task
from runtime.task_classify import TOP, Classification, classify


def read(logits: Logits, spec: ExitSpec) -> tuple[Classification, float]:
    output = classify(logits, spec)
    assert output.exit == spec.cut
    assert isinstance(output.answer, Classification)
    return output.answer, output.confidence


def spec(temperature: float = 1.0) -> ExitSpec:
    return ExitSpec(cut=2, file="exit.onnx", temperature=temperature, threshold=0.5, agreement=0.9)


some_logits = st.lists(st.floats(-50, 50, width=32) | st.sampled_from([0.0, 1.0]), min_size=1, max_size=50).map(
    lambda values: np.array(values, np.float32)
)
temperatures = st.floats(0.05, 50)


@given(some_logits, temperatures)
def test_scores_are_probabilities_in_order(logits: Logits, temperature: float) -> None:
    said, confidence = read(logits, spec(temperature))
    indices, scores = zip(*said.topk, strict=True)
    assert len(said.topk) == min(TOP, len(logits)) == len(set(indices))
    assert all(0 <= score <= 1 for score in scores)
    assert list(scores) == sorted(scores, reverse=True)
    assert sum(scores) <= 1 + 1e-5
    assert said.topk[0] == (said.label_index, confidence)
    assert confidence >= 1 / len(logits) - 1e-6


@given(some_logits, temperatures)
def test_the_temperature_does_not_change_the_order_and_ties_go_to_the_lower_index(
    logits: Logits, temperature: float
) -> None:
    said, _ = read(logits, spec(temperature))
    assert said.label_index == int(logits.argmax())
    expected = sorted(range(len(logits)), key=lambda index: (-logits[index], index))[:TOP]
    assert [index for index, _ in said.topk] == expected


@pytest.mark.parametrize("classes", [1, 2, 6, 1000])
def test_when_all_logits_are_equal_the_first_labels_win(classes: int) -> None:
    said, confidence = read(np.zeros(classes, np.float32), spec())
    assert [index for index, _ in said.topk] == list(range(min(TOP, classes)))
    assert confidence == pytest.approx(1 / classes)


def test_logits_that_differ_by_a_hair_are_told_apart_though_their_scores_are_equal() -> None:
    said, _ = read(np.array([0.01, np.nextafter(np.float32(0.01), np.float32(1))], np.float32), spec(50.0))
    assert said.label_index == 1
    assert said.topk[0][1] == said.topk[1][1]


def test_a_temperature_of_two_halves_the_logits() -> None:
    logits = np.array([1.0, 3.0, 2.0], np.float32)
    expected = np.exp(logits / 2) / np.exp(logits / 2).sum()
    assert read(logits, spec(2.0))[1] == pytest.approx(float(expected[1]))


def test_huge_logits_do_not_overflow() -> None:
    assert read(np.array([-1e30, 1e30, 0], np.float32), spec())[1] == 1.0


def test_logits_that_are_no_numbers_are_told(shared_bundle: Path) -> None:
    with pytest.raises(BundleError, match="gave a logit that is no number"):
        classify(np.array([np.nan, 1], np.float32), spec())


def test_an_answer_is_read_back_and_one_of_another_bundle_is_refused(shared_bundle: Path) -> None:
    task = open_task(manifest.load(shared_bundle))
    answer = Classification(topk=((1, 0.75), (0, 0.25)))
    assert task.decode(msgspec.Raw(msgspec.json.encode(answer))) == answer
    with pytest.raises(PacketError, match="a label that the bundle does not have"):
        task.decode(msgspec.Raw(b'{"topk":[[5,1.0]]}'))


@pytest.mark.parametrize(
    "topk",
    [[], [[0, 0.5]] * 17, [[0, 1.5]], [[0, -0.1]], [[-1, 0.5]], [[0, None]], [[0]], None],
    ids=str,
)
def test_what_is_no_answer_is_refused(shared_bundle: Path, topk: object) -> None:
    task = open_task(manifest.load(shared_bundle))
    with pytest.raises(PacketError, match="the reply is damaged"):
        task.decode(msgspec.Raw(json.dumps({"topk": topk}).encode()))


def test_an_answer_is_told_with_names(shared_bundle: Path) -> None:
    bundle = manifest.load(shared_bundle)
    task, answer = open_task(bundle), Classification(topk=((1, 0.75), (0, 0.25)))
    assert task.words(answer) == bundle.labels[1]
    assert task.told(answer, 480, 640) == {
        "label_index": 1,
        "topk": [[bundle.labels[1], 0.75], [bundle.labels[0], 0.25]],
    }
    assert task.compare(answer, Classification(topk=((1, 0.5),))) == (1, 1)
    assert task.compare(answer, Classification(topk=((0, 0.5),))) == (0, 1)
