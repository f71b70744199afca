"""Whether a camera shows what is there now: pictures that never change, and frames that come late. Pure."""

from __future__ import annotations

import zlib
from collections import deque

import numpy as np

from runtime.datatypes import Pixels

SAMPLES = 64  # rows and columns of the thinned picture, at least, where the picture has as many
WHOLE_S = 1.0  # how often a picture that looks the same is compared whole
BUCKET_S = 60.0
BUCKETS = 10


class Rate:
    """Which frames to keep, so that there are at most `max_fps` of them a second; None keeps all."""

    def __init__(self, max_fps: float | None) -> None:
        self._period_ns = 1e9 / max_fps if max_fps else 0.0
        self._due_ns = 0.0

    def keeps(self, now_ns: int) -> bool:
        """Whether the frame that has just come is one to keep; None of its neighbours is then, if they are too near."""
        if now_ns < self._due_ns:
            return False
        # Half a period of patience, so that jitter does not cost a camera at just max_fps every other frame.
        self._due_ns = max(self._due_ns, now_ns - self._period_ns / 2) + self._period_ns
        return True


class Stillness:
    """For how long a camera has given the very same picture.

    A scene without motion is not still in this sense: a sensor's noise changes some of the thousands of samples of a
    thinned picture from frame to frame. Only where all of them are equal, whole pictures are compared, once a second.
    A stream's encoder may send "nothing changed" for as long as a picture is clean enough, until its next key frame;
    whoever uses this has to wait for longer than that.
    """

    def __init__(self) -> None:
        self._thin: Pixels | None = None
        self._whole = 0
        self._since_s = 0.0
        self._compared_s = 0.0

    def look(self, pixels: Pixels, now_s: float) -> float:
        """Compare a picture with those before it.

        Args:
            pixels: uint8 (height, width, 3).
            now_s: of any clock that only goes forward.

        Returns:
            The seconds since the first of the pictures that are all equal to this one; 0 where it differs.
        """
        height, width = pixels.shape[:2]
        thin = pixels[:: max(1, height // SAMPLES), :: max(1, width // SAMPLES)]
        before = self._thin
        if before is not None and before.shape == thin.shape and np.array_equal(before, thin):
            if now_s - self._compared_s < WHOLE_S:
                return now_s - self._since_s
            whole = zlib.crc32(np.ascontiguousarray(pixels).data)
            self._compared_s = now_s
            if self._whole in (0, whole):
                self._whole = whole
                return now_s - self._since_s
            self._whole = whole
        else:
            self._whole = 0
        self._thin = thin.copy()
        self._since_s = self._compared_s = now_s
        return 0.0


class Lag:
    """How late each frame of a stream comes, by the stream's own clock.

    A stream's time stamps and ours differ by an unknown offset plus how long the frame was on its way. The least of
    these sums of the last ten minutes stands for a frame without delay, as LEDBAT does it (RFC 6817): what a frame has
    more than that is its lag. The two clocks' drift, some 50 ppm, is 30 ms in that time.
    """

    def __init__(self) -> None:
        self._least: deque[tuple[int, int]] = deque(maxlen=BUCKETS)  # (bucket, least sum in ns)
        self._source_ns: int | None = None

    def of(self, source_ns: int, now_ns: int) -> int:
        """The lag in ns of a frame with the stream's time `source_ns` that comes at `now_ns`; 0 for the first."""
        # Time stamps that go back are of another beginning, those that stand still say nothing.
        if self._source_ns is not None and source_ns <= self._source_ns:
            self._least.clear()
        self._source_ns = source_ns
        bucket, total_ns = int(now_ns / (BUCKET_S * 1e9)), now_ns - source_ns
        if self._least and self._least[-1][0] == bucket:
            self._least[-1] = (bucket, min(self._least[-1][1], total_ns))
        else:
            self._least.append((bucket, total_ns))
        return total_ns - min(least for _, least in self._least)
