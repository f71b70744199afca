from __future__ import annotations

import errno
import itertools
import socket

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime.reconnect import ANSWER_MAX_S, BACKOFF_MAX_S, CLOSED_MAX_S, SILENT_S, Outcome, Pauses, Versions, outcome_of


def test_after_any_silence_the_next_attempt_is_soon() -> None:
    """TCP sends its first packet again after 1 and 3 s: so no more than 2 s pass without one."""
    pauses = Pauses()
    attempts = []
    at_s = 0.0
    while at_s < 60:
        patience_s = pauses.patience_s
        attempts.append((at_s, patience_s))
        at_s += patience_s + pauses.after(Outcome.SILENT, patience_s)
    sent = sorted(
        at_s + again_s for at_s, patience_s in attempts for again_s in (0.0, 1.0, 3.0) if again_s < patience_s
    )
    assert max(late - early for early, late in itertools.pairwise(sent)) <= 2.0 + 1e-6
    assert {patience_s for _, patience_s in attempts} == set(SILENT_S)


@pytest.mark.parametrize("takes_s", [1.0, 3.0, 6.0, 12.0, 29.0])
def test_a_broker_that_is_slow_to_answer_gets_its_devices(takes_s: float) -> None:
    pauses = Pauses()
    at_s = 0.0
    while (waits_s := pauses.answer_s) <= takes_s:
        assert waits_s <= max(*SILENT_S, at_s / 15), "what comes of an outage's end is in proportion to it"
        at_s += waits_s + pauses.after(Outcome.UNANSWERED, waits_s)
    assert at_s < 16 * takes_s + 2 * max(SILENT_S)
    assert pauses.patience_s in SILENT_S, "to find a machine at all takes no longer for that"


@given(st.lists(st.tuples(st.sampled_from(Outcome), st.floats(0, 1000)), max_size=60))
def test_no_attempt_waits_for_longer_than_the_longest(ends: list[tuple[Outcome, float]]) -> None:
    pauses = Pauses()
    for outcome, lasted_s in ends:
        pauses.after(outcome, lasted_s)
        assert pauses.patience_s <= pauses.answer_s <= ANSWER_MAX_S
        assert outcome is Outcome.UNANSWERED or pauses.answer_s in SILENT_S


def test_refusals_are_asked_more_and_more_rarely() -> None:
    pauses = Pauses()
    waits = [pauses.after(Outcome.REFUSED, 0.01) for _ in range(12)]
    assert waits == sorted(waits)
    assert waits[-1] == BACKOFF_MAX_S
    assert pauses.after(Outcome.LOST, 60.0) < 1, "once it was well, all is forgotten"


def test_a_broker_that_restarts_is_not_waited_for_long() -> None:
    pauses = Pauses()
    for _ in range(12):
        pauses.after(Outcome.REFUSED, 0.01)
    assert pauses.after(Outcome.CLOSED, 0.01) <= CLOSED_MAX_S


def test_being_accepted_and_dropped_at_once_is_no_success() -> None:
    pauses = Pauses()
    waits = [pauses.after(Outcome.LOST, 0.1) for _ in range(10)]
    assert pauses.dropped_again
    assert waits[0] < 1
    assert waits[-1] > 10
    pauses.after(Outcome.LOST, 5.0)
    assert not pauses.dropped_again


@given(st.lists(st.tuples(st.sampled_from(Outcome), st.floats(0, 100)), max_size=60))
def test_no_pause_is_longer_than_the_longest(ends: list[tuple[Outcome, float]]) -> None:
    pauses = Pauses()
    for outcome, lasted_s in ends:
        assert 0 < pauses.after(outcome, lasted_s) <= BACKOFF_MAX_S


@pytest.mark.parametrize(
    ("error", "outcome"),
    [
        (OSError(errno.ENETUNREACH, "Network is unreachable"), Outcome.AWAY),
        (socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution"), Outcome.AWAY),
        (socket.gaierror(socket.EAI_NONAME, "Name or service not known"), Outcome.REFUSED),
        (ConnectionRefusedError(errno.ECONNREFUSED, "Connection refused"), Outcome.CLOSED),
        (ValueError("no port"), Outcome.REFUSED),
    ],
)
def test_who_bothers_nobody_may_ask_again_soon(error: Exception, outcome: Outcome) -> None:
    assert outcome_of(error) is outcome


def test_versions_take_turns_until_one_is_accepted() -> None:
    versions = Versions("auto")
    assert str(versions.now) == "5"
    versions.hung_up()
    assert str(versions.now) == "3.1.1"
    versions.hung_up()
    assert str(versions.now) == "5"


def test_a_broker_that_is_killed_amid_a_connect_does_not_cost_mqtt_5() -> None:
    versions = Versions("auto")
    versions.accepted()
    versions.lost()
    for _ in range(4):
        versions.hung_up()
        assert str(versions.now) == "5"
    versions.hung_up()
    assert str(versions.now) == "3.1.1", "or it has become another broker"


def test_a_broker_that_took_mqtt_5_is_asked_for_it_again_after_any_outage() -> None:
    """A proxy before it may accept and hang up for as long as it is away."""
    versions = Versions("auto")
    versions.accepted()
    versions.lost()
    for _ in range(5):
        versions.hung_up()
    assert str(versions.now) == "3.1.1"
    versions.accepted()
    versions.lost()
    assert str(versions.now) == "5"


def test_a_broker_that_took_mqtt_5_and_now_says_that_it_has_none_is_another_one() -> None:
    versions = Versions("auto")
    versions.accepted()
    versions.lost()
    versions.refused()
    versions.accepted()
    versions.lost()
    assert str(versions.now) == "3.1.1"


def test_one_accident_at_the_start_is_made_good() -> None:
    versions = Versions("auto")
    versions.hung_up()
    versions.accepted()
    versions.lost()
    assert str(versions.now) == "5"


def test_a_broker_that_says_that_it_has_no_5_is_not_asked_again() -> None:
    versions = Versions("auto")
    versions.refused()
    for _ in range(3):
        assert str(versions.now) == "3.1.1"
        versions.accepted()
        versions.lost()


def test_silence_counts_only_while_nothing_was_ever_accepted() -> None:
    versions = Versions("auto")
    versions.silent()
    assert str(versions.now) == "3.1.1"
    versions.accepted()
    versions.silent()
    assert str(versions.now) == "3.1.1"


def test_a_long_silence_at_the_start_does_not_cost_mqtt_5() -> None:
    versions = Versions("auto")
    for _ in range(9):
        versions.silent()
    assert str(versions.now) == "3.1.1"
    versions.accepted()
    versions.lost()
    assert str(versions.now) == "5"


def test_a_broker_that_swallows_mqtt_5_and_takes_3_1_1_is_soon_not_asked_again() -> None:
    versions = Versions("auto")
    for _ in range(2):
        versions.silent()
        assert str(versions.now) == "3.1.1"
        versions.accepted()
        versions.lost()
    assert str(versions.now) == "3.1.1"


@given(st.lists(st.sampled_from(["hung_up", "refused", "lost", "accepted", "silent"]), max_size=30))
@pytest.mark.parametrize("setting", ["5", "3.1.1"])
def test_a_version_that_is_set_stays(setting: str, happened: list[str]) -> None:
    versions = Versions(setting)  # type: ignore[arg-type]
    for what in happened:
        getattr(versions, what)()
    assert versions.now == setting
