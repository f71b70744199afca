"""What has to reach a broker and waits for it: in order, bounded in number, bytes and age. Pure: times are given.

A letter stays until the broker has confirmed it. Few are on their way at once, and one that comes back unconfirmed
keeps its place, so the order holds, and what was confirmed without our hearing of it goes out twice: receivers drop
what they have seen (`inbox`). Where the broker says that nobody listens, one letter at a time asks again, more and
more rarely. What could not go at once is late, and late letters go at a limited rate (a token bucket), so that the end
of an outage is no flood.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

WINDOW = 8  # letters on their way at once
REFUSED = "refused by the broker"  # the word for one that it will not have
UNHEARD = "unheard"  # the word for a letter that the broker took and had nobody to give to
PAUSE_MIN_NS, PAUSE_MAX_NS = 1_000_000_000, 30_000_000_000  # between two letters that ask whether anybody listens
BURST_S = 0.5  # what a rest adds up to at most: late letters of so many seconds go at once


@dataclass(frozen=True, slots=True)
class Letter:
    """One message that waits."""

    number: int  # its place in the order
    topic: str
    payload: bytes
    put_ns: int  # time.monotonic_ns()
    born_ns: int | None = None  # what its age counts from, in the same time; None: nobody knows

    @property
    def size_bytes(self) -> int:
        """What it counts for against the bound."""
        return len(self.topic) + len(self.payload)


@dataclass(frozen=True, slots=True)
class Limits:
    """What an outbox holds, and how fast late letters leave it."""

    messages: int
    size_bytes: int
    age_ns: int  # since it was put
    per_second: float


class Outbox:
    """Letters in order. Each leaves once, by `left(letter, why)`: "" when it was confirmed, else why it was lost.

    It holds no more than its limits allow, and at most WINDOW letters beside them, which were pushed out while they
    were on their way: they are lost only if they come back.
    """

    def __init__(self, limits: Limits, left: Callable[[Letter, str], None]) -> None:
        self._limits = limits
        self._left = left
        self._store: OrderedDict[int, Letter] = OrderedDict()  # by number, rising; those on their way among them
        self._under_way: dict[int, Letter] = {}
        self._size_bytes = 0
        self._last = 0  # the highest number put so far
        self._late = 0  # letters up to this number are late
        self._asking = True  # whether one letter goes alone until it is confirmed
        self._pause_ns = 0
        self._retry_ns = 0
        self._tokens = self._burst = max(1.0, limits.per_second * BURST_S)
        self._filled_ns: int | None = None

    def __len__(self) -> int:
        return len(self._store)

    @property
    def size_bytes(self) -> int:
        """Of all letters in the store."""
        return self._size_bytes

    @property
    def under_way(self) -> int:
        """Letters that were taken and not settled yet."""
        return len(self._under_way)

    def put(self, letter: Letter, *, late: bool = False) -> None:
        """Add a letter with a higher number than any before; the oldest make room for it.

        With `late` it counts as one that could not go at once.
        """
        assert letter.number > self._last, "numbers rise"
        first = self._first()
        self._last = letter.number
        if late or (first is not None and first.number <= self._late):
            self._late = letter.number
        if letter.size_bytes > self._limits.size_bytes:
            self._left(letter, "full")
            return
        self._store[letter.number] = letter
        self._size_bytes += letter.size_bytes
        while len(self._store) > self._limits.messages or self._size_bytes > self._limits.size_bytes:
            self._lose(next(iter(self._store)), "full")

    def connected(self) -> None:
        """There is a new connection: all that waits is late, and one letter asks first whether anybody listens."""
        self._late = self._last
        self._asking = True
        self._pause_ns = self._retry_ns = 0

    def take(self, now_ns: int) -> Letter | None:
        """The next letter to send now, which is then on its way until it is settled; None: not yet, or none is left."""
        self.expire(now_ns)
        if now_ns < self._retry_ns or len(self._under_way) >= (1 if self._asking else WINDOW):
            return None
        letter = self._first()
        if letter is None or (letter.number <= self._late and not self._may(now_ns)):
            return None
        self._under_way[letter.number] = letter
        return letter

    def settle(self, number: int, word: str, now_ns: int) -> bool:
        """Take the word on a letter: "" confirms it, UNHEARD or any other puts it back in its place.

        Returns:
            Whether a late letter was confirmed.
        """
        letter = self._under_way.pop(number, None)
        if letter is None:
            return False  # given up meanwhile
        if not word:
            self._asking = False
            self._pause_ns = self._retry_ns = 0
            if self._store.pop(number, None) is not None:
                self._size_bytes -= letter.size_bytes
            self._left(letter, "")
            return number <= self._late
        if word in (UNHEARD, REFUSED):
            self._late = self._last
            if now_ns >= self._retry_ns:  # not the rest of a window whose first letter has told it already
                self._pause_ns = min(max(self._pause_ns * 2, PAUSE_MIN_NS), PAUSE_MAX_NS)
                self._retry_ns = now_ns + self._pause_ns
        self._late = max(self._late, number)
        self._asking = True
        if number not in self._store:
            self._left(letter, "full")
        return False

    def expire(self, now_ns: int) -> None:
        """Lose what is too old and not on its way."""
        while (letter := self._first()) is not None and now_ns - letter.put_ns > self._limits.age_ns:
            self._lose(letter.number, "old")

    def ask_now(self) -> None:
        """Wait no longer for somebody to listen, nor for the rate: there is not much time left."""
        self._retry_ns = 0
        self._late = 0

    def give_up(self, reason: str) -> None:
        """Lose all that is left, on its way or not."""
        rest = self._under_way | self._store
        self._store.clear()
        self._under_way.clear()
        self._size_bytes = 0
        for number in sorted(rest):
            self._left(rest[number], reason)

    def _first(self) -> Letter | None:
        """The oldest letter that is not on its way; at most WINDOW older ones are."""
        return next((letter for number, letter in self._store.items() if number not in self._under_way), None)

    def _lose(self, number: int, reason: str) -> None:
        letter = self._store.pop(number)
        self._size_bytes -= letter.size_bytes
        if number not in self._under_way:
            self._left(letter, reason)

    def _may(self, now_ns: int) -> bool:
        """Whether a late letter may go; takes its token."""
        if self._filled_ns is not None:
            rested_s = (now_ns - self._filled_ns) / 1e9
            self._tokens = min(self._burst, self._tokens + rested_s * self._limits.per_second)
        self._filled_ns = now_ns
        if self._tokens < 1:
            return False
        self._tokens -= 1
        return True
