"""Answers in the order of their frames, though tiers give them in any order. Pure.

Every frame that is taken is expected, in the order of taking, and settled once, by an answer or by none; a value is
given on when all frames before its own are settled. Nothing waits for longer than the slowest frame before it, so no
clock is needed: a device settles every frame within its budget.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Generic, TypeVar

MOST_WAITING = 64

Value = TypeVar("Value")
_OPEN = object()


class InOrder(Generic[Value]):
    """Holds settled values back until the frames before them are settled.

    At most `most` frames wait; with one more the oldest is passed over, and its value refused when it comes.
    """

    def __init__(self, most: int = MOST_WAITING) -> None:
        self._most = most
        self._frames: OrderedDict[int, Value | object | None] = OrderedDict()  # by key, in the order of taking

    def __len__(self) -> int:
        """Frames that wait, for an answer or for others'."""
        return len(self._frames)

    def expect(self, key: int) -> list[Value]:
        """A frame was taken. Returns the values that are free because the oldest frame was passed over for it.

        Args:
            key: stands for the frame and is used once, as is the time of its grab.
        """
        self._frames[key] = _OPEN
        if len(self._frames) > self._most:
            self._frames.popitem(last=False)
        return self._free()

    def settle(self, key: int, value: Value | None) -> list[Value] | None:
        """A frame has its value, or never gets one. Returns the values that are free now, in the order of their frames.

        None: the frame is not expected any more, so its value is too late.
        """
        if self._frames.get(key) is not _OPEN:
            return None
        self._frames[key] = value
        return self._free()

    def _free(self) -> list[Value]:
        values: list[Value] = []
        while self._frames:
            key, value = next(iter(self._frames.items()))
            if value is _OPEN:
                break
            del self._frames[key]
            if value is not None:
                values.append(value)  # type: ignore[arg-type]  # only _OPEN is no Value
        return values
