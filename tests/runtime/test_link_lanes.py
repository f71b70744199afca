"""What goes first, what is dropped and what is told of it, on links that are slow, dead or come back."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from runtime.counters import Counters
from runtime.link import Lane
from runtime.link_mqtt import MqttLink
from runtime.scenario import Outage, Phase, Scenario, Way
from runtime.shaper import Shaper
from tests.patience import until

OPEN, SLOW = Way(), Way(rate=250_000, delay_s=0.04)
BEAT = "kinflow/v1/home/d/porch/beat"


def phases(*ways: Way | Outage) -> Scenario:
    """Phases of a million seconds each, so that `begin` can choose one."""
    found = []
    for number, way in enumerate(ways):
        outage: Outage = way if isinstance(way, str) else "none"
        shape = OPEN if isinstance(way, str) else way
        found.append(Phase(str(number), 1e6 * number, math.inf if way is ways[-1] else 1e6, shape, shape, outage))
    return Scenario(tuple(found))


def enter(shaper: Shaper, number: int) -> None:
    shaper.begin(time.monotonic() - 1e6 * number - 1)


def test_on_a_slow_link_an_event_overtakes_features_and_these_overtake_statistics(
    mosquitto: Any, connect: Callable[..., MqttLink]
) -> None:
    order: list[str] = []
    connect(mosquitto, "w", hear=("#", lambda topic, _: order.append(topic)))
    with Shaper(mosquitto.address, phases(SLOW)) as shaper:
        counters = Counters()
        link = connect(shaper, counters=counters, max_unsent_messages=100)
        for number in range(10):
            assert link.publish(f"stats/{number}", bytes(20_000), lane=Lane.STATS)
        for number in range(30):
            assert link.publish(f"feature/{number}", bytes(20_000))
        assert link.publish("event", b"x", qos=1, lane=Lane.EVENTS)
        until(lambda: len(order) == 41)
        link.close()
    # What was in the kernel's and the shaper's queues when the event came cannot be overtaken: 150 KB at most.
    assert order.index("event") <= 11
    assert [topic for topic in order if topic.startswith("feature")] == [f"feature/{number}" for number in range(30)]
    assert order.index("feature/29") < order.index("stats/9")


def test_of_the_results_that_wait_only_the_newest_goes(mosquitto: Any, connect: Callable[..., MqttLink]) -> None:
    heard: list[int] = []
    counters = Counters()
    connect(mosquitto, "w", hear=("result", lambda _, data: heard.append(data[0])))
    with Shaper(mosquitto.address, phases(OPEN, Way(rate=0.0), OPEN)) as shaper:
        link = connect(shaper, counters=counters, heartbeat_s=0)
        enter(shaper, 1)
        ends: list[str] = []
        sent = 0
        while not counters.total("link_dropped_total"):
            assert link.publish("result", bytes([sent % 250]) * 20_000, lane=Lane.RESULTS, then=ends.append)
            sent += 1
        enter(shaper, 2)
        until(lambda: len(ends) == sent)
        assert (
            ends.count("replaced") == counters.snapshot()['link_dropped_total{lane="results",reason="replaced"}'] == 1
        )
        until(lambda: len(heard) == sent - 1)
        assert heard[-1] == (sent - 1) % 250
        link.close()


def test_what_is_late_is_dropped_and_not_sent(mosquitto: Any, connect: Callable[..., MqttLink]) -> None:
    heard: list[str] = []
    counters, ends = Counters(), []  # type: Counters, list[str]
    connect(mosquitto, "w", hear=("#", lambda topic, _: heard.append(topic)))
    with Shaper(mosquitto.address, phases(OPEN, Way(rate=0.0), OPEN)) as shaper:
        link = connect(shaper, counters=counters, heartbeat_s=0, max_unsent_messages=200)
        enter(shaper, 1)
        for number in range(60):
            soon_ns = time.monotonic_ns() + 500_000_000
            assert link.publish(f"f/{number}", bytes(20_000), expires_ns=soon_ns, then=ends.append)
        assert link.publish("late already", b"", expires_ns=time.monotonic_ns()) == 0
        assert counters.snapshot()['link_refused_total{reason="late"}'] == 1
        until(lambda: ends.count("late") > 20, what="while nothing moves, too")
        enter(shaper, 2)
        until(lambda: len(ends) == 60)
        until(lambda: len(heard) == ends.count(""))
        assert counters.snapshot()['link_dropped_total{lane="features",reason="late"}'] == ends.count("late")
        assert heard == [f"f/{number}" for number in range(len(heard))]
        link.close()


@pytest.mark.parametrize("how", ["kill", "close"])
def test_each_message_that_was_taken_ends_once_whatever_happens(
    mosquitto: Any, connect: Callable[..., MqttLink], how: str
) -> None:
    """Four threads, all lanes, and a broker that stands still and dies amid it."""
    counters = Counters()
    ends: list[tuple[int, str]] = []
    link = connect(mosquitto, counters=counters, max_unsent_bytes=3_000_000)
    taken: list[list[int]] = [[], [], [], []]

    def publish(thread: int) -> None:
        for number in range(thread * 1000, thread * 1000 + 300):
            lane = Lane(number % 4)
            accepted = link.publish(
                f"{thread}/{number % 7}",
                bytes(20_000),
                qos=number % 2,
                lane=lane,
                expires_ns=time.monotonic_ns() + 300_000_000 if number % 3 else None,
                then=lambda end, number=number: ends.append((number, end)),  # type: ignore[misc]
            )
            if accepted:
                taken[thread].append(number)
            if number % 1000 == 100 and thread == 0:
                mosquitto.pause()

    threads = [threading.Thread(target=publish, args=(number,)) for number in range(4)]
    for one in threads:
        one.start()
    for one in threads:
        one.join(30)
        assert not one.is_alive()
    if how == "kill":
        mosquitto.kill()
        until(lambda: not link.connected)
    else:
        mosquitto.resume()
        until(lambda: len(ends) == sum(map(len, taken)))
        link.close()
    assert sorted(number for number, _ in ends) == sorted(number for one in taken for number in one)
    ill = [end for _, end in ends if end not in ("", "unheard")]
    assert len(ill) == counters.total("link_dropped_total") + counters.total("link_lost_total")
    assert sum(map(len, taken)) + counters.total("link_refused_total") == 1200


def test_a_half_open_connection_is_given_up_and_made_anew(
    mosquitto: Any, connect: Callable[..., MqttLink], caplog: pytest.LogCaptureFixture
) -> None:
    counters = Counters()
    with Shaper(mosquitto.address, phases(OPEN, "silent", OPEN)) as shaper, caplog.at_level("INFO"):
        link = connect(shaper, counters=counters, heartbeat_s=0.5, beat=BEAT, hear=("a", lambda *_: None))
        beats = counters.total("link_beats_total")
        enter(shaper, 1)
        until(lambda: not link.connected)
        assert counters.snapshot()['link_disconnects_total{reason="half-open"}'] == 1
        assert counters.total("link_beats_total") == beats + 1
        assert "is half-open: 1 s of silence, a heartbeat included" in caplog.text
        tried = 'link_disconnects_total{reason="silent"}'
        until(lambda: counters.snapshot().get(tried, 0) >= 1)
        assert not link.connected
        before = counters.snapshot()[tried]
        enter(shaper, 2)
        until(lambda: link.connected)
        assert counters.snapshot()[tried] - before <= 2, "one of the next attempts gets in"
        assert "is it an MQTT broker" not in caplog.text
        assert caplog.text.count("by MQTT 5") == 2
        assert set(counters.snapshot()) >= {"link_connects_total", tried}
        link.close()


def test_a_healthy_link_is_never_given_up_and_a_busy_one_is_not_asked(
    mosquitto: Any, connect: Callable[..., MqttLink]
) -> None:
    idle, busy = Counters(), Counters()
    connect(mosquitto, "idle", counters=idle, heartbeat_s=0.8, beat=BEAT)
    worker = connect(mosquitto, "busy", counters=busy, heartbeat_s=1.2, beat=BEAT)

    def works_until_the_other_was_asked_thrice() -> bool:
        return worker.publish("a", b"x", qos=1) > 0 and idle.total("link_beats_total") >= 3

    until(works_until_the_other_was_asked_thrice)
    assert "link_beats_total" not in busy.snapshot()
    assert idle.total("link_disconnects_total") == busy.total("link_disconnects_total") == 0


def test_a_slow_link_that_is_full_is_not_taken_for_half_open(mosquitto: Any, connect: Callable[..., MqttLink]) -> None:
    """Nothing is heard while packets pass that take three seconds each, longer than two heartbeats."""
    counters = Counters()
    way = Way(rate=100_000, delay_s=0.08)
    with Shaper(mosquitto.address, phases(way)) as shaper:
        link = connect(shaper, counters=counters, heartbeat_s=1.45, beat=BEAT)
        for _ in range(2):
            assert link.publish("feature", bytes(300_000))
        ended: list[str] = []
        assert link.publish("feature", b"x", then=ended.append)
        until(lambda: ended == [""])
        assert counters.snapshot()["link_beats_total"] >= 1, "nothing is heard for long"
        assert counters.total("link_disconnects_total") == 0
        link.close()
