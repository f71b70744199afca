from __future__ import annotations

import itertools
import random
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import Any, ClassVar, Literal

import msgspec
import numpy as np
import pytest

from runtime import manifest, packet, reply
from runtime.codec import CODECS, RawCodec
from runtime.config import BrokerConfig, NodeConfig, UplinkConfig
from runtime.counters import Counters
from runtime.datatypes import Tensor
from runtime.device import Device
from runtime.errors import BundleError, ConfigError, PacketError
from runtime.link import Link, open_link
from runtime.manifest import Bundle
from runtime.node import Node
from runtime.packet import Kind, Packet
from runtime.segment import RUNNERS
from runtime.segment_onnx import OnnxSegment
from tests.patience import PATIENCE_S, until

Serving = Callable[[Device | Node], AbstractContextManager[None]]


class Client:
    """A device's side of the wire, in a test's hand."""

    def __init__(self, broker: BrokerConfig, bundle: Bundle) -> None:
        self._bundle = bundle
        self._topic = f"kinflow/v1/home/d/cam/req/{bundle.key8}"
        self._codec = RawCodec(bundle.manifest.cuts[1])
        self.replies: dict[int, Packet] = {}
        self._arrived = threading.Condition()
        self.link: Link = open_link(broker, client_id="cam", counters=Counters())
        self.link.subscribe("kinflow/v1/home/d/cam/res", self._receive)
        self.link.start()

    def _receive(self, topic: str, data: bytes) -> None:
        with self._arrived:
            message = packet.unpack(data)
            self.replies[message.sequence] = message
            self._arrived.notify_all()

    def request(self, sequence: int, **changes: Any) -> Packet:
        rng = np.random.default_rng(sequence)
        tensor = rng.integers(0, 60, (1, 4, 8, 8)).astype(np.uint8)
        fields = {"kind": Kind.FEATURES, "bundle": self._bundle.key, "session": 7, "sequence": sequence}
        more = {"payload": self._codec.encode(tensor), "codec": CODECS["raw"], "cut": 1, "budget_ms": 3000}
        return Packet(**{**fields, **more, **changes})

    def send(self, message: Packet | bytes) -> None:
        self.link.publish(f"{self._topic}/1", message if isinstance(message, bytes) else packet.pack(message))

    def await_reply(self, sequence: int, seconds: float = PATIENCE_S) -> Packet:
        with self._arrived:
            assert self._arrived.wait_for(lambda: sequence in self.replies, seconds), f"no reply to {sequence}"
            return self.replies[sequence]

    def ask(self, sequence: int, **changes: Any) -> reply.Reply | str:
        """Send a request and return the answer, or the sentence of the refusal."""
        self.send(self.request(sequence, **changes))
        message = self.await_reply(sequence)
        assert message.session == changes.get("session", 7)
        return reply.decode(message.payload) if message.kind is Kind.RESULT else message.payload.decode()


@pytest.fixture
def client(memory_broker: BrokerConfig, shared_bundle: Path) -> Iterator[Client]:
    made = Client(memory_broker, manifest.load(shared_bundle))
    yield made
    made.link.close()


@pytest.fixture
def node(memory_broker: BrokerConfig, shared_bundle: Path, serving: Serving) -> Iterator[Node]:
    made = Node(NodeConfig(bundle=str(shared_bundle), broker=memory_broker, id="box"))
    with serving(made):
        yield made


def test_a_request_is_answered(client: Client, node: Node) -> None:
    answer = client.ask(1)
    assert isinstance(answer, reply.Reply)
    assert answer.tier == "cloud"
    assert answer.exit in (2, 3)
    assert {"cloud.queue", "cloud.decode", "cloud.segment1"} <= set(answer.timings)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"bundle": bytes(8)}, "install the same on every tier"),
        ({"cut": 3}, "cut 3 is past it"),
        ({"cut": 255}, "cut 255 is past it"),
        ({"codec": 99}, "codec 99 at rate 0 is not in this bundle"),
        ({"rate": 5}, "codec 1 at rate 5 is not in this bundle"),
        ({"cut": 2}, "unfolds to 256 bytes, this cut has 96"),
        ({"variant": 1}, "variant 1: this bundle has none but 0"),
        ({"payload": b""}, "no zstd frame"),
        ({"payload": b"x" * 1000}, "no zstd frame"),
        ({"reference": 0}, "codec 1 codes no frame against another"),
    ],
)
def test_what_cannot_be_served_is_refused_with_a_sentence(
    client: Client, node: Node, changes: dict[str, Any], sentence: str
) -> None:
    answer = client.ask(1, **changes)
    assert isinstance(answer, str)
    assert sentence in answer
    assert node.counters.total("packets_refused_total") == 1
    assert isinstance(client.ask(2), reply.Reply)


@pytest.mark.parametrize("change", [{"flags": 2}, {"flags": 128}])
def test_what_a_later_version_may_send_is_not_taken_for_something_else(
    client: Client, node: Node, change: dict[str, int]
) -> None:
    client.send(client.request(1, **change))
    assert isinstance(client.ask(2), reply.Reply)
    assert 1 not in client.replies
    assert node.counters.snapshot()['packets_refused_total{reason="damaged"}'] == 1


def test_a_graph_that_fails_on_this_machine_does_not_end_the_node(
    tmp_path: Path, make_bundle: Callable[..., Path], memory_broker: BrokerConfig, serving: Serving
) -> None:
    path = make_bundle(tmp_path / "overflowing", logit_scale=np.inf)
    client = Client(memory_broker, manifest.load(path))
    with serving(Node(NodeConfig(bundle=str(path), broker=memory_broker, id="box", early_exits=False))):
        for sequence in range(2):
            answer = client.ask(sequence)
            assert isinstance(answer, str)
            assert "gave a logit that is no number" in answer
    client.link.close()


def test_a_request_whose_budget_has_ended_is_not_run(client: Client, node: Node) -> None:
    client.send(client.request(1, budget_ms=0))
    assert isinstance(client.ask(2), reply.Reply)
    assert 1 not in client.replies
    assert node.counters.total("requests_dropped_total") == 1


def test_what_would_come_too_late_is_not_sent_down(client: Client, node: Node) -> None:
    client.send(client.request(1, budget_ms=0, cut=3))
    assert isinstance(client.ask(2), reply.Reply)
    assert 1 not in client.replies
    assert node.counters.snapshot()['replies_dropped_total{reason="link"}'] == 1


def test_ten_thousand_pieces_of_garbage(client: Client, node: Node) -> None:
    """Every one is refused and counted, none ends the node, and a good request is answered after each lot."""
    wrong, count = 0, 10_000
    whole = [packet.pack(client.request(index)) for index in range(20)]
    chance = random.Random(0)
    for index in range(count):
        data = bytearray(whole[index % len(whole)])
        match chance.randrange(4):
            case 0:
                data = bytearray(chance.randbytes(chance.randrange(200)))
            case 1:
                data = data[: chance.randrange(len(data))]
            case 2:
                data += chance.randbytes(chance.randrange(1, 50))
            case 3:
                for _ in range(chance.randrange(1, 8)):
                    data[chance.randrange(len(data))] = chance.randrange(256)
        try:
            packet.unpack(bytes(data))
        except PacketError:
            wrong += 1
        client.send(bytes(data))
    client.link.publish("kinflow/v1/home/d/cam/req/+/1", b"")
    asked = itertools.count(1)  # the node may still be busy with what was no garbage after all
    until(lambda: isinstance(client.ask(2**31 + next(asked)), reply.Reply))
    counts = node.counters.snapshot()
    assert counts['packets_refused_total{reason="damaged"}'] >= wrong
    accounted = sum(
        node.counters.total(name) for name in ("packets_refused_total", "requests_dropped_total", "replies_total")
    )
    assert accounted == count + next(asked)  # those asked for at the end, and the one on a topic that is none


def test_requests_that_come_together_run_together(
    memory_broker: BrokerConfig, shared_bundle: Path, client: Client, serving: Serving
) -> None:
    config = NodeConfig(
        bundle=str(shared_bundle), broker=memory_broker, id="box", max_batch_size=4, max_queue_delay_ms=500
    )
    alone = {}
    with serving(Node(msgspec.structs.replace(config, max_batch_size=1))):
        for sequence in range(8):
            answer = client.ask(sequence)
            assert isinstance(answer, reply.Reply)
            alone[sequence] = bytes(answer.answer)
    client.replies.clear()
    node = Node(config)
    with serving(node):
        for sequence in range(8):
            client.send(client.request(sequence))
        together = {sequence: bytes(reply.decode(client.await_reply(sequence).payload).answer) for sequence in range(8)}
    assert together == alone
    assert node.counters.snapshot()['batches_total{size="4"}'] == 2


class Noted(OnnxSegment):
    """A segment that notes the cut and the size of each batch."""

    batches: ClassVar[list[tuple[str, int]]] = []

    def __init__(self, bundle: Bundle, file: str, *, threads: int) -> None:
        super().__init__(bundle, file, threads=threads)
        self._file = file

    def run(self, batch: Tensor) -> Tensor:
        self.batches.append((Path(self._file).stem, len(batch)))
        return super().run(batch)


@pytest.mark.parametrize(("serves", "segments"), [("devices", {"1", "2"}), ("nodes", {"2"})])
def test_the_largest_batch_is_run_before_the_first_comes(
    memory_broker: BrokerConfig,
    shared_bundle: Path,
    monkeypatch: pytest.MonkeyPatch,
    serves: Literal["devices", "nodes"],
    segments: set[str],
) -> None:
    monkeypatch.setitem(RUNNERS, "onnx", f"{__name__}:Noted")
    monkeypatch.setattr(Noted, "batches", [])
    Node(NodeConfig(bundle=str(shared_bundle), broker=memory_broker, id="box", serves=serves, max_batch_size=4))
    assert {segment for segment, size in Noted.batches if size == 4} == segments
    assert max(size for _, size in Noted.batches) == 4


def test_a_full_queue_says_so(
    memory_broker: BrokerConfig, shared_bundle: Path, client: Client, serving: Serving
) -> None:
    config = NodeConfig(
        bundle=str(shared_bundle),
        broker=memory_broker,
        id="box",
        max_batch_size=8,
        max_queue_delay_ms=300,
        max_queue_frames=2,
    )
    node = Node(config)
    with serving(node):
        for sequence in range(50):
            client.send(client.request(sequence))
        until(lambda: len(client.replies) == 50)
    refused = [message for message in client.replies.values() if message.kind is Kind.REFUSAL]
    assert refused
    assert all(message.payload == b"this node is busy" for message in refused)


@pytest.fixture
def edge(memory_broker: BrokerConfig, shared_bundle: Path) -> Node:
    return Node(
        NodeConfig(bundle=str(shared_bundle), broker=memory_broker, id="edge", early_exits=False, uplink=UplinkConfig())
    )


def test_an_edge_node_escalates_and_brings_the_answer_down(
    edge: Node, client: Client, memory_broker: BrokerConfig, shared_bundle: Path, serving: Serving
) -> None:
    cloud = Node(
        NodeConfig(bundle=str(shared_bundle), broker=memory_broker, id="cloud", serves="nodes", early_exits=False)
    )
    with ExitStack() as stack:
        stack.enter_context(serving(cloud))
        stack.enter_context(serving(edge))
        answer = client.ask(1)
    assert isinstance(answer, reply.Reply)
    assert (answer.tier, answer.exit, answer.degraded) == ("cloud", 3, None)
    assert {"edge.segment1", "edge.network", "cloud.segment2"} <= set(answer.timings)
    assert all(took_ms >= 0 for took_ms in answer.timings.values())
    assert edge.counters.total("offload_bytes_total") > 44


def test_an_edge_node_answers_itself_when_the_cloud_is_gone(edge: Node, client: Client, serving: Serving) -> None:
    with serving(edge):
        start = time.monotonic()
        answer = client.ask(1, budget_ms=300)
        took_s = time.monotonic() - start
    assert isinstance(answer, reply.Reply)
    assert (answer.tier, answer.exit, answer.degraded) == ("edge", 2, "edge uplink: deadline")
    assert 0.2 < took_s < 3


def test_a_long_refusal_from_above_still_comes_down_as_an_answer(
    edge: Node, client: Client, memory_broker: BrokerConfig, serving: Serving
) -> None:
    cloud = open_link(memory_broker, client_id="cloud", counters=Counters())

    def refuse(topic: str, data: bytes) -> None:
        message = packet.unpack(data)
        refusal = Packet(Kind.REFUSAL, message.bundle, message.session, message.sequence, b"x" * 1000)
        cloud.publish("kinflow/v1/home/n/edge/res", packet.pack(refusal))

    cloud.subscribe("kinflow/v1/home/n/+/req/#", refuse)
    cloud.start()
    with serving(edge):
        answer = client.ask(1)
    cloud.close()
    assert isinstance(answer, reply.Reply)
    assert answer.degraded is not None
    assert answer.degraded.startswith("edge uplink: refused: xxx")


def test_a_node_without_an_uplink_must_run_to_the_end(shared_bundle: Path, memory_broker: BrokerConfig) -> None:
    with pytest.raises(ConfigError, match="a node without an uplink runs them to the end"):
        Node(NodeConfig(bundle=str(shared_bundle), broker=memory_broker, last_segment=1))


def test_a_truncated_segment_is_refused_at_the_start(tiny_bundle: Path, memory_broker: BrokerConfig) -> None:
    path = tiny_bundle / "segments/1.onnx"
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(BundleError, match=r"segments/1\.onnx has \d+ bytes, the manifest says"):
        Node(NodeConfig(bundle=str(tiny_bundle), broker=memory_broker))


def test_a_node_that_stops_answers_or_refuses_everything_it_took(
    memory_broker: BrokerConfig, shared_bundle: Path, client: Client, serving: Serving
) -> None:
    node = Node(NodeConfig(bundle=str(shared_bundle), broker=memory_broker, id="box", max_queue_delay_ms=200))
    with serving(node):
        for sequence in range(30):
            client.send(client.request(sequence))
    assert len(client.replies) == 30


def test_a_node_does_not_hear_its_own_requests(
    memory_broker: BrokerConfig, shared_bundle: Path, serving: Serving
) -> None:
    """A node that serves nodes and has an uplink on the same broker is subscribed to its own topic as well."""
    config = NodeConfig(
        bundle=str(shared_bundle),
        broker=memory_broker,
        id="middle",
        serves="nodes",
        early_exits=False,
        uplink=UplinkConfig(),
    )
    middle = Node(config)
    top = Node(NodeConfig(bundle=str(shared_bundle), broker=memory_broker, id="top", serves="nodes", last_segment=2))
    asker = Client(memory_broker, manifest.load(shared_bundle))
    with ExitStack() as stack:
        stack.enter_context(serving(top))
        stack.enter_context(serving(middle))
        data = packet.pack(asker.request(1))
        asker.link.publish(f"kinflow/v1/home/n/below/req/{middle.bundle.key8}/1", data)
        time.sleep(0.5)
    asker.link.close()
    assert middle.counters.total("packets_refused_total") == 0


def test_one_devices_broken_features_do_not_refuse_the_others(
    tmp_path: Path, make_bundle: Callable[..., Path], memory_broker: BrokerConfig, serving: Serving
) -> None:
    """A real graph whose logits overflow on bright features only, as float features from a broken device do."""
    path = make_bundle(tmp_path / "tiny", logit_scale=1e37)
    client = Client(memory_broker, manifest.load(path))
    bright, dark = np.full((1, 4, 8, 8), 255, np.uint8), np.zeros((1, 4, 8, 8), np.uint8)
    codec = RawCodec(manifest.load(path).manifest.cuts[1])
    config = NodeConfig(bundle=str(path), broker=memory_broker, id="box", max_batch_size=4, max_queue_delay_ms=500)
    with serving(Node(msgspec.structs.replace(config, early_exits=False))):
        for sequence, tensor in enumerate([bright, dark, dark, dark]):
            client.send(client.request(sequence, payload=codec.encode(tensor)))
        kinds = [client.await_reply(sequence).kind for sequence in range(4)]
    client.link.close()
    assert kinds == [Kind.REFUSAL, Kind.RESULT, Kind.RESULT, Kind.RESULT]
