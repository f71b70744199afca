"""Pixels of any size → the model's input, bit for bit the same on every processor.

Exits are fitted to, and golden vectors are made of, exactly these pixels, so a workstation and a board have to agree
on every one. OpenCV's INTER_LINEAR and INTER_AREA may differ between processors by a grey level; INTER_LINEAR_EXACT
works in integers and does not. It looks at 2x2 pixels only, though, so that shrinking by much more than two would
alias: hence exact halvings, each the mean of 2x2 pixels, before the last resize.
"""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np

from runtime.datatypes import Pixels, Tensor
from runtime.manifest import PreprocessSpec

GREY = 114  # around a letterboxed frame, as YOLO's detectors are trained


@dataclass(frozen=True, slots=True)
class Window:
    """The part of a frame that the model's input covers, in pixels of the frame.

    A point (x, y) in shares of the input lies at left + x * width, top + y * height.
    """

    left: float
    top: float
    width: float
    height: float


def window(height: int, width: int, spec: PreprocessSpec) -> Window:
    """What `prepare` shows the model of a frame of `height` and `width` pixels; it exceeds a letterboxed frame."""
    plan = _plan(height, width, spec)
    return Window(
        left=plan.left - plan.pad_left * plan.width / plan.inner_width,
        top=plan.top - plan.pad_top * plan.height / plan.inner_height,
        width=spec.width * plan.width / plan.inner_width,
        height=spec.height * plan.height / plan.inner_height,
    )


def prepare(pixels: Pixels, spec: PreprocessSpec) -> Tensor:
    """Crop or pad, and scale a frame to what the model takes.

    Args:
        pixels: uint8 (any height, any width, 3), RGB.
        spec: the bundle's; with `fit="stretch"` nothing is cropped and the aspect ratio is not kept, with
            `fit="letterbox"` nothing is cropped, and grey fills what the frame leaves free.

    Returns:
        uint8 (1, spec.height, spec.width, 3), C-contiguous. Pixels that have this size already are passed on as they
        are, without a crop, so that preparing twice is preparing once.
    """
    plan = _plan(pixels.shape[0], pixels.shape[1], spec)
    scaled = pixels[plan.top : plan.top + plan.height, plan.left : plan.left + plan.width]
    for _ in range(plan.halvings):
        scaled = _resize(scaled, scaled.shape[0] // 2, scaled.shape[1] // 2)
    if scaled.shape[:2] != (plan.inner_height, plan.inner_width):
        scaled = _resize(scaled, plan.inner_height, plan.inner_width)
    if scaled.shape[:2] != (spec.height, spec.width):
        canvas = np.full((spec.height, spec.width, 3), GREY, np.uint8)
        rows = slice(plan.pad_top, plan.pad_top + plan.inner_height)
        canvas[rows, plan.pad_left : plan.pad_left + plan.inner_width] = scaled
        scaled = canvas
    return np.ascontiguousarray(scaled)[np.newaxis]


@dataclass(frozen=True, slots=True)
class _Plan:
    """Which pixels of the frame are halved how often, and where in the input they go."""

    top: int
    left: int
    height: int
    width: int
    halvings: int
    pad_top: int
    pad_left: int
    inner_height: int
    inner_width: int


def _plan(height: int, width: int, spec: PreprocessSpec) -> _Plan:
    if (height, width) == (spec.height, spec.width):
        return _Plan(0, 0, height, width, 0, 0, 0, height, width)
    kept_height, kept_width = _kept(height, width, spec)
    inner_height, inner_width = _inner(height, width, spec)
    halvings = 0
    while kept_height >> halvings + 1 >= inner_height and kept_width >> halvings + 1 >= inner_width:
        halvings += 1
    # Sizes that halve without a rest, so that no halving has to invent a pixel; costs under one pixel of the output.
    kept_height, kept_width = kept_height >> halvings << halvings, kept_width >> halvings << halvings
    return _Plan(
        top=(height - kept_height) // 2,
        left=(width - kept_width) // 2,
        height=kept_height,
        width=kept_width,
        halvings=halvings,
        pad_top=(spec.height - inner_height) // 2,
        pad_left=(spec.width - inner_width) // 2,
        inner_height=inner_height,
        inner_width=inner_width,
    )


def _kept(height: int, width: int, spec: PreprocessSpec) -> tuple[int, int]:
    """The (height, width) of the source that the model gets to see."""
    if spec.fit != "crop":
        return height, width
    if width * spec.height >= height * spec.width:
        width = height * spec.width // spec.height
    else:
        height = width * spec.height // spec.width
    return max(1, round(height * spec.crop_ratio)), max(1, round(width * spec.crop_ratio))


def _inner(height: int, width: int, spec: PreprocessSpec) -> tuple[int, int]:
    """The (height, width) of the input that is not padding."""
    if spec.fit != "letterbox":
        return spec.height, spec.width
    if width * spec.height >= height * spec.width:
        return max(1, _rounded(height * spec.width, width)), spec.width
    return spec.height, max(1, _rounded(width * spec.height, height))


def _rounded(dividend: int, divisor: int) -> int:
    """The nearest integer, halves upwards; in integers, so that every processor finds the same."""
    return (2 * dividend + divisor) // (2 * divisor)


def _resize(pixels: Pixels, height: int, width: int) -> Pixels:
    resized: Pixels = cv2.resize(pixels, (width, height), interpolation=cv2.INTER_LINEAR_EXACT).astype(
        np.uint8, copy=False
    )
    return resized
