"""Whether somebody is still at the other end of a connection. Pure: times are given.

A half-open connection looks like an idle one: packets into it vanish and nothing comes back. TCP itself takes many
minutes to notice, and never does if there is nothing to send.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

Progress = tuple[int, int]  # bytes that the other machine has taken so far, and bytes that it should take still


class Heartbeat:
    """Asks for a beat when nothing was heard for `every_s`, and gives up when nothing was heard for as long again.

    A slow link that is full takes long to deliver the beat. So while what stood before the beat is still being taken by
    the other machine, that counts as life; what it takes after that does not, as a machine takes bytes for a
    broker that hangs. With an `every_s` of 0 it asks for nothing.
    """

    def __init__(self, every_s: float) -> None:
        self._every_s = every_s
        self._since_s = 0.0  # when something was last heard, or the beat was sent, or got on
        self._beating = False
        self._taken = self._target = 0

    def heard(self, now_s: float) -> None:
        """Take note that something came, or that the connection has just been made."""
        self._since_s = now_s
        self._beating = False

    def look(self, now_s: float, progress: Callable[[], Progress | None]) -> Literal["", "beat", "dead"]:
        """What to do now: nothing, send a beat, or give the connection up; `progress` is asked only in need."""
        if not self._every_s or (now_s - self._since_s < self._every_s and not self._beating):
            return ""
        taken, left = progress() or (0, 0)
        if not self._beating:
            self._beating, self._since_s = True, now_s
            self._taken, self._target = taken, taken + left
            return "beat"
        if taken > self._taken and self._taken < self._target:
            self._taken, self._since_s = taken, now_s
        return "dead" if now_s - self._since_s >= self._every_s else ""
