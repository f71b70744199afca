"""MQTT by paho: version 5, or 3.1.1 where the broker speaks no 5. One thread keeps the connection and never gives up.

paho's own loop leaves gaps that this module closes: Nagle stays on, an exception in a callback ends its thread,
queues are unbounded, reconnects have no jitter, and the broker's packet limit is not looked at.
"""

from __future__ import annotations

import contextlib
import logging
import random
import select
import socket
import ssl
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from paho.mqtt.client import Client, MQTTMessage, MQTTMessageInfo, topic_matches_sub
from paho.mqtt.enums import CallbackAPIVersion, MQTTErrorCode, MQTTProtocolVersion
from paho.mqtt.properties import Properties
from paho.mqtt.reasoncodes import ReasonCode

from runtime.config import BrokerConfig
from runtime.counters import Counters
from runtime.credentials import read_password, tls_context
from runtime.link import Handler, Lane, Then
from runtime.topics import publish_bytes

log = logging.getLogger(__name__)

CONNECT_TIMEOUT_S = 5.0
BACKOFF_MIN_S, BACKOFF_MAX_S = 0.25, 30.0
DRAIN_S = 2.0
LOOP_S = 0.25
STEADY_S = 1.0  # a connection that has lived so long was a good one
SHORT_IN_A_ROW = 3
SAME_ID = "does another client use its id? give each device and node an id of its own"
TAKEN_OVER = 0x8E  # MQTT 5: another client has connected with this client's id
NOBODY_SUBSCRIBES = 0x10  # MQTT 5, of a PUBACK


@dataclass(frozen=True, slots=True)
class _Unsent:
    info: MQTTMessageInfo
    cost_bytes: int
    lane: Lane
    then: Then | None


class _Client(Client):
    """paho's, with `on_publish` on the link's thread alone.

    Elsewhere paho would call it for QoS 0, and make a publisher wait for whatever handler runs just then.
    """

    thread: threading.Thread

    @property
    def on_publish(self) -> Any:
        """Called on the link's thread when a message is confirmed."""
        return super().on_publish if threading.current_thread() is self.thread else None

    @on_publish.setter
    def on_publish(self, function: Any) -> None:
        Client.on_publish.fset(self, function)  # type: ignore[attr-defined]


class MqttLink:
    """One connection to one broker."""

    def __init__(
        self, broker: BrokerConfig, *, client_id: str, will: tuple[str, bytes] | None, counters: Counters
    ) -> None:
        self._broker = broker
        self._client_id = client_id
        self._will = will
        self._counters = counters
        self._password = read_password(broker)
        self._tls = tls_context(broker)
        self._protocol = MQTTProtocolVersion.MQTTv311 if broker.version == "3.1.1" else MQTTProtocolVersion.MQTTv5
        self._subscriptions: list[tuple[str, Handler]] = []
        self._actions: list[Callable[[], None]] = []
        self._thread = threading.Thread(target=self._run, name=f"kinflow-link-{client_id}", daemon=True)
        self._closing = threading.Event()
        self._waker: socket.socket | None = None
        self._woken: socket.socket | None = None
        self._writing = threading.Lock()  # held by whoever writes to the socket
        self._lock = threading.Lock()  # guards what follows
        self._client: Client | None = None  # set while connected
        self._unsent: list[_Unsent] = []
        self._unheard: set[int] = set()  # packet identifiers of what nobody subscribes to
        self._settled: deque[tuple[Then, str]] = deque()  # what is to be told without the lock
        self._max_packet_bytes: int | None = None
        self._acknowledged = self._refused = False  # by CONNACK; refused for other reasons than the version
        self._awaited: set[int] = set()
        self._problem = ""

    @property
    def connected(self) -> bool:
        """Whether the broker has accepted us and all subscriptions."""
        return self._client is not None

    @property
    def max_packet_bytes(self) -> int | None:
        """What the broker said in CONNACK; None: no limit, or not connected."""
        return self._max_packet_bytes if self._client is not None else None

    def subscribe(self, topic_filter: str, handler: Handler) -> None:
        """Call `handler` for every message that matches. To be called before `start`."""
        self._subscriptions.append((topic_filter, handler))

    def on_connect(self, action: Callable[[], None]) -> None:
        """Call `action` on the link's thread whenever the subscriptions stand. To be called before `start`."""
        self._actions.append(action)

    def start(self) -> None:
        """Begin to connect; returns at once. A link is started once."""
        self._waker, self._woken = socket.socketpair()
        self._waker.setblocking(False)
        self._thread.start()

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
        """Send a message at once, or as soon as the socket takes it; 0 when offline, late, full or over the limit."""
        if expires_ns is not None and expires_ns <= time.monotonic_ns():
            return self._refuse("late")
        with self._lock:
            client = self._client
            if client is None:
                return self._refuse("offline")
            cost = publish_bytes(topic, len(payload), qos=qos, mqtt5=self._protocol == MQTTProtocolVersion.MQTTv5)
            if self._max_packet_bytes is not None and cost > self._max_packet_bytes:
                log.error(
                    "a packet of %d bytes is over the broker's limit of %d: raise max_packet_size in mosquitto.conf",
                    cost,
                    self._max_packet_bytes,
                )
                return self._refuse("oversize")
            waiting = self._count_unsent()
            if len(self._unsent) >= self._broker.max_unsent_messages or waiting + cost > self._broker.max_unsent_bytes:
                return self._refuse("full")
            info = client.publish(topic, payload, qos, retain)
            if info.rc not in (MQTTErrorCode.MQTT_ERR_SUCCESS, MQTTErrorCode.MQTT_ERR_NO_CONN):
                return self._refuse("client")
            self._unsent.append(_Unsent(info, cost, lane, then))
        self._send_now(client)
        self._settle()
        return cost

    def close(self) -> None:
        """Send what waits, for at most two seconds, and end the thread."""
        end = time.monotonic() + DRAIN_S
        while self._client is not None and time.monotonic() < end:
            with self._lock:
                if not self._count_unsent():
                    break
            time.sleep(0.01)
        self._closing.set()
        self._wake()
        if self._thread.is_alive():
            self._thread.join(DRAIN_S + CONNECT_TIMEOUT_S + LOOP_S)
        for end_of_pair in (self._waker, self._woken):
            if end_of_pair is not None:
                end_of_pair.close()

    def _send_now(self, client: Client) -> None:
        """Write what is queued on the publisher's thread: waking the link's thread for it costs more than that."""
        if threading.current_thread() is self._thread:
            return  # a handler publishes; the loop writes when the handler returns
        if self._tls is None:
            self._write(client)
        if client.want_write():  # the socket is full, or speaks TLS, where only one thread may touch it
            self._wake()

    def _write(self, client: Client) -> MQTTErrorCode:
        with self._writing:
            return client.loop_write() if client.want_write() else MQTTErrorCode.MQTT_ERR_SUCCESS

    def _wake(self) -> None:
        if self._waker is not None:
            with contextlib.suppress(OSError):  # full, so it is awake; or closed, so it is over
                self._waker.send(b"x")

    def _count_unsent(self) -> int:
        """Bytes that still wait for the socket or for the broker's word. To be called with the lock held."""
        waiting: list[_Unsent] = []
        for one in self._unsent:
            if not one.info.is_published():
                waiting.append(one)
                continue
            unheard = one.info.mid in self._unheard
            self._unheard.discard(one.info.mid)
            if one.then is not None:
                self._settled.append((one.then, "unheard" if unheard else ""))
        self._unsent = waiting
        return sum(one.cost_bytes for one in waiting)

    def _settle(self) -> None:
        """Tell what became of messages. To be called without the lock, as whoever is told may publish."""
        with self._lock:
            self._count_unsent()
        while self._settled:
            with contextlib.suppress(IndexError):  # another thread was quicker
                then, outcome = self._settled.popleft()
                self._guard(lambda: then(outcome))  # noqa: B023

    def _refuse(self, reason: str) -> int:
        self._counters.add("link_refused_total", reason=reason)
        return 0

    def _run(self) -> None:
        backoff_s = BACKOFF_MIN_S
        short = 0  # connections in a row that were accepted and soon lost
        while not self._closing.is_set():
            client = self._new_client()
            start = time.monotonic()
            accepted = False
            try:
                accepted = self._serve(client)
            except Exception:  # this thread is the only one that can bring the broker back
                self._counters.add("link_loop_errors_total")
                log.exception("the link failed; trying again")
                self._lose(client)
            short = short + 1 if accepted and time.monotonic() - start < STEADY_S else 0
            if short >= SHORT_IN_A_ROW and not self._closing.is_set():
                self._report(f"{self._client_id} is dropped soon after it is accepted; {SAME_ID}", "short")
            # Being accepted and dropped again and again is no reason to ask without pause.
            backoff_s = BACKOFF_MIN_S if accepted and short < SHORT_IN_A_ROW else min(backoff_s * 2, BACKOFF_MAX_S)
            self._closing.wait(backoff_s * random.uniform(0.5, 1.0))

    def _serve(self, client: Client) -> bool:
        """Connect and stay until the connection ends. Returns whether the broker had accepted us."""
        self._acknowledged = self._refused = False
        try:
            client.connect(self._broker.host, self._broker.port, self._broker.keepalive_s)
        except (OSError, ValueError) as error:
            self._report(f"cannot reach the broker at {self._broker.host}:{self._broker.port}: {error}", "unreachable")
            return False
        end = time.monotonic() + CONNECT_TIMEOUT_S
        while not self._closing.is_set():
            result = self._turn(client)
            if result != MQTTErrorCode.MQTT_ERR_SUCCESS:
                break
            if not self._acknowledged and time.monotonic() > end:
                break
        if self._closing.is_set():
            client.disconnect()
            self._write(client)
        elif not self._acknowledged and not self._refused:
            where = f"{self._broker.host}:{self._broker.port}"
            self._report(f"{where} takes no CONNECT; is it an MQTT broker, and does it want TLS?", "no connack")
        self._lose(client)
        if not self._acknowledged and self._broker.version == "auto" and not self._refused:
            # A broker without MQTT 5 may just hang up, so the two versions take turns until one is accepted.
            five, three = MQTTProtocolVersion.MQTTv5, MQTTProtocolVersion.MQTTv311
            self._protocol = three if self._protocol == five else five
        return self._acknowledged

    def _turn(self, client: Client) -> MQTTErrorCode:
        """Wait for the socket or a wake-up, then read, write and keep alive."""
        sock = client.socket()
        if sock is None or self._woken is None:
            return MQTTErrorCode.MQTT_ERR_NO_CONN
        buffered = sock.pending() if isinstance(sock, ssl.SSLSocket) else 0
        try:
            wanted = [sock] if client.want_write() else []
            readable, _, _ = select.select([sock, self._woken], wanted, [], 0 if buffered else LOOP_S)
        except (OSError, ValueError):  # a writer found the connection gone and closed it
            return MQTTErrorCode.MQTT_ERR_CONN_LOST
        if self._woken in readable:
            self._woken.recv(4096)
        if buffered or sock in readable:
            result = client.loop_read()
            if result != MQTTErrorCode.MQTT_ERR_SUCCESS:
                return result
        result = self._write(client)
        self._settle()
        return client.loop_misc() if result == MQTTErrorCode.MQTT_ERR_SUCCESS else result

    def _lose(self, client: Client) -> None:
        with self._lock:
            was_connected, self._client = self._client is client, None
            self._count_unsent()
            for one in self._unsent:
                self._counters.add("link_lost_total", reason="connection lost")
                if one.then is not None:
                    self._settled.append((one.then, "connection lost"))
            self._unsent.clear()
            self._unheard.clear()
        self._settle()
        if was_connected and not self._closing.is_set():
            self._report(f"lost the broker at {self._broker.host}:{self._broker.port}", "lost")

    def _report(self, problem: str, reason: str) -> None:
        self._counters.add("link_disconnects_total", reason=reason)
        # The same sentence every few seconds helps nobody.
        log.log(logging.DEBUG if problem == self._problem else logging.WARNING, "%s; trying again", problem)
        self._problem = problem

    def _new_client(self) -> Client:
        options: dict[str, Any] = {}
        if self._protocol != MQTTProtocolVersion.MQTTv5:
            options["clean_session"] = True
        client = _Client(CallbackAPIVersion.VERSION2, client_id=self._client_id, protocol=self._protocol, **options)
        client.connect_timeout = CONNECT_TIMEOUT_S
        client.max_queued_messages_set(self._broker.max_unsent_messages)
        if self._broker.username is not None:
            client.username_pw_set(self._broker.username, self._password)
        if self._tls is not None:
            client.tls_set_context(self._tls)
        if self._will is not None:
            client.will_set(self._will[0], self._will[1], qos=1, retain=True)
        client.on_socket_open = _without_nagle
        # With this set, paho's publish() only queues, and `_write` is the one place that writes.
        client.on_socket_register_write = _leave_to_us
        client.on_connect = self._connected
        client.on_subscribe = self._subscribed
        client.on_message = self._received
        client.on_disconnect = self._disconnected
        client.thread = self._thread
        client.on_publish = self._published
        return client

    def _connected(
        self, client: Client, userdata: object, flags: object, reason: ReasonCode, properties: Properties | None
    ) -> None:
        if reason.is_failure:
            self._report(f"the broker at {self._broker.host}:{self._broker.port} refuses us: {reason}", "refused")
            self._refused = "protocol" not in str(reason).lower()
            return
        self._acknowledged = True
        self._max_packet_bytes = getattr(properties, "MaximumPacketSize", None)
        self._awaited = set()
        for topic_filter, _ in self._subscriptions:
            _, mid = client.subscribe(topic_filter, qos=0)
            if mid is not None:
                self._awaited.add(mid)
        if not self._subscriptions:
            self._ready(client)

    def _subscribed(
        self, client: Client, userdata: object, mid: int, reasons: list[ReasonCode], properties: Properties | None
    ) -> None:
        self._awaited.discard(mid)
        for reason in reasons:
            if reason.is_failure:
                self._refused = True
                self._counters.add("link_subscribe_refused_total")
                self._report(f"the broker refuses {self._client_id} a subscription: {reason}; look at its ACL", "acl")
        if self._refused:
            client.disconnect()
        elif not self._awaited:
            self._ready(client)

    def _ready(self, client: Client) -> None:
        with self._lock:
            self._client = client
        self._counters.add("link_connects_total")
        version = "5" if self._protocol == MQTTProtocolVersion.MQTTv5 else "3.1.1"
        where = f"{self._broker.host}:{self._broker.port}"
        log.info("%s is connected to %s by MQTT %s", self._client_id, where, version)
        self._problem = ""
        for action in self._actions:
            self._guard(action)

    def _disconnected(
        self, client: Client, userdata: object, flags: object, reason: ReasonCode, properties: Properties | None
    ) -> None:
        if reason.value == TAKEN_OVER:
            self._report(f"{self._client_id} was taken over; {SAME_ID}", "taken over")

    def _published(
        self, client: Client, userdata: object, mid: int, reason: ReasonCode, properties: Properties
    ) -> None:
        # paho's own lock is held here, which a publisher that holds ours may want.
        if reason.value == NOBODY_SUBSCRIBES:
            self._unheard.add(mid)

    def _received(self, client: Client, userdata: object, message: MQTTMessage) -> None:
        self._guard(lambda: self._hand_out(message))

    def _hand_out(self, message: MQTTMessage) -> None:
        topic = message.topic  # decodes, so a broker that lets wrong UTF-8 through raises here
        for topic_filter, handler in self._subscriptions:
            if topic_matches_sub(_without_share(topic_filter), topic):
                self._guard(lambda: handler(topic, bytes(message.payload)))  # noqa: B023 — called at once

    def _guard(self, action: Callable[[], None]) -> None:
        try:
            action()
        except Exception:  # a bug in a handler must not end the only thread that can talk to the broker
            self._counters.add("link_callback_errors_total")
            log.exception("a message handler failed")


def _without_nagle(client: Client, userdata: object, sock: Any) -> None:
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


def _leave_to_us(client: Client, userdata: object, sock: object) -> None:
    pass


def _without_share(topic_filter: str) -> str:
    return topic_filter.split("/", 2)[2] if topic_filter.startswith("$share/") else topic_filter
