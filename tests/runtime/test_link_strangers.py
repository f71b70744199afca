"""What a link makes of servers that are no broker, or one that speaks wrongly, hangs up or dies amid a message."""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from runtime.counters import Counters
from runtime.link_mqtt import MqttLink
from tests.patience import until


class Impostor:
    """Takes one TCP connection after the other, sends `reply` to whatever comes first, and `then` a little later."""

    def __init__(self, reply: bytes, then: bytes = b"", *, hang_up: bool = False) -> None:
        self._server = socket.create_server(("127.0.0.1", 0))
        self.address: tuple[str, int] = self._server.getsockname()
        self.taken = 0
        self._answer = (reply, then, hang_up)
        self._connections: list[socket.socket] = []
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        reply, then, hang_up = self._answer
        with contextlib.suppress(OSError):
            while True:
                connection, _ = self._server.accept()
                self.taken += 1
                connection.recv(4096)
                connection.sendall(reply)
                time.sleep(0.1)
                connection.sendall(then)
                if hang_up:
                    connection.close()
                else:
                    self._connections.append(connection)

    def close(self) -> None:
        for end in (self._server, *self._connections):
            end.close()


@pytest.fixture
def impostor() -> Iterator[Callable[..., Impostor]]:
    made: list[Impostor] = []

    def make(*arguments: Any, **options: Any) -> Impostor:
        made.append(Impostor(*arguments, **options))
        return made[-1]

    yield make
    for one in made:
        one.close()


CONNACK = bytes([0x20, 2, 0, 0])  # MQTT 3.1.1: accepted


def test_a_message_on_a_topic_that_is_no_text_does_not_end_the_link(
    impostor: Callable[..., Impostor], make_link: Callable[..., MqttLink]
) -> None:
    suback = bytes([0x90, 3, 0, 1, 0])
    wrong, right = bytes([0x30, 5, 0, 1, 0xFF, 1, 2]), bytes([0x30, 4, 0, 1, ord("a"), 7])
    counters = Counters()
    heard: list[tuple[str, bytes]] = []
    link = make_link(impostor(CONNACK, suback + wrong + right), counters=counters, version="3.1.1")
    link.subscribe("a", lambda topic, payload: heard.append((topic, payload)))
    link.start()
    until(lambda: heard == [("a", bytes([7]))])
    assert link.connected
    assert counters.snapshot()["link_callback_errors_total"] == 1


def test_whoever_hangs_up_is_named_and_counted(
    impostor: Callable[..., Impostor], make_link: Callable[..., MqttLink], caplog: pytest.LogCaptureFixture
) -> None:
    counters = Counters()
    server = impostor(b"HTTP/1.1 400 Bad Request\r\n\r\n", hang_up=True)
    link = make_link(server, counters=counters)
    link.start()
    until(lambda: counters.total("link_disconnects_total") >= 2)
    assert not link.connected
    assert "is it an MQTT broker, and does it want TLS?" in caplog.text


def test_a_refused_subscription_is_no_connection(
    impostor: Callable[..., Impostor], make_link: Callable[..., MqttLink], caplog: pytest.LogCaptureFixture
) -> None:
    counters = Counters()
    link = make_link(impostor(CONNACK, bytes([0x90, 3, 0, 1, 0x80])), counters=counters, version="3.1.1")
    link.subscribe("a", lambda topic, payload: None)
    link.start()
    until(lambda: counters.total("link_subscribe_refused_total"))
    assert not link.connected
    assert "look at its ACL" in caplog.text


def test_a_connection_that_dies_under_a_publisher_lets_go_of_a_handler_that_waits_for_it(
    connect: Callable[..., MqttLink],
) -> None:
    """A pipeline publishes with a lock held that a handler wants as well."""
    sent, entered, dead, lock = threading.Event(), threading.Event(), threading.Event(), threading.Lock()
    done: list[str] = []

    def serve(server: socket.socket) -> None:
        connection, _ = server.accept()
        connection.recv(4096)
        connection.sendall(CONNACK)
        connection.recv(4096)
        connection.sendall(bytes([0x90, 3, 0, 1, 0]))
        sent.wait(10)  # and read nothing more
        connection.sendall(bytes([0x30, 4, 0, 1, ord("a"), 7]))
        entered.wait(10)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        connection.close()
        dead.set()

    def handle(topic: str, payload: bytes) -> None:
        entered.set()
        with lock:
            done.append("handler")

    def publish() -> None:
        with lock:
            sent.set()
            dead.wait(10)
            link.publish("b", b"x", qos=1)
        done.append("publisher")

    server = socket.create_server(("127.0.0.1", 0))
    server.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    threading.Thread(target=serve, args=(server,), daemon=True).start()
    link = connect(SimpleNamespace(address=server.getsockname()), version="3.1.1", heartbeat_s=0, hear=("a", handle))
    assert link.publish("b", bytes(8_000_000)), "more than the sockets hold, so a part of it waits to be written"
    threading.Thread(target=publish, daemon=True).start()
    until(lambda: sorted(done) == ["handler", "publisher"], 8)
    server.close()


def test_how_long_a_connection_lived_is_counted_from_when_it_stood(make_link: Callable[..., MqttLink]) -> None:
    """Where the link is slow, to connect takes longer than a connection that is dropped at once lives."""
    server, counters = socket.create_server(("127.0.0.1", 0)), Counters()

    def serve() -> None:
        for slowness_s in (0.0, 0.0, 1.2):
            connection, _ = server.accept()
            connection.recv(4096)
            time.sleep(slowness_s)
            connection.sendall(CONNACK)
            connection.close()
        server.close()

    threading.Thread(target=serve, daemon=True).start()
    link = make_link(SimpleNamespace(address=server.getsockname()), counters=counters, version="3.1.1")
    link.start()
    until(lambda: counters.snapshot().get('link_disconnects_total{reason="lost"}') == 3)
    until(lambda: counters.snapshot().get('link_disconnects_total{reason="short"}'))
