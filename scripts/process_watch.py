"""Memory, descriptors and threads of processes by the time, and whether memory grows."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import psutil
from numpy.typing import NDArray

EVERY_S = 2.0
BATCHES = 10
QUANTILE = 2.306  # of Student's t with BATCHES - 2 degrees of freedom, for 95 % on both sides
SETTLED_MOST_S = 120.0  # before that, or a sixth of the run, memory grows by what is loaded and warmed up
LEAVING_S = 3.0  # at the end, when a process gives back what it holds
NAMES = ("rss_mb", "descriptors", "threads")


class Trend(msgspec.Struct, frozen=True):
    """A slope with its 95 % interval; it is not distinguishable from 0 where that holds 0."""

    per_hour: float
    low: float
    high: float


def trend(times_s: Sequence[float], values: Sequence[float]) -> Trend | None:
    """The slope of values over time, by least squares on the means of ten batches of equal length; None of too few.

    Neighbouring values resemble each other, which least squares on all of them would take for certainty. The means of
    batches much longer than that resemblance are nearly independent (the method of batch means), and the interval is
    Student's with the eight degrees of freedom that ten of them leave.
    """
    if len(times_s) < 2 * BATCHES:
        return None
    hours = _means(np.array(times_s) / 3600)
    means = _means(np.array(values, np.float64))
    apart = hours - hours.mean()
    slope = float((apart * means).sum() / (apart**2).sum())
    rest = means - means.mean() - slope * apart
    error = float(np.sqrt((rest**2).sum() / (BATCHES - 2) / (apart**2).sum()))
    return Trend(slope, slope - QUANTILE * error, slope + QUANTILE * error)


def _means(values: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.array([part.mean() for part in np.array_split(values, BATCHES)])


class ProcessWatch:
    """The tiers that this process has started, looked at every few seconds for as long as a `with` lasts.

    A tier is known by its configuration's name in its command line; with `words`, by that of them which it holds.
    """

    def __init__(self, names: Sequence[str] = ("device", "edge", "cloud")) -> None:
        self._names = names
        self._sizes: dict[tuple[str, int], list[tuple[float, float, int, int]]] = {}  # (name, pid) → seconds, sizes
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)
        self._start_s = time.monotonic()

    def __enter__(self) -> ProcessWatch:
        self._thread.start()
        return self

    def __exit__(self, *failure: object) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stop.wait(EVERY_S):
            for process in psutil.Process().children():
                try:
                    stems = {Path(word).stem for word in process.cmdline()}
                    name = next((name for name in self._names if name in stems), None)
                    if name is not None:
                        at_s = time.monotonic() - self._start_s
                        size = (at_s, process.memory_info().rss / 2**20, process.num_fds(), process.num_threads())
                        self._sizes.setdefault((name, process.pid), []).append(size)
                except psutil.NoSuchProcess:
                    continue

    def told(self) -> dict[str, Any]:
        """By tier: lives, and of the longest one the first, last and greatest sizes and the trend of memory."""
        found: dict[str, Any] = {}
        for name in self._names:
            lives = [sizes for (owner, _), sizes in self._sizes.items() if owner == name]
            if lives:
                found[name] = {"lives": len(lives), **_life(max(lives, key=len))}
        return found


def _life(sizes: Sequence[tuple[float, float, int, int]]) -> dict[str, Any]:
    begins_s = sizes[0][0] + min(SETTLED_MOST_S, (sizes[-1][0] - sizes[0][0]) / 6)
    ends_s = sizes[-1][0] - LEAVING_S
    settled = [size for size in sizes if begins_s <= size[0] <= ends_s] or list(sizes)
    columns = list(zip(*settled, strict=True))
    told: dict[str, Any] = {"seconds": round(settled[-1][0] - settled[0][0])}
    for name, column in zip(NAMES, columns[1:], strict=True):
        told[name] = {"first": column[0], "last": column[-1], "most": max(column)}
    slope = trend(columns[0], columns[1])
    return {**told, "rss_mb_per_hour": None if slope is None else msgspec.to_builtins(slope)}
