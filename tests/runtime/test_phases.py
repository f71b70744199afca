from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime.datatypes import Dropped, Result
from runtime.phases import table, tabulate
from runtime.scenario import Phase, Scenario, Way

TWO = Scenario((Phase("good", 0, 10, Way(), Way()), Phase("bad", 10, 5, Way(rate=0), Way(rate=0))))


def line(**fields: Any) -> Result:
    ours: dict[str, Any] = {"camera": "cam", "frame": 0, "label": "cat", "task": "classify", "confidence": 1.0}
    rest: dict[str, Any] = {"answer": {}, "tier": "device", "exit": 1, "agreement": 0.9, "codec": None, "cut": None}
    return Result(**{**ours, **rest, "bytes_up": 0, "age_ms": 1.0, **fields})


def test_frames_are_told_apart_by_phase_and_by_what_became_of_them() -> None:
    good, bad = tabulate(
        [
            (-0.1, line(age_ms=10)),
            (1, line(age_ms=30)),
            (9.9, line(age_ms=201)),
            (10, line(age_ms=202, degraded="deadline")),
            (11, line(age_ms=5, degraded="refused: busy: 9 frames")),
            (12, Dropped("cam", 3, "offline: nobody there")),
            (99, line(age_ms=5)),
        ],
        TWO,
        200,
        [(1000, 20), (0, 3)],
    )
    assert (good.name, good.start_s, good.duration_s) == ("good", 0, 10)
    assert (good.frames, good.in_time, good.stale, good.late) == (3, 2, 1, 0)
    assert (good.degraded, good.dropped) == ({}, {})
    assert good.age_p50_ms == 30
    assert (good.bytes_up, good.bytes_down) == (1000, 20)
    assert (bad.frames, bad.in_time, bad.stale, bad.late) == (4, 1, 0, 1)
    assert bad.degraded == {"deadline": 1, "refused": 1}
    assert bad.dropped == {"offline": 1}
    text = table((good, bad)).splitlines()
    assert " ".join(text[1].split()) == "good 0 s 3 2 0 1 0 0 30 ms 184 ms 1,000 20"
    assert text[3].strip() == "1 deadline; 1 refused; 1 dropped: offline"


def test_a_phase_without_frames_has_no_ages() -> None:
    (only,) = tabulate([], Scenario((Phase("", 0, math.inf, Way(), Way()),)), 200, [(0, 0)])
    assert (only.frames, only.age_p50_ms, only.age_p95_ms, only.duration_s) == (0, None, None, None)
    assert table((only,)).splitlines()[1].split()[-4:] == ["-", "-", "0", "0"]


reasons = st.sampled_from(["deadline", "busy"])
lines = st.lists(
    st.tuples(
        st.floats(-5, 30),
        st.builds(line, age_ms=st.floats(0, 500), degraded=st.none() | reasons)
        | st.builds(Dropped, st.just("cam"), st.integers(0, 9), reasons),
    ),
    max_size=40,
)


@given(lines, st.floats(1, 400))
def test_every_frame_is_in_one_phase_and_in_one_place(given_lines: list[tuple[float, Any]], budget_ms: float) -> None:
    found = tabulate(given_lines, TWO, budget_ms, [(0, 0), (0, 0)])
    assert sum(phase.frames for phase in found) == len(given_lines)
    for phase in found:
        dropped, degraded = sum(phase.dropped.values()), sum(phase.degraded.values())
        assert phase.frames == phase.in_time + degraded + phase.stale + dropped
        assert phase.late <= degraded


def test_the_link_bytes_are_of_every_phase() -> None:
    with pytest.raises(ValueError, match="argument 3 is shorter"):
        tabulate([], TWO, 200, [(0, 0)])
