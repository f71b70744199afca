from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from runtime.config import BrokerConfig
from runtime.counters import Counters
from runtime.errors import ConfigError
from runtime.link import Lane
from runtime.link_mqtt import MqttLink
from tests.patience import PATIENCE_S, stays, until


class Inbox:
    def __init__(self) -> None:
        self.messages: list[tuple[str, bytes]] = []

    def __call__(self, topic: str, payload: bytes) -> None:
        self.messages.append((topic, payload))


def test_a_message_reaches_the_other_end(mosquitto: Any, connect: Callable[..., MqttLink]) -> None:
    inbox = Inbox()
    connect(mosquitto, "receiver", hear=("a/+/c", inbox))
    sender = connect(mosquitto, "sender")
    assert sender.publish("a/b/c", b"payload", lane=Lane.EVENTS) == 1 + 1 + 2 + 5 + 1 + 7
    assert sender.publish("a/b/d", b"elsewhere", qos=1) > 0
    until(lambda: inbox.messages)
    assert inbox.messages == [("a/b/c", b"payload")]


def test_everything_comes_back_after_the_broker_was_killed(mosquitto: Any, make_link: Callable[..., MqttLink]) -> None:
    inbox, connects = Inbox(), []
    counters = Counters()
    receiver, sender = make_link(mosquitto, "receiver", counters=counters), make_link(mosquitto, "sender")
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


def test_a_failing_handler_does_not_end_the_link(mosquitto: Any, make_link: Callable[..., MqttLink]) -> None:
    inbox, counters = Inbox(), Counters()
    link = make_link(mosquitto, counters=counters)

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
    busy, go, done = threading.Event(), threading.Event(), threading.Event()

    def dawdle(topic: str, payload: bytes) -> None:
        busy.set()
        go.wait(10)
        done.set()

    link = connect(mosquitto, hear=("a", dawdle))
    link.publish("a", b"x")
    assert busy.wait(PATIENCE_S)
    assert link.publish("b", b"x") > 0
    assert not done.is_set()
    go.set()


def test_publishing_from_several_threads_neither_hangs_nor_mixes(
    mosquitto: Any, connect: Callable[..., MqttLink]
) -> None:
    inbox = Inbox()
    link = connect(mosquitto, max_unsent_messages=10_000, hear=("many/+", inbox))

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
    # The shipped mosquitto.conf allows 10 MB, and says so in CONNACK.
    link_bytes = 11 * 1024 * 1024
    assert link.publish("a", bytes(link_bytes)) == 0
    assert counters.snapshot()['link_refused_total{reason="oversize"}'] == 1
    assert "max_packet_size" in caplog.text
    assert link.connected


def test_the_will_is_left_when_a_client_vanishes(mosquitto: Any, connect: Callable[..., MqttLink]) -> None:
    inbox = Inbox()
    connect(mosquitto, "watcher", hear=("will/+", inbox))
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
            inbox = Inbox()
            link = connect(SimpleNamespace(address=("127.0.0.1", port)), hear=("a", inbox))
            assert link.publish("a", b"x") == 1 + 1 + 2 + 1 + 1
            until(lambda: inbox.messages)
        finally:
            process.terminate()


def test_nothing_listens_and_the_link_still_closes_at_once(
    free_port: Callable[[], int], make_link: Callable[..., MqttLink]
) -> None:
    counters = Counters()
    link = make_link(SimpleNamespace(address=("127.0.0.1", free_port())), counters=counters)
    link.start()
    until(lambda: counters.total("link_disconnects_total"))
    start = time.monotonic()
    link.close()
    assert time.monotonic() - start < 2
    assert not link.connected


def test_two_clients_with_one_id_are_told_and_do_not_storm_the_broker(
    mosquitto: Any, make_link: Callable[..., MqttLink], caplog: pytest.LogCaptureFixture
) -> None:
    counters = Counters()
    twins = [make_link(mosquitto, "twin", counters=counters) for _ in range(2)]
    for twin in twins:
        twin.start()
    until(lambda: "does another client use its id?" in caplog.text)
    stays(lambda: counters.total("link_connects_total") < 12, 2.0)


@pytest.mark.parametrize("wrong", ["no such file", "no certificate"])
def test_tls_files_that_are_none_are_told_at_the_start(tmp_path: Path, wrong: str) -> None:
    ca_file = tmp_path / "ca.pem"
    if wrong == "no certificate":
        ca_file.write_text("hello")
    config = BrokerConfig(host="127.0.0.1", ca_file=str(ca_file))
    with pytest.raises(ConfigError, match=r"TLS cannot be set up with .*ca\.pem"):
        MqttLink(config, client_id="x", will=None, counters=Counters())
