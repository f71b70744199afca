from __future__ import annotations

import numpy as np
import onnxruntime as ort
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from export.exits import POOLINGS, Pooling, guarded, head_macs, head_model, pooled_front
from export.exits_fit import choose_temperature, fit_head
from export.exits_guard import Guard, damages, distance_limit, fit_guard
from export.wires import Wire
from runtime.datatypes import Tensor


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


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 1000), st.integers(2, 6))
def test_what_a_frame_is_told_with_its_group_left_out_is_what_a_fit_without_it_tells(seed: int, size: int) -> None:
    generator = np.random.default_rng(seed)
    pooled = generator.normal(0, 1, (60, 4)).astype(np.float32)
    # Of equal mean and spread without any group, so that scaling is the same with and without it.
    pooled = np.concatenate([pooled, -pooled])
    groups = np.tile(np.arange(60) // size, 2)
    logits = (pooled @ generator.normal(0, 1, (4, 3)) + generator.normal(0, 0.5, (120, 3))).astype(np.float32)
    head = fit_head(pooled, logits, groups)
    rows = groups == 0
    features = (pooled / pooled.std(axis=0)).astype(np.float64)
    target = logits - logits.mean(axis=1, keepdims=True)
    strength = head.penalty * len(features)
    design = np.hstack([features[~rows], np.ones((int((~rows).sum()), 1))])
    ridge = np.diag([strength] * 4 + [0.0])
    weight = np.linalg.solve(design.T @ design + ridge, design.T @ target[~rows])
    expected = np.hstack([features[rows], np.ones((int(rows.sum()), 1))]) @ weight
    assert np.allclose(head.held_out[rows], expected, atol=1e-3)


SHAPES: list[tuple[int, ...]] = [(5, 6, 4), (9, 4), (4,)]


def wire(axis: int) -> Wire:
    generator = np.random.default_rng(1)
    scale = generator.uniform(0.1, 1, 4).astype(np.float32)
    return Wire("q", scale, generator.integers(0, 9, 4).astype(np.uint8), axis)


def pooled_by_hand(features: Tensor, at: Wire | None, pooling: Pooling) -> Tensor:
    values = features.astype(np.float32)
    if at is not None:
        values = (values - at.zero_point) * at.scale
    axes = tuple(range(1, values.ndim - 1))
    if not axes:
        return values
    rows = [values.mean(axis=axes)]
    if pooling != "mean":
        rows.append(values.std(axis=axes))
    if pooling == "grid" and values.ndim == 4:
        halves = [(slice(0, side // 2), slice(side - side // 2, side)) for side in values.shape[1:3]]
        rows += [values[:, top, left].mean(axis=axes) for top in halves[0] for left in halves[1]]
    elif pooling == "grid":
        rows.append(values[:, 0])
    return np.concatenate(rows, axis=1)


@pytest.mark.parametrize("pooling", list(POOLINGS))
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("quantized", [True, False])
def test_a_head_in_onnx_is_the_head_and_the_guard_that_were_fitted(
    shape: tuple[int, ...], pooling: Pooling, quantized: bool
) -> None:
    generator = np.random.default_rng(0)
    at = wire(len(shape)) if quantized else None
    features = generator.integers(0, 256, (40, *shape)).astype(np.uint8 if quantized else np.float32)
    logits = generator.normal(0, 1, (40, 3)).astype(np.float32)
    rows = pooled_by_hand(features, at, pooling).astype(np.float32)
    statistics = pooled_by_hand(features, at, "moments").astype(np.float32)
    logged = 4 if len(shape) > 1 else 0
    damaged = [(statistics + np.float32(1), np.arange(40)), (statistics * np.float32(2), np.arange(40))]
    head, (guard, _) = (
        fit_head(rows, logits, np.arange(40)),
        fit_guard(statistics, np.arange(40), damaged, logged=logged),
    )
    model = guarded(head_model(pooled_front(at, shape, pooling), head, "h"), guard, at, shape)
    session = ort.InferenceSession(model.SerializeToString())
    assert [output.name for output in session.get_outputs()] == ["logits", "distance"]
    for batch in (features[:1], features[:7]):
        said, distance = session.run(None, {"features": batch})
        assert said.shape == (len(batch), 3)
        assert distance.shape == (len(batch),)
        assert np.allclose(said, (rows @ head.weight + head.bias)[: len(batch)], atol=2e-3)
        assert np.allclose(distance, guard.distance(statistics)[: len(batch)], rtol=1e-3)
    assert head_macs(model) >= rows.shape[1] * 3


def test_the_guard_holds_back_the_stated_share_of_frames_like_the_fitted_ones_and_finds_others() -> None:
    generator = np.random.default_rng(0)
    mixing = generator.normal(0, 1, (6, 40))

    def draw(count: int) -> Tensor:
        return (generator.normal(0, 1, (count, 6)) @ mixing + generator.normal(0, 0.3, (count, 40))).astype(np.float32)

    shares = []
    for _ in range(20):
        known = draw(200)
        guard, distances = fit(known)
        limit = distance_limit(distances)
        shares.append(float((guard.distance(draw(500)) > limit).mean()))
    assert 0.03 < np.mean(shares) < 0.07
    assert (guard.distance(draw(100) + generator.normal(0, 1, (100, 40)).astype(np.float32)) > limit).mean() > 0.95
    assert (guard.distance(4 * draw(100)) > limit).mean() > 0.9


def test_a_filter_finds_a_known_damage_that_moves_every_statistic_a_little() -> None:
    generator = np.random.default_rng(0)
    known = generator.normal(0, 1, (400, 60)).astype(np.float32)
    little = (0.4 * generator.choice([-1, 1], 60)).astype(np.float32)
    damaged = [(known[:100] + little, np.arange(100))]
    other = generator.normal(0, 1, (400, 60)).astype(np.float32) + little
    shares = []
    for taught in ([], damaged):
        guard, distances = fit_guard(known, np.arange(400), taught, logged=0)
        shares.append(float((guard.distance(other) > distance_limit(distances)).mean()))
    assert shares[0] < 0.4
    assert shares[1] > 0.7


def test_damages_are_frames_again_and_the_same_for_the_same_seed() -> None:
    frame = np.random.default_rng(0).integers(0, 256, (1, 20, 30, 3), dtype=np.uint8)
    first, again = (damages(np.random.default_rng(1)) for _ in range(2))
    for name, damage in first.items():
        made = damage(frame)
        assert made.shape == frame.shape
        assert made.dtype == np.uint8
        assert not np.array_equal(made, frame)
        assert np.array_equal(made, again[name](frame))


def fit(known: Tensor) -> tuple[Guard, np.ndarray]:
    return fit_guard(known, np.arange(len(known)), [], logged=0)


def test_a_channel_that_never_stirred_makes_no_frame_infinitely_far() -> None:
    generator = np.random.default_rng(0)
    known = np.hstack([generator.normal(0, 1, (50, 5)), np.zeros((50, 2))]).astype(np.float32)
    distance = fit(known)[0].distance(known + np.float32(1e-3))
    assert np.isfinite(distance).all()
    assert distance.max() < 10
