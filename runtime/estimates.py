"""What a sender knows of its link, from each frame and reply. Pure.

A link is taken as a pipe: what goes up waits for what went before it, takes `bytes / goodput`, and its answer is there
one round trip and the node's own time later. Replies say the node's time (`Reply.timings`), so what is left of a
frame's time is `round trip + bytes / goodput`, with two unknowns. Where sizes differ enough among recent frames, the
median of the slopes between pairs of them (Theil 1950, Sen 1968) parts the two; else the shortest round trip of the
last minute is taken for the round trip. Medians are deaf to single frames; three frames in a row that contradict what
was known make all before them obsolete, so a step of the link shows after three replies.

Nothing here reads a clock: times come as nanoseconds of one monotonic clock.
"""

from __future__ import annotations

import math
from collections import OrderedDict, deque
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

MEMORY_NS = 4_000_000_000  # of frames in the fit of a link
FLOOR_NS = 60_000_000_000  # of the shortest round trip
FITTED_NS = 10_000_000_000  # of a round trip that sizes told
START_GOODPUT = 125_000.0  # bytes a second, before anything is known
SAMPLES = 24
ENOUGH, FIT_NS = 8, 200_000_000  # frames from which on, and how often, a fit without contradictions is made anew
PAIRS = 6  # of frames with sizes apart, fewer do not tell a slope
APART = 1.3  # ratio of two sizes that are apart
CONTRADICTIONS = 3
CONTRADICTS_RATIO, CONTRADICTS_MS = 0.5, 15.0  # of a frame's own transfer, and beside it
LEAST_MS = 1.0  # below this a transfer cannot be told from noise, so goodput is known to be at least so much
NOISE_MS = 20.0  # a transfer shorter than this, and than how late frames are at times, is not told by one frame
OUTCOMES = 50
SILENT_NS, SILENT_RTTS = 300_000_000, 4.0  # without any word, before frames that are overdue mean an outage
STALL_MS = 200.0  # and a round trip: what a lost segment holds up the others by (TCP's least time-out)
PROVEN_RATIO, HALF_LIFE_S, GAP_S = 4.0, 10.0, 2.0
MISSES_LOST = 2  # frames in a row without a word from above after which the link counts as lost


@dataclass(frozen=True, slots=True)
class LinkEstimate:
    """What is known of a link now."""

    goodput: float | None  # bytes a second; None: no answer has ever come
    rtt_ms: float | None  # of a message of no bytes, the node's own time not counted
    jitter_ms: float  # by which the slowest tenth of recent frames were later than these two say
    loss_ratio: float  # of frames without an answer, while later ones had theirs
    lost: bool  # nothing has come back for so many frames, or so long, that nothing is to be expected
    age_ms: float  # since the last word from above; infinite: there was none
    bounded: bool = False  # goodput is only known to be at least this


UNKNOWN = LinkEstimate(None, None, 0.0, 0.0, lost=False, age_ms=math.inf)


@dataclass(frozen=True, slots=True)
class _Sample:
    at_ns: int
    size: int
    whole_ms: float  # from when it went up to its answer, without the node's time
    ms: float  # the same from when the pipe was free for it
    gap_ms: float | None  # where it waited behind another: how long after that one it passed; all of it is transfer


@dataclass(frozen=True, slots=True)
class _Fit:
    rtt_ms: float
    ms_per_byte: float
    spread: float  # of the slopes, between their quartiles
    unlike_ms: float  # median distance of the frames from it


class LinkEstimator:
    """Learns a link from what went up and what came back. The caller keeps its calls in one thread at a time."""

    def __init__(self) -> None:
        self._samples: deque[_Sample] = deque(maxlen=SAMPLES)
        self._floors: deque[tuple[int, float]] = deque()  # (when, ms), rising: the first is the shortest
        self._outcomes: OrderedDict[int, bool] = OrderedDict()  # by when it went up: whether an answer came
        self._rtt_ms: float | None = None
        self._ms_per_byte: float | None = None
        self._against = 0  # frames in a row that contradict the fit: how many, later ones positive
        self._passed_ns = self._passed_sent_ns = 0  # of the frame sent last among those answered
        self._fit_ns = 0
        self._spread: tuple[float, int] | None = None  # jitter and largest size of the samples, once asked for
        self._proven = START_GOODPUT / PROVEN_RATIO  # bytes a second that the link has carried lately
        self._delivered: deque[tuple[int, int]] = deque()  # in the last second: when, bytes
        self._fitted_ns = 0  # when sizes last told the round trip
        self._heard_ns: int | None = None
        self._answered_sent_ns = -1  # when the frame went up that was sent last among those with a word
        self._misses = 0

    def replied(self, sent_ns: int, replied_ns: int, size: int, node_ms: float) -> bool:
        """An answer came, in time or late, for a frame of `size` bytes that went up at `sent_ns`.

        Returns:
            Whether what was known has become obsolete by it.
        """
        self._hear(sent_ns, replied_ns)
        self._spread = None
        self._prove(replied_ns, size)
        if sent_ns <= self._passed_sent_ns:
            return False  # later ones overtook it, so what held it up was not the pipe
        passed_ns = replied_ns - round(max(0.0, node_ms) * 1e6)
        whole_ms = max(0.0, (passed_ns - sent_ns) / 1e6)
        gap_ms = (passed_ns - self._passed_ns) / 1e6
        self._passed_ns, self._passed_sent_ns = max(passed_ns, self._passed_ns), sent_ns
        if gap_ms <= 0:
            return False  # nodes do not tell their times that exactly
        waited = self._rtt_ms is not None and gap_ms + self._rtt_ms < whole_ms
        ms = gap_ms + (self._rtt_ms or 0.0) if waited else whole_ms
        if waited and gap_ms < CONTRADICTS_RATIO * size * (self._ms_per_byte or 0.0):
            # What a lost segment held up comes in one burst, which tells nothing of how fast the link is.
            return False
        obsolete = self._contradict(size, ms)
        self._samples.append(_Sample(replied_ns, size, whole_ms, ms, gap_ms if waited else None))
        while self._samples and self._samples[0].at_ns < replied_ns - MEMORY_NS and len(self._samples) > CONTRADICTIONS:
            self._samples.popleft()
        if not waited:
            self._remember_floor(replied_ns, ms)
        if obsolete or self._against or len(self._samples) < ENOUGH or replied_ns - self._fit_ns >= FIT_NS:
            self._fit_ns = replied_ns
            self._fit(replied_ns)
        return obsolete

    def heard(self, sent_ns: int, now_ns: int, node_ms: float = 0.0) -> None:
        """A word came that tells no time, as a refusal does, or the first one after an outage."""
        self._hear(sent_ns, now_ns)
        if sent_ns > self._passed_sent_ns:
            self._passed_ns, self._passed_sent_ns = now_ns - round(max(0.0, node_ms) * 1e6), sent_ns

    @property
    def free_ns(self) -> float:
        """When the last frame that was answered had passed the pipe, on the way up."""
        return self._passed_ns - (self._rtt_ms or 0.0) * 1e6

    @property
    def lost(self) -> bool:
        """Whether the link counts as lost."""
        return self._misses >= MISSES_LOST

    def missed(self, sent_ns: int, now_ns: int) -> None:
        """No answer came in time for the frame that went up at `sent_ns`."""
        self._record(sent_ns, answered=False)
        # Where later ones were answered this one was lost; where one was just now, the pipe is full, and alive.
        patience_ns = max(SILENT_NS, SILENT_RTTS * (self._rtt_ms or 0.0) * 1e6)
        silent = self._heard_ns is None or now_ns - self._heard_ns > patience_ns
        if silent and sent_ns > self._answered_sent_ns:
            self._misses += 1

    def estimate(
        self, now_ns: int, waiting_since_ns: int | None = None, waiting_bytes: int = 0, beside: float = 0.0
    ) -> LinkEstimate:
        """What is known now.

        Args:
            now_ns: the time.
            waiting_since_ns: when the frame went up that has waited longest for its answer; None: none waits.
            waiting_bytes: its size.
            beside: bytes a second that the link carries beside frames.
        """
        age_ms = math.inf if self._heard_ns is None else (now_ns - self._heard_ns) / 1e6
        loss = sum(not answered for answered in self._outcomes.values()) / max(len(self._outcomes), 10)
        if self._rtt_ms is None or self._ms_per_byte is None:
            return LinkEstimate(None, None, 0.0, loss, lost=self.lost, age_ms=age_ms)
        ms_per_byte, rtt_ms = self._ms_per_byte, self._rtt_ms
        if self._spread is None:
            late = sorted(sample.ms - rtt_ms - sample.size * ms_per_byte for sample in self._samples)
            slow_ms = max(0.0, late[int(0.9 * (len(late) - 1))]) if len(late) > CONTRADICTIONS else 0.0
            self._spread = slow_ms, max((sample.size for sample in self._samples), default=1)
        jitter_ms, typical = self._spread
        if waiting_since_ns is not None and waiting_bytes > 0:
            # What has not come back yet says how slow the link must be at least.
            since_ms = (
                (now_ns - max(waiting_since_ns, self._passed_ns - round(rtt_ms * 1e6))) / 1e6 - rtt_ms - jitter_ms
            )
            if since_ms > 3 * waiting_bytes * ms_per_byte + CONTRADICTS_MS + STALL_MS + rtt_ms:
                ms_per_byte = since_ms / waiting_bytes
        bounded = typical * ms_per_byte <= max(2 * LEAST_MS, jitter_ms)
        goodput = 1000 / ms_per_byte
        return LinkEstimate(
            # A link lets some bytes through at once; what it carries all the time has to be tried step by step.
            goodput=min(goodput, PROVEN_RATIO * (self._proven + beside)) if bounded else goodput,
            rtt_ms=rtt_ms,
            jitter_ms=jitter_ms,
            loss_ratio=loss,
            lost=self.lost,
            age_ms=age_ms,
            bounded=bounded,
        )

    def _prove(self, now_ns: int, size: int) -> None:
        """Keep the most bytes that were answered in any second, and forget it slowly; outages do not count."""
        while self._delivered and self._delivered[0][0] < now_ns - 1_000_000_000:
            self._delivered.popleft()
        gap_s = min(GAP_S, (now_ns - self._delivered[-1][0]) / 1e9) if self._delivered else GAP_S
        self._delivered.append((now_ns, size))
        rate = float(sum(size for _, size in self._delivered))
        self._proven = max(rate, self._proven * 0.5 ** (gap_s / HALF_LIFE_S))

    def _hear(self, sent_ns: int, now_ns: int) -> None:
        if self.lost:  # that was an outage; it says nothing of how many frames get lost else
            self._outcomes.clear()
        self._record(sent_ns, answered=True)
        self._answered_sent_ns = max(self._answered_sent_ns, sent_ns)
        self._heard_ns = now_ns if self._heard_ns is None else max(self._heard_ns, now_ns)
        self._misses = 0

    def _record(self, sent_ns: int, *, answered: bool) -> None:
        self._outcomes[sent_ns] = answered
        while len(self._outcomes) > OUTCOMES:
            self._outcomes.popitem(last=False)

    def _contradict(self, size: int, ms: float) -> bool:
        """Forget what was known when frame after frame says otherwise, all in the same direction."""
        if self._rtt_ms is None or self._ms_per_byte is None:
            return False
        off_ms = ms - self._rtt_ms - size * self._ms_per_byte
        if abs(off_ms) <= CONTRADICTS_RATIO * size * self._ms_per_byte + CONTRADICTS_MS:
            self._against = 0
            return False
        direction = 1 if off_ms > 0 else -1
        self._against = self._against + direction if self._against * direction > 0 else direction
        if abs(self._against) < CONTRADICTIONS:
            return False
        self._against = 0
        while len(self._samples) >= CONTRADICTIONS:
            self._samples.popleft()
        if direction > 0:  # what was carried before is not carried now
            self._proven = float(sum(size for _, size in self._delivered))
        return True

    def _remember_floor(self, now_ns: int, ms: float) -> None:
        while self._floors and self._floors[-1][1] >= ms:
            self._floors.pop()
        self._floors.append((now_ns, ms))
        while self._floors[0][0] < now_ns - FLOOR_NS:
            self._floors.popleft()

    def _fit(self, now_ns: int) -> None:
        """Part the times of recent frames in a round trip and a time for each byte."""
        known_ms = self._floors[0][1] if self._floors else math.inf
        if self._rtt_ms is not None and (now_ns - self._fitted_ns < FITTED_NS or not self._floors):
            known_ms = min(known_ms, self._rtt_ms)
        free = self._fit_sizes()
        waited = [(sample.gap_ms, sample.size) for sample in self._samples if sample.gap_ms is not None]
        rest = [sample for sample in self._samples if sample.gap_ms is None]
        if len(waited) >= CONTRADICTIONS or not rest:
            ms_per_byte = _median([gap_ms / size for gap_ms, size in waited])
            unlike_ms = _median([abs(gap_ms - size * ms_per_byte) for gap_ms, size in waited])
            # Gaps alone do not lower the round trip: were it taken for shorter, ever more frames would seem to wait.
            rtt_ms = known_ms
            if free is not None and free.unlike_ms <= unlike_ms:  # no queue, but a longer way
                rtt_ms, ms_per_byte = free.rtt_ms, free.ms_per_byte
                self._fitted_ns = now_ns
        else:
            middle_ms = _median([sample.ms for sample in rest])
            middle_size = _median([float(sample.size) for sample in rest])
            rtt_ms, ms_per_byte = known_ms, max(0.0, middle_ms - known_ms) / middle_size
            if free is not None and 2 * free.spread <= max(free.ms_per_byte, ms_per_byte):
                rtt_ms, ms_per_byte = free.rtt_ms, free.ms_per_byte
                self._fitted_ns = now_ns
        over = sorted((max(LEAST_MS, sample.ms - rtt_ms), sample.size) for sample in self._samples)
        late_ms = over[min(len(over) - 1, int(0.9 * len(over)))][0]
        if _median([float(size) for _, size in over]) * ms_per_byte <= min(late_ms, NOISE_MS):
            # Transfers drown in noise, so the link is at least as fast as the luckier frames say.
            lucky = sorted(ms / size for ms, size in over)
            ms_per_byte = min(ms_per_byte, lucky[len(lucky) // 4])
        largest = max(size for _, size in over)
        self._rtt_ms, self._ms_per_byte = rtt_ms, max(ms_per_byte, LEAST_MS / largest)

    def _fit_sizes(self) -> _Fit | None:
        """What sizes alone say, were none of the frames kept waiting; None where too few are apart."""
        sizes = np.array([sample.size for sample in self._samples], np.float64)
        whole_ms = np.array([sample.whole_ms for sample in self._samples])
        one, other = _pairs(len(sizes))
        apart = np.maximum(sizes[one], sizes[other]) >= APART * np.minimum(sizes[one], sizes[other])
        one, other = one[apart], other[apart]
        if len(one) < PAIRS:
            return None
        slopes = np.sort((whole_ms[one] - whole_ms[other]) / (sizes[one] - sizes[other]))
        low, slope, high = (float(slopes[len(slopes) * quarter // 4]) for quarter in (1, 2, 3))
        slope = max(0.0, slope)
        rest_ms = whole_ms - sizes * slope
        rtt_ms = max(0.0, _median(rest_ms.tolist()))
        unlike_ms = _median(np.abs(rest_ms - rtt_ms).tolist())
        return _Fit(rtt_ms, slope, high - low, unlike_ms)


@lru_cache(maxsize=2 * SAMPLES)
def _pairs(count: int) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Each of `count` with each after it, as two arrays of indices."""
    one, other = np.triu_indices(count, 1)
    return one, other


def _median(values: list[float]) -> float:
    ordered = sorted(values)
    return ordered[len(ordered) // 2]
