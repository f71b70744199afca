from __future__ import annotations

import contextlib
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from runtime.config import BrokerConfig
from runtime.counters import Counters
from runtime.errors import ConfigError
from runtime.link import Lane
from runtime.link_mqtt import MqttLink
from tests.patience import until


class Inbox:
    def __init__(self) -> None:
        self.messages: list[tuple[str, bytes]] = []

    def __call__(self, topic: str, payload: bytes) -> None:
        self.messages.append((topic, payload))


@pytest.fixture
def connect() -> Iterator[Callable[..., MqttLink]]:
    links: list[MqttLink] = []

    def open_one(broker: Any, name: str = "one", *, counters: Counters | None = None, **settings: Any) -> MqttLink:
        config = BrokerConfig(host=broker.host, port=broker.port, **settings)
        link = MqttLink(config, client_id=name, will=(f"will/{name}", b"gone"), counters=counters or Counters())
        links.append(link)
        return link

    yield open_one
    for link in links:
        link.close()


def test_a_message_reaches_the_other_end(mosquitto: Any, connect: Callable[..., MqttLink]) -> None:
    inbox = Inbox()
    receiver, sender = connect(mosquitto, "receiver"), connect(mosquitto, "sender")
    receiver.subscribe("a/+/c", inbox)
    receiver.start()
    sender.start()
    until(lambda: receiver.connected and sender.connected)
    assert sender.publish("a/b/c", b"payload", lane=Lane.EVENTS) == 1 + 1 + 2 + 5 + 1 + 7
    assert sender.publish("a/b/d", b"elsewhere", qos=1) > 0
    until(lambda: inbox.messages)
    assert inbox.messages == [("a/b/c", b"payload")]


def test_everything_comes_back_after_the_broker_was_killed(mosquitto: Any, connect: Callable[..., MqttLink]) -> None:
    inbox, connects = Inbox(), []
    counters = Counters()
    receiver, sender = connect(mosquitto, "receiver", counters=counters), connect(mosquitto, "sender")
    receiver.subscribe("a", inbox)
    receiver.on_connect(lambda: connects.append(1))
    receiver.start()
    sender.start()
    until(lambda: receiver.connected and sender.connected)
    mosquitto.kill()
    until(lambda: not receiver.connected and not sender.connected)
    assert sender.publish("a", b"lost") == 0
    mosquitto.restart()
    until(lambda: receiver.connected and sender.connected)
    assert sender.publish("a", b"back") > 0
    until(lambda: inbox.messages)
    assert inbox.messages == [("a", b"back")]
    assert len(connects) == 2
    assert counters.snapshot()["link_connects_total"] == 2
    assert counters.total("link_disconnects_total") >= 1


def test_a_failing_handler_does_not_end_the_link(mosquitto: Any, connect: Callable[..., MqttLink]) -> None:
    inbox, counters = Inbox(), Counters()
    link = connect(mosquitto, counters=counters)

    def fail(topic: str, payload: bytes) -> None:
        raise RuntimeError("a bug")

    link.subscribe("a", fail)
    link.subscribe("a", inbox)
    link.start()
    until(lambda: link.connected)
    for _ in range(3):
        link.publish("a", b"x")
    until(lambda: len(inbox.messages) == 3)
    assert counters.snapshot()["link_callback_errors_total"] == 3


@pytest.mark.parametrize(("messages", "size_bytes"), [(8, 100_000_000), (1000, 4_000_000)])
def test_what_waits_for_the_broker_is_bounded(
    mosquitto: Any, connect: Callable[..., MqttLink], messages: int, size_bytes: int
) -> None:
    """A broker that does not read: first the sockets' buffers take some, then the link refuses; nothing ever blocks."""
    counters = Counters()
    link = connect(mosquitto, counters=counters, max_unsent_messages=messages, max_unsent_bytes=size_bytes)
    link.start()
    until(lambda: link.connected)
    mosquitto.pause()
    start = time.monotonic()
    sent = [link.publish("a", bytes(500_000)) > 0 for _ in range(100)]
    assert time.monotonic() - start < 5
    assert sent[0]
    assert not sent[-1]
    assert sent.count(True) <= messages + 30
    assert counters.snapshot()['link_refused_total{reason="full"}'] == sent.count(False)
    mosquitto.resume()
    until(lambda: link.publish("a", b"x") > 0)


def test_a_slow_handler_does_not_hold_up_a_publisher(mosquitto: Any, connect: Callable[..., MqttLink]) -> None:
    link = connect(mosquitto)
    busy, go = threading.Event(), threading.Event()

    def dawdle(topic: str, payload: bytes) -> None:
        busy.set()
        go.wait(10)

    link.subscribe("a", dawdle)
    link.start()
    until(lambda: link.connected)
    link.publish("a", b"x")
    assert busy.wait(10)
    start = time.monotonic()
    assert link.publish("b", b"x") > 0
    assert time.monotonic() - start < 1
    go.set()


def test_publishing_from_several_threads_neither_hangs_nor_mixes(
    mosquitto: Any, connect: Callable[..., MqttLink]
) -> None:
    inbox = Inbox()
    link = connect(mosquitto, max_unsent_messages=10_000)
    link.subscribe("many/+", inbox)
    link.start()
    until(lambda: link.connected)

    def publish(number: int) -> None:
        for index in range(200):
            link.publish(f"many/{number}", bytes([number]) * (index + 1), qos=index % 2)

    threads = [threading.Thread(target=publish, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
        assert not thread.is_alive()
    until(lambda: len(inbox.messages) == 800)
    assert all(set(payload) == {int(topic[-1])} for topic, payload in inbox.messages)


def test_a_payload_over_the_brokers_limit_is_refused_before_it_is_sent(
    start_mosquitto: Callable[..., Any], connect: Callable[..., MqttLink], caplog: pytest.LogCaptureFixture
) -> None:
    counters = Counters()
    broker = start_mosquitto("")
    link = connect(broker, counters=counters)
    link.start()
    until(lambda: link.connected)
    # The shipped mosquitto.conf allows 10 MB, and says so in CONNACK.
    link_bytes = 11 * 1024 * 1024
    assert link.publish("a", bytes(link_bytes)) == 0
    assert counters.snapshot()['link_refused_total{reason="oversize"}'] == 1
    assert "max_packet_size" in caplog.text
    assert link.connected


def test_the_will_is_left_when_a_client_vanishes(mosquitto: Any, connect: Callable[..., MqttLink]) -> None:
    inbox = Inbox()
    watcher = connect(mosquitto, "watcher")
    watcher.subscribe("will/+", inbox)
    watcher.start()
    until(lambda: watcher.connected)
    code = (
        "import sys, time\n"
        "from runtime.config import BrokerConfig\nfrom runtime.counters import Counters\n"
        "from runtime.link_mqtt import MqttLink\n"
        f"link = MqttLink(BrokerConfig(host='127.0.0.1', port={mosquitto.port}), client_id='ghost', "
        "will=('will/ghost', b'gone'), counters=Counters())\n"
        "link.start()\n"
        "while not link.connected: time.sleep(.01)\n"
        "print('up', flush=True)\ntime.sleep(60)\n"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as ghost:
        assert ghost.stdout is not None
        assert ghost.stdout.readline() == b"up\n"
        ghost.kill()
    until(lambda: inbox.messages)
    assert inbox.messages == [("will/ghost", b"gone")]


def test_a_broker_without_mqtt_5_is_spoken_to_in_3_1_1(
    free_port: Callable[[], int], connect: Callable[..., MqttLink]
) -> None:
    port = free_port()
    with subprocess.Popen([sys.executable, "-m", "runtime.broker", str(port)], stdin=subprocess.PIPE) as process:
        try:
            broker = type("Broker", (), {"host": "127.0.0.1", "port": port})
            inbox = Inbox()
            link = connect(broker)
            link.subscribe("a", inbox)
            link.start()
            until(lambda: link.connected, 20)
            assert link.publish("a", b"x") == 1 + 1 + 2 + 1 + 1
            until(lambda: inbox.messages)
        finally:
            process.terminate()


def test_nothing_listens_and_the_link_still_closes_at_once(
    free_port: Callable[[], int], connect: Callable[..., MqttLink]
) -> None:
    link = connect(type("Broker", (), {"host": "127.0.0.1", "port": free_port()}))
    link.start()
    time.sleep(0.2)
    start = time.monotonic()
    link.close()
    assert time.monotonic() - start < 2
    assert not link.connected


class Impostor:
    """Takes one TCP connection after the other, sends `reply` to whatever comes first, and `then` a little later."""

    def __init__(self, reply: bytes, then: bytes = b"", *, hang_up: bool = False) -> None:
        self.host = "127.0.0.1"
        self._server = socket.create_server((self.host, 0))
        self.port: int = self._server.getsockname()[1]
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
    impostor: Callable[..., Impostor], connect: Callable[..., MqttLink]
) -> None:
    suback = bytes([0x90, 3, 0, 1, 0])
    wrong, right = bytes([0x30, 5, 0, 1, 0xFF, 1, 2]), bytes([0x30, 4, 0, 1, ord("a"), 7])
    counters, inbox = Counters(), Inbox()
    link = connect(impostor(CONNACK, suback + wrong + right), counters=counters, version="3.1.1")
    link.subscribe("a", inbox)
    link.start()
    until(lambda: inbox.messages == [("a", bytes([7]))])
    assert link.connected
    assert counters.snapshot()["link_callback_errors_total"] == 1


def test_whoever_hangs_up_is_named_and_counted(
    impostor: Callable[..., Impostor], connect: Callable[..., MqttLink], caplog: pytest.LogCaptureFixture
) -> None:
    counters = Counters()
    server = impostor(b"HTTP/1.1 400 Bad Request\r\n\r\n", hang_up=True)
    link = connect(server, counters=counters)
    link.start()
    until(lambda: counters.total("link_disconnects_total") >= 2)
    assert not link.connected
    assert "is it an MQTT broker, and does it want TLS?" in caplog.text


def test_a_refused_subscription_is_no_connection(
    impostor: Callable[..., Impostor], connect: Callable[..., MqttLink], caplog: pytest.LogCaptureFixture
) -> None:
    counters = Counters()
    link = connect(impostor(CONNACK, bytes([0x90, 3, 0, 1, 0x80])), counters=counters, version="3.1.1")
    link.subscribe("a", Inbox())
    link.start()
    until(lambda: counters.total("link_subscribe_refused_total"))
    assert not link.connected
    assert "look at its ACL" in caplog.text


def test_two_clients_with_one_id_are_told_and_do_not_storm_the_broker(
    mosquitto: Any, connect: Callable[..., MqttLink], caplog: pytest.LogCaptureFixture
) -> None:
    counters = Counters()
    twins = [connect(mosquitto, "twin", counters=counters) for _ in range(2)]
    for twin in twins:
        twin.start()
    until(lambda: "does another client use its id?" in caplog.text)
    time.sleep(3)
    assert counters.snapshot()["link_connects_total"] < 12


@pytest.mark.parametrize("wrong", ["no such file", "no certificate"])
def test_tls_files_that_are_none_are_told_at_the_start(tmp_path: Path, wrong: str) -> None:
    ca_file = tmp_path / "ca.pem"
    if wrong == "no certificate":
        ca_file.write_text("hello")
    config = BrokerConfig(host="127.0.0.1", ca_file=str(ca_file))
    with pytest.raises(ConfigError, match=r"TLS cannot be set up with .*ca\.pem"):
        MqttLink(config, client_id="x", will=None, counters=Counters())


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
    link = connect(SimpleNamespace(host="127.0.0.1", port=server.getsockname()[1]), version="3.1.1", heartbeat_s=0)
    link.subscribe("a", handle)
    link.start()
    until(lambda: link.connected)
    assert link.publish("b", bytes(8_000_000)), "more than the sockets hold, so a part of it waits to be written"
    threading.Thread(target=publish, daemon=True).start()
    until(lambda: sorted(done) == ["handler", "publisher"], 3)
    server.close()


def test_how_long_a_connection_lived_is_counted_from_when_it_stood(connect: Callable[..., MqttLink]) -> None:
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
    link = connect(SimpleNamespace(host="127.0.0.1", port=server.getsockname()[1]), counters=counters, version="3.1.1")
    link.start()
    until(lambda: counters.snapshot().get('link_disconnects_total{reason="lost"}') == 3)
    until(lambda: counters.snapshot().get('link_disconnects_total{reason="short"}'), 2)
