"""Requests on their way through a node: what is asked, whether this node can do it, and whether it is still worth it.

A request that could only be answered late is not decoded, not run and not sent further up; the reasons are `LATE_…`.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, field

from runtime import cascade, packet
from runtime.datatypes import Features
from runtime.errors import PacketError
from runtime.manifest import Bundle
from runtime.packet import Kind, Packet
from runtime.topics import Subtree
from runtime.variant import known
from runtime.workload import Window

NO_BUDGET_MS = 10_000  # what a request without a budget is given
SURE = 0.25  # quantile of what work has taken: what is in vain by this is in vain but for luck
FRESH_MS = 2000.0  # what was seen longer ago is tried again
LATE_QUEUED, LATE_DECODED, LATE_RUN, LATE_ANSWER = "late in queue", "late decoded", "late run", "late answer"
REPLACED = "newer frame"  # of the same camera came while this one waited, and this one would have been late


@dataclass(frozen=True, slots=True)
class Request:
    """Features that a client wants an answer for."""

    client: Subtree
    packet: Packet
    arrived_ns: int
    deadline_ns: int
    timings: dict[str, float] = field(default_factory=dict)

    def same_camera(self, other: Request) -> bool:
        """Whether both are frames of one camera."""
        return (self.client, self.packet.session, self.packet.camera) == (
            other.client,
            other.packet.session,
            other.packet.camera,
        )


@dataclass(frozen=True, slots=True)
class Escalated:
    """A request that goes further up, and what this tier would say itself."""

    request: Request
    outcome: cascade.Outcome
    features: Features


def read(client: Subtree, data: bytes, arrived_ns: int) -> Request:
    """Read a request.

    Raises:
        PacketError: it is none.
    """
    message = packet.unpack(data)
    if message.kind is not Kind.FEATURES:
        raise PacketError(f"a packet of kind {message.kind.name} is no request")
    if message.flags & ~packet.KEEP:
        raise PacketError("the packet uses what this version does not know yet; update Kinflow on this node")
    budget_ms = NO_BUDGET_MS if message.budget_ms is None else message.budget_ms
    return Request(client, message, arrived_ns, arrived_ns + budget_ms * 1_000_000)


def unfit(message: Packet, bundle: Bundle, *, last: int) -> tuple[str, str] | None:
    """Why a node whose segments end at `last` cannot do what a packet asks: a word and a sentence; None: it can."""
    if message.bundle != bundle.key:
        return "bundle", f"this node holds bundle {bundle.key8}; install the same on every tier"
    if message.cut > last:
        return "cut", f"this node's segments end at {last}, cut {message.cut} is past it"
    variants = len(bundle.manifest.segments[0].variants)
    if message.variant > variants or (message.variant and message.cut == 0):
        return "variant", f"variant {message.variant}: this bundle has {known(bundle)}"
    return None


class Pace:
    """How long this node and those above it take, as far as known, and so what would be in vain. For any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._stages: dict[str, Window] = {}

    def took(self, stage: str, ms: float, now_ns: int) -> None:
        """A stage took so long: `cutK`, from decoding to the end of running features of cut K, or `above`."""
        with self._lock:
            self._stages.setdefault(stage, Window()).add(ms, now_ns)

    def in_vain(self, stage: str, deadline_ns: int, now_ns: int) -> bool:
        """Whether what begins this stage now would end after its deadline."""
        with self._lock:
            window = self._stages.get(stage)
            fresh = window is not None and window.age_ms(now_ns) <= FRESH_MS
            ms = window.quantile(SURE) if window is not None and fresh else None
        return now_ns + (ms or 0.0) * 1e6 >= deadline_ns
