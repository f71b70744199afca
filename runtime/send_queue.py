"""What waits for a link, in lanes. Pure: times are given, and whoever calls counts what comes back as dropped.

Bounded in messages, bytes and age. In the lanes that tell how things are, results and stats, only the newest of a topic
is worth sending: it takes the place of an older one that still waits.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from dataclasses import dataclass
from itertools import count

from runtime.link import Lane, Then

NEWEST_WINS = (Lane.RESULTS, Lane.STATS)


@dataclass(frozen=True, slots=True, eq=False)
class Message:
    """What is to be sent."""

    topic: str
    payload: bytes
    qos: int
    retain: bool
    lane: Lane
    cost_bytes: int  # all of MQTT
    expires_ns: int | None = None  # of time.monotonic_ns(); nobody wants it after that
    then: Then | None = None
    alias: int = 0  # stands for the topic from here on, or, if `bare`, already; 0: none
    bare: bool = False


Dropped = tuple[Message, str]  # and the reason: `late`, `replaced` or `full`


class SendQueue:
    """Messages in the order in which they should go: by lane, then first come, first served."""

    def __init__(self, max_messages: int, max_bytes: int) -> None:
        self._max_messages = max_messages
        self._max_bytes = max_bytes
        self._lanes: list[OrderedDict[int | str, Message]] = [OrderedDict() for _ in Lane]  # by lane
        self._numbers = count()
        self._messages = 0
        self._bytes = 0
        self._earliest_ns: float = math.inf  # nothing expires before

    def __len__(self) -> int:
        return self._messages

    @property
    def waiting_bytes(self) -> int:
        """What all of it costs."""
        return self._bytes

    def put(self, message: Message, now_ns: int, *, ahead: int = 0, ahead_bytes: int = 0) -> tuple[bool, list[Dropped]]:
        """Add a message.

        Args:
            message: what to add.
            now_ns: time.monotonic_ns().
            ahead: messages that have left the queue and count still, as they are not out yet.
            ahead_bytes: their bytes.

        Returns:
            Whether there was room for it, and what had to go, which may be something even if there was none.
        """
        lane = self._lanes[message.lane]
        key = message.topic if message.lane in NEWEST_WINS else next(self._numbers)
        dropped: list[Dropped] = []
        if not self._fits(message, lane.get(key), ahead, ahead_bytes):
            dropped = self.expire(now_ns)
            giving: list[tuple[int, int | str]] = []
            for lower in range(max(Lane), message.lane, -1):
                giving += ((lower, name) for name in self._lanes[lower])
            freed = iter(giving)
            messages, size = ahead, ahead_bytes
            chosen = []
            while not self._fits(message, lane.get(key), messages, size):
                found = next(freed, None)
                if found is None:
                    return False, dropped
                chosen.append(found)
                messages -= 1
                size -= self._lanes[found[0]][found[1]].cost_bytes
            dropped += [(self._remove(*found), "full") for found in chosen]
        if (older := lane.get(key)) is not None:
            dropped.append((older, "replaced"))
            self._messages -= 1
            self._bytes -= older.cost_bytes
        lane[key] = message
        if message.expires_ns is not None:
            self._earliest_ns = min(self._earliest_ns, message.expires_ns)
        self._messages += 1
        self._bytes += message.cost_bytes
        return True, dropped

    def take(self, now_ns: int, *, confirmable: bool = True) -> tuple[Message | None, list[Dropped]]:
        """Take the next message out; without `confirmable` none of QoS 1, nor what stands behind one in its lane."""
        dropped = self.expire(now_ns)
        for lane, messages in enumerate(self._lanes):
            if messages:
                key, message = next(iter(messages.items()))
                if confirmable or not message.qos:
                    return self._remove(lane, key), dropped
        return None, dropped

    def ready(self, *, confirmable: bool = True) -> bool:
        """Whether `take` has something to give, unless it is late by then."""
        if confirmable or not self._messages:
            return self._messages > 0
        return any(not next(iter(messages.values())).qos for messages in self._lanes if messages)

    def expire(self, now_ns: int) -> list[Dropped]:
        """Take out what nobody wants any more."""
        if now_ns < self._earliest_ns:
            return []
        late = [
            (lane, key)
            for lane, messages in enumerate(self._lanes)
            for key, message in messages.items()
            if message.expires_ns is not None and message.expires_ns <= now_ns
        ]
        dropped = [(self._remove(lane, key), "late") for lane, key in late]
        ends = [one.expires_ns for lane in self._lanes for one in lane.values() if one.expires_ns is not None]
        self._earliest_ns = min(ends, default=math.inf)
        return dropped

    def clear(self) -> list[Message]:
        """Take everything out."""
        everything = [message for messages in self._lanes for message in messages.values()]
        for messages in self._lanes:
            messages.clear()
        self._messages = self._bytes = 0
        return everything

    def _fits(self, message: Message, older: Message | None, ahead: int, ahead_bytes: int) -> bool:
        messages = self._messages + ahead + (older is None)
        size = self._bytes + ahead_bytes + message.cost_bytes - (older.cost_bytes if older else 0)
        return messages <= self._max_messages and size <= self._max_bytes

    def _remove(self, lane: int, key: int | str) -> Message:
        message = self._lanes[lane].pop(key)
        self._messages -= 1
        self._bytes -= message.cost_bytes
        return message
