from __future__ import annotations

import queue
import threading
import time
import uuid
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import numpy as np
import pytest

from runtime import manifest, packet, reply, topics
from runtime.codec import CODECS, Codecs
from runtime.config import BrokerConfig
from runtime.counters import Counters
from runtime.datatypes import Features
from runtime.errors import ConfigError
from runtime.link import Link, open_link
from runtime.manifest import Bundle
from runtime.packet import Kind, Packet
from runtime.reply import Reply
from runtime.topics import Subtree, publish_bytes
from runtime.uplink import Sent, Uplink
from tests.patience import until

SELF = Subtree("home", "d", "cam")
FEATURES = Features(1, np.random.default_rng(0).integers(0, 256, (1, 4, 8, 8), np.uint8))
ANSWER = Reply(tier="cloud", exit=3, confidence=0.75, answer=msgspec.Raw(b'{"topk":[[2,0.75],[1,0.25]]}'))
SECOND_NS = 1_000_000_000


@pytest.fixture(scope="module")
def bundle(shared_bundle: Path) -> Bundle:
    return manifest.load(shared_bundle)


class Responder:
    """Answers requests from a thread of its own, as a node does, or at once from within the link, as its refusals."""

    def __init__(self, link: Link, bundle: Bundle) -> None:
        self.packets: list[Packet] = []
        self.at_once: Callable[[Packet], Packet | bytes] | None = None
        self.later: queue.Queue[tuple[Subtree, Packet | bytes] | None] = queue.Queue()
        self.codecs = Codecs(bundle)
        self._link = link
        link.subscribe(topics.requests("home", "d"), self._received)
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _received(self, topic: str, data: bytes) -> None:
        client = topics.sender(topic)
        assert client == SELF
        self.packets.append(packet.unpack(data))
        if self.at_once is not None:
            self._send(client, self.at_once(self.packets[-1]))

    def answer(self, request: Packet, said: Reply = ANSWER) -> None:
        self.later.put((SELF, like(request, Kind.RESULT, reply.encode(said))))

    def send(self, message: Packet | bytes) -> None:
        self.later.put((SELF, message))

    def _run(self) -> None:
        while (item := self.later.get()) is not None:
            self._send(*item)

    def _send(self, client: Subtree, message: Packet | bytes) -> None:
        data = message if isinstance(message, bytes) else packet.pack(message)
        assert self._link.publish(client.replies, data)

    def close(self) -> None:
        """Send what is queued, and end; may be called twice."""
        self.later.put(None)
        self._thread.join(10)
        assert not self._thread.is_alive()


def like(request: Packet, kind: Kind, payload: bytes, session: int | None = None) -> Packet:
    session = request.session if session is None else session
    return Packet(kind=kind, bundle=request.bundle, session=session, sequence=request.sequence, payload=payload)


class Bench:
    """An uplink and a responder on one broker in memory."""

    def __init__(self, bundle: Bundle) -> None:
        broker = BrokerConfig(host=str(uuid.uuid4()), kind="memory")
        self.counters = Counters()
        self.bundle = bundle
        self.link = open_link(broker, client_id="device", counters=self.counters)
        self.replies: queue.Queue[tuple[Sent[str], Reply | str]] = queue.Queue()
        self.uplink = self.make("raw", 1)
        node_link = open_link(broker, client_id="node", counters=Counters())
        self.responder = Responder(node_link, bundle)
        for link in (self.link, node_link):
            link.start()

    def make(self, codec: str, cut: int, max_in_flight: int = 2) -> Uplink[str]:
        return Uplink(
            self.link,
            SELF,
            self.bundle,
            codec=codec,
            cut=cut,
            max_in_flight=max_in_flight,
            counters=self.counters,
            on_reply=lambda sent, said: self.replies.put((sent, said)),
        )

    def send(self, context: str, budget_ns: int = 10 * SECOND_NS, age_ns: int = 5_000_000) -> Sent[str] | str:
        now_ns = time.monotonic_ns()
        return self.uplink.send(FEATURES, context, born_ns=now_ns - age_ns, deadline_ns=now_ns + budget_ns, camera=3)

    def sent(self, context: str, budget_ns: int = 10 * SECOND_NS) -> Sent[str]:
        sent = self.send(context, budget_ns)
        assert isinstance(sent, Sent)
        return sent

    def nothing_came(self) -> None:
        """After everything queued so far has been delivered."""
        deadline = time.monotonic() + 5
        while not self.responder.later.empty() and time.monotonic() < deadline:
            time.sleep(0.001)
        time.sleep(0.02)
        assert self.replies.empty()


@pytest.fixture
def bench(bundle: Bundle) -> Iterator[Bench]:
    made = Bench(bundle)
    yield made
    made.responder.close()


def test_what_goes_up_says_everything_and_costs_what_it_says(bench: Bench, bundle: Bundle) -> None:
    sent = bench.sent("frame 1")
    (request,) = bench.responder.packets
    assert request.kind is Kind.FEATURES
    assert request.bundle == bundle.key
    assert (request.session, request.sequence) == (bench.uplink.session, 0)
    assert (request.cut, request.codec, request.rate, request.camera) == (1, CODECS["raw"], 0, 3)
    assert request.budget_ms is not None
    assert 9_000 <= request.budget_ms < 10_000
    assert 5_000 <= request.age_us < 5_000_000
    codec = bench.responder.codecs.get(request.cut, request.codec, request.rate)
    np.testing.assert_array_equal(codec.decode(request.payload), FEATURES.tensor)
    size = publish_bytes(SELF.request(bundle.key8, 1), len(packet.pack(request)))
    assert sent.bytes_up == size
    assert sent.encode_ms > 0
    assert bench.counters.snapshot() == {
        'offload_requests_total{codec="raw",cut="1",reference="alone"}': 1,
        "offload_bytes_total": size,
    }


def test_answers_find_their_frames_in_any_order(bench: Bench) -> None:
    bench.sent("one")
    bench.sent("two")
    for request in reversed(bench.responder.packets):
        bench.responder.answer(request)
    got = [bench.replies.get(timeout=5) for _ in range(2)]
    assert [(sent.context, said) for sent, said in got] == [("two", ANSWER), ("one", ANSWER)]
    assert len(bench.uplink) == 0


@pytest.mark.parametrize("kind", [Kind.RESULT, Kind.REFUSAL])
def test_an_answer_from_within_publish_is_taken_and_nothing_hangs(bench: Bench, kind: Kind) -> None:
    payload = reply.encode(ANSWER) if kind is Kind.RESULT else b"busy"
    bench.responder.at_once = lambda request: like(request, kind, payload)
    done: queue.Queue[Sent[str] | str] = queue.Queue()
    threading.Thread(target=lambda: done.put(bench.send("one")), daemon=True).start()
    sent = done.get(timeout=5)
    assert isinstance(sent, Sent)
    answered, said = bench.replies.get(timeout=5)
    assert answered is sent
    assert answered.bytes_up > 0
    assert said == (ANSWER if kind is Kind.RESULT else "busy")
    assert len(bench.uplink) == 0


def test_a_refusal_comes_as_its_sentence_cut_to_200_and_readable(bench: Bench) -> None:
    bench.sent("one")
    bench.responder.send(like(bench.responder.packets[0], Kind.REFUSAL, b"this node is busy \xff" + b"x" * 300))
    _, said = bench.replies.get(timeout=5)
    assert isinstance(said, str)
    assert said.startswith("this node is busy \ufffdxxx")
    assert len(said) == 200


def test_each_frame_is_answered_once(bench: Bench) -> None:
    bench.sent("one")
    for _ in range(2):
        bench.responder.answer(bench.responder.packets[0])
    bench.replies.get(timeout=5)
    bench.nothing_came()
    assert bench.counters.total("replies_ignored_total") == 1


def test_the_window_is_full_until_an_answer_comes(bench: Bench) -> None:
    bench.sent("one")
    bench.sent("two")
    assert bench.uplink.full
    assert bench.send("three") == "busy"
    assert len(bench.responder.packets) == 2
    bench.responder.answer(bench.responder.packets[0])
    bench.replies.get(timeout=5)
    assert not bench.uplink.full
    bench.sent("three")
    assert [request.sequence for request in bench.responder.packets] == [0, 1, 2]


def test_offline_late_and_refused_frames_come_back_with_the_reason(bench: Bench) -> None:
    assert bench.send("late", budget_ns=-1) == "deadline"
    assert bench.send("late", budget_ns=900_000) == "deadline"
    bench.link.close()
    assert bench.send("one") == "offline"
    assert len(bench.uplink) == 0
    assert bench.responder.packets == []


def test_a_frame_that_the_link_refuses_is_not_waited_for(
    bundle: Bundle, start_mosquitto: Callable[..., object], free_port: Callable[[], int]
) -> None:
    broker = start_mosquitto()
    counters = Counters()
    config = BrokerConfig(host="127.0.0.1", port=broker.port, max_unsent_bytes=10)  # type: ignore[attr-defined]
    link = open_link(config, client_id="device", counters=counters)
    uplink: Uplink[str] = Uplink(
        link, SELF, bundle, codec="raw", cut=1, max_in_flight=2, counters=counters, on_reply=lambda sent, said: None
    )
    link.start()
    try:
        until(lambda: link.connected)
        now_ns = time.monotonic_ns()
        assert uplink.send(FEATURES, "one", born_ns=now_ns, deadline_ns=now_ns + SECOND_NS) == "link"
        assert len(uplink) == 0
        assert "offload_bytes_total" not in counters.snapshot()
    finally:
        link.close()


def test_what_expires_is_given_back_once_and_never_answered(bench: Bench) -> None:
    late = bench.sent("late", budget_ns=20_000_000)
    kept = bench.sent("kept")
    assert bench.uplink.expire(late.deadline_ns - 1) == []
    assert bench.uplink.expire(late.deadline_ns) == [late]
    assert bench.uplink.expire(late.deadline_ns) == []
    bench.responder.answer(bench.responder.packets[0])
    bench.nothing_came()
    assert bench.counters.snapshot()['replies_ignored_total{reason="late"}'] == 1
    assert bench.uplink.drain() == [kept]
    assert bench.uplink.drain() == []


def test_what_was_given_back_is_not_held_where_nobody_asks_for_late_answers(bench: Bench) -> None:
    tensor = FEATURES.tensor.copy()
    now_ns = time.monotonic_ns()
    bench.uplink.send(Features(1, tensor), "one", born_ns=now_ns, deadline_ns=now_ns + SECOND_NS)
    assert len(bench.uplink.expire(now_ns + SECOND_NS)) == 1
    held = weakref.ref(tensor)
    del tensor
    assert held() is None


def test_patience_ends_with_the_first_deadline(bench: Bench) -> None:
    assert bench.uplink.patience_s(0.25) == 0.25
    sent = bench.sent("one", budget_ns=100_000_000)
    bench.sent("two")
    assert 0 < bench.uplink.patience_s(10) <= 0.1
    assert bench.uplink.patience_s(0.001) == 0.001
    bench.uplink.expire(sent.deadline_ns)
    assert 5 < bench.uplink.patience_s(60) <= 10


def test_replies_that_are_not_ours_or_damaged_are_counted_and_the_frame_waits_on(bench: Bench) -> None:
    bench.sent("one")
    (request,) = bench.responder.packets
    answer = like(request, Kind.RESULT, reply.encode(ANSWER))
    other_session = like(request, Kind.RESULT, b"", session=request.session ^ 1)
    other_bundle = Packet(Kind.RESULT, b"\0" * 8, request.session, request.sequence, b"")
    unknown_label = reply.encode(msgspec.structs.replace(ANSWER, answer=msgspec.Raw(b'{"topk":[[5,1.0]]}')))
    for message in (
        other_session,
        other_bundle,
        b"garbage",
        b"",
        packet.pack(answer)[:-1],
        like(request, Kind.RESULT, b"{}"),
        like(request, Kind.RESULT, reply.encode(ANSWER).replace(b"cloud", b"\xff" * 5)),
        like(request, Kind.RESULT, unknown_label),
        like(request, Kind.FEATURES, b""),
    ):
        bench.responder.send(message)
    bench.nothing_came()
    counts = bench.counters.snapshot()
    assert counts['replies_ignored_total{reason="not ours"}'] == 2
    assert counts['packets_refused_total{reason="damaged"}'] == 7
    bench.responder.send(answer)
    assert bench.replies.get(timeout=5)[1] == ANSWER


def test_nothing_is_lost_or_answered_twice_when_answers_race_with_deadlines(bench: Bench) -> None:
    bench.uplink = bench.make("raw", 1, max_in_flight=1000)
    bench.responder.at_once = None
    expired: list[Sent[str]] = []
    refused: list[int] = []
    for number in range(300):
        sent = bench.send(str(number), budget_ns=3_000_000)
        if isinstance(sent, str):
            refused.append(number)
        else:
            bench.responder.answer(bench.responder.packets[-1])
        expired += bench.uplink.expire(time.monotonic_ns())
    deadline = time.monotonic() + 5
    while len(refused) + len(expired) + bench.replies.qsize() < 300 and time.monotonic() < deadline:
        expired += bench.uplink.expire(time.monotonic_ns())
    bench.responder.close()
    answered = [bench.replies.get()[0] for _ in range(bench.replies.qsize())]
    ended = [int(sent.context) for sent in (*expired, *answered)]
    assert sorted(ended + refused) == list(range(300))


def test_a_picture_codec_sends_the_frame_at_cut_0(bench: Bench) -> None:
    uplink = bench.make("jpeg:90", 0)
    assert (uplink.way.codec, uplink.way.cut) == ("jpeg", 0)
    now_ns = time.monotonic_ns()
    frame = Features(0, np.zeros((1, 16, 16, 3), np.uint8))
    assert isinstance(uplink.send(frame, "one", born_ns=now_ns, deadline_ns=now_ns + SECOND_NS), Sent)
    (request,) = bench.responder.packets
    assert (request.cut, request.codec, request.rate) == (0, CODECS["jpeg"], 2)
    assert request.payload[:2] == b"\xff\xd8"


@pytest.mark.parametrize(("codec", "cut"), [("jpeg", 1), ("png", 0), ("jpeg:1", 0), ("raw", 3)])
def test_a_codec_that_the_cut_does_not_have_is_refused_at_the_start(bench: Bench, codec: str, cut: int) -> None:
    with pytest.raises(ConfigError):
        bench.make(codec, cut)
