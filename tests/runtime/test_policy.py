from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime import manifest
from runtime.datatypes import ExitOutput
from runtime.errors import ConfigError
from runtime.manifest import ExitSpec, OperatingPoint
from runtime.policy import ExitPolicy
from runtime.task_classify import Classification

ANSWER = Classification(topk=((0, 1.0),))


def said(cut: int, confidence: float) -> ExitOutput:
    return ExitOutput(cut, confidence, ANSWER)


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
    output = ExitOutput(1, confidence, ANSWER, distance)
    sure, within = confidence >= threshold, distance <= limit
    assert policy.answers(output) == (sure and within)
    assert policy.withholds(output) == (sure and not within)


def test_an_exit_whose_guard_said_nothing_does_not_answer() -> None:
    policy = ExitPolicy({1: 0.5}, {1: 2.0})
    assert not policy.answers(said(1, 0.9))
    assert policy.withholds(said(1, 0.9))


def test_an_answer_that_says_less_than_was_asked_for_never_stands_however_sure() -> None:
    partial = dataclasses.replace(said(1, 1.0), partial=True)
    assert not ExitPolicy({1: 0.5}).answers(partial)
    assert not ExitPolicy({1: 0.5}, {1: 0.0}).withholds(partial)
