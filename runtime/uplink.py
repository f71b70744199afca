"""The sender's side of a link: features go up as packets, answers come back, and nothing waits for ever.

A device and an edge node offload in the same way; only what they do with the answer differs.
"""

from __future__ import annotations

import logging
import secrets
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

from runtime import packet, reply
from runtime.codec import CODECS, Codecs, find_rate
from runtime.counters import Counters
from runtime.datatypes import Features
from runtime.errors import PacketError
from runtime.link import Link
from runtime.manifest import Bundle
from runtime.packet import Kind, Packet
from runtime.reply import Reply
from runtime.topics import Subtree, publish_bytes

log = logging.getLogger(__name__)

Context = TypeVar("Context")


@dataclass(slots=True)
class Sent(Generic[Context]):
    """Features that went up and have not been answered yet."""

    context: Context  # the caller's own
    deadline_ns: int  # time.monotonic_ns() at which the caller wants it back, answered or not
    sent_ns: int
    encode_ms: float
    bytes_up: int = 0  # all of MQTT


class Uplink(Generic[Context]):
    """Sends features of one bundle at one cut with one codec, and matches the answers.

    Only one thread may send. `on_reply` is called on the link's thread, once at most for each Sent, with a Reply or
    with the sentence of a refusal. A Sent that `expire` or `drain` has returned is never answered any more.
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
    ) -> None:
        self.codec, self._rate = find_rate(bundle, cut, codec)
        self.cut = cut
        self._codec = Codecs(bundle).get(cut, CODECS[self.codec], self._rate)
        self._link = link
        self._topics = topics
        self._bundle = bundle
        self._max_in_flight = max_in_flight
        self._counters = counters
        self._on_reply = on_reply
        self.session = secrets.randbits(32)
        self._sequence = 0
        self._lock = threading.Lock()
        self._waiting: dict[int, Sent[Context]] = {}  # by sequence; guarded by _lock
        link.subscribe(topics.replies, self._receive)

    def __len__(self) -> int:
        with self._lock:
            return len(self._waiting)

    @property
    def full(self) -> bool:
        """Whether as many frames wait for an answer as may."""
        return len(self) >= self._max_in_flight

    def send(
        self, features: Features, context: Context, *, born_ns: int, deadline_ns: int, camera: int = 0
    ) -> Sent[Context] | str:
        """Encode and send features (1, …) at this uplink's cut.

        Args:
            features: what to send.
            context: handed back with the answer.
            born_ns: when the frame was grabbed, on this machine's monotonic clock.
            deadline_ns: when the answer must be here.
            camera: index in the sender's list of cameras.

        Returns:
            What was sent, or the reason why it was not: `offline`, `busy`, `deadline`, `oversize` or `link`.
        """
        if not self._link.connected:
            return "offline"
        if self.full:
            return "busy"
        start_ns = time.monotonic_ns()
        payload = self._codec.encode(features.tensor)
        if len(payload) > packet.MAX_PAYLOAD_BYTES:
            return "oversize"
        now_ns = time.monotonic_ns()
        budget_ms = (deadline_ns - now_ns) // 1_000_000
        if budget_ms <= 0:
            return "deadline"
        with self._lock:
            sequence, self._sequence = self._sequence, (self._sequence + 1) % packet.NONE
        data = packet.pack(
            Packet(
                kind=Kind.FEATURES,
                bundle=self._bundle.key,
                session=self.session,
                sequence=sequence,
                payload=payload,
                codec=CODECS[self.codec],
                cut=self.cut,
                rate=self._rate,
                camera=camera,
                budget_ms=budget_ms,
                age_us=(now_ns - born_ns) // 1000,
            )
        )
        topic = self._topics.request(self._bundle.key8, self.cut)
        # Its bookkeeping comes first, as no answer may overtake it, and without the lock, as the link may call
        # `_receive` from inside `publish`. The link then says the exact bytes, which differ by one in MQTT 3.1.1.
        sent = Sent(context, deadline_ns, now_ns, (now_ns - start_ns) / 1e6, publish_bytes(topic, len(data)))
        with self._lock:
            self._waiting[sequence] = sent
        bytes_up = self._link.publish(topic, data)
        if bytes_up == 0:
            with self._lock:
                self._waiting.pop(sequence, None)
            return "link"
        sent.bytes_up = bytes_up
        self._counters.add("offload_requests_total", cut=self.cut, codec=self.codec)
        self._counters.add("offload_bytes_total", sent.bytes_up)
        return sent

    def expire(self, now_ns: int) -> list[Sent[Context]]:
        """Take back what has passed its deadline."""
        with self._lock:
            late = [sequence for sequence, sent in self._waiting.items() if sent.deadline_ns <= now_ns]
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
        with self._lock:
            sent = self._waiting.pop(message.sequence, None)
        if sent is None:
            self._counters.add("replies_ignored_total", reason="late")
            return
        self._on_reply(sent, said)

    def _read(self, message: Packet) -> Reply | str:
        if message.kind is Kind.REFUSAL:
            return message.payload[:200].decode("utf-8", "replace")
        if message.kind is not Kind.RESULT:
            raise PacketError(f"a packet of kind {message.kind.name} is no reply")
        said = reply.decode(message.payload)
        if any(index >= len(self._bundle.labels) for index, _ in said.topk):
            raise PacketError("the reply names a label that the bundle does not have")
        return said
