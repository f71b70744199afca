"""A TCP proxy that makes the loopback a bad link, by a scenario: rate, delay, jitter, loss, outages, cuts.

It stands between a simulated device and its broker. One thread, in which sockets never block; what it holds is bounded
for each connection and in their number, and a sender that is too fast has to wait, as before a real link.
"""

from __future__ import annotations

import contextlib
import logging
import math
import selectors
import socket
import struct
import threading
import time
from collections.abc import Callable

from runtime.lane import SEGMENT_BYTES, Lane, TokenBucket
from runtime.scenario import Phase, Scenario, Way

log = logging.getLogger(__name__)

MAX_CONNECTIONS = 16  # more: the oldest is reset; a client that reconnects leaves some half-open behind an outage
RECEIVE_BYTES = 32 * 1024
MAX_WAIT_S = 0.25
CONNECT_S = 1.0
RESET = struct.pack("ii", 1, 0)  # SO_LINGER of 0: close() resets
SHUT = Way(rate=0.0)


class _End:
    """One side of a connection: what comes from its socket goes through its lane to the other side."""

    def __init__(self, sock: socket.socket, lane: Lane) -> None:
        self.sock = sock
        self.lane = lane
        self.ended = False  # its stream: nothing more is read
        self.finished = False  # and its end has been delivered
        self.blocked = False  # what it is to be given waits for its socket


class _Pair:
    """A connection of a client through the link to the broker."""

    def __init__(self, client: _End, broker: _End) -> None:
        self.client = client
        self.broker = broker
        self.connected = False  # to the broker; only what has passed the link can connect there
        self.ways = ((client, broker, 0), (broker, client, 1))


class Shaper:
    """A port on the loopback whose connections reach `target` through the link of a scenario.

    The scenario's clock stands at 0 until `begin`. All methods belong to any thread; a context starts and joins it.
    """

    def __init__(self, target: tuple[str, int], scenario: Scenario) -> None:
        self._target = target
        self._scenario = scenario
        self._start_s: float | None = None
        self._buckets = (TokenBucket(), TokenBucket())
        self._pairs: list[_Pair] = []
        self._accepted = 0
        self._refusing = False  # because the broker is down, whatever the scenario says
        self._bytes = [[0, 0] for _ in scenario.phases]
        self._cut: Callable[[], None] | None = None  # what to do when half a packet has passed
        self._resetting = threading.Event()
        self._closing = threading.Event()
        # Keeps the port while nobody listens: a connection is then refused, as by a machine without the service.
        self._holder = _bound(("127.0.0.1", 0))
        self.address: tuple[str, int] = self._holder.getsockname()
        self._listener: socket.socket | None = None
        self._selector = selectors.DefaultSelector()
        self._waker, self._woken = socket.socketpair()
        for end in (self._waker, self._woken):
            end.setblocking(False)
        self._selector.register(self._woken, selectors.EVENT_READ)
        self._thread = threading.Thread(target=self._run, name="kinflow-shaper", daemon=True)

    def __enter__(self) -> Shaper:
        self._listen(True)
        self._thread.start()
        return self

    def __exit__(self, *failure: object) -> None:
        self._closing.set()
        self._wake()
        self._thread.join()
        for pair in list(self._pairs):
            self._drop(pair)
        self._listen(False)
        self._selector.close()
        for end in (self._waker, self._woken, self._holder):
            end.close()

    def begin(self, start_s: float) -> None:
        """Start the scenario's clock, as of `start_s` of time.monotonic()."""
        self._start_s = start_s
        self._wake()

    def refuse(self, refusing: bool) -> None:
        """Refuse connections from now on, or no more: the broker is down, or up again. Those there are stay."""
        self._refusing = refusing
        self._wake()

    def reset(self) -> None:
        """Reset every connection."""
        self._resetting.set()
        self._wake()

    def cut(self, then: Callable[[], None] | None) -> None:
        """Let half of the next segment from a device pass, call `then` on the shaper's thread, and reset.

        None: no more, if it has not happened yet.
        """
        self._cut = then
        self._wake()

    def bytes_passed(self) -> list[tuple[int, int]]:
        """Bytes of TCP's streams that arrived in each phase so far, up and down."""
        return [(up, down) for up, down in self._bytes]

    def _wake(self) -> None:
        with contextlib.suppress(OSError):  # full, so it is awake; or closed, so it is over
            self._waker.send(b"x")

    def _run(self) -> None:
        while not self._closing.is_set():
            if self._resetting.is_set():
                self._resetting.clear()
                self._reset()
            try:
                wait_s = self._turn()
            except Exception:  # the link must not end because one connection did something nobody foresaw
                log.exception("the shaper failed; its connections are reset")
                self._reset()
                wait_s = 0.0
            for key, events in self._selector.select(min(wait_s, MAX_WAIT_S)):
                if key.fileobj is self._woken:
                    with contextlib.suppress(BlockingIOError):
                        self._woken.recv(4096)
                elif key.fileobj is self._listener:
                    self._accept()
                elif events:
                    key.data()

    def _turn(self) -> float:
        """Move what can be moved; returns seconds until something else can."""
        now_s = time.monotonic()
        at_s = 0.0 if self._start_s is None else now_s - self._start_s
        index = self._scenario.index(at_s)
        phase = self._scenario.phases[index]
        refusing = self._refusing or phase.outage == "refused"
        if refusing == (self._listener is not None):
            self._listen(not refusing)
            if phase.outage == "refused":
                self._reset()
        next_s = math.inf if self._start_s is None else self._start_s + self._scenario.next_change_s(at_s)
        for pair in list(self._pairs):
            try:
                next_s = min(next_s, self._move(pair, now_s, phase, index))
            except OSError:
                self._drop(pair)
        return max(0.0, next_s - time.monotonic())

    def _move(self, pair: _Pair, now_s: float, phase: Phase, index: int) -> float:
        if pair.client.ended and not pair.connected:
            # On a real link its connection would not stand yet, and nothing of it would ever arrive.
            self._drop(pair)
            return 0.0
        next_s = math.inf
        rtt_s = phase.up.delay_s + phase.up.jitter_s + phase.down.delay_s + phase.down.jitter_s
        for source, sink, direction in pair.ways:
            way = SHUT if phase.outage != "none" else phase.down if direction else phase.up
            lane = source.lane
            next_s = min(next_s, lane.pump(now_s, way, rtt_s))
            sink.blocked = False
            while (head := lane.line.head(now_s)) is not None:
                if not pair.connected:
                    pair.broker.sock.connect(self._target)
                    pair.broker.sock.setblocking(False)
                    pair.connected = True
                if direction == 0 and self._cut is not None and len(head) > 1:
                    return self._cut_in(pair, head)
                try:
                    self._bytes[index][direction] += _deliver(source, sink, head)
                except BlockingIOError:
                    sink.blocked = True
                    break
                except OSError:  # it is gone; what else comes for it is lost, and the sender hears of it the other way
                    lane.drop()
                    source.ended = source.finished = True
                    if not sink.ended:
                        sink.ended = True
                        sink.lane.put(b"")
            if not sink.blocked:
                next_s = min(next_s, lane.line.next_s)
        if all(end.finished for end in (pair.client, pair.broker)):
            self._drop(pair, reset=False)
        else:
            self._watch(pair, phase, rtt_s)
        return next_s

    def _cut_in(self, pair: _Pair, head: bytes) -> float:
        then, self._cut = self._cut, None
        with contextlib.suppress(OSError):
            pair.broker.sock.send(head[: len(head) // 2])
        if then is not None:
            then()
        self._drop(pair)
        return 0.0

    def _watch(self, pair: _Pair, phase: Phase, rtt_s: float) -> None:
        """Ask to be told of what each side can do next: be read while its lane has room, be written while blocked."""
        for source, _, direction in pair.ways:
            if direction and not pair.connected:
                continue
            room = source.lane.room(phase.down if direction else phase.up, rtt_s)
            events = selectors.EVENT_READ if room and not source.ended else 0
            events |= selectors.EVENT_WRITE if source.blocked else 0
            known = self._selector.get_map().get(source.sock)
            if known is not None and known.events == events:
                continue
            if known is not None:
                self._selector.unregister(source.sock)
            if events:
                self._selector.register(source.sock, events, self._reader(source))

    def _reader(self, end: _End) -> Callable[[], None]:
        def read() -> None:
            if end.ended:
                return
            try:
                data = end.sock.recv(16 * SEGMENT_BYTES)
            except BlockingIOError:
                return
            except OSError:
                data = b""
            end.ended = not data
            end.lane.put(data)

        return read

    def _accept(self) -> None:
        assert self._listener is not None
        try:
            client, _ = self._listener.accept()
        except OSError:  # it has gone again
            return
        broker = socket.socket()
        broker.settimeout(CONNECT_S)
        client.setblocking(False)
        self._accepted += 1
        ends = []
        for direction, sock in enumerate((client, broker)):
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            seed = (self._scenario.seed << 32) + 2 * self._accepted + direction
            ends.append(_End(sock, Lane(self._buckets[direction], seed, fresh=direction == 0)))
        self._pairs.append(_Pair(*ends))
        if len(self._pairs) > MAX_CONNECTIONS:
            self._drop(self._pairs[0])

    def _listen(self, on: bool) -> None:
        if self._listener is not None:
            self._selector.unregister(self._listener)
            self._listener.close()
            self._listener = None
        if on:
            self._listener = _bound(self.address)
            # As on a real link: on the loopback, whose packets have 64 KiB, a sender's kernel would hide megabytes.
            self._listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, RECEIVE_BYTES)
            with contextlib.suppress(OSError):
                self._listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG, SEGMENT_BYTES)
            self._listener.listen()
            self._listener.setblocking(False)
            self._selector.register(self._listener, selectors.EVENT_READ)

    def _reset(self) -> None:
        for pair in list(self._pairs):
            self._drop(pair)

    def _drop(self, pair: _Pair, *, reset: bool = True) -> None:
        self._pairs.remove(pair)
        for end in (pair.client, pair.broker):
            with contextlib.suppress(KeyError):
                self._selector.unregister(end.sock)
            if reset:
                _reset(end.sock)
            else:
                end.sock.close()


def _deliver(source: _End, sink: _End, segment: bytes) -> int:
    """Give the head of a lane to the other side; returns how much of it it took."""
    if segment:
        sent = sink.sock.send(segment)
    else:
        sink.sock.shutdown(socket.SHUT_WR)
        source.finished, sent = True, 0
    source.lane.line.took(sent)
    return sent


def _bound(address: tuple[str, int]) -> socket.socket:
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    sock.bind(address)
    return sock


def _reset(sock: socket.socket) -> None:
    with contextlib.suppress(OSError):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
    sock.close()
