"""Frames coded against earlier ones through real uplinks, nodes and links: exact, whatever gets lost."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import Any

import cv2
import msgspec
import numpy as np
import pytest

from runtime import manifest, packet, topics
from runtime.codec import CODECS
from runtime.coding import Encoder
from runtime.config import BrokerConfig, CameraConfig, DeviceConfig, NodeConfig, UplinkConfig
from runtime.counters import Counters
from runtime.datatypes import Dropped, Result
from runtime.device import Device
from runtime.link import open_link
from runtime.manifest import Bundle
from runtime.node import Node
from runtime.packet import KEEP, REFERENCE_MISSING, Kind, Packet
from runtime.references import Source, cost
from runtime.reply import Reply
from runtime.topics import Subtree
from runtime.uplink import Sent
from tests.patience import until
from tests.transform_bundle import CODEC, add_transform, transform_files, walk
from tests.uplink_ends import CAM, Sender, Tap

Serving = Callable[[Device | Node], AbstractContextManager[None]]


@pytest.fixture
def bundle(transform_bundle: Bundle) -> Bundle:
    return transform_bundle


@pytest.fixture
def node(memory_broker: BrokerConfig, bundle: Bundle, serving: Serving) -> Iterator[Node]:
    made = Node(NodeConfig(bundle=str(bundle.path), broker=memory_broker, id="box", early_exits=False))
    with serving(made):
        yield made


def same_levels(sender: Sender, node: Node, camera: int = 0) -> int | None:
    """The sequence number of what the sender would code against, which the node must hold exactly."""
    newest = sender.uplink._encoder._references.newest(camera, len(sender.sent))
    if newest is None:
        return None
    source = Source(str(CAM), sender.uplink.session, camera, 1, CODECS[CODEC], sender.uplink._encoder.way.rate)
    held = node._decoder.references.find(source, newest.sequence)
    assert held is not None
    np.testing.assert_array_equal(held, newest.levels)
    return newest.sequence


def test_the_first_frame_stands_alone_and_each_next_is_coded_against_the_one_before(
    memory_broker: BrokerConfig, bundle: Bundle, node: Node
) -> None:
    tap, sender = Tap(memory_broker, bundle), Sender(memory_broker, bundle)
    for number, features in enumerate(walk(bundle, 12)):
        assert isinstance(sender.ask(features), Reply)
        assert same_levels(sender, node) == number
    assert [message.reference for message in tap.packets] == [None, *range(11)]
    assert all(message.flags == KEEP for message in tap.packets)
    sizes = [len(message.payload) for message in tap.packets]
    assert max(sizes[1:]) < sizes[0]
    assert (sender.count("alone"), sender.count("against")) == (1, 11)
    counts = sender.counters.snapshot()
    against = sum(sent.bytes_up for sent in sender.sent[1:])
    assert counts["offload_against_bytes_total"] == against
    assert counts["offload_bytes_total"] == against + sender.sent[0].bytes_up
    assert len(node._decoder.references) <= 2


def test_every_loss_both_ways_leaves_both_sides_with_the_same_levels(
    memory_broker: BrokerConfig, bundle: Bundle, serving: Serving
) -> None:
    lossy = msgspec.structs.replace(memory_broker, loss_ratio=0.25)
    node = Node(NodeConfig(bundle=str(bundle.path), broker=lossy, id="box", early_exits=False))
    with serving(node):
        tap, sender = Tap(memory_broker, bundle), Sender(lossy, bundle)
        for features in walk(bundle, 150):
            before = sender.counters.total("link_lost_total") + node.counters.total("link_lost_total")
            sent = sender.send(features)
            assert isinstance(sent, Sent)
            end = time.monotonic() + 10
            while sent.context not in sender.said and time.monotonic() < end:
                if sender.counters.total("link_lost_total") + node.counters.total("link_lost_total") > before:
                    break
                time.sleep(0.001)
            same_levels(sender, node)
    lost = sender.counters.total("link_lost_total") + node.counters.total("link_lost_total")
    assert len(sender.said) == 150 - lost
    assert 40 < lost < 100
    assert all(isinstance(said, Reply) for said in sender.said.values())
    assert sender.counters.total("references_missed_total") == 0
    assert all(tensor is not None for tensor in tap.tensors)
    assert sender.count("alone") < 10
    assert sum(message.reference != message.sequence - 1 for message in tap.packets) > 20


def test_a_restarted_node_says_what_it_lacks_and_every_frame_is_answered_all_the_same(
    memory_broker: BrokerConfig, bundle: Bundle, serving: Serving
) -> None:
    config = NodeConfig(bundle=str(bundle.path), broker=memory_broker, id="box", early_exits=False)
    frames = walk(bundle, 30)
    tap, sender = Tap(memory_broker, bundle), Sender(memory_broker, bundle)
    with serving(Node(config)):
        for features in frames[:10]:
            assert isinstance(sender.ask(features), Reply)
    with serving(Node(config)):
        for features in frames[10:14]:  # all before any of them is refused
            assert isinstance(sender.send(features), Sent)
        for number in range(10, 14):
            assert isinstance(sender.answer_to(number), Reply)
        for features in frames[14:]:
            assert isinstance(sender.ask(features), Reply)
    again = sender.counters.total("references_missed_total")
    assert 1 <= again <= 4
    assert len(tap.packets) == 30 + again
    assert 1 + again <= sender.count("alone") <= 5, "those sent again, and those sent after the first refusal"
    assert len({message.sequence for message in tap.packets}) == len(tap.packets)
    size = {message.sequence: len(packet.pack(message)) for message in tap.packets}
    first = sender.sent[10]
    assert first.bytes_up > size[10] + size[first.sequence], "both packets count"
    assert sender.sent[20].bytes_up < sender.sent[0].bytes_up


def test_what_a_node_lacks_is_refused_by_a_flag_and_counted(
    memory_broker: BrokerConfig, bundle: Bundle, node: Node
) -> None:
    encoder = Encoder(bundle, codec=CODEC, cut=1)
    (features,) = walk(bundle, 1)
    coded = encoder.encode(features.tensor, camera=0)
    replies: list[Packet] = []
    arrived = threading.Event()

    def receive(topic: str, data: bytes) -> None:
        replies.append(packet.unpack(data))
        arrived.set()

    link = open_link(memory_broker, client_id="cam", counters=Counters())
    link.subscribe(CAM.replies, receive)
    link.start()
    request = Packet(
        Kind.FEATURES, bundle.key, 7, 5, coded.payload, codec=CODECS[CODEC], cut=1, rate=encoder.way.rate, reference=4
    )
    link.publish(CAM.request(bundle.key8, 1), packet.pack(request))
    assert arrived.wait(10)
    (refusal,) = replies
    assert (refusal.kind, refusal.flags, refusal.sequence) == (Kind.REFUSAL, REFERENCE_MISSING, 5)
    assert refusal.payload.decode() == "frame 4, which this one is coded against, is not here"
    assert node.counters.snapshot()['packets_refused_total{reason="reference"}'] == 1


def test_nothing_is_kept_for_a_sender_that_wants_every_frame_alone(
    memory_broker: BrokerConfig, bundle: Bundle, node: Node
) -> None:
    tap, sender = Tap(memory_broker, bundle), Sender(memory_broker, bundle, between_frames=False)
    for features in walk(bundle, 5):
        assert isinstance(sender.ask(features), Reply)
    assert [(message.reference, message.flags) for message in tap.packets] == [(None, 0)] * 5
    assert len(node._decoder.references) == 0


def test_cameras_do_not_share_references_nor_do_devices_behind_one_edge_node(
    memory_broker: BrokerConfig, bundle: Bundle, serving: Serving
) -> None:
    tap, sender = Tap(memory_broker, bundle), Sender(memory_broker, bundle)
    node = Node(NodeConfig(bundle=str(bundle.path), broker=memory_broker, id="box", early_exits=False))
    clips = [walk(bundle, 6, seed) for seed in range(4)]
    whose = [("home/a", 0), ("home/a", 1), ("home/b", 0), ("home/b", 1)]
    with serving(node):
        for frames in zip(*clips, strict=True):
            for features, (origin, camera) in zip(frames, whose, strict=True):
                assert isinstance(sender.ask(features, camera=camera, origin=origin), Reply)
    for stream in range(4):
        chain = [message for message in tap.packets if message.camera == stream]
        assert [message.reference for message in chain] == [None, *(message.sequence for message in chain[:-1])]


def test_a_node_cannot_be_made_to_grow(memory_broker: BrokerConfig, bundle: Bundle, serving: Serving) -> None:
    room = 20_000
    config = NodeConfig(
        bundle=str(bundle.path), broker=memory_broker, id="box", max_queue_frames=1000, max_reference_bytes=room
    )
    (features,) = walk(bundle, 1)
    coded = Encoder(bundle, codec=CODEC, cut=1).encode(features.tensor, camera=0)
    link = open_link(memory_broker, client_id="cam", counters=Counters())
    link.start()
    rng = np.random.default_rng(0)
    node = Node(config)
    with serving(node):
        for number in range(600):
            request = Packet(
                Kind.FEATURES,
                bundle.key,
                session=int(rng.integers(3)),
                sequence=number,
                payload=coded.payload,
                codec=CODECS[CODEC],
                cut=1,
                camera=int(rng.integers(256)),
                flags=KEEP,
                budget_ms=100_000,
            )
            sender = Subtree("home", "d", f"cam{rng.integers(50)}")
            link.publish(sender.request(bundle.key8, 1), packet.pack(request))
        end = time.monotonic() + 90
        while node.counters.total("replies_total") < 600:
            assert time.monotonic() < end
            time.sleep(0.01)
            assert node._decoder.references.size_bytes <= room + cost(np.zeros(256, np.int16)), "and one that just came"
    assert 0 < node._decoder.references.size_bytes <= room


def test_a_decoder_that_fails_on_this_machine_does_not_end_the_node(
    make_bundle: Callable[..., Path], tmp_path: Path, memory_broker: BrokerConfig, serving: Serving
) -> None:
    path = make_bundle(tmp_path / "tiny")
    first, second = (transform_files(cut) for cut in manifest.load(path).manifest.cuts[1:3])
    bundle = add_transform(path, {1: {**first, "decoder.onnx": second["decoder.onnx"]}})
    node = Node(NodeConfig(bundle=str(path), broker=memory_broker, id="box", early_exits=False))
    with serving(node):
        sender = Sender(memory_broker, bundle)
        for features in walk(bundle, 2):
            assert isinstance(sender.ask(features), str)
    assert node.counters.snapshot()['packets_refused_total{reason="bundle"}'] == 2
    assert sender.count("against") == 0


class Refuser:
    """Says of every frame coded against another that it lacks it, after a while; acknowledges the others."""

    def __init__(self, broker: BrokerConfig, bundle: Bundle, after_s: float) -> None:
        self.packets: list[Packet] = []
        self._link = open_link(broker, client_id="node", counters=Counters())
        self._after_s = after_s
        self._answer = b'{"tier":"cloud","exit":3,"confidence":1.0,"answer":{"topk":[[0,1.0]]}}'
        self._link.subscribe(topics.requests("home", "d"), self._received)
        self._link.start()

    def _received(self, topic: str, data: bytes) -> None:
        message = packet.unpack(data)
        self.packets.append(message)
        missing = message.reference is not None
        time.sleep(self._after_s if missing else 0)
        kind, payload = (Kind.REFUSAL, b"it is not here") if missing else (Kind.RESULT, self._answer)
        flags = REFERENCE_MISSING if missing else 0
        reply = Packet(kind, message.bundle, message.session, message.sequence, payload, flags=flags)
        self._link.publish(CAM.replies, packet.pack(reply))


def test_a_frame_whose_budget_has_ended_is_not_sent_again(memory_broker: BrokerConfig, bundle: Bundle) -> None:
    refuser = Refuser(memory_broker, bundle, after_s=0.7)
    sender = Sender(memory_broker, bundle)
    frames = walk(bundle, 2)
    assert isinstance(sender.ask(frames[0]), Reply)
    assert sender.ask(frames[1], budget_ms=500) == "it is not here"
    assert len(refuser.packets) == 2
    assert len(sender.uplink) == 0


def test_a_refusal_from_within_publish_sends_again_once_and_a_sender_gives_up_on_references(
    memory_broker: BrokerConfig, bundle: Bundle, caplog: pytest.LogCaptureFixture
) -> None:
    refuser = Refuser(memory_broker, bundle, after_s=0)
    sender = Sender(memory_broker, bundle)
    with caplog.at_level(logging.WARNING):
        for features in walk(bundle, 100):
            assert isinstance(sender.ask(features), Reply)
    missed = sender.counters.total("references_missed_total")
    assert 3 <= missed <= 6
    assert len(refuser.packets) == 100 + missed
    assert sender.count("against") == missed
    assert [record.message for record in caplog.records if "lacks again and again" in record.message] == [
        "the node above lacks again and again what frames are coded against, as one of a pool does or one short of "
        "max_reference_bytes; the next 16 frames of this camera stand alone"
    ]


def test_a_flag_on_the_refusal_of_a_frame_that_stands_alone_is_a_refusal_like_any_other(
    memory_broker: BrokerConfig, bundle: Bundle
) -> None:
    sender = Sender(memory_broker, bundle)
    node = open_link(memory_broker, client_id="node", counters=Counters())
    (features,) = walk(bundle, 1)
    sent = sender.send(features)
    assert isinstance(sent, Sent)
    node.start()
    refusal = Packet(Kind.REFUSAL, bundle.key, sender.uplink.session, 0, b"no", flags=REFERENCE_MISSING)
    for _ in range(2):
        node.publish(CAM.replies, packet.pack(refusal))
    assert sender.said == {0: "no"}
    assert sender.count("alone") == 1


@pytest.fixture
def clip(tmp_path: Path) -> Path:
    """A folder of pictures that differ little from one to the next."""
    folder = tmp_path / "clip"
    folder.mkdir()
    rng = np.random.default_rng(2)
    picture = rng.integers(0, 200, (24, 32, 3)).astype(np.uint8)
    for index in range(40):
        picture[rng.integers(24), rng.integers(32)] = rng.integers(0, 256, 3)
        cv2.imwrite(str(folder / f"{index:03}.png"), picture)
    return folder


def test_device_edge_and_cloud_through_mosquitto_with_the_broker_and_a_node_restarted(
    start_mosquitto: Callable[..., Any], bundle: Bundle, clip: Path, serving: Serving
) -> None:
    """Both hops code against earlier frames, and find back to it after the cloud's restart and after the broker's."""
    mosquitto = start_mosquitto()
    broker = BrokerConfig(host=mosquitto.host, port=mosquitto.port)
    common: dict[str, Any] = {"bundle": str(bundle.path), "broker": broker, "early_exits": False}
    edge = Node(NodeConfig(**common, id="edge", uplink=UplinkConfig(codec=CODEC)))
    clouds = [Node(NodeConfig(**common, id="cloud", serves="nodes")) for _ in range(2)]
    lines: list[Result | Dropped] = []
    camera = CameraConfig(kind="replay", source=str(clip), max_fps=20, loop=True)
    device = Device(
        DeviceConfig(**common, id="cam", codec=CODEC, budget_ms=5000, camera={"front": camera}), lines.append
    )
    hops = (device.counters, edge.counters)

    def against() -> int:
        """Of the hop that has fewer."""
        return min(
            sum(count for name, count in hop.snapshot().items() if 'reference="against"' in name) for hop in hops
        )

    def from_the_cloud() -> int:
        return sum(isinstance(line, Result) and (line.tier, line.degraded) == ("cloud", None) for line in lines)

    def goes_well() -> None:
        before = against(), from_the_cloud()
        until(lambda: against() >= before[0] + 15 and from_the_cloud() >= before[1] + 15, seconds=60)

    stop = threading.Event()
    thread = threading.Thread(target=device.run, args=(stop,))
    with serving(edge):
        with serving(clouds[0]):
            thread.start()
            goes_well()
        with serving(clouds[1]):
            goes_well()
            assert edge.counters.total("references_missed_total") >= 1, "the second cloud lacks what the first one held"
            mosquitto.restart()
            goes_well()
            stop.set()
            thread.join(30)
    assert not thread.is_alive()
    assert device.counters.total("references_missed_total") == 0, "the edge node keeps what it holds over an outage"
    stale = device.counters.total("frames_dropped_total")
    assert len({line.frame for line in lines}) == len(lines) == device.counters.total("frames_captured_total") - stale
    assert all(hop.total("link_callback_errors_total") == 0 for hop in hops)


def test_a_pool_of_nodes_answers_every_frame(
    start_mosquitto: Callable[..., Any], bundle: Bundle, serving: Serving
) -> None:
    mosquitto = start_mosquitto()
    broker = BrokerConfig(host=mosquitto.host, port=mosquitto.port)
    nodes = [
        Node(NodeConfig(bundle=str(bundle.path), broker=broker, id=f"box{index}", pool="boxes", early_exits=False))
        for index in range(2)
    ]
    with ExitStack() as stack:
        for node in nodes:
            stack.enter_context(serving(node))
        until(lambda: all(node._link.connected for node in nodes))
        sender = Sender(broker, bundle)
        stack.callback(sender.link.close)
        for features in walk(bundle, 120):
            assert isinstance(sender.ask(features), Reply)
    missed = sender.counters.total("references_missed_total")
    assert 2 <= missed <= 12
    assert all(node.counters.total("replies_total") > 20 for node in nodes)
