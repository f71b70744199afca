"""Counters that say where every frame, packet and byte went. No drop is silent: each has a counter with a reason."""

from __future__ import annotations

import threading


class Counters:
    """Named, labelled counts, safe to use from any thread.

    Names and labels follow Prometheus: `results_total{tier="device",exit="1"}`.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts: dict[str, int] = {}

    def add(self, name: str, amount: int = 1, **labels: str | int) -> None:
        """Add `amount` to the counter `name` with these labels."""
        key = name
        if labels:
            key += "{" + ",".join(f'{label}="{value}"' for label, value in sorted(labels.items())) + "}"
        with self._lock:
            self._counts[key] = self._counts.get(key, 0) + amount

    def snapshot(self) -> dict[str, int]:
        """All counts so far, by name."""
        with self._lock:
            return dict(sorted(self._counts.items()))

    def total(self, name: str) -> int:
        """The sum over all labels of `name`."""
        with self._lock:
            return sum(count for key, count in self._counts.items() if key.split("{", 1)[0] == name)
