"""What a link carries, told from frames far smaller than it could carry, and through its stalls. Pure.

A discrete Bayes filter (Thrun, Burgard, Fox: Probabilistic Robotics, 2005, chapter 4) over goodput, on a grid that is
even in its logarithm. Each goodput of the grid has a model of the link of its own, a pipe in which frames pass one
after the other in `bytes / goodput` each (but for a packet's worth that passes at once after a pause), with the
shortest round trip that frames which had not to wait in it have shown. An answer that comes when a pipe says speaks for
it. One that comes late speaks against it, but never more than a stall is unlikely: TCP holds up everything behind a
lost segment, and then it comes at once. One that comes early speaks against it. So sizes that differ, queues that grow
and bursts all count for what they are worth, and where nothing tells two goodputs apart the prior does. What was
learned is slowly forgotten in favour of the prior, so that a link that changes is followed after a few frames, and what
has not been told for long is worth a try.

Times are milliseconds of one monotonic clock.
"""

from __future__ import annotations

import math
from collections import deque

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

LEAST, MOST, STEPS = 2e3, 12.5e6, 44  # bytes a second
USUAL, SPREAD = 250e3, 1.5  # of the prior: its middle, and its standard deviation in natural logarithms
BURST_BYTES = 1500  # that a link lets through at once after a pause, as shapers do; a full packet
FORGOTTEN_MS, FORGETS_MS = 40_000.0, 200.0  # in which all but 1/e of what was learned is forgotten; at how long steps
RISE, MOST_RISE_MS = 0.075, 100.0  # by which share of the time the shortest round trip rises; with an answer at most
STALL_SHARE, STALL_MS, MOST_MS = 0.08, 350.0, 2000.0  # of answers; how late on average; later tells nothing more
TELLS_MS = 8.0  # a frame that takes less than this tells nothing of how fast the link is
EARLY_MS = 12.0
LEAST_NOISE_MS, MOST_NOISE_MS = 5.0, 40.0
UNLIKELY = -9.0  # natural logarithm: no answer speaks more against a goodput
CAREFUL, HOPEFUL = 0.3, 0.8  # quantiles: that is planned with, and for which it is worth to try
LOOKED_BACK, FEW, RECENT_MS = 48, 3, 4000.0  # answers looked back at: at most, at least, and of how long
JITTER = 0.9  # quantile
FOLLOWED = 256  # sent and not answered: so many are followed, as where nobody answers there is no end of them

GRID: Floats = np.geomspace(LEAST, MOST, STEPS)
LOGS: Floats = np.log(GRID)
LOGS_FROM, LOGS_STEP = float(LOGS[0]), float(LOGS[1] - LOGS[0])
MS_PER_BYTE: Floats = 1000 / GRID
BURST_MS: Floats = BURST_BYTES * MS_PER_BYTE
PRIOR: Floats = np.exp(-0.5 * ((LOGS - math.log(USUAL)) / SPREAD) ** 2)
PRIOR /= PRIOR.sum()


class GoodputFilter:
    """Learns from what goes up and what comes back. The caller keeps its calls in one thread at a time."""

    def __init__(self) -> None:
        self._belief = PRIOR.copy()  # in proportion
        self._free_ms = np.full(STEPS, -math.inf)  # when each pipe is free for the next frame that is not answered yet
        self._rtt_ms = np.full(STEPS, math.inf)  # the shortest lately
        # What has gone up since the last frame that was answered: when, bytes, and whether it is a frame.
        self._sent: deque[tuple[float, int, bool]] = deque(maxlen=FOLLOWED)
        self._passed_ms = -math.inf  # when that answer was here
        self._asked_ms = self._forgot_ms = -math.inf  # when the frame last answered went up; when last was forgotten
        self._noise_ms = 2 * LEAST_NOISE_MS
        self._late_ms = np.zeros((LOOKED_BACK, STEPS))  # of recent answers, in a ring: how late by each goodput
        self._at_ms = np.zeros(LOOKED_BACK)  # when they came
        self._sizes: deque[int] = deque(maxlen=LOOKED_BACK)
        self._answers = 0
        self._place = _place(USUAL)  # in the grid, of what is planned with
        self._estimate: tuple[float, float, float] | None = None  # since the last answer

    @property
    def known(self) -> bool:
        """Whether enough answers have come."""
        return self._answers >= FEW

    def sent(self, at_ms: float, size: int) -> None:
        """A frame of `size` bytes has gone up."""
        self._sent.append((at_ms, size, True))

    def beside(self, at_ms: float, size: int) -> None:
        """So many bytes have gone up that nobody answers."""
        if self._sent and not self._sent[-1][2]:
            at_ms, size = self._sent[-1][0], size + self._sent.pop()[1]
        self._sent.append((at_ms, size, False))

    def withdrawn(self) -> None:
        """The frame that was said to go up last did not."""
        place = max((place for place, (_, _, frame) in enumerate(self._sent) if frame), default=None)
        if place is not None:
            del self._sent[place]

    def reconnected(self) -> None:
        """All that was on its way is gone, and the link may be another one."""
        self._sent.clear()
        self._free_ms = np.full(STEPS, -math.inf)
        self._passed_ms = -math.inf
        self._belief = 0.5 / float(self._belief.sum()) * self._belief + 0.5 * PRIOR
        self._estimate = None

    def passed(self, sent_ms: float, at_ms: float) -> None:
        """The answer to the frame that went up at `sent_ms` came; the node's own time is taken off `at_ms`."""
        if self._answers:
            self._forget(at_ms)
        done_ms = self._free_ms
        waited: NDArray[np.bool_] | None = None
        while self._sent and self._sent[0][0] <= sent_ms and waited is None:
            when_ms, size, frame = self._sent.popleft()
            if frame and when_ms == sent_ms:
                waited = done_ms > when_ms
            done_ms = np.maximum(done_ms, when_ms - BURST_MS) + size * MS_PER_BYTE
        if waited is None:  # later ones were answered before it
            self._free_ms = done_ms
            return
        trip_ms = at_ms - np.maximum(done_ms, sent_ms)
        if not self._answers:
            self._rtt_ms, self._forgot_ms, self._asked_ms = np.maximum(trip_ms, 0.0), at_ms, sent_ms
        rtt_ms = self._rtt_ms
        late_ms = trip_ms - rtt_ms
        self._late_ms[self._answers % LOOKED_BACK] = late_ms
        self._at_ms[self._answers % LOOKED_BACK] = at_ms
        off_ms = self._learn(np.minimum(late_ms, min(MOST_MS, at_ms - self._passed_ms)))
        # Two thirds of the answers are within it: stalls, as few as they are, do not widen it.
        noise_ms = self._noise_ms * (1.1 if off_ms > self._noise_ms else 0.95)
        self._noise_ms = min(MOST_NOISE_MS, max(LEAST_NOISE_MS, noise_ms))
        self._answers += 1
        self._sizes.append(size)
        # By the time between frames, not answers: a stall makes no way longer.
        rise_ms = max(0.0, min(MOST_RISE_MS, RISE * (sent_ms - self._asked_ms)))
        self._asked_ms = sent_ms
        self._passed_ms = max(self._passed_ms, at_ms)
        self._free_ms = np.minimum(done_ms, at_ms - rtt_ms)
        self._rtt_ms = np.where(waited, rtt_ms, np.minimum(rtt_ms + rise_ms, np.maximum(trip_ms, 0.0)))
        self._estimate = None

    def estimate(self) -> tuple[float, float, float]:
        """Goodput to plan with, and to hope for, bytes a second; and the round trip of a message of no bytes, in ms."""
        if self._estimate is None:
            belief = (self._belief * (1 / float(self._belief.sum()))).tolist()
            careful, hopeful = _quantile(belief, CAREFUL), _quantile(belief, HOPEFUL)
            largest = max(BURST_BYTES, max(self._sizes, default=0))
            goodput = min(math.exp(careful), largest / TELLS_MS * 1000)
            self._place = _place(goodput)
            rtt_ms = float(self._rtt_ms[self._place])
            self._estimate = goodput, math.exp(hopeful), rtt_ms if math.isfinite(rtt_ms) else 0.0
        return self._estimate

    def passes_ms(self, now_ms: float, size: float, goodput: float) -> float:
        """How long it takes at this goodput until a frame that went up now would have passed, all before it too."""
        free_ms = float(self._free_ms[_place(goodput)])
        for at_ms, before, _ in (*self._sent, (now_ms, size, True)):
            free_ms = max(free_ms, at_ms - BURST_BYTES / goodput * 1000) + before / goodput * 1000
        return max(0.0, free_ms - now_ms)

    @property
    def jitter_ms(self) -> float:
        """By how much the slowest tenth of recent answers were later than what is known says."""
        count = min(self._answers, LOOKED_BACK)
        if count < FEW:
            return 0.0
        rows = np.arange(self._answers - count, self._answers) % LOOKED_BACK
        recent = self._at_ms[rows] >= self._passed_ms - RECENT_MS
        recent[-FEW:] = True
        late = np.sort(self._late_ms[rows[recent], self._place])
        return max(0.0, float(late[int(JITTER * (len(late) - 1))]))

    def _forget(self, at_ms: float) -> None:
        """Let the link have changed, a little; if it has, all but its goodput is as the likeliest pipe says."""
        since_ms = at_ms - self._forgot_ms
        if since_ms < FORGETS_MS:
            return
        self._forgot_ms = at_ms
        best = int(np.argmax(self._belief))
        kept = math.exp(-since_ms / FORGOTTEN_MS)
        anew = (1 - kept) * PRIOR
        self._belief = (kept / float(self._belief.sum())) * self._belief + anew
        anew /= self._belief
        # Upwards only: those who expect a long way themselves may be right that it has become longer.
        self._rtt_ms += anew * np.maximum(self._rtt_ms[best] - self._rtt_ms, 0.0)

    def _learn(self, late_ms: Floats) -> float:
        """Weigh each goodput by how well it foretold an answer. Returns how far off the likeliest one was, in ms."""
        # Logarithms, but for what all have in common: early, else as usual or stalled.
        stalled = math.log(STALL_SHARE / STALL_MS) - math.log((1 - STALL_SHARE) / (2 * self._noise_ms))
        late = np.maximum(late_ms * (-1 / self._noise_ms), stalled - late_ms * (1 / STALL_MS))
        told = np.minimum(late_ms * (1 / EARLY_MS), late)
        self._belief *= np.exp(np.maximum(told - told.max(), UNLIKELY))
        best = int(self._belief.argmax())
        self._belief *= 1 / float(self._belief[best])
        return abs(float(late_ms[best]))


def _quantile(belief: list[float], share: float) -> float:
    """The logarithm of the goodput below which so much of the belief lies; between two of the grid in proportion."""
    below = before = 0.0
    for place, one in enumerate(belief):
        middle = below + one / 2
        if middle >= share:
            part = (share - before) / (middle - before) if place else 1.0
            return LOGS_FROM + (place - 1 + part) * LOGS_STEP
        below, before = below + one, middle
    return LOGS_FROM + (len(belief) - 1) * LOGS_STEP


def _place(goodput: float) -> int:
    return max(0, min(STEPS - 1, round((math.log(goodput) - LOGS_FROM) / LOGS_STEP)))
