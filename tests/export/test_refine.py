"""Refinement: it wins where the fit was told the wrong metric, and what does not win is not kept."""

from __future__ import annotations

import numpy as np
import onnxruntime as ort
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import helper, numpy_helper

from export.graph import OPSET, finish, tensor_info
from export.refine import bits_ratio, refine
from export.sensitivity import Tail, by_gradients
from export.transform import Array, Layout, Transform, fit, layout_of

CHANNELS, SIDE, FRAMES = 6, 6, 60
HELD = np.arange(FRAMES) >= 40


def tail() -> Tail:
    """The mean over a map, then a linear layer that reads channels 0 and 1 only."""
    weight = np.zeros((CHANNELS, 5), np.float32)
    weight[:2] = np.random.default_rng(0).normal(size=(2, 5))
    graph = helper.make_graph(
        [
            helper.make_node("GlobalAveragePool", ["x"], ["pooled"]),
            helper.make_node("Flatten", ["pooled"], ["flat"]),
            helper.make_node("Gemm", ["flat", "weight"], ["y"], alpha=4.0),
        ],
        "tail",
        [tensor_info("x", "float32", (CHANNELS, SIDE, SIDE))],
        [tensor_info("y", "float32", (5,))],
        [numpy_helper.from_array(weight, "weight")],
    )
    model = finish(helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)]))
    return Tail(model, 10_000, 8, maps=True)


@pytest.fixture(scope="module")
def case() -> tuple[Tail, Array, np.ndarray, Layout]:
    layout, behind = layout_of((SIDE, SIDE, CHANNELS)), tail()
    generator = np.random.default_rng(1)
    common = generator.normal(size=(FRAMES, 1, CHANNELS))
    features: Array = (common + generator.normal(size=(FRAMES, SIDE * SIDE, CHANNELS)) / 2).astype(np.float32)
    session = ort.InferenceSession(behind.model.SerializeToString())
    return behind, features, session.run(None, {"x": behind.given(features, layout)})[0], layout


def refined(case: tuple[Tail, Array, np.ndarray, Layout], transform: Transform, step: float) -> tuple[bool, float]:
    behind, features, logits, _ = case
    made = refine(transform, behind, features, logits, HELD, step=step, minutes=1, seed=0, most_rounds=400)
    assert made.rounds == 400
    return made.transform is transform, made.bits_ratio


def test_a_wrong_metric_is_put_right(case: tuple[Tail, Array, np.ndarray, Layout]) -> None:
    _, features, _, layout = case
    blind = np.repeat(np.eye(CHANNELS, dtype=np.float32)[np.newaxis], len(layout.band_sizes), 0)
    given, ratio = refined(case, fit(features, blind, layout), 0.3)
    assert not given
    assert ratio < 0.97


def test_what_does_not_win_is_not_kept(case: tuple[Tail, Array, np.ndarray, Layout]) -> None:
    behind, features, _, layout = case
    given, ratio = refined(case, fit(features, by_gradients(behind, features, layout, 0), layout), 0.3)
    assert given == (ratio >= 0.99)


def test_it_ends_in_time(case: tuple[Tail, Array, np.ndarray, Layout]) -> None:
    behind, features, logits, layout = case
    blind = np.repeat(np.eye(CHANNELS, dtype=np.float32)[np.newaxis], len(layout.band_sizes), 0)
    transform = fit(features, blind, layout)
    assert refine(transform, behind, features, logits, HELD, step=0.3, minutes=1e-6, seed=0).rounds == 1


@given(st.floats(0.2, 5), st.floats(-3, -0.2))
def test_the_ratio_of_curves_is_that_of_their_bits(factor: float, slope: float) -> None:
    bits = np.array([100.0, 200.0, 400.0])
    curve = np.stack([bits, bits**slope], axis=1)
    other = np.stack([bits * factor, bits**slope], axis=1)
    assert np.isclose(bits_ratio(curve, other), factor, rtol=1e-6)
