"""Steers one device by what it sees: estimators, ladder, planner and probes together. Pure; times are given.

The rim around it is runtime/steering.py; scripts/bench_planner drives the same pilot through simulated links.
"""

from __future__ import annotations

import math
from collections import OrderedDict, deque
from collections.abc import Mapping
from dataclasses import dataclass, replace

from runtime.estimates import START_GOODPUT, LinkEstimate, LinkEstimator
from runtime.ladder import FREE, Ladder, Limits
from runtime.objective import Objective
from runtime.plan_rates import Way
from runtime.plan_tables import Candidate, Estimates, Tables, encode_stage
from runtime.planner import LATENCY_MARGIN, Decision, plan, probe
from runtime.thermals import Board
from runtime.workload import ByteRate, RateEstimator, Window, WorkEstimator, node_stages

FIRST_PROBE_MS, SILENT_PROBE_MS = 250.0, 2000.0  # while nothing comes back: spacing doubles from one to the other
FIRST_REACH_MS, MAX_REACH_MS = 1000.0, 32_000.0  # for something better than what works
PROBE_SHARE = 0.05  # of the bytes allowed
LEAST_FLYING = 2  # frames that may be on their way at any rate
STALE_NS = 10_000_000_000  # a frame on its way for so long is on no way any more
PLAN_MS = 400.0  # between two plans where nothing happened that cannot wait
LEARNED = 20  # comparisons with answers from above before a local exit's agreement counts as known
ALONE_MARGIN = 0.97  # of the limit, for a frame that has none before it
QUIET_MS = 500.0  # of silence beyond a round trip
LIGHT_SHARE = 0.7  # of what the link carries within the limit: on its way
UNSURE = 15  # frames: who comes and goes makes bursts of those that no exit answers
WORK_SHARE = 0.75  # quantile of own work that is planned with


@dataclass(slots=True)
class _Flying:
    size: int
    way: Way
    probe: bool
    missed: bool = False


@dataclass(frozen=True, slots=True)
class Probe:
    """A frame that goes up to learn something."""

    candidate: Candidate
    copy: bool  # whether the frame is answered here all the same, and the reply answers nothing


class Pilot:
    """Decides how frames are treated. The caller keeps its calls in one thread at a time.

    Args:
        tables: the candidates.
        objective: what the operator wants.
        budget_ms: after which an answer is worth nothing.
        stage_ms: what the device's stages took when they were tried at its start.
    """

    def __init__(
        self, tables: Tables, objective: Objective, *, budget_ms: float, stage_ms: Mapping[str, float]
    ) -> None:
        self.tables, self.objective = tables, objective
        self.limit_ms = min(budget_ms, objective.latency_p95_ms or budget_ms)
        self._budget_ms = budget_ms
        self._link = LinkEstimator()
        self._work, self._above = WorkEstimator(), WorkEstimator()
        self._work.took(stage_ms, 0)
        self._frames: dict[str, RateEstimator] = {}  # by camera: together they come in bursts, which no gap tells
        self._unsure: deque[bool] = deque(maxlen=UNSURE)
        self._sizes: dict[str, tuple[deque[float], Window]] = {}
        self._alike: dict[int, deque[bool]] = {}
        self._flying: OrderedDict[int, _Flying] = OrderedDict()  # by when it went up, in that order
        self._answered_ns = self._heard_ns = 0  # when the frame went up that was last answered, and the last word came
        self._ladder = Ladder(warm_celsius=objective.warm_celsius, hot_celsius=objective.hot_celsius)
        self.limits: Limits = FREE
        self._news, self._planned_ns = True, 0
        self._seen: tuple[bool, Board | None, int | None] = True, None, None
        self._max_packet_bytes = math.inf
        self._beside = ByteRate()
        self._silent_ns, self._silent_ms = 0, FIRST_PROBE_MS
        self._reach_ns, self._reach_ms = 0, FIRST_REACH_MS
        self._held_ns = self._tells_ns = 0  # a frame was last held; frames have nothing of other plans before them
        self.known = self._estimates(0)
        self.decision: Decision = plan(tables, self.known, objective, 0, None, budget_ms=budget_ms)

    def taken(self, now_ns: int, camera: str = "") -> None:
        """A frame is there to be answered."""
        self._frames.setdefault(camera, RateEstimator()).taken(now_ns)

    def computed(self, *, answered: bool) -> None:
        """A frame has run here as the plan says; whether an exit has answered it."""
        self._unsure.append(not answered)

    def worked(self, stages: Mapping[str, float], now_ns: int) -> None:
        """Stages of this device and their milliseconds; `segment0.vN` where a variant ran."""
        self._work.took(stages, now_ns)

    def sent(self, now_ns: int, size: int, way: Way, *, encode_ms: float, probe: bool = False) -> None:
        """A frame of `size` bytes, all of MQTT counted, goes up."""
        self._work.took({encode_stage(way): encode_ms}, now_ns)
        self._flying[now_ns] = _Flying(size, way, probe)
        self._link.sent(now_ns, size)
        self._evict(now_ns)
        self._silent_ns = now_ns + round(self._silent_ms * 1e6)
        usual = self.tables.size(way)
        if usual is not None and not probe:
            means, larges = self._sizes.setdefault(way.codec, (deque(maxlen=32), Window()))
            means.append(size / usual[0])
            larges.add(size / usual[1], now_ns)

    def withdrawn(self) -> None:
        """What was said to go up last did not."""
        if self._flying:  # else the connection has become another one meanwhile
            self._flying.popitem()
            self._link.withdrawn()

    def replied(self, sent_ns: int, now_ns: int, timings: Mapping[str, float] | None, *, late: bool = False) -> None:
        """A word came for the frame that went up at `sent_ns`; without timings it was a refusal."""
        frame = self._flying.pop(sent_ns, None)
        self._answered_ns, self._heard_ns = max(self._answered_ns, sent_ns), max(self._heard_ns, now_ns)
        self._silent_ms = FIRST_PROBE_MS
        lost = self._link.lost
        self._news |= lost or late
        if timings is None:
            self._link.heard(sent_ns, now_ns)
            return
        self._news |= self._link.replied(sent_ns, now_ns, sum(timings.values()))
        self._above.took(node_stages(timings), now_ns)
        if frame is not None and self._tells(sent_ns, frame) and not frame.missed:
            self._ladder.sent(now_ns, late=late)

    def missed(self, sent_ns: int, now_ns: int) -> None:
        """No answer came in time for the frame that went up at `sent_ns`."""
        frame = self._flying.get(sent_ns)
        if frame is not None and frame.missed:
            return
        self._link.missed(sent_ns, now_ns)
        self._news = True
        if frame is None:
            return
        frame.missed = True
        # One that later ones overtook was lost, which is foreseen: it is in the link's share of losses.
        if self._tells(sent_ns, frame) and sent_ns > self._answered_ns:
            self._ladder.sent(now_ns, late=True)

    def _evict(self, now_ns: int) -> None:
        """Forget what has been on its way for too long."""
        while self._flying and next(iter(self._flying)) < now_ns - STALE_NS:
            self._flying.popitem(last=False)

    def _tells(self, sent_ns: int, frame: _Flying) -> bool:
        """Whether a frame's lateness speaks against the plan in force: it went up by that, behind nothing of others."""
        return not frame.probe and sent_ns >= self._tells_ns

    def _overdue(self, now_ns: int) -> None:
        """Give up early what can only come back too late, as an outage should show before a budget has ended."""
        link = self.known.link
        after_ms = max(self.limit_ms, 2 * ((link.rtt_ms or 0.0) + link.jitter_ms))
        for sent_ns, frame in list(self._flying.items()):
            if now_ns - sent_ns <= after_ms * 1e6:
                break
            if not frame.missed:
                self.missed(sent_ns, now_ns)

    def reconnected(self) -> None:
        """The connection is another one: what was on its way is gone, and frames stand alone again."""
        self._flying.clear()
        self._sizes.clear()
        self._link.reconnected()
        self._silent_ns, self._silent_ms = 0, FIRST_PROBE_MS
        self._news = True

    def compared(self, exit_cut: int, *, same: bool) -> None:
        """The local exit said the same as what came from above, or not, of a frame it was not sure of."""
        self._alike.setdefault(exit_cut, deque(maxlen=200)).append(same)

    def beside(self, now_ns: int, total_bytes: int) -> None:
        """All bytes that were ever handed to the link beside frames: results, events and whatever else."""
        more = self._beside.counted(now_ns, total_bytes)
        if more > 0:
            self._link.beside(now_ns, more)

    def step(
        self,
        now_ns: int,
        *,
        connected: bool = True,
        board: Board | None = None,
        max_packet_bytes: int | None = None,
    ) -> bool:
        """Think again, if there is news or `PLAN_MS` have passed. Returns whether the decision is another one now.

        Args:
            now_ns: the time.
            connected: whether the broker is there.
            board: heat and power; None: unknown.
            max_packet_bytes: the largest message that the broker takes; None: any.
        """
        self._overdue(now_ns)
        self._evict(now_ns)
        self._max_packet_bytes = math.inf if max_packet_bytes is None else float(max_packet_bytes)
        seen = connected, board, max_packet_bytes
        if not self._news and seen == self._seen and now_ns - self._planned_ns < PLAN_MS * 1e6:
            return False
        self._news, self._seen, self._planned_ns = False, seen, now_ns
        self.known = known = self._estimates(now_ns)
        lost = None
        if not connected:
            lost = "the broker cannot be reached"
        elif known.link.lost:
            silent = known.link.age_ms / 1000
            lost = "nothing has ever come back" if math.isinf(silent) else f"nothing has come back for {silent:.1f} s"
        self.limits = self._ladder.step(
            now_ns, lost=lost, board=board, bytes_now=self.decision.frame_bytes, goodput=known.link.goodput
        )
        before = self.decision
        self.decision = plan(
            self.tables, known, self.objective, now_ns, before, budget_ms=self._budget_ms, limits=self.limits
        )
        moved = self.decision.index != before.index
        if moved:
            self._ladder.moved()
            drains_ms = self._link.passes_ms(now_ns, 0, known.link.goodput or START_GOODPUT)
            self._tells_ns = now_ns + round(drains_ms * 1e6)
            self._reach_ns, self._reach_ms = now_ns + round(FIRST_REACH_MS * 1e6), FIRST_REACH_MS
        return moved

    def arrival_ms(self, now_ns: int, captured_ns: int) -> float:
        """The age an answer would have if the frame went up now, as it is decided."""
        way, link = self.decision.candidate.way, self.known.link
        age_ms = (now_ns - captured_ns) / 1e6
        usual = None if way is None else self.tables.size(way)
        if way is None or usual is None or link.goodput is None:
            return age_ms
        size = usual[0] * self.known.bytes_ratio.get(way.codec, (1.0, 1.0))[0]
        wait_ms = self._link.passes_ms(now_ns, size, link.goodput)
        encode_ms = self.known.stage_ms.get(encode_stage(way), 0.0)
        above_ms = sum(ms for stage, ms in self.known.node_ms.items() if stage == "rest" or int(stage[7:]) >= way.cut)
        return age_ms + encode_ms + wait_ms + (link.rtt_ms or 0.0) + above_ms

    def too_late(self, now_ns: int, captured_ns: int) -> bool:
        """Whether an answer from above would come after the limit on its age, or too near to it."""
        # The margin is for what waits in the pipe; the plan has looked at the rest.
        margin = LATENCY_MARGIN if any(sent_ns > self._answered_ns for sent_ns in self._flying) else ALONE_MARGIN
        late = self.arrival_ms(now_ns, captured_ns) > margin * self.limit_ms
        if late:
            self._held_ns = now_ns
        return late

    def full(self, now_ns: int) -> bool:
        """Whether more is on its way than drains soon, or more frames than come within the limit.

        Nor does anything go up behind what is late already, or after a silence longer than TCP needs to mend one loss:
        the link may have become slow, and then whatever waits is too much.
        """
        waiting = {sent_ns: frame for sent_ns, frame in self._flying.items() if sent_ns > self._answered_ns}
        if len(waiting) < LEAST_FLYING or self._link.lost:
            return False  # of a lost link the plan is that nothing goes up, but for what asks whether it is back
        link = self.known.link
        since_ns = max(self._heard_ns, next(iter(waiting)))
        quiet = (now_ns - since_ns) / 1e6 > QUIET_MS + (link.rtt_ms or self.limit_ms)
        if quiet or next(iter(waiting.values())).missed:
            return True
        most = LIGHT_SHARE * self.limit_ms / 1000 * (link.goodput or START_GOODPUT)
        too_many = len(waiting) > math.ceil(self.known.frames_per_second * self.limit_ms / 1000)
        return too_many or sum(frame.size for frame in waiting.values()) > most

    def probing(self, now_ns: int, *, connected: bool = True) -> Probe | None:
        """How to send this frame to learn something, though the plan would not; None: not now.

        While nothing comes back or nothing may go up, that is a copy in the cheapest way of all; else, rarely, the
        frame itself in the next better one.
        """
        if not connected or not self.limits.computes:
            return None
        kept = self.decision.candidate.way is None or self.known.link.lost
        if now_ns >= self._silent_ns and (kept or self._unheard(now_ns)):
            if not (self.known.link.lost or self._worth()):
                self._silent_ns = now_ns + round(SILENT_PROBE_MS * 1e6)
                return None
            found = probe(
                self.tables, self.known, self.objective, self.decision, budget_ms=self._budget_ms, limits=SILENT
            )
            if found is not None and found.way is not None:
                self._silent_ms = min(2 * self._silent_ms, self._spaced(found.way, SILENT_PROBE_MS))
                self._silent_ns = now_ns + round(self._silent_ms * 1e6)
                return Probe(found, copy=True)
        if kept or now_ns < self._reach_ns or self.full(now_ns) or self.too_late(now_ns, now_ns):
            return None
        self._reach_ms = min(2 * self._reach_ms, MAX_REACH_MS)
        self._reach_ns = now_ns + round(self._reach_ms * 1e6)
        found = probe(
            self.tables, self.known, self.objective, self.decision, budget_ms=self._budget_ms, limits=self.limits
        )
        if found is None or found.way is None:
            return None
        self._reach_ns = now_ns + round(_spread(self._spaced(found.way, self._reach_ms), now_ns) * 1e6)
        return Probe(found, copy=False)

    def _worth(self) -> bool:
        """Whether there is a link so good that something would go up, were nothing else in the way."""
        known = replace(self.known, link=IDEAL, node_ms={})
        best = plan(self.tables, known, self.objective, 0, None, budget_ms=self._budget_ms)
        return best.candidate.way is not None

    def _spaced(self, way: Way, least_ms: float) -> float:
        """Milliseconds between probes of this size so that they take their share of the bytes at most."""
        most, usual = self.objective.max_bytes_per_second, self.tables.size(way)
        if most is None or usual is None:
            return least_ms
        return max(least_ms, usual[0] / (PROBE_SHARE * most) * 1000)

    def _unheard(self, now_ns: int) -> bool:
        """Whether what is known of the link is old, as when all frames were too late to go up."""
        waits = self._held_ns > self._heard_ns or any(sent_ns > self._answered_ns for sent_ns in self._flying)
        return (
            waits
            and self.known.link.age_ms > self._silent_ms
            and not any(sent_ns > now_ns - self._silent_ms * 1e6 for sent_ns in self._flying)
        )

    def _estimates(self, now_ns: int) -> Estimates:
        return Estimates(
            link=self._link.estimate(now_ns),
            stage_ms=self._work.all_ms(WORK_SHARE),
            node_ms=self._above.all_ms(),
            frames_per_second=sum(one.per_second(now_ns) or 0.0 for one in self._frames.values()) or 10.0,
            unsure_share=sum(self._unsure) / UNSURE,
            other_bytes=self._beside.per_second,
            max_packet_bytes=self._max_packet_bytes,
            bytes_ratio={
                codec: (sum(means) / len(means), larges.quantile(0.9) or 1.0)
                for codec, (means, larges) in self._sizes.items()
            },
            local_agreement={
                cut: sum(alike) / len(alike) for cut, alike in self._alike.items() if len(alike) >= LEARNED
            },
        )


def _spread(ms: float, now_ns: int) -> float:
    """A quarter less to a quarter more, by the last digits of the clock: so that devices do not all probe at once."""
    return ms * (0.75 + 0.5 * (now_ns // 1000 % 1000) / 1000)


SILENT = Limits(sends=False)
IDEAL = LinkEstimate(1e9, 0.0, 0.0, 0.0, lost=False, age_ms=0.0)
