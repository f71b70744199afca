"""Chooses the gate's threshold on consecutive, unlabelled frames, against the whole float model's own answers. Pure.

The gate is run as it will run, frame after frame, and the loss of a frame is 0 where it is computed and 1 - F1 (of the
repeated answer with the model's own; of a label: whether it differs) where the answer is repeated. The promise is about
the mean loss over all frames. Thresholds are tested from the strictest on, and the last one before the first that
cannot be shown to keep the promise is taken (fixed-sequence testing, as in Learn then Test, Angelopoulos et al. 2021);
the test is the betting one of `runtime.drift`. Neighbours in time are alike, so what is tested are means over stretches
as long as losses stay alike, each standing for one frame.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from export.risk import CONFIDENCE
from runtime.datatypes import Tensor
from runtime.drift import refutes_above
from runtime.gate import change, small

TARGET = 0.95  # of the mean F1 over all frames
MAX_AGE_S = 2.0
STEPS = 60  # thresholds tried
BATCHES = 12  # means from which a variance is estimated
LEAST_FRAMES = 60  # of a stretch, below which nothing can be shown

Losses = NDArray[np.float64]  # (frames,), 0..1
Loss = Callable[[int, int], float]  # (frame whose answer is repeated, frame) → 0..1


@dataclass(frozen=True, slots=True)
class Stretch:
    """Consecutive frames of one camera."""

    pictures: tuple[Tensor, ...]  # runtime.gate.small of each
    loss: Loss
    most_frames: int  # a repeated answer is at most so old

    @classmethod
    def of(cls, pixels: Sequence[Tensor], loss: Loss, fps: float, max_age_s: float = MAX_AGE_S) -> Stretch:
        """Of frames, each uint8 (height, width, 3) as the model takes them, `fps` of them a second."""
        return cls(tuple(small(frame) for frame in pixels), loss, max(1, int(max_age_s * fps)))


@dataclass(frozen=True, slots=True)
class Course:
    """What a gate did on frames."""

    repeated: NDArray[np.bool_]  # (frames,)
    losses: Losses

    @property
    def share(self) -> float:
        """Of all frames, those answered by repetition."""
        return float(self.repeated.mean())

    @property
    def kept(self) -> float:
        """Mean F1 over all frames."""
        return 1 - float(self.losses.mean())


@dataclass(frozen=True, slots=True)
class Fitted:
    """The chosen threshold, None where no repetition could be shown to keep the promise, and its course."""

    threshold: float | None
    course: Course | None
    note: str | None = None


class Changes:
    """Changes between frames of a stretch, each computed once."""

    def __init__(self, stretch: Stretch) -> None:
        self.stretch = stretch
        self._found: dict[tuple[int, int], float] = {}

    def between(self, one: int, two: int) -> float:
        """The change from frame `one` to frame `two`."""
        if (one, two) not in self._found:
            self._found[one, two] = change(self.stretch.pictures[one], self.stretch.pictures[two])
        return self._found[one, two]


def run(changes: Changes, threshold: float) -> Course:
    """The gate's course at a threshold, frame after frame, every computed frame answered before the next."""
    stretch = changes.stretch
    count = len(stretch.pictures)
    repeated, losses = np.zeros(count, np.bool_), np.zeros(count)
    known = 0
    for frame in range(1, count):
        if frame - known <= stretch.most_frames and changes.between(known, frame) <= threshold:
            repeated[frame], losses[frame] = True, stretch.loss(known, frame)
        else:
            known = frame
    return Course(repeated, losses)


def joined(courses: Sequence[Course]) -> Course:
    """Several courses as one."""
    return Course(
        np.concatenate([course.repeated for course in courses]), np.concatenate([course.losses for course in courses])
    )


def fit(stretches: Sequence[Stretch], target: float = TARGET, confidence: float = CONFIDENCE) -> Fitted:
    """The loosest threshold that is shown to keep the mean F1 over all frames at `target`.

    With probability `confidence` over stretches like these, where losses farther apart than they stay alike are
    independent. A quiet camera does not pay for a busy one: each stretch has to keep the target by itself, on its own
    frames, though not with that confidence.
    """
    changes = [Changes(stretch) for stretch in stretches if len(stretch.pictures) >= LEAST_FRAMES]
    if not changes:
        return Fitted(None, None, f"no {LEAST_FRAMES} consecutive frames; give a clip")
    length = 1
    chosen = Fitted(None, None, "even the strictest threshold is not shown to keep the promise; give a longer clip")
    for threshold in _thresholds(changes):
        courses = [run(one, threshold) for one in changes]
        # The longest of all thresholds so far: it is estimated, and none may gain from an estimate that came out short.
        length = max(length, *(alike_for(course.losses) for course in courses))
        means = np.concatenate([stretch_means(course.losses, length) for course in courses])
        alone = min(course.kept for course in courses) >= target
        if not alone or not refutes_above(map(float, means), 1 - target, 1 - confidence):
            break
        whole = Course(
            *(np.concatenate(parts) for parts in zip(*((c.repeated, c.losses) for c in courses), strict=True))
        )
        chosen = Fitted(threshold, whole)
    return chosen


def stretch_means(losses: Losses, length: int) -> Losses:
    """Means over stretches of `length` frames; what is left over at the end goes to the last."""
    ends = np.arange(1, max(1, len(losses) // length) + 1) * length
    ends[-1] = len(losses)
    return np.array([part.mean() for part in np.split(losses, ends[:-1])])


def alike_for(losses: Losses) -> int:
    """For how many frames losses stay alike: how many stand for one independent frame.

    By batch means: how much more means of 2, 4, 8, ... frames vary than those of independent ones would, the most of
    all lengths that leave BATCHES means. A repeated frame is followed by computed ones, so that neighbours' losses are
    opposed while busy and calm times are alike: the sum of correlations up to the first that is not positive, as for
    exits, would see only the former.
    """
    spread = float(losses.var(ddof=1))
    longest = 1.0
    length = 2
    while spread > 0 and len(losses) // length >= BATCHES:
        means = losses[: len(losses) // length * length].reshape(-1, length).mean(axis=1)
        longest = max(longest, length * float(means.var(ddof=1)) / spread)
        length *= 2
    return math.ceil(longest)


def kept_low(losses: Losses, confidence: float = CONFIDENCE) -> float:
    """The least mean F1 that the losses do not refute: a lower bound at `confidence`."""
    means = [float(mean) for mean in stretch_means(losses, alike_for(losses))]
    low, high = 0.0, 1.0  # losses: not refuted, refuted
    for _ in range(20):
        middle = (low + high) / 2
        if refutes_above(means, middle, 1 - confidence):
            high = middle
        else:
            low = middle
    return 1 - high


def _thresholds(changes: Sequence[Changes]) -> list[float]:
    """Rising, from a little above what two neighbours differ by at rest to what nearly all frames differ by."""
    seen = [
        one.between(frame, frame + lag)
        for one in changes
        for lag in {1, min(2, one.stretch.most_frames), one.stretch.most_frames}
        for frame in range(len(one.stretch.pictures) - lag)
    ]
    return sorted({float(value) for value in np.quantile(seen, np.linspace(0.01, 0.99, STEPS))})
