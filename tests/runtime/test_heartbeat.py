from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from runtime.heartbeat import Heartbeat, Progress

EVERY_S = 5.0


def unknown() -> Progress | None:
    return None


def test_a_beat_after_silence_and_the_end_after_as_much_again() -> None:
    heart = Heartbeat(EVERY_S)
    heart.heard(100.0)
    said = {at: heart.look(at, unknown) for at in (104.9, 105.0, 107.0, 109.9, 110.0)}
    assert said == {104.9: "", 105.0: "beat", 107.0: "", 109.9: "", 110.0: "dead"}


def test_whatever_is_heard_begins_it_anew() -> None:
    heart = Heartbeat(EVERY_S)
    heart.heard(0.0)
    assert heart.look(6.0, unknown) == "beat"
    heart.heard(9.0)
    assert heart.look(13.0, unknown) == ""
    assert heart.look(14.0, unknown) == "beat"


def test_zero_switches_it_off() -> None:
    heart = Heartbeat(0.0)
    heart.heard(0.0)
    assert heart.look(1e6, unknown) == ""


def test_a_full_slow_link_is_waited_for_while_it_moves() -> None:
    """60 KB stand before the beat on a link of 2 KB/s: for half a minute nothing can be heard."""
    heart = Heartbeat(EVERY_S)
    heart.heard(0.0)
    said = [heart.look(float(at), lambda at=at: (2_000 * at, 60_000)) for at in range(36)]  # type: ignore[misc]
    assert said.index("beat") == 5
    assert "dead" not in said


def test_a_machine_that_takes_bytes_for_a_broker_that_hangs_is_found() -> None:
    """What comes after the beat is taken for ever, and nothing comes back."""
    heart = Heartbeat(EVERY_S)
    heart.heard(0.0)
    said = [heart.look(float(at), lambda at=at: (2_000 * at, 4_000)) for at in range(30)]  # type: ignore[misc]
    # The beat goes at 5 s; what stood before it is through 2 s later.
    assert said.index("dead") == 12


@given(st.lists(st.tuples(st.floats(0.01, 3.0), st.booleans()), min_size=1, max_size=100))
def test_never_dead_before_two_silences_in_a_row(steps: list[tuple[float, bool]]) -> None:
    heart = Heartbeat(EVERY_S)
    now_s = heard_s = 0.0
    heart.heard(now_s)
    for gap_s, hears in steps:
        now_s += gap_s
        if hears:
            heart.heard(heard_s := now_s)
        said = heart.look(now_s, unknown)
        if said == "dead":
            assert now_s - heard_s >= 2 * EVERY_S
            return
        assert now_s - heard_s < 2 * EVERY_S + 3.0, "nobody is waited for much longer than that"
