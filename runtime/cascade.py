"""The algorithm of every tier: run the next segment, look at its exit head, answer or go on. Pure.

What is unfinished when the local segments run out is the caller's to send up; nothing here knows of links.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from runtime.datatypes import ExitOutput, Features, Tensor
from runtime.errors import BundleError
from runtime.manifest import Bundle, ExitSpec
from runtime.policy import ExitPolicy
from runtime.segment import Head, Segment
from runtime.task import Task, open_task

WARM_UP_S = 2.0  # for batches: what starts late answers nobody meanwhile


@dataclass(frozen=True, slots=True)
class Tier:
    """A contiguous range of segments with their exit heads."""

    bundle: Bundle
    segments: Mapping[int, Segment]  # by segment index; contiguous
    heads: Mapping[int, Head]  # by the cut they hang at
    task: Task = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "task", open_task(self.bundle))

    @property
    def first(self) -> int:
        """The shallowest cut this tier can start from."""
        return min(self.segments)

    @property
    def last(self) -> int:
        """The deepest segment this tier runs."""
        return max(self.segments)


@dataclass(slots=True)
class Outcome:
    """What became of one frame in one tier."""

    features: Features | None  # unfinished: the features behind the tier's last segment; None when answered
    answer: ExitOutput | None  # what may stand as the answer
    best: ExitOutput | None  # the word of the deepest exit that was asked, confident or not
    withheld: tuple[int, ...] = ()  # exits that were sure, but whose guard did not know such a frame
    unasked: Features | None = None  # at a deeper exit that may not answer, so that it was not asked; see `last_word`
    timings: dict[str, float] = field(default_factory=dict)  # stage → ms; a batch's time counts for each of its frames


def run(batch: Sequence[Features], tier: Tier, policy: ExitPolicy) -> list[Outcome]:
    """Run the frames of `batch`, which may lie at different cuts, through the tier's segments.

    Frames join the batch at their own cut and leave it at the exit that answers them.

    Returns:
        One Outcome for each of `batch`, in its order: an answer, or features at cut `tier.last + 1`.
    """
    outcomes = [Outcome(features, None, None) for features in batch]
    for index in range(min(features.cut for features in batch), tier.last + 1):
        rows = [row for row, outcome in enumerate(outcomes) if _at(outcome, index)]
        if not rows:
            continue
        start = time.perf_counter_ns()
        output = tier.segments[index].run(_stack([outcomes[row] for row in rows]))
        _charge(outcomes, rows, f"segment{index}", start)
        for position, row in enumerate(rows):
            outcomes[row].features = Features(index + 1, output[position : position + 1])
        spec = tier.bundle.exit_at(index + 1)
        if spec is None:
            continue
        if not policy.may_answer(spec.cut):
            for row in rows:
                outcomes[row].unasked = outcomes[row].features
            continue
        start = time.perf_counter_ns()
        for row, said in zip(rows, _ask(output, spec, tier), strict=True):
            outcomes[row].best, outcomes[row].unasked = said, None
            if policy.answers(said):
                outcomes[row].answer, outcomes[row].features = said, None
            elif policy.withholds(said):
                outcomes[row].withheld += (said.exit,)
        _charge(outcomes, rows, f"exit{spec.cut}", start)
    return outcomes


def last_word(outcome: Outcome, tier: Tier) -> ExitOutput | None:
    """What the tier says of an unfinished frame when nothing above answers: its deepest exit's word, confident or not.

    An exit whose threshold forbids it to answer is asked only now, so that it costs nothing while the uplink works.
    """
    if outcome.unasked is not None:
        start = time.perf_counter_ns()
        spec = tier.bundle.exit_at(outcome.unasked.cut)
        assert spec is not None, "unasked features lie at an exit"
        (outcome.best,) = _ask(outcome.unasked.tensor, spec, tier)
        outcome.unasked = None
        _charge([outcome], [0], f"exit{spec.cut}", start)
    return outcome.best


def warm_up(tier: Tier, entry: int | None = None, most: int = 1) -> None:
    """Run every graph of the tier once: a session's first run is several times slower than the next.

    With `most`, those behind the cut `entry` are then run with every number of frames up to it, as long as WARM_UP_S
    lasts. A session keeps the room that a size has needed, so a batch takes it now, and not when frames first come so
    close together, perhaps after hours.

    Raises:
        BundleError: a graph does not run, or does not fit the cut it hangs at.
    """
    _warm_up(tier, tier.first, 1)
    end_s = time.monotonic() + WARM_UP_S
    for size in range(most, 1, -1):  # the largest needs most of the room that all of them do
        for _ in range(2):  # onnxruntime plans a size's memory from its first run
            if time.monotonic() < end_s:
                _warm_up(tier, tier.first if entry is None else entry, size)


def _warm_up(tier: Tier, entry: int, size: int) -> None:
    cuts = tier.bundle.manifest.cuts
    tensor: Tensor = np.zeros((size, *cuts[entry].shape), cuts[entry].dtype)
    for index in range(entry, tier.last + 1):
        tensor = tier.segments[index].run(tensor)
        spec = cuts[index + 1]
        if tensor.shape[1:] != spec.shape or tensor.dtype != spec.dtype:
            raise BundleError(
                f"segment {index} gives {tensor.shape[1:]} {tensor.dtype}, the manifest says {spec.shape}"
            )
        if index + 1 in tier.heads:
            _warm_up_head(tier, index + 1, tensor)


def _warm_up_head(tier: Tier, cut: int, tensor: Tensor) -> None:
    _, distance = tier.heads[cut].ask(tensor)
    spec = tier.bundle.exit_at(cut)
    if (
        spec is not None
        and spec.distance_limit is not None
        and (distance is None or distance.shape != tensor.shape[:1])
    ):
        raise BundleError(f"{spec.file} gives no distance, though the manifest has a limit for it; export again")


def _ask(batch: Tensor, spec: ExitSpec, tier: Tier) -> list[ExitOutput]:
    """The exit's word on each of (batch, …). The last exit has no head: the last segment's output is what it says."""
    head = tier.heads.get(spec.cut)
    outputs, distances = (batch, None) if head is None else head.ask(batch)
    said = [tier.task.read(row, spec) for row in outputs]
    if distances is None:
        return said
    return [replace(output, distance=float(distance)) for output, distance in zip(said, distances, strict=True)]


def _at(outcome: Outcome, cut: int) -> bool:
    return outcome.features is not None and outcome.features.cut == cut


def _stack(outcomes: Sequence[Outcome]) -> Tensor:
    tensors = [outcome.features.tensor for outcome in outcomes if outcome.features is not None]
    return tensors[0] if len(tensors) == 1 else np.concatenate(tensors)


def _charge(outcomes: Sequence[Outcome], rows: Sequence[int], stage: str, start_ns: int) -> None:
    elapsed_ms = (time.perf_counter_ns() - start_ns) / 1e6
    for row in rows:
        outcomes[row].timings[stage] = elapsed_ms
