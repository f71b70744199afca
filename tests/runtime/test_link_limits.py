"""What a broker allows, by real ones and by one that only listens and notes the bytes."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from runtime.counters import Counters
from runtime.link import Lane
from runtime.link_mqtt import MqttLink
from runtime.outbox import REFUSED
from runtime.topics import Subtree, publish_bytes
from tests.patience import stays, until

PORCH = Subtree("home", "d", "porch")
REQUEST = PORCH.request("0123abcd", 4)
RECEIVE_MAXIMUM, MAXIMUM_PACKET, TOPIC_ALIAS_MAXIMUM = 0x21, 0x27, 0x22
CONNECT, PUBLISH, PUBACK = 1, 3, 4


class Recorder:
    """Accepts one client of MQTT 5, keeps every PUBLISH as it came, and confirms only when told."""

    def __init__(self, properties: bytes) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address: tuple[str, int] = self._listener.getsockname()
        self.packets: list[bytes] = []
        self._connack = bytes([0x20, 3 + len(properties), 0, 0, len(properties)]) + properties
        self._connection: socket.socket | None = None
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        self._connection, _ = self._listener.accept()
        with self._connection.makefile("rb") as stream:
            while first := stream.read(1):
                length = digits = 0
                raw = first
                while True:
                    raw += (digit := stream.read(1))
                    length |= (digit[0] & 0x7F) << 7 * digits
                    digits += 1
                    if digit[0] < 0x80:
                        break
                raw += stream.read(length)
                if first[0] >> 4 == CONNECT:
                    self._connection.sendall(self._connack)
                elif first[0] >> 4 == PUBLISH:
                    self.packets.append(raw)

    def confirm(self, number: int, reason: int = 0) -> None:
        """Acknowledge the n-th packet, of QoS 1 and below 16 KiB."""
        assert self._connection is not None
        raw = self.packets[number]
        at = 2 + (raw[1] > 0x7F)
        at += 2 + int.from_bytes(raw[at : at + 2], "big")
        self._connection.sendall(bytes([PUBACK << 4, 3]) + raw[at : at + 2] + bytes([reason]))

    def close(self) -> None:
        self._listener.close()
        if self._connection is not None:
            self._connection.close()
        self._thread.join(10)


@pytest.fixture
def recorder() -> Iterator[Callable[..., Recorder]]:
    made: list[Recorder] = []

    def make(properties: bytes = b"") -> Recorder:
        made.append(Recorder(properties))
        return made[-1]

    yield make
    for one in made:
        one.close()


@pytest.mark.parametrize("lane", Lane)
@pytest.mark.parametrize("qos", [0, 1])
def test_the_bytes_that_are_told_are_those_on_the_wire(
    recorder: Callable[..., Recorder], connect: Callable[..., MqttLink], lane: Lane, qos: int
) -> None:
    server = recorder(bytes([TOPIC_ALIAS_MAXIMUM, 0, 1]))
    link = connect(server)
    told = []
    for number, (topic, size) in enumerate(((REQUEST, 1), (REQUEST, 1), ("a", 300)), 1):
        told.append(link.publish(topic, bytes(size), qos=qos, lane=lane))
        until(lambda: len(server.packets) == number)  # noqa: B023
    assert [len(raw) for raw in server.packets] == told
    for number in range(len(told) * qos):
        server.confirm(number)
    assert told[0] - told[1] == (len(REQUEST) if lane in (Lane.FEATURES, Lane.RESULTS) else 0)


def test_a_topic_goes_once_and_its_number_after_that(
    start_mosquitto: Callable[..., Any], connect: Callable[..., MqttLink]
) -> None:
    broker = start_mosquitto("max_topic_alias 2\n")
    heard: list[tuple[str, bytes]] = []
    connect(broker, name="watcher", hear=("kinflow/#", lambda topic, payload: heard.append((topic, payload))))
    link = connect(broker)
    result, third = PORCH.result("cam0"), PORCH.result("cam1")
    costs = {topic: [] for topic in (REQUEST, result, third)}  # type: dict[str, list[int]]
    for number in range(3):
        for topic in costs:
            lane = Lane.FEATURES if topic == REQUEST else Lane.RESULTS
            costs[topic].append(link.publish(topic, bytes([number]), qos=lane == Lane.RESULTS, lane=lane))
    until(lambda: len(heard) == 9)
    assert sorted(heard) == sorted((topic, bytes([number])) for topic in costs for number in range(3))
    for topic in (REQUEST, result):
        qos = int(topic == result)
        first, *rest = costs[topic]
        assert first == publish_bytes(topic, 1, qos=qos, alias=True)
        assert rest == [publish_bytes("", 1, qos=qos, alias=True)] * 2
    assert costs[third] == [publish_bytes(third, 1, qos=1)] * 3, "there are no more numbers"


def test_a_new_connection_begins_with_topics_again(
    start_mosquitto: Callable[..., Any], connect: Callable[..., MqttLink]
) -> None:
    broker = start_mosquitto("max_topic_alias 10\n")
    heard: list[bytes] = []
    link = connect(broker, hear=(REQUEST, lambda topic, payload: heard.append(payload)))
    first = [link.publish(REQUEST, b"a") for _ in range(2)]
    until(lambda: len(heard) == 2)
    broker.kill()
    until(lambda: not link.connected)
    broker.restart()
    until(lambda: link.connected)
    assert [link.publish(REQUEST, b"b") for _ in range(2)] == first
    until(lambda: len(heard) == 4)


def test_no_more_is_unacknowledged_than_the_broker_takes(
    recorder: Callable[..., Recorder], connect: Callable[..., MqttLink]
) -> None:
    server = recorder(bytes([RECEIVE_MAXIMUM, 0, 2]))
    link = connect(server)
    for number in range(5):
        assert link.publish(f"event/{number}", b"x", qos=1, lane=Lane.EVENTS)
    assert link.publish("feature", b"x")
    until(lambda: len(server.packets) == 3)
    time.sleep(0.1)
    assert [raw[4:11] for raw in server.packets] == [b"event/0", b"event/1", b"feature"]
    server.confirm(0)
    until(lambda: len(server.packets) == 4)
    assert b"event/2" in server.packets[3]
    for number in (1, 3, 4, 5):
        until(lambda: len(server.packets) > number)  # noqa: B023
        server.confirm(number)


def test_all_are_confirmed_by_a_broker_that_takes_one_at_a_time(
    start_mosquitto: Callable[..., Any], connect: Callable[..., MqttLink]
) -> None:
    counters, ends = Counters(), []  # type: Counters, list[str]
    link = connect(start_mosquitto("max_inflight_messages 1\n"), counters=counters, max_unsent_messages=300)
    for number in range(200):
        assert link.publish(f"event/{number}", b"x", qos=1, lane=Lane.EVENTS, then=ends.append)
    until(lambda: len(ends) == 200)
    assert set(ends) == {"unheard"}
    assert counters.total("link_disconnects_total") == counters.total("link_dropped_total") == 0


def test_a_packet_of_the_largest_size_passes_and_one_byte_more_does_not(
    start_mosquitto: Callable[..., Any], connect: Callable[..., MqttLink], caplog: pytest.LogCaptureFixture
) -> None:
    counters = Counters()
    link = connect(start_mosquitto("max_packet_size 2000\n"), counters=counters)
    assert link.max_packet_bytes == 2000
    fits = 2000 - publish_bytes("a", 0) - 1  # one more byte for the length
    assert link.publish("a", bytes(fits), lane=Lane.EVENTS) == 2000
    assert link.publish("a", bytes(fits + 1), lane=Lane.EVENTS) == 0
    assert link.publish("a", bytes(fits + 2), lane=Lane.EVENTS) == 0
    assert counters.snapshot()['link_refused_total{reason="oversize"}'] == 2
    sentences = [record.message for record in caplog.records if record.levelname == "ERROR"]
    assert len(sentences) == 1, "once for a connection is enough"
    assert "raise max_packet_size in mosquitto.conf, or send at a smaller rate" in sentences[0]
    ends: list[str] = []
    assert link.publish("a", b"x", qos=1, then=ends.append)
    until(lambda: ends == ["unheard"], what="the broker has not hung up")


@pytest.mark.parametrize(("version", "alone"), [("5", "unheard"), ("3.1.1", "")])
def test_whoever_publishes_learns_whether_anybody_heard_it(
    mosquitto: Any, connect: Callable[..., MqttLink], version: str, alone: str
) -> None:
    link = connect(mosquitto, version=version)
    ends: dict[str, str] = {}
    assert link.publish("a", b"x", qos=1, then=lambda end: ends.update(alone=end))
    assert link.publish("a", b"x", qos=0, then=lambda end: ends.update(written=end))
    until(lambda: ends == {"alone": alone, "written": ""})
    connect(mosquitto, name="watcher", hear=("a", lambda topic, payload: None))
    assert link.publish("a", b"x", qos=1, then=lambda end: ends.update(heard=end))
    until(lambda: ends.get("heard") == "")


def test_a_broker_with_neither_qos_1_nor_retaining_is_served_as_it_can_be(
    start_mosquitto: Callable[..., Any], connect: Callable[..., MqttLink], caplog: pytest.LogCaptureFixture
) -> None:
    broker = start_mosquitto("max_qos 0\nretain_available false\n")
    heard: list[bytes] = []
    connect(broker, name="watcher", hear=("a", lambda topic, payload: heard.append(payload)))
    ends: list[str] = []
    link = connect(broker)
    assert link.publish("a", b"x", qos=1, retain=True, then=ends.append) == publish_bytes("a", 1, alias=True)
    until(lambda: heard == [b"x"] and ends == [""])
    assert "raise max_qos" in caplog.text
    assert "retain_available" in caplog.text


def test_a_broker_that_confirms_nothing_is_not_taken_for_a_half_open_connection(
    start_mosquitto: Callable[..., Any], connect: Callable[..., MqttLink]
) -> None:
    counters = Counters()
    link = connect(start_mosquitto("max_qos 0\n"), counters=counters, heartbeat_s=0.2, beat="beat")
    half_open = 'link_disconnects_total{reason="half-open"}'
    stays(lambda: link.connected and half_open not in counters.snapshot(), 1.2)


def test_a_refused_message_is_told_and_counted(
    recorder: Callable[..., Recorder], connect: Callable[..., MqttLink], caplog: pytest.LogCaptureFixture
) -> None:
    server, counters, ends = recorder(), Counters(), []  # type: Recorder, Counters, list[str]
    link = connect(server, counters=counters)
    assert link.publish("secret", b"x", qos=1, lane=Lane.EVENTS, then=ends.append)
    until(lambda: server.packets)
    server.confirm(0, 0x87)
    until(lambda: ends == [REFUSED])
    assert counters.snapshot()['link_lost_total{lane="events",reason="refused by the broker"}'] == 1
    assert "the broker refuses secret: Not authorized" in caplog.text
