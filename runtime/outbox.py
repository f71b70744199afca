"""What has to reach a broker and waits for it: in order, bounded in number, bytes and age. Pure: times are given.

A letter waits until the broker has confirmed it. Few are on their way at once, and one that comes back unconfirmed
keeps its place, so the order holds, and what was confirmed without our hearing of it goes out twice: receivers drop
what they have seen (`inbox`). A broker may die between its word and its deed, so a letter is kept for some seconds
after it was confirmed, and goes again, in its place, after a lost connection. Where the broker says that nobody
listens, one letter at a time asks again, more and more rarely. What could not go at once is late, and late letters go
at a limited rate (a token bucket), so that the end of an outage is no flood.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

WINDOW = 8  # letters on their way at once
REFUSED = "refused by the broker"  # the word for one that it will not have
OVERSIZE = "oversize"  # the word for one that is larger than the broker takes: it is lost, as it will not shrink
UNHEARD = "unheard"  # the word for a letter that the broker took and had nobody to give to
PAUSE_MIN_NS, PAUSE_MAX_NS = 1_000_000_000, 30_000_000_000  # between two letters that ask whether anybody listens
TURN_NS = 1_000_000_000  # between two looks at what is due; without a connection nobody looks
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
    resend_ns: int = 0  # a confirmed letter is kept for so long, of time with a connection, and goes again after it


class Outbox:
    """Letters in order. Each leaves once, by `left(letter, why)`: "" when it was confirmed, else why it was lost.

    It holds no more than its limits allow, and at most WINDOW letters beside them, which were pushed out while they
    were on their way: they are lost only if they come back. Letters that were confirmed make room first.
    """

    def __init__(self, limits: Limits, left: Callable[[Letter, str], None]) -> None:
        self._limits = limits
        self._left = left
        self._store: OrderedDict[int, Letter] = OrderedDict()  # by number, rising; those on their way among them
        self._under_way: dict[int, Letter] = {}
        self._size_bytes = 0
        self._kept: OrderedDict[int, tuple[Letter, int]] = OrderedDict()  # confirmed, and when by `_clock_ns`
        self._kept_bytes = 0
        self._again: set[int] = set()  # numbers in the store that have been confirmed before
        self._clock_ns = 0  # stands still while nobody takes, as without a connection
        self._looked_ns: int | None = None
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
        """Of all letters that wait."""
        return self._size_bytes

    @property
    def kept(self) -> int:
        """Letters that were confirmed, and would go again after a lost connection."""
        return len(self._kept)

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
        self._bound()

    def connected(self) -> int:
        """There is a new connection: all that waits is late, and one letter asks first whether anybody listens.

        Returns:
            How many letters wait again that had been confirmed.
        """
        again = self.resend()
        self._late = self._last
        self._asking = True
        self._pause_ns = self._retry_ns = 0
        return again

    def resend(self) -> int:
        """Let all that was confirmed and is still kept wait again. Returns how many letters that is."""
        if not self._kept:
            return 0
        again = {number: letter for number, (letter, _) in self._kept.items()}
        self._again |= again.keys()
        self._store = OrderedDict(sorted((again | self._store).items()))
        self._size_bytes += self._kept_bytes
        self._kept.clear()
        self._kept_bytes = 0
        self._late = max(self._late, *again)
        return len(again)

    def take(self, now_ns: int) -> Letter | None:
        """The next letter to send now, which is then on its way until it is settled; None: not yet, or none is left."""
        self.expire(now_ns)
        self._forget(now_ns)
        if now_ns < self._retry_ns or len(self._under_way) >= (1 if self._asking else WINDOW):
            return None
        letter = self._first()
        if letter is None or (letter.number <= self._late and not self._may(now_ns)):
            return None
        self._under_way[letter.number] = letter
        return letter

    def settle(self, number: int, word: str, now_ns: int) -> bool:
        """Take the word on a letter: "" confirms it, OVERSIZE loses it, any other puts it back in its place.

        Returns:
            Whether a late letter was confirmed, for the first time.
        """
        letter = self._under_way.pop(number, None)
        if letter is None:
            return False  # given up meanwhile
        if not word:
            self._asking = False
            self._pause_ns = self._retry_ns = 0
            if self._store.pop(number, None) is not None:
                self._size_bytes -= letter.size_bytes
            first = number not in self._again
            self._again.discard(number)
            self._kept[number] = letter, self._clock_ns
            self._kept_bytes += letter.size_bytes
            self._forget(now_ns)
            self._bound()
            return first and number <= self._late
        if word == OVERSIZE:
            if self._store.pop(number, None) is not None:
                self._size_bytes -= letter.size_bytes
            self._leave(letter, OVERSIZE)
            return False
        if word in (UNHEARD, REFUSED):
            self._late = self._last
            if now_ns >= self._retry_ns:  # not the rest of a window whose first letter has told it already
                self._pause_ns = min(max(self._pause_ns * 2, PAUSE_MIN_NS), PAUSE_MAX_NS)
                self._retry_ns = now_ns + self._pause_ns
        self._late = max(self._late, number)
        self._asking = True
        if number not in self._store:
            self._leave(letter, "full")
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
        while self._kept:
            self._let_go()
        rest = self._under_way | self._store
        self._store.clear()
        self._under_way.clear()
        self._size_bytes = 0
        for number in sorted(rest):
            self._leave(rest[number], reason)

    def _first(self) -> Letter | None:
        """The oldest letter that is not on its way; at most WINDOW older ones are."""
        return next((letter for number, letter in self._store.items() if number not in self._under_way), None)

    def _lose(self, number: int, reason: str) -> None:
        letter = self._store.pop(number)
        self._size_bytes -= letter.size_bytes
        if number not in self._under_way:
            self._leave(letter, reason)

    def _leave(self, letter: Letter, reason: str) -> None:
        """A letter leaves unconfirmed; if it was confirmed before, it has probably arrived, and is not called lost."""
        self._left(letter, "" if letter.number in self._again else reason)
        self._again.discard(letter.number)

    def _bound(self) -> None:
        """Make room until all that is held is within the limits."""
        most, most_bytes = self._limits.messages, self._limits.size_bytes
        while len(self._store) + len(self._kept) > most or self._size_bytes + self._kept_bytes > most_bytes:
            if self._kept:
                self._let_go()
            else:
                self._lose(next(iter(self._store)), "full")

    def _forget(self, now_ns: int) -> None:
        """Let go of what was confirmed long ago."""
        if self._looked_ns is not None:
            self._clock_ns += min(now_ns - self._looked_ns, TURN_NS)
        self._looked_ns = now_ns
        while self._kept and self._clock_ns - next(iter(self._kept.values()))[1] >= self._limits.resend_ns:
            self._let_go()

    def _let_go(self) -> None:
        """Let go of the letter that was confirmed first."""
        _, (letter, _) = self._kept.popitem(last=False)
        self._kept_bytes -= letter.size_bytes
        self._left(letter, "")

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
