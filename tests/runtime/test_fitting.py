"""Payloads over what the broker takes go up by a smaller rate, or not at all where none is small enough."""

from __future__ import annotations

import queue
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from runtime import manifest
from runtime.coding import Encoder
from runtime.config import BrokerConfig
from runtime.counters import Counters
from runtime.datatypes import Features
from runtime.fitting import TRY_AGAIN, Fitting, smaller
from runtime.link import Link, open_link
from runtime.manifest import Bundle
from runtime.plan_rates import Way
from runtime.topics import Subtree, publish_bytes
from runtime.uplink import Sent, Uplink
from tests.patience import until

SELF = Subtree("home", "d", "cam")
FRAME = np.random.default_rng(0).integers(0, 256, (1, 16, 16, 3), np.uint8)


def jpeg(bundle: Bundle, quality: float) -> Way:
    spec = next(spec for spec in bundle.manifest.cuts[0].codecs if spec.name == "jpeg")
    return Way(0, "jpeg", [rate.parameter for rate in spec.rates].index(quality))


def sizes(bundle: Bundle) -> dict[float, int]:
    """Bytes of the frame by quality."""
    found = {}
    for rate in next(spec for spec in bundle.manifest.cuts[0].codecs if spec.name == "jpeg").rates:
        encoder = Encoder(bundle, codec=f"jpeg:{rate.parameter:g}", cut=0)
        found[rate.parameter] = len(encoder.encode(FRAME, camera=0).payload)
    return found


@pytest.fixture
def bundle(shared_bundle: Path) -> Bundle:
    return manifest.load(shared_bundle)


def test_the_next_smaller_rate_is_of_the_same_codec_at_the_same_cut(bundle: Bundle) -> None:
    assert smaller(bundle, jpeg(bundle, 90)) == jpeg(bundle, 75)
    assert smaller(bundle, jpeg(bundle, 50)) is None
    assert smaller(bundle, Way(1, "raw", 0)) is None


def test_a_rate_that_was_too_large_is_tried_again(bundle: Bundle, caplog: pytest.LogCaptureFixture) -> None:
    by_quality, counters = sizes(bundle), Counters()
    assert by_quality[50] < by_quality[75] < by_quality[90]
    fitting = Fitting(bundle, Encoder(bundle, codec="jpeg:90", cut=0), counters)

    def encode(most_bytes: int) -> float | None:
        way = jpeg(bundle, 90)
        coded = fitting.encode(FRAME, camera=0, origin=None, alone=False, way=way, most_bytes=most_bytes)
        if coded is None:
            return None
        assert len(coded.payload) <= most_bytes
        return bundle.manifest.cuts[0].codecs[1].rates[coded.way.rate].parameter

    assert encode(by_quality[90]) == 90
    assert [encode(by_quality[75]) for _ in range(3)] == [75, 75, 75]
    assert encode(by_quality[50]) == 50
    assert encode(by_quality[50] - 1) is None
    assert counters.snapshot() == {'offload_stepped_down_total{reason="oversize"}': 4}
    assert [encode(by_quality[90]) for _ in range(TRY_AGAIN)].count(50) == TRY_AGAIN - 1
    assert encode(by_quality[90]) == 90
    assert len([line for line in caplog.messages if "raise max_packet_size" in line]) == 1


@pytest.fixture
def connected(start_mosquitto: Callable[..., Any]) -> Iterator[Callable[[int], tuple[Link, Link, Counters]]]:
    """A sender's link to a Mosquitto that takes no packet over some bytes, and a listener's."""
    opened: list[Link] = []

    def connect(most_bytes: int) -> tuple[Link, Link, Counters]:
        broker = start_mosquitto(f"max_packet_size {most_bytes}")
        config, counters = BrokerConfig(host=broker.host, port=broker.port), Counters()
        opened.extend(open_link(config, client_id=name, counters=counters) for name in ("sender", "listener"))
        return opened[0], opened[1], counters

    yield connect
    for link in opened:
        link.close()


@pytest.mark.parametrize(("spare", "quality"), [(0, 75), (-1, 50)])
def test_a_real_brokers_limit_steps_the_rate_down_before_anything_is_sent(
    connected: Callable[[int], tuple[Link, Link, Counters]], bundle: Bundle, spare: int, quality: float
) -> None:
    whole = publish_bytes(SELF.request(bundle.key8, 0), sizes(bundle)[75] + 44, alias=True)
    link, listener, counters = connected(whole + spare)
    came: queue.Queue[bytes] = queue.Queue()
    listener.subscribe(SELF.request(bundle.key8, 0), lambda topic, data: came.put(data))
    uplink: Uplink[str] = Uplink(
        link, SELF, bundle, codec="jpeg:90", cut=0, max_in_flight=4, counters=counters, on_reply=lambda sent, said: None
    )
    for one in (listener, link):
        one.start()
        until(lambda one=one: one.connected)  # type: ignore[misc]
    now_ns = time.monotonic_ns()
    sent = uplink.send(Features(0, FRAME), "x", born_ns=now_ns, deadline_ns=now_ns + 10**10)
    assert isinstance(sent, Sent)
    assert sent.way == jpeg(bundle, quality)
    assert len(came.get(timeout=10)) == sizes(bundle)[quality] + 44
    assert counters.total("offload_stepped_down_total") == 1
    assert counters.total("link_refused_total") == 0


def test_where_even_the_smallest_rate_is_too_large_the_reason_is_oversize(
    connected: Callable[[int], tuple[Link, Link, Counters]], bundle: Bundle
) -> None:
    link, _, counters = connected(sizes(bundle)[50])
    uplink: Uplink[str] = Uplink(
        link, SELF, bundle, codec="jpeg:90", cut=0, max_in_flight=4, counters=counters, on_reply=lambda sent, said: None
    )
    link.start()
    until(lambda: link.connected)
    now_ns = time.monotonic_ns()
    features = Features(0, FRAME)
    assert uplink.send(features, "x", born_ns=now_ns, deadline_ns=now_ns + 10**10) == "oversize"
    assert counters.total("link_refused_total") == 0


def test_one_frame_that_was_too_large_costs_later_ones_their_rate_for_a_while_only(
    connected: Callable[[int], tuple[Link, Link, Counters]], bundle: Bundle
) -> None:
    """Nobody says by which rate they go up, as where there is no objective."""
    link, _, counters = connected(publish_bytes(SELF.request(bundle.key8, 0), sizes(bundle)[75] + 44, alias=True))
    uplink: Uplink[str] = Uplink(
        link, SELF, bundle, codec="jpeg:90", cut=0, max_in_flight=1, counters=counters, on_reply=lambda sent, said: None
    )
    link.start()
    until(lambda: link.connected)

    def way_of(frame: np.ndarray) -> Way:
        now_ns = time.monotonic_ns()
        sent = uplink.send(Features(0, frame), "x", born_ns=now_ns, deadline_ns=now_ns + 10**10)
        assert isinstance(sent, Sent)
        uplink.drain()
        return sent.way

    easy = np.zeros_like(FRAME)
    assert way_of(easy) == jpeg(bundle, 90)
    assert way_of(FRAME) == jpeg(bundle, 75)
    assert {way_of(easy) for _ in range(TRY_AGAIN)} == {jpeg(bundle, 75)}
    assert way_of(easy) == jpeg(bundle, 90)
    assert way_of(easy) == jpeg(bundle, 90)
