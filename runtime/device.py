"""The device tier: camera → preprocess → cascade → answer, or features up the link. Latest frame wins.

Every frame that is taken from a camera ends in exactly one of `_answer` and `_drop`, which counts the reason.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec

from runtime import cascade, manifest
from runtime.capture import Capture
from runtime.config import DeviceConfig
from runtime.counters import Counters
from runtime.datatypes import Dropped, ExitOutput, Features, Result
from runtime.link import Lane, open_link
from runtime.metered import MeteredLink
from runtime.news import News
from runtime.preprocess import prepare
from runtime.presence import Presence
from runtime.preview import Previews
from runtime.reply import Reply
from runtime.steering import Steering
from runtime.taken import Said, Taken, conclude
from runtime.topics import Subtree
from runtime.uplink import Sent, Uplink
from runtime.variant import with_variant
from runtime.watch import Watch
from runtime.watchdog import of_device

log = logging.getLogger(__name__)

IDLE_S = 0.25
DRAIN_S = 2.0
LINK_S = 1.0


class Device:
    """One device with its cameras, its share of the bundle and its link.

    `on_result` is called with every Result and every Dropped, on the pipeline's or the link's thread; `on_plan` with
    every plan that is taken, as it is published, on the pipeline's.

    Raises:
        BundleError, ConfigError: the bundle or a setting cannot be used.
    """

    def __init__(
        self,
        config: DeviceConfig,
        on_result: Callable[[Result | Dropped], None] | None = None,
        *,
        on_plan: Callable[[Mapping[str, Any]], None] | None = None,
    ) -> None:
        self._config = config
        self._on_result = on_result
        self.counters = Counters()
        given = manifest.load(Path(config.bundle))
        self.bundle = bundle = with_variant(given, config.variant)
        self._tier_name = bundle.manifest.tiers[0].name
        self._wake = threading.Event()
        self._captures = [Capture(name, camera, self.counters, self._wake) for name, camera in config.camera.items()]
        self._cameras = {name: index for index, name in enumerate(config.camera)}
        self._fault: Exception | None = None
        self._topics = Subtree(config.site, "d", config.id)
        own = f"kinflow-d-{config.id}"
        will = self._topics.availability, b"offline"
        link = open_link(config.broker, client_id=own, will=will, counters=self.counters, beat=self._topics.beat)
        self._link = MeteredLink(link, self.counters)
        self._steering = Steering(config, given, self._link, self._topics, self.counters)
        self._on_plan = on_plan
        self._steering.on_move = self._moved
        self._task = self._steering.plain.tier.task
        self._previews = Previews(config.preview, self._link, self._topics, bundle, self.counters)
        self._watch = Watch(config, bundle, self._task, self._link, self._topics, self.counters, self._wake.set)
        self._news = News(config.results)
        self._uplink: Uplink[Taken] | None = None
        if self._steering.uplink is not None:
            codec, cut = self._steering.uplink
            self._uplink = Uplink(
                self._link,
                self._topics,
                bundle,
                codec=codec,
                cut=cut,
                max_in_flight=self._steering.max_in_flight,
                counters=self.counters,
                on_reply=self._replied,
                between_frames=config.between_frames,
                on_late=self._late,
            )
            for way in self._steering.ways:
                self._uplink.prepare(way)
        told = {
            "bundle": bundle.id,
            "session": None if self._uplink is None else self._uplink.session,
            "cameras": list(config.camera),
            "last_segment": self._steering.last,
            "codec": config.codec,
            "variant": config.variant,
        }
        self._presence = Presence(
            self._link, self._topics, self.counters, stats_interval_s=config.stats_interval_s, told=told
        )
        self._link.on_connect(self._watch.announce)
        self._watchdog = of_device(self.counters, self._link, self._captures)

    def run(self, stop: threading.Event) -> None:
        """Answer frames until `stop` is set or every camera has ended, then drain.

        Raises:
            CameraError: a source that can never give frames, such as a missing file.
        """
        self._moved()
        self._link.start()
        self._await_link(stop)
        for capture in self._captures:
            capture.start()
        self._watchdog.ready()
        try:
            while not stop.is_set() and self._fault is None:
                self._wake.clear()
                self._expire()
                self._steering.tick()
                self._watch.tend()
                self._presence.tell(self._statuses())
                self._watchdog.tend()
                stepped = [self._step(capture) for capture in self._captures]
                if any(stepped):
                    continue
                if all(capture.ended for capture in self._captures) and not self._uplink:
                    break
                self._wake.wait(IDLE_S if self._uplink is None else self._uplink.patience_s(IDLE_S))
        finally:
            self._close()
        if self._fault is not None:
            raise self._fault
        broken = [capture.error for capture in self._captures if capture.error is not None]
        if broken and not stop.is_set():
            raise broken[0]

    def _await_link(self, stop: threading.Event) -> None:
        """Give the link a moment before a replay starts: a clip can wait, a camera cannot."""
        replay = all(camera.kind == "replay" for camera in self._config.camera.values())
        end_s = time.monotonic() + LINK_S
        while replay and self._uplink is not None and not self._link.connected and time.monotonic() < end_s:
            if stop.wait(0.01):
                break

    def _step(self, capture: Capture) -> bool:
        """Take one frame through the local tier. Returns whether there was one to take."""
        if capture.waits and self._uplink is not None and (self._uplink.full or self._steering.full):
            return False
        frame = capture.take()
        if frame is None:
            return False
        self._previews.see(frame)
        start_ns = time.monotonic_ns()
        features = Features(0, prepare(frame.pixels, self.bundle.manifest.preprocess))
        timings = {
            "wait": (start_ns - frame.captured_ns) / 1e6,
            "preprocess": (time.monotonic_ns() - start_ns) / 1e6,
        }
        seen = (frame.camera, frame.index, frame.captured_ns, frame.pixels.shape[:2])
        known = self._watch.look(frame, features, timings)
        if known is not None:
            repeated = Taken(*seen, features, None, timings, self._steering.plain)
            self._answer(repeated, Said(known.said, repeats=known.frame, degraded=frame.flaw))
            return True
        if not self._steering.computes():
            self._drop(Taken(*seen, features, None, timings, self._steering.plain), "gate only")
            return True
        course = self._steering.course(frame.camera)
        if frame.flaw is not None:  # not worth the link
            self._answer_locally(Taken(*seen, features, None, timings, course), frame.flaw)
            return True
        aside = self._steering.aside()
        if aside is not None and aside.copy:
            self._send(self._compute(Taken(*seen, features, None, {}, aside)))
        elif aside is not None:
            course = aside
        taken = self._compute(Taken(*seen, features, None, timings, course))
        said = None if taken.outcome is None else taken.outcome.answer
        self._steering.computed(answered=said is not None)
        if said is not None:
            self._answer(taken, Said(said))
        else:
            self._offload(taken)
        return True

    def _compute(self, frame: Taken) -> Taken:
        """Run the local segments of a frame's course."""
        course = frame.course
        if course.whole:
            return frame
        outcome = cascade.run([frame.features], course.tier, course.policy)[0]
        frame.timings.update(outcome.timings)
        self._steering.worked(course, frame.timings)
        for cut in outcome.withheld:
            self.counters.add("answers_withheld_total", exit=cut, reason="unlike")
        return replace(frame, features=outcome.features or frame.features, outcome=outcome)

    def _offload(self, frame: Taken) -> None:
        """Hand a frame up the link; where that cannot be, or would be in vain, answer it here."""
        if frame.course.local is not None:
            sent: Sent[Taken] | str = frame.course.local
        else:
            held = None if frame.course.only else self._steering.held(frame.captured_ns)
            sent = held or self._send(frame)
        if isinstance(sent, str):
            self._answer_locally(frame, sent)

    def _send(self, frame: Taken) -> Sent[Taken] | str:
        course = frame.course
        if self._uplink is None:
            return "no uplink"
        if frame.outcome is not None and frame.outcome.answer is not None:
            return "answered"  # a copy that has nothing left to go up
        sent = self._uplink.send(
            frame.features,
            frame,
            born_ns=frame.captured_ns,
            deadline_ns=frame.captured_ns + self._steering.budget_ms * 1_000_000,
            camera=self._cameras[frame.camera],
            variant=course.sent_variant,
            way=course.way,
            alone=course.only,
            before=self._steering.sent,
        )
        if sent == "link":
            self._steering.withdrawn()
        return sent

    def _late(self, sent: Sent[Taken], said: Reply | str) -> None:
        """Take a node's word for a frame that has its answer: it still tells of the link."""
        self._steering.replied(sent.sent_ns, None if isinstance(said, str) else said.timings, late=True)

    def _replied(self, sent: Sent[Taken], said: Reply | str) -> None:
        """Take a node's word, on the link's thread."""
        frame = sent.context
        self._steering.replied(sent.sent_ns, None if isinstance(said, str) else said.timings)
        if frame.course.copy:
            return  # it has its answer; this word was for the planner
        if isinstance(said, str):
            self._answer_locally(frame, f"refused: {said}", sent)
        else:
            above_ms = (time.monotonic_ns() - sent.sent_ns) / 1e6
            frame.timings.update(said.timings, network=above_ms - sum(said.timings.values()))
            answer = self._task.decode(said.answer)
            self._steering.compare(frame.course, frame.outcome, answer)
            output = ExitOutput(exit=said.exit, confidence=said.confidence, answer=answer)
            self._answer(frame, Said(output, sent, tier=said.tier, degraded=said.degraded))
        self._wake.set()

    def _answer_locally(self, frame: Taken, reason: str, sent: Sent[Taken] | None = None) -> None:
        """Answer from the best local exit, flagged with why nothing better came."""
        tier = frame.course.tier
        outcome = frame.outcome or cascade.run([frame.features], tier, frame.course.policy)[0]
        best = cascade.last_word(outcome, tier)
        frame.timings.update(outcome.timings)
        if best is None:
            self._drop(frame, reason)
        else:
            self._answer(frame, Said(best, sent, degraded=reason))

    def _drop(self, frame: Taken, reason: str) -> None:
        self.counters.add("frames_dropped_total", camera=frame.camera, reason=reason.split(":")[0])
        self._watch.dropped(frame.camera, frame.captured_ns)
        self._tell(Dropped(frame.camera, frame.index, reason))

    def _answer(self, frame: Taken, said: Said) -> None:
        result = conclude(
            frame,
            said,
            self._task,
            named=self.bundle.manifest.task,
            here=self._tier_name,
            kept=self._watch.kept,
            budget_ms=self._config.budget_ms,
            now_ns=time.monotonic_ns(),
        )
        how = result.exit if result.repeats is None else "repeat"
        self.counters.add("results_total", camera=result.camera, tier=result.tier, exit=how)
        if result.degraded is not None:  # counted by the device's own reasons; what a node says may be anything
            own = said.tier is None or result.degraded == "deadline"
            reason = result.degraded.split(":")[0] if own else "above"
            self.counters.add("results_degraded_total", camera=result.camera, reason=reason)
        self._tell(result)
        if self._news.takes(result, time.monotonic_ns()):
            payload = msgspec.json.encode(result)
            if not self._link.publish(self._topics.result(result.camera), payload, qos=1, lane=Lane.RESULTS):
                self.counters.add("results_unpublished_total", camera=result.camera)
        self._watch.answered(result, said.output, frame.captured_ns)

    def _moved(self) -> None:
        told = self._steering.told()
        if self._on_plan is not None and told is not None:
            self._on_plan(told)

    def _tell(self, result: Result | Dropped) -> None:
        if self._on_result is None or self._fault is not None:
            return
        try:
            self._on_result(result)
        except Exception as error:  # noqa: BLE001 — the caller's own; on the link's thread it would be lost, so `run` raises it
            self._fault = error
            self._wake.set()

    def _expire(self) -> None:
        """Answer the frames whose budget has ended."""
        if self._uplink is not None:
            for sent in self._uplink.expire(time.monotonic_ns()):
                self._steering.missed(sent.sent_ns)
                if not sent.context.course.copy:
                    self._answer_locally(sent.context, "deadline", sent)

    def _statuses(self) -> list[tuple[str, str]]:
        return [(capture.name, capture.status) for capture in self._captures]

    def _close(self) -> None:
        self._watchdog.stopping()
        for capture in self._captures:
            capture.close()
        end_s = time.monotonic() + DRAIN_S
        while self._uplink and time.monotonic() < end_s:
            self._expire()
            self._wake.clear()
            self._wake.wait(0.05)
        for sent in self._uplink.drain() if self._uplink is not None else []:
            if not sent.context.course.copy:
                self._answer_locally(sent.context, "stopping", sent)
        self._watch.close()
        self._presence.leave(self._statuses())
        self._link.close()
