from __future__ import annotations

import math
import re
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime import scenario
from runtime.errors import ConfigError
from runtime.scenario import Kill, Phase, Way, parse

FOLDER = Path(__file__).parent.parent.parent / "scripts" / "scenarios"
PHASES = """
[link]
delay = "80ms"
loss = "1%"
[[phase]]
rate = "8mbit"
duration = "30s"
[[phase]]
name = "gone"
outage = "refused"
duration = "1min"
[[phase]]
rate = "1mbit"
loss = "0"
duration = "500ms"
[phase.down]
rate = "unlimited"
"""


def test_phases_follow_each_other_and_inherit_what_they_leave_out() -> None:
    found = parse(PHASES)
    usual = Way(rate=math.inf, delay_s=0.08, loss=0.01)
    assert found.phases == (
        Phase("8mbit", 0, 30, Way(1e6, 0.08, 0, 0.01), Way(1e6, 0.08, 0, 0.01)),
        Phase("gone", 30, 60, usual, usual, "refused"),
        Phase("1mbit", 90, 0.5, Way(125e3, 0.08), Way(math.inf, 0.08)),
    )
    assert [phase.open for phase in found.phases] == [True, False, True]
    assert found.duration_s == 90.5
    assert [found.index(at_s) for at_s in (-1, 0, 29.9, 30, 90, 1e9)] == [0, 0, 0, 1, 2, 2]
    assert [found.next_change_s(at_s) for at_s in (-1, 0, 30, 90)] == [0, 30, 90, math.inf]


def test_kills_and_stalls_come_again_and_again() -> None:
    found = parse(
        PHASES
        + """
[[kill]]
what = "broker"
at = "5s"
down = "2s"
repeat = 3
pause = "1s"
[[kill]]
what = "edge"
at = "1s"
[[stall]]
at = "2s"
lasts = "3s"
repeat = 2
pause = "1s"
"""
    )
    assert [(kill.what, round(kill.at_s, 6), round(kill.down_s, 6)) for kill in found.kills] == [
        ("edge", 1, 1),
        ("broker", 5, 2),
        ("broker", 8, 2),
        ("broker", 11, 2),
    ]
    assert found.stalls == ((2, 3), (6, 3))


@given(
    st.integers(0, 2**31),
    st.floats(0.1, 5),
    st.floats(1, 10),
    st.integers(1, 40),
    st.floats(0.1, 9),
    st.sampled_from([0.0, 0.5, 1.0]),
)
def test_kills_are_drawn_by_the_seed_and_never_overlap(
    seed: int, least_s: float, times: float, repeat: int, pause_s: float, mid_packet: float
) -> None:
    text = f"""seed = {seed}
[[phase]]
duration = "{60 * repeat + 100}s"
[[kill]]
what = "broker"
at = "0s"
down = "{least_s:.3f}s"
down_most = "{least_s * times + 0.01:.3f}s"
repeat = {repeat}
pause = "{pause_s:.3f}s"
mid_packet = {mid_packet}
"""
    kills = parse(text).kills
    assert parse(text).kills == kills
    assert len(kills) == repeat
    assert all(least_s - 0.01 <= kill.down_s <= least_s * times + 0.02 for kill in kills)
    for kill, after in pairwise(kills):
        assert after.at_s == pytest.approx(kill.at_s + kill.down_s + pause_s, abs=0.001)
    if mid_packet != 0.5:
        assert {kill.mid_packet for kill in kills} == {mid_packet == 1.0}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('[[phase]]\nduration = "3s"\nratte = "1mbit"', "phase[0].ratte: unknown key; did you mean rate?"),
        ('[[phases]]\nduration = "3s"', "phases: unknown key; did you mean phase?"),
        ('[[phase]]\nrate = "1mbit"', "phase[0].duration: missing"),
        ("phase = []", "phase: empty; write at least one table [[phase]]"),
        ('[[phase]]\nduration = "3s"\noutage = "loud"', "phase[0].outage: invalid enum value 'loud'; choose one of"),
        ('[[phase]]\nduration = "3"', "phase[0].duration: '3' is no time; write it like 80ms, 60s or 5min"),
        ('[[phase]]\nduration = "0s"', "phase[0].duration: a phase lasts longer than nothing"),
        ('[[phase]]\nduration = "3s"\nrate = "5"', "phase[0].rate: '5' is no rate"),
        ('[[phase]]\nduration = "3s"\nloss = "100%"', "phase[0].loss: '100%' is no share below 1"),
        ('[link]\ndelay = "soon"\n[[phase]]\nduration = "3s"', "link.delay: 'soon' is no time"),
        (
            '[[phase]]\nduration = "3s"\n[[kill]]\nwhat = "broker"\nat = "2s"\ndown = "4s"',
            "the kills of broker end 6 s after the start, the phases after 3 s: lengthen a phase",
        ),
        (
            '[[phase]]\nduration = "3s"\n[[kill]]\nwhat = "edge"\nat = "2s"\nmid_packet = 0.5',
            "kill[0].mid_packet: only of broker and link",
        ),
        (
            '[[phase]]\nduration = "30s"\n[[kill]]\nwhat = "edge"\nat = "2s"\ndown = "3s"\ndown_most = "1s"',
            "kill[0].down: longer than nothing, and no longer than down_most",
        ),
        ('[[phase]]\nduration = "3s"\n[[stall]]\nat = "1s"', "the stalls end 4 s after the start"),
        ("phase", "is not TOML"),
    ],
)
def test_what_is_wrong_is_said_in_one_sentence(text: str, words: str) -> None:
    with pytest.raises(ConfigError) as failure:
        parse(text, "bad.toml")
    assert str(failure.value).startswith("bad.toml")
    assert words in str(failure.value)


@given(st.floats(0.001, 1e6))
def test_quantities_are_read_in_every_unit(value: float) -> None:
    number = f"{value:.6f}"
    exact = float(number)
    assert scenario.rate(f"{number}kbit") == pytest.approx(scenario.rate(f"{number}mbit/s") / 1000)
    assert scenario.rate(f"{number}bit") == pytest.approx(exact / 8)
    assert scenario.seconds(f"{number}ms") == pytest.approx(exact / 1000)
    assert scenario.seconds(f"{number}min") == pytest.approx(exact * 60)
    if exact < 1:
        assert scenario.share(number) == pytest.approx(scenario.share(f"{number}%") * 100)


def test_a_fixed_link_never_ends() -> None:
    found = scenario.fixed("256kbit", "80ms", None, "1%")
    way = Way(32_000, 0.08, 0, 0.01)
    assert found.phases == (Phase("rate 256kbit, delay 80ms, loss 1%", 0, math.inf, way, way),)
    assert math.isinf(found.duration_s)


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.toml")), ids=lambda path: path.stem)
def test_the_shipped_scenarios_can_be_read(path: Path) -> None:
    found = scenario.load(path)
    assert found.title
    assert found.duration_s > 60


def test_the_scenario_in_the_documentation_can_be_read() -> None:
    text = (FOLDER.parent.parent / "docs" / "operations.md").read_text("utf-8")
    (block,) = [part for part in re.findall(r"```toml\n(.*?)```", text, re.DOTALL) if "[[phase]]" in part]
    assert len(parse(block).kills) == 3


def test_the_steps_are_those_of_the_contract() -> None:
    steps = scenario.load(FOLDER / "steps.toml")
    assert [phase.up.rate * 8 for phase in steps.phases] == [8e6, 256e3, 0, 1e6]
    assert steps.phases[2].duration_s == 60
    assert all(phase.up == phase.down for phase in steps.phases)
    assert {(phase.up.delay_s, phase.up.loss) for phase in steps.phases} == {(0.08, 0.01)}


def test_the_kills_are_many_and_of_every_kind() -> None:
    kills = scenario.load(FOLDER / "kills.toml")
    count = {what: sum(kill.what == what for kill in kills.kills) for what in ("broker", "edge", "cloud")}
    assert count["broker"] == 100
    assert count["edge"] + count["cloud"] == 100
    assert len(kills.stalls) == 20
    downs = [kill.down_s for kill in kills.kills if kill.what == "broker"]
    assert min(downs) >= 1
    assert 30 < max(downs) <= 60
    assert Kill("broker", kills.kills[0].at_s, kills.kills[0].down_s, kills.kills[0].mid_packet) in kills.kills
    assert 10 < sum(kill.mid_packet for kill in kills.kills) < 90
