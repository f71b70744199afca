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
    """What `prepare` shows the model of a frame of `height` and `width` pixels."""
    if (height, width) == (spec.height, spec.width):
        return Window(0, 0, width, height)
    kept_height, kept_width = _kept(height, width, spec)
    return Window((width - kept_width) // 2, (height - kept_height) // 2, kept_width, kept_height)


def prepare(pixels: Pixels, spec: PreprocessSpec) -> Tensor:
    """Crop and scale a frame to what the model takes.

    Args:
        pixels: uint8 (any height, any width, 3), RGB.
        spec: the bundle's; with `fit="stretch"` nothing is cropped and the aspect ratio is not kept.

    Returns:
        uint8 (1, spec.height, spec.width, 3), C-contiguous. Pixels that have this size already are passed on as they
        are, without a crop, so that preparing twice is preparing once.
    """
    if pixels.shape[:2] == (spec.height, spec.width):
        return np.ascontiguousarray(pixels)[np.newaxis]
    height, width = _kept(pixels.shape[0], pixels.shape[1], spec)
    halvings = 0
    while height >> halvings + 1 >= spec.height and width >> halvings + 1 >= spec.width:
        halvings += 1
    # Sizes that halve without a rest, so that no halving has to invent a pixel; costs under one pixel of the output.
    height, width = height >> halvings << halvings, width >> halvings << halvings
    scaled = _centre(pixels, height, width)
    for _ in range(halvings):
        scaled = _resize(scaled, scaled.shape[0] // 2, scaled.shape[1] // 2)
    if scaled.shape[:2] != (spec.height, spec.width):
        scaled = _resize(scaled, spec.height, spec.width)
    return np.ascontiguousarray(scaled)[np.newaxis]


def _kept(height: int, width: int, spec: PreprocessSpec) -> tuple[int, int]:
    """The (height, width) of the source that the model gets to see."""
    if spec.fit == "stretch":
        return height, width
    if width * spec.height >= height * spec.width:
        width = height * spec.width // spec.height
    else:
        height = width * spec.height // spec.width
    return max(1, round(height * spec.crop_ratio)), max(1, round(width * spec.crop_ratio))


def _centre(pixels: Pixels, height: int, width: int) -> Pixels:
    top, left = (pixels.shape[0] - height) // 2, (pixels.shape[1] - width) // 2
    return pixels[top : top + height, left : left + width]


def _resize(pixels: Pixels, height: int, width: int) -> Pixels:
    resized: Pixels = cv2.resize(pixels, (width, height), interpolation=cv2.INTER_LINEAR_EXACT).astype(
        np.uint8, copy=False
    )
    return resized
