"""The transform: orthogonal in its metric, invertible, and the same in the graphs as in numpy."""

from __future__ import annotations

import numpy as np
import onnxruntime as ort
import pytest
from hypothesis import given
from hypothesis import strategies as st

from export.transform import Array, Transform, cosines, fit, layout_of, place, settle, spectrum
from export.transform_model import COEFFICIENTS, FEATURES, decoder, encoder
from export.wires import Wire

SHAPES = [(6, 6, 5), (4, 7, 3), (17, 4), (18, 4), (11, 4), (8,)]


def features(shape: tuple[int, ...], frames: int = 30) -> Array:
    generator = np.random.default_rng(1)
    layout = layout_of(shape)
    mixed = generator.normal(size=(layout.channels, layout.channels))
    smooth = np.cumsum(generator.normal(size=(frames, layout.positions, layout.channels)), axis=1) @ mixed
    return smooth.astype(np.float32)


def fitted(shape: tuple[int, ...]) -> tuple[Transform, Array]:
    layout, values = layout_of(shape), features(shape)
    generator = np.random.default_rng(2)
    roots = generator.normal(size=(len(layout.band_sizes), layout.channels, layout.channels))
    return fit(values, (roots @ roots.transpose(0, 2, 1)).astype(np.float32), layout), values


@pytest.mark.parametrize(
    ("shape", "extra", "rows", "columns"),
    [
        ((14, 14, 80), 0, 14, 14),
        ((197, 192), 1, 14, 14),
        ((198, 192), 2, 14, 14),
        ((196, 96), 0, 14, 14),
        ((50, 8), 1, 7, 7),
        ((60, 8), 0, 1, 60),
        ((640,), 0, 1, 1),
    ],
)
def test_layout(shape: tuple[int, ...], extra: int, rows: int, columns: int) -> None:
    layout = layout_of(shape)
    assert (layout.extra, layout.rows, layout.columns, layout.channels) == (extra, rows, columns, shape[-1])
    assert layout.bands.size == layout.positions == sum(layout.band_sizes)
    assert min(layout.band_sizes) > 0


@given(st.integers(1, 40))
def test_cosines_are_orthonormal(count: int) -> None:
    matrix = cosines(count)
    assert np.allclose(matrix @ matrix.T, np.eye(count), atol=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
def test_spectrum_keeps_lengths_and_comes_back(shape: tuple[int, ...]) -> None:
    layout, values = layout_of(shape), features(shape)
    turned = spectrum(values, layout)
    assert np.allclose(place(turned, layout), values, atol=1e-3)
    assert np.allclose((turned**2).sum(), (values.astype(np.float64) ** 2).sum(), rtol=1e-4)


@pytest.mark.parametrize("shape", SHAPES)
def test_an_error_of_one_step_costs_the_same_everywhere(shape: tuple[int, ...]) -> None:
    """backward turns a unit of any coefficient into features of the same length in the metric that was given."""
    layout, values = layout_of(shape), features(shape)
    bands = len(layout.band_sizes)
    metric = np.diag(np.arange(1, layout.channels + 1).astype(np.float32))
    transform = fit(values, np.repeat(metric[np.newaxis], bands, 0), layout)
    for backward in transform.backward:
        assert np.allclose(backward @ metric @ backward.T, np.eye(layout.channels), atol=1e-2)


@pytest.mark.parametrize("shape", SHAPES)
def test_coefficients_fall_and_are_centred(shape: tuple[int, ...]) -> None:
    transform, values = fitted(shape)
    coefficients = transform.analyse(values)
    spread = np.abs(coefficients).mean(axis=0)
    assert (np.diff(spread) <= 1e-3 * spread[0]).all()
    assert np.abs(coefficients.mean(axis=0)).max() < 1e-2 * spread[0]


@pytest.mark.parametrize("shape", SHAPES)
def test_graphs_compute_the_transform_and_its_inverse(shape: tuple[int, ...]) -> None:
    transform, values = fitted(shape)
    frame = values[:1].reshape(1, *shape)
    forth = ort.InferenceSession(encoder(transform, None, shape).SerializeToString())
    back = ort.InferenceSession(decoder(transform, None, shape).SerializeToString())
    (coefficients,) = forth.run([COEFFICIENTS], {FEATURES: frame})
    expected = transform.analyse(values[:1])
    assert np.allclose(coefficients, expected, atol=3e-3 * np.abs(expected).max())  # matrices are kept in 16 bits
    (again,) = back.run([FEATURES], {COEFFICIENTS: coefficients})
    assert again.shape == frame.shape
    assert np.allclose(again, frame, atol=1e-2 * np.abs(frame).max())


@pytest.mark.parametrize("shape", SHAPES)
def test_nothing_stands_for_the_mean_frame_whatever_the_matrices(shape: tuple[int, ...]) -> None:
    """Refined matrices are no inverses of one another; the mean must not pass through them."""
    transform, values = fitted(shape)
    layout = transform.layout
    moved = settle(layout, transform.forward, 0.5 * transform.backward, spectrum(values, layout))
    nothing = np.zeros((1, layout.positions * layout.channels), np.float32)
    mean = values.mean(axis=0)
    assert np.allclose(moved.synthesize(nothing)[0], mean, atol=1e-3 * np.abs(mean).max())
    back = ort.InferenceSession(decoder(moved, None, shape).SerializeToString())
    (frame,) = back.run([FEATURES], {COEFFICIENTS: nothing})
    assert np.allclose(frame.reshape(mean.shape), mean, atol=1e-3 * np.abs(mean).max())


@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("shape", [(6, 6, 5), (17, 4), (8,)])
def test_graphs_read_and_write_the_wire(shape: tuple[int, ...], *, per_channel: bool) -> None:
    transform, _ = fitted(shape)
    size = (shape[-1],) if per_channel else ()
    wire = Wire("t", np.full(size, 0.05, np.float32), np.full(size, 100, np.uint8), 1)
    frame = np.random.default_rng(3).integers(0, 256, (1, *shape)).astype(np.uint8)
    forth = ort.InferenceSession(encoder(transform, wire, shape).SerializeToString())
    back = ort.InferenceSession(decoder(transform, wire, shape).SerializeToString())
    (again,) = back.run(None, {COEFFICIENTS: forth.run(None, {FEATURES: frame})[0]})
    assert again.dtype == np.uint8
    assert np.abs(again.astype(int) - frame).max() <= 1
