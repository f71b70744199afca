"""The gate before inference: repeats a camera's last answer while it would not change. Pure.

Low-level differences with thresholds learnt from the whole model's own answers are the idea of Reducto (Li et al.,
SIGCOMM 2020). The difference here is the greatest mean change of brightness in any small square, between this frame and
the one whose answer would be repeated: a slow change adds up against that frame, and a small walker in a large scene
weighs as much as one in a small scene. `export.gate_fit` chooses the threshold; at run time one frame in AUDIT_FRAMES,
drawn at random, is computed whatever the gate says, and shows whether the promise still holds (`drift`).
"""

from __future__ import annotations

import random
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

import cv2
import numpy as np

from runtime.datatypes import Pixels, Tensor
from runtime.drift import Level

LEAST_SIDE = 50  # frames are halved while the shorter side stays at least this long
SQUARE = 5  # pixels after halving
AUDIT_FRAMES = 20  # one of so many frames is drawn
MOST_WAITING = 64  # frames whose answers are awaited

Answer = TypeVar("Answer")


def small(pixels: Pixels) -> Tensor:
    """The grey, small picture that frames are compared by.

    Args:
        pixels: uint8 (height, width, 3), RGB, of the size the model takes.

    Returns:
        uint8 (height / 2^k, width / 2^k), each pixel the mean of a square.
    """
    grey = cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY)
    while min(grey.shape) >= 2 * LEAST_SIDE:
        size = (grey.shape[1] // 2, grey.shape[0] // 2)
        grey = cv2.resize(grey, size, interpolation=cv2.INTER_LINEAR_EXACT)
    return grey.astype(np.uint8, copy=False)


def change(one: Tensor, two: Tensor) -> float:
    """The greatest mean change in any square of SQUARE x SQUARE pixels of two `small` pictures: 0..255."""
    # Sums of whole numbers, so that every processor finds the same.
    sums = cv2.boxFilter(cv2.absdiff(one, two), cv2.CV_16U, (SQUARE, SQUARE), normalize=False)
    return float(sums.max()) / SQUARE**2


@dataclass(frozen=True, slots=True)
class Rule:
    """What a gate may do."""

    threshold: float  # greatest change at which an answer is repeated; as fitted
    allowed: float  # mean loss over all frames that repeating may cost
    max_age_ns: int  # from the frame whose answer it is to the frame that it is repeated for


@dataclass(frozen=True, slots=True)
class Repeat(Generic[Answer]):
    """An answer that stands for one more frame."""

    answer: Answer
    of_ns: int  # time of the grab of the frame whose answer it is


@dataclass(frozen=True, slots=True)
class _Known(Generic[Answer]):
    picture: Tensor
    answer: Answer
    captured_ns: int


@dataclass(frozen=True, slots=True)
class _Awaited(Generic[Answer]):
    picture: Tensor
    drawn: bool
    share: float | None  # its change as a share of the fitted threshold; None: nothing could have been repeated
    instead: Answer | None  # what would have been


class Gate(Generic[Answer]):
    """The gate of one camera. `loss(repeated, computed)` is 0..1."""

    def __init__(self, rule: Rule, loss: Callable[[Answer, Answer], float], seed: int = 0) -> None:
        self._rule = rule
        self._loss = loss
        self._random = random.Random(seed)
        self._level = Level(rule.allowed)
        self._known: _Known[Answer] | None = None
        self._awaited: OrderedDict[int, _Awaited[Answer]] = OrderedDict()  # by time of the grab
        self._count = 0
        self._drawn = 0  # of this stretch of AUDIT_FRAMES, which one

    @property
    def level(self) -> int:
        """How much tighter than fitted the threshold is now, in steps."""
        return self._level.number

    def ask(self, pixels: Pixels, captured_ns: int) -> Repeat[Answer] | None:
        """Whether a frame can be answered by repeating. None: it is to be computed, and `answered` or `lost` follows.

        Args:
            pixels: uint8 (height, width, 3), RGB, of the size the model takes.
            captured_ns: time of the grab, later than all before; it names the frame.
        """
        picture = small(pixels)
        place = self._count % AUDIT_FRAMES
        if place == 0:
            self._drawn = self._random.randrange(AUDIT_FRAMES)
        self._count += 1
        known = self._known
        share: float | None = None
        if known is not None and captured_ns - known.captured_ns <= self._rule.max_age_ns:
            moved = change(known.picture, picture)
            share = moved / self._rule.threshold if self._rule.threshold > 0 else (0.0 if moved == 0 else 2.0)
            if self._repeats(share, self._level.number) and place != self._drawn:
                return Repeat(known.answer, known.captured_ns)
        instead = known.answer if known is not None and share is not None else None
        self._awaited[captured_ns] = _Awaited(picture, place == self._drawn, share, instead)
        if len(self._awaited) > MOST_WAITING:
            self._awaited.popitem(last=False)
        return None

    def answered(self, captured_ns: int, answer: Answer) -> int | None:
        """The answer that a computed frame got, fit to be repeated.

        Returns 1 when the threshold was tightened for what it showed, -1 when it was loosened, 0 when a drawn frame
        changed nothing; None: the frame was not a drawn one.
        """
        awaited = self._awaited.pop(captured_ns, None)
        if awaited is None:
            return None
        if self._known is None or captured_ns > self._known.captured_ns:
            self._known = _Known(awaited.picture, answer, captured_ns)
        if not awaited.drawn:
            return None
        if awaited.share is None or awaited.instead is None:
            return self._level.observe(0.0, 0.0)
        loss = self._loss(awaited.instead, answer)
        now, looser = (
            loss if self._repeats(awaited.share, number) else 0.0
            for number in (self._level.number, max(0, self._level.number - 1))
        )
        return self._level.observe(now, looser)

    def lost(self, captured_ns: int) -> None:
        """A computed frame got no answer, or one that is not fit to be repeated."""
        self._awaited.pop(captured_ns, None)

    def _repeats(self, share: float, level: int) -> bool:
        limit = self._level.share(level)
        return limit > 0 and share <= limit
