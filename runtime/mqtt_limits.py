"""What a broker allows on one connection, as it says in CONNACK, and short numbers in place of topics."""

from __future__ import annotations

from dataclasses import dataclass

from paho.mqtt.properties import Properties

from runtime.link import Lane

ALIASED = (Lane.FEATURES, Lane.RESULTS)  # what goes with every frame


@dataclass(frozen=True, slots=True)
class Limits:
    """The defaults are those of MQTT 5, 3.2.2.3, and hold for 3.1.1."""

    max_packet_bytes: int | None = None
    receive_maximum: int = 65_535  # QoS-1 messages that the broker has not acknowledged
    topic_alias_maximum: int = 0
    maximum_qos: int = 2
    retain_available: bool = True


def limits(connack: Properties | None) -> Limits:
    """Read what the broker allows."""
    return Limits(
        max_packet_bytes=getattr(connack, "MaximumPacketSize", None),
        receive_maximum=getattr(connack, "ReceiveMaximum", 65_535),
        topic_alias_maximum=getattr(connack, "TopicAliasMaximum", 0),
        maximum_qos=getattr(connack, "MaximumQoS", 2),
        retain_available=bool(getattr(connack, "RetainAvailable", 1)),
    )


class Aliases:
    """Topic aliases of one connection: a topic's first message carries it and its number, later ones the number."""

    def __init__(self, maximum: int) -> None:
        self._maximum = maximum
        self._numbers: dict[str, int] = {}
        self._known: set[int] = set()

    def form(self, topic: str, lane: Lane) -> tuple[int, bool]:
        """The number for a topic, 0 for none, and whether the broker will know it before this message comes.

        The first topics of the lanes that go with every frame get the broker's numbers, and keep them.
        """
        number = self._numbers.get(topic)
        if number is None:
            if lane not in ALIASED or len(self._numbers) >= self._maximum:
                return 0, False
            number = self._numbers[topic] = len(self._numbers) + 1
        return number, number in self._known

    def sent(self, number: int) -> None:
        """Take note that a message with this number and its topic goes out before everything that comes now."""
        self._known.add(number)
