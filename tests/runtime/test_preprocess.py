from __future__ import annotations

import hashlib
from typing import Literal

import cv2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime.datatypes import Pixels
from runtime.manifest import PreprocessSpec
from runtime.preprocess import GREY, Window, prepare, window

Fit = Literal["crop", "stretch", "letterbox"]
sides = st.integers(1, 200)
fits: st.SearchStrategy[Fit] = st.sampled_from(["crop", "stretch", "letterbox"])


def generated(height: int, width: int) -> Pixels:
    """An image of integers that any machine makes alike: gradients under a texture."""
    y, x, c = np.mgrid[0:height, 0:width, 0:3]
    pixels: Pixels = ((x * 3 + y * 5 + c * 85 + (x * y * 7 + x * x * 11) % 97) % 256).astype(np.uint8)
    return pixels


def mean_2x2(pixels: Pixels) -> Pixels:
    height, width = pixels.shape[0] // 2, pixels.shape[1] // 2
    total = pixels.reshape(height, 2, width, 2, 3).astype(np.int32).sum(axis=(1, 3))
    mean: Pixels = ((total + 2) // 4).astype(np.uint8)
    return mean


@given(sides, sides, st.integers(1, 64), st.integers(1, 64), fits, st.floats(0.05, 1.0))
def test_any_frame_becomes_the_models_shape(
    height: int, width: int, model_height: int, model_width: int, fit: Fit, crop_ratio: float
) -> None:
    spec = PreprocessSpec(height=model_height, width=model_width, fit=fit, crop_ratio=crop_ratio)
    tensor = prepare(generated(height, width), spec)
    assert tensor.shape == (1, model_height, model_width, 3)
    assert tensor.dtype == np.uint8
    assert tensor.flags.c_contiguous
    assert np.array_equal(prepare(tensor[0], spec), tensor)


@given(sides, sides)
def test_the_right_size_is_left_alone(height: int, width: int) -> None:
    pixels = generated(height, width)
    assert np.array_equal(prepare(pixels, PreprocessSpec(height=height, width=width, crop_ratio=0.875))[0], pixels)


@given(st.integers(1, 60), st.integers(1, 60), st.integers(0, 3))
def test_halving_is_the_mean_of_2x2_pixels(height: int, width: int, halvings: int) -> None:
    expected = pixels = generated(height << halvings, width << halvings)
    for _ in range(halvings):
        expected = mean_2x2(expected)
    assert np.array_equal(prepare(pixels, PreprocessSpec(height=height, width=width))[0], expected)


def test_a_crop_is_the_centre_at_the_models_aspect_ratio() -> None:
    pixels = generated(64, 100)
    assert np.array_equal(prepare(pixels, PreprocessSpec(height=64, width=64))[0], pixels[:, 18:82])
    assert np.array_equal(prepare(pixels, PreprocessSpec(height=32, width=32, crop_ratio=0.5))[0], pixels[16:48, 34:66])


def test_stretch_sees_the_whole_frame() -> None:
    pixels = np.zeros((64, 128, 3), np.uint8)
    pixels[:, :2] = 255
    tensor = prepare(pixels, PreprocessSpec(height=64, width=64, fit="stretch"))
    assert tensor[0, :, 0].min() == 255
    assert tensor[0, :, 1:].max() == 0


def test_fine_stripes_become_grey_and_do_not_alias() -> None:
    pixels = np.zeros((1024, 1024, 3), np.uint8)
    pixels[:, ::2] = 255
    assert np.ptp(prepare(pixels, PreprocessSpec(height=100, width=100))) == 0


@pytest.mark.parametrize(
    ("height", "width", "spec", "digest"),
    [
        (
            576,
            768,
            PreprocessSpec(height=224, width=224),
            "be8cdd8a3d5309ac48c9eb6b42b44b8fcad75ee23d890026f64042ce6cf122d2",
        ),
        (
            1080,
            1920,
            PreprocessSpec(height=224, width=224, crop_ratio=0.875),
            "1d98e172cbec2bbe2dc6068ce65676a12e92714362920a02bae02faad9d38e75",
        ),
        (
            199,
            311,
            PreprocessSpec(height=256, width=192, fit="stretch"),
            "1245affdf1c754334434d0986d73b826764877dadc0bf73bd903fde6f8187068",
        ),
        (
            1080,
            1920,
            PreprocessSpec(height=640, width=640, fit="letterbox"),
            "248f3f480ce65ef02a310ed02dee4fb869d7f933bacd48552e586b7236904394",
        ),
    ],
)
def test_pixels_are_the_same_on_every_machine(height: int, width: int, spec: PreprocessSpec, digest: str) -> None:
    assert hashlib.sha256(prepare(generated(height, width), spec).tobytes()).hexdigest() == digest


@pytest.mark.parametrize("optimized", [True, False])
def test_processor_specific_code_does_not_change_a_pixel(optimized: bool) -> None:
    spec = PreprocessSpec(height=224, width=224)
    expected = prepare(generated(576, 768), spec)
    before = cv2.useOptimized()
    try:
        cv2.setUseOptimized(optimized)
        assert np.array_equal(prepare(generated(576, 768), spec), expected)
    finally:
        cv2.setUseOptimized(before)


@given(st.integers(1, 400), st.integers(1, 400), st.integers(1, 64), st.integers(1, 64), fits, st.floats(0.05, 1.0))
def test_the_window_is_what_the_model_sees(
    height: int, width: int, model_height: int, model_width: int, fit: Fit, crop_ratio: float
) -> None:
    """Every fit is within a pixel of the output of what its name says."""
    spec = PreprocessSpec(height=model_height, width=model_width, fit=fit, crop_ratio=crop_ratio)
    seen = window(height, width, spec)
    across, down = seen.width / model_width, seen.height / model_height
    middle = seen.left + seen.width / 2, seen.top + seen.height / 2
    assert abs(middle[0] - width / 2) <= max(1, across)
    assert abs(middle[1] - height / 2) <= max(1, down)
    if fit == "stretch":
        assert width - across < seen.width <= width
        assert height - down < seen.height <= height
    if fit == "letterbox":
        scale = max(width / model_width, height / model_height)
        # Rounded to whole pixels of the input, of which at least one is left; halving may cost another.
        assert abs(width / across - max(1, width / scale)) <= 1.5
        assert abs(height / down - max(1, height / scale)) <= 1.5
    if fit == "crop" and (height, width) != (model_height, model_width):
        assert seen.left >= 0
        assert seen.top >= 0
        assert seen.left + seen.width <= width
        assert seen.top + seen.height <= height


@given(st.data(), st.integers(40, 300), st.integers(40, 300), st.integers(24, 96), st.integers(24, 96), fits)
def test_a_box_comes_back_within_a_pixel(
    data: st.DataObject, height: int, width: int, model_height: int, model_width: int, fit: Fit
) -> None:
    """A bright box of the frame is found in the model's input, and put back by the window."""
    spec = PreprocessSpec(height=model_height, width=model_width, fit=fit)
    seen = window(height, width, spec)
    across, down = seen.width / model_width, seen.height / model_height
    left = data.draw(st.integers(max(0, round(seen.left)), round(min(width, seen.left + seen.width) - 3 * across) - 2))
    top = data.draw(st.integers(max(0, round(seen.top)), round(min(height, seen.top + seen.height) - 3 * down) - 2))
    right = data.draw(st.integers(int(left + 3 * across) + 1, max(int(left + 3 * across) + 1, width)))
    bottom = data.draw(st.integers(int(top + 3 * down) + 1, max(int(top + 3 * down) + 1, height)))
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[top:bottom, left:right] = 255
    inside = prepare(pixels, spec)[0, :, :, 0].astype(np.int64)
    inside[inside == GREY] = 0
    rows, columns = np.nonzero(inside.max(axis=1) >= 128)[0], np.nonzero(inside.max(axis=0) >= 128)[0]
    found = (
        seen.left + columns[0] * across,
        seen.top + rows[0] * down,
        seen.left + (columns[-1] + 1) * across,
        seen.top + (rows[-1] + 1) * down,
    )
    limits = max(1, across), max(1, down)
    shown = (
        max(left, seen.left),
        max(top, seen.top),
        min(right, seen.left + seen.width),
        min(bottom, seen.top + seen.height),
    )
    for place, (got, wanted) in enumerate(zip(found, shown, strict=True)):
        assert abs(got - wanted) <= limits[place % 2]


def test_a_letterbox_keeps_the_ratio_and_fills_with_grey() -> None:
    pixels = np.full((50, 100, 3), 200, np.uint8)
    tensor = prepare(pixels, PreprocessSpec(height=64, width=64, fit="letterbox"))[0]
    assert (tensor[:16] == GREY).all()
    assert (tensor[48:] == GREY).all()
    assert (tensor[16:48] == 200).all()
    assert window(50, 100, PreprocessSpec(height=64, width=64, fit="letterbox")) == Window(0, -25, 100, 100)
    upright = prepare(pixels.transpose(1, 0, 2), PreprocessSpec(height=64, width=64, fit="letterbox"))[0]
    assert np.array_equal(upright, tensor.transpose(1, 0, 2))


def test_windows_of_the_other_fits() -> None:
    assert window(64, 100, PreprocessSpec(height=64, width=64)) == Window(18, 0, 64, 64)
    assert window(64, 128, PreprocessSpec(height=64, width=64, fit="stretch")) == Window(0, 0, 128, 64)
    assert window(576, 768, PreprocessSpec(height=300, width=300, fit="stretch")) == Window(0, 0, 768, 576)
