from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime import manifest
from runtime.datatypes import ExitOutput, Logits
from runtime.errors import ConfigError
from runtime.manifest import ExitSpec, OperatingPoint
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


def exit_spec(*points: tuple[float, float | None], limit: float | None = None) -> ExitSpec:
    table = tuple(OperatingPoint(agreement=agreement, threshold=threshold) for agreement, threshold in points)
    return ExitSpec(
        cut=1,
        file="exits/1.onnx",
        temperature=1.0,
        threshold=points[0][1],
        agreement=points[0][0],
        points=table,
        distance_limit=limit,
    )


def with_first_exit(path: Path, spec: ExitSpec) -> manifest.Bundle:
    bundle = manifest.load(path)
    last = bundle.manifest.exits[-1]
    return dataclasses.replace(bundle, manifest=msgspec.structs.replace(bundle.manifest, exits=(spec, last)))


def test_an_agreement_chooses_its_row_of_the_table(shared_bundle: Path) -> None:
    bundle = with_first_exit(shared_bundle, exit_spec((0.9, 0.5), (0.98, 0.8), (0.99, None)))
    assert ExitPolicy.of(bundle).thresholds == {1: 0.5, 3: 0.0}
    assert ExitPolicy.of(bundle, agreement=0.98).thresholds == {1: 0.8, 3: 0.0}
    assert ExitPolicy.of(bundle, agreement=0.98).agreements == {1: 0.98}
    assert ExitPolicy.of(bundle, agreement=0.99).thresholds == {3: 0.0}


def test_an_agreement_that_is_not_in_the_table_is_refused_with_those_that_are(shared_bundle: Path) -> None:
    bundle = with_first_exit(shared_bundle, exit_spec((0.9, 0.5), (0.98, 0.8)))
    with pytest.raises(ConfigError, match=r"no thresholds for 0\.97; choose one of 0\.9, 0\.98, or export with --agre"):
        ExitPolicy.of(bundle, agreement=0.97)
    with pytest.raises(ConfigError, match=r"choose one of 0\.9, or"):  # a manifest of format 1 has no table
        ExitPolicy.of(manifest.load(shared_bundle), agreement=0.97, early=False)


@given(st.floats(0, 1), st.floats(0, 1), st.floats(0, 10) | st.just(math.nan), st.floats(0, 10))
def test_beyond_its_limit_an_exit_is_never_asked_to_answer_however_sure(
    threshold: float, confidence: float, distance: float, limit: float
) -> None:
    policy = ExitPolicy({1: threshold}, {1: limit})
    output = ExitOutput(1, 0, confidence, ((0, confidence),), distance)
    sure, within = confidence >= threshold, distance <= limit
    assert policy.answers(output) == (sure and within)
    assert policy.withholds(output) == (sure and not within)


def test_an_exit_whose_guard_said_nothing_does_not_answer() -> None:
    policy = ExitPolicy({1: 0.5}, {1: 2.0})
    assert not policy.answers(said(1, 0.9))
    assert policy.withholds(said(1, 0.9))
