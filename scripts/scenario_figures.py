"""What a run of a scenario came to, phase by phase. Pure; `scripts/bench_scenario` prints it.

Every frame that the camera gave until the end of the scenario counts in the phase in which it was grabbed. It is *in
time* when it has an answer that is not older than the budget, and *undegraded* when that answer is also the one that
was aimed for. Agreement is with the whole model of the bundle on the same frame, by the bundle's task: equal labels, or
F1 of matched boxes.

Settling, of a phase in which something passes: the time from its beginning until the share of undegraded frames reaches
`SHARE` of what it is in the phase's second half, and keeps it, second by second, for `KEEPS_S`.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from itertools import count, islice

import msgspec
import numpy as np

from export.agreement import pooled
from runtime.datatypes import Dropped, Result
from runtime.scenario import Phase, Scenario

SHARE = 0.8
KEEPS_S = 3
OVERWRITTEN = "stale"  # the device's word for a frame that a later one took the place of, before it was looked at

Judge = Callable[[Result], tuple[int, int]]  # what an answer has in common with the whole model's: (same, all)


class Agreed(msgspec.Struct, frozen=True):
    """Agreement, with an interval by resampling whole seconds, as frames of one second resemble each other."""

    share: float
    low: float
    high: float
    n: int  # frames


class PhaseFigures(msgspec.Struct, frozen=True, kw_only=True):
    """One phase of one run."""

    name: str
    start_s: float
    duration_s: float
    link: bool  # whether anything passes
    frames: int  # answered or dropped
    answered: int
    in_time: int
    undegraded: int  # of those in time
    unflagged: int  # older than the budget and told as fresh: to be 0
    by: Mapping[str, int]  # tier, or "repeated" → undegraded frames
    degraded: Mapping[str, int]  # reason → frames
    dropped: Mapping[str, int]  # reason → frames
    age_p50_ms: float | None  # of all answers; None: there are none
    age_p95_ms: float | None
    undegraded_age_p95_ms: float | None
    agreement: Agreed | None  # of those in time
    undegraded_agreement: Agreed | None
    bytes_up: int
    bytes_down: int
    settled_s: float | None  # None: never, or nothing to settle to


def settled_s(frames: Sequence[tuple[float, bool]], start_s: float, duration_s: float) -> float | None:
    """When a phase has settled, in seconds from its beginning; None: it never does.

    Args:
        frames: of the phase, in the order of time: when it was due, and whether it came to what was aimed for.
        start_s: of the phase, on the same clock.
        duration_s: of the phase.
    """
    steady = [good for at_s, good in frames if at_s >= start_s + duration_s / 2]
    if not any(steady):
        return None
    least = SHARE * sum(steady) / len(steady)
    for first, (from_s, _) in enumerate(frames):
        if from_s + KEEPS_S > start_s + duration_s:
            return None
        seconds: list[list[bool]] = [[] for _ in range(KEEPS_S)]
        for at_s, good in frames[first:]:
            second = int(at_s - from_s)
            if second >= KEEPS_S:
                break
            seconds[second].append(good)
        if all(marks and sum(marks) / len(marks) >= least for marks in seconds):
            return max(0.0, from_s - start_s)
    return None


def agreed(marks: Sequence[tuple[float, int, int]]) -> Agreed | None:
    """Agreement over frames, each with its second, what is the same and all there is; None of none."""
    if not marks:
        return None
    seconds: dict[int, list[int]] = {}
    for at_s, same, total in marks:
        second = seconds.setdefault(math.floor(at_s), [0, 0])
        second[0] += same
        second[1] += total
    found = pooled(np.array(list(seconds.values()), np.int64))
    return Agreed(round(found.share, 4), round(found.low, 4), round(found.high, 4), len(marks))


def figures(
    lines: Sequence[tuple[float, Result | Dropped]],
    scenario: Scenario,
    *,
    fps: float,
    captured: int,
    budget_ms: float,
    link_bytes: Sequence[tuple[int, int]],
    judge: Judge,
) -> tuple[PhaseFigures, ...]:
    """The figures of every phase.

    Args:
        lines: what became of each frame that was taken from the camera, in any order; of a Result with the seconds of
            the scenario at which its frame was grabbed. Of other frames that is told by those that they lie between.
        scenario: the phases, and when the camera stalled.
        fps: frames of the source that are due in a second.
        captured: how many the camera gave; those without a line were overwritten by later ones.
        budget_ms: an older answer is not in time.
        link_bytes: for each phase the bytes up and down.
        judge: says what an answer is worth.
    """
    told = {line.frame for _, line in lines}
    untold = (index for index in count() if index not in told and not _stalled(index / fps, scenario))
    lost = [Dropped("", index, OVERWRITTEN) for index in islice(untold, max(0, captured - len(told)))]
    members: list[list[tuple[float, Result | Dropped]]] = [[] for _ in scenario.phases]
    known = {line.frame: at_s for at_s, line in lines if isinstance(line, Result)}
    ended = sorted((*(line for _, line in lines), *lost), key=lambda line: line.frame)
    times_s = _between(known, [line.frame for line in ended], fps)
    for at_s, line in zip(times_s, ended, strict=True):
        if at_s < scenario.duration_s:
            members[scenario.index(at_s)].append((at_s, line))
    return tuple(
        _phase(phase, own, budget_ms, passed, judge)
        for phase, own, passed in zip(scenario.phases, members, link_bytes, strict=True)
    )


def _between(known: Mapping[int, float], frames: Sequence[int], fps: float) -> list[float]:
    """When frames were grabbed, of some of which it is known; before the first and after the last at the usual pace."""
    if not known:
        return [frame / fps for frame in frames]
    places = np.array(sorted(known))
    times_s = np.array([known[place] for place in places])
    inner = np.interp(frames, places, times_s)
    outer = np.minimum(np.array(frames) - places[0], 0) + np.maximum(np.array(frames) - places[-1], 0)
    return [float(at_s) for at_s in inner + outer / fps]


def _stalled(at_s: float, scenario: Scenario) -> bool:
    return any(start_s <= at_s < start_s + length_s for start_s, length_s in scenario.stalls)


def _phase(
    phase: Phase,
    members: Sequence[tuple[float, Result | Dropped]],
    budget_ms: float,
    passed: tuple[int, int],
    judge: Judge,
) -> PhaseFigures:
    results = [(at_s, line) for at_s, line in members if isinstance(line, Result)]
    in_time = [(at_s, line) for at_s, line in results if line.age_ms <= budget_ms]
    full = [(at_s, line) for at_s, line in in_time if line.degraded is None]
    marks = [(at_s, line.degraded is None, *judge(line)) for at_s, line in in_time]
    good = {line.frame for _, line in full}
    steps = [(at_s, line.frame in good) for at_s, line in members]
    return PhaseFigures(
        name=phase.name,
        start_s=phase.start_s,
        duration_s=phase.duration_s,
        link=phase.open,
        frames=len(members),
        answered=len(results),
        in_time=len(in_time),
        undegraded=len(full),
        unflagged=sum(line.age_ms > budget_ms and line.degraded is None for _, line in results),
        by=dict(Counter(line.tier if line.repeats is None else "repeated" for _, line in full)),
        degraded=dict(Counter(line.degraded.split(":")[0] for _, line in results if line.degraded is not None)),
        dropped=dict(Counter(line.dropped.split(":")[0] for _, line in members if isinstance(line, Dropped))),
        age_p50_ms=_age(results, 50),
        age_p95_ms=_age(results, 95),
        undegraded_age_p95_ms=_age(full, 95),
        agreement=agreed([(at_s, same, total) for at_s, _, same, total in marks]),
        undegraded_agreement=agreed([(at_s, same, total) for at_s, whole, same, total in marks if whole]),
        bytes_up=passed[0],
        bytes_down=passed[1],
        settled_s=settled_s(steps, phase.start_s, phase.duration_s) if phase.open else None,
    )


def _age(results: Sequence[tuple[float, Result]], percent: float) -> float | None:
    return round(float(np.percentile([line.age_ms for _, line in results], percent)), 1) if results else None
