"""Laws of the store of events: order, bounds, and nothing that leaves without a word."""

from __future__ import annotations

from collections import deque
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from runtime.outbox import PAUSE_MAX_NS, PAUSE_MIN_NS, REFUSED, UNHEARD, WINDOW, Letter, Limits, Outbox

S = 1_000_000_000
WIDE = Limits(messages=10_000, size_bytes=1 << 22, age_ns=86_400 * S, per_second=20)


class Mail:
    """An outbox, what has left it, and a clock."""

    def __init__(self, limits: Limits = WIDE) -> None:
        self.left: list[tuple[int, str]] = []
        self.box = Outbox(limits, lambda letter, why: self.left.append((letter.number, why)))
        self.now_ns = 5 * S
        self.put_count = 0

    def put(self, payload: bytes = b"event", *, late: bool = False) -> None:
        self.put_count += 1
        self.box.put(Letter(self.put_count, "topic", payload, self.now_ns), late=late)

    def take(self) -> int | None:
        letter = self.box.take(self.now_ns)
        return None if letter is None else letter.number

    def settle(self, number: int, word: str = "") -> bool:
        return self.box.settle(number, word, self.now_ns)

    def take_all(self) -> list[int]:
        """As a broker would that confirms each at once."""
        taken = []
        while (number := self.take()) is not None:
            self.settle(number)
            taken.append(number)
        return taken


def test_a_fresh_letter_goes_at_once_and_alone_until_somebody_was_shown_to_listen() -> None:
    mail = Mail()
    for _ in range(12):
        mail.put()
    assert mail.take() == 1
    assert mail.take() is None
    assert mail.settle(1) is False
    assert [mail.take() for _ in range(WINDOW + 1)] == [*range(2, 2 + WINDOW), None]


def test_what_a_lost_connection_took_along_goes_again_in_order() -> None:
    mail = Mail()
    for _ in range(6):
        mail.put()
    mail.settle(mail.take() or 0)
    assert [mail.take() for _ in range(3)] == [2, 3, 4]
    for number in (3, 2, 4):
        mail.settle(number, "connection lost")
    mail.box.connected()
    assert mail.take_all() == [2, 3, 4, 5, 6]
    assert mail.left == [(number, "") for number in range(1, 7)]


def test_after_an_outage_letters_go_at_a_limited_rate_and_fresh_ones_wait_behind_them() -> None:
    mail = Mail()
    for _ in range(100):
        mail.put()
    mail.box.connected()
    sent: list[tuple[int, int]] = []
    start_ns = mail.now_ns
    while len(mail.box):
        sent += [(number, mail.now_ns - start_ns) for number in mail.take_all()]
        mail.now_ns += S // 100
        if mail.put_count == 100 and len(sent) > 50:
            mail.put()
    assert [number for number, _ in sent] == list(range(1, 102))
    at_once = sum(when == 0 for _, when in sent)
    assert at_once == 10  # half a second's worth
    assert sent[-1][1] / S == pytest.approx((101 - at_once) / 20, abs=0.1)
    mail.put()
    assert mail.take_all() == [102]  # nothing waits any more


def test_late_letters_are_told_from_fresh_ones() -> None:
    mail = Mail()
    mail.put()
    mail.put()
    mail.box.connected()
    mail.now_ns += S
    late = [mail.settle(mail.take() or 0) for _ in range(2)]
    mail.put()
    assert [*late, mail.settle(mail.take() or 0)] == [True, True, False]


@pytest.mark.parametrize("word", [UNHEARD, REFUSED])
def test_while_nobody_listens_or_may_hear_one_letter_asks_more_and_more_rarely(word: str) -> None:
    mail = Mail()
    for _ in range(5):
        mail.put()
    asked: list[tuple[int, int]] = []
    while len(asked) < 8:
        if (number := mail.take()) is not None:
            asked.append((number, mail.now_ns))
            assert mail.take() is None
            mail.settle(number, word)
        mail.now_ns += S // 10
    assert {number for number, _ in asked} == {1}
    pauses = [(after - before) / S for (_, before), (_, after) in pairwise(asked)]
    assert pauses == [1, 2, 4, 8, 16, 30, 30]
    assert PAUSE_MIN_NS == S
    assert PAUSE_MAX_NS == 30 * S
    mail.now_ns += 30 * S
    mail.settle(mail.take() or 0)
    assert mail.take_all() == [2, 3, 4, 5]


def test_a_window_that_nobody_hears_is_one_answer_not_eight() -> None:
    mail = Mail()
    for _ in range(9):
        mail.put()
    mail.settle(mail.take() or 0)
    numbers = [mail.take() for _ in range(8)]
    for number in numbers:
        mail.settle(number or 0, UNHEARD)
    mail.now_ns += PAUSE_MIN_NS
    assert mail.take() == 2


def test_the_oldest_make_room_and_one_on_its_way_is_lost_only_if_it_comes_back() -> None:
    mail = Mail(Limits(messages=3, size_bytes=1000, age_ns=S, per_second=20))
    mail.put()
    mail.settle(mail.take() or 0)
    for _ in range(3):
        mail.put()
    assert [mail.take() for _ in range(2)] == [2, 3]
    for _ in range(2):
        mail.put()
    assert mail.left == [(1, "")]
    mail.settle(2)
    mail.settle(3, "connection lost")
    assert mail.left == [(1, ""), (2, ""), (3, "full")]
    assert mail.take_all() == [4, 5, 6]


def test_a_letter_over_the_bound_costs_no_other() -> None:
    mail = Mail(Limits(messages=9, size_bytes=50, age_ns=S, per_second=20))
    mail.put()
    mail.put(bytes(50))
    mail.put(bytes(38))
    assert mail.left == [(2, "full"), (1, "full")]
    assert (len(mail.box), mail.box.size_bytes) == (1, 43)


def test_old_letters_are_lost() -> None:
    mail = Mail()
    mail.put()
    mail.now_ns += 86_400 * S
    mail.put()
    assert mail.left == []
    mail.now_ns += 1
    assert mail.take() == 2
    assert mail.left == [(1, "old")]


def test_an_end_waits_for_neither_rate_nor_listeners() -> None:
    mail = Mail()
    for _ in range(50):
        mail.put(late=True)
    mail.settle(mail.take() or 0, UNHEARD)
    assert mail.take() is None
    mail.box.ask_now()
    assert mail.take_all() == list(range(1, 51))
    mail.put()
    mail.box.give_up("stopping")
    assert mail.left[-1] == (51, "stopping")
    assert len(mail.box) == 0


@given(st.lists(st.tuples(st.integers(0, 300), st.integers(0, 3)), max_size=200), st.integers(1, 100))
def test_no_more_late_letters_leave_than_the_rate_allows(steps: list[tuple[int, int]], rate: int) -> None:
    mail = Mail(Limits(1000, 1 << 20, 86_400 * S, rate))
    for _ in range(400):
        mail.put(late=True)
    start_ns = mail.now_ns
    taken = 0
    for wait_ms, puts in steps:
        mail.now_ns += wait_ms * 1_000_000
        for _ in range(puts):
            mail.put()
        taken += len(mail.take_all())
        if mail.box.size_bytes:
            assert taken <= max(1, rate / 2) + rate * (mail.now_ns - start_ns) / S + 1e-6


class Post(RuleBasedStateMachine):
    """Whatever happens: bounded, in order, and every letter delivered, or counted as lost, or still there."""

    def __init__(self) -> None:
        super().__init__()
        self.received: deque[int] = deque()  # first sights, as a receiver has them that drops what it has seen
        self.seen: set[int] = set()
        self.under_way: list[int] = []

    @initialize(
        messages=st.integers(1, 12),
        size_bytes=st.integers(10, 400),
        age_s=st.integers(1, 20),
        resend_s=st.integers(0, 9),
    )
    def begin(self, messages: int, size_bytes: int, age_s: int, resend_s: int) -> None:
        self.limits = Limits(messages, size_bytes, age_s * S, 20, resend_s * S)
        self.mail = Mail(self.limits)

    @rule(size_bytes=st.integers(0, 60), late=st.booleans())
    def put(self, size_bytes: int, late: bool) -> None:
        self.mail.put(bytes(size_bytes), late=late)

    @rule(wait_ms=st.integers(1, 5000))
    def wait(self, wait_ms: int) -> None:
        self.mail.now_ns += wait_ms * 1_000_000

    @rule()
    def take(self) -> None:
        number = self.mail.take()
        if number is not None:
            assert number not in self.under_way
            self.under_way.append(number)

    @precondition(lambda self: self.under_way)
    @rule(heard=st.booleans())
    def confirm(self, heard: bool) -> None:
        """A broker confirms in order."""
        number = self.under_way.pop(0)
        if heard:
            self.receive(number)
        self.mail.settle(number, "" if heard else UNHEARD)

    @rule(arrived=st.integers(0, WINDOW))
    def lose_the_connection(self, arrived: int) -> None:
        """Some of what was on its way arrived, and nobody heard of it."""
        for index, number in enumerate(self.under_way):
            if index < arrived:
                self.receive(number)
            self.mail.settle(number, "connection lost")
        self.under_way.clear()
        self.mail.box.connected()

    @rule()
    def ask(self) -> None:
        """A consumer may have missed something."""
        kept = self.mail.box.kept
        assert self.mail.box.resend() == kept

    @rule()
    def end(self) -> None:
        self.mail.box.ask_now()

    def receive(self, number: int) -> None:
        if number not in self.seen:
            self.seen.add(number)
            self.received.append(number)

    @invariant()
    def holds(self) -> None:
        box = self.mail.box
        assert len(box) + box.kept <= self.limits.messages
        assert box.size_bytes <= self.limits.size_bytes
        assert box.under_way == len(self.under_way) <= WINDOW
        left = [number for number, _ in self.mail.left]
        assert len(left) == len(set(left))
        delivered = {number for number, why in self.mail.left if not why}
        assert delivered <= self.seen
        assert self.mail.put_count <= len(left) + len(box) + box.kept + len(self.under_way)

    def teardown(self) -> None:
        if hasattr(self, "mail"):
            self.mail.box.give_up("stopping")
            assert sorted(number for number, _ in self.mail.left) == list(range(1, self.mail.put_count + 1))
            lost = {number for number, why in self.mail.left if why}
            assert self.seen | lost == set(range(1, self.mail.put_count + 1))


TestPost = Post.TestCase
TestPost.settings = settings(max_examples=200, stateful_step_count=60)


@given(st.lists(st.sampled_from(["put", "take", "confirm", "lose", "wait"]), max_size=300))
def test_a_receiver_sees_them_in_order_where_all_are_heard(steps: list[str]) -> None:
    mail = Mail()
    under_way: list[int] = []
    seen: list[int] = []
    for step in steps:
        if step == "put":
            mail.put()
        elif step == "take" and (number := mail.take()) is not None:
            under_way.append(number)
            if number not in seen:
                seen.append(number)
        elif step == "confirm" and under_way:
            mail.settle(under_way.pop(0))
        elif step == "lose":
            for number in under_way:
                mail.settle(number, "connection lost")
            under_way.clear()
            mail.box.connected()
        mail.now_ns += S if step == "wait" else 0
    assert seen == list(range(1, len(seen) + 1))
