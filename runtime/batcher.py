"""Gathers requests into batches of at most `max_batch_size`. Bounded in count, bytes and waiting time."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Generic, TypeVar

Item = TypeVar("Item")


class Batcher(Generic[Item]):
    """A queue that is filled by one thread and emptied in batches by another."""

    def __init__(
        self, *, max_batch_size: int, max_queue_delay_ms: float, max_queue_frames: int, max_queue_bytes: int
    ) -> None:
        self._max_batch_size = min(max_batch_size, max_queue_frames)  # a full queue waits for nobody
        self._max_queue_delay_s = max_queue_delay_ms / 1e3
        self._max_frames = max_queue_frames
        self._max_bytes = max_queue_bytes
        self._queue: deque[tuple[Item, int, float]] = deque()
        self._bytes = 0
        self._changed = threading.Condition()

    def put(self, item: Item, size_bytes: int) -> bool:
        """Queue an item; False when the queue is full."""
        with self._changed:
            if len(self._queue) >= self._max_frames or self._bytes + size_bytes > self._max_bytes:
                return False
            self._queue.append((item, size_bytes, time.monotonic()))
            self._bytes += size_bytes
            self._changed.notify()
            return True

    def take(self, timeout_s: float) -> list[Item]:
        """Return the next batch, oldest first; empty when nothing came within `timeout_s`.

        A batch leaves when it is full or its oldest item has waited for `max_queue_delay_ms`.
        """
        with self._changed:
            end = time.monotonic() + timeout_s
            if not self._queue:
                self._changed.wait(timeout_s)
            if not self._queue:
                return []
            ripe = self._queue[0][2] + self._max_queue_delay_s
            while len(self._queue) < self._max_batch_size and time.monotonic() < ripe:
                if time.monotonic() >= end:
                    return []
                self._changed.wait(min(ripe, end) - time.monotonic())
            taken = [self._queue.popleft() for _ in range(min(self._max_batch_size, len(self._queue)))]
            self._bytes -= sum(size_bytes for _, size_bytes, _ in taken)
            return [item for item, _, _ in taken]

    def remove(self, unwanted: Callable[[Item], bool]) -> list[Item]:
        """Take out whatever `unwanted` says so of, oldest first."""
        with self._changed:
            kept: deque[tuple[Item, int, float]] = deque()
            removed: list[Item] = []
            for item, size_bytes, at_s in self._queue:
                if unwanted(item):
                    removed.append(item)
                    self._bytes -= size_bytes
                else:
                    kept.append((item, size_bytes, at_s))
            if removed:
                self._queue = kept
            return removed

    def drain(self) -> list[Item]:
        """Take everything, waiting for nothing."""
        with self._changed:
            rest = [item for item, _, _ in self._queue]
            self._queue.clear()
            self._bytes = 0
            return rest

    def __len__(self) -> int:
        with self._changed:
            return len(self._queue)
