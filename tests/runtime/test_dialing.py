"""Connecting to a name: bounded in every wait, at real sockets; only the name server is a function of the test's."""

from __future__ import annotations

import errno
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace

import pytest

from runtime.counters import Counters
from runtime.dialing import LOOK_UP_AGAIN_S, LOOK_UP_S, Address, Dialer, UnansweredError, look_up
from runtime.link_mqtt import MqttLink
from runtime.reconnect import Outcome
from tests.patience import until

NAME = "broker.test"
LONG_S = 30.0


class NameServer:
    """Knows where NAME is, until it goes silent or fails."""

    def __init__(self, port: int) -> None:
        self._port = port
        self.asked = 0
        self.failing = False
        self.answering = threading.Event()
        self.answering.set()

    def __call__(self, host: str, port: int) -> list[Address]:
        self.asked += 1
        self.answering.wait()
        if self.failing:
            raise socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")
        return look_up("127.0.0.1", self._port)


@pytest.fixture
def server() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield listener


@pytest.fixture
def names(server: socket.socket) -> Iterator[NameServer]:
    served = NameServer(server.getsockname()[1])
    yield served
    served.answering.set()


@pytest.fixture
def deaf() -> Iterator[tuple[str, int]]:
    """An address that answers no attempt to connect: its backlog is full, so the kernel drops what comes."""
    with socket.create_server(("127.0.0.1", 0), backlog=0) as listener:
        address = listener.getsockname()
        fillers = [socket.socket() for _ in range(4)]
        for filler in fillers:
            filler.setblocking(False)
            filler.connect_ex(address)
        yield address
        for filler in fillers:
            filler.close()


def dialer(names: NameServer, ended: threading.Event | None = None, tls: ssl.SSLContext | None = None) -> Dialer:
    return Dialer(NAME, 1, tls, ended or threading.Event(), names)


def seconds(action: Callable[[], object]) -> float:
    start_s = time.monotonic()
    action()
    return time.monotonic() - start_s


def reach(one: Dialer) -> None:
    one.dial(LONG_S, LONG_S).close()


def test_while_no_name_server_answers_the_address_that_worked_last_is_taken(names: NameServer) -> None:
    one = dialer(names)
    reach(one)
    names.answering.clear()
    assert seconds(lambda: reach(one)) < LOOK_UP_AGAIN_S + 1
    assert max(seconds(lambda: reach(one)) for _ in range(3)) < 0.5
    assert names.asked == 2  # the look-up that hangs is the only one
    assert sum(thread.name == "kinflow-look-up" for thread in threading.enumerate()) == 1
    names.answering.set()
    until(lambda: not any(thread.name == "kinflow-look-up" for thread in threading.enumerate()))
    reach(one)
    reach(one)
    assert names.asked == 3


def test_a_name_server_that_fails_costs_no_connection_either(names: NameServer) -> None:
    one = dialer(names)
    reach(one)
    names.failing = True
    assert seconds(lambda: reach(one)) < 1


def test_without_any_address_it_says_who_does_not_answer_and_asks_again(names: NameServer) -> None:
    one = dialer(names)
    names.answering.clear()
    with pytest.raises(socket.gaierror, match="no name server answers") as told:
        seconds(lambda: reach(one))
    assert told.value.errno == socket.EAI_AGAIN
    names.failing = True
    names.answering.set()
    until(lambda: not any(thread.name == "kinflow-look-up" for thread in threading.enumerate()))
    names.failing = False
    reach(one)  # and not what the first look-up came to


@pytest.mark.parametrize("wait", ["name", "connect", "tls"])
def test_every_wait_ends_when_the_caller_does(names: NameServer, deaf: tuple[str, int], wait: str) -> None:
    ended = threading.Event()
    if wait == "name":
        names.answering.clear()
    host, port = deaf if wait == "connect" else (NAME, 1)
    tls = ssl.create_default_context() if wait == "tls" else None
    one = Dialer(host, port, tls, ended, look_up if wait == "connect" else names)
    threading.Timer(0.3, ended.set).start()
    start_s = time.monotonic()
    with pytest.raises(ConnectionAbortedError):
        reach(one)
    assert time.monotonic() - start_s < LOOK_UP_S / 2


def test_silence_before_and_after_the_connection_are_told_apart(names: NameServer, deaf: tuple[str, int]) -> None:
    ended = threading.Event()
    with pytest.raises(TimeoutError) as told:
        Dialer(*deaf, None, ended).dial(0.2, LONG_S)
    assert not isinstance(told.value, UnansweredError)
    with pytest.raises(UnansweredError):
        dialer(names, tls=ssl.create_default_context()).dial(LONG_S, 0.2)


def test_whoever_refuses_is_heard_at_once(server: socket.socket) -> None:
    port = server.getsockname()[1]
    server.close()
    with pytest.raises(ConnectionRefusedError) as told:
        Dialer("127.0.0.1", port, None, threading.Event()).dial(LONG_S, LONG_S)
    assert told.value.errno == errno.ECONNREFUSED


def test_a_name_that_can_be_none_is_an_error_like_others() -> None:
    with pytest.raises(OSError, match="label"):
        Dialer("a" * 70 + ".test", 1, None, threading.Event()).dial(1, 1)


def test_one_address_of_two_is_enough(server: socket.socket, names: NameServer) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        closed = other.getsockname()[1]
    one = Dialer(NAME, 1, None, threading.Event(), lambda *name: [*look_up("127.0.0.1", closed), *names(*name)])
    reach(one)


def test_a_link_closes_at_once_while_it_connects_to_silence(
    deaf: tuple[str, int], make_link: Callable[..., MqttLink]
) -> None:
    counters = Counters()
    link = make_link(SimpleNamespace(address=deaf), counters=counters)
    link.start()
    until(lambda: counters.snapshot().get('link_disconnects_total{reason="silent"}'))
    time.sleep(0.3)  # amid the second attempt, which would take 4 s
    assert seconds(link.close) < 1


def test_a_broker_that_takes_long_to_answer_gets_its_devices(
    server: socket.socket, make_link: Callable[..., MqttLink]
) -> None:
    """After a hundred seconds of silence from it, that is; the first ones wait for 2 and 4 s."""

    def serve() -> None:
        connection, _ = server.accept()
        with connection:
            connection.recv(4096)
            time.sleep(5)
            connection.sendall(bytes([0x20, 2, 0, 0]))
            connection.recv(4096)

    serving = threading.Thread(target=serve)
    serving.start()
    link = make_link(SimpleNamespace(address=server.getsockname()), version="3.1.1")
    link._pauses.after(Outcome.UNANSWERED, 100.0)
    link.start()
    until(lambda: link.connected, 8)
    link.close()
    serving.join()
