"""A link that counts the bytes handed to it, by lane: what a limit on bytes is held against."""

from __future__ import annotations

import threading
from collections.abc import Callable

from runtime.counters import Counters
from runtime.link import Handler, Lane, Link, Then

UNSENT = ("late", "replaced", "full")  # words for what was dropped before any of it was written


class MeteredLink:
    """A `Link` around another one. Counts `link_handed_bytes_total{lane}`, all of MQTT but acknowledgements."""

    def __init__(self, link: Link, counters: Counters) -> None:
        self._link, self._counters = link, counters
        self._lock = threading.Lock()
        self._beside = 0

    @property
    def beside(self) -> int:
        """Bytes that were ever handed over and taken on other lanes than that of features."""
        with self._lock:
            return self._beside

    @property
    def connected(self) -> bool:
        """Whether the broker has accepted us and we have not lost it since."""
        return self._link.connected

    @property
    def max_packet_bytes(self) -> int | None:
        """The largest packet that the broker takes, all of MQTT counted; None: no limit, or not connected."""
        return self._link.max_packet_bytes

    def subscribe(self, topic_filter: str, handler: Handler) -> None:
        """Call `handler` for every message that matches, now and after every reconnect."""
        self._link.subscribe(topic_filter, handler)

    def on_connect(self, action: Callable[[], None]) -> None:
        """Call `action` on the link's thread after every connect, when the subscriptions stand."""
        self._link.on_connect(action)

    def start(self) -> None:
        """Begin to connect, in a thread of its own. Returns at once."""
        self._link.start()

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
        """Hand a message over for sending, as `Link.publish` does, and count what it costs."""
        counted, unsent = 0, False

        def ended(word: str) -> None:
            nonlocal unsent
            if word in UNSENT:  # perhaps before `publish` has returned
                with self._lock:
                    unsent = True
                    self._beside -= counted
            if then is not None:
                then(word)

        told = then if lane is Lane.FEATURES else ended
        cost = self._link.publish(topic, payload, qos=qos, retain=retain, lane=lane, expires_ns=expires_ns, then=told)
        if cost:
            with self._lock:
                counted = 0 if unsent or lane is Lane.FEATURES else cost
                self._beside += counted
            self._counters.add("link_handed_bytes_total", cost, lane=lane.name.lower())
        return cost

    def close(self) -> None:
        """Send what waits, for at most two seconds, say goodbye and end the thread."""
        self._link.close()
