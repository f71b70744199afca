from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from runtime.link import Lane
from runtime.send_queue import NEWEST_WINS, Dropped, Message, SendQueue

MAX_MESSAGES, MAX_BYTES = 6, 100
NEVER_NS = 10**9


def message(
    lane: Lane = Lane.FEATURES, *, topic: str = "t", cost: int = 10, qos: int = 0, expires_ns: int | None = None
) -> Message:
    return Message(topic, b"", qos, False, lane, cost, expires_ns)


def queue_of(*messages: Message) -> SendQueue:
    queue = SendQueue(MAX_MESSAGES, MAX_BYTES)
    for one in messages:
        assert queue.put(one, 0) == (True, [])
    return queue


def everything(queue: SendQueue, now_ns: int = 0) -> list[Message]:
    taken = []
    while (one := queue.take(now_ns)[0]) is not None:
        taken.append(one)
    return taken


class Laws(RuleBasedStateMachine):
    """Whatever is put in comes out once: taken, refused or dropped with a reason."""

    def __init__(self) -> None:
        super().__init__()
        self.queue = SendQueue(MAX_MESSAGES, MAX_BYTES)
        self.now_ns = 0
        self.waiting: list[Message] = []  # in the order of arrival; one that replaces another takes its place
        self.seen = 0

    def leave(self, dropped: list[Dropped], newcomer: Message | None = None) -> None:
        for one, reason in dropped:
            assert one in self.waiting
            late = one.expires_ns is not None and one.expires_ns <= self.now_ns
            if reason == "late":
                assert late
            elif reason == "replaced":
                assert newcomer is not None
                assert (one.topic, one.lane) == (newcomer.topic, newcomer.lane)
                assert one.lane in NEWEST_WINS
                self.waiting[self.waiting.index(one)] = newcomer
                continue
            else:
                assert reason == "full"
                assert newcomer is not None
                assert one.lane > newcomer.lane, "something of a lower lane gives way"
            self.waiting.remove(one)

    @rule(
        lane=st.sampled_from(Lane),
        topic=st.sampled_from("abc"),
        cost=st.integers(1, 60),
        qos=st.integers(0, 1),
        lives_ns=st.none() | st.integers(1, 5),
        ahead=st.integers(0, 3),
    )
    def put(self, lane: Lane, topic: str, cost: int, qos: int, lives_ns: int | None, ahead: int) -> None:
        expires_ns = None if lives_ns is None else self.now_ns + lives_ns
        new = message(lane, topic=topic, cost=cost, qos=qos, expires_ns=expires_ns)
        accepted, dropped = self.queue.put(new, self.now_ns, ahead=ahead, ahead_bytes=10 * ahead)
        self.leave(dropped, new)
        if not accepted:
            lower = sum(one.cost_bytes for one in self.waiting if one.lane > lane)
            lower_count = sum(one.lane > lane for one in self.waiting)
            older = [one for one in self.waiting if one.lane == lane in NEWEST_WINS and one.topic == topic]
            size = sum(one.cost_bytes for one in self.waiting) - lower - sum(one.cost_bytes for one in older)
            count = len(self.waiting) - lower_count - len(older)
            assert size + 10 * ahead + cost > MAX_BYTES or count + ahead + 1 > MAX_MESSAGES, "refused for no reason"
            return
        if new not in self.waiting:
            self.waiting.append(new)
        assert len(self.queue) + ahead <= MAX_MESSAGES
        assert self.queue.waiting_bytes + 10 * ahead <= MAX_BYTES

    @rule(confirmable=st.booleans(), passed_ns=st.integers(0, 3))
    def take(self, confirmable: bool, passed_ns: int) -> None:
        self.now_ns += passed_ns
        taken, dropped = self.queue.take(self.now_ns, confirmable=confirmable)
        assert {reason for _, reason in dropped} <= {"late"}
        self.leave(dropped)
        firsts: dict[Lane, Message] = {}
        for one in self.waiting:
            assert one.expires_ns is None or one.expires_ns > self.now_ns
            firsts.setdefault(one.lane, one)
        allowed = [one for _, one in sorted(firsts.items()) if confirmable or not one.qos]
        assert taken is (allowed[0] if allowed else None)
        if taken is not None:
            self.waiting.remove(taken)
        assert self.queue.ready(confirmable=confirmable) == (len(allowed) > 1 or self._more(taken, confirmable))

    def _more(self, taken: Message | None, confirmable: bool) -> bool:
        firsts: dict[Lane, Message] = {}
        for one in self.waiting:
            firsts.setdefault(one.lane, one)
        return any(confirmable or not one.qos for one in firsts.values())

    @rule()
    def clear(self) -> None:
        assert sorted(map(id, self.queue.clear())) == sorted(map(id, self.waiting))
        self.waiting.clear()

    @invariant()
    def counts(self) -> None:
        assert len(self.queue) == len(self.waiting)
        assert self.queue.waiting_bytes == sum(one.cost_bytes for one in self.waiting)


TestLaws = Laws.TestCase


@given(st.permutations(list(Lane)))
def test_lanes_go_by_their_numbers(lanes: list[Lane]) -> None:
    queue = queue_of(*(message(lane) for lane in lanes))
    assert [one.lane for one in everything(queue)] == sorted(Lane)


def test_a_newer_result_takes_the_place_of_an_older_one() -> None:
    old, other, new = (message(Lane.RESULTS, topic=topic) for topic in ("porch", "garden", "porch"))
    queue = queue_of(old, other)
    assert queue.put(new, 0) == (True, [(old, "replaced")])
    assert everything(queue) == [new, other]


@pytest.mark.parametrize("lane", [Lane.EVENTS, Lane.FEATURES])
def test_events_and_features_of_one_topic_all_go(lane: Lane) -> None:
    both = [message(lane), message(lane)]
    assert everything(queue_of(*both)) == both


def test_what_is_late_is_not_taken() -> None:
    late, good = message(expires_ns=5), message(expires_ns=6)
    assert queue_of(late, good).take(5) == (good, [(late, "late")])


def test_when_full_the_lowest_lane_gives_way_oldest_first() -> None:
    stats, first, second = message(Lane.STATS, cost=40), message(cost=30), message(cost=30)
    queue = queue_of(stats, first, second)
    event = message(Lane.EVENTS, cost=50)
    assert queue.put(event, 0) == (True, [(stats, "full"), (first, "full")])
    assert everything(queue) == [event, second]


def test_nothing_gives_way_to_what_does_not_fit_anyway() -> None:
    queue = queue_of(message(Lane.STATS, cost=40))
    assert queue.put(message(Lane.EVENTS, cost=95), 0, ahead=1, ahead_bytes=10) == (False, [])
    assert len(queue) == 1


def test_what_is_late_goes_before_anything_gives_way() -> None:
    late, kept = message(Lane.FEATURES, cost=60, expires_ns=1), message(Lane.STATS, cost=30)
    queue = queue_of(late, kept)
    assert queue.put(message(Lane.EVENTS, cost=50), 1) == (True, [(late, "late")])


def test_without_confirmations_only_qos_0_goes_and_order_holds() -> None:
    first, second = message(Lane.EVENTS, qos=1), message(Lane.EVENTS)
    queue = queue_of(first, second, feature := message())
    assert queue.take(0, confirmable=False) == (feature, [])
    assert queue.take(0, confirmable=False) == (None, [])
    assert not queue.ready(confirmable=False)
    assert everything(queue) == [first, second]


def test_expiry_is_found_however_it_came_in() -> None:
    queue: SendQueue = queue_of(message(expires_ns=NEVER_NS), message(expires_ns=3), message(expires_ns=7))
    ends: Callable[[int], list[int | None]] = lambda now: [one.expires_ns for one, _ in queue.expire(now)]  # noqa: E731
    assert [ends(2), ends(3), ends(8), ends(9)] == [[], [3], [7], []]
