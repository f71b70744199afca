"""A device's world for scripts/bench_planner: frames, a link and a node above it, in virtual time.

The link is the rig's own model of one TCP connection (runtime/lane.py, with its stalls), by a scenario of the rig. What
is left out: the processors' load, and the broker.
"""

from __future__ import annotations

import heapq
import random
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field

from runtime.estimates import LinkEstimate
from runtime.lane import Lane, TokenBucket
from runtime.pilot import Pilot
from runtime.plan_rates import Way
from runtime.plan_tables import Candidate, Estimates, Tables, encode_stage
from runtime.scenario import Scenario

REPLY_BYTES, RESULT_BYTES = 560, 300  # of a few boxes, all of MQTT
NODE_REST_MS = 4.0
WINDOW = 12  # frames that may wait, whoever sends
SLOW_SHARE, SLOW_MS = 0.05, 40.0  # of frames, that wait for a processor here or above, and how long on average
ANSWERED_BY = 0.97  # of the limit, as on a device
GONE_S, BACK_S = 6.0, 1.2  # into an outage and behind it: the connection counts as dead, and there is a new one
AGAIN, AGAIN_HZ = 80, 20.0  # events that go again with a new connection, and how many a second
UP, DOWN = 0, 1


class Link:
    """One connection: messages in each direction arrive whole, in their order."""

    def __init__(self, scenario: Scenario, seed: int) -> None:
        self._scenario = scenario
        self._lanes = [Lane(TokenBucket(), (seed << 8) + way) for way in (UP, DOWN)]
        self._left: list[deque[list[int]]] = [deque(), deque()]  # of each message: number, bytes still to come

    def put(self, way: int, number: int, size: int) -> None:
        """Hand over a message."""
        self._lanes[way].put(bytes(size))
        self._left[way].append([number, size])

    def turn(self, now_s: float) -> tuple[float, list[tuple[int, int]]]:
        """Move what can be moved; returns when to come again, and what has arrived: direction and number."""
        phase = self._scenario.phases[self._scenario.index(now_s)]
        rtt_s = phase.up.delay_s + phase.down.delay_s
        next_s, arrived = self._scenario.next_change_s(now_s), []
        for way, (lane, left) in enumerate(zip(self._lanes, self._left, strict=True)):
            next_s = min(next_s, lane.pump(now_s, phase.down if way else phase.up, rtt_s))
            while (head := lane.line.head(now_s)) is not None:
                lane.line.took(len(head))
                left[0][1] -= len(head)
                if left[0][1] <= 0:
                    arrived.append((way, left.popleft()[0]))
            next_s = min(next_s, lane.line.next_s)
        return next_s, arrived


@dataclass
class Tally:
    """What became of frames."""

    frames: int = 0
    in_time: int = 0
    like: float = 0.0  # expected agreements of those in time, summed
    size: float = 0.0
    by_phase: dict[int, list[float]] = field(default_factory=dict)  # in time, all, likeness
    good: list[tuple[float, bool]] = field(default_factory=list)  # when each frame was grabbed, and whether in time
    moves: int = 0
    pilot_ms: float = 0.0  # of processor time a frame
    why: dict[str, int] = field(default_factory=dict)  # frames that were not in time

    def add(self, other: Tally) -> None:
        """Take another run's frames as well; only their sums."""
        self.frames += other.frames
        self.in_time += other.in_time
        self.like += other.like
        self.size += other.size

    def count(self, phase: int, at_s: float, like: float | None, why: str = "") -> None:
        """Take a frame; `like` is its answer's agreement, None that it was not in time."""
        self.frames += 1
        row = self.by_phase.setdefault(phase, [0, 0, 0.0])
        row[1] += 1
        self.good.append((at_s, like is not None))
        if like is None:
            self.why[f"{phase}:{why}"] = self.why.get(f"{phase}:{why}", 0) + 1
            return
        row[0] += 1
        row[2] += like
        self.in_time += 1
        self.like += like


@dataclass
class World:
    """One run's settings."""

    tables: Tables
    stage_ms: dict[str, float]
    fps: float
    limit_ms: float
    scenario: Scenario
    seed: int
    tell: bool = False  # whether every move is printed

    def local_ms(self, candidate: Candidate) -> float:
        """Until the features of a candidate are encoded."""
        ms = self.stage_ms["preprocess"]
        ms += sum(self.stage_ms[f"segment{index}"] for index in range(candidate.last_segment + 1))
        return ms + (0.0 if candidate.way is None else self.stage_ms.get(encode_stage(candidate.way), 2.0))

    def node(self, way: Way) -> dict[str, float]:
        """What a node says it took."""
        found = {"edge.decode": NODE_REST_MS}
        for stage, ms in self.stage_ms.items():
            if stage.startswith("segment") and int(stage[7:]) >= way.cut:
                found[f"edge.{stage}"] = ms
        return found

    def likeness(self, candidate: Candidate) -> float:
        """Agreement of what goes up."""
        index = self.tables.candidates.index(candidate)
        return float(self.tables.predict(perfect()).agreement[index])


def perfect() -> Estimates:
    """A link without limits."""
    return Estimates(link=LinkEstimate(1e12, 0.0, 0.0, 0.0, lost=False, age_ms=0.0))


class _Sizes:
    """Bytes of frames: what is in sight changes slowly, and so do they."""

    def __init__(self, tables: Tables, chance: random.Random) -> None:
        self._tables, self._chance = tables, chance
        self._busy = chance.gauss(0, 1)

    def next(self, way: Way) -> int:
        self._busy = 0.95 * self._busy + (1 - 0.95**2) ** 0.5 * self._chance.gauss(0, 1)
        p50, p95 = self._tables.size(way) or (0.0, 0.0)
        if way.codec == "raw":
            return round(p50)
        one = 0.8 * self._busy + 0.6 * self._chance.gauss(0, 1)
        spread: float = (max(p95, 1.05 * p50) / p50) ** (one / 1.645)
        return max(80, round(0.8 * p50 * spread))


@dataclass(slots=True)
class _Sent:
    captured_s: float
    at_s: float
    way: Way
    candidate: Candidate
    copy: bool
    open: bool = True  # whether an answer would still be in time


def run(world: World, pilot: Pilot | None, only: Candidate | None) -> Tally:
    """A pilot, or one candidate all the time, on one device that takes frame by frame."""
    return _Run(world, pilot, only).tally()


class _Run:
    def __init__(self, world: World, pilot: Pilot | None, only: Candidate | None) -> None:
        self._world, self._pilot, self._only = world, pilot, only
        self._chance = random.Random(world.seed)
        self._link = Link(world.scenario, world.seed)
        self._sizes = _Sizes(world.tables, self._chance)
        self._tally = Tally()
        self._sent: dict[int, _Sent] = {}
        self._later: list[tuple[float, int, str, int]] = []  # (when, order, what, number)
        self._order, self._open = 0, 0
        self._link_s = 0.0
        self._beside = 0
        self._likes: dict[Candidate, float] = {}
        self._connected = True

    def tally(self) -> Tally:
        world = self._world
        at_s = 0.0
        for number, captured_s in enumerate(self._frames()):
            self._until(captured_s)
            self._connect(captured_s)
            if self._pilot is not None:
                self._pilot.taken(ns(captured_s))
                self._step(captured_s)
            candidate = self._only if self._pilot is None else self._pilot.decision.candidate
            assert candidate is not None
            at_s = max(at_s, captured_s) + (world.local_ms(candidate) + self._slow_ms()) / 1000
            self._until(at_s)
            self._send(number, captured_s, at_s, candidate)
        self._until(world.scenario.duration_s + 5)
        return self._tally

    def _frames(self) -> Iterator[float]:
        for number in range(int(self._world.scenario.duration_s * self._world.fps)):
            yield number / self._world.fps

    def _connect(self, now_s: float) -> None:
        """An outage ends a connection, and some time after it there is another one."""
        gone = any(
            not phase.open and phase.start_s + GONE_S < now_s < phase.start_s + phase.duration_s + BACK_S
            for phase in self._world.scenario.phases
            if phase.duration_s > GONE_S
        )
        if gone == self._connected:
            self._connected = not gone
            if not gone:
                self._link = Link(self._world.scenario, self._world.seed + 1000)
                for number in range(AGAIN):
                    self._at(now_s + number / AGAIN_HZ, "event", -1)
                if self._pilot is not None:
                    self._pilot.reconnected()

    def _send(self, number: int, captured_s: float, at_s: float, candidate: Candidate) -> None:
        pilot, found = self._pilot, None
        why = "plan" if candidate.way is None else "busy" if self._open >= WINDOW else ""
        why = why if self._connected else "offline"
        if pilot is not None and why not in ("busy", "offline"):
            late = pilot.too_late(ns(at_s), ns(captured_s))
            why = why or ("busy" if pilot.full(ns(at_s)) else "late" if late else "")
            found = pilot.probing(ns(at_s), connected=self._connected)
            if found is not None and (found.copy or not why):
                candidate = found.candidate
            else:
                found = None
        copy = found is not None and found.copy
        if why or copy:
            self._missed(captured_s, why or "copy")
            self._result(at_s)
        if (why and not copy) or candidate.way is None:
            return
        size = self._sizes.next(candidate.way)
        self._tally.size += size
        self._sent[number] = _Sent(captured_s, at_s, candidate.way, candidate, copy)
        self._open += 1
        if pilot is not None:
            pilot.sent(ns(at_s), size, candidate.way, encode_ms=2.0, probe=found is not None)
        self._link.put(UP, number, size)
        self._link_s = min(self._link_s, at_s)
        self._at(captured_s + ANSWERED_BY * self._world.limit_ms / 1000, "deadline", number)

    def _missed(self, captured_s: float, why: str) -> None:
        self._tally.count(self._world.scenario.index(captured_s), captured_s, None, why)

    def _result(self, at_s: float) -> None:
        if not self._connected:
            return
        self._link.put(UP, -1, RESULT_BYTES)
        self._beside += RESULT_BYTES
        self._link_s = min(self._link_s, at_s)

    def _until(self, until_s: float) -> None:
        """Let happen what happens up to then."""
        while True:
            other_s = self._later[0][0] if self._later else float("inf")
            now_s = min(self._link_s, other_s)
            if now_s > until_s:
                return
            if other_s <= self._link_s:
                _, _, what, number = heapq.heappop(self._later)
                self._happen(other_s, what, number)
                continue
            self._link_s, arrived = self._link.turn(now_s)
            self._link_s = max(self._link_s, now_s + 1e-6)
            for way, number in arrived:
                if number < 0:
                    continue
                if way == UP:
                    node_ms = sum(self._world.node(self._sent[number].way).values()) + self._slow_ms()
                    self._at(now_s + node_ms / 1000, "answer", number)
                else:
                    self._at(now_s + abs(self._chance.gauss(0, 0.002)), "reply", number)

    def _happen(self, now_s: float, what: str, number: int) -> None:
        if what == "event":
            self._result(now_s)
            return
        sent, pilot = self._sent[number], self._pilot
        if what == "answer":
            self._link.put(DOWN, number, REPLY_BYTES)
            self._link_s = min(self._link_s, now_s)
            return
        in_time = sent.open
        sent.open = False
        self._open -= in_time
        if what == "reply":
            if pilot is not None:
                pilot.replied(ns(sent.at_s), ns(now_s), self._world.node(sent.way), late=not in_time)
            if in_time and not sent.copy:
                like = self._likes.setdefault(sent.candidate, self._world.likeness(sent.candidate))
                self._tally.count(self._world.scenario.index(sent.captured_s), sent.captured_s, like)
                self._result(now_s)
        elif in_time:
            if pilot is not None:
                pilot.missed(ns(sent.at_s), ns(now_s))
            if not sent.copy:
                self._missed(sent.captured_s, "deadline")
                self._result(now_s)
        self._step(now_s)

    def _step(self, now_s: float) -> None:
        pilot = self._pilot
        if pilot is None:
            return
        pilot.beside(ns(now_s), self._beside)
        if pilot.step(ns(now_s), connected=self._connected):
            self._tally.moves += 1
            if self._world.tell:
                begin_s = self._world.scenario.phases[self._world.scenario.index(now_s)].start_s
                print(f"{now_s:8.2f}  +{now_s - begin_s:5.2f}  {pilot.limits.rung}: {pilot.decision.why}")

    def _slow_ms(self) -> float:
        return self._chance.expovariate(1 / SLOW_MS) if self._chance.random() < SLOW_SHARE else 0.0

    def _at(self, at_s: float, what: str, number: int) -> None:
        self._order += 1
        heapq.heappush(self._later, (at_s, self._order, what, number))


def ns(seconds: float) -> int:
    """Seconds of the simulation on a clock that began a second before."""
    return round(seconds * 1e9) + 1_000_000_000
