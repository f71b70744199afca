"""Whatever a link does to packets, a receiver has exactly the sender's levels of a frame, or knows that it has not."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from runtime.levels import Levels
from runtime.references import (
    FRAME_BYTES,
    MAX_PAUSE_FRAMES,
    PAUSE_FRAMES,
    PROVEN,
    WINDOW,
    HeldReferences,
    SentReferences,
    Source,
    cost,
)

SIZE = 16  # levels a frame
ROOM = 3 * (WINDOW + 1) * (FRAME_BYTES + 2 * SIZE)  # for three whole streams, so that the machine's six press
Stream = tuple[int, int]  # camera, rate
streams = st.tuples(st.integers(0, 2), st.integers(0, 1))


@dataclass(frozen=True)
class Up:
    """A request: levels, or what to add to the reference's levels to get them."""

    session: int
    sequence: int
    stream: Stream
    reference: int | None
    keep: bool
    body: Levels

    @property
    def source(self) -> Source:
        return Source("cam", self.session, self.stream[0], 0, 3, self.stream[1])


@dataclass(frozen=True)
class Down:
    """A reply: the frame was decoded, or its reference was missing."""

    session: int
    sequence: int
    decoded: bool


class World:
    """A sender and a receiver that speak as runtime.coding makes them, with a codec that only subtracts."""

    def __init__(self, room_bytes: int = ROOM) -> None:
        self.room_bytes = room_bytes
        self.chance = np.random.default_rng(0)
        self.truth: dict[tuple[int, int], Levels] = {}
        self.session = 0
        self.missed = 0
        self.decoded: list[Up] = []
        self.restart_sender()
        self.restart_receiver()

    def restart_sender(self) -> None:
        self.session += 1
        self.sequence = 0
        self.sent: SentReferences[Stream] = SentReferences(max_bytes=self.room_bytes)
        self.waiting: dict[int, Up] = {}

    def restart_receiver(self) -> None:
        self.held = HeldReferences(max_bytes=self.room_bytes)

    def send(self, stream: Stream, *, alone: bool = False) -> Up:
        levels = self.chance.integers(-(2**15), 2**15, SIZE).astype(np.int16)
        sequence, self.sequence = self.sequence, self.sequence + 1
        self.truth[self.session, sequence] = levels
        reference = None
        keep = not self.sent.pausing(stream)
        if keep:
            reference = None if alone else self.sent.newest(stream, sequence)
            self.sent.sent(stream, sequence, levels, reference)
        body = levels if reference is None else levels - reference.levels  # wraps, and so does the sum
        up = Up(self.session, sequence, stream, None if reference is None else reference.sequence, keep, body)
        self.waiting[sequence] = up
        return up

    def receive(self, up: Up) -> Down:
        levels = up.body
        if up.reference is not None:
            found = self.held.find(up.source, up.reference)
            if found is None:
                self.missed += 1
                return Down(up.session, up.sequence, decoded=False)
            levels = levels + found
            self.held.used(up.source, up.reference)
        if up.keep:
            self.held.keep(up.source, up.sequence, levels)
        np.testing.assert_array_equal(levels, self.truth[up.session, up.sequence])
        self.decoded.append(up)
        return Down(up.session, up.sequence, decoded=True)

    def reply(self, down: Down) -> Up | None:
        """What the reply makes the sender send again."""
        if down.session != self.session:
            return None
        up = self.waiting.pop(down.sequence, None)
        if down.decoded:
            self.sent.acknowledge(down.sequence)
            return None
        self.sent.miss(down.sequence)
        return None if up is None else self.send(up.stream, alone=True)


class Trouble(RuleBasedStateMachine):
    """Loss, reorder, repeats, restarts and strangers, in any order."""

    @initialize()
    def start(self) -> None:
        self.world = World()
        self.up: list[Up] = []
        self.down: list[Down] = []

    @rule(stream=streams, count=st.integers(1, WINDOW + 8))
    def send(self, stream: Stream, count: int) -> None:
        self.up += [self.world.send(stream) for _ in range(count)]

    @rule(at=st.integers(0, 200), count=st.integers(1, 60), repeat=st.booleans())
    def deliver(self, at: int, count: int, repeat: bool) -> None:
        for _ in range(min(count, len(self.up))):
            place = at % len(self.up)
            self.down.append(self.world.receive(self.up[place] if repeat else self.up.pop(place)))

    @rule(at=st.integers(0, 200), count=st.integers(1, 60))
    def lose(self, at: int, count: int) -> None:
        del self.up[at % (len(self.up) + 1) : at % (len(self.up) + 1) + count]

    @rule(at=st.integers(0, 200), count=st.integers(1, 60), repeat=st.booleans())
    def answer(self, at: int, count: int, repeat: bool) -> None:
        for _ in range(min(count, len(self.down))):
            place = at % len(self.down)
            again = self.world.reply(self.down[place] if repeat else self.down.pop(place))
            self.up += [] if again is None else [again]

    @rule(at=st.integers(0, 200), count=st.integers(1, 60))
    def lose_replies(self, at: int, count: int) -> None:
        del self.down[at % (len(self.down) + 1) : at % (len(self.down) + 1) + count]

    @rule()
    def restart_the_node(self) -> None:
        self.world.restart_receiver()

    @rule()
    def restart_the_sender(self) -> None:
        self.world.restart_sender()

    @rule(client=st.sampled_from(["stranger", "cam"]), session=st.integers(0, 5), size=st.integers(0, 4000))
    def something_else_speaks(self, client: str, session: int, size: int) -> None:
        """Another client with large frames, or somebody else under our own name."""
        source = Source(client, -session, session, 0, 3, 0)
        self.world.held.keep(source, session, np.ones(size, np.int16))

    @rule(stream=streams)
    def recover(self, stream: Stream) -> None:
        """When the link works again, a frame is soon coded against another one and decoded."""
        self.up.clear()
        self.down.clear()
        state = self.world.sent._streams.get(stream)
        most, number = (0 if state is None else state.pause) + 4, 0
        while (up := self.world.send(stream)).reference is None or not self.world.receive(up).decoded:
            number += 1
            again = self.world.reply(self.world.receive(up))
            if again is not None:
                assert most < 2 * MAX_PAUSE_FRAMES + 8, "references are missed for ever"
                self.world.reply(self.world.receive(again))
                most += self.world.sent._streams[stream].pause + 1
            assert number < most, "the stream does not recover"
        self.world.reply(self.world.receive(up))

    @invariant()
    def memory_is_bounded(self) -> None:
        if not hasattr(self, "world"):
            return
        sent, held = self.world.sent, self.world.held
        assert sent.size_bytes <= ROOM
        assert held.size_bytes <= ROOM
        flying = [said.levels for state in sent._streams.values() for said in state.flying.values()]
        proved = [state.reference.levels for state in sent._streams.values() if state.reference is not None]
        assert sent.size_bytes == sum(map(cost, flying + proved))
        assert len(sent) == len(flying) + len(proved)
        assert set(sent._stream_of) == {number for state in sent._streams.values() for number in state.flying}
        assert all(len(state.flying) <= WINDOW for state in sent._streams.values())
        kept = [levels for state in held._streams.values() for levels in state.frames.values()]
        assert held.size_bytes == sum(map(cost, kept))
        assert len(held) == len(kept)
        assert all(len(state.frames) <= WINDOW + 1 for state in held._streams.values())
        assert {source for sources in held._sources.values() for source in sources} == set(held._streams)
        assert all(len({source.session for source in sources}) == 1 for sources in held._sources.values())


Trouble.TestCase.settings = settings(max_examples=80, stateful_step_count=50, deadline=None)
TestTrouble = Trouble.TestCase


@settings(max_examples=150, deadline=None)
@given(
    st.lists(
        st.tuples(streams, st.sampled_from(["send", "send", "up", "down", "up", "down", "lose up", "lose down"])),
        max_size=400,
    )
)
def test_a_link_that_keeps_the_order_never_makes_a_frame_miss_its_reference(acts: list[tuple[Stream, str]]) -> None:
    """Whatever it loses, and however many frames are on their way."""
    world = World(room_bytes=1 << 30)
    up: deque[Up] = deque()
    down: deque[Down] = deque()
    for stream, act in acts:
        if act == "send":
            up.append(world.send(stream))
        elif act == "up" and up:
            down.append(world.receive(up.popleft()))
        elif act == "down" and down:
            world.reply(down.popleft())
        elif act == "lose up" and up:
            up.popleft()
        elif act == "lose down" and down:
            down.popleft()
    assert world.missed == 0


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2 * WINDOW), st.integers(0, 2**32))
def test_many_frames_on_their_way_are_coded_against_the_first_answered_or_stand_alone(delay: int, seed: int) -> None:
    """A link `delay` frames long that loses a twentieth both ways: no miss, references as far as they go."""
    world, chance = World(room_bytes=1 << 30), np.random.default_rng(seed)
    up: deque[Up | None] = deque([None] * (delay // 2))
    down: deque[Down | None] = deque([None] * (delay - delay // 2))
    for _ in range(300):
        sent, lost = world.send((0, 0)), chance.random(2) < 0.05
        up.append(None if lost[0] else sent)
        came = up.popleft()
        down.append(None if came is None or lost[1] else world.receive(came))
        said = down.popleft()
        if said is not None:
            world.reply(said)
    assert world.missed == 0
    against = sum(up.reference is not None for up in world.decoded)
    if delay < WINDOW:
        assert against > 150
    else:
        assert against == 0


def test_lost_replies_leave_the_last_proved_reference_in_force() -> None:
    world = World()
    first = world.send((0, 0))
    world.reply(world.receive(first))
    for _ in range(3 * WINDOW):
        up = world.send((0, 0))
        assert up.reference == first.sequence
        assert world.receive(up).decoded
    assert len(world.held) == WINDOW + 1


def test_a_restarted_node_costs_each_frame_on_its_way_one_more_packet_and_no_pause() -> None:
    world = World()
    world.reply(world.receive(world.send((0, 0))))
    flying = [world.send((0, 0)) for _ in range(4)]
    assert all(up.reference == 0 for up in flying)
    world.restart_receiver()
    again = [world.reply(world.receive(up)) for up in flying]
    assert [up is not None and up.reference is None for up in again] == [True] * 4
    assert world.missed == 4
    for up in again:
        assert up is not None
        world.reply(world.receive(up))
    assert world.send((0, 0)).reference == again[-1].sequence  # type: ignore[union-attr]


def test_a_miss_after_many_good_frames_is_a_first_one_again() -> None:
    world = World()
    for _ in range(2):
        world.reply(world.receive(world.send((0, 0))))
        world.restart_receiver()
        world.reply(world.receive(world.send((0, 0))))
    assert world.sent._streams[0, 0].misses == 2
    assert world.sent._streams[0, 0].pause > 0
    for _ in range(PAUSE_FRAMES + PROVEN + 3):
        world.reply(world.receive(world.send((0, 0))))
    world.restart_receiver()
    world.reply(world.receive(world.send((0, 0))))
    assert world.sent._streams[0, 0].misses == 1
    assert world.sent._streams[0, 0].pause == 0
