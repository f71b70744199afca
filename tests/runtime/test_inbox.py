"""Each event once, and what is missing."""

from __future__ import annotations

import msgspec
from hypothesis import given
from hypothesis import strategies as st

from runtime.inbox import Inbox, Session, Taken


def test_what_came_before_is_told_from_what_is_new_and_gaps_are_counted() -> None:
    inbox = Inbox()
    assert inbox.take("porch", "a", 5) == Taken(True, 0, 0)  # nobody may have listened to the first four
    assert inbox.take("porch", "a", 6) == Taken(True, 0, 0)
    assert inbox.take("porch", "a", 5) == Taken(False, 0, 0)
    assert inbox.take("porch", "a", 10) == Taken(True, 3, 3)
    assert inbox.take("porch", "a", 8) == Taken(True, 0, 2)
    assert inbox.take("porch", "a", 8) == Taken(False, 0, 2)
    assert inbox.take("porch", "b", 6) == Taken(True, 0, 0)
    assert inbox.take("yard", "a", 6) == Taken(True, 0, 0)
    assert inbox.take("porch", "a", 3) == Taken(True, 0, 3)
    assert inbox.missing == 3


def test_sessions_that_are_forgotten_leave_their_count() -> None:
    inbox = Inbox(most_sessions=2)
    inbox.take("porch", "a", 1)
    inbox.take("porch", "a", 3)
    for session in "bc":
        inbox.take("porch", session, 1)
    assert inbox.missing == 1
    assert inbox.take("porch", "a", 3).new  # nothing is known of it any more


def test_gaps_are_bounded_and_the_oldest_is_given_up() -> None:
    inbox = Inbox(most_gaps=2)
    for sequence in (1, 3, 5, 7):
        inbox.take("porch", "a", sequence)
    assert inbox.take("porch", "a", 2) == Taken(False, 0, 3)
    assert inbox.take("porch", "a", 4) == Taken(True, 0, 2)


numbers = st.lists(st.integers(1, 60), max_size=120)


@given(numbers)
def test_each_is_new_once_and_what_is_missing_is_what_was_not_seen(sequences: list[int]) -> None:
    inbox = Inbox()
    seen: set[int] = set()
    for sequence in sequences:
        taken = inbox.take("porch", "a", sequence)
        assert taken.new == (sequence not in seen)
        assert taken.skipped == (max(0, sequence - max(seen) - 1) if seen else 0)
        seen.add(sequence)
        assert taken.missing == inbox.missing == max(seen) - min(seen) + 1 - len(seen)


@given(numbers, st.integers(0, 5))
def test_within_any_bound_none_is_new_twice(sequences: list[int], most_gaps: int) -> None:
    inbox = Inbox(most_gaps=most_gaps)
    new = [sequence for sequence in sequences if inbox.take("porch", "a", sequence).new]
    assert len(new) == len(set(new))
    if sequences:
        assert inbox.missing >= max(sequences) - min(sequences) + 1 - len(set(sequences))


@given(numbers, st.integers(0, 120))
def test_what_is_known_can_be_handed_on(sequences: list[int], half: int) -> None:
    whole, first = Inbox(most_gaps=5), Inbox(most_gaps=5)
    taken = [whole.take("porch", "a", sequence) for sequence in sequences]
    before = [first.take("porch", "a", sequence) for sequence in sequences[:half]]
    second = Inbox(msgspec.json.decode(msgspec.json.encode(first.known), type=list[Session]), most_gaps=5)
    assert taken == before + [second.take("porch", "a", sequence) for sequence in sequences[half:]]
    assert second.missing == whole.missing


@given(st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from("xy"), st.integers(1, 20)), max_size=120))
def test_senders_and_sessions_do_not_mix(events: list[tuple[str, str, int]]) -> None:
    inbox = Inbox()
    alone: dict[tuple[str, str], Inbox] = {}
    for event in events:
        assert inbox.take(*event) == alone.setdefault(event[:2], Inbox()).take(*event)
    assert inbox.missing == sum(one.missing for one in alone.values())
