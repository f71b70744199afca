"""When to try again, for how long, and in which version of MQTT. Pure: the link tells how attempts ended.

An attempt that ends in silence has cost the broker nothing, and the next one may be the first after an outage: so
attempts into silence are short and follow each other closely. So do those at a machine whose broker is not there, as
while it restarts: its kernel says so. A broker that answers, and refuses, is asked more and more rarely. Where somebody
takes connections and never says a word, it is a proxy before a silent link, or a broker that is slow: the longer that
lasts, the longer each attempt waits.
"""

from __future__ import annotations

import errno
import socket
from enum import Enum
from typing import Literal

SILENT_S = (2.0, 4.0)  # by turns: to be back soon, and to get in where the link is slow
ANSWER_MAX_S = 30.0
ANSWER_SHARE = 1 / 15  # of the time since a broker's first silence: what comes of it too late is in proportion
SILENT_PAUSE_S = 0.1
AWAY_PAUSE_S = 1.0
BACKOFF_MIN_S, CLOSED_MAX_S, BACKOFF_MAX_S = 0.25, 4.0, 30.0
STEADY_S = 1.0  # a connection that has lived so long was a good one
SHORT_IN_A_ROW = 3
HANG_UPS = 5  # in a row, of a broker that has taken this version before
TRIALS = 2  # of MQTT 5 with a broker that hangs up on it and takes 3.1.1

NO_WAY = (errno.ENETUNREACH, errno.EHOSTUNREACH, errno.ENETDOWN, errno.EADDRNOTAVAIL)

Version = Literal["5", "3.1.1"]


class Outcome(Enum):
    """How an attempt to connect, or the connection that came of it, ended."""

    LOST = "accepted, and lost later"
    SILENT = "no answer at all"
    UNANSWERED = "connected, and no answer"
    AWAY = "no way there: no route, or no name server"
    CLOSED = "nobody listens at the broker's port"
    REFUSED = "answered, and not accepted"


def outcome_of(error: Exception) -> Outcome:
    """How an attempt ended that came to no connection, and not by silence."""
    if isinstance(error, ConnectionRefusedError):
        return Outcome.CLOSED
    # Nothing has left this machine, so nobody is bothered by the next attempt.
    if isinstance(error, socket.gaierror):
        return Outcome.AWAY if error.errno == socket.EAI_AGAIN else Outcome.REFUSED
    return Outcome.AWAY if isinstance(error, OSError) and error.errno in NO_WAY else Outcome.REFUSED


class Pauses:
    """How long an attempt may last in silence, and how long to wait before the next."""

    def __init__(self) -> None:
        self._silent = 0  # in a row
        self._unanswered_s = 0.0  # in a row
        self._short = 0  # connections in a row that were accepted and soon lost
        self._backoff_s = BACKOFF_MIN_S

    @property
    def patience_s(self) -> float:
        """How long the next attempt waits for somebody to take the connection."""
        return SILENT_S[self._silent % len(SILENT_S)]

    @property
    def answer_s(self) -> float:
        """How long it then waits for each sign of life."""
        return max(self.patience_s, min(self._unanswered_s * ANSWER_SHARE, ANSWER_MAX_S))

    @property
    def dropped_again(self) -> bool:
        """Whether the last connections were lost soon after they were accepted."""
        return self._short >= SHORT_IN_A_ROW

    def after(self, outcome: Outcome, lasted_s: float) -> float:
        """Seconds until the next attempt, before jitter."""
        silent = outcome in (Outcome.SILENT, Outcome.UNANSWERED)
        self._silent = self._silent + 1 if silent else 0
        self._unanswered_s = self._unanswered_s + lasted_s if outcome is Outcome.UNANSWERED else 0.0
        if silent:
            return SILENT_PAUSE_S
        if outcome is Outcome.AWAY:
            return AWAY_PAUSE_S
        self._short = self._short + 1 if outcome is Outcome.LOST and lasted_s < STEADY_S else 0
        # Being accepted and dropped again and again is no reason to ask without pause.
        if outcome is Outcome.LOST and not self.dropped_again:
            self._backoff_s = BACKOFF_MIN_S
        else:
            most_s = CLOSED_MAX_S if outcome is Outcome.CLOSED else BACKOFF_MAX_S
            self._backoff_s = min(self._backoff_s * 2, most_s)
        return self._backoff_s


class Versions:
    """Which version to speak. A broker without MQTT 5 may just hang up, which may have other reasons as well."""

    def __init__(self, setting: Literal["auto", "5", "3.1.1"]) -> None:
        self._auto = setting == "auto"
        self.now: Version = "5" if setting == "auto" else setting
        self._taken: set[Version] = set()
        self._in_vain = 0  # times that MQTT 5 was hung up on, or refused, which counts as all of them
        self._in_a_row = 0
        self._swallowed = False  # the attempt before was of MQTT 5, and was not answered

    def accepted(self) -> None:
        """The broker takes this version."""
        if self.now == "3.1.1" and self._swallowed:
            self._in_vain += 1
        self._swallowed = False
        self._taken.add(self.now)
        self._in_a_row = 0

    def hung_up(self) -> None:
        """The broker has hung up on it, or has answered what is no MQTT."""
        self._swallowed = False
        self._in_a_row += 1
        if self.now == "5":
            self._in_vain += 1
        if self.now not in self._taken or self._in_a_row >= HANG_UPS:
            self._turn()

    def silent(self) -> None:
        """Somebody took the connection and never answered; some brokers without MQTT 5 wait for more to come.

        Others are slow, or behind a link that is: only that 3.1.1 is answered right afterwards speaks against MQTT 5.
        """
        if self.now not in self._taken:
            self._swallowed = self.now == "5"
            self._turn()

    def refused(self) -> None:
        """The broker says that it does not speak it."""
        if self.now == "5":
            self._in_vain = TRIALS
            self._taken.discard("5")
        self._turn()

    def lost(self) -> None:
        """A connection in this version has ended: MQTT 5 gets another chance if it may have been an accident."""
        if self._auto and (self._in_vain < TRIALS or "5" in self._taken):
            self.now = "5"

    def _turn(self) -> None:
        self._in_a_row = 0
        if self._auto:
            self.now = "3.1.1" if self.now == "5" else "5"
