"""A frame on its way through a device, and the Result that it ends in. Pure; times are given."""

from __future__ import annotations

from dataclasses import dataclass

from runtime import cascade
from runtime.course import Course
from runtime.datatypes import ExitOutput, Features, Result
from runtime.task import Task
from runtime.uplink import Sent


@dataclass(frozen=True, slots=True)
class Taken:
    """A frame on its way to an answer."""

    camera: str
    index: int
    captured_ns: int  # time.monotonic_ns() at the grab
    size: tuple[int, int]  # height and width of the camera's picture
    features: Features  # what goes up, if it must
    outcome: cascade.Outcome | None  # of the local segments; None when they have not run
    timings: dict[str, float]
    course: Course


@dataclass(frozen=True, slots=True)
class Said:
    """An answer to a frame, and who gave it."""

    output: ExitOutput
    sent: Sent[Taken] | None = None  # how it went up, if it did, whoever answers now
    tier: str | None = None  # above; None: this device
    degraded: str | None = None  # why it is not the answer that was aimed for
    repeats: int | None = None  # the frame whose answer it is, if that of an earlier one


def conclude(
    frame: Taken, said: Said, task: Task, *, named: str, here: str, kept: float | None, budget_ms: float, now_ns: int
) -> Result:
    """The Result of a frame whose answer is there at `now_ns`.

    Args:
        frame: what was taken.
        said: the answer.
        task: that of the bundle.
        named: the task's name.
        here: the name of the device's tier.
        kept: what a repeated answer keeps of agreement.
        budget_ms: an older answer is `degraded: deadline`, whoever gives it.
        now_ns: on the clock of `captured_ns`.
    """
    course, output, sent, repeats = frame.course, said.output, said.sent, said.repeats
    timings = frame.timings if sent is None else {**frame.timings, "encode": sent.encode_ms}
    age_ms = (now_ns - frame.captured_ns) / 1e6
    degraded = said.degraded or ("deadline" if age_ms > budget_ms else None)
    return Result(
        camera=frame.camera,
        frame=frame.index,
        task=named,
        label=task.words(output.answer),
        confidence=output.confidence,
        answer=task.told(output.answer, *frame.size),
        tier=said.tier or here,
        exit=output.exit,
        agreement=None if degraded is not None else course.agreement(output.exit) if repeats is None else kept,
        codec=None if sent is None else sent.way.codec,
        cut=None if sent is None else sent.way.cut,
        bytes_up=0 if sent is None else sent.bytes_up,
        age_ms=age_ms,
        timings={stage: round(took_ms, 3) for stage, took_ms in timings.items()},
        degraded=degraded,
        variant=0 if repeats is not None else course.variant if said.tier is None else course.sent_variant,
        repeats=repeats,
    )
