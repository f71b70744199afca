"""What a run came to: who answered, what it cost to send, how old the answers were. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
import numpy as np

from runtime.datatypes import Dropped, Result
from runtime.phases import PhaseSummary, table


class Move(msgspec.Struct, frozen=True, kw_only=True):
    """A plan that a device has taken, of those with an `[objective]` (docs/planner.md)."""

    at_s: float  # since the first frame; 0 for those taken before it
    plan: str  # in words
    why: str
    reason: str
    rung: str


class TierSummary(msgspec.Struct, frozen=True, kw_only=True):
    """The frames that one tier answered."""

    frames: int
    share: float  # of all frames that ended, dropped ones included
    age_p50_ms: float
    age_p95_ms: float


class Summary(msgspec.Struct, frozen=True, kw_only=True):
    """A run in figures."""

    frames: int  # answered or dropped
    answered: int
    dropped: Mapping[str, int]  # reason → frames, those a camera overwrote before they were taken included
    degraded: Mapping[str, int]  # reason → frames
    tiers: Mapping[str, TierSummary]
    bytes_up_per_frame: float  # from the device, all of MQTT, over all frames that were answered
    bytes_up_per_sent_frame: float | None
    uplink_bytes_per_frame: float | None  # from the edge node to the cloud
    jpeg_bytes_per_frame: Mapping[str, float]  # quality → the same frames, same packets and topics
    phases: tuple[PhaseSummary, ...] = ()  # of the scenario, where there was one
    plans: Mapping[str, float] = {}  # plan → seconds that it held, where there was an objective

    @property
    def degraded_frames(self) -> int:
        """Frames that were answered, but not as was aimed for."""
        return sum(self.degraded.values())


def summarize(
    lines: Sequence[Result | Dropped],
    *,
    tiers: Sequence[str],
    stale: Mapping[str, int],
    uplink_bytes: int | None,
    jpeg_bytes: Mapping[str, float],
    phases: tuple[PhaseSummary, ...] = (),
    plans: Mapping[str, float] | None = None,
) -> Summary:
    """Sum up the lines of one run.

    Args:
        lines: every Result and every Dropped, in any order.
        tiers: names of the tiers that took part, from the device up.
        stale: reason → frames that never left the camera's slot.
        uplink_bytes: all that the edge node sent further up; None without such a node.
        jpeg_bytes: quality → mean bytes of a frame sent as a JPEG.
        phases: of the scenario.
        plans: plan → seconds that it held.
    """
    results = [line for line in lines if isinstance(line, Result)]
    dropped = dict(stale)
    for line in lines:
        if isinstance(line, Dropped):
            dropped[line.dropped] = dropped.get(line.dropped, 0) + 1
    degraded: dict[str, int] = {}
    for result in results:
        if result.degraded is not None:
            degraded[result.degraded] = degraded.get(result.degraded, 0) + 1
    frames = len(results) + sum(dropped.values())
    sent = [result.bytes_up for result in results if result.bytes_up]
    return Summary(
        frames=frames,
        answered=len(results),
        dropped=dropped,
        degraded=degraded,
        tiers={
            tier: _tier([result for result in results if result.tier == tier], frames)
            for tier in dict.fromkeys([*tiers, *(result.tier for result in results)])
        },
        bytes_up_per_frame=sum(sent) / max(1, len(results)),
        bytes_up_per_sent_frame=sum(sent) / len(sent) if sent else None,
        uplink_bytes_per_frame=None if uplink_bytes is None else uplink_bytes / max(1, len(results)),
        jpeg_bytes_per_frame=jpeg_bytes,
        phases=phases,
        plans=plans or {},
    )


def held(moves: Sequence[Move], end_s: float) -> dict[str, float]:
    """How many seconds each plan held, of moves in the order of time and up to `end_s`; the longest first."""
    seconds: dict[str, float] = {}
    ends = [*(move.at_s for move in moves[1:]), end_s]
    for move, until_s in zip(moves, ends, strict=False):  # without a move there is an end too many
        seconds[move.plan] = seconds.get(move.plan, 0.0) + max(0.0, until_s - move.at_s)
    return dict(sorted(seconds.items(), key=lambda pair: -pair[1]))


def _tier(results: Sequence[Result], frames: int) -> TierSummary:
    ages = [result.age_ms for result in results] or [0.0]
    return TierSummary(
        frames=len(results),
        share=len(results) / max(1, frames),
        age_p50_ms=float(np.percentile(ages, 50)),
        age_p95_ms=float(np.percentile(ages, 95)),
    )


def text(summary: Summary) -> str:
    """The summary for a person, some lines of plain text."""
    lines = [f"{summary.frames} frames, {summary.answered} answered"]
    lines[0] += "".join(f", {count} dropped ({reason})" for reason, count in summary.dropped.items())
    lines.append("")
    lines.append(f"  {'tier':<10}{'answered':>10}{'share':>9}{'age p50':>11}{'age p95':>11}")
    for name, tier in summary.tiers.items():
        ages: tuple[Any, Any] = (f"{tier.age_p50_ms:.1f} ms", f"{tier.age_p95_ms:.1f} ms")
        if tier.frames == 0:
            ages = ("-", "-")
        lines.append(f"  {name:<10}{tier.frames:>10}{tier.share:>9.1%}{ages[0]:>11}{ages[1]:>11}")
    if summary.degraded:
        lines.append("")
        lines += [f"  degraded: {count} frames, {reason}" for reason, count in summary.degraded.items()]
    lines.append("")
    lines.append(f"  {'bytes up per frame, all of MQTT counted':<46}{'':>2}")
    sent = summary.bytes_up_per_sent_frame
    lines.append(f"    {'this run, over all answered frames':<40}{summary.bytes_up_per_frame:>10,.0f}")
    if sent is not None:
        lines.append(f"    {'this run, over the frames that were sent':<40}{sent:>10,.0f}")
    if summary.uplink_bytes_per_frame is not None:
        lines.append(f"    {'edge to cloud, over all answered frames':<40}{summary.uplink_bytes_per_frame:>10,.0f}")
    for quality, size in summary.jpeg_bytes_per_frame.items():
        lines.append(f"    {f'every frame as JPEG q{quality}, model size':<40}{size:>10,.0f}")
    if summary.plans:
        lines += ["", "  plans, and for how long"]
        lines += [f"    {plan:<52}{seconds:>8.1f} s" for plan, seconds in summary.plans.items()]
    if summary.phases:
        lines += ["", table(summary.phases)]
    return "\n".join(lines)
