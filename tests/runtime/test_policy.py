from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime import manifest
from runtime.datatypes import ExitOutput, Logits
from runtime.manifest import ExitSpec
from runtime.policy import TOP, ExitPolicy, classify


def spec(temperature: float = 1.0) -> ExitSpec:
    return ExitSpec(cut=2, file="exit.onnx", temperature=temperature, threshold=0.5, agreement=0.9)


some_logits = st.lists(st.floats(-50, 50, width=32) | st.sampled_from([0.0, 1.0]), min_size=1, max_size=50).map(
    lambda values: np.array(values, np.float32)
)
temperatures = st.floats(0.05, 50)


@given(some_logits, temperatures)
def test_scores_are_probabilities_in_order(logits: Logits, temperature: float) -> None:
    said = classify(logits, spec(temperature))
    indices, scores = zip(*said.topk, strict=True)
    assert len(said.topk) == min(TOP, len(logits)) == len(set(indices))
    assert all(0 <= score <= 1 for score in scores)
    assert list(scores) == sorted(scores, reverse=True)
    assert sum(scores) <= 1 + 1e-5
    assert said.topk[0] == (said.label_index, said.confidence)
    assert said.confidence >= 1 / len(logits) - 1e-6
    assert said.exit == 2


@given(some_logits, temperatures)
def test_the_temperature_does_not_change_the_order_and_ties_go_to_the_lower_index(
    logits: Logits, temperature: float
) -> None:
    said = classify(logits, spec(temperature))
    assert said.label_index == int(logits.argmax())
    expected = sorted(range(len(logits)), key=lambda index: (-logits[index], index))[:TOP]
    assert [index for index, _ in said.topk] == expected


@pytest.mark.parametrize("classes", [1, 2, 6, 1000])
def test_when_all_logits_are_equal_the_first_labels_win(classes: int) -> None:
    said = classify(np.zeros(classes, np.float32), spec())
    assert [index for index, _ in said.topk] == list(range(min(TOP, classes)))
    assert said.confidence == pytest.approx(1 / classes)


def test_logits_that_differ_by_a_hair_are_told_apart_though_their_scores_are_equal() -> None:
    said = classify(np.array([0.01, np.nextafter(np.float32(0.01), np.float32(1))], np.float32), spec(50.0))
    assert said.label_index == 1
    assert said.topk[0][1] == said.topk[1][1]


def test_a_temperature_of_two_halves_the_logits() -> None:
    logits = np.array([1.0, 3.0, 2.0], np.float32)
    expected = np.exp(logits / 2) / np.exp(logits / 2).sum()
    assert classify(logits, spec(2.0)).confidence == pytest.approx(float(expected[1]))


def test_huge_logits_do_not_overflow() -> None:
    assert classify(np.array([-1e30, 1e30, 0], np.float32), spec()).confidence == 1.0


def said(cut: int, confidence: float) -> ExitOutput:
    return ExitOutput(cut, 0, confidence, ((0, confidence),))


@pytest.mark.parametrize(
    ("cut", "confidence", "answers"),
    [(1, 0.6, True), (1, 0.59, False), (2, 0.1, False), (2, 1.0, False), (3, 0.0, True)],
)
def test_an_exit_answers_from_its_threshold_on_and_never_when_not_listed(
    cut: int, confidence: float, answers: bool
) -> None:
    assert ExitPolicy({1: 0.6, 3: 0.0}).answers(said(cut, confidence)) is answers


def test_the_bundles_thresholds_are_in_force(shared_bundle: Path) -> None:
    assert ExitPolicy.of(manifest.load(shared_bundle)).thresholds == {1: 0.6, 2: 0.6, 3: 0.0}


def test_without_early_exits_only_the_models_own_answers(shared_bundle: Path) -> None:
    assert ExitPolicy.of(manifest.load(shared_bundle), early=False).thresholds == {3: 0.0}
