from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime.goodput import BURST_BYTES, FOLLOWED, LEAST, MOST, TELLS_MS, GoodputFilter

RTT_MS = 120.0


class Pipe:
    """A link of a given goodput that lets a burst through at once, in which a lost segment holds up what follows."""

    def __init__(self, goodput: float, *, burst: float = BURST_BYTES) -> None:
        self.goodput, self.burst = goodput, burst
        self.free_ms = self.last_ms = -math.inf

    def answered_ms(self, sent_ms: float, size: int, stall_ms: float = 0.0) -> float:
        begin_ms = max(self.free_ms, sent_ms - self.burst / self.goodput * 1000)
        self.free_ms = begin_ms + size / self.goodput * 1000
        self.last_ms = max(self.last_ms, max(self.free_ms, sent_ms) + RTT_MS + stall_ms)
        return self.last_ms


def talk(
    known: GoodputFilter,
    pipe: Pipe,
    sizes: list[int],
    *,
    start_ms: float = 0.0,
    gap_ms: float = 66.0,
    stalls: dict[int, float] | None = None,
) -> float:
    """Let frames go up and their answers come in the order of time. Returns the end, in ms."""
    happened: list[tuple[float, int, float]] = []  # when, bytes or 0 for an answer, and to what
    for number, size in enumerate(sizes):
        sent_ms = start_ms + number * gap_ms
        answered_ms = pipe.answered_ms(sent_ms, size, (stalls or {}).get(number, 0.0))
        happened += [(sent_ms, size, 0.0), (answered_ms, 0, sent_ms)]
    for at_ms, size, sent_ms in sorted(happened, key=lambda one: (one[0], one[2])):
        if size:
            known.sent(at_ms, size)
        else:
            known.passed(sent_ms, at_ms)
    return max(at_ms for at_ms, _, _ in happened)


def various(count: int, most: int = 6000) -> list[int]:
    return [most // 3 + (most * 2 // 3) * (number * 7 % 11) // 10 for number in range(count)]


def test_three_answers_are_needed_to_know_anything() -> None:
    known = GoodputFilter()
    talk(known, Pipe(1e5), [3000, 3000])
    assert not known.known
    talk(known, Pipe(1e5), [3000], start_ms=1000)
    assert known.known


@given(st.floats(20e3, 300e3), st.sampled_from([0.0, BURST_BYTES]))
def test_sizes_that_differ_tell_the_goodput(goodput: float, burst: float) -> None:
    known = GoodputFilter()
    talk(known, Pipe(goodput, burst=burst), various(60), gap_ms=400)
    assert known.estimate()[0] == pytest.approx(goodput, rel=0.3)


@given(st.floats(20e3, 100e3))
def test_a_queue_that_grows_tells_the_goodput_of_frames_that_are_alike(goodput: float) -> None:
    known = GoodputFilter()
    talk(known, Pipe(goodput), [3000] * 20, gap_ms=3000 / goodput * 1000 * 0.8)
    assert known.estimate()[0] == pytest.approx(goodput, rel=0.25)


@given(st.floats(50e3, 500e3), st.floats(200, 900), st.integers(30, 50))
def test_a_stall_and_the_burst_behind_it_are_not_taken_for_slowness(goodput: float, stall_ms: float, at: int) -> None:
    sizes = various(60, most=3000)
    calm, stalled = GoodputFilter(), GoodputFilter()
    talk(calm, Pipe(goodput), sizes)
    talk(stalled, Pipe(goodput), sizes, stalls={at: stall_ms})
    assert stalled.estimate()[0] >= 0.6 * calm.estimate()[0]


def test_a_link_that_becomes_slow_shows_after_a_few_answers() -> None:
    known = GoodputFilter()
    end_ms = talk(known, Pipe(1e6), various(100))
    assert known.estimate()[0] > 300e3
    talk(known, Pipe(30e3), various(5), start_ms=end_ms)
    assert known.estimate()[0] == pytest.approx(30e3, rel=0.35)


def test_a_link_that_becomes_quick_shows_by_a_few_larger_frames() -> None:
    known = GoodputFilter()
    end_ms = talk(known, Pipe(30e3), various(60, most=4500), gap_ms=200)
    assert known.estimate()[0] < 60e3
    talk(known, Pipe(1e6), [6000] * 8, start_ms=end_ms + 500)
    assert known.estimate()[0] > 200e3


def test_a_way_that_becomes_longer_is_not_taken_for_slowness_for_long() -> None:
    known, pipe = GoodputFilter(), Pipe(100e3)
    end_ms = talk(known, pipe, various(60))
    pipe.last_ms = -math.inf
    for number, size in enumerate(various(150)):
        sent_ms = end_ms + 1000 + number * 100.0
        known.sent(sent_ms, size)
        known.passed(sent_ms, pipe.answered_ms(sent_ms, size) + 200)
    goodput, _, rtt_ms = known.estimate()
    assert goodput == pytest.approx(100e3, rel=0.4)
    assert rtt_ms == pytest.approx(RTT_MS + 200, rel=0.1)


def test_rare_frames_tell_a_longer_way_as_soon_as_others() -> None:
    known, pipe = GoodputFilter(), Pipe(125e3)
    end_ms = talk(known, pipe, various(20), gap_ms=2000)
    for number, size in enumerate(various(8)):
        sent_ms = end_ms + 2000.0 * (number + 1)
        known.sent(sent_ms, size)
        known.passed(sent_ms, pipe.answered_ms(sent_ms, size) + 200)
    assert known.estimate()[2] == pytest.approx(RTT_MS + 200, rel=0.1)


@given(st.integers(100, 1400))
def test_small_frames_do_not_tell_that_a_link_is_quick(size: int) -> None:
    known = GoodputFilter()
    talk(known, Pipe(1e7), [size] * 100)
    assert known.estimate()[0] <= BURST_BYTES / TELLS_MS * 1000


def test_what_goes_up_beside_frames_takes_its_time_too() -> None:
    """Without it the link would seem to carry only the frames."""
    known, pipe = GoodputFilter(), Pipe(60e3)
    for number in range(40):
        at_ms = 66.0 * number
        pipe.answered_ms(at_ms, 2000)
        known.beside(at_ms, 2000)
        answered_ms = pipe.answered_ms(at_ms + 1, 2500)
        known.sent(at_ms + 1, 2500)
        known.passed(at_ms + 1, answered_ms)
    assert known.estimate()[0] == pytest.approx(60e3, rel=0.25)


def test_a_frame_that_did_not_go_up_after_all_takes_no_time() -> None:
    known = GoodputFilter()
    end_ms = talk(known, Pipe(1e5), various(30))
    alone_ms = known.passes_ms(end_ms + 1000, 3000, 1e5)
    known.sent(end_ms + 999, 500_000)
    assert known.passes_ms(end_ms + 1000, 3000, 1e5) > alone_ms + 4000
    known.beside(end_ms + 999, 10)
    known.withdrawn()
    assert known.passes_ms(end_ms + 1000, 3000, 1e5) == pytest.approx(alone_ms, abs=1)


def test_where_nobody_answers_only_the_last_frames_are_followed() -> None:
    known = GoodputFilter()
    for number in range(1000):
        known.sent(float(number), 10_000)
    assert known.passes_ms(1000.0, 0, 1e5) <= FOLLOWED * 100


def test_another_connection_has_nothing_on_its_way() -> None:
    known = GoodputFilter()
    end_ms = talk(known, Pipe(1e5), various(30))
    known.sent(end_ms, 500_000)
    known.reconnected()
    assert known.passes_ms(end_ms + 1, 3000, 1e5) == pytest.approx(15, abs=0.1)  # all but the burst


@given(
    st.lists(st.tuples(st.floats(0, 5e3), st.integers(1, 200_000), st.floats(0, 1e5), st.booleans()), max_size=60),
)
def test_whatever_happens_what_is_known_stays_a_number(frames: list[tuple[float, int, float, bool]]) -> None:
    known, at_ms = GoodputFilter(), 0.0
    for gap_ms, size, took_ms, answered in frames:
        at_ms += gap_ms
        known.sent(at_ms, size)
        if answered:
            known.passed(at_ms, at_ms + took_ms)
        goodput, hope, rtt_ms = known.estimate()
        assert 0.999 * LEAST <= goodput <= 1.001 * MOST
        assert 0.999 * LEAST <= hope <= 1.001 * MOST
        assert 0 <= rtt_ms <= 1e5 + 1
        assert 0 <= known.jitter_ms < math.inf
        assert 0 <= known.passes_ms(at_ms, 1000, goodput) < math.inf
