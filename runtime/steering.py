"""How a device treats the next frame: fixed by its settings, or steered by the planner towards an `[objective]`.

The rim around `pilot`, which is pure: it knows the bundle, the segments, the settings, the counters and the link. What
it decides is logged, counted (`planner_moves_total`) and published, retained, on `d/<device>/plan` (docs/planner.md).
All of it is safe to call from any thread.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import msgspec

from runtime import cascade
from runtime.cascade import Outcome, Tier
from runtime.codec import split_name
from runtime.config import DeviceConfig
from runtime.counters import Counters
from runtime.course import Course, tried
from runtime.datatypes import Answer
from runtime.errors import ConfigError
from runtime.link import Lane
from runtime.manifest import Bundle
from runtime.metered import MeteredLink
from runtime.objective import Objective
from runtime.packet import HEADER
from runtime.pilot import Pilot
from runtime.plan_rates import Way
from runtime.plan_tables import Candidate, Tables
from runtime.policy import ExitPolicy
from runtime.segment import load_segments
from runtime.thermals import Board, Thermals
from runtime.topics import Subtree, publish_bytes
from runtime.uplink import Sent
from runtime.variant import with_each_variant, with_variant

log = logging.getLogger(__name__)

MAX_IN_FLIGHT, MAX_PLANNED = 4, 32  # unless the settings say so; with an objective the planner allows fewer
ANSWERED_BY = 0.97  # of the limit on the age: then the local exit answers
BOARD_S = 5.0  # between two looks at heat and power
GATE_ONLY_NS = 1_000_000_000  # between two frames that are computed when the gate answers alone
COMPARED = 8  # one answer of so many from above is held against the local exit's


class Steering:
    """Courses for a device's frames.

    Raises:
        BundleError, ConfigError: the bundle or a setting cannot be used.
    """

    def __init__(
        self, config: DeviceConfig, bundle: Bundle, link: MeteredLink, topics: Subtree, counters: Counters
    ) -> None:
        self._config, self._given = config, bundle
        self._link, self._topics, self._counters = link, topics, counters
        self.on_move: Callable[[], None] | None = None  # called after a move, on the thread of `tick`
        segments = len(bundle.manifest.segments)
        self.last = bundle.manifest.tiers[0].last_segment if config.last_segment is None else config.last_segment
        if self.last >= segments:
            raise ConfigError(
                f"last_segment: {self.last} is not one of the bundle's {segments} segments, 0 to {segments - 1}"
            )
        with_variant(bundle, config.variant)
        self._lock = threading.Lock()
        self._pilot: Pilot | None = None
        self._tiers: dict[tuple[int, int], Tier] = {}
        self._courses: dict[Candidate, Course] = {}
        self._load(config.objective)
        # A picture codec sends the frame itself, before any local segment has run.
        self._cut = 0 if split_name(config.codec)[0] == "jpeg" else self.last + 1
        self.plain = self._fixed(self._cut)
        self._thermals = Thermals()
        self._board: Board | None = None
        self._board_s = 0.0
        self._computed_ns, self._answers = 0, 0
        if config.objective is not None:
            self._pilot = self._plan(config.objective)
            link.on_connect(self._connected)

    @property
    def uplink(self) -> tuple[str, int] | None:
        """Codec and cut to make an uplink with; None: nothing can go up."""
        return (self._config.codec, self._cut) if self.last + 1 < len(self._given.manifest.segments) else None

    @property
    def ways(self) -> set[Way]:
        """All that the planner may choose from; none where nothing is planned."""
        pilot = self._pilot
        return set() if pilot is None else {one.way for one in pilot.tables.candidates if one.way is not None}

    def tick(self) -> None:
        """Think again; to be called often, on one thread."""
        if self._pilot is None:
            return
        connected = self._link.connected
        if time.monotonic() >= self._board_s:
            self._board_s = time.monotonic() + BOARD_S
            self._board = self._thermals.read()
        with self._lock:
            before = self._pilot.decision
            now_ns = time.monotonic_ns()
            self._pilot.beside(now_ns, self._link.beside)
            most = self._link.max_packet_bytes
            moved = self._pilot.step(now_ns, connected=connected, board=self._board, max_packet_bytes=most)
            after = self._pilot.decision
        if moved:
            log.info("plan: %s", after.why)
            names = {"from": before.candidate.words(), "to": after.candidate.words(), "reason": after.reason}
            self._counters.add("planner_moves_total", 1, **names)
            self._publish()
            if self.on_move is not None:
                self.on_move()

    def computes(self) -> bool:
        """Whether a frame that the gate has no answer for is computed."""
        if self._pilot is None:
            return True
        now_ns = time.monotonic_ns()
        with self._lock:
            if self._pilot.limits.computes or now_ns - self._computed_ns >= GATE_ONLY_NS:
                self._computed_ns = now_ns
                return True
        return False

    def course(self, camera: str) -> Course:
        """For a frame that is computed now."""
        if self._pilot is None:
            return self.plain
        self.tick()
        with self._lock:
            self._pilot.taken(time.monotonic_ns(), camera)
            return self._courses[self._pilot.decision.candidate]

    def aside(self) -> Course | None:
        """How a copy of the frame goes up, or the frame itself where it has been computed so far; None: not now."""
        if self._pilot is None:
            return None
        with self._lock:
            found = self._pilot.probing(time.monotonic_ns(), connected=self._link.connected)
            if found is None:
                return None
            self._counters.add("planner_probes_total", way=found.candidate.words())
            course = replace(self._courses[found.candidate], only=True)
            if not found.copy:
                return course
            # What an early exit answered would not go up.
            return replace(course, local="copy", policy=ExitPolicy.of(course.promised, early=False))

    def held(self, captured_ns: int) -> str | None:
        """Why a frame does not go up now: its answer would come after the limit on its age; None: it does."""
        if self._pilot is None:
            return None
        with self._lock:
            now_ns = time.monotonic_ns()
            if self._pilot.full(now_ns):
                return "busy"
            return "late" if self._pilot.too_late(now_ns, captured_ns) else None

    @property
    def full(self) -> bool:
        """Whether as many frames are on their way as can come back in time."""
        if self._pilot is None:
            return False
        with self._lock:
            return self._pilot.full(time.monotonic_ns())

    @property
    def budget_ms(self) -> int:
        """From grab to answer: with a limit on the age a little less than that, so that the local exit is in time."""
        if self._pilot is None:
            return self._config.budget_ms
        return min(self._config.budget_ms, round(ANSWERED_BY * self._pilot.limit_ms))

    @property
    def max_in_flight(self) -> int:
        """Frames that may be on their way in any case."""
        most = self._config.max_in_flight
        return most or (MAX_PLANNED if self._pilot is not None else MAX_IN_FLIGHT)

    def computed(self, *, answered: bool) -> None:
        """A frame has run here, and an exit has answered it, or none."""
        if self._pilot is not None:
            with self._lock:
                self._pilot.computed(answered=answered)

    def worked(self, course: Course, timings: Mapping[str, float]) -> None:
        """A frame has run here."""
        if self._pilot is None:
            return
        took = {stage: ms for stage, ms in timings.items() if stage.startswith(("segment", "exit", "preprocess"))}
        if course.variant and "segment0" in took:
            took[f"segment0.v{course.variant}"] = took.pop("segment0")
        with self._lock:
            self._pilot.worked(took, time.monotonic_ns())

    def sent(self, sent: Sent[Any]) -> None:
        """A frame goes up."""
        if self._pilot is not None:
            with self._lock:
                frame = sent.frame
                self._pilot.sent(sent.sent_ns, sent.bytes_up, sent.way, encode_ms=sent.encode_ms, probe=frame.alone)

    def withdrawn(self) -> None:
        """The link did not take the last one."""
        if self._pilot is not None:
            with self._lock:
                self._pilot.withdrawn()

    def replied(self, sent_ns: int, timings: Mapping[str, float] | None, *, late: bool = False) -> None:
        """A word came back; without timings a refusal, or one after the frame had been given up."""
        if self._pilot is not None:
            with self._lock:
                self._pilot.replied(sent_ns, time.monotonic_ns(), timings, late=late)

    def missed(self, sent_ns: int) -> None:
        """No word came back in time."""
        if self._pilot is not None:
            with self._lock:
                self._pilot.missed(sent_ns, time.monotonic_ns())

    def compare(self, course: Course, outcome: Outcome | None, wanted: Answer) -> None:
        """Hold what came from above against what would have been said here, now and then."""
        if self._pilot is None or outcome is None:
            return
        self._answers += 1
        said = cascade.last_word(outcome, course.tier) if self._answers % COMPARED == 1 else None
        if said is not None:
            same, total = course.tier.task.compare(said.answer, wanted)
            with self._lock:
                self._pilot.compared(said.exit, same=same == total)

    def told(self) -> dict[str, Any] | None:
        """The plan as it is published; None: nothing is planned."""
        if self._pilot is None:
            return None
        with self._lock:
            decided, link, limits = self._pilot.decision, self._pilot.known.link, self._pilot.limits
        candidate = decided.candidate
        return {
            "plan": candidate.words(),
            "why": decided.why,
            "reason": decided.reason,
            "rung": limits.rung,
            "kept": decided.kept,
            "variant": candidate.variant,
            "last_segment": candidate.last_segment,
            "exits": candidate.row,
            "cut": None if candidate.way is None else candidate.way.cut,
            "codec": None if candidate.way is None else candidate.way.codec,
            "rate": None if candidate.way is None else candidate.parameter,
            "latency_p95_ms": round(decided.latency_ms, 1),
            "bytes_a_frame": round(decided.bytes),
            "agreement": round(decided.agreement, 4),
            "goodput_kbits": None if link.goodput is None else round(link.goodput * 8 / 1000, 1),
            "rtt_ms": None if link.rtt_ms is None else round(link.rtt_ms, 1),
            "loss_ratio": round(link.loss_ratio, 4),
        }

    def _connected(self) -> None:
        """The connection is another one, on the link's thread."""
        assert self._pilot is not None, "else nobody asked to be told"
        with self._lock:
            self._pilot.reconnected()
        self._publish()

    def _publish(self) -> None:
        self._link.publish(self._topics.plan, msgspec.json.encode(self.told()), qos=1, retain=True, lane=Lane.EVENTS)

    def _load(self, objective: Objective | None) -> None:
        """Load what may run here, and run it once."""
        count = len(self._given.manifest.segments)
        threads, chosen = self._config.threads, self._config.variant
        if objective is None:
            bundle = with_variant(self._given, chosen)
            tier = Tier(bundle, *load_segments(bundle, 0, self.last, threads=threads))
            cascade.warm_up(tier)
            self._tiers[chosen, self.last] = tier
            return
        if objective.deepest_segment is not None and objective.deepest_segment >= count:
            raise ConfigError(f"objective.deepest_segment: the bundle has segments 0 to {count - 1}")
        deepest = count - 1 if objective.deepest_segment is None else objective.deepest_segment
        segments, heads = load_segments(self._given, 0, max(deepest, self.last), threads=threads)
        for number, bundle in enumerate(with_each_variant(self._given)):
            first = segments[0] if number == 0 else load_segments(bundle, 0, 0, threads=threads)[0][0]
            for last in range(max(deepest, self.last) + 1):
                own = {index: first if index == 0 else segments[index] for index in range(last + 1)}
                behind = {cut: head for cut, head in heads.items() if cut <= last + 1}
                self._tiers[number, last] = Tier(bundle, own, behind)
            cascade.warm_up(self._tiers[number, max(deepest, self.last)])

    def _plan(self, objective: Objective) -> Pilot:
        config, manifest = self._config, self._given.manifest
        deepest = max(last for _, last in self._tiers)
        deepest = deepest if objective.deepest_segment is None else objective.deepest_segment
        # The next tier takes features only from before its own last segment.
        above = manifest.tiers[min(1, len(manifest.tiers) - 1)].last_segment
        points = [point.agreement for point in manifest.exits[0].points] or [manifest.exits[0].agreement]
        rows = points if config.agreement is None else [config.agreement]
        topic = self._topics.request(self._given.key8, 0)
        tables = Tables(
            self._given,
            overhead_bytes=publish_bytes(topic, 1000 + HEADER.size) - 1000 - HEADER.size,
            deepest=deepest,
            above=above,
            rows=rows if len(manifest.exits) > 1 else (),
            early=config.early_exits,
        )
        for candidate in tables.candidates:
            self._courses[candidate] = self._course_of(candidate)
        took: dict[str, float] = {}
        for (number, last), tier in self._tiers.items():
            if last == deepest:
                took.update(tried(tier, number))
        return Pilot(tables, objective, budget_ms=config.budget_ms, stage_ms=took)

    def _fixed(self, cut: int) -> Course:
        variant = self._config.variant
        seen = with_variant(self._given, variant)
        sent = variant if cut > 0 else 0
        promised = with_variant(self._given, sent)
        early, agreement = self._config.early_exits, self._config.agreement
        policy = ExitPolicy.of(seen, early=early, agreement=agreement)
        kept = ExitPolicy.of(promised, early=early, agreement=agreement).agreements
        course = Course(self._tiers[variant, self.last], policy, variant, sent, promised, kept)
        return replace(course, whole=cut == 0 and self.uplink is not None)

    def _course_of(self, candidate: Candidate) -> Course:
        last = candidate.last_segment if candidate.last_segment >= 0 else self.last
        seen = with_variant(self._given, candidate.variant)
        policy = ExitPolicy.of(seen, early=candidate.row is not None, agreement=candidate.row)
        tier = self._tiers[candidate.variant, last]
        local = "plan" if candidate.way is None else None
        whole = candidate.way is not None and candidate.way.cut == 0
        number = candidate.variant
        return Course(tier, policy, number, number, seen, policy.agreements, candidate.way, local, whole)
