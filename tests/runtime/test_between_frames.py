"""Frames coded against earlier ones through real uplinks, nodes and links: exact, whatever gets lost."""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import Any

import cv2
import msgspec
import numpy as np
import onnx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from runtime import manifest, packet, topics
from runtime.codec import CODECS
from runtime.codec_transform import Tables
from runtime.coding import Decoder, Encoder, ReferenceMissingError
from runtime.config import BrokerConfig, CameraConfig, DeviceConfig, NodeConfig, UplinkConfig
from runtime.counters import Counters
from runtime.datatypes import Dropped, Features, Result, Tensor
from runtime.device import Device
from runtime.errors import BundleError, PacketError
from runtime.levels import Books
from runtime.link import Link, open_link
from runtime.manifest import Bundle, CodecSpec, CutSpec, FileSpec, RateSpec
from runtime.node import Node
from runtime.packet import KEEP, REFERENCE_MISSING, Kind, Packet
from runtime.plan_rates import Way
from runtime.references import Source, cost
from runtime.reply import Reply
from runtime.topics import Subtree
from runtime.uplink import Sent, Uplink
from tests.patience import until

Serving = Callable[[Device | Node], AbstractContextManager[None]]
CODEC = "transform"
CAM = Subtree("home", "d", "cam")
SECOND_NS = 1_000_000_000


def graph(nodes: Sequence[onnx.NodeProto], constants: dict[str, Any], source: tuple[int, Any], sink: Any) -> bytes:
    made = helper.make_graph(
        list(nodes),
        "codec",
        [helper.make_tensor_value_info("in", source[0], ["N", *source[1]])],
        [helper.make_tensor_value_info("out", sink[0], ["N", *sink[1]])],
        [numpy_helper.from_array(np.array(value), name) for name, value in constants.items()],
    )
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    onnx.checker.check_model(model)
    data: bytes = model.SerializeToString()
    return data


def transform_files(cut: CutSpec) -> dict[str, bytes]:
    """A transform whose coefficients are the features themselves: real graphs, books and layouts, nothing fitted."""
    node, count = helper.make_node, int(np.prod(cut.shape))
    features, flat = (TensorProto.UINT8, cut.shape), (TensorProto.FLOAT, (count,))
    encoder = [
        node("Cast", ["in"], ["float"], to=TensorProto.FLOAT),
        node("Reshape", ["float", "shape"], ["out"]),
    ]
    decoder = [
        node("Round", ["in"], ["whole"]),
        node("Clip", ["whole", "least", "most"], ["clipped"]),
        node("Reshape", ["clipped", "shape"], ["shaped"]),
        node("Cast", ["shaped"], ["out"], to=TensorProto.UINT8),
    ]
    single = np.array([0, *range(1, 64), *range(-63, 0)], np.int16)[:, np.newaxis]
    eight = np.concatenate([np.zeros((1, 8), np.int16), np.eye(8, dtype=np.int16), -np.eye(8, dtype=np.int16)])
    tables = Tables(
        count=count,
        steps=np.array([4.0], np.float32),
        centroids=np.zeros((1, 2), np.float32),
        books=Books((single, eight)),
        groups=np.array([[[count, 0], [0, count // 8]]], np.int32),
        expected=np.array([[count, count / 8]], np.float32),
        dictionaries=((b"", b""),),
    )
    bounds = {"least": np.float32(0), "most": np.float32(255)}
    return {
        "encoder.onnx": graph(encoder, {"shape": np.array([-1, count])}, features, flat),
        "decoder.onnx": graph(decoder, {"shape": np.array([-1, *cut.shape]), **bounds}, flat, features),
        "tables.npz": tables.dump(),
    }


def add_transform(path: Path, of_cut: dict[int, dict[str, bytes]]) -> Bundle:
    """The bundle at `path` with the codec transform at some cuts."""
    plain = manifest.load(path).manifest
    cuts, files = list(plain.cuts), list(plain.files)
    for place, contents in of_cut.items():
        names = {}
        for name, data in contents.items():
            names[name] = f"cuts/{place}/{name}"
            (path / names[name]).parent.mkdir(parents=True, exist_ok=True)
            (path / names[name]).write_bytes(data)
            digest = hashlib.sha256(data).hexdigest()
            files.append(FileSpec(path=names[name], size_bytes=len(data), sha256=digest))
        spec = CodecSpec(
            name=CODEC,
            rates=(RateSpec(parameter=95),),
            encoder=names["encoder.onnx"],
            decoder=names["decoder.onnx"],
            tables=names["tables.npz"],
        )
        cuts[place] = msgspec.structs.replace(cuts[place], codecs=(*cuts[place].codecs, spec))
    manifest.save(msgspec.structs.replace(plain, cuts=tuple(cuts), files=tuple(files)), path)
    return manifest.load(path)


@pytest.fixture(scope="module")
def bundle(make_bundle: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The tiny bundle with the codec transform at cuts 1 and 2."""
    path = make_bundle(tmp_path_factory.mktemp("transform") / "tiny")
    cuts = manifest.load(path).manifest.cuts
    return add_transform(path, {place: transform_files(cuts[place]) for place in (1, 2)})


def walk(bundle: Bundle, count: int, seed: int = 0) -> list[Features]:
    """Features at cut 1 of a camera before which little moves."""
    spec = bundle.manifest.cuts[1]
    rng = np.random.default_rng(seed)
    tensor = rng.uniform(0, 60, (1, *spec.shape))
    found = []
    for _ in range(count):
        tensor = np.clip(tensor + rng.normal(0, 4, tensor.shape) * (rng.random(tensor.shape) < 0.1), 0, 255)
        found.append(Features(1, tensor.astype(spec.dtype)))
    return found


class Sender:
    """A device's uplink, and what came of its frames."""

    def __init__(self, broker: BrokerConfig, bundle: Bundle, **settings: Any) -> None:
        self.counters = Counters()
        self.link: Link = open_link(broker, client_id="cam", counters=self.counters)
        self._bundle = bundle
        self.said: dict[int, Reply | str] = {}
        self._changed = threading.Condition()
        fields = {"codec": CODEC, "cut": 1, "max_in_flight": 1000, "counters": self.counters, **settings}
        self.uplink: Uplink[int] = Uplink(self.link, CAM, bundle, on_reply=self._note, **fields)
        self.sent: list[Sent[int]] = []
        self.link.start()
        until(lambda: self.link.connected)

    def _note(self, sent: Sent[int], said: Reply | str) -> None:
        with self._changed:
            assert sent.context not in self.said, "answered twice"
            self.said[sent.context] = said
            self._changed.notify_all()

    def send(self, features: Features, budget_ms: int = 20_000, **more: Any) -> Sent[int] | str:
        now_ns = time.monotonic_ns()
        number = len(self.sent)
        sent = self.uplink.send(features, number, born_ns=now_ns, deadline_ns=now_ns + budget_ms * 1_000_000, **more)
        if isinstance(sent, Sent):
            self.sent.append(sent)
        return sent

    def answer_to(self, number: int, seconds: float = 10) -> Reply | str | None:
        with self._changed:
            self._changed.wait_for(lambda: number in self.said, seconds)
            return self.said.get(number)

    def ask(self, features: Features, **more: Any) -> Reply | str | None:
        """Send, and wait for what is said."""
        sent = self.send(features, **more)
        assert isinstance(sent, Sent), sent
        return self.answer_to(sent.context)

    def count(self, reference: str) -> int:
        name = f'offload_requests_total{{codec="{CODEC}",cut="1",reference="{reference}"}}'
        return self.counters.snapshot().get(name, 0)


class Tap:
    """Sees every request that a broker is given, and decodes it as a second receiver."""

    def __init__(self, broker: BrokerConfig, bundle: Bundle, role: Any = "d") -> None:
        self.packets: list[Packet] = []
        self.tensors: list[Tensor | None] = []
        self._decoder = Decoder(bundle)
        plain = msgspec.structs.replace(broker, loss_ratio=0.0)
        self.link = open_link(plain, client_id=f"tap-{uuid.uuid4().hex[:8]}", counters=Counters())
        self.link.subscribe(topics.requests("home", role), self._received)
        self.link.start()

    def _received(self, topic: str, data: bytes) -> None:
        message = packet.unpack(data)
        self.packets.append(message)
        try:
            self.tensors.append(self._decoder.decode(str(topics.sender(topic)), message))
        except ReferenceMissingError:
            self.tensors.append(None)


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


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    fates=st.lists(
        st.sampled_from(["well", "well", "well", "request lost", "reply lost", "node restarted", "device restarted"]),
        min_size=10,
        max_size=40,
    )
)
def test_whatever_happens_a_decoder_makes_of_a_frame_what_one_makes_that_missed_nothing(
    bundle: Bundle, fates: list[str]
) -> None:
    frames = walk(bundle, len(fates))
    encoder, decoder, witness, session = Encoder(bundle, codec=CODEC, cut=1), Decoder(bundle), Decoder(bundle), 0
    for features, fate in zip(frames, fates, strict=True):
        if fate == "node restarted":
            decoder = Decoder(bundle)
        if fate == "device restarted":
            encoder, session = Encoder(bundle, codec=CODEC, cut=1), session + 1
        for again in (False, True):
            coded = encoder.encode(features.tensor, camera=0, alone=again)
            message = Packet(
                Kind.FEATURES,
                bundle.key,
                session,
                coded.sequence,
                coded.payload,
                codec=CODECS[CODEC],
                cut=1,
                rate=encoder.way.rate,
                flags=coded.flags,
                reference=coded.reference,
            )
            expected = witness.decode("cam", message)
            if fate == "request lost":
                break
            try:
                tensor = decoder.decode("cam", message)
            except ReferenceMissingError:
                assert "node restarted" in fates
                assert not again, "a frame that stands alone lacks nothing"
                encoder.miss(coded.sequence)
                continue
            np.testing.assert_array_equal(tensor, expected)
            if fate != "reply lost":
                encoder.acknowledge(coded.sequence)
            break


def test_another_scene_stands_alone(bundle: Bundle) -> None:
    encoder = Encoder(bundle, codec=CODEC, cut=1)
    here, there = walk(bundle, 5, seed=1), walk(bundle, 3, seed=2)
    coded = []
    for features in (*here[:4], *there, here[4]):
        coded.append(encoder.encode(features.tensor, camera=0))
        encoder.acknowledge(coded[-1].sequence)
    assert [one.reference for one in coded] == [None, 0, 1, 2, None, 4, 5, None]
    assert all(one.flags == KEEP for one in coded)


def test_a_damaged_payload_is_no_reference(bundle: Bundle) -> None:
    encoder, decoder = Encoder(bundle, codec=CODEC, cut=1), Decoder(bundle)
    frames = walk(bundle, 3)

    def request(number: int, **changes: Any) -> Packet:
        coded = encoder.encode(frames[number].tensor, camera=0)
        fields = {"codec": CODECS[CODEC], "cut": 1, "rate": encoder.way.rate, "flags": coded.flags}
        made = Packet(Kind.FEATURES, bundle.key, 1, coded.sequence, coded.payload, reference=coded.reference, **fields)
        return dataclasses.replace(made, **changes)

    decoder.decode("cam", request(0))
    encoder.acknowledge(0)
    with pytest.raises(PacketError):
        decoder.decode("cam", request(1, payload=b"damaged"))
    assert len(decoder.references) == 1
    good = request(2)
    assert good.reference == 0
    strange = [
        dataclasses.replace(good, session=2),
        dataclasses.replace(good, camera=1),
        dataclasses.replace(good, reference=1),
    ]
    for other in strange:
        with pytest.raises(ReferenceMissingError):
            decoder.decode("cam", other)
    with pytest.raises(ReferenceMissingError):
        decoder.decode("another", good)
    assert decoder.decode("cam", good).shape == frames[2].tensor.shape


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


def test_an_encoder_that_does_not_fit_is_told_at_the_start(make_bundle: Callable[..., Path], tmp_path: Path) -> None:
    path = make_bundle(tmp_path / "tiny")
    first, second = (transform_files(cut) for cut in manifest.load(path).manifest.cuts[1:3])
    bundle = add_transform(path, {1: {**first, "encoder.onnx": second["encoder.onnx"]}})
    with pytest.raises(BundleError):
        Encoder(bundle, codec=CODEC, cut=1)


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


def test_another_way_begins_anew_and_one_frame_aside_changes_nothing(bundle: Bundle) -> None:
    """The decoder tells all of it, and references never cross from one rate to another."""
    encoder, decoder = Encoder(bundle, codec=CODEC, cut=1), Decoder(bundle)
    usual, raw = encoder.way, Way(1, "raw", 0)
    encoder.prepare(raw)
    frames = walk(bundle, 6)

    def through(number: int, **how: Any) -> int | None:
        coded = encoder.encode(frames[number].tensor, camera=0, **how)
        message = Packet(
            Kind.FEATURES, bundle.key, 7, coded.sequence, coded.payload, codec=CODECS[coded.way.codec],
            cut=coded.way.cut, rate=coded.way.rate, flags=coded.flags, reference=coded.reference,
        )  # fmt: skip
        decoded = decoder.decode("client", message)
        if coded.way == raw:
            np.testing.assert_array_equal(decoded, frames[number].tensor)
        encoder.acknowledge(coded.sequence)
        return coded.reference

    assert through(0) is None
    assert through(1) == 0
    assert through(2, way=raw, alone=True) is None
    assert through(3, way=usual) == 1  # what went aside took nothing from the stream
    assert through(4, way=raw) is None
    assert through(5, way=usual) is None  # the stream begins anew
