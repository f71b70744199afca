"""What a connection has accepted from publishers, until it is confirmed or known to be lost; each ending is counted.

paho gets a packet only when it has written all before and the socket takes more. So at most one packet stands before an
event, and what is late or replaced by then is never written.
"""

from __future__ import annotations

import logging
import select
import threading
import time
from collections import deque
from collections.abc import Callable

from paho.mqtt.client import Client
from paho.mqtt.enums import MQTTErrorCode
from paho.mqtt.reasoncodes import ReasonCode

from runtime.config import BrokerConfig
from runtime.counters import Counters
from runtime.link import Lane, Then
from runtime.mqtt_client import AliasProperties
from runtime.mqtt_limits import Aliases, Limits
from runtime.send_queue import Dropped, Message, SendQueue
from runtime.topics import publish_bytes

log = logging.getLogger(__name__)

NOBODY_SUBSCRIBES = 0x10  # MQTT 5, of a PUBACK
OK = MQTTErrorCode.MQTT_ERR_SUCCESS


class Outgoing:
    """Messages on their way out. Any thread may publish and write; `tell` runs the `then` of those that have ended."""

    def __init__(self, broker: BrokerConfig, counters: Counters, guard: Callable[[Callable[[], None]], None]) -> None:
        self._max_unconfirmed = max(1, broker.max_unsent_messages // 2)  # the other half can still be overtaken
        self._counters = counters
        self._guard = guard
        self._writing = threading.Lock()  # held by whoever writes to the socket; comes before _lock
        self._ended: deque[tuple[Then, str]] = deque()
        self._confirmed: deque[tuple[int, ReasonCode]] = deque()
        self._lock = threading.Lock()  # guards what follows
        self._queue = SendQueue(broker.max_unsent_messages, broker.max_unsent_bytes)
        self._client: Client | None = None
        self._poll = select.poll()
        self._limits = Limits()
        self._aliases = Aliases(0)
        self._properties: dict[int, AliasProperties] = {}
        self._mqtt5 = True
        self._written_next: list[Message] = []  # of QoS 0, with paho
        self._unconfirmed: dict[int, Message] = {}  # of QoS 1, by packet identifier
        self._ahead_bytes = 0  # of both
        self._said: set[str] = set()  # what sentences of this connection were about

    @property
    def open(self) -> bool:
        """Whether there is a connection that takes messages."""
        return self._client is not None

    @property
    def client(self) -> Client | None:
        """The connection that takes messages."""
        return self._client

    @property
    def limits(self) -> Limits:
        """What the broker allows on this connection."""
        return self._limits if self._client is not None else Limits()

    @property
    def waiting(self) -> bool:
        """Whether anything has not come to its end."""
        with self._lock:
            return len(self._queue) > 0 or self._ahead > 0

    @property
    def _ahead(self) -> int:
        return len(self._written_next) + len(self._unconfirmed)

    def begin(self, client: Client, limits: Limits, *, mqtt5: bool) -> None:
        """Take messages for this connection from now on."""
        sock = client.socket()
        with self._lock:
            self._poll = select.poll()
            if sock is not None:
                self._poll.register(sock, select.POLLOUT)
            self._limits, self._mqtt5 = limits, mqtt5
            self._aliases = Aliases(limits.topic_alias_maximum)
            self._said.clear()
            self._client = client

    def end(self, client: Client, reason: str) -> bool:
        """Give up everything that was meant for this connection. Returns whether it had begun."""
        with self._lock:
            if self._client is not client:
                return False
            self._client = None
            lost = [*self._unconfirmed.values(), *self._written_next, *self._queue.clear()]
            self._unconfirmed.clear()
            self._confirmed.clear()
            self._written_next.clear()
            self._ahead_bytes = 0
        for message in lost:
            self._lose(message, reason)
        self.tell()
        return True

    def put(
        self, topic: str, payload: bytes, qos: int, retain: bool, lane: Lane, expires_ns: int | None, then: Then | None
    ) -> int:
        """Accept a message; returns its bytes of MQTT, 0 if it is refused."""
        now_ns = time.monotonic_ns()
        if expires_ns is not None and expires_ns <= now_ns:
            return self._refuse("late")
        with self._lock:
            if self._client is None:
                return self._refuse("offline")
            qos, retain = self._within(qos, retain)
            alias, bare = self._aliases.form(topic, lane)
            wire_topic = "" if bare else topic
            cost = publish_bytes(wire_topic, len(payload), qos=qos, mqtt5=self._mqtt5, alias=alias > 0)
            most = self._limits.max_packet_bytes
            if most is not None and cost > most:
                self._say(
                    "oversize",
                    f"a packet of {cost} bytes is over the broker's limit of {most}: raise max_packet_size in "
                    "mosquitto.conf, or send at a smaller rate",
                )
                return self._refuse("oversize")
            message = Message(topic, payload, qos, retain, lane, cost, expires_ns, then, alias, bare)
            accepted, dropped = self._queue.put(message, now_ns, ahead=self._ahead, ahead_bytes=self._ahead_bytes)
            self._note_dropped(dropped)
            return cost if accepted else self._refuse("full")

    def confirm(self, mid: int, reason: ReasonCode) -> None:
        """Take note of a PUBACK. paho's locks are held here, which a publisher that holds ours may want."""
        self._confirmed.append((mid, reason))

    def wants_write(self, client: Client) -> bool:
        """Whether to come again when the socket takes more."""
        if client.want_write():
            return True
        with self._lock:
            return self._client is client and self._queue.ready(confirmable=self._confirmable)

    def write(self, client: Client) -> MQTTErrorCode:
        """Write what the socket takes, what goes first first. Never blocks."""
        with self._writing:
            while True:
                if client.want_write():
                    result = client.loop_write()
                    if result != OK or client.want_write():
                        return result
                with self._lock:
                    self._note_written()
                    self._note_confirmed()
                    if not self._hand_over(client):
                        return OK

    def expire(self) -> None:
        """Drop what is late, also while nothing can be written."""
        with self._lock:
            self._note_dropped(self._queue.expire(time.monotonic_ns()))

    def unwritten_bytes(self) -> int:
        """What paho may still have to write, at the most."""
        with self._lock:
            return self._ahead_bytes

    def tell(self) -> None:
        """Say what became of messages. Not to be called with a lock held, as whoever is told may publish."""
        while self._ended:
            try:
                then, outcome = self._ended.popleft()
            except IndexError:  # another thread was quicker
                return
            self._guard(lambda: then(outcome))  # noqa: B023 — called at once

    @property
    def _confirmable(self) -> bool:
        return len(self._unconfirmed) < min(self._limits.receive_maximum, self._max_unconfirmed)

    def _hand_over(self, client: Client) -> bool:
        """Give paho the next message, if there is one and the socket takes it."""
        confirmable = self._confirmable
        if self._client is not client or not self._queue.ready(confirmable=confirmable) or not self._writable():
            return False
        message, dropped = self._queue.take(time.monotonic_ns(), confirmable=confirmable)
        self._note_dropped(dropped)
        if message is None:
            return False
        properties = None
        if message.alias:
            properties = self._properties.get(message.alias)
            if properties is None:
                properties = self._properties[message.alias] = AliasProperties(message.alias)
        topic = "" if message.bare else message.topic
        info = client.publish(topic, message.payload, message.qos, message.retain, properties)
        if info.rc != OK:
            self._lose(message, "connection lost" if info.rc == MQTTErrorCode.MQTT_ERR_NO_CONN else "client")
            return False
        if message.alias:
            self._aliases.sent(message.alias)
        self._ahead_bytes += message.cost_bytes
        if message.qos:
            self._unconfirmed[info.mid] = message
        else:
            self._written_next.append(message)
        return True

    def _writable(self) -> bool:
        return any(event == select.POLLOUT for _, event in self._poll.poll(0))

    def _note_written(self) -> None:
        for message in self._written_next:
            self._ahead_bytes -= message.cost_bytes
            self._finish(message, "")
        self._written_next.clear()

    def _note_confirmed(self) -> None:
        while self._confirmed:
            mid, reason = self._confirmed.popleft()
            message = self._unconfirmed.pop(mid, None)
            if message is None:
                continue
            self._ahead_bytes -= message.cost_bytes
            if reason.is_failure:
                self._say(
                    message.topic, f"the broker refuses {message.topic}: {reason}; look at its ACL and its limits"
                )
                self._lose(message, "refused by the broker")
            else:
                self._finish(message, "unheard" if reason.value == NOBODY_SUBSCRIBES else "")

    def _note_dropped(self, dropped: list[Dropped]) -> None:
        for message, reason in dropped:
            self._counters.add("link_dropped_total", lane=message.lane.name.lower(), reason=reason)
            self._finish(message, reason)

    def _lose(self, message: Message, reason: str) -> None:
        self._counters.add("link_lost_total", lane=message.lane.name.lower(), reason=reason)
        self._finish(message, reason)

    def _finish(self, message: Message, outcome: str) -> None:
        if message.then is not None:
            self._ended.append((message.then, outcome))

    def _refuse(self, reason: str) -> int:
        self._counters.add("link_refused_total", reason=reason)
        return 0

    def _within(self, qos: int, retain: bool) -> tuple[int, bool]:
        """What the broker allows of both."""
        if qos > self._limits.maximum_qos:
            self._say(
                "qos", "the broker takes no QoS 1, so messages may get lost unnoticed: raise max_qos in mosquitto.conf"
            )
            qos = self._limits.maximum_qos
        if retain and not self._limits.retain_available:
            self._say(
                "retain", "the broker retains nothing, so who comes later sees no state: set retain_available to true"
            )
            retain = False
        return qos, retain

    def _say(self, about: str, sentence: str) -> None:
        log.log(logging.DEBUG if about in self._said else logging.ERROR, "%s", sentence)
        self._said.add(about)
