"""Does a promise about a mean still hold? Told from a few drawn losses, with a bound for finite samples. Pure.

Betting (Waudby-Smith and Ramdas 2024): a gambler who bets that the mean lies on the other side of the target multiplies
a capital by 1 + stake x (loss - target), or the reverse; while the hypothesis is true the capital is a nonnegative
supermartingale, so that it reaches 1 / error with a chance of `error` at most, whenever one looks (Ville). A capital
that may start again at 1 with every loss detects a change at any time (Shin, Ramdas and Rinaldo 2024, e-detectors): the
mean number of losses until a false alarm is 1 / error at least. Several stakes share the capital.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

ABOVE_STAKES = (0.05, 0.15, 0.4)  # of the greatest allowed, 1 / target: for means far above the target to just above
BELOW_STAKES = (0.5, 1.0)  # of the greatest allowed, 1 / (1 - target)
FALSE_ALARM = 5e-3  # one over the mean number of losses until a false alarm
STEP = math.sqrt(0.5)  # between two levels
LEVELS = 8  # of the threshold; one more is never to repeat


class Detector:
    """Raises an alarm when the mean of losses in 0..1 is not on the believed side of `target` any more.

    `above`: believed is a mean of at most `target`; otherwise of at least `target`.
    """

    def __init__(self, target: float, *, above: bool) -> None:
        greatest = 1 / target if above else -1 / (1 - target)
        self._target = target
        self._stakes = [greatest * share for share in (ABOVE_STAKES if above else BELOW_STAKES)]
        self._capital = [1.0] * len(self._stakes)

    def observe(self, loss: float) -> bool:
        """Take the next loss. Returns whether there is an alarm."""
        gain = loss - self._target
        self._capital = [
            max(1.0, capital) * max(0.0, 1 + stake * gain)
            for capital, stake in zip(self._capital, self._stakes, strict=True)
        ]
        return sum(self._capital) / len(self._capital) >= 1 / FALSE_ALARM


def refutes_above(losses: Iterable[float], target: float, error: float) -> bool:
    """Whether losses in 0..1 refute that their mean is at least `target`, but for a chance of `error`.

    The losses are independent, or each has that mean given those before it.
    """
    stakes = [share / (1 - target) for share in BELOW_STAKES]
    logs = [0.0] * len(stakes)
    for loss in losses:
        logs = [
            log + math.log(max(1e-300, 1 + stake * (target - loss))) for log, stake in zip(logs, stakes, strict=True)
        ]
        if sum(math.exp(min(log, 700.0)) for log in logs) / len(logs) >= 1 / error:
            return True
    return False


class Level:
    """How far below the fitted threshold the one in force is: tightened when the promise is broken, loosened when a
    looser one is shown to keep it.

    Level 0 is the fitted threshold, level LEVELS never repeats.
    """

    def __init__(self, allowed: float) -> None:
        self._allowed = allowed  # mean loss
        self.number = 0
        self._broken, self._kept = self._detectors()

    def _detectors(self) -> tuple[Detector, Detector]:
        return Detector(self._allowed, above=True), Detector(self._allowed, above=False)

    def share(self, number: int | None = None) -> float:
        """The threshold at a level, the one in force by default, as a share of the fitted one."""
        chosen = self.number if number is None else number
        return 0.0 if chosen >= LEVELS else STEP**chosen

    def observe(self, loss: float, looser_loss: float) -> int:
        """Take one drawn frame: its loss at this level, and what it would be one level looser, both 0 if computed.

        Returns 1 when the level was tightened, -1 when it was loosened, else 0.
        """
        change = 0
        if self._broken.observe(loss) and self.number < LEVELS:
            change = 1
        elif self._kept.observe(looser_loss) and self.number > 0:
            change = -1
        if change:
            self.number += change
            self._broken, self._kept = self._detectors()
        return change
