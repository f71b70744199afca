"""What a device makes of answers over time: repeats where nothing has changed, and events. One Watch per device.

The rim around `gate` and `events`, which are pure: it knows the bundle, the settings, the counters and the link. All
of it is safe to call from any thread, since answers come on the link's.
"""

from __future__ import annotations

import secrets
import threading
import time
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import msgspec

from runtime.config import DeviceConfig
from runtime.counters import Counters
from runtime.datatypes import ExitOutput, Features, Frame, Result
from runtime.events import FOLLOWS, Event, Follower, Seen, Settings, Sighting, counts, open_follower
from runtime.forwarding import Forwarding
from runtime.gate import Gate, Rule
from runtime.gate_spec import MAX_AGE_MS, GateSpec
from runtime.in_order import InOrder
from runtime.link import Lane, Link
from runtime.manifest import Bundle
from runtime.task import Task
from runtime.topics import Subtree

SESSION_BYTES = 6


@dataclass(frozen=True, slots=True)
class Known:
    """An answer that may be repeated."""

    said: ExitOutput
    frame: int


@dataclass(slots=True)
class _Camera:
    gate: Gate[Known] | None
    follower: Follower | None
    order: InOrder[Seen]
    present: Mapping[str, str] | None = None  # as told last
    frame: int | None = None  # of the answer taken last


class Watch:
    """Gates and events of all cameras of a device. `wake` is called when `tend` should be called soon."""

    def __init__(
        self,
        config: DeviceConfig,
        bundle: Bundle,
        task: Task,
        link: Link,
        topics: Subtree,
        counters: Counters,
        wake: Callable[[], None],
    ) -> None:
        self._task = task
        self._link = link
        self._topics = topics
        self._counters = counters
        self._lock = threading.Lock()
        self._spec = _gate(config, bundle)
        rule = _rule(config, self._spec)
        kind = FOLLOWS.get(bundle.manifest.task)
        enabled = kind == "objects" if config.events.enabled is None else config.events.enabled
        times = Settings(config.events.confirm_frames, config.events.gone_ms, config.events.update_ms)
        session = secrets.token_hex(SESSION_BYTES)
        self._cameras: dict[str, _Camera] = {}
        for camera in config.camera:
            gate = None if rule is None else Gate(rule, self._loss, zlib.crc32(camera.encode()))
            untold = partial(self._untold, camera)
            follower = open_follower(kind, camera, session, times, untold) if kind is not None and enabled else None
            self._cameras[camera] = _Camera(gate, follower, InOrder())
        follows = any(camera.follower is not None for camera in self._cameras.values())
        self._forwarding = forwarding = Forwarding(config.events, link, counters, session, wake) if follows else None
        if forwarding is not None:
            link.subscribe(topics.again, lambda topic, payload: forwarding.again())

    @property
    def kept(self) -> float | None:
        """What repeated answers keep of agreement, by the bundle; None where nothing was promised."""
        return None if self._spec is None else self._spec.kept

    def look(self, frame: Frame, features: Features, timings: dict[str, float]) -> Known | None:
        """A frame was taken; `features` are those of cut 0. Returns the answer that can be repeated for it, if any.

        If there is none, `answered` or `dropped` has to follow.
        """
        with self._lock:
            camera = self._cameras[frame.camera]
            if camera.follower is not None:
                self._take(frame.camera, camera.order.expect(frame.captured_ns))
            if camera.gate is None:
                return None
            start_ns = time.monotonic_ns()
            repeat = camera.gate.ask(features.tensor[0], frame.captured_ns)
            timings["gate"] = (time.monotonic_ns() - start_ns) / 1e6
            return None if repeat is None else repeat.answer

    def answered(self, result: Result, said: ExitOutput, captured_ns: int) -> None:
        """A frame has its Result, whoever gave it."""
        with self._lock:
            camera = self._cameras[result.camera]
            if camera.gate is not None and result.repeats is None:
                if result.degraded is not None or said.partial:
                    camera.gate.lost(captured_ns)
                else:
                    self._audited(result.camera, camera.gate.answered(captured_ns, Known(said, result.frame)))
            if camera.follower is not None:
                seen = Seen(result.frame, captured_ns, _found(result.answer), result.degraded is None)
                self._settle(result.camera, captured_ns, seen)

    def dropped(self, name: str, captured_ns: int) -> None:
        """A frame gets no answer."""
        with self._lock:
            camera = self._cameras[name]
            if camera.gate is not None:
                camera.gate.lost(captured_ns)
            if camera.follower is not None:
                self._settle(name, captured_ns, None)

    def announce(self) -> None:
        """The link is there: say what is present, as whatever was retained may be of an earlier run."""
        with self._lock:
            for name, camera in self._cameras.items():
                if camera.follower is not None:
                    self._publish_state(name)
        if self._forwarding is not None:
            self._forwarding.connected()

    def tend(self) -> None:
        """Send events that wait and may go now; to be called a few times a second."""
        if self._forwarding is not None:
            self._forwarding.tend()

    def close(self) -> None:
        """End all events, and send what waits; what is before the cameras is not known any more."""
        with self._lock:
            for name, camera in self._cameras.items():
                if camera.follower is not None:
                    for event in camera.follower.stop():
                        self._publish(event, time.monotonic_ns())
                    self._publish_state(name)
        if self._forwarding is not None:
            self._forwarding.close()

    def _loss(self, repeated: Known, computed: Known) -> float:
        same, total = self._task.compare(repeated.said.answer, computed.said.answer)
        return 1 - same / total

    def _audited(self, camera: str, change: int | None) -> None:
        if change is not None:
            self._counters.add("gate_audits_total", camera=camera)
        if change:
            self._counters.add("gate_changes_total", camera=camera, to="tighter" if change > 0 else "looser")

    def _settle(self, name: str, captured_ns: int, seen: Seen | None) -> None:
        free = self._cameras[name].order.settle(captured_ns, seen)
        if free is None:
            self._untold(name, "late")
        else:
            self._take(name, free)

    def _take(self, name: str, answers: list[Seen]) -> None:
        camera = self._cameras[name]
        assert camera.follower is not None
        for seen in answers:
            camera.frame = seen.frame
            for event in camera.follower.follow(seen):
                self._publish(event, seen.captured_ns)
        if answers and camera.follower.present() != camera.present:
            self._publish_state(name)

    def _publish(self, event: Event, captured_ns: int) -> None:
        assert self._forwarding is not None
        self._counters.add("events_total", camera=event.camera, type=event.type)
        self._forwarding.send(event, self._topics.event(event.camera), captured_ns)

    def _publish_state(self, name: str) -> None:
        camera = self._cameras[name]
        assert camera.follower is not None
        camera.present = present = camera.follower.present()
        state = {
            "camera": name,
            "frame": camera.frame,
            "count": None if present is None else counts(present),
            "total": None if present is None else len(present),
            "ids": {} if present is None else dict(present),
        }
        self._link.publish(self._topics.state(name), msgspec.json.encode(state), qos=1, retain=True, lane=Lane.EVENTS)

    def _untold(self, camera: str, reason: str) -> None:
        self._counters.add("events_untold_total", camera=camera, reason=reason)


def _gate(config: DeviceConfig, bundle: Bundle) -> GateSpec | None:
    """What the gate in force promises; None: no gate, or one at a threshold that nobody fitted."""
    spec = bundle.manifest.gate
    return spec if config.gate == "auto" and spec is not None and spec.threshold is not None else None


def _rule(config: DeviceConfig, spec: GateSpec | None) -> Rule | None:
    given = None if isinstance(config.gate, str) else config.gate
    threshold = given if spec is None else spec.threshold
    if threshold is None:
        return None
    fitted = GateSpec(threshold=threshold) if spec is None else spec
    age_ms = config.gate_max_age_ms or (MAX_AGE_MS if spec is None else spec.max_age_ms)
    return Rule(threshold, 1 - fitted.kept, age_ms * 1_000_000)


def _found(answer: Mapping[str, Any]) -> tuple[Sighting, ...] | None:
    """What a Result's answer shows: objects by their boxes, or labels best first."""
    if "topk" in answer:
        return tuple(Sighting(label, score) for label, score in answer["topk"])
    if answer.get("boxes") is None:
        return None
    return tuple(Sighting(box["label"], box["score"], tuple(box["box"])) for box in answer["boxes"])
