from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from export.exits import calibrate, choose_temperature, choose_threshold, fit_head, head_model, pool
from export.graph import LOGITS
from export.wires import Wire
from runtime.policy import classify


def test_threshold_is_the_least_confidence_that_keeps_the_agreement() -> None:
    confidence = np.array([0.9, 0.8, 0.7, 0.6, 0.5])
    agrees = np.array([True, True, False, True, False])
    assert choose_threshold(confidence, agrees, 0.95) == 0.8
    assert choose_threshold(confidence, agrees, 0.75) == 0.6
    assert choose_threshold(confidence, agrees, 0.1) == 0.5


def test_no_threshold_when_even_the_surest_answer_is_wrong() -> None:
    assert choose_threshold(np.array([0.9, 0.8]), np.array([False, False]), 0.5) is None


def test_frames_of_equal_confidence_answer_together() -> None:
    assert choose_threshold(np.array([0.9, 0.9]), np.array([True, False]), 0.9) is None


@given(st.lists(st.tuples(st.sampled_from([0.1, 0.3, 0.5, 0.9]), st.booleans()), min_size=1), st.floats(0.05, 1))
def test_a_chosen_threshold_keeps_its_promise(said: list[tuple[float, bool]], wanted: float) -> None:
    confidence = np.array([value for value, _ in said])
    agrees = np.array([value for _, value in said])
    threshold = choose_threshold(confidence, agrees, wanted)
    kept = [level for level in sorted(set(confidence)) if agrees[confidence >= level].mean() >= wanted * (1 - 1e-12)]
    assert threshold == (kept[0] if kept else None)


def test_temperature_undoes_a_scale() -> None:
    generator = np.random.default_rng(0)
    logits = generator.normal(0, 2, (4000, 5)).astype(np.float32)
    # The greatest of logits with Gumbel noise is a draw from their softmax.
    answers = (logits + generator.gumbel(size=logits.shape)).argmax(axis=1)
    assert choose_temperature(logits, answers) == pytest.approx(1, rel=0.1)
    assert choose_temperature(logits * 3, answers) == pytest.approx(3, rel=0.1)


def test_a_head_finds_a_linear_answer_and_ignores_dead_channels() -> None:
    generator = np.random.default_rng(0)
    pooled = np.hstack([generator.normal(3, 1, (60, 4)), np.zeros((60, 1))]).astype(np.float32)
    logits = (pooled @ generator.normal(0, 1, (5, 3)) + 2).astype(np.float32)
    head = fit_head(pooled, logits, np.arange(60))
    made = pooled @ head.weight + head.bias
    assert np.allclose(made - made.mean(axis=1, keepdims=True), logits - logits.mean(axis=1, keepdims=True), atol=0.02)
    assert np.all(head.weight[4] == 0)


def test_noise_is_shrunk_away() -> None:
    generator = np.random.default_rng(0)
    pooled = generator.normal(0, 1, (30, 25)).astype(np.float32)
    logits = generator.normal(0, 1, (30, 3)).astype(np.float32)
    assert np.abs(fit_head(pooled, logits, np.arange(30)).weight).max() < 0.1


@pytest.mark.parametrize("shape", [(5, 6, 4), (9, 4), (4,)])
def test_a_head_in_onnx_is_the_head_that_was_fitted(shape: tuple[int, ...]) -> None:
    import onnxruntime as ort

    generator = np.random.default_rng(0)
    axis = len(shape)
    wire = Wire(
        "q", generator.uniform(0.1, 1, 4).astype(np.float32), generator.integers(0, 9, 4).astype(np.uint8), axis
    )
    features = generator.integers(0, 256, (2, *shape)).astype(np.uint8)
    logits = generator.normal(0, 1, (40, 3)).astype(np.float32)
    head = fit_head(generator.normal(0, 1, (40, 4)).astype(np.float32), logits, np.arange(40))
    session = ort.InferenceSession(head_model(head, wire, shape, "h").SerializeToString())
    (said,) = session.run([LOGITS], {"features": features})
    assert said.shape == (2, 3)
    assert np.allclose(said, pool(features, wire) @ head.weight + head.bias, atol=1e-3)


def test_the_threshold_is_a_confidence_of_the_runtime() -> None:
    generator = np.random.default_rng(0)
    logits = generator.normal(0, 3, (50, 4)).astype(np.float32)
    spec = calibrate(1, "x", logits, logits.argmax(axis=1), 1.0)
    assert spec.threshold == min(classify(row, spec).confidence for row in logits)
