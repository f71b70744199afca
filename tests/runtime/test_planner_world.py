"""The pilot on the rig's own link in virtual time: `scripts/bench_planner` in small, so that each run is the same."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from runtime import scenario
from runtime.objective import Objective
from runtime.pilot import Pilot
from runtime.plan_tables import Tables
from tests.planner_bundle import planned

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))

from planner_world import Link, Tally, World, run
from scenario_figures import settled_s

TRACE = """
[link]
delay = "80ms"
loss = "1%"
[[phase]]
rate = "1mbit"
duration = "30s"
[[phase]]
rate = "200kbit"
duration = "30s"
[[phase]]
rate = "0"
duration = "30s"
[[phase]]
rate = "700kbit"
duration = "30s"
"""
FRAMES = 15 * 120
STAGES = {"preprocess": 2.0, "segment0": 20.0, "segment1": 6.0, "segment2": 12.0}
LIMIT_MS = 900.0


def world(seed: int) -> World:
    tables = Tables(planned(exits=False), overhead_bytes=66, deepest=0, above=1, rows=())
    return World(tables, STAGES, 15.0, LIMIT_MS, scenario.parse(TRACE), seed)


def planned_run(one: World) -> Tally:
    objective = Objective(optimize="agreement", latency_p95_ms=LIMIT_MS)
    return run(one, Pilot(one.tables, objective, budget_ms=1000, stage_ms=one.stage_ms), None)


@pytest.mark.parametrize("seed", [1, 2])
def test_few_frames_fewer_are_in_time_than_with_the_best_way_of_each_phase(seed: int) -> None:
    mine = planned_run(world(seed))
    ways = [one for one in world(seed).tables.candidates if one.way is not None and one.way.cut == 1]
    fixed = [run(world(seed), None, way) for way in ways if way.variant == 0]
    best = sum(max(tally.by_phase[phase][0] for tally in fixed) for phase in fixed[0].by_phase)
    assert mine.frames == FRAMES
    assert mine.in_time >= 0.9 * best
    assert mine.like / mine.in_time >= max(tally.like / tally.in_time for tally in fixed if tally.in_time >= 0.9 * best)


@pytest.mark.parametrize("seed", [1, 2])
def test_steps_of_the_link_are_followed_within_seconds(seed: int) -> None:
    one = world(seed)
    mine = planned_run(one)
    for phase in one.scenario.phases:
        if phase.open:
            end_s = phase.start_s + phase.duration_s
            good = [mark for mark in mine.good if phase.start_s <= mark[0] < end_s]
            at_s = settled_s(good, phase.start_s, phase.duration_s)
            assert at_s is not None
            assert at_s <= 3


def test_every_frame_ends_in_one_way() -> None:
    mine = planned_run(world(3))
    assert mine.in_time + sum(mine.why.values()) == mine.frames == FRAMES


def test_the_link_carries_what_its_rate_allows() -> None:
    trace = scenario.parse('[[phase]]\nrate = "80kbit"\nduration = "20s"\n[link]\ndelay = "50ms"')
    link, now_s = Link(trace, 0), 0.0
    arrived: list[tuple[float, int]] = []
    for number in range(10):
        link.put(0, number, 10_000)
    while len(arrived) < 10:
        next_s, messages = link.turn(now_s)
        arrived += [(now_s, number) for _, number in messages]
        now_s = max(next_s, now_s + 1e-6)
    assert [number for _, number in arrived] == list(range(10))
    assert arrived[-1][0] == pytest.approx(10 + 0.05, rel=0.08), "100 kB at 10 kB a second, and their headers"


def test_a_fixed_way_is_one_candidate() -> None:
    one = world(4)
    ways = [way for way in one.tables.candidates if way.way is not None and way.way.cut == 1 and way.variant == 0]
    few, many = (run(one, None, way) for way in (ways[1], ways[0]))
    assert (few.moves, many.moves) == (0, 0)
    assert few.in_time > 0.95 * 15 * 90
    assert many.in_time < few.in_time, "raw is too much for the slow phases"
