"""What a run came to in each phase of its scenario. Pure."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence

import msgspec
import numpy as np

from runtime.datatypes import Dropped, Result
from runtime.scenario import Scenario


class PhaseSummary(msgspec.Struct, frozen=True, kw_only=True):
    """The frames that were grabbed in one phase; a dropped one counts where it was dropped."""

    name: str
    start_s: float  # from the first frame
    duration_s: float | None  # None: to the end of the run
    frames: int  # answered, or dropped after the device had taken them
    in_time: int  # answered as was aimed for, within the budget
    degraded: Mapping[str, int]  # reason, without what follows its colon → frames
    stale: int  # older than the budget and not flagged, so taken for fresh by who reads them
    late: int  # older than the budget and flagged
    dropped: Mapping[str, int]  # reason → frames
    age_p50_ms: float | None  # of all answers; None without any
    age_p95_ms: float | None
    bytes_up: int  # over the link itself: everything that MQTT sent in that time; headers of TCP and IP not counted
    bytes_down: int


def tabulate(
    lines: Sequence[tuple[float, Result | Dropped]],
    scenario: Scenario,
    budget_ms: float,
    link_bytes: Sequence[tuple[int, int]],
) -> tuple[PhaseSummary, ...]:
    """Sum up a run by phase.

    Args:
        lines: for each what it is of, in seconds of the scenario: a Result of when its frame was grabbed, a Dropped of
            when that was told.
        scenario: the phases.
        budget_ms: an older answer is not in time.
        link_bytes: for each phase the bytes up and down.
    """
    by_phase: list[list[Result | Dropped]] = [[] for _ in scenario.phases]
    for at_s, line in lines:
        by_phase[scenario.index(at_s)].append(line)
    found = []
    for phase, members, (up, down) in zip(scenario.phases, by_phase, link_bytes, strict=True):
        results = [line for line in members if isinstance(line, Result)]
        ages = [result.age_ms for result in results]
        old = [result for result in results if result.age_ms > budget_ms]
        flagged = [result for result in results if result.degraded is not None]
        found.append(
            PhaseSummary(
                name=phase.name,
                start_s=phase.start_s,
                duration_s=None if math.isinf(phase.duration_s) else phase.duration_s,
                frames=len(members),
                in_time=sum(result.degraded is None and result.age_ms <= budget_ms for result in results),
                degraded=dict(Counter(str(result.degraded).split(":")[0] for result in flagged)),
                stale=sum(result.degraded is None for result in old),
                late=sum(result.degraded is not None for result in old),
                dropped=dict(Counter(line.dropped.split(":")[0] for line in members if isinstance(line, Dropped))),
                age_p50_ms=float(np.percentile(ages, 50)) if ages else None,
                age_p95_ms=float(np.percentile(ages, 95)) if ages else None,
                bytes_up=up,
                bytes_down=down,
            )
        )
    return tuple(found)


def table(phases: Sequence[PhaseSummary]) -> str:
    """The phases for a person, a line each."""
    width = min(40, max([len("phase"), *(len(phase.name) for phase in phases)]))
    head = ("from", "frames", "in time", "degraded", "stale", "late", "dropped", "age p50", "age p95")
    lines = [f"  {'phase':<{width}}" + "".join(f"{word:>9}" for word in head) + f"{'bytes up':>13}{'bytes down':>13}"]
    for phase in phases:
        counts = (
            phase.frames,
            phase.in_time,
            sum(phase.degraded.values()),
            phase.stale,
            phase.late,
            sum(phase.dropped.values()),
        )
        ages = "".join(f"{'-' if age is None else f'{age:,.0f} ms':>9}" for age in (phase.age_p50_ms, phase.age_p95_ms))
        lines.append(
            f"  {phase.name[:width]:<{width}}{phase.start_s:>7.0f} s"
            + "".join(f"{count:>9,}" for count in counts)
            + f"{ages}{phase.bytes_up:>13,}{phase.bytes_down:>13,}"
        )
        reasons = [f"{count:,} {reason}" for reason, count in phase.degraded.items()]
        reasons += [f"{count:,} dropped: {reason}" for reason, count in phase.dropped.items()]
        lines += [f"    {'; '.join(reasons)}"] if reasons else []
    return "\n".join(lines)
