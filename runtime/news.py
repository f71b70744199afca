"""Which Results are published. Pure; times are given.

A Result in JSON takes 400 to 900 bytes with its topic, often more than the features it came from. Where the link is
slow or paid by the byte and nobody needs a word about every frame, what has changed is enough.
"""

from __future__ import annotations

from typing import Literal

from runtime.datatypes import Result

Choice = Literal["all", "changes", "none"]

SILENT_NS = 1_000_000_000  # an answer that stays the same is published again after so long


class News:
    """Chooses among the Results of a device. The caller keeps its calls in one thread at a time for each camera."""

    def __init__(self, choice: Choice) -> None:
        self._choice = choice
        self._last: dict[str, tuple[int, str, bool]] = {}  # by camera: when, label, whether it was degraded

    def takes(self, result: Result, now_ns: int) -> bool:
        """Whether a Result is to be published."""
        if self._choice != "changes":
            return self._choice == "all"
        said = (result.label, result.degraded is not None)
        last_ns, *before = self._last.get(result.camera, (now_ns - SILENT_NS, None, None))
        if tuple(before) == said and now_ns - last_ns < SILENT_NS:
            return False
        self._last[result.camera] = (now_ns, *said)
        return True
