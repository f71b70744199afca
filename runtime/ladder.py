"""The declared ladder: what a device gives up first, second and last, what makes it do so, and how it comes back. Pure.

| rung               | what it leaves to the planner             | trigger                                | way back   |
|--------------------|-------------------------------------------|----------------------------------------|------------|
| full               | everything                                |                                        |            |
| smaller rate       | half the bytes of a frame at most         | a fifth of what was sent was late      | calm, wide |
| deeper local exit  | the deepest cut, a quarter of the bytes   | two fifths, or a fifth again           | calm, wide |
| local variant only | nothing goes up                           | the link is lost                       | it is back |
| gate only          | a frame a second; the gate answers others | low voltage, throttling, or hot        | calm       |

Within a rung the planner steps finely by what it predicts; rungs are for what its predictions did not foresee. Frames
sent are those of the last three seconds, and ten at least, two of them late: so one stall of the link is no reason yet.
`calm` is `CALM_MS` without the trigger, doubled each time the rung is taken again soon after it was left; `wide` a link
known to be twice as fast as when the rung was taken, which leads back to the full rung at once. A warm board, short of
a hot one, keeps its rung and does the least work on the device that still sends.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass, replace

from runtime.thermals import Board

CALM_MS, MAX_CALM_MS = 4000.0, 64_000.0
COOL_CELSIUS = 5.0  # below the trigger before it counts as gone
WIDER = 2.0  # times the goodput that there was when a rung was taken
RECENT, MOST_RECENT = 10, 256  # frames sent: at least so many are looked at, at most so many kept
RECENT_NS = 3_000_000_000
LEAST_LATE = 2
LATE_SMALLER, LATE_DEEPER = 0.2, 0.4  # shares
OUTDATED_NS = 10_000_000_000  # what was late so long ago is no trigger any more
RUNGS = ("full", "smaller rate", "deeper local exit", "local variant only", "gate only")
FULL, SMALLER, DEEPER, LOCAL, GATE = range(5)


@dataclass(frozen=True, slots=True)
class Limits:
    """What a rung leaves to the planner."""

    rung: str = RUNGS[FULL]
    reason: str = ""  # in words, why this rung
    sends: bool = True  # whether anything may go up
    max_bytes: float = math.inf  # of a frame, mean
    deepest: bool = False  # what goes up goes up from as deep as may be
    fastest: bool = False  # only the least work on this device
    computes: bool = True  # whether frames are computed at all, or the gate alone answers


FREE = Limits()


class Ladder:
    """Where a device stands on the ladder. The caller keeps its calls in one thread at a time."""

    def __init__(self, *, warm_celsius: float, hot_celsius: float) -> None:
        self._warm, self._hot = warm_celsius, hot_celsius
        self._recent: deque[tuple[int, bool]] = deque(maxlen=MOST_RECENT)
        self._rung = FULL
        self._reason = ""
        self._bytes = self._goodput = math.inf  # of a frame, and of the link, when the rung was taken
        self._seen_ns = 0  # when the trigger of this rung was last there
        self._left_ns: int | None = None
        self._calm_ms = CALM_MS
        self._is_warm = self._is_hot = False

    def sent(self, now_ns: int, *, late: bool) -> None:
        """A frame that went up was answered, or not in time."""
        self._recent.append((now_ns, late))

    def moved(self) -> None:
        """Another plan is in force: what was late under the one before says nothing of it."""
        self._recent.clear()

    def step(
        self, now_ns: int, *, lost: str | None, board: Board | None, bytes_now: float, goodput: float | None = None
    ) -> Limits:
        """Where to stand now.

        Args:
            now_ns: the time.
            lost: why the link counts as lost, in words; None: it does not.
            board: heat and power of the board; None: it says nothing.
            bytes_now: mean bytes of a frame by the plan in force; what "half" refers to.
            goodput: of the link as it is known now, bytes a second.
        """
        wanted, reason = self._trigger(now_ns, lost, board)
        if wanted > self._rung or (wanted == self._rung and wanted != FULL):
            if wanted > self._rung:
                if self._rung == FULL:
                    soon = self._left_ns is not None and now_ns - self._left_ns < 4 * self._calm_ms * 1e6
                    self._calm_ms = min(MAX_CALM_MS, 2 * self._calm_ms) if soon else CALM_MS
                    self._bytes = bytes_now if bytes_now > 0 else math.inf
                self._rung = wanted
                self._goodput = goodput or math.inf
                self._recent.clear()
            self._seen_ns, self._reason = now_ns, reason
        elif wanted == FULL and self._rung in (SMALLER, DEEPER) and (goodput or 0.0) >= WIDER * self._goodput:
            self._rung, self._left_ns, self._reason = FULL, now_ns, ""
        elif wanted < self._rung and (self._rung == LOCAL or now_ns - self._seen_ns >= self._calm_ms * 1e6):
            if self._rung == LOCAL:
                self._recent.clear()  # what was late then is no news
                wanted = FULL
            # The link says at once that it is back; all else has to stay away for a while, rung by rung.
            self._rung = wanted if self._rung >= LOCAL else self._rung - 1
            self._seen_ns = now_ns
            self._left_ns = now_ns if self._rung == FULL else self._left_ns
            self._reason = reason or f"nothing has kept it lower for {self._calm_ms / 1000:g} s"
        limits = self._limits()
        if self._is_warm and self._rung < LOCAL:
            warm = f"the board is warm, {self._warm:g} °C or more"
            limits = replace(limits, fastest=True, reason=limits.reason or warm)
        return limits

    def _trigger(self, now_ns: int, lost: str | None, board: Board | None) -> tuple[int, str]:
        """The lowest rung that anything asks for, and what asks."""
        if board is not None and board.celsius is not None:
            self._is_warm = board.celsius >= self._warm - (COOL_CELSIUS if self._is_warm else 0)
            self._is_hot = board.celsius >= self._hot - (COOL_CELSIUS if self._is_hot else 0)
        if board is not None and board.undervoltage:
            return GATE, "the board's supply voltage is too low"
        if board is not None and board.throttled:
            return GATE, "the board throttles its processor"
        if self._is_hot and board is not None:
            return GATE, f"the board is hot, {board.celsius:.0f} of {self._hot:g} °C"
        if lost is not None:
            return LOCAL, lost
        sent = [
            (at_ns, late)
            for place, (at_ns, late) in enumerate(reversed(self._recent))
            if place < RECENT or now_ns - at_ns < RECENT_NS
        ]
        late = sum(late for at_ns, late in sent if now_ns - at_ns < OUTDATED_NS)
        if late >= max(LEAST_LATE, LATE_SMALLER * len(sent)):
            sentence = f"{late} of the last {len(sent)} frames that went up were late"
            # Once at a rung, what was late before it is forgotten, so the next one needs as much again.
            deeper = late >= LATE_DEEPER * max(RECENT, len(sent)) or self._rung == SMALLER
            return (DEEPER if deeper else SMALLER), sentence
        return FULL, ""

    def _limits(self) -> Limits:
        rung, reason = RUNGS[self._rung], self._reason
        if self._rung == SMALLER:
            return Limits(rung, reason, max_bytes=self._bytes / 2)
        if self._rung == DEEPER:
            return Limits(rung, reason, max_bytes=self._bytes / 4, deepest=True)
        if self._rung == LOCAL:
            return Limits(rung, reason, sends=False)
        if self._rung == GATE:
            return Limits(rung, reason, sends=False, fastest=True, computes=False)
        return FREE
