from __future__ import annotations

import threading
import time
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime.batcher import Batcher


def batcher(**settings: Any) -> Batcher[int]:
    return Batcher(
        **{"max_batch_size": 4, "max_queue_delay_ms": 0.0, "max_queue_frames": 8, "max_queue_bytes": 100, **settings}
    )


@settings(max_examples=500)
@given(
    st.lists(st.integers(0, 40) | st.none(), max_size=60),  # the size of an item to put, or None to take
    st.integers(1, 9),
    st.integers(1, 9),
    st.integers(1, 100),
)
def test_nothing_is_lost_reordered_or_over_a_bound(
    steps: list[int | None], max_batch_size: int, max_queue_frames: int, max_queue_bytes: int
) -> None:
    queue = batcher(max_batch_size=max_batch_size, max_queue_frames=max_queue_frames, max_queue_bytes=max_queue_bytes)
    inside: list[tuple[int, int]] = []
    for item, size_bytes in enumerate(steps):
        if size_bytes is None:
            batch = queue.take(0)
            assert batch == [item for item, _ in inside[: min(max_batch_size, max_queue_frames)]]
            del inside[: len(batch)]
        else:
            held_bytes = sum(size for _, size in inside)
            fits = len(inside) < max_queue_frames and held_bytes + size_bytes <= max_queue_bytes
            assert queue.put(item, size_bytes) is fits
            if fits:
                inside.append((item, size_bytes))
        assert len(queue) == len(inside)


def test_an_empty_queue_gives_an_empty_batch_after_the_timeout() -> None:
    start = time.monotonic()
    assert batcher().take(0.05) == []
    assert 0.045 <= time.monotonic() - start < 1


def test_an_item_that_arrives_ends_the_wait() -> None:
    queue = batcher()
    threading.Timer(0.05, queue.put, (7, 1)).start()
    start = time.monotonic()
    assert queue.take(10) == [7]
    assert time.monotonic() - start < 5


def test_without_a_delay_a_single_item_leaves_at_once() -> None:
    queue = batcher()
    queue.put(1, 1)
    start = time.monotonic()
    assert queue.take(10) == [1]
    assert time.monotonic() - start < 1


def test_a_single_item_waits_for_company_no_longer_than_the_delay() -> None:
    queue = batcher(max_queue_delay_ms=80.0)
    queue.put(1, 1)
    start = time.monotonic()
    assert queue.take(10) == [1]
    assert 0.075 <= time.monotonic() - start < 2


def test_the_delay_counts_from_the_oldest_items_arrival() -> None:
    queue = batcher(max_queue_delay_ms=600.0)
    queue.put(1, 1)
    time.sleep(0.6)
    start = time.monotonic()
    assert queue.take(10) == [1]
    assert time.monotonic() - start < 0.5


def test_company_that_comes_within_the_delay_leaves_in_the_same_batch() -> None:
    queue = batcher(max_queue_delay_ms=300.0)
    queue.put(1, 1)
    threading.Timer(0.02, queue.put, (2, 1)).start()
    assert queue.take(10) == [1, 2]


@pytest.mark.parametrize(
    ("limits", "count"), [({}, 4), ({"max_batch_size": 2}, 2), ({"max_queue_frames": 3, "max_batch_size": 8}, 3)]
)
def test_a_full_batch_or_a_full_queue_does_not_wait(limits: dict[str, int], count: int) -> None:
    queue = batcher(max_queue_delay_ms=60_000.0, **limits)
    for item in range(count):
        assert queue.put(item, 1)
    start = time.monotonic()
    assert queue.take(10) == list(range(count))
    assert time.monotonic() - start < 5


def test_from_thread_to_thread_every_item_arrives_once_and_in_order() -> None:
    queue = batcher(max_queue_delay_ms=0.2, max_queue_frames=5, max_queue_bytes=20)
    count = 3000

    def fill() -> None:
        for item in range(count):
            while not queue.put(item, 4):
                time.sleep(0)

    filler = threading.Thread(target=fill)
    filler.start()
    got: list[int] = []
    while len(got) < count:
        batch = queue.take(5)
        assert 1 <= len(batch) <= 4
        got += batch
    filler.join()
    assert got == list(range(count))
    assert len(queue) == 0
