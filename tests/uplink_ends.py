"""A device's uplink without a device, and somebody who listens to what it sends."""

from __future__ import annotations

import threading
import time
import uuid
from typing import Any

import msgspec

from runtime import packet, topics
from runtime.coding import Decoder, ReferenceMissingError
from runtime.config import BrokerConfig
from runtime.counters import Counters
from runtime.datatypes import Features, Tensor
from runtime.link import Link, open_link
from runtime.manifest import Bundle
from runtime.packet import Packet
from runtime.reply import Reply
from runtime.topics import Subtree
from runtime.uplink import Sent, Uplink
from tests.patience import until
from tests.transform_bundle import CODEC

CAM = Subtree("home", "d", "cam")


class Sender:
    """A device's uplink, and what came of its frames."""

    def __init__(self, broker: BrokerConfig, bundle: Bundle, **settings: Any) -> None:
        self.counters = Counters()
        self.link: Link = open_link(broker, client_id="cam", counters=self.counters)
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
