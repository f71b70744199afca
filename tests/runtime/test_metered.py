from __future__ import annotations

import uuid

from runtime.config import BrokerConfig
from runtime.counters import Counters
from runtime.link import Lane, open_link
from runtime.metered import MeteredLink


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
