from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime.lane import (
    HEADER_BYTES,
    QUEUE_BYTES,
    RTO_MIN_S,
    SEGMENT_BYTES,
    DelayLine,
    Lane,
    TokenBucket,
    next_try_s,
    rto_s,
)
from runtime.scenario import Way

rates = st.floats(1_000, 1e7)
gaps = st.lists(st.floats(0, 0.05), min_size=1, max_size=60)
sizes = st.integers(1, SEGMENT_BYTES + HEADER_BYTES)


@given(rates, st.lists(st.tuples(st.floats(0, 0.5), sizes), min_size=1, max_size=80))
def test_a_bucket_never_lets_more_pass_than_the_rate(rate: float, asked: list[tuple[float, int]]) -> None:
    bucket = TokenBucket()
    now_s, passed = 0.0, [(0.0, 0)]
    for gap_s, size in asked:
        now_s += gap_s
        passed.append((now_s, size if bucket.take(now_s, rate, size) else 0))
    for first in range(len(passed)):
        total = sum(size for _, size in passed[first:])
        assert total <= TokenBucket.burst_bytes(rate) + rate * (now_s - passed[first][0]) + 1e-6


@given(rates, st.lists(sizes, min_size=1, max_size=40))
def test_a_bucket_that_is_asked_again_when_it_says_keeps_the_rate_busy(rate: float, wanted: list[int]) -> None:
    bucket = TokenBucket()
    now_s = 0.0
    for size in wanted:
        if not bucket.take(now_s, rate, size):
            now_s += bucket.wait_s(rate, size) + 1e-9
            assert bucket.take(now_s, rate, size)
    assert now_s == pytest.approx(sum(wanted) / rate, rel=1e-6, abs=1e-6)


def test_a_shut_bucket_never_opens_and_one_without_a_limit_is_never_shut() -> None:
    bucket = TokenBucket()
    assert not bucket.take(0, 0.0, 1)
    assert math.isinf(bucket.wait_s(0.0, 1))
    assert all(bucket.take(0, math.inf, 10**9) for _ in range(9))
    assert not bucket.take(0, 1e6, 1), "what was saved up without a limit counts for nothing"


ways = st.builds(
    Way, rate=rates, delay_s=st.floats(0, 0.5), jitter_s=st.floats(0, 0.1), loss=st.sampled_from([0.0, 0.05, 0.5])
)


@given(ways, gaps, st.integers(0, 99))
def test_a_line_delivers_every_byte_in_order_and_none_too_early(way: Way, gaps_s: list[float], seed: int) -> None:
    line = DelayLine(seed)
    now_s, sent = 0.0, []
    for number, gap_s in enumerate(gaps_s):
        now_s += gap_s
        sent.append((now_s, bytes([number]) * (number + 1)))
        line.push(*sent[-1], way, 2 * way.delay_s)
    assert line.held_bytes == sum(len(segment) for _, segment in sent)
    arrived, stalls = [], 0.0
    while len(line):
        at_s = line.next_s
        assert line.head(at_s - 1e-9) is None
        segment = line.head(at_s)
        assert segment is not None
        arrived.append((at_s, segment))
        line.took(len(segment))
    assert [segment for _, segment in arrived] == [segment for _, segment in sent]
    assert [at_s for at_s, _ in arrived] == sorted(at_s for at_s, _ in arrived)
    for (sent_s, _), (at_s, _) in zip(sent, arrived, strict=True):
        assert at_s >= sent_s + way.delay_s - 1e-9
        stalls = max(stalls, at_s - sent_s - way.delay_s - way.jitter_s)
    assert line.held_bytes == 0
    if not line.losses:
        assert stalls <= 1e-9
    else:
        assert stalls >= rto_s(2 * way.delay_s) - way.jitter_s - 1e-9


def test_a_loss_delays_what_comes_behind_it() -> None:
    lossy, clean = Way(delay_s=0.05, loss=0.999), Way(delay_s=0.05)
    line = DelayLine(1)
    line.push(0, b"lost", lossy, 0.1)
    line.push(0.01, b"behind", clean, 0.1)
    assert line.losses >= 1
    assert line.next_s >= 0.05 + 0.1 + RTO_MIN_S
    line.took(4)
    assert line.head(line.next_s) == b"behind"
    assert line.next_s >= 0.05 + 0.1 + RTO_MIN_S


def test_what_the_sink_takes_in_parts_stays_whole() -> None:
    line = DelayLine(0)
    line.push(0, b"abcdef", Way(), 0)
    line.took(2)
    assert line.head(0) == b"cdef"
    assert line.held_bytes == 4


@given(st.floats(0, 100), st.floats(0, 1000), st.floats(0.2, 2))
def test_tries_get_rarer_but_never_stop(first_s: float, outage_s: float, rto: float) -> None:
    back_s = first_s + outage_s
    again_s = next_try_s(first_s, back_s, rto)
    assert again_s >= back_s
    assert again_s - back_s <= max(outage_s + rto, rto) + 1e-6, "no more than the outage again"
    assert again_s - back_s <= 120 + 1e-6
    assert next_try_s(first_s, again_s, rto) == again_s


def drive(lane: Lane, way: Way, rtt_s: float, until_s: float, now_s: float = 0.0) -> list[tuple[float, bytes]]:
    """Run a lane as the shaper does, and tell what arrived when."""
    arrived = []
    while now_s <= until_s:
        again_s = lane.pump(now_s, way, rtt_s)
        while (head := lane.line.head(now_s)) is not None:
            arrived.append((now_s, head))
            lane.line.took(len(head))
        next_s = min(again_s, lane.line.next_s)
        if math.isinf(next_s):
            break
        now_s = max(next_s, now_s) + 1e-6
    return arrived


@given(st.binary(min_size=1, max_size=20_000), ways, st.integers(0, 9))
def test_a_lane_carries_a_stream_unchanged_at_its_rate(data: bytes, way: Way, seed: int) -> None:
    lane = Lane(TokenBucket(), seed)
    lane.put(data)
    lane.put(b"")
    arrived = drive(lane, way, 2 * way.delay_s, math.inf)
    assert b"".join(segment for _, segment in arrived) == data
    assert arrived[-1][1] == b""
    assert lane.idle
    segments = math.ceil(len(data) / SEGMENT_BYTES) + 1
    least_s = way.delay_s + (len(data) + segments * HEADER_BYTES - TokenBucket.burst_bytes(way.rate)) / way.rate
    assert arrived[-1][0] >= least_s - 1e-6


@given(st.integers(0, 300_000), st.floats(0, 1))
def test_a_lane_takes_no_more_than_it_has_room_for(size: int, rtt_s: float) -> None:
    way = Way(rate=10_000.0, delay_s=rtt_s / 2)
    lane = Lane(TokenBucket(), 0)
    empty = lane.room(way, rtt_s)
    assert empty == QUEUE_BYTES + int(10_000 * rtt_s)
    lane.put(bytes(size))
    lane.pump(0.0, way, rtt_s)
    assert lane.room(way, rtt_s) == max(0, empty - size)
    lane.drop()
    assert lane.idle
    assert lane.room(way, rtt_s) == empty


def test_nothing_passes_a_shut_link_and_what_waited_goes_on_at_its_next_try() -> None:
    shut, way, rtt_s = Way(rate=0.0), Way(rate=1e6, delay_s=0.1), 0.2
    lane = Lane(TokenBucket(), 0)
    lane.put(b"late")
    assert math.isinf(lane.pump(1.0, shut, rtt_s))
    assert math.isinf(lane.pump(40.0, shut, rtt_s))
    again_s = lane.pump(61.0, way, rtt_s)
    assert again_s == next_try_s(1.0, 61.0, rto_s(rtt_s)) > 61.0
    (at_s, data), *rest = drive(lane, way, rtt_s, math.inf, again_s)
    assert (data, rest) == (b"late", [])
    assert at_s == pytest.approx(again_s + 0.1, abs=0.01)


def test_who_opens_a_connection_waits_for_the_handshake_first() -> None:
    way, rtt_s = Way(rate=1e6, delay_s=0.1), 0.2
    lane = Lane(TokenBucket(), 0, fresh=True)
    lane.put(b"first")
    lane.put(b"second")
    (first_s, first), (second_s, second) = drive(lane, way, rtt_s, math.inf)
    assert (first, second) == (b"first", b"second")
    assert first_s == pytest.approx(0.3, abs=0.01)
    assert second_s == pytest.approx(first_s, abs=0.01)
    lane.put(b"third")
    ((third_s, _),) = drive(lane, way, rtt_s, math.inf, 10.0)
    assert third_s == pytest.approx(10.1, abs=0.01)
