from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime import summary
from runtime.datatypes import Dropped, Result
from runtime.summary import Move, Summary, held, summarize

TIERS = ("device", "edge", "cloud")


def line(**fields: Any) -> Result:
    known: dict[str, Any] = {
        "camera": "cam",
        "frame": 0,
        "label": "cat",
        "task": "classify",
        "confidence": 1.0,
        "answer": {"label_index": 0, "topk": [["cat", 1.0]]},
        "tier": "device",
        "exit": 1,
        "agreement": 0.9,
        "codec": None,
        "cut": None,
        "bytes_up": 0,
        "age_ms": 1.0,
    }
    return Result(**{**known, **fields})


def summed(*lines: Result | Dropped, **more: Any) -> Summary:
    return summarize(lines, **{"tiers": TIERS, "stale": {}, "uplink_bytes": None, "jpeg_bytes": {}, **more})


def test_a_run_is_summed_up_by_hand() -> None:
    found = summed(
        line(age_ms=10.0),
        line(age_ms=20.0),
        line(tier="cloud", bytes_up=1000, age_ms=50.0),
        line(bytes_up=500, age_ms=2000.0, degraded="deadline"),
        Dropped("cam", 4, "no exit"),
        stale={"stale": 3},
        uplink_bytes=400,
        jpeg_bytes={"75": 9000.0},
    )
    assert (found.frames, found.answered) == (8, 4)
    assert found.dropped == {"stale": 3, "no exit": 1}
    assert found.degraded == {"deadline": 1}
    assert found.bytes_up_per_frame == 375
    assert found.bytes_up_per_sent_frame == 750
    assert found.uplink_bytes_per_frame == 100
    assert found.tiers["device"].frames == 3
    assert found.tiers["device"].share == 3 / 8
    assert found.tiers["device"].age_p50_ms == 20
    assert found.tiers["edge"].frames == 0
    assert found.tiers["cloud"].age_p95_ms == 50


def test_nothing_at_all_is_summed_up_as_nothing() -> None:
    found = summed()
    assert (found.frames, found.answered, found.bytes_up_per_frame) == (0, 0, 0)
    assert found.bytes_up_per_sent_frame is None
    assert found.uplink_bytes_per_frame is None
    assert summary.text(found).startswith("0 frames, 0 answered\n")


reasons = st.sampled_from(["stale", "deadline", "no exit"])
lines = st.lists(
    st.builds(
        line,
        tier=st.sampled_from(TIERS),
        bytes_up=st.integers(0, 10_000),
        age_ms=st.floats(0, 1e5),
        degraded=st.none() | reasons,
    )
    | st.builds(Dropped, st.just("cam"), st.integers(0, 99), reasons),
    max_size=30,
)


@given(lines, st.dictionaries(reasons, st.integers(0, 9)))
def test_every_frame_is_in_exactly_one_place_in_any_order(
    given_lines: list[Result | Dropped], stale: dict[str, int]
) -> None:
    found = summed(*given_lines, stale=stale)
    assert found.frames == len(given_lines) + sum(stale.values())
    assert found.answered + sum(found.dropped.values()) == found.frames
    assert sum(tier.frames for tier in found.tiers.values()) == found.answered
    backwards = summed(*reversed(given_lines), stale=stale)
    assert msgspec.to_builtins(backwards) == msgspec.to_builtins(found)
    assert summary.text(found).count("\n") >= 6


def test_the_given_counts_are_not_changed() -> None:
    stale = {"stale": 1}
    summed(Dropped("cam", 0, "stale"), stale=stale)
    assert stale == {"stale": 1}


@pytest.mark.parametrize(
    "part",
    [
        "4 frames, 2 answered, 2 dropped (stale)",
        "device 1 25.0% 10.0 ms 10.0 ms",
        "edge 0 0.0% - -",
        "degraded: 1 frames, deadline",
        "this run, over all answered frames 617",
        "over the frames that were sent 1,234",
        "edge to cloud, over all answered frames 5",
        "every frame as JPEG q75, model size 9,001",
    ],
)
def test_the_text_says_it_for_a_person(part: str) -> None:
    found = summed(
        line(age_ms=10.0),
        line(tier="cloud", bytes_up=1234, degraded="deadline"),
        stale={"stale": 2},
        uplink_bytes=10,
        jpeg_bytes={"75": 9000.6},
    )
    assert part in " ".join(summary.text(found).split())


def test_the_summary_is_json() -> None:
    found = summed(line(tier="edge", bytes_up=7))
    assert msgspec.json.decode(msgspec.json.encode(found), type=Summary) == found


def test_plans_are_told_by_how_long_they_held() -> None:
    moves = [
        Move(at_s=at_s, plan=plan, why="", reason="better", rung="full")
        for at_s, plan in ((0.0, "raw"), (2.0, "jpeg"), (9.0, "raw"))
    ]
    assert held(moves, 10.0) == {"jpeg": 7.0, "raw": 3.0}
    assert held([], 10.0) == {}
    found = summed(line(), plans=held(moves, 10.0))
    assert "jpeg                                                     7.0 s" in summary.text(found)
