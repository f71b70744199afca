from __future__ import annotations

import math
import threading
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime.scenario import Kill
from runtime.strikes import Step, Strikes, steps

kills = st.lists(
    st.builds(Kill, st.sampled_from(["broker", "edge"]), st.floats(0, 100), st.floats(0.1, 60)), max_size=20
)


@given(kills)
def test_everything_that_goes_down_comes_back_in_the_order_of_time(given_kills: list[Kill]) -> None:
    found = steps(given_kills)
    assert [step.at_s for step in found] == sorted(step.at_s for step in found)
    assert sorted(map(repr, (step.kill for step in found if not step.comes_back))) == sorted(map(repr, given_kills))
    for kill in given_kills:
        times = [(step.at_s, step.comes_back) for step in found if step.kill is kill]
        assert times == [(kill.at_s, False), (kill.at_s + kill.down_s, True)]


def test_steps_are_taken_at_their_times_and_the_end_last() -> None:
    done: list[tuple[float, bool]] = []
    ended = threading.Event()

    def act(step: Step) -> None:
        done.append((time.monotonic() - start_s, step.comes_back))

    with Strikes([Kill("broker", 0.05, 0.1)], 0.3, act, ended.set) as strikes:
        start_s = time.monotonic()
        strikes.begin(start_s)
        assert ended.wait(20)
        assert time.monotonic() - start_s >= 0.3
    assert [back for _, back in done] == [False, True]
    assert done[0][0] >= 0.05
    assert done[1][0] >= 0.15


def test_leaving_stops_what_has_not_happened_yet() -> None:
    done: list[Step] = []
    ended = threading.Event()
    before = threading.active_count()
    with Strikes([Kill("broker", 1e9, 1)], math.inf, done.append, ended.set) as strikes:
        strikes.begin(time.monotonic())
    assert not done
    assert not ended.is_set()
    assert threading.active_count() == before
    with Strikes([], math.inf, done.append, ended.set):
        pass  # never begun


def test_what_fails_ends_the_run_and_is_told() -> None:
    ended = threading.Event()

    def act(step: Step) -> None:
        raise OSError("no broker")

    strikes = Strikes([Kill("broker", 0, 1)], math.inf, act, ended.set)
    strikes.begin(time.monotonic())
    assert ended.wait(20)
    with pytest.raises(OSError, match="no broker"):
        strikes.__exit__()
