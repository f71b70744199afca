"""What a link does to the bytes of one TCP connection in one direction. Pure: times are given, never asked for.

TCP loses no byte: a lost segment is sent again, and what came behind it waits for it. So loss is a stall here, of a
whole retransmission time-out (RFC 6298, with the least of 200 ms that Linux has), doubled each time the same segment is
lost again. That is harsh on a lone loss amid a stream, which TCP mends within a round trip, and right for the last
segment of a message, behind which nothing comes. What is not modelled: the congestion window, which would keep a lossy
link below its rate, and lost acknowledgements, which later ones make good.

While nothing passes, TCP tries again more and more rarely; so a connection that outlives an outage goes on only at its
next try, which may be as long after the outage as the outage was.
"""

from __future__ import annotations

import math
import random
from collections import deque

from runtime.scenario import Way

SEGMENT_BYTES = 1448  # of data in an Ethernet frame, behind the headers of IP and TCP with time stamps
HEADER_BYTES = 52
QUEUE_BYTES = 64 * 1024  # what waits in front of a slow link, before the sender has to
MAX_FLIGHT_BYTES = 4 * 1024 * 1024
BURST_S = 0.005
RTO_MIN_S, RTO_MAX_S = 0.2, 120.0
RTO_FIRST_S = 1.0  # before any round trip has been measured


def rto_s(rtt_s: float) -> float:
    """How long TCP waits for an acknowledgement before it sends again, first time, with a steady round trip."""
    return rtt_s + RTO_MIN_S


def next_try_s(first_s: float, now_s: float, rto_s: float) -> float:
    """When a segment that was first sent at `first_s`, and again and again in vain, is sent next, from `now_s` on."""
    at_s, wait_s = first_s, rto_s
    while at_s < now_s:
        at_s += wait_s
        wait_s = min(2 * wait_s, RTO_MAX_S)
    return at_s


class TokenBucket:
    """Lets bytes pass at a rate, no more than a few milliseconds' worth (or one segment) at once."""

    def __init__(self) -> None:
        self._tokens = 0.0
        self._at_s: float | None = None

    def take(self, now_s: float, rate: float, size: int) -> bool:
        """Whether `size` bytes may pass now; if so they are booked. The rate has held since the last call."""
        if math.isinf(rate):
            self._tokens, self._at_s = 0.0, now_s
            return True
        self._fill(now_s, rate)
        if self._tokens < size:
            return False
        self._tokens -= size
        return True

    def wait_s(self, rate: float, size: int) -> float:
        """How long after the last call `size` bytes may pass; infinite at a rate of 0."""
        missing = size - self._tokens
        if missing <= 0 or math.isinf(rate):
            return 0.0
        return missing / rate if rate > 0 else math.inf

    @staticmethod
    def burst_bytes(rate: float) -> float:
        """How much may pass at once after a while without traffic."""
        return max(SEGMENT_BYTES + HEADER_BYTES, rate * BURST_S)

    def _fill(self, now_s: float, rate: float) -> None:
        since_s = 0.0 if self._at_s is None else max(0.0, now_s - self._at_s)
        self._tokens = min(self._tokens + rate * since_s, self.burst_bytes(rate))
        self._at_s = now_s


class DelayLine:
    """Holds segments until they arrive, in the order in which they came."""

    def __init__(self, seed: int) -> None:
        self._luck = random.Random(seed)
        self._line: deque[tuple[float, bytes]] = deque()
        self._last_s = -math.inf
        self.held_bytes = 0
        self.losses = 0

    def __len__(self) -> int:
        return len(self._line)

    def push(self, now_s: float, segment: bytes, way: Way, rtt_s: float) -> None:
        """Send a segment off; an empty one is the end of the stream."""
        stall_s, wait_s = 0.0, rto_s(rtt_s)
        while self._luck.random() < way.loss:
            self.losses += 1
            stall_s += wait_s
            wait_s = min(2 * wait_s, RTO_MAX_S)
        arrives_s = now_s + way.delay_s + self._luck.uniform(0, way.jitter_s) + stall_s
        self._last_s = max(self._last_s, arrives_s)
        self._line.append((self._last_s, segment))
        self.held_bytes += len(segment)

    @property
    def next_s(self) -> float:
        """When the first segment arrives; infinite when there is none."""
        return self._line[0][0] if self._line else math.inf

    def head(self, now_s: float) -> bytes | None:
        """The first segment, if it has arrived by now."""
        return self._line[0][1] if self._line and self._line[0][0] <= now_s else None

    def took(self, count: int) -> None:
        """Take the first `count` bytes of the head away, and the head with its last byte."""
        at_s, segment = self._line.popleft()
        self.held_bytes -= count
        if count < len(segment):
            self._line.appendleft((at_s, segment[count:]))


class Lane:
    """One direction of one connection: a queue before the link, and what is on its way.

    The bucket is the link's, and shared by its connections. A `fresh` lane is that of who opened the connection: its
    first segment waits a round trip more, for the handshake.
    """

    def __init__(self, bucket: TokenBucket, seed: int, *, fresh: bool = False) -> None:
        self._fresh = fresh
        self._bucket = bucket
        self._queue: deque[bytes] = deque()
        self._queued_bytes = 0
        self._stuck_s: float | None = None  # since when its segments are sent in vain
        self._resume_s: float | None = None  # when the next is sent, once the link is back
        self.line = DelayLine(seed)

    @property
    def idle(self) -> bool:
        """Whether nothing is queued or on its way."""
        return not self._queue and not len(self.line)

    def room(self, way: Way, rtt_s: float) -> int:
        """How many more bytes are taken from the sender now: what the queue holds, and a round trip of the link."""
        flight = MAX_FLIGHT_BYTES if math.isinf(way.rate) else min(way.rate * rtt_s, MAX_FLIGHT_BYTES)
        return max(0, QUEUE_BYTES + int(flight) - self._queued_bytes - self.line.held_bytes)

    def put(self, data: bytes) -> None:
        """Queue what the sender gave; nothing means that it has ended its stream."""
        for start in range(0, max(1, len(data)), SEGMENT_BYTES):
            self._queue.append(data[start : start + SEGMENT_BYTES])
        self._queued_bytes += len(data)

    def drop(self) -> None:
        """Forget everything: there is nobody any more to whom it could be delivered."""
        self._queue.clear()
        self._queued_bytes = 0
        while len(self.line):
            self.line.took(len(self.line.head(math.inf) or b""))

    def pump(self, now_s: float, way: Way, rtt_s: float) -> float:
        """Send off what the rate allows; returns when to come again, infinite if only for another reason."""
        if not self._queue:
            return math.inf
        if way.rate <= 0:
            self._resume_s = None
            if self._stuck_s is None:
                self._stuck_s = now_s
            return math.inf
        if self._stuck_s is not None:
            if self._resume_s is None:
                self._resume_s = next_try_s(self._stuck_s, now_s, RTO_FIRST_S if self._fresh else rto_s(rtt_s))
            if now_s < self._resume_s:
                return self._resume_s
            self._stuck_s = self._resume_s = None
        while self._queue:
            size = len(self._queue[0]) + HEADER_BYTES
            if not self._bucket.take(now_s, way.rate, size):
                return now_s + self._bucket.wait_s(way.rate, size)
            segment = self._queue.popleft()
            self._queued_bytes -= len(segment)
            self.line.push(now_s + (rtt_s if self._fresh else 0.0), segment, way, rtt_s)
            self._fresh = False
        return math.inf
