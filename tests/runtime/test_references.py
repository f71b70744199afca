"""What a sender and a receiver keep to code frames against: how long, how much, and under which number."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime.references import (
    FRAME_BYTES,
    MAX_AGE,
    MAX_PAUSE_FRAMES,
    PAUSE_FRAMES,
    WINDOW,
    HeldReferences,
    Reference,
    SentReferences,
    Source,
    StreamNumbers,
)

SIZE = 16  # levels a frame
ROOM = 3 * (WINDOW + 1) * (FRAME_BYTES + 2 * SIZE)  # for three whole streams


def test_a_pool_makes_frames_stand_alone_for_longer_and_longer() -> None:
    """Two nodes that take turns: every frame coded against another meets the node that lacks it."""
    sent: SentReferences[str] = SentReferences()
    levels = np.zeros(SIZE, np.int16)
    pauses, misses, frames = [], 0, 60_000
    for sequence in range(frames):
        if sent.pausing("cam"):
            continue
        reference = sent.newest("cam", sequence)
        sent.sent("cam", sequence, levels, reference)
        if reference is None:
            sent.acknowledge(sequence)
        else:
            misses += 1
            pauses.append(sent.miss(sequence))
    assert pauses[:4] == [0, PAUSE_FRAMES, 2 * PAUSE_FRAMES, 4 * PAUSE_FRAMES]
    assert max(pauses) == MAX_PAUSE_FRAMES
    assert misses < frames / 1000


def test_a_reference_of_long_ago_is_not_used() -> None:
    sent: SentReferences[str] = SentReferences()
    sent.sent("cam", 2**32 - 2, np.zeros(SIZE, np.int16), None)
    sent.acknowledge(2**32 - 2)
    for sequence, usable in ((3, True), (MAX_AGE - 2, True), (MAX_AGE - 1, False), (2**31, False)):
        assert (sent.newest("cam", sequence) is not None) == usable, sequence


def test_sequence_numbers_may_come_round_while_a_stream_is_idle() -> None:
    sent: SentReferences[str] = SentReferences()
    sent.sent("idle", 5, np.full(SIZE, 1, np.int16), None)
    sent.sent("busy", 5, np.full(SIZE, 2, np.int16), None)
    sent.acknowledge(5)
    newest = sent.newest("busy", 6)
    assert newest is not None
    assert (newest.levels == 2).all()
    assert sent.newest("idle", 6) is None
    for stream in ("idle", "busy"):
        sent.forget(stream)
    assert (len(sent), sent.size_bytes) == (0, 0)


def test_a_repeat_and_a_late_reply_change_nothing() -> None:
    sent: SentReferences[str] = SentReferences()
    for sequence in range(3):
        sent.sent("cam", sequence, np.full(SIZE, sequence, np.int16), None)
    sent.acknowledge(1)
    for late in (0, 1, 7):
        sent.acknowledge(late)
        assert sent.miss(late) == 0
    newest = sent.newest("cam", 3)
    assert newest is not None
    assert newest.sequence == 1
    assert (newest.levels == 1).all()


def test_what_is_kept_is_a_copy_that_nobody_changes() -> None:
    levels = np.arange(1000, dtype=np.int16)
    sent: SentReferences[str] = SentReferences()
    held = HeldReferences()
    source = Source("cam", 1, 0, 1, 3, 0)
    sent.sent("cam", 0, levels[:SIZE], None)
    sent.acknowledge(0)
    held.keep(source, 0, levels[:SIZE])
    levels[:] = -1
    newest = sent.newest("cam", 1)
    assert isinstance(newest, Reference)
    for kept in (newest.levels, held.find(source, 0)):
        assert kept is not None
        assert kept.base is None
        np.testing.assert_array_equal(kept, np.arange(SIZE))
        with pytest.raises(ValueError, match="read-only"):
            kept[0] = 1


def test_a_frame_too_large_for_all_the_room_is_not_kept() -> None:
    huge = np.zeros(ROOM, np.int16)
    held = HeldReferences(max_bytes=ROOM)
    held.keep(Source("cam", 1, 0, 1, 3, 0), 0, huge)
    assert (len(held), held.size_bytes) == (0, 0)
    sent: SentReferences[str] = SentReferences(max_bytes=ROOM)
    sent.sent("cam", 0, huge, None)
    assert (len(sent), sent.size_bytes) == (0, 0)


def test_streams_are_bounded_too_and_the_least_used_goes_first() -> None:
    held = HeldReferences(max_streams=3)
    sent: SentReferences[int] = SentReferences(max_streams=3)
    empty = np.zeros(0, np.int16)
    sources = [Source("cam", 1, camera, 1, 3, 0) for camera in range(4)]
    for camera in (0, 1, 2, 0, 3):
        held.keep(sources[camera], camera, empty)
        sent.sent(camera, 10 * camera + len(sent), empty, None)
    assert [held.find(source, camera) is not None for camera, source in enumerate(sources)] == [True, False, True, True]
    assert list(sent._streams) == [2, 0, 3]


@given(st.lists(st.tuples(st.sampled_from("ab"), st.integers(0, 300)), max_size=700))
def test_numbers_of_cameras_are_never_shared(uses: list[tuple[str, int]]) -> None:
    numbers = StreamNumbers()
    given_to: dict[int, tuple[str, int]] = {}
    for use in uses:
        number, taken = numbers.number(*use)
        assert 0 <= number < StreamNumbers.COUNT
        assert taken == (given_to.get(number, use) != use)
        given_to[number] = use
        assert numbers.number(*use) == (number, False)


def test_more_cameras_than_numbers_take_the_one_not_used_for_longest() -> None:
    numbers = StreamNumbers()
    first = [numbers.number("edge", camera)[0] for camera in range(256)]
    assert sorted(first) == list(range(256))
    numbers.number("edge", 0)
    assert numbers.number("edge", 256) == (first[1], True)
    assert numbers.number("edge", 0) == (first[0], False)
