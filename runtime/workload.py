"""What a sender knows of its own work and of that of the nodes above: how long stages take, how many frames come. Pure.

Nothing here reads a clock: times come as nanoseconds of one monotonic clock.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping

LOOKED_NS, LOOKS = 10_000_000_000, 10  # over which a rate of bytes is taken
GONE_MS, GONE_GAPS = 5000.0, 5.0  # without a frame: a camera does not count any more


class Window:
    """The last values of one quantity, with quantiles. An age says whether they still mean something."""

    __slots__ = ("_at_ns", "_sorted", "_values")

    def __init__(self, size: int = 32) -> None:
        self._values: deque[float] = deque(maxlen=size)
        self._sorted: list[float] | None = None
        self._at_ns: int | None = None

    def __len__(self) -> int:
        return len(self._values)

    def add(self, value: float, now_ns: int) -> None:
        """Take a value; what is no finite number is none."""
        if math.isfinite(value):
            self._values.append(value)
            self._sorted, self._at_ns = None, now_ns

    def quantile(self, share: float) -> float | None:
        """The value that `share` of those held do not exceed; None when there are none."""
        if not self._values:
            return None
        if self._sorted is None:
            self._sorted = sorted(self._values)
        return self._sorted[min(len(self._sorted) - 1, int(share * len(self._sorted)))]

    def age_ms(self, now_ns: int) -> float:
        """Since the last value; infinite when there has been none."""
        return math.inf if self._at_ns is None else (now_ns - self._at_ns) / 1e6


class WorkEstimator:
    """Learns how long named stages take: a device's own, and by segment and in sum those of the nodes above."""

    def __init__(self) -> None:
        self._stages: dict[str, Window] = {}

    def took(self, stages: Mapping[str, float], now_ns: int) -> None:
        """Stages of one frame and their milliseconds."""
        for stage, ms in stages.items():
            window = self._stages.get(stage)
            if window is None:
                window = self._stages[stage] = Window()
            window.add(ms, now_ns)

    def ms(self, stage: str, share: float = 0.5) -> float | None:
        """The quantile `share` of a stage's recent times; None: it has not been seen."""
        window = self._stages.get(stage)
        return None if window is None else window.quantile(share)

    def all_ms(self, share: float = 0.5) -> dict[str, float]:
        """The quantile `share` of the recent times of every stage that has been seen."""
        return {stage: window.quantile(share) or 0.0 for stage, window in self._stages.items()}


def node_stages(timings: Mapping[str, float]) -> dict[str, float]:
    """A reply's timings as stages that compare between cuts: `segmentK`, and all that is no segment as `rest`."""
    found: dict[str, float] = {"rest": 0.0}
    for name, ms in timings.items():
        stage = name.rpartition(".")[2]
        if stage.startswith("segment") and stage[7:].isdecimal():
            found[stage] = found.get(stage, 0.0) + ms
        else:
            found["rest"] += ms
    return found


class RateEstimator:
    """Learns how many frames come a second."""

    def __init__(self) -> None:
        self._gaps = Window()
        self._last_ns: int | None = None

    def taken(self, now_ns: int) -> None:
        """A frame was taken."""
        if self._last_ns is not None and now_ns > self._last_ns:
            self._gaps.add((now_ns - self._last_ns) / 1e9, now_ns)
        self._last_ns = now_ns

    def per_second(self, now_ns: int) -> float | None:
        """None: not known yet, or none has come for long."""
        gap_s = self._gaps.quantile(0.5)
        if gap_s is None or gap_s <= 0 or self._gaps.age_ms(now_ns) > max(GONE_MS, GONE_GAPS * gap_s * 1000):
            return None
        return 1 / gap_s


class ByteRate:
    """Learns how many bytes a second are counted, from looks at a total that may go down again."""

    def __init__(self) -> None:
        self._looks: deque[tuple[int, int]] = deque(maxlen=LOOKS)
        self._most = 0

    def counted(self, now_ns: int, total: int) -> int:
        """Take the total; returns by how much it is more than it ever was."""
        more, self._most = max(0, total - self._most), max(total, self._most)
        if not self._looks or now_ns - self._looks[-1][0] >= LOOKED_NS / LOOKS:
            self._looks.append((now_ns, total))
        return more

    @property
    def per_second(self) -> float:
        """Over the last ten seconds; 0 where that is not known yet."""
        if len(self._looks) < 2:
            return 0.0
        (first_ns, first), (last_ns, last) = self._looks[0], self._looks[-1]
        return max(0, last - first) / ((last_ns - first_ns) / 1e9)
