"""The sender's side of a link: features go up as packets, answers come back, and nothing waits for ever.

A device and an edge node offload in the same way; only what they do with the answer differs.
"""

from __future__ import annotations

import logging
import secrets
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Generic, TypeVar

from runtime import packet, reply
from runtime.codec import CODECS
from runtime.coding import Encoder
from runtime.counters import Counters
from runtime.datatypes import Features, Tensor
from runtime.errors import PacketError
from runtime.fitting import Fitting
from runtime.link import Lane, Link
from runtime.manifest import Bundle
from runtime.packet import HEADER, Kind, Packet
from runtime.plan_rates import Way
from runtime.reply import Reply
from runtime.task import open_task
from runtime.topics import Subtree, publish_bytes

log = logging.getLogger(__name__)

REMEMBERED = 64  # frames given back, so that their late answers still tell of the link

Context = TypeVar("Context")


@dataclass(frozen=True, slots=True)
class _Frame:
    """What it takes to send a frame, and to send it again."""

    tensor: Tensor
    born_ns: int
    camera: int
    origin: str | None
    variant: int
    way: Way
    alone: bool


@dataclass(slots=True)
class Sent(Generic[Context]):
    """Features that went up and have not been answered yet."""

    context: Context  # the caller's own
    deadline_ns: int  # time.monotonic_ns() at which the caller wants it back, answered or not
    frame: _Frame
    sequence: int = 0  # of its packet; of the second one when it had to be sent again
    sent_ns: int = 0
    encode_ms: float = 0.0
    bytes_up: int = 0  # all of MQTT; of both packets when the frame had to be sent again
    against: bool = False  # whether it is coded against an earlier frame

    @property
    def way(self) -> Way:
        """Its cut, codec and rate."""
        return self.frame.way


class Uplink(Generic[Context]):
    """Sends features of one bundle, and matches the answers.

    A codec that can do so codes a frame against the last one of its camera that the node has answered, unless
    `between_frames` is False. A node that lacks that one says so, and the frame goes up again at once, standing alone.

    Only one thread may send. `on_reply` is called on the link's thread, once at most for each Sent, with a Reply or
    with the sentence of a refusal. A Sent that `expire` or `drain` has returned is never answered any more; what comes
    for one that `expire` returned is given to `on_late`.
    """

    def __init__(
        self,
        link: Link,
        topics: Subtree,
        bundle: Bundle,
        *,
        codec: str,
        cut: int,
        max_in_flight: int,
        counters: Counters,
        on_reply: Callable[[Sent[Context], Reply | str], None],
        between_frames: bool = True,
        on_late: Callable[[Sent[Context], Reply | str], None] | None = None,
    ) -> None:
        self._encoder = Encoder(bundle, codec=codec, cut=cut, between_frames=between_frames)
        self.prepare = self._encoder.prepare
        self._way = self._encoder.way  # as it was made; the encoder's own may be one that had to be smaller
        self._fitting = Fitting(bundle, self._encoder, counters)
        self._on_late = on_late
        self._given_back: OrderedDict[int, Sent[Context]] = OrderedDict()  # by sequence; guarded by _lock
        self._link = link
        self._topics = topics
        self._bundle = bundle
        self._task = open_task(bundle)
        self._max_in_flight = max_in_flight
        self._counters = counters
        self._on_reply = on_reply
        self.session = secrets.randbits(32)
        self._warned = False
        self._lock = threading.Lock()
        self._waiting: dict[int, Sent[Context]] = {}  # by sequence; guarded by _lock
        link.subscribe(topics.replies, self._receive)

    def __len__(self) -> int:
        with self._lock:
            return len(self._waiting)

    @property
    def way(self) -> Way:
        """Cut, codec and rate of what is sent when nothing else is said."""
        return self._way

    @property
    def full(self) -> bool:
        """Whether as many frames wait for an answer as may."""
        return len(self) >= self._max_in_flight

    def send(
        self,
        features: Features,
        context: Context,
        *,
        born_ns: int,
        deadline_ns: int,
        camera: int = 0,
        origin: str | None = None,
        variant: int = 0,
        way: Way | None = None,
        alone: bool = False,
        before: Callable[[Sent[Context]], None] | None = None,
    ) -> Sent[Context] | str:
        """Encode and send features (1, …).

        Args:
            features: what to send.
            context: handed back with the answer.
            born_ns: when the frame was grabbed, on this machine's monotonic clock.
            deadline_ns: when the answer must be here.
            camera: index in the list of cameras of whoever has the camera.
            origin: who that is, when a node passes on what another has sent it.
            variant: of the first segment, that made the features.
            way: cut, codec and rate from now on, `prepare`d; None: as it was made.
            alone: whether `way` holds for this frame only, which stands alone.
            before: called with what goes up just before it does, as no answer may overtake that.

        Returns:
            What was sent, or the reason why it was not: `offline`, `busy`, `deadline`, `oversize` or `link`.
        """
        if not self._link.connected:
            return "offline"
        if self.full:
            return "busy"
        way = way or self._way
        sent = Sent(context, deadline_ns, _Frame(features.tensor, born_ns, camera, origin, variant, way, alone))
        problem = self._dispatch(sent, before=before)
        return sent if problem in ("", "gone") else problem

    def _dispatch(
        self,
        sent: Sent[Context],
        again: int | None = None,
        before: Callable[[Sent[Context]], None] | None = None,
    ) -> str:
        """Encode and publish a frame; `again` is the sequence number under which it waits until it has a new one.

        Returns:
            An empty string, or the reason why it did not go up; `gone` when the caller has had it back meanwhile.
        """
        frame = sent.frame
        start_ns = time.monotonic_ns()
        way, alone = frame.way, frame.alone or again is not None
        topic = self._topics.request(self._bundle.key8, way.cut)
        coded = self._fitting.encode(
            frame.tensor,
            camera=frame.camera,
            origin=frame.origin,
            alone=alone,
            way=way,
            most_bytes=self._most_bytes(topic),
        )
        if coded is None:
            return "oversize"
        if coded.way != way:
            way = coded.way
            sent.frame = replace(frame, way=way)
        now_ns = time.monotonic_ns()
        budget_ms = (sent.deadline_ns - now_ns) // 1_000_000
        if budget_ms <= 0:
            return "deadline"
        data = packet.pack(
            Packet(
                kind=Kind.FEATURES,
                bundle=self._bundle.key,
                session=self.session,
                sequence=coded.sequence,
                payload=coded.payload,
                codec=CODECS[way.codec],
                cut=way.cut,
                rate=way.rate,
                variant=frame.variant,
                camera=coded.camera,
                flags=coded.flags,
                reference=coded.reference,
                budget_ms=budget_ms,
                age_us=(now_ns - frame.born_ns) // 1000,
            )
        )
        # Its bookkeeping comes first, as no answer may overtake it, and without the lock, as the link may call
        # `_receive` from inside `publish`. The link then says the exact bytes, which differ by one in MQTT 3.1.1.
        expected_bytes = publish_bytes(topic, len(data))
        with self._lock:
            if again is not None and self._waiting.pop(again, None) is None:
                return "gone"
            sent.sequence = coded.sequence
            sent.sent_ns = sent.sent_ns or now_ns
            sent.encode_ms += (now_ns - start_ns) / 1e6
            sent.bytes_up += expected_bytes
            sent.against = coded.reference is not None
            self._waiting[coded.sequence] = sent
        if before is not None:
            before(sent)
        bytes_up = self._link.publish(topic, data, lane=Lane.FEATURES, expires_ns=sent.deadline_ns)
        sent.bytes_up += bytes_up - expected_bytes
        if bytes_up == 0:
            with self._lock:
                return "link" if self._waiting.pop(coded.sequence, None) is sent else "gone"
        against = "alone" if coded.reference is None else "against"
        self._counters.add("offload_requests_total", cut=way.cut, codec=way.codec, reference=against)
        self._counters.add("offload_bytes_total", bytes_up)
        if coded.reference is not None:
            self._counters.add("offload_against_bytes_total", bytes_up)
        return ""

    def _most_bytes(self, topic: str) -> int:
        """That a payload may have, so that the broker takes the message."""
        most = self._link.max_packet_bytes
        if most is None:
            return packet.MAX_PAYLOAD_BYTES
        return min(packet.MAX_PAYLOAD_BYTES, 2 * most - publish_bytes(topic, most, alias=True) - HEADER.size)

    def expire(self, now_ns: int) -> list[Sent[Context]]:
        """Take back what has passed its deadline."""
        with self._lock:
            late = [sequence for sequence, sent in self._waiting.items() if sent.deadline_ns <= now_ns]
            for sequence in late:
                if self._on_late is not None:
                    self._given_back[sequence] = self._waiting[sequence]
            while len(self._given_back) > REMEMBERED:
                self._given_back.popitem(last=False)
            return [self._waiting.pop(sequence) for sequence in late]

    def drain(self) -> list[Sent[Context]]:
        """Take back everything."""
        with self._lock:
            rest = list(self._waiting.values())
            self._waiting.clear()
            return rest

    def patience_s(self, most_s: float) -> float:
        """Seconds until the next deadline, `most_s` at the most."""
        with self._lock:
            first_ns = min((sent.deadline_ns for sent in self._waiting.values()), default=None)
        if first_ns is None:
            return most_s
        return min(most_s, max(0.0, (first_ns - time.monotonic_ns()) / 1e9))

    def _receive(self, topic: str, data: bytes) -> None:
        try:
            message = packet.unpack(data)
            if message.session != self.session or message.bundle != self._bundle.key:
                self._counters.add("replies_ignored_total", reason="not ours")
                return
            said = self._read(message)
        except PacketError as error:
            self._counters.add("packets_refused_total", reason="damaged")
            log.warning("refused a reply: %s", error)
            return
        if message.kind is Kind.RESULT:
            self._encoder.acknowledge(message.sequence)
        elif message.flags & packet.REFERENCE_MISSING:
            self._missed(message.sequence)
            if self._sent_again(message.sequence):
                return
        with self._lock:
            sent = self._waiting.pop(message.sequence, None)
            given_back = self._given_back.pop(message.sequence, None)
        if sent is None:
            self._counters.add("replies_ignored_total", reason="late")
            if given_back is not None and self._on_late is not None:
                self._on_late(given_back, said)
            return
        self._on_reply(sent, said)

    def _missed(self, sequence: int) -> None:
        self._counters.add("references_missed_total")
        pause = self._encoder.miss(sequence)
        if pause and not self._warned:
            self._warned = True
            log.warning(
                "the node above lacks again and again what frames are coded against, as one of a pool does or one "
                "short of max_reference_bytes; the next %d frames of this camera stand alone",
                pause,
            )

    def _sent_again(self, sequence: int) -> bool:
        """Send a frame that waits as `sequence` once more, standing alone. Returns whether it needs no answer now."""
        with self._lock:
            sent = self._waiting.get(sequence)
        if sent is None or not sent.against:
            return False
        problem = self._dispatch(sent, again=sequence)
        if problem == "link":
            with self._lock:
                self._waiting[sequence] = sent
        return problem in ("", "gone")

    def _read(self, message: Packet) -> Reply | str:
        if message.kind is Kind.REFUSAL:
            return message.payload[:200].decode("utf-8", "replace")
        if message.kind is not Kind.RESULT:
            raise PacketError(f"a packet of kind {message.kind.name} is no reply")
        said = reply.decode(message.payload)
        self._task.decode(said.answer)
        return said
