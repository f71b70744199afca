"""A broker that dies after it has confirmed events, and before anybody had them, costs none."""

from __future__ import annotations

import json
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from paho.mqtt.client import Client, MQTTMessage
from paho.mqtt.enums import CallbackAPIVersion, MQTTProtocolVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties

from runtime.config import BrokerConfig, EventsConfig
from runtime.counters import Counters
from runtime.events import Event
from runtime.forwarding import Forwarding
from runtime.inbox import Inbox
from runtime.link_mqtt import MqttLink
from runtime.listen import Printer
from runtime.outbox import Letter, Limits, Outbox
from runtime.spool import Spool, boot_id
from runtime.subscriber import Subscriber
from runtime.topics import Subtree, events
from tests.patience import until

S = 1_000_000_000
KEEP_S = 30
LIMITS = Limits(messages=1000, size_bytes=1 << 20, age_ns=86_400 * S, per_second=1000, resend_ns=KEEP_S * S)
BOARD = Subtree("home", "d", "board")
TOPIC = BOARD.event("porch")


class Mail:
    """An outbox before a broker that confirms each letter at once, what has left it, and a clock."""

    def __init__(self, limits: Limits = LIMITS) -> None:
        self.left: list[tuple[int, str]] = []
        self.box = Outbox(limits, lambda letter, why: self.left.append((letter.number, why)))
        self.now_ns = 5 * S
        self.put_count = 0

    def put(self, size_bytes: int = 5) -> None:
        self.put_count += 1
        self.box.put(Letter(self.put_count, "topic", bytes(size_bytes), self.now_ns))

    def send(self) -> list[int]:
        sent = []
        while (letter := self.box.take(self.now_ns)) is not None:
            self.box.settle(letter.number, "", self.now_ns)
            sent.append(letter.number)
        return sent

    def pass_time(self, seconds: int) -> None:
        """With a connection: it is looked at now and then."""
        for _ in range(seconds):
            self.now_ns += S
            self.send()


def test_what_was_confirmed_lately_goes_again_in_its_place_after_a_lost_connection() -> None:
    mail = Mail()
    for _ in range(3):
        mail.put()
    assert mail.send() == [1, 2, 3]
    assert (len(mail.box), mail.box.size_bytes, mail.box.kept) == (0, 0, 3)
    mail.put()  # without a connection
    mail.now_ns += 3600 * S  # an outage lets nothing of what was confirmed grow old
    assert mail.box.connected() == 3
    assert mail.send() == [1, 2, 3, 4]
    assert mail.left == []
    mail.pass_time(KEEP_S - 1)
    assert mail.left == []
    mail.pass_time(1)
    assert mail.left == [(number, "") for number in range(1, 5)]
    assert mail.box.connected() == 0


def test_what_was_confirmed_makes_room_before_anything_is_lost() -> None:
    mail = Mail(Limits(messages=4, size_bytes=1000, age_ns=86_400 * S, per_second=1000, resend_ns=KEEP_S * S))
    for _ in range(4):
        mail.put()
    mail.send()
    for _ in range(4):
        mail.put()
    assert mail.left == [(number, "") for number in range(1, 5)]
    mail.put()
    assert mail.left[4:] == [(5, "full")]


@pytest.mark.parametrize("reason", ["full", "old", "stopping"])
def test_what_was_confirmed_once_is_never_called_lost(reason: str) -> None:
    mail = Mail(Limits(messages=2, size_bytes=1000, age_ns=S, per_second=1000, resend_ns=KEEP_S * S))
    mail.put()
    mail.send()
    mail.box.connected()
    if reason == "full":
        mail.put()
        mail.put()
    elif reason == "old":
        mail.box.expire(mail.now_ns + 2 * S)
    else:
        mail.box.give_up("stopping")
    assert mail.left == [(1, "")]


@given(
    st.lists(st.sampled_from(["put", "send", "pass on", "second", "die"]), max_size=200),
    st.integers(1, 8),
)
def test_whatever_a_broker_forgets_that_passes_on_in_time_everything_arrives_in_order(
    steps: list[str], behind_s: int
) -> None:
    """A broker passes on what it has confirmed within `behind_s`, unless it dies before that."""
    limits = Limits(messages=1000, size_bytes=1 << 20, age_ns=86_400 * S, per_second=1000, resend_ns=(behind_s + 1) * S)
    mail = Mail(limits)
    held: deque[tuple[int, int]] = deque()  # confirmed, not passed on: when, number
    inbox, got = Inbox(), []

    def pass_on() -> None:
        number = held.popleft()[1]
        if inbox.take("board", "a", number).new:
            got.append(number)

    for step in steps:
        if step == "put":
            mail.put()
        elif step == "pass on" and held:
            pass_on()
        elif step == "second":
            mail.now_ns += S
            while held and mail.now_ns - held[0][0] >= behind_s * S:
                pass_on()
        elif step == "die":
            held.clear()
            mail.box.connected()
        if step in ("send", "second"):
            held.extend((mail.now_ns, number) for number in mail.send())
    held.extend((mail.now_ns, number) for number in mail.send())
    while held:
        pass_on()
    assert got == list(range(1, mail.put_count + 1))
    assert inbox.missing == 0


class Board:
    """The events of a device at a real broker."""

    def __init__(self, port: int, *, version: Any = "5", **settings: Any) -> None:
        self.counters = Counters()
        broker = BrokerConfig(host="127.0.0.1", port=port, version=version)
        self.link = MqttLink(broker, client_id="board", will=None, counters=self.counters)
        config = EventsConfig(**({"drain_per_second": 1000.0} | settings))
        self._due = threading.Event()
        self.forwarding = Forwarding(config, self.link, self.counters, "a", self._due.set)
        self.link.on_connect(self.forwarding.connected)
        self.link.subscribe(BOARD.again, lambda topic, payload: self.forwarding.again())
        self._told = 0
        self._ended = threading.Event()
        self._tending = threading.Thread(target=self._tend)
        self.link.start()
        self._tending.start()

    def tell(self, count: int, label: str = "lamp") -> None:
        for _ in range(count):
            self._told += 1
            told = Event(f"id-{self._told}", "new", "porch", self._told, label, 0.9, 0.9, None, 10.0)
            self.forwarding.send(told, TOPIC, 0)

    def close(self) -> None:
        self._ended.set()
        self._tending.join()
        self.forwarding.close()
        self.link.close()

    def _tend(self) -> None:
        while not self._ended.is_set():
            self._due.wait(0.05)
            self._due.clear()
            self.forwarding.tend()


class Slow:
    """A consumer to whom the broker gives one message, and no other one before that is acknowledged: never."""

    def __init__(self, port: int, *, slow: bool) -> None:
        self.heard: list[int] = []
        self.listens = threading.Event()
        self.client = Client(
            CallbackAPIVersion.VERSION2, client_id="slow", protocol=MQTTProtocolVersion.MQTTv5, manual_ack=slow
        )
        most = Properties(PacketTypes.CONNECT)  # type: ignore[no-untyped-call]
        most.ReceiveMaximum = 1 if slow else 100
        self.client.on_connect = lambda client, *_: client.subscribe(TOPIC, qos=1)
        self.client.on_subscribe = lambda *_: self.listens.set()
        self.client.on_message = self._hear
        self.client.connect("127.0.0.1", port, properties=most)
        self.client.loop_start()
        assert self.listens.wait(10)

    def close(self) -> None:
        self.client.disconnect()
        self.client.loop_stop()

    def _hear(self, client: Client, userdata: object, message: MQTTMessage) -> None:
        self.heard.append(json.loads(message.payload)["sequence"])


class Listening:
    """`kinflow events` as it listens, with one memory over all its connections."""

    def __init__(self, port: int, version: Any) -> None:
        self._broker = BrokerConfig(host="127.0.0.1", port=port, version=version)
        self._printer = Printer(True, None)
        self.printed = 0
        self._stop = threading.Event()
        self._thread = threading.Thread()

    def start(self) -> None:
        self._stop.clear()
        listens = threading.Event()

        def anew() -> list[str]:
            listens.set()
            return self._printer.all_again()

        def hear(topic: str, payload: bytes) -> str | None:
            wanted = self._printer.put(topic, payload)
            self.printed = int(self._printer.summary().split()[0])
            return wanted

        subscriber = Subscriber(self._broker, "listening", events("home"), 60, hear, anew)
        self._thread = threading.Thread(target=subscriber.run, args=(self._stop,))
        self._thread.start()
        assert listens.wait(10)

    def stop(self) -> None:
        self._stop.set()
        self._thread.join()


@pytest.fixture
def board(mosquitto: Any) -> Iterator[Callable[..., Board]]:
    boards: list[Board] = []

    def start(**settings: Any) -> Board:
        boards.append(Board(mosquitto.port, **settings))
        until(lambda: boards[-1].link.connected)
        return boards[-1]

    yield start
    for one in boards:
        one.close()


@pytest.mark.parametrize(("resend_s", "arrive"), [(30.0, [1, 2, 3, 4, 5, 6, 7]), (0.0, [6, 7])])
def test_a_broker_that_is_killed_with_confirmed_events_that_nobody_had(
    mosquitto: Any, board: Callable[..., Board], resend_s: float, arrive: list[int]
) -> None:
    consumer = Slow(mosquitto.port, slow=True)
    one = board(resend_s=resend_s)
    one.tell(5)
    until(lambda: one.counters.snapshot()["events_stored"] == 0)  # the broker has confirmed all
    until(lambda: consumer.heard)
    assert consumer.heard == [1]  # and holds what it will never pass on
    mosquitto.kill()
    consumer.close()
    until(lambda: not one.link.connected)
    mosquitto.restart()
    again = Slow(mosquitto.port, slow=False)
    one.tell(2)
    until(lambda: again.heard[-1:] == [7])
    again.close()
    assert again.heard == arrive
    assert one.counters.snapshot().get("events_resent_total", 0) == (5 if resend_s else 0)
    assert one.counters.total("events_lost_total") == 0


def test_what_was_confirmed_lately_outlives_the_device_on_disk(
    mosquitto: Any, board: Callable[..., Board], tmp_path: Path
) -> None:
    consumer = Slow(mosquitto.port, slow=False)
    one = board(store=str(tmp_path / "events.db"))
    one.tell(3)
    until(lambda: consumer.heard == [1, 2, 3] and one.counters.snapshot()["events_stored"] == 0)
    consumer.close()
    one.close()
    with closing(Spool(tmp_path / "events.db", boot_id())) as spool:
        assert [letter.number for letter in spool.load(0)] == [1, 2, 3]


def test_an_event_larger_than_the_broker_takes_is_dropped_at_once_and_holds_up_nothing(
    start_mosquitto: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    broker = start_mosquitto("max_packet_size 1000\n")
    consumer = Slow(broker.port, slow=False)
    one = Board(broker.port)
    until(lambda: one.link.connected)
    one.tell(1)
    one.tell(2, "lamp" * 500)
    one.tell(1)
    until(lambda: consumer.heard == [1, 4])
    until(lambda: one.counters.snapshot()["events_stored"] == 0)
    one.close()
    consumer.close()
    assert one.counters.snapshot()['events_lost_total{reason="oversize"}'] == 2
    assert caplog.text.count("raise max_packet_size") == 1


@pytest.mark.parametrize("version", ["5", "3.1.1"])
def test_who_comes_back_after_others_asks_for_what_they_alone_have_heard(
    mosquitto: Any, version: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """The broker has lost all sessions; with MQTT 3.1.1 it confirms even what nobody hears."""
    listening = Listening(mosquitto.port, version)
    listening.start()
    one = Board(mosquitto.port, version=version)
    until(lambda: one.link.connected)
    one.tell(2)
    until(lambda: listening.printed == 2)
    listening.stop()
    one.tell(3)  # the broker holds them for who is away
    until(lambda: one.counters.snapshot()["events_stored"] == 0)
    mosquitto.kill()
    until(lambda: not one.link.connected)
    mosquitto.restart()
    page = Slow(mosquitto.port, slow=False) if version == "5" else None
    until(lambda: one.link.connected and one.counters.snapshot()["events_stored"] == 0)
    listening.start()
    until(lambda: listening.printed == 5)
    listening.stop()
    one.close()
    if page is not None:
        page.close()
    lines = [json.loads(line)["sequence"] for line in capsys.readouterr().out.splitlines()]
    assert lines == [1, 2, 3, 4, 5]


def test_a_consumer_that_asks_gets_again_what_was_confirmed_lately(mosquitto: Any, board: Callable[..., Board]) -> None:
    consumer = Slow(mosquitto.port, slow=False)
    one = board()
    one.tell(3)
    until(lambda: consumer.heard == [1, 2, 3])
    until(lambda: one.counters.snapshot()["events_stored"] == 0)
    consumer.client.publish(BOARD.again, b"", qos=1)
    until(lambda: consumer.heard == [1, 2, 3, 1, 2, 3])
    one.tell(1)
    until(lambda: consumer.heard[6:] == [4])
    consumer.close()
    assert one.counters.snapshot()["events_resent_total"] == 3
