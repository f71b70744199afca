"""What one tier tells of itself on its own topics: birth, availability, its cameras' statuses, its counters."""

from __future__ import annotations

import platform
import time
from collections.abc import Iterable
from importlib.metadata import version
from typing import Any

import msgspec
import onnxruntime

from runtime.counters import Counters
from runtime.link import Lane, Link
from runtime.memory import give_back
from runtime.topics import Subtree


class Presence:
    """Tells a link's peers that this tier is there, and what it counts every `stats_interval_s`.

    `told` is what the birth message says beside the versions; the statuses of cameras are told when they change, and
    again after every connect, since whoever looks now may not have been there before.
    """

    def __init__(
        self, link: Link, topics: Subtree, counters: Counters, *, stats_interval_s: float, told: dict[str, Any]
    ) -> None:
        self._link = link
        self._topics = topics
        self._counters = counters
        self._stats_interval_s = stats_interval_s
        self._next_stats_s = time.monotonic() + stats_interval_s
        self._statuses: dict[str, str] = {}
        self._birth = {
            "kinflow": version("kinflow"),
            "onnxruntime": onnxruntime.__version__,
            "python": platform.python_version(),
            "machine": platform.machine(),
            **told,
        }
        link.on_connect(self._announce)

    def tell(self, statuses: Iterable[tuple[str, str]] = ()) -> None:
        """Publish what is due: statuses, by camera, that have changed, and the counters; and free memory with these."""
        for camera, status in statuses if self._link.connected else ():
            if self._statuses.get(camera) != status:
                self._statuses[camera] = status
                self._link.publish(
                    self._topics.camera_status(camera), status.encode(), qos=1, retain=True, lane=Lane.EVENTS
                )
        if time.monotonic() >= self._next_stats_s:
            self._next_stats_s += self._stats_interval_s
            self._publish_stats()
            give_back()

    def leave(self, statuses: Iterable[tuple[str, str]] = ()) -> None:
        """Publish the last statuses and counters, and that this tier goes."""
        self.tell(statuses)
        self._publish_stats()
        if self._link.connected:
            self._link.publish(self._topics.availability, b"offline", qos=1, retain=True, lane=Lane.EVENTS)

    def _announce(self) -> None:
        self._link.publish(self._topics.birth, msgspec.json.encode(self._birth), qos=1, retain=True, lane=Lane.EVENTS)
        self._link.publish(self._topics.availability, b"online", qos=1, retain=True, lane=Lane.EVENTS)
        self._statuses.clear()

    def _publish_stats(self) -> None:
        if self._link.connected:
            self._link.publish(self._topics.stats, msgspec.json.encode(self._counters.snapshot()), lane=Lane.STATS)
