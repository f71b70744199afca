"""What `scripts/bench_scenario` counts, and one short run of it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime.datatypes import Dropped, Result
from runtime.scenario import Phase, Scenario, Way

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))

from event_consumer import tally
from process_watch import trend
from retimed_clip import clip_fps, retimed
from rival_h264 import Encoder, Stream
from scenario_figures import agreed, figures, settled_s

ROOT = Path(__file__).resolve().parents[2]
FPS = 16.0  # whose frames are due at exact fractions
SECONDS = st.integers(6, 20)


def answer(frame: int, **fields: Any) -> Result:
    rest: dict[str, Any] = {"label": "cat", "task": "classify", "confidence": 1.0, "answer": {}, "tier": "cloud"}
    more: dict[str, Any] = {"exit": 3, "agreement": None, "codec": None, "cut": None, "bytes_up": 0, "age_ms": 50.0}
    return Result(**{"camera": "cam0", "frame": frame, **rest, **more, **fields})


def steps(good: str) -> list[tuple[float, bool]]:
    """A letter a second: `+` for frames that are all good, `-` for none, `h` for every second one."""
    marks = {"+": (True, True), "-": (False, False), "h": (True, False)}
    return [
        (second + place / FPS, marks[letter][place % 2]) for second, letter in enumerate(good) for place in range(16)
    ]


@pytest.mark.parametrize(
    ("good", "settled"),
    [
        ("++++++++", 0.0),
        ("---+++++", 2.8125),  # a second that is good but for three of its frames will do
        ("--++-+++++++", 4.8125),  # it was reached before, and not kept
        ("--hhhhhh", 1.8125),  # what the phase comes to is the measure, not all frames
        ("--------", None),  # nothing to settle to
        ("----+---", None),  # never for three seconds
    ],
)
def test_a_phase_has_settled_when_it_keeps_what_it_comes_to(good: str, settled: float | None) -> None:
    found = settled_s(steps(good), 0.0, len(good))
    assert found == settled


@given(st.lists(st.booleans(), min_size=96, max_size=320), st.integers(-100, 100))
def test_settling_is_kept_for_three_seconds_and_knows_no_clock(good: list[bool], start_s: int) -> None:
    duration_s = len(good) / FPS
    frames = [(number / FPS, mark) for number, mark in enumerate(good)]
    found = settled_s(frames, 0.0, duration_s)
    assert settled_s([(at_s + start_s, mark) for at_s, mark in frames], start_s, duration_s) == found
    steady = good[len(good) // 2 + len(good) % 2 :]
    if found is None:
        return
    assert 0 <= found <= duration_s - 3
    first = int(found * FPS)
    for second in range(3):
        own = good[first + 16 * second : first + 16 * (second + 1)]
        assert sum(own) / 16 >= 0.8 * sum(steady) / len(steady) - 1e-9


@settings(max_examples=40)
@given(st.data(), SECONDS)
def test_every_captured_frame_counts_once(data: st.DataObject, seconds: int) -> None:
    way, shut = Way(), Way(rate=0.0)
    middle = seconds / 2
    phases = (Phase("good", 0, middle, way, way), Phase("shut", middle, seconds - middle, shut, shut))
    stalls = ((1.0, 0.5),)
    plan = Scenario(phases, stalls=stalls)
    given_frames = [number for number in range(int(seconds * FPS)) if not 1.0 <= number / FPS < 1.5]
    lines: list[Result | Dropped] = []
    for number in given_frames:
        what = data.draw(st.sampled_from(["answer", "late", "old", "degraded", "dropped", "overwritten"]))
        if what == "dropped":
            lines.append(Dropped("cam0", number, "offline: nobody"))
        elif what != "overwritten":
            flag = {"late": "deadline", "degraded": "busy: 4"}.get(what)
            lines.append(answer(number, age_ms=900.0 if what in ("late", "old") else 50.0, degraded=flag))
    found = figures(
        [(line.frame / FPS if isinstance(line, Result) else 99.0, line) for line in lines],
        plan,
        fps=FPS,
        captured=len(given_frames),
        budget_ms=500,
        link_bytes=[(1, 2), (3, 4)],
        judge=lambda line: (1, 1) if line.frame % 2 else (1, 2),
    )
    assert sum(phase.frames for phase in found) == len(given_frames)
    for phase in found:
        assert phase.frames == phase.answered + sum(phase.dropped.values())
        assert phase.undegraded == sum(phase.by.values()) <= phase.in_time <= phase.answered
    unflagged = [line for line in lines if isinstance(line, Result) and line.age_ms > 500 and line.degraded is None]
    assert sum(phase.unflagged for phase in found) == len(unflagged)
    assert found[1].settled_s is None
    assert (found[1].bytes_up, found[1].bytes_down) == (3, 4)


def test_a_camera_that_lags_changes_no_phase() -> None:
    way = Way()
    plan = Scenario((Phase("one", 0, 10, way, way), Phase("two", 10, 10, way, way)))
    late: list[tuple[float, Result | Dropped]] = [(number * 0.1, answer(number)) for number in range(0, 100, 2)]
    late[25:] = [(5 + (number - 50) * 0.2, answer(number)) for number in range(50, 100, 2)]
    one, two = figures(
        [*late, (50.0, Dropped("cam0", 99, "offline"))],
        plan,
        fps=10,
        captured=100,
        budget_ms=500,
        link_bytes=[(0, 0), (0, 0)],
        judge=lambda line: (1, 1),
    )
    assert (one.frames, two.frames) == (75, 25)
    assert one.dropped == {"stale": 37}
    assert two.dropped == {"stale": 12, "offline": 1}


def test_agreement_pools_parts_and_resamples_seconds() -> None:
    found = agreed([(0.1, 1, 2), (0.2, 1, 2), (7.0, 4, 4)])
    assert found is not None
    assert (found.share, found.n) == (0.75, 3)
    assert (found.low, found.high) == (0.5, 1.0)
    assert agreed([]) is None


def test_a_trend_is_told_from_noise() -> None:
    times = np.arange(900) * 2.0
    noise = np.repeat(np.random.default_rng(1).normal(0, 0.5, 90), 10)  # neighbours are alike
    flat, rising = trend(list(times), list(100 + noise)), trend(list(times), list(100 + noise + times / 3600 * 20))
    assert flat is not None
    assert rising is not None
    assert flat.low < 0 < flat.high
    assert rising.low < 20 < rising.high
    assert rising.low > 0
    assert rising.per_hour - flat.per_hour == pytest.approx(20)
    assert trend(list(times[:19]), list(times[:19])) is None


@given(st.lists(st.tuples(st.sampled_from("ab"), st.integers(1, 40)), max_size=80), st.integers(0, 5))
def test_events_are_counted_once_each(came: list[tuple[str, int]], missed: int) -> None:
    made = len(set(came)) + missed
    found = tally(came, made)
    assert found.delivered + found.lost == made
    assert found.lost == missed
    assert found.twice == len(came) - found.delivered
    assert found.twice_after_inbox == 0


def test_gaps_between_events_are_seen() -> None:
    found = tally([("run", 1), ("run", 4), ("run", 4), ("run", 2)], 5)
    assert (found.gaps, found.lost, found.twice) == (1, 2, 1)


def test_a_clip_plays_at_another_pace_with_the_same_pictures(tmp_path: Path) -> None:
    import cv2

    path = tmp_path / "clip.avi"
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"MJPG"), 10.0, (64, 48))
    pictures = np.random.default_rng(0).integers(0, 255, (12, 48, 64, 3), np.uint8)
    for picture in pictures:
        writer.write(picture)
    writer.release()
    copy = retimed(path, 15.0, tmp_path)
    assert (clip_fps(path), clip_fps(copy)) == (10.0, 15.0)
    assert retimed(path, 10.0, tmp_path) == path
    frames = []
    for each in (path, copy):
        clip = cv2.VideoCapture(str(each))
        frames.append([clip.read()[1] for _ in pictures])
        assert not clip.read()[0]
        clip.release()
    assert all((one == other).all() for one, other in zip(*frames, strict=True))


def test_the_rival_keeps_to_its_bytes_and_begins_with_a_key_frame() -> None:
    import av

    encoder = Encoder(200, 15.0, 96, 128)
    rng = np.random.default_rng(0)
    base = rng.integers(0, 255, (96, 160, 3), np.uint8)
    sizes = []
    decoder: Any = av.CodecContext.create("h264", "r")
    for number in range(90):
        data = encoder.encode(np.ascontiguousarray(base[:, number % 30 : number % 30 + 128]))
        sizes.append(len(data))
        packet = av.Packet(data)
        frames = decoder.decode(packet)
        assert len(frames) == 1, "each comes out at once"
        assert frames[0].key_frame == (number % 30 == 0)
    assert sum(sizes) * 8 / 6 < 200_000 * 1.1
    assert Stream.of("h264:300:640") == Stream(300, 640)
    for wrong in ("h264", "h264:", "h264:0", "h264:a", "h264:1:2:3"):
        with pytest.raises(ValueError, match="no stream"):
            Stream.of(wrong)


SHORT = """
[link]
delay = "10ms"
[[phase]]
name = "good"
rate = "4mbit"
duration = "3s"
[[phase]]
name = "shut"
rate = "0"
duration = "1s"
"""


def test_a_short_run_of_a_plan_and_of_the_rival(
    shared_bundle: Path, photos: Path, tmp_path: Path, mosquitto_binary: str
) -> None:
    path = tmp_path / "short.toml"
    path.write_text(SHORT)
    script = [sys.executable, str(ROOT / "scripts/bench_scenario"), str(shared_bundle), "--source", str(photos)]
    planned = "objective:optimize=agreement,latency_p95_ms=600"
    configs = ["--config", planned, "--config", "h264:300"]
    options = ["--scenario", str(path), "--fps", "10", "--budget-ms", "700", *configs]
    lines = tmp_path / "lines.jsonl"
    done = subprocess.run(
        [*script, *options, "--out", str(lines)], capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr
    plan, rival = [json.loads(line) for line in lines.read_text("utf-8").splitlines()]
    for run in (plan, rival):
        good, shut = run["phases"]
        assert 25 <= good["frames"] <= 32
        assert good["in_time"] > 0
        assert good["agreement"]["share"] > 0
        assert good["bytes_up"] > 0
        assert run["frames"]["unaccounted"] == run["frames"]["told_twice"] == run["all"]["unflagged"] == 0
        assert shut["link"] is False
    assert plan["moves"][0]["at_s"] == 0
    assert sum(plan["plans"].values()) == pytest.approx(4, abs=0.1)
    assert f"{planned} against each other one" in done.stdout
    assert done.stdout.count("kept    frames unaccounted: 0, told twice: 0") == 2
    assert done.stdout.count("p95 of age within 600 ms in each phase with a link") == 1
