"""Each event once, however often it came: the receiver's side of `outbox`. Pure.

Every run of a device numbers its events from 1 without a gap, under a session of its own. Whoever drops what it has
seen ends with each event exactly once, and the gaps say what is missing. What came before the first event that was
seen of a session is not missing: nobody may have listened yet.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

MOST_SESSIONS = 1024  # those not heard of for longest are forgotten first
MOST_GAPS = 64  # of a session; with one more, the oldest is given up for good


class Taken(NamedTuple):
    """What is known of one event."""

    new: bool  # not seen before
    skipped: int  # events before this one that were not seen when it came, and after the last that was
    missing: int  # of the session, with what was given up


@dataclass(slots=True)
class Session:
    """What was seen of one run of one sender."""

    sender: str
    name: str
    runs: list[list[int]] = field(default_factory=list)  # first and last of what was seen, rising, with gaps between
    missing: int = 0


class Inbox:
    """What was seen of any number of devices and of their runs; `known` is what an earlier inbox knew."""

    def __init__(
        self, known: Iterable[Session] = (), *, most_sessions: int = MOST_SESSIONS, most_gaps: int = MOST_GAPS
    ) -> None:
        self._most_sessions = most_sessions
        self._most_gaps = most_gaps
        self._sessions = OrderedDict(((session.sender, session.name), session) for session in known)
        self._forgotten = 0

    @property
    def known(self) -> list[Session]:
        """All of it, in the order in which they were heard of last."""
        return list(self._sessions.values())

    @property
    def missing(self) -> int:
        """Events that are missing now, of all sessions."""
        return self._forgotten + sum(session.missing for session in self._sessions.values())

    def take(self, sender: str, session: str, sequence: int) -> Taken:
        """An event has come; `sequence` is 1 or more."""
        key = (sender, session)
        known = self._sessions.setdefault(key, Session(sender, session))
        self._sessions.move_to_end(key)
        if len(self._sessions) > self._most_sessions:
            self._forgotten += self._sessions.popitem(last=False)[1].missing
        return self._note(known, sequence)

    def _note(self, session: Session, sequence: int) -> Taken:
        runs = session.runs
        at = len(runs)  # of the first run that begins after `sequence`; what is new is nearly always last
        while at and runs[at - 1][0] > sequence:
            at -= 1
        if at and sequence <= runs[at - 1][1]:
            return Taken(False, 0, session.missing)
        skipped = 0
        if at == len(runs):
            skipped = sequence - runs[-1][1] - 1 if runs else 0
            session.missing += skipped
        elif at:
            session.missing -= 1
        else:  # before all that was seen: what lies between is a gap as well
            session.missing += runs[0][0] - sequence - 1
        runs.insert(at, [sequence, sequence])
        _join(runs, at)
        _join(runs, at - 1)
        if len(runs) > self._most_gaps + 1:  # what comes late into this gap would not be told from what was seen
            runs[0][1] = runs.pop(1)[1]
        return Taken(True, skipped, session.missing)


def _join(runs: list[list[int]], at: int) -> None:
    """Make one run of two that have no gap between them."""
    if 0 <= at < len(runs) - 1 and runs[at][1] + 1 == runs[at + 1][0]:
        runs[at][1] = runs.pop(at + 1)[1]
