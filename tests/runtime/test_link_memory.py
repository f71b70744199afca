from __future__ import annotations

import threading
import time
import uuid

import pytest

from runtime.config import BrokerConfig
from runtime.counters import Counters
from runtime.link import open_link
from runtime.link_memory import MemoryLink
from runtime.topics import publish_bytes


class Inbox:
    """Keeps what a link hands over."""

    def __init__(self) -> None:
        self.messages: list[tuple[str, bytes]] = []

    def __call__(self, topic: str, payload: bytes) -> None:
        self.messages.append((topic, payload))


def assert_sent(bytes_up: int) -> None:
    assert bytes_up > 0


class Broker:
    """Opens links to one broker in memory."""

    def __init__(self, loss_ratio: float = 0.0, loss_seed: int = 0) -> None:
        self._config = BrokerConfig(host=str(uuid.uuid4()), kind="memory", loss_ratio=loss_ratio, loss_seed=loss_seed)
        self.counters = Counters()

    def link(self, *subscriptions: tuple[str, Inbox], start: bool = True) -> MemoryLink:
        link = open_link(self._config, client_id="test", counters=self.counters)
        assert isinstance(link, MemoryLink)
        for topic_filter, inbox in subscriptions:
            link.subscribe(topic_filter, inbox)
        if start:
            link.start()
        return link


@pytest.fixture
def broker() -> Broker:
    return Broker()


@pytest.mark.parametrize(
    ("topic_filter", "comes"),
    [("a/b/c", True), ("a/+/c", True), ("a/#", True), ("#", True), ("a/b", False), ("a/+", False), ("b/#", False)],
)
def test_a_message_reaches_the_filters_that_match(broker: Broker, topic_filter: str, comes: bool) -> None:
    inbox = Inbox()
    broker.link((topic_filter, inbox))
    broker.link().publish("a/b/c", b"hello")
    assert inbox.messages == ([("a/b/c", b"hello")] if comes else [])


def test_every_subscription_of_every_link_gets_a_copy_the_publishers_own_too(broker: Broker) -> None:
    own, first, second = Inbox(), Inbox(), Inbox()
    broker.link(("a", first), ("+", second))
    broker.link(("a", own)).publish("a", b"x")
    assert [len(inbox.messages) for inbox in (own, first, second)] == [1, 1, 1]


@pytest.mark.parametrize("qos", [0, 1])
def test_a_message_costs_what_it_costs_in_mqtt_5(broker: Broker, qos: int) -> None:
    assert broker.link().publish("a/b", bytes(200), qos=qos) == publish_bytes("a/b", 200, qos=qos)


def test_a_retained_message_waits_for_those_who_come_later(broker: Broker) -> None:
    early, late = Inbox(), Inbox()
    broker.link(("state", early))
    sender = broker.link()
    sender.publish("state", b"old", retain=True)
    sender.publish("state", b"new", retain=True)
    sender.publish("state", b"passing")
    broker.link(("state", late))
    assert [payload for _, payload in early.messages] == [b"old", b"new", b"passing"]
    assert [payload for _, payload in late.messages] == [b"new"]


def test_an_empty_retained_message_forgets_the_one_before(broker: Broker) -> None:
    late = Inbox()
    sender = broker.link()
    sender.publish("state", b"old", retain=True)
    sender.publish("state", b"", retain=True)
    broker.link(("state", late))
    assert late.messages == []


def test_on_connect_runs_at_start_when_messages_already_flow(broker: Broker) -> None:
    inbox = Inbox()
    link = broker.link(("a", inbox), start=False)
    link.on_connect(lambda: assert_sent(link.publish("a", b"up")))
    assert not link.connected
    assert inbox.messages == []
    link.start()
    assert link.connected
    assert inbox.messages == [("a", b"up")]


def test_a_link_that_is_not_connected_neither_sends_nor_receives(broker: Broker) -> None:
    inbox = Inbox()
    link = broker.link(("a", inbox))
    link.connected = False
    assert link.publish("a", b"x") == 0
    broker.link().publish("a", b"x")
    assert inbox.messages == []
    assert broker.counters.snapshot() == {'link_refused_total{reason="offline"}': 1}
    link.connected = True
    broker.link().publish("a", b"y")
    assert inbox.messages == [("a", b"y")]


def test_whoever_publishes_learns_whether_anybody_heard_it(broker: Broker) -> None:
    ends: list[str] = []
    sender = broker.link()
    assert_sent(sender.publish("a", b"x", qos=1, then=ends.append))
    assert_sent(sender.publish("a", b"x", qos=0, then=ends.append))
    broker.link(("a", Inbox()))
    assert_sent(sender.publish("a", b"x", qos=1, then=ends.append))
    assert ends == ["unheard", "", ""]


def test_what_is_late_is_refused(broker: Broker) -> None:
    ends: list[str] = []
    assert broker.link().publish("a", b"x", expires_ns=time.monotonic_ns(), then=ends.append) == 0
    assert ends == []
    assert broker.counters.snapshot() == {'link_refused_total{reason="late"}': 1}


def test_a_link_that_loses_loses_its_share_the_same_one_every_time_and_counts_it() -> None:
    arrived = []
    for _ in range(2):
        broker, inbox = Broker(loss_ratio=0.05, loss_seed=3), Inbox()
        broker.link(("a", inbox))
        sender = broker.link()
        for number in range(4000):
            assert sender.publish("a", number.to_bytes(2, "big")) == publish_bytes("a", 2)
        lost = broker.counters.snapshot()['link_lost_total{lane="features",reason="loss_ratio"}']
        assert lost == 4000 - len(inbox.messages)
        assert 150 < lost < 250
        arrived.append(inbox.messages)
    assert arrived[0] == arrived[1]
    sender.publish("a", b"x", qos=1)
    assert inbox.messages[-1] == ("a", b"x")


def test_a_closed_link_is_gone_and_closing_twice_is_harmless(broker: Broker) -> None:
    inbox = Inbox()
    link = broker.link(("a", inbox))
    link.close()
    link.close()
    broker.link().publish("a", b"x")
    assert inbox.messages == []
    assert not link.connected


def test_brokers_of_other_names_hear_nothing() -> None:
    inbox = Inbox()
    Broker().link(("#", inbox))
    Broker().link().publish("a", b"x")
    assert inbox.messages == []


def test_a_handler_may_publish_close_and_subscribe_new_links(broker: Broker) -> None:
    inbox = Inbox()
    link = broker.link(start=False)

    def answer(topic: str, payload: bytes) -> None:
        broker.link(("answer", inbox))
        link.publish("answer", payload)
        link.close()

    link.subscribe("question", answer)
    link.start()
    broker.link().publish("question", b"?")
    assert inbox.messages == [("answer", b"?")]


def test_messages_of_many_threads_all_arrive(broker: Broker) -> None:
    inbox = Inbox()
    broker.link(("+", inbox))
    links = [broker.link() for _ in range(4)]

    def send(link: MemoryLink) -> None:
        for number in range(200):
            link.publish("a", bytes([number]))

    threads = [threading.Thread(target=send, args=(link,)) for link in links]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(inbox.messages) == 800
