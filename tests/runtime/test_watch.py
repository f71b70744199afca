"""A device that tells events and repeats answers, from pictures in a folder to what a subscriber hears."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import pytest

from runtime.config import BrokerConfig, CameraConfig, DeviceConfig, EventsConfig
from runtime.counters import Counters
from runtime.datatypes import Dropped, Result
from runtime.device import Device
from runtime.gate_spec import GateSpec
from runtime.link import open_link
from tests.lamp_bundle import as_lamp, pictures

TREE = "kinflow/v1/home/d/board/cam/porch"


@pytest.fixture
def lamp(tiny_bundle: Path) -> Path:
    """The tiny bundle as a detector of one segment."""
    return as_lamp(tiny_bundle)


def run(
    bundle: Path, source: Path, broker: BrokerConfig, **settings: Any
) -> tuple[list[Result], list[tuple[str, Any]], dict[str, int]]:
    heard: list[tuple[str, Any]] = []
    watcher = open_link(broker, client_id="watcher", counters=Counters())

    def hear(topic: str, payload: bytes) -> None:
        kind = topic.rpartition("/")[2]
        if kind in ("event", "state"):
            assert topic == f"{TREE}/{kind}"
            heard.append((kind, json.loads(payload)))

    watcher.subscribe("kinflow/v1/home/d/+/cam/+/+", hear)
    watcher.start()
    lines: list[Result | Dropped] = []
    camera = CameraConfig(kind="replay", source=str(source), realtime=True, max_fps=50)
    given: dict[str, Any] = {"bundle": str(bundle), "broker": broker, "id": "board", "camera": {"porch": camera}}
    device = Device(DeviceConfig(**(given | settings)), lines.append)
    device.run(threading.Event())
    watcher.close()
    return [line for line in lines if isinstance(line, Result)], heard, device.counters.snapshot()


def test_a_lamp_that_goes_on_and_off_is_one_event(lamp: Path, tmp_path: Path, memory_broker: BrokerConfig) -> None:
    source = pictures(tmp_path / "lamp", [10] * 4 + [200] * 16 + [10] * 24)
    events = EventsConfig(gone_ms=200)
    _, heard, counters = run(lamp, source, memory_broker, events=events)
    told = [message for kind, message in heard if kind == "event"]
    assert [(event["type"], event["label"], event["reason"]) for event in told] == [
        ("new", "lamp", None),
        ("end", "lamp", "gone"),
    ]
    assert told[0]["id"] == told[1]["id"]
    # The tiny bundle crops the centre: of 64x48 pixels the columns from 8 on, and the box is their middle half.
    assert told[0]["box"] == [20.0, 12.0, 44.0, 36.0]
    assert told[0]["score"] == pytest.approx(200 / 255, abs=1e-3)
    assert 100 < told[1]["duration_ms"] < 2000  # 300 where no frame is lost and none is late
    assert told[0]["age_ms"] > 0
    assert counters['events_total{camera="porch",type="new"}'] == 1
    states = [message["count"] for kind, message in heard if kind == "state"]
    assert states == [None, {}, {"lamp": 1}, {}, None]


def test_what_is_there_at_the_end_ends_as_stopping(lamp: Path, tmp_path: Path, memory_broker: BrokerConfig) -> None:
    _, heard, _ = run(lamp, pictures(tmp_path / "on", [200] * 6), memory_broker)
    told = [message for kind, message in heard if kind == "event"]
    assert [(event["type"], event["reason"]) for event in told] == [("new", None), ("end", "stopping")]
    assert [event["sequence"] for event in told] == [1, 2]
    assert len({event["session"] for event in told}) == 1
    assert all(0 <= event["age_ms"] < 2000 for event in told)
    assert heard[-1] == ("state", {"camera": "porch", "frame": 5, "count": None, "total": None, "ids": {}})


def test_events_can_be_switched_off(lamp: Path, tmp_path: Path, memory_broker: BrokerConfig) -> None:
    source = pictures(tmp_path / "on", [200] * 6)
    _, heard, counters = run(lamp, source, memory_broker, events=EventsConfig(enabled=False))
    assert heard == []
    assert not [name for name in counters if name.startswith("events_")]


def test_labels_are_told_only_when_asked_for(shared_bundle: Path, tmp_path: Path, memory_broker: BrokerConfig) -> None:
    source = pictures(tmp_path / "on", [200] * 6)
    assert run(shared_bundle, source, memory_broker, last_segment=2)[1] == []
    on = EventsConfig(enabled=True)
    results, heard, _ = run(shared_bundle, source, memory_broker, last_segment=2, events=on)
    told = [message for kind, message in heard if kind == "event"]
    assert [(event["type"], event["label"], event["box"]) for event in told] == [
        ("new", results[0].label, None),
        ("end", results[0].label, None),
    ]


def test_a_still_picture_is_answered_by_repetition_and_says_so(
    lamp: Path, tmp_path: Path, memory_broker: BrokerConfig
) -> None:
    bundle = as_lamp(lamp, GateSpec(threshold=8.0))
    source = pictures(tmp_path / "lamp", [10] * 10 + [200] * 10)
    results, _, counters = run(bundle, source, memory_broker)
    repeats = [result for result in results if result.repeats is not None]
    # On a busy machine the camera's slot may lose a frame; it is counted.
    lost = sum(count for name, count in counters.items() if name.startswith("frames_dropped_total"))
    assert len(results) + lost == 20
    assert 2 <= len(results) - len(repeats) <= 4  # the first of either, and one or two that are audited
    by_frame = {result.frame: result for result in results}
    for result in repeats:
        assert result.repeats is not None
        of = by_frame[result.repeats]
        assert of.repeats is None
        assert (result.label, result.answer, result.exit) == (of.label, of.answer, of.exit)
        assert (result.frame < 10) == (result.repeats < 10)
        assert (result.bytes_up, result.tier, result.agreement) == (0, "device", 0.95)
        assert "gate" in result.timings
        assert not [stage for stage in result.timings if stage.startswith("device")]
    assert counters['results_total{camera="porch",exit="repeat",tier="device"}'] == len(repeats)
    assert counters.get('gate_audits_total{camera="porch"}', 0) == len(results) - len(repeats) - 2


@pytest.mark.parametrize(("gate", "repeats"), [("off", False), (8.0, True), ("auto", False)])
def test_the_gate_obeys_the_settings(
    lamp: Path, tmp_path: Path, memory_broker: BrokerConfig, gate: str | float, repeats: bool
) -> None:
    """auto: this bundle has none that was shown to keep anything."""
    bundle = as_lamp(lamp, GateSpec(threshold=None, note="too few frames") if gate == "auto" else GateSpec(threshold=8))
    results, _, _ = run(bundle, pictures(tmp_path / "on", [200] * 6), memory_broker, gate=gate)
    assert any(result.repeats is not None for result in results) == repeats
    assert all(result.agreement is None for result in results if result.repeats is not None)


def test_a_repeated_answer_grows_no_older_than_allowed(lamp: Path, tmp_path: Path, memory_broker: BrokerConfig) -> None:
    source = pictures(tmp_path / "on", [200] * 20)
    results, _, _ = run(lamp, source, memory_broker, gate=8.0, gate_max_age_ms=60)
    assert all(result.frame - result.repeats <= 4 for result in results if result.repeats is not None)
    assert sum(result.repeats is None for result in results) >= 5
