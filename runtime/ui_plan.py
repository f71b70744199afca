"""What a device that plans has told of its plans, beside what its answers turned out to be. Pure."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import Annotated

import msgspec

Word = Annotated[str, msgspec.Meta(max_length=1000)]
Amount = Annotated[float, msgspec.Meta(ge=0, le=1e12)]

MEASURED_S = 60.0  # at most, and since the plan was taken
MOST_MOVES = 20
MOST_MEASURED = 2000


class Plan(msgspec.Struct, frozen=True):
    """A plan as the page reads it; what it does not know is left alone (docs/planner.md)."""

    plan: Word
    why: Word = ""
    reason: Word = ""
    rung: Word = ""
    kept: bool = True
    cut: int | None = None  # None: nothing goes up
    latency_p95_ms: Amount | None = None
    bytes_a_frame: Amount | None = None


@dataclass(frozen=True, slots=True)
class Measured:
    """What the answers since the plan was taken were, for at most a minute."""

    answers: int
    age_p95_ms: float  # of those that went up, where the plan sends anything; else of all
    bytes_a_frame: float  # mean, answers of early exits counted as none


@dataclass(slots=True)
class Planning:
    """The plans of one device."""

    plan: Plan | None = None
    since_s: float = 0.0
    moves: deque[tuple[float, Plan]] = field(default_factory=lambda: deque(maxlen=MOST_MOVES))
    _answers: deque[tuple[float, float, int]] = field(default_factory=lambda: deque(maxlen=MOST_MEASURED))

    def take(self, plan: Plan, now_s: float) -> None:
        """A plan was told; the first one may be old, as it is retained, and is no move."""
        if self.plan is not None and plan != self.plan:
            self.moves.append((now_s, plan))
        if self.plan is None or plan != self.plan:
            self.since_s = now_s
            self._answers.clear()
        self.plan = plan

    def answered(self, age_ms: float, bytes_up: int, now_s: float) -> None:
        """A frame was computed and answered."""
        self._answers.append((now_s, age_ms, bytes_up))

    def measured(self, now_s: float) -> Measured | None:
        """None: no answer has come by this plan yet."""
        while self._answers and self._answers[0][0] < now_s - MEASURED_S:
            self._answers.popleft()
        if not self._answers or self.plan is None:
            return None
        ages = sorted(age_ms for _, age_ms, bytes_up in self._answers if bytes_up or self.plan.cut is None)
        mean = sum(bytes_up for _, _, bytes_up in self._answers) / len(self._answers)
        p95 = ages[min(len(ages) - 1, int(0.95 * len(ages)))] if ages else 0.0
        return Measured(len(self._answers), p95, mean)
