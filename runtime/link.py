"""The link seam: how packets and JSON travel between tiers."""

from __future__ import annotations

from collections.abc import Callable
from enum import IntEnum
from importlib import import_module
from typing import Protocol

from runtime.config import BrokerConfig
from runtime.counters import Counters

LINKS = {"mqtt": "runtime.link_mqtt:MqttLink", "memory": "runtime.link_memory:MemoryLink"}

Handler = Callable[[str, bytes], None]  # (topic, payload); called on the link's thread, so it must not block
Then = Callable[[str], None]  # what became of a message: "", "unheard" or why it will never arrive; must not block


class Lane(IntEnum):
    """What goes first where the link is slower than what is handed over: the lower number."""

    EVENTS = 0  # and what is as small and rare: births, availability, statuses, plans
    FEATURES = 1  # requests and replies
    RESULTS = 2
    STATS = 3  # and previews


class Link(Protocol):
    """A connection to a broker that looks after itself: it never gives up and never blocks its user."""

    @property
    def connected(self) -> bool:
        """Whether the broker has accepted us and we have not lost it since."""
        ...

    @property
    def max_packet_bytes(self) -> int | None:
        """The largest packet that the broker takes, all of MQTT counted; None: no limit, or not connected."""
        ...

    def subscribe(self, topic_filter: str, handler: Handler) -> None:
        """Call `handler` for every message that matches, now and after every reconnect."""
        ...

    def on_connect(self, action: Callable[[], None]) -> None:
        """Call `action` on the link's thread after every connect, when the subscriptions stand."""
        ...

    def start(self) -> None:
        """Begin to connect, in a thread of its own. Returns at once."""
        ...

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
        """Hand a message over for sending.

        Args:
            topic: where to.
            payload: what.
            qos: 0 or 1.
            retain: whether the broker keeps it for those who come later.
            lane: what it may overtake; within a lane the order is kept.
            expires_ns: time.monotonic_ns() after which nobody wants it: it is dropped if it is not being written yet.
            then: called once if the message was accepted, on the link's thread or a publisher's: with "" when the
                broker has confirmed it (QoS 1) or it was written (QoS 0), with "unheard" when the broker says that
                nobody subscribes to it, else with the reason why it will never be confirmed.

        Returns:
            The bytes it costs on the wire; 0 when it was refused, which is counted with its reason.
        """
        ...

    def close(self) -> None:
        """Send what waits, for at most two seconds, say goodbye and end the thread."""
        ...


class LinkFactory(Protocol):
    """Makes links of one kind."""

    def __call__(
        self,
        broker: BrokerConfig,
        *,
        client_id: str,
        will: tuple[str, bytes] | None,
        counters: Counters,
        beat: str | None,
    ) -> Link:
        """Make a link that has not been started."""
        ...


def open_link(
    broker: BrokerConfig,
    *,
    client_id: str,
    will: tuple[str, bytes] | None = None,
    counters: Counters,
    beat: str | None = None,
) -> Link:
    """Make the link that `broker.kind` names.

    Args:
        broker: where, and how.
        client_id: of MQTT; nobody else's at this broker.
        will: topic and payload that the broker retains when we vanish.
        counters: told of what is refused, dropped and lost.
        beat: topic of small messages that ask whether the broker is still there (`heartbeat_s`); None: none are sent.
    """
    module, name = LINKS[broker.kind].split(":")
    factory: LinkFactory = getattr(import_module(module), name)
    return factory(broker, client_id=client_id, will=will, counters=counters, beat=beat)
