"""The link seam: how packets and JSON travel between tiers."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Protocol

from runtime.config import BrokerConfig
from runtime.counters import Counters

LINKS = {"mqtt": "runtime.link_mqtt:MqttLink", "memory": "runtime.link_memory:MemoryLink"}

Handler = Callable[[str, bytes], None]  # (topic, payload); called on the link's thread, so it must not block


class Link(Protocol):
    """A connection to a broker that looks after itself: it never gives up and never blocks its user."""

    @property
    def connected(self) -> bool:
        """Whether the broker has accepted us and we have not lost it since."""
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

    def publish(self, topic: str, payload: bytes, *, qos: int = 0, retain: bool = False) -> int:
        """Hand a message over for sending.

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
        self, broker: BrokerConfig, *, client_id: str, will: tuple[str, bytes] | None, counters: Counters
    ) -> Link:
        """Make a link that has not been started."""
        ...


def open_link(
    broker: BrokerConfig, *, client_id: str, will: tuple[str, bytes] | None = None, counters: Counters
) -> Link:
    """Make the link that `broker.kind` names; `will` (topic, payload) is retained by the broker when we vanish."""
    module, name = LINKS[broker.kind].split(":")
    factory: LinkFactory = getattr(import_module(module), name)
    return factory(broker, client_id=client_id, will=will, counters=counters)
