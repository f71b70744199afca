"""Carries out the kills of a scenario at their times, on a thread of its own."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from runtime.scenario import Kill

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Step:
    """One thing to do at its time: something goes down, or comes back."""

    at_s: float
    kill: Kill
    comes_back: bool


def steps(kills: Sequence[Kill]) -> tuple[Step, ...]:
    """The kills and their ends, in the order of time."""
    downs = [Step(kill.at_s, kill, False) for kill in kills]
    ups = [Step(kill.at_s + kill.down_s, kill, True) for kill in kills]
    return tuple(sorted(downs + ups, key=lambda step: step.at_s))


class Strikes:
    """Calls `act` for every step at its time after `start_s` of time.monotonic(), and `end` after `duration_s`.

    All on one thread, which the context's end stops and joins. What `act` raises ends the thread and calls `end`, and
    the context's end raises it.
    """

    def __init__(
        self, kills: Sequence[Kill], duration_s: float, act: Callable[[Step], None], end: Callable[[], None]
    ) -> None:
        self._steps = steps(kills)
        self._duration_s = duration_s
        self._act = act
        self._end = end
        self._start_s = 0.0
        self._fault: Exception | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="kinflow-strikes", daemon=True)

    def __enter__(self) -> Strikes:
        return self

    def __exit__(self, *failure: object) -> None:
        self._stop.set()
        if self._thread.ident is not None:
            self._thread.join()
        if self._fault is not None:
            raise self._fault

    def begin(self, start_s: float) -> None:
        """Start the clock, as of `start_s`. To be called once."""
        self._start_s = start_s
        self._thread.start()

    def _run(self) -> None:
        try:
            for step in self._steps:
                if self._waits(step.at_s):
                    return
                log.debug("%s %s", step.kill.what, "comes back" if step.comes_back else "is killed")
                self._act(step)
            if self._waits(self._duration_s):
                return
        except Exception as error:  # noqa: BLE001 — of this thread nobody hears; the context's end raises it
            self._fault = error
        self._end()

    def _waits(self, at_s: float) -> bool:
        """Wait until a time of the scenario; whether it was stopped before."""
        left_s = self._start_s + at_s - time.monotonic()
        # A wait has a longest length, and a link that never changes none.
        return self._stop.wait(max(0.0, min(left_s, threading.TIMEOUT_MAX)))
