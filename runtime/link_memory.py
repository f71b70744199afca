"""A link without a network: all links of one process that name the same host and port share a broker in memory.

Serves tests, the parity proof and programs that want all tiers in one process. Messages are delivered on the
publisher's thread. With `loss_ratio` it loses messages of QoS 0, as a broker does for a link that drops: for measuring.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable

from paho.mqtt.client import topic_matches_sub

from runtime.config import BrokerConfig
from runtime.counters import Counters
from runtime.errors import ConfigError
from runtime.link import Handler, Lane, Then
from runtime.topics import publish_bytes


class _Hub:
    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.links: list[MemoryLink] = []
        self.retained: dict[str, bytes] = {}


_hubs: dict[tuple[str, int], _Hub] = {}
_hubs_lock = threading.Lock()


class MemoryLink:
    """A connection to the broker in memory; it is never lost, unless `connected` is set to False by its owner."""

    def __init__(
        self,
        broker: BrokerConfig,
        *,
        client_id: str,
        will: tuple[str, bytes] | None,
        counters: Counters,
        beat: str | None = None,
    ) -> None:
        with _hubs_lock:
            self._hub = _hubs.setdefault((broker.host, broker.port), _Hub())
        self._subscriptions: list[tuple[str, Handler]] = []
        self._actions: list[Callable[[], None]] = []
        self._counters = counters
        self._loss_ratio = broker.loss_ratio
        self._chance = random.Random(f"{broker.loss_seed}/{client_id}")
        self._chance_lock = threading.Lock()
        self.connected = False

    @property
    def max_packet_bytes(self) -> int | None:
        """There is no limit in memory."""
        return None

    def subscribe(self, topic_filter: str, handler: Handler) -> None:
        """Call `handler` for every message that matches; there are no shared subscriptions in memory."""
        if topic_filter.startswith("$share/"):
            raise ConfigError("pool: the broker in memory has no shared subscriptions; leave pool out")
        self._subscriptions.append((topic_filter, handler))

    def on_connect(self, action: Callable[[], None]) -> None:
        """Call `action` at `start`."""
        self._actions.append(action)

    def start(self) -> None:
        """Connect at once."""
        with self._hub.lock:
            self._hub.links.append(self)
            retained = dict(self._hub.retained)
        self.connected = True
        for topic, payload in retained.items():
            self._deliver(topic, payload)
        for action in self._actions:
            action()

    def publish(
        self,
        topic: str,
        payload: bytes,
        *,
        qos: int = 0,
        retain: bool = False,
        lane: Lane = Lane.FEATURES,
        expires_ns: int | None = None,
        then: Then | None = None,
    ) -> int:
        """Deliver at once to every link that subscribed; costs what the same message costs in MQTT 5."""
        if not self.connected or (expires_ns is not None and expires_ns <= time.monotonic_ns()):
            self._counters.add("link_refused_total", reason="late" if self.connected else "offline")
            return 0
        if qos == 0 and self._loses():
            self._counters.add("link_lost_total", lane=lane.name.lower(), reason="loss_ratio")
            if then is not None:
                then("")
            return publish_bytes(topic, len(payload), qos=qos)
        with self._hub.lock:
            links = list(self._hub.links)
            if retain and payload:
                self._hub.retained[topic] = payload
            elif retain:
                self._hub.retained.pop(topic, None)
        heard = sum(link._deliver(topic, payload) for link in links)  # noqa: SLF001 — the same class
        if then is not None:
            then("" if heard or qos == 0 else "unheard")
        return publish_bytes(topic, len(payload), qos=qos)

    def close(self) -> None:
        """Leave the broker."""
        self.connected = False
        with self._hub.lock:
            if self in self._hub.links:
                self._hub.links.remove(self)

    def _loses(self) -> bool:
        with self._chance_lock:
            return self._loss_ratio > 0 and self._chance.random() < self._loss_ratio

    def _deliver(self, topic: str, payload: bytes) -> int:
        """Returns how many subscriptions match."""
        heard = 0
        for topic_filter, handler in self._subscriptions:
            if self.connected and topic_matches_sub(topic_filter, topic):
                heard += 1
                handler(topic, payload)
        return heard
