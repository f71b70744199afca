"""Judges a bundle's exits on frames that had no part in making it: who answers what, at every agreement of its table.

Every exit is asked about every frame once; the cascade is then replayed on paper for each row of the table, with the
runtime's own policy.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from export.agreement import clopper_pearson
from export.risk import Flags, Words
from export.task import Outputs, open_judge
from runtime.datatypes import ExitOutput, Tensor
from runtime.errors import BundleError
from runtime.manifest import Bundle, Measured
from runtime.policy import ExitPolicy
from runtime.segment import load_segments
from runtime.task import open_task

CLOSE = 1e-4  # confidences of a frame alone and in a batch
BINS = 10  # of the histogram of confidences, all equally wide


@dataclass(frozen=True, slots=True)
class Seen:
    """What every exit says of every frame, asked or not; arrays are (exits, frames), the model's own exit last."""

    cuts: tuple[int, ...]
    answers: NDArray[np.int64]  # keys, as the task tells answers apart
    confidence: NDArray[np.float64]  # as `sureness`
    distance: NDArray[np.float64]  # NaN where the exit has no guard

    def words(self, bundle: Bundle, float_answers: NDArray[np.int64]) -> Words:
        """The early exits' words beside the whole float model's answers (frames,), under the bundle's limits."""
        limits = [spec.distance_limit for spec in bundle.manifest.exits[:-1]]
        within = [
            np.ones(len(float_answers), np.bool_) if limit is None else distance <= limit
            for limit, distance in zip(limits, self.distance[:-1], strict=True)
        ]
        shape = (len(limits), len(float_answers))
        return Words(
            self.confidence[:-1],
            self.answers[:-1] == float_answers,
            np.array(within, np.bool_).reshape(shape),
            open_judge(bundle).owed(float_answers),
        )


@dataclass(frozen=True, slots=True)
class ExitRow:
    """What one exit does on the judged frames at one agreement, as the cascade runs."""

    target: float  # the agreement, with the same row in force at every exit
    cut: int
    after: str  # the layer before the cut
    threshold: float | None  # None: it never answers at this agreement; 0 at the model's own exit
    n: int  # judged frames
    reached: int  # that no exit before it answered
    answered: int
    withheld: int  # of the reached: sure, but beyond the guard's limit
    coverage: float  # answered / n
    agreement: float | None  # of the answered, with the whole float model
    low: float | None  # 95 % Clopper-Pearson interval
    high: float | None
    accuracy: float | None  # of the answered, where labels are known
    accuracy_low: float | None
    accuracy_high: float | None
    histogram: tuple[tuple[int, int], ...]  # by confidence in BINS steps from 0 to 1: reached frames, agreeing ones
    # Where the promise is about certain frames, as those with something in a detector's; None elsewhere.
    owed: int | None = None  # how many there are
    missed: int | None = None  # of them, answered wrongly here or at an exit before
    missed_high: float | None = None  # upper end of the 95 % Clopper-Pearson interval of their share
    spared: int | None = None  # of the others, answered here or at an exit before

    def measured(self) -> Measured:
        """As the manifest states it."""
        return Measured(
            coverage=round(self.coverage, 6),
            agreement=_rounded(self.agreement),
            agreement_low=_rounded(self.low),
            agreement_high=_rounded(self.high),
            answered=self.answered,
            n=self.n,
            withheld=self.withheld,
            accuracy=_rounded(self.accuracy),
            accuracy_low=_rounded(self.accuracy_low),
            accuracy_high=_rounded(self.accuracy_high),
            owed=self.owed,
            missed=self.missed,
            missed_high=_rounded(self.missed_high),
            spared=self.spared,
        )


def judge(bundle: Bundle, frames: Tensor, floating: Outputs, labels: NDArray[np.int64] | None = None) -> list[ExitRow]:
    """Judge every exit at every agreement of the bundle's table; rows by rising agreement, then by cut.

    Args:
        frames: uint8 (frames, height, width, 3) as the model sees them.
        floating: the whole float model's outputs (frames, …).
        labels: the true class index of each frame (frames,), where it is known.

    The last exit's row of each agreement says what the frames that no early exit answered got.
    """
    return judge_seen(bundle, see(bundle, frames), open_judge(bundle).keys(floating), labels)


def see(bundle: Bundle, frames: Tensor, *, batch: int | None = None) -> Seen:
    """Ask every exit about every frame, uint8 (frames, height, width, 3).

    By default in batches that were proved to give each frame the answer it gets alone.
    """
    specs, segment_specs = bundle.manifest.exits, bundle.manifest.segments
    segments, heads = load_segments(bundle, 0, len(segment_specs) - 1)
    task = open_task(bundle)
    size = batch or min(spec.max_batch_size for spec in segment_specs)
    said: dict[int, list[ExitOutput]] = {spec.cut: [] for spec in specs}
    for start in range(0, len(frames), size):
        tensor = frames[start : start + size]
        for index, segment in segments.items():
            tensor = segment.run(tensor)
            spec = bundle.exit_at(index + 1)
            if spec is None:
                continue
            logits, distances = heads[spec.cut].ask(tensor) if spec.cut in heads else (tensor, None)
            if len(logits) != len(frames[start : start + size]):
                raise BundleError(f"{spec.file} gives {len(logits)} answers for a batch of {size}")
            for row, place in zip(logits, range(len(logits)), strict=True):
                distance = None if distances is None else float(distances[place])
                said[spec.cut].append(replace(task.read(row, spec), distance=distance))
    columns = [said[spec.cut] for spec in specs]
    return Seen(
        tuple(spec.cut for spec in specs),
        np.array([[task.key(output.answer) for output in column] for column in columns], np.int64),
        np.array([[sureness(output) for output in column] for column in columns], np.float64),
        np.array([[output.distance for output in column] for column in columns], np.float64),  # None becomes NaN
    )


def sureness(output: ExitOutput) -> float:
    """What thresholds see of an exit's word: its confidence, and less than any threshold where it is only partial."""
    return -math.inf if output.partial else output.confidence


def judge_seen(
    bundle: Bundle, seen: Seen, float_answers: NDArray[np.int64], labels: NDArray[np.int64] | None = None
) -> list[ExitRow]:
    """`judge` for frames that were seen already; answers and labels are (frames,)."""
    first = bundle.manifest.exits[0]
    table: list[float | None] = [point.agreement for point in first.points]
    table = table or [None]
    return [row for target in table for row in _rows(bundle, seen, float_answers, labels, target)]


def _rows(
    bundle: Bundle,
    seen: Seen,
    float_answers: NDArray[np.int64],
    labels: NDArray[np.int64] | None,
    target: float | None,
) -> list[ExitRow]:
    policy = ExitPolicy.of(bundle, agreement=target)
    left = np.ones(len(float_answers), np.bool_)
    owed = open_judge(bundle).owed(float_answers)
    wrong = np.zeros_like(left)
    rows: list[ExitRow] = []
    for place, spec in enumerate(bundle.manifest.exits):
        threshold = policy.thresholds.get(spec.cut)
        sure = left & (threshold is not None) & (seen.confidence[place] >= (threshold or 0.0))
        limit = policy.limits.get(spec.cut)
        within = np.ones_like(left) if limit is None else seen.distance[place] <= limit
        answered = sure & within
        agrees = seen.answers[place] == float_answers
        share, low, high = _share(agrees[answered])
        wrong |= answered & ~agrees
        right: tuple[float | None, ...] = (None, None, None)
        if labels is not None:
            right = _share((seen.answers[place] == labels)[answered])
        rows.append(
            ExitRow(
                target=bundle.manifest.exits[0].agreement if target is None else target,
                cut=spec.cut,
                after=bundle.manifest.cuts[spec.cut].after,
                threshold=threshold,
                n=len(left),
                reached=int(left.sum()),
                answered=int(answered.sum()),
                withheld=int((sure & ~within).sum()),
                coverage=float(answered.mean()),
                agreement=share,
                low=low,
                high=high,
                accuracy=right[0],
                accuracy_low=right[1],
                accuracy_high=right[2],
                histogram=_histogram(seen.confidence[place][left], agrees[left]),
                **(
                    {}
                    if owed is None or place == len(bundle.manifest.exits) - 1
                    else _promised(owed, wrong, answered | ~left)
                ),
            )
        )
        left = left & ~answered
    return rows


def _promised(owed: Flags, wrong: Flags, answered: Flags) -> dict[str, Any]:
    missed = int((wrong & owed).sum())
    high = clopper_pearson(missed, int(owed.sum()))[1] if owed.any() else None
    return {"owed": int(owed.sum()), "missed": missed, "missed_high": high, "spared": int((answered & ~owed).sum())}


def _share(hits: Flags) -> tuple[float | None, float | None, float | None]:
    if not hits.size:
        return None, None, None
    return float(hits.mean()), *clopper_pearson(int(hits.sum()), hits.size)


def _histogram(confidence: NDArray[np.float64], agrees: Flags) -> tuple[tuple[int, int], ...]:
    places = np.minimum((np.maximum(confidence, 0.0) * BINS).astype(int), BINS - 1)
    return tuple((int((places == step).sum()), int(agrees[places == step].sum())) for step in range(BINS))


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 6)


def accuracy(answers: Sequence[int] | NDArray[np.int64], labels: NDArray[np.int64]) -> tuple[float, float, float]:
    """The share of right answers, and its 95 % interval."""
    hits = np.asarray(answers) == labels
    return float(hits.mean()), *clopper_pearson(int(hits.sum()), hits.size)


def largest_batch(bundle: Bundle, frames: Tensor) -> int:
    """How many frames may be run at once without changing any answer: all of `frames`, or one."""
    try:
        together = see(bundle, frames, batch=len(frames))
    except BundleError:  # the batch of this graph is fixed
        return 1
    alone = see(bundle, frames, batch=1)
    close = np.allclose(together.confidence, alone.confidence, rtol=0, atol=CLOSE)
    return len(frames) if close and np.array_equal(alone.answers, together.answers) else 1
