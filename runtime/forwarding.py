"""Events on their way to the broker: numbered, kept until it has confirmed them and a little longer, in memory and, by
choice, on disk.

The rim around `outbox` and `spool`. Safe to call from any thread; the letters leave on that of whoever finds them due,
one at a time, and no lock is held while the link is called but the one that says who sends.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from runtime.config import EventsConfig
from runtime.counters import Counters
from runtime.events import Event
from runtime.link import Lane, Link
from runtime.outbox import OVERSIZE, UNHEARD, Letter, Limits, Outbox
from runtime.topics import publish_bytes, report

if TYPE_CHECKING:
    from runtime.spool import Spool

log = logging.getLogger(__name__)

CLOSE_S = 2.0
TIDY_S = 1.0  # rows of letters that have left wait so long for company
TIDY_ROWS = 256  # or so many
LOST = {
    "full": "what waits is over store_messages or store_bytes; the oldest go first",
    "old": "they have waited for longer than store_s",
    OVERSIZE: "they are larger than the broker takes; raise max_packet_size in mosquitto.conf",
}


class Forwarding:
    """The events of one run of a device, and what earlier runs left on disk.

    Args:
        config: where they are kept and how many.
        link: what they go out by.
        counters: where `events_stored`, `events_lost_total` and the like are counted.
        session: names this run.
        wake: called when a letter was settled and another one may go; `tend` should follow soon.
    """

    def __init__(
        self, config: EventsConfig, link: Link, counters: Counters, session: str, wake: Callable[[], None]
    ) -> None:
        self._link = link
        self._counters = counters
        self._path = config.store
        self._session = session
        self._wake = wake
        self._putting = threading.Lock()  # guards numbers and the file
        self._sending = threading.Lock()  # held by whoever hands letters to the link
        self._asked = False  # there may be more to send than whoever holds it has seen
        self._settled = threading.Condition()  # guards what follows
        limits = Limits(
            config.store_messages,
            config.store_bytes,
            age_ns=int(config.store_s * 1e9),
            per_second=config.drain_per_second,
            resend_ns=int(config.resend_s * 1e9),
        )
        self._outbox = Outbox(limits, self._left)
        self._gone: list[int] = []  # numbers that are to leave the file
        self._stored = 0  # as counted last
        self._silent = False  # nobody listens, and the log says so
        self._told: set[str] = set()  # reasons of losses that the log has
        self._sequence = 0
        self._number = 0
        self._next_tidy_ns = 0
        self._spool: Spool | None = None
        counters.add("events_stored", 0)
        if config.store != "memory":
            self._open()

    def send(self, event: Event, topic: str, born_ns: int) -> None:
        """Number an event and send it, at once where that can be. `born_ns`: what its age counts from."""
        with self._putting:
            self._sequence += 1
            self._number += 1
            told = replace(event, session=self._session, sequence=self._sequence)
            letter = Letter(self._number, topic, msgspec.json.encode(told), time.monotonic_ns(), born_ns)
            self._on_disk(lambda spool: spool.keep(letter))
            with self._settled:
                self._outbox.put(letter)
                self._count()
        self._drain()

    def connected(self) -> None:
        """The link is there (again)."""
        self._resend(self._outbox.connected)
        self._drain()

    def again(self) -> None:
        """A consumer says that it may have missed something. Blocks for nothing; `tend` should follow soon."""
        self._resend(self._outbox.resend)
        self._wake()

    def tend(self) -> None:
        """Send what is due; to be called a few times a second."""
        self._drain()
        now_ns = time.monotonic_ns()
        with self._settled:
            self._outbox.expire(now_ns)  # with no connection, nothing else would
            self._count()
        if self._gone and (now_ns >= self._next_tidy_ns or len(self._gone) >= TIDY_ROWS):
            self._next_tidy_ns = now_ns + int(TIDY_S * 1e9)
            with self._putting:
                self._tidy()

    def close(self) -> None:
        """Send what is left, for at most two seconds. What stays then is kept on disk, or lost where there is none."""
        end_s = time.monotonic() + CLOSE_S
        with self._settled:
            self._outbox.ask_now()
            self._silent = False  # one more try
        while time.monotonic() < end_s and self._link.connected:
            self._drain()
            with self._settled:
                if not len(self._outbox) or self._silent:
                    break
                self._settled.wait(0.05)
        with self._putting:
            self._tidy()
            with self._settled:
                kept, self._spool = self._spool, None
                if kept is None:
                    self._outbox.give_up("stopping")
                    self._count()
            if kept is not None:
                with contextlib.suppress(OSError):
                    kept.close()

    def _resend(self, choose: Callable[[], int]) -> None:
        with self._settled:
            again = choose()
            self._count()
        if again:
            self._counters.add("events_resent_total", again)

    def _drain(self) -> None:
        """Hand letters to the link as long as one is due; if another thread does so already, it takes ours along."""
        self._asked = True
        while self._asked and self._link.connected and self._sending.acquire(blocking=False):
            try:
                self._asked = False
                while (letter := self._take()) is not None and self._publish(letter):
                    pass
            finally:
                self._sending.release()

    def _publish(self, letter: Letter) -> bool:
        then = partial(self._settle, letter.number)
        told = stamped(letter, time.monotonic_ns())
        most = self._link.max_packet_bytes
        if most is not None and publish_bytes(letter.topic, len(told), qos=1) > most:
            self._settle(letter.number, OVERSIZE)
            return True
        accepted = self._link.publish(letter.topic, told, qos=1, lane=Lane.EVENTS, then=then) > 0
        if not accepted:
            self._settle(letter.number, "refused")
        return accepted

    def _take(self) -> Letter | None:
        with self._settled:
            letter = self._outbox.take(time.monotonic_ns())
            self._count()
            return letter

    def _settle(self, number: int, word: str) -> None:
        with self._settled:
            if self._outbox.settle(number, word, time.monotonic_ns()):
                self._counters.add("events_forwarded_late_total")
            if word in ("", UNHEARD) and self._silent != (word == UNHEARD):
                self._silent = word == UNHEARD
                log.info("nobody listens for events; they are kept" if word else "somebody listens for events again")
            self._count()
            more = not word and len(self._outbox) > self._outbox.under_way
            self._settled.notify_all()
        if more:
            self._wake()

    def _left(self, letter: Letter, why: str) -> None:
        """A letter has left the outbox; called with `_settled` held."""
        if self._spool is not None:
            self._gone.append(letter.number)
        if why:
            self._counters.add("events_lost_total", reason=why)
        if why in LOST and why not in self._told:
            self._told.add(why)
            log.warning("events are lost: %s", LOST[why])

    def _count(self) -> None:
        """Bring the number of stored events up to date."""
        self._counters.add("events_stored", len(self._outbox) - self._stored)
        self._stored = len(self._outbox)

    def _open(self) -> None:
        """Begin to use the file, and take what an earlier run left in it."""
        try:
            from runtime.spool import Spool, boot_id  # it loads SQLite, which most devices do not need

            self._spool = Spool(Path(self._path), boot_id())
            left = self._spool.load(time.monotonic_ns())
        except (OSError, ImportError) as error:
            self._without(error)
            return
        for letter in left:
            self._number = letter.number
            if whole(letter):
                self._outbox.put(letter, late=True)
            else:
                self._left(letter, "damaged")
        self._count()
        if left:
            log.info("%d events of an earlier run are in %s", len(left), self._path)

    def _tidy(self) -> None:
        """Forget on disk what has left the outbox; with `_putting` held."""
        with self._settled:
            gone, self._gone = self._gone, []
        if gone:
            self._on_disk(lambda spool: spool.drop(gone))

    def _on_disk(self, action: Callable[[Spool], None]) -> None:
        """Do something with the file, if there is one that works; with `_putting` held."""
        if self._spool is not None:
            try:
                action(self._spool)
            except OSError as error:
                self._without(error)

    def _without(self, error: Exception) -> None:
        """Go on in memory."""
        spool, self._spool = self._spool, None
        if spool is not None:
            with contextlib.suppress(OSError):
                spool.close()
        self._counters.add("events_store_failures_total")
        log.warning("events cannot be kept in %s: %s; they are kept in memory until the next start", self._path, error)


def whole(letter: Letter) -> bool:
    """Whether a letter that was on disk is an event still."""
    try:
        stamped(letter, 0)
    except (msgspec.DecodeError, UnicodeDecodeError, TypeError):
        return False
    return report(letter.topic) is not None


def stamped(letter: Letter, now_ns: int) -> bytes:
    """The event as it leaves now: with its age, where that is known."""
    told = msgspec.json.decode(letter.payload)
    told["age_ms"] = None if letter.born_ns is None else round((now_ns - letter.born_ns) / 1e6, 3)
    return msgspec.json.encode(told)
