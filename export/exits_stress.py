"""Floors under the thresholds of exits: what still has to be sure enough on frames stranger than any known one.

A guard tells frames apart by texture, and what is sharp and clean but shows something else passes it. There an exit is
as sure as ever and oftener wrong, the shallow ones most. So fit frames are given strange copies, of kinds that leave
texture alone; of those that pass the guard, the whole float model's own answers say how often a sure exit is wrong; and
no threshold may lie where that is more than a stated share of what the promise allows. Like outlier exposure (Hendrycks
et al. 2019), but for the threshold: being hard is learnt from strange frames, not being strange. The promise itself is
tested above these floors (`export.risk`), on frames as they are, and is as valid as without them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import islice

import cv2
import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray
from onnx import ModelProto

from export import exits_judge
from export.exits import DISTANCE, FEATURES
from export.exits_candidates import Trunk
from export.frames import FrameSet
from export.graph import FRAME, LOGITS
from export.recipe import Recipe
from export.report import Report
from export.risk import Words
from export.task import open_judge
from runtime.datatypes import ExitOutput, Tensor
from runtime.manifest import Bundle, ExitSpec
from runtime.segment import load_segments
from runtime.segment_onnx import session_options
from runtime.task import open_task

SHARE = 0.5  # of the disagreement that the promise allows: so much strange frames may show
EACH = 4  # strange copies of a frame
STRESSED = 1000  # frames at most that are copied
SIDE = 4  # pieces of a frame that is shuffled, a side
OBSERVED = 16  # frames at once, where the graphs take them

Exit = tuple[ExitSpec, ModelProto]  # with its guard
Strange = Callable[[Tensor, Tensor, np.random.Generator], NDArray[np.generic]]


def _halves(frame: Tensor, other: Tensor, generator: np.random.Generator) -> Tensor:
    middle = frame.shape[2] // 2
    return np.concatenate([frame[:, :, :middle], other[:, :, middle:]], axis=2)


def _shuffled(frame: Tensor, other: Tensor, generator: np.random.Generator) -> Tensor:
    made = frame.copy()
    height, width = frame.shape[1] // SIDE, frame.shape[2] // SIDE
    for place, taken in enumerate(generator.permutation(SIDE**2)):
        (row, column), (top, left) = divmod(place, SIDE), divmod(int(taken), SIDE)
        piece = frame[:, top * height : (top + 1) * height, left * width : (left + 1) * width]
        made[:, row * height : (row + 1) * height, column * width : (column + 1) * width] = piece
    return made


def _covered(frame: Tensor, other: Tensor, generator: np.random.Generator) -> Tensor:
    made = frame.copy()
    height, width = frame.shape[1] // 2, frame.shape[2] // 2
    top, left = generator.integers(0, height + 1), generator.integers(0, width + 1)
    made[:, top : top + height, left : left + width] = generator.integers(0, 256, 3)
    return made


def _twice_covered(frame: Tensor, other: Tensor, generator: np.random.Generator) -> Tensor:
    return _covered(_covered(frame, other, generator), other, generator)


def _tiled(frame: Tensor, other: Tensor, generator: np.random.Generator) -> Tensor:
    height, width = frame.shape[1:3]
    small = cv2.resize(frame[0], ((width + 1) // 2, (height + 1) // 2), interpolation=cv2.INTER_AREA)
    return np.tile(small, (2, 2, 1))[np.newaxis, :height, :width].astype(np.uint8)


# Each makes of a frame and another one, uint8 (1, height, width, 3), a strange one.
KINDS: Mapping[str, Strange] = {
    "channels exchanged": lambda frame, other, generator: frame[..., ::-1],
    "two in one": lambda frame, other, generator: (frame.astype(np.float32) + other) / 2,
    "halves of two": _halves,
    "quarters exchanged": lambda frame, other, generator: np.roll(
        frame, (frame.shape[1] // 2, frame.shape[2] // 2), (1, 2)
    ),
    "pieces shuffled": _shuffled,
    "a quarter covered": _covered,
    "two quarters covered": _twice_covered,
    "four small copies": _tiled,
    "negative": lambda frame, other, generator: 255 - frame,
    "harsh light": lambda frame, other, generator: 128 + 2.5 * (frame.astype(np.float32) - frame.mean()),
}


def strange_copies(frames: Sequence[Tensor], number: int, generator: np.random.Generator) -> Iterator[Tensor]:
    """Strange copies of one of the frames, uint8 (1, height, width, 3): of EACH kinds, by its number all in turn."""
    kinds = list(KINDS.values())
    other = frames[(number + len(frames) // 2) % len(frames)]
    for turn in range(EACH):
        made = kinds[(number + turn * len(kinds) // EACH) % len(kinds)](frames[number], other, generator)
        yield np.clip(np.rint(made), 0, 255).astype(np.uint8)


def see_strange(
    exits: Sequence[Exit], trunk: Trunk, bundle: Bundle, frames: FrameSet, recipe: Recipe, report: Report
) -> Words:
    """What the exits of a bundle, of which only segments are written yet, say of strange copies of the fit frames."""
    generator = np.random.default_rng(recipe.seed)
    fit = frames.of("fit")
    some = [fit[row] for row in np.linspace(0, len(fit) - 1, min(STRESSED, len(fit))).round().astype(int)]
    options = session_options(recipe.threads)
    judge, task = open_judge(bundle), open_task(bundle)
    segments, _ = load_segments(bundle, 0, len(exits) - 1, threads=recipe.threads)
    whole = ort.InferenceSession(trunk.opened.simplified.trunk().SerializeToString(), options)
    heads = [ort.InferenceSession(model.SerializeToString(), options) for _, model in exits]
    batch = exits_judge.largest_batch(bundle, np.concatenate(fit[:OBSERVED]))
    outputs: list[Tensor] = []
    said: list[list[ExitOutput]] = [[] for _ in exits]
    numbers = report.track(range(len(some)), "strange")
    copies = (copy for number in numbers for copy in strange_copies(some, number, generator))
    while group := list(islice(copies, batch)):
        tensor = np.concatenate(group)
        outputs.append(whole.run([LOGITS], {FRAME: tensor})[0])
        for place, (spec, model) in enumerate(exits):
            tensor = segments[place].run(tensor)
            names = [model.graph.output[0].name, DISTANCE]
            logits, distances = heads[place].run(names, {FEATURES: tensor})
            words = zip(logits, distances, strict=True)
            said[place] += [replace(task.read(row, spec), distance=float(away)) for row, away in words]
    answers = judge.keys(np.concatenate(outputs))
    limits = [math.inf if spec.distance_limit is None else spec.distance_limit for spec, _ in exits]
    distance = np.array([[output.distance for output in column] for column in said], np.float64)
    return Words(
        np.array([[exits_judge.sureness(output) for output in column] for column in said]),
        np.array([[task.key(output.answer) for output in column] for column in said]) == answers,
        distance <= np.array(limits).reshape(-1, 1),
        judge.owed(answers),
    )


def floors(strange: Words, agreement: float) -> tuple[float, ...]:
    """By exit, the least confidence at which strange frames, and one error more, disagree on SHARE of the allowed.

    Each exit is asked about the strange frames within its guard's limit that no exit before it answers at its own
    floor. Where no confidence does, the floor lies above the surest of them.
    """
    left = np.ones(strange.frames, np.bool_)
    owed = None if strange.owed is None else int(strange.owed.sum())
    found: list[float] = []
    for place in range(strange.exits):
        confidence = strange.confidence[place]
        asked = left & strange.within[place] & np.isfinite(confidence)
        floor = _floor(confidence[asked], strange.agrees[place][asked], SHARE * (1 - agreement), owed)
        left &= ~(asked & (confidence >= floor))
        found.append(floor)
    return tuple(found)


def above(words: Words, least: Sequence[float]) -> Words:
    """The same words, but what is less sure than an exit's floor is beyond that exit's limit."""
    return replace(words, within=words.within & (words.confidence >= np.array(least).reshape(-1, 1)))


def _floor(confidence: NDArray[np.float64], agrees: NDArray[np.bool_], risk: float, owed: int | None) -> float:
    order = np.argsort(-confidence, kind="stable")
    ranked = confidence[order]
    last_of_ties = np.append(ranked[1:] < ranked[:-1], True)[: len(ranked)]
    count = np.arange(1, len(ranked) + 1) if owed is None else np.full(len(ranked), owed)
    few = np.cumsum(~agrees[order]) + 1 <= risk * (count + 1)
    kept = np.flatnonzero(last_of_ties & few)
    if len(kept) == 0:
        return float(np.nextafter(ranked[0], np.inf)) if len(ranked) else 0.0
    return 0.0 if kept[-1] == len(ranked) - 1 else float(ranked[kept[-1]])
