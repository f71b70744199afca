"""Budgets on their way through nodes: what is left is passed on, and nothing is worked on that would be late."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime import manifest, packet, requests
from runtime.batcher import Batcher
from runtime.config import BrokerConfig, CameraConfig, DeviceConfig, NodeConfig, UplinkConfig
from runtime.counters import Counters
from runtime.datatypes import Dropped, Result
from runtime.device import Device
from runtime.link import Link, open_link
from runtime.node import Node
from runtime.packet import Kind, Packet
from runtime.requests import Pace, Request
from runtime.topics import Subtree
from tests.patience import PATIENCE_S, until

Serving = Callable[[Device | Node], AbstractContextManager[None]]
MS = 1_000_000


def request(sequence: int, *, camera: int = 0, client: str = "cam", deadline_ms: float = 1e9) -> Request:
    message = Packet(kind=Kind.FEATURES, bundle=bytes(8), session=1, sequence=sequence, payload=b"", camera=camera)
    return Request(Subtree("home", "d", client), message, 0, round(deadline_ms * MS))


@given(st.lists(st.floats(0.1, 500), min_size=1, max_size=40), st.floats(-100, 1000))
def test_only_what_would_nearly_always_be_late_is_in_vain(took_ms: list[float], left_ms: float) -> None:
    pace, now_ns = Pace(), 10**9
    for ms in took_ms:
        pace.took("cut1", ms, now_ns)
    quicker = sum(ms < left_ms - 1e-5 for ms in took_ms[-32:]) / len(took_ms[-32:])
    as_quick = sum(ms <= left_ms + 1e-5 for ms in took_ms[-32:])
    if pace.in_vain("cut1", now_ns + round(left_ms * MS), now_ns):
        assert left_ms <= 0 or quicker <= requests.SURE + 1e-9
    else:
        assert left_ms > 0
        assert as_quick > 0
    # What was slow long ago is tried again: else nothing would ever tell that it is quick by now.
    later_ns = now_ns + round((requests.FRESH_MS + 1) * MS)
    assert pace.in_vain("cut1", later_ns + MS, later_ns) is False
    assert pace.in_vain("cut1", later_ns, later_ns) is True


@given(st.lists(st.tuples(st.integers(0, 2), st.booleans()), max_size=20))
def test_a_queue_gives_up_what_is_not_wanted_and_nothing_else(items: list[tuple[int, bool]]) -> None:
    queue: Batcher[tuple[int, int, bool]] = Batcher(
        max_batch_size=99, max_queue_delay_ms=0, max_queue_frames=99, max_queue_bytes=100
    )
    put = [(number, camera, late) for number, (camera, late) in enumerate(items)]
    for item in put:
        assert queue.put(item, 5)
    assert queue.remove(lambda item: item[2]) == [item for item in put if item[2]]
    rest = [item for item in put if not item[2]]
    assert len(queue) == len(rest)
    assert queue.put((99, 0, False), 100 - 5 * len(rest)), "their room is free again"
    assert queue.take(0) == [*rest, (99, 0, False)]


def test_frames_of_one_camera_are_of_one_device_run_and_camera() -> None:
    assert request(1).same_camera(request(2))
    assert not request(1).same_camera(request(2, camera=1))
    assert not request(1).same_camera(request(2, client="other"))


class Wire:
    """Hears what goes up between tiers, and speaks for a device."""

    def __init__(self, broker: BrokerConfig, bundle: manifest.Bundle) -> None:
        self.up: list[tuple[str, Packet]] = []
        self.replies: list[Packet] = []
        self.link: Link = open_link(broker, client_id="wire", counters=Counters())
        self.link.subscribe("kinflow/v1/+/+/+/req/#", lambda topic, data: self.up.append((topic, packet.unpack(data))))
        self.link.subscribe("kinflow/v1/home/d/own/res", lambda topic, data: self.replies.append(packet.unpack(data)))
        self.link.start()
        self.topic = Subtree("home", "d", "own").request(bundle.key8, 0)
        self.bundle = bundle

    def ask(self, sequence: int, **changes: Any) -> None:
        spec = self.bundle.manifest.cuts[0]
        payload = packet_payload(spec.shape)
        fields: dict[str, Any] = {"kind": Kind.FEATURES, "bundle": self.bundle.key, "session": 7, "cut": 0, "codec": 1}
        message = Packet(**{**fields, "sequence": sequence, "payload": payload, "budget_ms": 5000, **changes})
        self.link.publish(self.topic, packet.pack(message))


def packet_payload(shape: tuple[int, ...]) -> bytes:
    import numpy as np

    from runtime.codec import RawCodec
    from runtime.manifest import CutSpec

    spec = CutSpec(after="", tensor="", shape=shape, dtype="uint8")
    return RawCodec(spec).encode(np.zeros((1, *shape), np.uint8))


def test_the_budget_that_is_left_travels_and_is_less_at_each_hop(
    shared_bundle: Path, photos: Path, memory_broker: BrokerConfig, serving: Serving
) -> None:
    """Device → edge → cloud: each says what is left, less what it keeps back for its own answer."""
    bundle = manifest.load(shared_bundle)
    wire = Wire(memory_broker, bundle)
    settings: dict[str, Any] = {"bundle": str(shared_bundle), "broker": memory_broker, "early_exits": False}
    edge = Node(NodeConfig(**settings, id="edge", uplink=UplinkConfig()))
    cloud = Node(NodeConfig(**settings, id="cloud", serves="nodes"))
    camera = {"front": CameraConfig(kind="replay", source=str(photos), realtime=False, frames=5)}
    lines: list[Result | Dropped] = []
    with serving(edge), serving(cloud):
        device = Device(DeviceConfig(**settings, id="cam", camera=camera, budget_ms=4000), lines.append)
        device.run(threading.Event())
    wire.link.close()
    first = {message.sequence: message for topic, message in wire.up if "/d/cam/" in topic}
    second = [message for topic, message in wire.up if "/n/edge/" in topic]
    assert len(first) == len(second) == 5
    for message, (_, before) in zip(second, sorted(first.items()), strict=True):
        assert before.budget_ms is not None
        assert message.budget_ms is not None
        # Taken from the age of the frame, which each hop counts on: nothing of the budget is given twice.
        spent_ms = before.age_us / 1000
        assert before.budget_ms <= 4000 - spent_ms + 1
        assert message.budget_ms <= 0.9 * before.budget_ms
        assert message.age_us >= before.age_us
    assert all(isinstance(line, Result) and line.degraded is None for line in lines)


def test_a_request_that_this_node_cannot_do_in_time_is_not_decoded(
    shared_bundle: Path, memory_broker: BrokerConfig, serving: Serving
) -> None:
    bundle = manifest.load(shared_bundle)
    wire = Wire(memory_broker, bundle)
    node = Node(NodeConfig(bundle=str(shared_bundle), broker=memory_broker, id="box"))
    with serving(node):
        wire.ask(1)
        until(lambda: len(wire.replies) == 1)
        for _ in range(40):
            node._pace.took("cut0", 900.0, time.monotonic_ns())
        wire.ask(2, budget_ms=300)
        until(lambda: node.counters.total("requests_dropped_total") == 1)
        assert node.counters.snapshot()[f'requests_dropped_total{{reason="{requests.LATE_QUEUED}"}}'] == 1
        time.sleep(requests.FRESH_MS / 1000)
        wire.ask(3, budget_ms=300)
        until(lambda: len(wire.replies) == 2)
    wire.link.close()
    assert [message.sequence for message in wire.replies] == [1, 3]


class _Held:
    """A segment that stands still until it is let go."""

    def __init__(self, inner: Any) -> None:
        self._inner = inner
        self.entered, self.go = threading.Event(), threading.Event()

    def run(self, tensor: Any) -> Any:
        """Wait, and run it."""
        self.entered.set()
        assert self.go.wait(PATIENCE_S)
        return self._inner.run(tensor)


class _Slow:
    """A segment or a decoder that takes its time."""

    def __init__(self, inner: Any, seconds: float) -> None:
        self._inner, self._seconds = inner, seconds

    def run(self, tensor: Any) -> Any:
        """Wait, and run it."""
        time.sleep(self._seconds)
        return self._inner.run(tensor)

    def decode(self, *what: Any) -> Any:
        """Wait, and decode it."""
        time.sleep(self._seconds)
        return self._inner.decode(*what)


def test_the_newest_frame_of_a_camera_takes_the_place_of_one_that_would_be_late(
    shared_bundle: Path, memory_broker: BrokerConfig, serving: Serving
) -> None:
    bundle = manifest.load(shared_bundle)
    wire = Wire(memory_broker, bundle)
    node = Node(NodeConfig(bundle=str(shared_bundle), broker=memory_broker, id="box", max_batch_size=1))
    held = _Held(node._tier.segments[0])
    node._tier.segments[0] = held  # type: ignore[index]
    with serving(node):
        wire.ask(1, budget_ms=60_000)
        until(held.entered.is_set)  # the others wait behind it
        wire.ask(2, budget_ms=20)
        wire.ask(3, budget_ms=20, camera=1)
        time.sleep(0.1)
        wire.ask(4, budget_ms=60_000)
        until(lambda: node.counters.total("requests_dropped_total") >= 1)
        held.go.set()
        until(lambda: len(wire.replies) == 2)
    wire.link.close()
    assert [message.sequence for message in wire.replies] == [1, 4]
    counts = node.counters.snapshot()
    assert counts[f'requests_dropped_total{{reason="{requests.REPLACED}"}}'] == 1
    assert counts[f'requests_dropped_total{{reason="{requests.LATE_QUEUED}"}}'] == 1


@pytest.mark.parametrize("slow", ["decoder", "segment", "segment of an edge node"])
def test_each_step_looks_at_what_is_left(
    shared_bundle: Path, memory_broker: BrokerConfig, serving: Serving, slow: str
) -> None:
    wire = Wire(memory_broker, manifest.load(shared_bundle))
    uplink = UplinkConfig() if slow.endswith("node") else None
    config = NodeConfig(bundle=str(shared_bundle), broker=memory_broker, id="box", uplink=uplink, early_exits=False)
    node = Node(config)
    if slow == "decoder":
        node._decoder = _Slow(node._decoder, 0.8)  # type: ignore[assignment]
    else:
        node._tier.segments[0] = _Slow(node._tier.segments[0], 0.8)  # type: ignore[index]
    with serving(node):
        wire.ask(1, budget_ms=500)
        until(lambda: node.counters.total("requests_dropped_total") == 1)
    wire.link.close()
    assert wire.replies == []
    assert not [topic for topic, _ in wire.up if "/n/box/" in topic]
    reason = {"decoder": requests.LATE_DECODED, "segment": requests.LATE_ANSWER}.get(slow, requests.LATE_RUN)
    assert node.counters.snapshot()[f'requests_dropped_total{{reason="{reason}"}}'] == 1


def test_what_would_come_back_late_does_not_go_up_and_is_answered_here(
    shared_bundle: Path, memory_broker: BrokerConfig, serving: Serving
) -> None:
    bundle = manifest.load(shared_bundle)
    wire = Wire(memory_broker, bundle)
    settings: dict[str, Any] = {"bundle": str(shared_bundle), "broker": memory_broker, "early_exits": False}
    edge = Node(NodeConfig(**settings, id="edge", uplink=UplinkConfig()))
    with serving(edge), serving(Node(NodeConfig(**settings, id="cloud", serves="nodes"))):
        for _ in range(40):
            edge._pace.took("above", 2000.0, time.monotonic_ns())
        wire.ask(1, budget_ms=1000)
        until(lambda: len(wire.replies) == 1)
    wire.link.close()
    assert b'"degraded":"edge uplink: late"' in wire.replies[0].payload
    assert not [topic for topic, _ in wire.up if "/n/edge/" in topic]
