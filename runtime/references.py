"""Which earlier frame a frame may be coded against, on both sides of a link that loses, repeats and forgets. Pure.

A reference is the levels of an earlier frame of the same stream: the same sender and session, camera, cut, codec and
rate. The sender uses none but what a reply has told it to be decoded, and the header names it by its sequence number,
so a receiver has exactly that frame's levels or knows that it has not (docs/wire.md, "Between frames").

Both sides keep the same number of frames, WINDOW, by the same rule. Where packets keep their order, as on one topic of
one broker, a receiver that was neither restarted nor short of memory therefore never lacks what a frame names.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Generic, TypeVar

import numpy as np

from runtime.levels import Levels

WINDOW = 32  # frames of a stream that may be on their way before the first of them can be a reference no more
MAX_AGE = 1 << 16  # packets of a sender after which it uses a reference no more; far below where sequences repeat
MAX_STREAMS = 4096
SENDER_BYTES = 32 * 1024 * 1024
RECEIVER_BYTES = 64 * 1024 * 1024
FRAME_BYTES = 256  # what keeping a frame takes beside its levels, so that the bounds hold for tiny ones as well
# A receiver that lacks references again and again (a pool of nodes, too many cameras) is sent frames that stand alone.
PROVEN = 64  # frames coded against another and answered, after which a miss is the first one again
PAUSE_FRAMES = 16  # that stand alone after the second miss; twice as many after each further one
MAX_PAUSE_FRAMES = 4096

Stream = TypeVar("Stream", bound=Hashable)


@dataclass(frozen=True, slots=True)
class Reference:
    """An earlier frame that both sides hold."""

    sequence: int
    levels: Levels


@dataclass(frozen=True, slots=True)
class _Flying:
    """A frame that went up and of which no reply has come."""

    levels: Levels
    against: bool


@dataclass(slots=True)
class _Sending:
    """What a sender knows of one stream."""

    flying: OrderedDict[int, _Flying] = field(default_factory=OrderedDict)  # by sequence, in the order of sending
    reference: Reference | None = None  # the last one that a reply has proved to be decoded
    proven: int = 0  # frames coded against another and answered since the last miss
    misses: int = 0  # in a row, without PROVEN such frames between them
    pause: int = 0  # frames still to be sent standing alone


class SentReferences(Generic[Stream]):
    """The sender's side: levels of frames on their way, and the last frame of each stream that was decoded for sure.

    Bounded by WINDOW frames a stream and `max_bytes` and `max_streams` over all; streams not used for longest go first.
    """

    def __init__(self, *, max_bytes: int = SENDER_BYTES, max_streams: int = MAX_STREAMS) -> None:
        self._max_bytes = max_bytes
        self._max_streams = max_streams
        self._streams: OrderedDict[Stream, _Sending] = OrderedDict()  # least recently used first
        self._stream_of: dict[int, Stream] = {}  # sequence → stream, of every frame on its way
        self.size_bytes = 0

    def __len__(self) -> int:
        """Frames kept."""
        return len(self._stream_of) + sum(state.reference is not None for state in self._streams.values())

    def pausing(self, stream: Stream) -> bool:
        """Whether the next frame stands alone because references were missed; counts that frame."""
        state = self._streams.get(stream)
        if state is None or state.pause == 0:
            return False
        state.pause -= 1
        return True

    def newest(self, stream: Stream, sequence: int) -> Reference | None:
        """What the frame that goes up as `sequence` may be coded against."""
        state = self._streams.get(stream)
        if state is None or state.reference is None:
            return None
        age = (sequence - state.reference.sequence) % (1 << 32)
        return state.reference if age <= MAX_AGE else None

    def sent(self, stream: Stream, sequence: int, levels: Levels, reference: Reference | None) -> None:
        """Keep the levels of a frame that goes up; its sequence number is its own until they come round."""
        long_ago = self._stream_of.get(sequence)
        if long_ago is not None:
            self._land(self._streams[long_ago], sequence)
        state = self._streams.setdefault(stream, _Sending())
        self._streams.move_to_end(stream)
        state.flying[sequence] = _Flying(own(levels), reference is not None)
        self._stream_of[sequence] = stream
        self.size_bytes += cost(levels)
        while len(state.flying) > WINDOW:
            self._land(state, next(iter(state.flying)))
        while self.size_bytes > self._max_bytes or len(self._streams) > self._max_streams:
            oldest = next(iter(self._streams))
            if oldest != stream:
                self.forget(oldest)
            elif state.reference is not None:
                self._drop_reference(state)
            else:
                self._land(state, next(iter(state.flying)))

    def acknowledge(self, sequence: int) -> None:
        """A reply says that the frame sent as `sequence` was decoded; late ones and repeats do no harm.

        Frames sent before it are references no more: what may be used only ever moves forward.
        """
        stream = self._stream_of.get(sequence)
        if stream is None:
            return
        state = self._streams[stream]
        said = state.flying[sequence]
        for earlier in list(state.flying):
            self._land(state, earlier)
            if earlier == sequence:
                break
        self._drop_reference(state)
        state.reference = Reference(sequence, said.levels)
        self.size_bytes += cost(said.levels)
        state.proven += said.against
        if state.proven >= PROVEN:
            state.misses = 0

    def miss(self, sequence: int) -> int:
        """A refusal says that the receiver lacks what the frame sent as `sequence` was coded against.

        All of its stream is forgotten, so that what went up before this word came is no news when it is refused too.

        Returns:
            Frames that will stand alone before references are tried again; 0 at a first miss.
        """
        stream = self._stream_of.get(sequence)
        if stream is None:
            return 0
        state = self._streams[stream]
        self._clear(state)
        state.misses += 1
        state.proven = 0
        if state.misses > 1:
            state.pause = min(PAUSE_FRAMES << (state.misses - 2), MAX_PAUSE_FRAMES)
        return state.pause

    def forget(self, stream: Stream) -> None:
        """Forget all of a stream, as when its name is given to another camera."""
        state = self._streams.pop(stream, None)
        if state is not None:
            self._clear(state)

    def _clear(self, state: _Sending) -> None:
        for sequence in list(state.flying):
            self._land(state, sequence)
        self._drop_reference(state)

    def _land(self, state: _Sending, sequence: int) -> None:
        self.size_bytes -= cost(state.flying.pop(sequence).levels)
        del self._stream_of[sequence]

    def _drop_reference(self, state: _Sending) -> None:
        if state.reference is not None:
            self.size_bytes -= cost(state.reference.levels)
            state.reference = None


@dataclass(frozen=True, slots=True)
class Source:
    """Where a frame comes from and how it is coded: levels compare only within one of these."""

    client: str
    session: int
    camera: int
    cut: int
    codec: int
    rate: int


@dataclass(slots=True)
class _Receiving:
    """What a receiver holds of one stream."""

    frames: OrderedDict[int, Levels] = field(default_factory=OrderedDict)  # by sequence, in the order of decoding
    used: int | None = None  # the frame that was last used as a reference


class HeldReferences:
    """The receiver's side: of each stream the WINDOW frames decoded last, and the one last used as a reference.

    A frame that is used as a reference sets free all that were decoded before it: the sender only moves forward.
    A client's new session sets free its old one. Bounded by `max_bytes` and `max_streams` over all clients; streams not
    used for longest go first, so nobody can make a node grow.
    """

    def __init__(self, *, max_bytes: int = RECEIVER_BYTES, max_streams: int = MAX_STREAMS) -> None:
        self._max_bytes = max_bytes
        self._max_streams = max_streams
        self._streams: OrderedDict[Source, _Receiving] = OrderedDict()  # least recently used first
        self._sources: dict[str, set[Source]] = {}  # by client; all of one session
        self.size_bytes = 0

    def __len__(self) -> int:
        """Frames held."""
        return sum(len(state.frames) for state in self._streams.values())

    def find(self, source: Source, sequence: int) -> Levels | None:
        """The levels of exactly that frame, or None."""
        state = self._streams.get(source)
        return None if state is None else state.frames.get(sequence)

    def used(self, source: Source, sequence: int) -> None:
        """A frame of `source` was decoded against the one of this sequence number, which `find` has given."""
        state = self._streams[source]
        self._streams.move_to_end(source)
        state.used = sequence
        while (first := next(iter(state.frames))) != sequence:
            self._drop(state, first)

    def keep(self, source: Source, sequence: int, levels: Levels) -> None:
        """Hold a decoded frame that later ones may be coded against."""
        state = self._streams.get(source)
        if state is None:
            for old in [old for old in self._sources.get(source.client, ()) if old.session != source.session]:
                self._remove(old)
            state = self._streams[source] = _Receiving()
            self._sources.setdefault(source.client, set()).add(source)
        self._streams.move_to_end(source)
        self.size_bytes += cost(levels) - (cost(state.frames[sequence]) if sequence in state.frames else 0)
        state.frames[sequence] = own(levels)  # a repeat keeps its place in the order
        places = iter(list(state.frames))
        while len(state.frames) > WINDOW + (state.used in state.frames):
            if (oldest := next(places)) != state.used:
                self._drop(state, oldest)
        while self.size_bytes > self._max_bytes or len(self._streams) > self._max_streams:
            oldest_stream = next(iter(self._streams))
            if oldest_stream != source:
                self._remove(oldest_stream)
            else:
                self._drop(state, next(iter(state.frames)))

    def _drop(self, state: _Receiving, sequence: int) -> None:
        self.size_bytes -= cost(state.frames.pop(sequence))

    def _remove(self, source: Source) -> None:
        self.size_bytes -= sum(cost(levels) for levels in self._streams.pop(source).frames.values())
        same_client = self._sources[source.client]
        same_client.discard(source)
        if not same_client:
            del self._sources[source.client]


class StreamNumbers:
    """Gives every (origin, camera) of those a node passes on a number that fits the header, 0 to 255.

    When more are in use than there are numbers, the one not used for longest loses its own.
    """

    COUNT = 256

    def __init__(self) -> None:
        self._numbers: OrderedDict[tuple[str, int], int] = OrderedDict()

    def number(self, origin: str, camera: int) -> tuple[int, bool]:
        """The number, and whether it was just taken away from another."""
        known = self._numbers.get((origin, camera))
        if known is not None:
            self._numbers.move_to_end((origin, camera))
            return known, False
        taken = len(self._numbers) == self.COUNT
        number = self._numbers.popitem(last=False)[1] if taken else len(self._numbers)
        self._numbers[origin, camera] = number
        return number, taken


def own(levels: Levels) -> Levels:
    """A copy that nobody can change, and that keeps no larger array alive."""
    kept = np.array(levels, np.int16)
    kept.setflags(write=False)
    return kept


def cost(levels: Levels) -> int:
    """What keeping a frame takes, in bytes."""
    return levels.size * 2 + FRAME_BYTES
