"""Chooses among a bundle's candidates by the operator's objective, and says why in one sentence. Pure.

Candidates that keep all limits come first; then those that keep all but the agreement; then those that keep only
the limit on bytes; then the rest. Among the first the objective decides, among the second agreement, among the third
age, among the last bytes. Ties go to fewer bytes, then to the younger answer, then to the first in the table, so that
the same knowledge gives the same decision.

A move away from a candidate that has come to miss a limit, or of whose frames the link carries too few, is made at
once. Any other must keep the limits with a margin, gain enough, and have done both for a while (`HOLD_MS`, doubled each
time such a move had to be taken back soon). With knowledge that stays as it is, a plan therefore moves no more than
twice, and never back and forth.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from runtime.estimates import START_GOODPUT
from runtime.ladder import FREE, LOCAL, RUNGS, Limits
from runtime.objective import Objective
from runtime.plan_tables import Candidate, Estimates, Predictions, Tables

HOLD_MS, MAX_HOLD_MS = 1000.0, 16_000.0
REGRET_MS = 10_000.0  # a move taken back within so long was one too many
OUTAGE_MS = 5000.0  # without sending: what was regretted before was of another link
CALM_MS = 60_000.0  # and after so long without one, all is forgiven
LATENCY_MARGIN, BYTES_MARGIN = 0.85, 0.9
LEAST_CARRIED = 0.8  # share of the frames: a way of which the link carries less is left at once
GAIN_AGREEMENT, GAIN_RATIO = 0.005, 0.1
HOPE_RATIO = 4.0  # how much better a link may be than it is taken for, where nothing is known of it


@dataclass(frozen=True, slots=True)
class Decision:
    """What is in force, what it was predicted to give, and why."""

    index: int  # of the candidate in the tables
    candidate: Candidate
    latency_ms: float
    bytes: float
    frame_bytes: float  # were the link to carry all frames
    agreement: float
    rung: str
    reason: str  # for counters: start, latency, bytes, agreement, oversize, goodput, better, or the rung that forced it
    why: str  # one sentence with numbers
    kept: bool  # whether all limits are kept, by prediction
    since_ns: int
    wished_ns: int | None = None  # since when another has been better all the time
    hold_ms: float = HOLD_MS
    risen_ns: int | None = None  # when the last move was made that no limit forced


def plan(
    tables: Tables,
    known: Estimates,
    objective: Objective,
    now_ns: int,
    current: Decision | None,
    *,
    budget_ms: float,
    limits: Limits = FREE,
) -> Decision:
    """Decide how frames are treated from now on.

    Args:
        tables: the candidates.
        known: what is known now.
        objective: what the operator wants.
        now_ns: the time.
        current: the decision in force; None: there is none yet.
        budget_ms: after which an answer is worth nothing.
        limits: what the ladder leaves.

    Returns:
        The decision: a new one with a new `since_ns` and sentence, or `current` with its predictions brought up to
        date.
    """
    known = careful(known)
    said = tables.predict(known, _latency_limit(objective, budget_ms))
    allowed = tables.allowed(said, limits)
    levels, tight = _levels(said, known, objective, budget_ms)
    levels = np.where(allowed, levels, np.int64(FORBIDDEN))
    best = _best(said, levels, objective)
    if current is None:
        why = f"{tables.candidates[best].words()}: {_figures(best, said, known, objective, budget_ms)}"
        return _decide(tables, said, best, levels, limits, "start", why, now_ns)
    here = current.index
    tight = np.where(allowed, tight, np.int64(FORBIDDEN))
    safe = best if tight[best] == levels[best] else _best(said, tight, objective)
    if levels[best] < levels[here]:
        target = safe if tight[safe] < levels[here] else best
        reason, why = _forced(tables, said, here, target, levels, known, objective, budget_ms, limits)
        decided = _decide(tables, said, target, levels, limits, reason, why, now_ns)
        return replace(decided, hold_ms=_held_ms(current, now_ns))
    hold_ms = current.hold_ms
    if now_ns - (current.risen_ns or current.since_ns) > CALM_MS * 1e6:
        hold_ms = HOLD_MS
    stays = replace(
        _decide(tables, said, here, levels, limits, current.reason, current.why, current.since_ns),
        hold_ms=hold_ms,
        risen_ns=current.risen_ns,
    )
    if safe == here or tight[safe] > levels[here] or not _gains(said, here, safe, int(levels[here]), objective):
        return stays
    if said.share[here] < LEAST_CARRIED and said.share[safe] > said.share[here]:
        reason, why = "goodput", _uncarried(tables, said, here, safe, known)
        decided = _decide(tables, said, safe, levels, limits, reason, why, now_ns)
        return replace(decided, hold_ms=_held_ms(current, now_ns))
    wished_ns = now_ns if current.wished_ns is None else current.wished_ns
    # The way back from an outage, short as it was, has been waited for; after a long one nothing is left to regret.
    returns = current.rung == RUNGS[LOCAL] and limits.sends
    if returns and now_ns - current.since_ns >= OUTAGE_MS * 1e6:
        hold_ms = HOLD_MS
    if now_ns - wished_ns < hold_ms * 1e6 and not returns:
        return replace(stays, wished_ns=wished_ns)
    why = (
        f"{_change(tables.candidates[here], tables.candidates[safe])}: "
        f"{_figures(safe, said, known, objective, budget_ms)}, {_figures(here, said, known, None, budget_ms)} before"
    )
    decided = _decide(tables, said, safe, levels, limits, "better", why, now_ns)
    if said.frame_bytes[safe] < said.frame_bytes[here]:  # one taken back, if it was lately that more bytes were better
        return replace(decided, hold_ms=_held_ms(current, now_ns))
    return replace(decided, hold_ms=hold_ms, risen_ns=now_ns)


def _held_ms(current: Decision, now_ns: int) -> float:
    """For how long the next move that nothing forces has to be worth it, when `current` is given up."""
    soon = current.risen_ns is not None and now_ns - current.risen_ns < REGRET_MS * 1e6
    return min(MAX_HOLD_MS, 2 * current.hold_ms) if soon else current.hold_ms


def probe(
    tables: Tables, known: Estimates, objective: Objective, current: Decision, *, budget_ms: float, limits: Limits
) -> Candidate | None:
    """What to send one frame with to learn whether the link has become better; None: there is nothing to learn.

    While nothing may go up it is the cheapest way of all.
    """
    known = careful(known)
    if not limits.sends or current.candidate.way is None:
        said = tables.predict(known)
        cheapest = np.where(tables.sending & said.fits, said.transfer_ms, np.inf)
        index = int(np.argmin(cheapest))
        return tables.candidates[index] if math.isfinite(cheapest[index]) else None
    link = known.link
    assert link.goodput is not None, "`careful` knows one"
    better = replace(known, link=replace(link, goodput=link.hope or HOPE_RATIO * link.goodput, jitter_ms=0.0))
    said = tables.predict(better)
    levels, _ = _levels(said, better, objective, budget_ms)
    levels = np.where(tables.allowed(said, limits), levels, np.int64(FORBIDDEN))
    index = _best(said, levels, objective)
    found = tables.candidates[index]
    here = current.index
    if found.way is None or levels[index] > levels[here]:
        return None
    better_there = levels[index] < levels[here] or _gains(said, here, index, int(levels[here]), objective)
    return found if better_there and found.way != current.candidate.way else None


def careful(known: Estimates) -> Estimates:
    """The same with a modest link where none is known."""
    if known.link.goodput is not None:
        return known
    return replace(known, link=replace(known.link, goodput=START_GOODPUT, rtt_ms=known.link.rtt_ms or 50.0))


KEPT, UNLIKE, LATE, COSTLY, FORBIDDEN = range(5)  # levels: which limits a candidate keeps
Levels = NDArray[np.int64]


def _levels(said: Predictions, known: Estimates, objective: Objective, budget_ms: float) -> tuple[Levels, Levels]:
    """Which limits each candidate keeps: as they are, and with the margins that a move needs."""
    most_ms, most_bytes = _latency_limit(objective, budget_ms), objective.max_bytes_per_second or math.inf
    like = said.agreement >= (objective.min_agreement or 0.0)
    found = []
    for latency_margin, bytes_margin in ((1.0, 1.0), (LATENCY_MARGIN, BYTES_MARGIN)):
        cheap = said.bytes * known.frames_per_second + known.other_bytes <= most_bytes * bytes_margin
        # What stalls make late the local exit answers at the limit; that is no reason to send nothing at all.
        quick = said.steady_ms <= most_ms * latency_margin
        levels = np.where(~cheap, COSTLY, np.where(~quick, LATE, np.where(~like, UNLIKE, KEPT)))
        found.append(levels.astype(np.int64))
    return found[0], found[1]


def _latency_limit(objective: Objective, budget_ms: float) -> float:
    return min(budget_ms, objective.latency_p95_ms or budget_ms)


def _best(said: Predictions, levels: Levels, objective: Objective) -> int:
    """The candidate that stands first."""
    level = int(levels.min())
    rows = np.flatnonzero(levels == level)
    for values in (_metric(said, level, objective), said.bytes, said.latency_ms):
        here = values[rows]
        least = here.min()
        rows = rows[here <= least + 1e-9 * max(1.0, abs(least))]
    return int(rows[0])


def _metric(said: Predictions, level: int, objective: Objective) -> NDArray[np.float64]:
    """What decides within a level; less is better."""
    aim = {UNLIKE: "agreement", LATE: "latency", COSTLY: "bytes"}.get(level, objective.optimize)
    return {"agreement": -said.agreement, "latency": said.latency_ms, "bytes": said.bytes}[aim]


def _gains(said: Predictions, here: int, there: int, level: int, objective: Objective) -> bool:
    """Whether a move is worth it, though nothing forces it."""
    metric = _metric(said, level, objective)
    gain = float(metric[here] - metric[there])
    least = GAIN_AGREEMENT if metric[here] <= 0 else GAIN_RATIO * float(metric[here])
    if gain > least:
        return True
    # As good, for much fewer bytes.
    return gain >= -1e-9 and float(said.bytes[there]) < (1 - 2 * GAIN_RATIO) * float(said.bytes[here])


def _decide(
    tables: Tables,
    said: Predictions,
    index: int,
    levels: Levels,
    limits: Limits,
    reason: str,
    why: str,
    since_ns: int,
) -> Decision:
    return Decision(
        index=index,
        candidate=tables.candidates[index],
        latency_ms=float(said.latency_ms[index]),
        bytes=float(said.bytes[index]),
        frame_bytes=float(said.frame_bytes[index]),
        agreement=float(said.agreement[index]),
        rung=limits.rung,
        reason=reason,
        why=why,
        kept=bool(levels[index] == KEPT),
        since_ns=since_ns,
    )


def _forced(
    tables: Tables,
    said: Predictions,
    here: int,
    there: int,
    levels: Levels,
    known: Estimates,
    objective: Objective,
    budget_ms: float,
    limits: Limits,
) -> tuple[str, str]:
    """Reason and sentence of a move that a limit forces."""
    change = _change(tables.candidates[here], tables.candidates[there])
    level = int(levels[here])
    if level == FORBIDDEN and not said.fits[here]:
        size = f"a large frame has {said.large_bytes[here]:,.0f} bytes"
        return "oversize", f"{change}: {size}, the broker takes {known.max_packet_bytes:,.0f}"
    if level == FORBIDDEN:
        return limits.rung, f"{change}: {limits.reason}"
    if level == COSTLY:
        rate = float(said.bytes[here]) * known.frames_per_second + known.other_bytes
        would = f"{rate:,.0f} bytes a second would go up, {known.other_bytes:,.0f} of them beside frames"
        return "bytes", f"{change}: {would}, {objective.max_bytes_per_second:,.0f} allowed"
    if level == UNLIKE:
        lacks = f"agreement would be {said.agreement[here]:.3f}, {objective.min_agreement:g} is wanted"
        return "agreement", f"{change}: {lacks}"
    limit_ms = _latency_limit(objective, budget_ms)
    whole_ms = f"{said.latency_ms[here]:,.0f} ms in all, {limit_ms:,.0f} ms allowed"
    if tables.candidates[here].way is None:
        return "latency", f"{change}: it would take {whole_ms}"
    link = known.link
    speed = (link.goodput or 0.0) * 8 / 1000
    size = f"{said.transfer_ms[here] * (link.goodput or 0.0) / 1e6:,.1f} kB"
    took = f"{size} would take {said.transfer_ms[here]:,.0f} ms at {speed:,.0f} kbit/s"
    return "latency", f"{change}: {took}, {whole_ms}"


def _uncarried(tables: Tables, said: Predictions, here: int, there: int, known: Estimates) -> str:
    """Sentence of a move away from what the link cannot carry."""
    change, speed = _change(tables.candidates[here], tables.candidates[there]), (known.link.goodput or 0.0) * 8 / 1000
    wanted = said.wanted[here] * 8 / 1000
    other = known.other_bytes * 8 / 1000
    return f"{change}: {wanted:,.0f} kbit/s would go up, {other:,.0f} beside frames, the link carries {speed:,.0f}"


def _change(here: Candidate, there: Candidate) -> str:
    """A move in words, as short as can be."""
    if here.way is not None and there.way is not None and replace(here, way=there.way, parameter=0.0) == replace(
        there, parameter=0.0
    ) and (here.way.cut, here.way.codec) == (there.way.cut, there.way.codec):  # fmt: skip
        return f"rate {there.parameter:g} instead of {here.parameter:g}"
    return f"{there.words()} instead of {here.words()}"


def _figures(index: int, said: Predictions, known: Estimates, objective: Objective | None, budget_ms: float) -> str:
    """What a candidate would give, in words."""
    text = f"agreement {said.agreement[index]:.3f}, {said.bytes[index]:,.0f} bytes a frame"
    text += f", p95 {said.latency_ms[index]:,.0f} ms"
    if objective is None:
        return text
    speed = (known.link.goodput or 0.0) * 8 / 1000
    return f"{text} of {_latency_limit(objective, budget_ms):,.0f} allowed at {speed:,.0f} kbit/s"
