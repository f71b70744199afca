from __future__ import annotations

import time
import uuid
from typing import Any

from runtime.config import BrokerConfig
from runtime.counters import Counters
from runtime.link import Lane, open_link
from runtime.metered import MeteredLink
from tests.patience import until


def test_what_is_taken_is_counted_by_its_lane_and_what_is_refused_is_not() -> None:
    counters = Counters()
    broker = BrokerConfig(host=str(uuid.uuid4()), kind="memory")
    link = MeteredLink(open_link(broker, client_id="device", counters=counters), counters)
    assert link.publish("a", b"x", lane=Lane.RESULTS) == 0, "nobody is connected yet"
    assert (link.beside, counters.total("link_handed_bytes_total")) == (0, 0)
    link.start()
    costs = {lane: link.publish("topic", bytes(100 * (1 + lane)), lane=lane) for lane in Lane}
    assert all(cost >= 100 * (1 + lane) for lane, cost in costs.items())
    assert link.beside == sum(costs.values()) - costs[Lane.FEATURES]
    assert counters.total("link_handed_bytes_total") == sum(costs.values())
    assert counters.snapshot()['link_handed_bytes_total{lane="results"}'] == costs[Lane.RESULTS]
    link.close()


def test_what_is_dropped_before_any_of_it_is_written_was_not_carried(mosquitto: Any) -> None:
    counters, told = Counters(), []  # type: Counters, list[str]
    broker = BrokerConfig(host=mosquitto.host, port=mosquitto.port, heartbeat_s=0, version="3.1.1")
    link = MeteredLink(open_link(broker, client_id="device", counters=counters), counters)
    link.start()
    until(lambda: link.connected)
    mosquitto.pause()
    assert link.publish("feature", bytes(8_000_000)), "more than the sockets hold"
    costs = {link.publish("result", bytes(600), lane=Lane.RESULTS, then=told.append) for _ in range(9)}
    until(lambda: told == ["replaced"] * 8)
    assert {link.beside} == costs
    soon_ns = time.monotonic_ns() + 300_000_000
    assert link.publish("stats", bytes(600), lane=Lane.STATS, expires_ns=soon_ns, then=told.append)
    until(lambda: told[8:] == ["late"])
    assert {link.beside} == costs
    mosquitto.resume()
    until(lambda: told[9:] == [""])
    assert {link.beside} == costs
    link.close()
