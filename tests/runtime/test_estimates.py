from __future__ import annotations

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime.estimates import LinkEstimator
from runtime.workload import RateEstimator, Window, WorkEstimator, node_stages

MS = 1_000_000
SECOND = 1000 * MS


class Pipe:
    """A link of a given goodput and round trip; frames go up one after the other, times in ns."""

    def __init__(self, goodput: float, rtt_ms: float, *, noise_ms: float = 0.0, seed: int = 0) -> None:
        self.goodput, self.rtt_ms, self.noise_ms = goodput, rtt_ms, noise_ms
        self.chance = random.Random(seed)
        self.free_ns = 0

    def answered_ns(self, sent_ns: int, size: int, node_ms: float) -> int:
        self.free_ns = max(self.free_ns, sent_ns) + round(size / self.goodput * 1e9)
        return self.free_ns + round((self.rtt_ms + node_ms + self.chance.random() * self.noise_ms) * MS)


def feed(
    link: LinkEstimator,
    pipe: Pipe,
    *,
    start_s: float,
    seconds: float,
    sizes: tuple[int, int],
    hz: float = 10,
    node_ms: float = 20.0,
) -> int:
    """Send frames of sizes drawn between two bounds and take their answers in their order. Returns the end."""
    begin = round(start_s * SECOND)
    frames = [(begin + round(n / hz * SECOND), pipe.chance.randint(*sizes)) for n in range(round(seconds * hz))]
    return exchange(link, [(at_ns, pipe.answered_ns(at_ns, size, node_ms), size) for at_ns, size in frames], node_ms)


def exchange(link: LinkEstimator, frames: list[tuple[int, int, int]], node_ms: float = 0.0) -> int:
    """Let frames go up and their answers come, each at its time: sent, answered, bytes. Returns the end."""
    happened = [(sent_ns, size, None) for sent_ns, _, size in frames]
    happened += [(answered_ns, 0, sent_ns) for sent_ns, answered_ns, _ in frames]  # type: ignore[misc]
    for at_ns, size, answers_ns in sorted(happened, key=lambda one: (one[0], one[2] is not None)):
        if answers_ns is None:
            link.sent(at_ns, size)
        else:
            link.replied(answers_ns, at_ns, node_ms)
    return max(answered_ns for _, answered_ns, _ in frames)


def test_nothing_is_known_before_the_first_answer() -> None:
    known = LinkEstimator().estimate(5 * SECOND)
    assert (known.goodput, known.rtt_ms, known.lost, known.loss_ratio) == (None, None, False, 0.0)
    assert math.isinf(known.age_ms)


@given(
    goodput=st.floats(30e3, 400e3),
    rtt_ms=st.floats(5, 300),
    seed=st.integers(0, 1000),
)
def test_sizes_that_differ_tell_goodput_and_round_trip_apart(goodput: float, rtt_ms: float, seed: int) -> None:
    link = LinkEstimator()
    end = feed(link, Pipe(goodput, rtt_ms, noise_ms=1.0, seed=seed), start_s=1, seconds=5, sizes=(1000, 8000), hz=3)
    known = link.estimate(end)
    assert known.goodput == pytest.approx(goodput, rel=0.3)
    # A link that lets a burst through at once and has a shorter way is the same, for frames that are larger.
    assert known.rtt_ms is not None
    told_ms = known.rtt_ms + link.passes_ms(end + SECOND, 5000, goodput)
    assert told_ms == pytest.approx(rtt_ms + 5000 / goodput * 1000, abs=max(30.0, 0.2 * rtt_ms))
    assert not known.lost
    assert known.age_ms == 0


def test_waiting_behind_other_frames_is_not_taken_for_the_links_slowness() -> None:
    link, pipe = LinkEstimator(), Pipe(50e3, 100)
    sizes = [2000, 5000, 3000, 6000, 2500, 4500, 3500, 5500]
    sent = [SECOND + n * 30 * MS for n in range(len(sizes))]  # three times what the link carries
    frames = zip(sent, sizes, strict=True)
    exchange(link, [(sent_ns, pipe.answered_ns(sent_ns, size, 0.0), size) for sent_ns, size in frames])
    assert link.estimate(2 * SECOND).goodput == pytest.approx(50e3, rel=0.3)


def test_a_step_down_shows_after_some_answers() -> None:
    link = LinkEstimator()
    feed(link, Pipe(1e6, 160), start_s=1, seconds=10, sizes=(2000, 3000))
    assert (link.estimate(11 * SECOND).goodput or 0) > 200e3
    end = feed(link, Pipe(32e3, 160), start_s=12, seconds=0.8, sizes=(2000, 3000))
    assert link.estimate(end).goodput == pytest.approx(32e3, rel=0.5)


def test_a_step_up_shows_after_some_answers() -> None:
    link = LinkEstimator()
    feed(link, Pipe(1e6, 160), start_s=1, seconds=1, sizes=(2000, 3000))
    feed(link, Pipe(32e3, 160), start_s=3, seconds=10, sizes=(2000, 3000), hz=5)
    assert (link.estimate(14 * SECOND).goodput or 0) < 60e3
    end = feed(link, Pipe(1e6, 160), start_s=15, seconds=1, sizes=(2000, 3000))
    assert (link.estimate(end).goodput or 0) > 200e3


def test_a_longer_way_is_not_taken_for_a_narrower_one_where_sizes_differ() -> None:
    link = LinkEstimator()
    feed(link, Pipe(100e3, 50), start_s=1, seconds=5, sizes=(1000, 4000))
    end = feed(link, Pipe(100e3, 350), start_s=7, seconds=10, sizes=(1000, 4000))
    known = link.estimate(end)
    assert known.goodput == pytest.approx(100e3, rel=0.4)
    assert known.rtt_ms == pytest.approx(350, rel=0.1)


@given(st.integers(0, 23), st.floats(300, 3_000))
def test_one_straggler_changes_little(place: int, extra_ms: float) -> None:
    link, pipe = LinkEstimator(), Pipe(100e3, 50)
    answers = []
    for n in range(24):
        sent_ns, size = SECOND + n * 100 * MS, 1000 + 500 * (n % 7)
        late_ms = extra_ms if n == place else 0.0
        answers.append((sent_ns, pipe.answered_ns(sent_ns, size, late_ms), size))
    exchange(link, answers)
    known = link.estimate(4 * SECOND)
    assert known.goodput == pytest.approx(100e3, rel=0.35)
    assert known.rtt_ms == pytest.approx(50, abs=25)


def test_two_frames_without_a_word_and_the_link_is_lost_until_one_comes() -> None:
    link = LinkEstimator()
    feed(link, Pipe(100e3, 50), start_s=1, seconds=1, sizes=(1000, 4000))
    link.missed(3 * SECOND, 4 * SECOND)
    assert not link.estimate(5 * SECOND).lost
    link.missed(round(3.1 * SECOND), 4 * SECOND)
    assert link.estimate(5 * SECOND).lost
    link.replied(3 * SECOND, 9 * SECOND, 0.0)  # late, but it lives
    assert not link.estimate(9 * SECOND).lost


def test_a_frame_that_later_ones_overtook_is_a_loss_and_no_outage() -> None:
    link = LinkEstimator()
    for n in range(50):
        sent_ns = SECOND + n * 100 * MS
        if n % 10 == 5:
            continue
        link.sent(sent_ns, 1000)
        link.replied(sent_ns, sent_ns + 60 * MS, 0.0)
    for n in range(5, 50, 10):
        link.missed(SECOND + n * 100 * MS, 9 * SECOND)
    known = link.estimate(10 * SECOND)
    assert not known.lost
    assert known.loss_ratio == pytest.approx(0.1, abs=0.01)


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=80), st.floats(0, 0.999))
def test_a_window_holds_the_last_values(values: list[float], share: float) -> None:
    window = Window(32)
    for place, value in enumerate(values):
        window.add(value, place * MS)
    window.add(math.nan, 10**12)
    held = values[-32:]
    found = window.quantile(share)
    assert found in held
    assert sum(value < found for value in held) <= share * len(held)
    assert len(window) == len(held)
    assert window.age_ms(len(values) * MS) == pytest.approx(1.0)


def test_an_empty_window_knows_nothing() -> None:
    assert Window().quantile(0.5) is None
    assert math.isinf(Window().age_ms(7))


def test_stages_of_a_reply_compare_between_tiers() -> None:
    timings = {"edge.queue": 1.0, "edge.decode": 2.0, "edge.segment1": 5.0, "cloud.segment2": 7.0, "edge.network": 10.0}
    assert node_stages(timings) == {"rest": 13.0, "segment1": 5.0, "segment2": 7.0}
    strange = {"cloud.segmentX": 1.0, "cloud.segment": 2.0, "segment-1": 4.0}
    assert node_stages(strange) == {"rest": 7.0}, "only a number names a segment"


def test_work_is_known_by_stage() -> None:
    work = WorkEstimator()
    for ms in (5.0, 6.0, 90.0):
        work.took({"segment0": ms}, 1)
    assert work.ms("segment0") == 6.0
    assert work.ms("segment0", 0.9) == 90.0
    assert work.ms("exit1") is None
    assert work.all_ms(0.9) == {"segment0": 90.0}


def test_frames_a_second() -> None:
    rate = RateEstimator()
    assert rate.per_second(0) is None
    for n in range(10):
        rate.taken(n * 66_666_667)
    assert rate.per_second(600_000_000) == pytest.approx(15, rel=0.01)
    assert rate.per_second(6 * SECOND) is None, "the camera has gone"
