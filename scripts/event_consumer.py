"""A consumer of a device's events, at the broker itself, and what it has missed or got twice."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Sequence

import msgspec
from paho.mqtt.client import Client, MQTTMessage
from paho.mqtt.enums import CallbackAPIVersion, MQTTProtocolVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties
from paho.mqtt.reasoncodes import ReasonCode

from runtime.config import BrokerConfig
from runtime.inbox import Inbox
from runtime.topics import Subtree

KEPT_S = 3600  # a session, by the broker, while the consumer is away
REST_S = 3.0  # for so long the last events are waited for


class EventTally(msgspec.Struct, frozen=True, kw_only=True):
    """What became of the events of one run of one device."""

    made: int  # by the device's own count
    delivered: int  # different ones that came
    lost: int  # made, and never came
    gaps: int  # numbers that are missing between those that came
    twice: int  # deliveries of an event that had come before
    twice_after_inbox: int  # of these, those that runtime.inbox took for new: to be 0


def tally(came: Sequence[tuple[str, int]], made: int) -> EventTally:
    """Count deliveries, each with the event's session and sequence, in the order in which they came."""
    inbox = Inbox()
    taken = Counter(key for key in came if inbox.take("device", *key).new)
    return EventTally(
        made=made,
        delivered=len(set(came)),
        lost=made - len(set(came)),
        gaps=inbox.missing,
        twice=len(came) - len(set(came)),
        twice_after_inbox=sum(taken.values()) - len(taken),
    )


class EventConsumer:
    """Collects the events of a device's cameras over a connection of its own, while a `with` lasts.

    QoS 1 with a session that the broker keeps, as an application that must miss nothing would do it.
    """

    def __init__(self, broker: BrokerConfig, device: Subtree) -> None:
        self._filter = device.event("+")
        self.came: list[tuple[str, int]] = []
        self._ready = threading.Event()
        protocol = MQTTProtocolVersion.MQTTv5
        self._client = Client(CallbackAPIVersion.VERSION2, client_id=f"{device.site}-events", protocol=protocol)
        self._client.reconnect_delay_set(1, 1)
        self._client.on_connect = self._connected
        self._client.on_subscribe = lambda *_: self._ready.set()
        self._client.on_message = self._received
        kept = Properties(PacketTypes.CONNECT)  # type: ignore[no-untyped-call]
        kept.SessionExpiryInterval = KEPT_S
        self._client.connect_async(broker.host, broker.port, clean_start=False, properties=kept)

    def __enter__(self) -> EventConsumer:
        self._client.loop_start()
        self._ready.wait(REST_S)
        return self

    def __exit__(self, *failure: object) -> None:
        self._client.disconnect()
        self._client.loop_stop()

    def tally(self, made: int) -> EventTally:
        """What has come; while some are missing, wait a little for them."""
        end_s = time.monotonic() + REST_S
        while len(set(self.came)) < made and time.monotonic() < end_s:
            time.sleep(0.05)
        return tally(self.came, made)

    def _connected(
        self, client: Client, userdata: object, flags: object, reason: ReasonCode, properties: Properties | None
    ) -> None:
        client.subscribe(self._filter, qos=1)

    def _received(self, client: Client, userdata: object, message: MQTTMessage) -> None:
        told = msgspec.json.decode(message.payload)
        self.came.append((told["session"], told["sequence"]))
