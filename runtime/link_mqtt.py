"""MQTT by paho: version 5, or 3.1.1 where the broker speaks no 5. One thread keeps the connection and never gives up.

paho's own loop leaves gaps that this module and its parts close: Nagle stays on, an exception in a callback ends its
thread, queues are unbounded and in the order of arrival, reconnects have no jitter, and the broker's limits are not
looked at. `mqtt_outgoing` has what goes out, `reconnect` when to try again, `heartbeat` whether anybody is there.
"""

from __future__ import annotations

import logging
import random
import select
import ssl
import threading
import time
from collections.abc import Callable
from functools import partial
from typing import Any, Literal

from paho.mqtt.client import Client, DisconnectFlags, MQTTMessage, topic_matches_sub
from paho.mqtt.enums import MQTTErrorCode
from paho.mqtt.properties import Properties
from paho.mqtt.reasoncodes import ReasonCode

from runtime.config import BrokerConfig
from runtime.counters import Counters
from runtime.credentials import read_password, tls_context
from runtime.dialing import Dialer, UnansweredError
from runtime.heartbeat import Heartbeat
from runtime.link import Handler, Lane, Then
from runtime.mqtt_client import MqttClient, abort, progress
from runtime.mqtt_limits import Limits, limits
from runtime.mqtt_outgoing import OK, Outgoing
from runtime.reconnect import Outcome, Pauses, Versions, outcome_of
from runtime.self_pipe import SelfPipe
from runtime.topics import without_share

log = logging.getLogger(__name__)

DRAIN_S = 2.0
LOOP_S = 0.25
SAME_ID = "does another client use its id? give each device and node an id of its own"
TAKEN_OVER = 0x8E  # MQTT 5: another client has connected with this client's id
NO_RETAIN, NO_QOS = 0x9A, 0x9B  # MQTT 5: the will asks for more than the broker has
Answer = Literal["", "accepted", "refused"]  # the broker's to CONNECT and to our subscriptions


class MqttLink:
    """One connection to one broker."""

    def __init__(
        self,
        broker: BrokerConfig,
        *,
        client_id: str,
        will: tuple[str, bytes] | None,
        counters: Counters,
        beat: str | None = None,
    ) -> None:
        self._broker = broker
        self._where = f"{broker.host}:{broker.port}"
        self._client_id = client_id
        self._will = will
        self._will_qos, self._will_retain = 1, True
        self._counters = counters
        self._password = read_password(broker)
        self._tls = tls_context(broker)
        self._subscriptions: list[tuple[str, Handler]] = []
        self._actions: list[Callable[[], None]] = []
        self._thread = threading.Thread(target=self._run, name=f"kinflow-link-{client_id}", daemon=True)
        self._closing = threading.Event()
        self._dialer = Dialer(broker.host, broker.port, self._tls, self._closing)
        self._pipe = SelfPipe()
        self._out = Outgoing(broker, counters, self._guard)
        # What follows belongs to the link's thread.
        self._versions = Versions(broker.version)
        self._pauses = Pauses()
        self._beat = beat
        self._heartbeat = Heartbeat(0.0)  # made anew with each connection
        self._limits = Limits()
        self._heard_s = self._ready_s = 0.0
        self._answer: Answer = ""
        self._awaited: set[int] = set()
        self._told = ""  # why the broker has ended the connection
        self._problem = ""

    @property
    def connected(self) -> bool:
        """Whether the broker has accepted us and all subscriptions."""
        return self._out.open

    @property
    def max_packet_bytes(self) -> int | None:
        """What the broker said in CONNACK; None: no limit, or not connected."""
        return self._out.limits.max_packet_bytes

    def subscribe(self, topic_filter: str, handler: Handler) -> None:
        """Call `handler` for every message that matches. To be called before `start`."""
        self._subscriptions.append((topic_filter, handler))

    def on_connect(self, action: Callable[[], None]) -> None:
        """Call `action` on the link's thread whenever the subscriptions stand. To be called before `start`."""
        self._actions.append(action)

    def start(self) -> None:
        """Begin to connect; returns at once. A link is started once."""
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
        cost = self._out.put(topic, payload, qos, retain, lane, expires_ns, then)
        if cost:
            self._send_now()
        self._out.tell()
        return cost

    def close(self) -> None:
        """Send what waits, for at most two seconds, and end the thread."""
        end = time.monotonic() + DRAIN_S
        while self.connected and self._out.waiting and time.monotonic() < end:
            time.sleep(0.01)
        self._closing.set()
        self._pipe.wake()
        if self._thread.is_alive():
            self._thread.join(DRAIN_S + LOOP_S)
        self._pipe.close()

    def _send_now(self) -> None:
        """Write what is queued on the publisher's thread: waking the link's thread for it costs more than that."""
        if threading.current_thread() is self._thread:
            return  # a handler publishes; the loop writes when the handler returns
        client = self._out.client
        if client is not None and self._tls is None:
            self._out.write(client)
        # The socket is full, or speaks TLS, where only one thread may touch it.
        if client is not None and self._out.wants_write(client):
            self._pipe.wake()

    def _run(self) -> None:
        while not self._closing.is_set():
            start = time.monotonic()
            client: Client | None = None
            outcome = Outcome.REFUSED
            try:
                client = self._new_client()
                outcome = self._serve(client)
            except Exception:  # this thread is the only one that can bring the broker back
                self._counters.add("link_loop_errors_total")
                log.exception("the link failed; trying again")
                if client is not None:
                    self._out.end(client, "connection lost")
            pause_s = self._pauses.after(outcome, time.monotonic() - max(start, self._ready_s))
            if self._pauses.dropped_again and not self._closing.is_set():
                self._report(f"{self._client_id} is dropped soon after it is accepted; {SAME_ID}", "short")
            self._closing.wait(pause_s * random.uniform(0.5, 1.0))

    def _serve(self, client: Client) -> Outcome:
        """Connect and stay until the connection ends."""
        self._answer, self._told = "", ""
        answer_s = self._pauses.answer_s
        try:
            client.connect(self._broker.host, self._broker.port, self._broker.keepalive_s)
        except UnansweredError:
            self._report(f"no word of TLS from {self._where}: is the broker well?", "silent")
            return Outcome.UNANSWERED
        except TimeoutError:
            self._report(f"no answer from {self._where}: is the network up, and the broker's machine on?", "silent")
            return Outcome.SILENT
        except (OSError, ValueError) as error:
            if self._closing.is_set():
                return Outcome.LOST
            self._report(f"cannot reach the broker at {self._where}: {error}", "unreachable")
            return outcome_of(error)
        self._heard_s = time.monotonic()
        result, silent, half_open = OK, False, False
        while not (self._closing.is_set() or silent or half_open or result != OK):
            result = self._turn(client)
            silent = not self.connected and time.monotonic() - self._heard_s > answer_s
            half_open = result == OK and self.connected and not self._alive(client)
        if self._closing.is_set():
            client.disconnect()
            self._out.write(client)
        elif silent or half_open:
            abort(client)
        self._out.end(client, "connection lost")
        return self._ended(silent=silent, half_open=half_open)

    def _ended(self, *, silent: bool, half_open: bool) -> Outcome:
        """Say why a connection has ended."""
        if self._closing.is_set():
            return Outcome.LOST
        if self._answer == "refused":
            return Outcome.REFUSED
        if silent:
            self._versions.silent()
            self._report(f"no word from {self._where}: is the network up, and is the broker well?", "silent")
            return Outcome.UNANSWERED
        if self._answer == "accepted":
            self._versions.lost()
            if half_open:
                silence = f"{2 * self._broker.heartbeat_s:g} s of silence, a heartbeat included"
                self._report(f"the connection to {self._where} is half-open: {silence}", "half-open")
            else:
                self._report(f"lost the broker at {self._where}{self._told}", "lost")
            return Outcome.LOST
        self._versions.hung_up()
        self._report(f"{self._where} takes no CONNECT; is it an MQTT broker, and does it want TLS?", "no connack")
        return Outcome.REFUSED

    def _turn(self, client: Client) -> MQTTErrorCode:
        """Wait for the socket or a wake-up, then read, write and keep alive."""
        sock = client.socket()
        if sock is None:
            return MQTTErrorCode.MQTT_ERR_NO_CONN
        buffered = sock.pending() if isinstance(sock, ssl.SSLSocket) else 0
        try:
            watched: list[Any] = [sock, self._pipe]
            wanted = [sock] if self._out.wants_write(client) else []
            readable, _, _ = select.select(watched, wanted, [], 0 if buffered else LOOP_S)
        except (OSError, ValueError):  # a writer found the connection gone and closed it
            return MQTTErrorCode.MQTT_ERR_CONN_LOST
        if self._pipe in readable:
            self._pipe.drain()
        if buffered or sock in readable:
            result = client.loop_read()
            self._heard_s = time.monotonic()
            self._heartbeat.heard(self._heard_s)
            if result != OK:
                return result
        self._out.expire()
        result = self._out.write(client)
        self._out.tell()
        return client.loop_misc() if result == OK else result

    def _alive(self, client: Client) -> bool:
        """Whether somebody is still there, as far as is known. Sends a beat when it is time for one."""

        def moved() -> tuple[int, int] | None:
            known = progress(client)
            return known and (known[0], known[1] + self._out.unwritten_bytes())

        verdict = self._heartbeat.look(time.monotonic(), moved)
        if verdict == "beat" and self._beat is not None:
            self._counters.add("link_beats_total")
            self.publish(self._beat, b"", qos=1, lane=Lane.EVENTS)
        return verdict != "dead"

    def _report(self, problem: str, reason: str) -> None:
        self._counters.add("link_disconnects_total", reason=reason)
        # The same sentence every few seconds helps nobody.
        log.log(logging.DEBUG if problem == self._problem else logging.WARNING, "%s; trying again", problem)
        self._problem = problem

    def _new_client(self) -> Client:
        dial = partial(self._dialer.dial, self._pauses.patience_s, self._pauses.answer_s)
        client = MqttClient(self._client_id, self._versions.now, self._out.confirm, dial)
        if self._broker.username is not None:
            client.username_pw_set(self._broker.username, self._password)
        if self._tls is not None:
            client.tls_set_context(self._tls)
        if self._will is not None:
            client.will_set(self._will[0], self._will[1], qos=self._will_qos, retain=self._will_retain)
        client.on_connect = self._connected
        client.on_subscribe = self._subscribed
        client.on_message = self._received
        client.on_disconnect = self._disconnected
        return client

    def _connected(
        self, client: Client, userdata: object, flags: object, reason: ReasonCode, properties: Properties | None
    ) -> None:
        if reason.is_failure:
            self._answer = "refused"
            self._report(f"the broker at {self._where} refuses us: {reason}", "refused")
            if "protocol" in str(reason).lower():
                self._versions.refused()
            self._will_retain &= reason.value != NO_RETAIN
            self._will_qos = 0 if reason.value == NO_QOS else self._will_qos
            return
        self._answer = "accepted"
        self._versions.accepted()
        self._limits = limits(properties)
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
                self._answer = "refused"
                self._counters.add("link_subscribe_refused_total")
                self._report(f"the broker refuses {self._client_id} a subscription: {reason}; look at its ACL", "acl")
        if self._answer == "refused":
            client.disconnect()
        elif not self._awaited:
            self._ready(client)

    def _ready(self, client: Client) -> None:
        self._ready_s = time.monotonic()
        beats = self._beat and self._limits.maximum_qos  # a broker without QoS 1 answers none
        self._heartbeat = Heartbeat(self._broker.heartbeat_s if beats else 0.0)
        self._heartbeat.heard(self._ready_s)
        self._out.begin(client, self._limits, mqtt5=self._versions.now == "5")
        self._counters.add("link_connects_total")
        log.info("%s is connected to %s by MQTT %s", self._client_id, self._where, self._versions.now)
        self._problem = ""
        for action in self._actions:
            self._guard(action)

    def _disconnected(
        self, client: Client, userdata: object, flags: DisconnectFlags, reason: ReasonCode, properties: object
    ) -> None:
        if flags.is_disconnect_packet_from_server and reason.is_failure:
            self._told = f", which says: {reason}"
        if reason.value == TAKEN_OVER:
            self._report(f"{self._client_id} was taken over; {SAME_ID}", "taken over")

    def _received(self, client: Client, userdata: object, message: MQTTMessage) -> None:
        self._guard(lambda: self._hand_out(message))

    def _hand_out(self, message: MQTTMessage) -> None:
        topic = message.topic  # decodes, so a broker that lets wrong UTF-8 through raises here
        for topic_filter, handler in self._subscriptions:
            if topic_matches_sub(without_share(topic_filter), topic):
                self._guard(lambda: handler(topic, bytes(message.payload)))  # noqa: B023 — called at once

    def _guard(self, action: Callable[[], None]) -> None:
        try:
            action()
        except Exception:  # a bug in a handler must not end the only thread that can talk to the broker
            self._counters.add("link_callback_errors_total")
            log.exception("a message handler failed")
