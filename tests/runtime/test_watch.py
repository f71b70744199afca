"""A device that tells events and repeats answers, from pictures in a folder to what a subscriber hears."""

from __future__ import annotations

import hashlib
import json
import threading
from pathlib import Path
from typing import Any

import cv2
import msgspec
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from runtime import manifest
from runtime.config import BrokerConfig, CameraConfig, DeviceConfig, EventsConfig
from runtime.counters import Counters
from runtime.datatypes import Dropped, Result
from runtime.device import Device
from runtime.gate_spec import GateSpec
from runtime.link import open_link
from runtime.manifest import ExitSpec, FileSpec, SegmentSpec, TierSpec

SIDE = 16
TREE = "kinflow/v1/home/d/board/cam/porch"


def lamp_detector() -> bytes:
    """One box in the middle whose score is the picture's mean brightness: uint8 (n, 16, 16, 3) to (n, 2, 6)."""
    box = np.array([[[0.25, 0.25, 0.75, 0.75, 0, 0], [0, 0, 0, 0, 0, 0]]], np.float32)
    score = np.array([[[0, 0, 0, 0, 1 / 255, 0], [0, 0, 0, 0, 0, 0]]], np.float32)
    nodes = [
        helper.make_node("Cast", ["in"], ["float"], to=TensorProto.FLOAT),
        helper.make_node("ReduceMean", ["float"], ["mean"], axes=[1, 2, 3], keepdims=0),
        helper.make_node("Reshape", ["mean", "shape"], ["column"]),
        helper.make_node("Mul", ["column", "score"], ["scores"]),
        helper.make_node("Add", ["scores", "box"], ["out"]),
    ]
    graph = helper.make_graph(
        nodes,
        "lamp",
        [helper.make_tensor_value_info("in", TensorProto.UINT8, ["N", SIDE, SIDE, 3])],
        [helper.make_tensor_value_info("out", TensorProto.FLOAT, ["N", 2, 6])],
        [
            numpy_helper.from_array(np.array([-1, 1, 1], np.int64), "shape"),
            numpy_helper.from_array(box, "box"),
            numpy_helper.from_array(score, "score"),
        ],
    )
    data: bytes = helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9
    ).SerializeToString()
    onnx.checker.check_model(onnx.load_model_from_string(data))
    return data


@pytest.fixture
def lamp(tiny_bundle: Path) -> Path:
    """The tiny bundle as a detector of one segment."""
    return with_gate(tiny_bundle, None)


def with_gate(path: Path, gate: GateSpec | None) -> Path:
    made = manifest.load(path).manifest
    for name, data in {"segments/0.onnx": lamp_detector(), made.labels: b"lamp\n"}.items():
        (path / name).write_bytes(data)
    kept = [made.labels, made.golden, "segments/0.onnx"]
    files = {name: (path / name).read_bytes() for name in kept}
    changed = msgspec.structs.replace(
        made,
        task="detect",
        settings={"score_threshold": 0.5},
        gate=gate,
        segments=(SegmentSpec(file="segments/0.onnx", macs=1, max_batch_size=8),),
        cuts=(made.cuts[0], msgspec.structs.replace(made.cuts[-1], shape=(2, 6))),
        exits=(ExitSpec(cut=1, file=None, temperature=1.0, threshold=0.0, agreement=1.0),),
        tiers=(TierSpec(name="device", last_segment=0),),
        files=tuple(
            FileSpec(path=name, size_bytes=len(data), sha256=hashlib.sha256(data).hexdigest())
            for name, data in files.items()
        ),
    )
    manifest.save(changed, path)
    return path


def pictures(folder: Path, brightness: list[int]) -> Path:
    """64x48 pixels each; at 10 frames a second."""
    folder.mkdir()
    for number, value in enumerate(brightness):
        cv2.imwrite(str(folder / f"{number:03}.png"), np.full((48, 64, 3), value, np.uint8))
    return folder


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
    source = pictures(tmp_path / "lamp", [10] * 4 + [200] * 8 + [10] * 24)
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
    assert 100 < told[1]["duration_ms"] < 400
    assert told[0]["age_ms"] > 0
    assert counters['events_total{camera="porch",type="new"}'] == 1
    states = [message["count"] for kind, message in heard if kind == "state"]
    assert states == [None, {}, {"lamp": 1}, {}, None]


def test_what_is_there_at_the_end_ends_as_stopping(lamp: Path, tmp_path: Path, memory_broker: BrokerConfig) -> None:
    _, heard, _ = run(lamp, pictures(tmp_path / "on", [200] * 6), memory_broker)
    told = [message for kind, message in heard if kind == "event"]
    assert [(event["type"], event["reason"]) for event in told] == [("new", None), ("end", "stopping")]
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
    bundle = with_gate(lamp, GateSpec(threshold=8.0))
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
    bundle = with_gate(
        lamp, GateSpec(threshold=None, note="too few frames") if gate == "auto" else GateSpec(threshold=8)
    )
    results, _, _ = run(bundle, pictures(tmp_path / "on", [200] * 6), memory_broker, gate=gate)
    assert any(result.repeats is not None for result in results) == repeats
    assert all(result.agreement is None for result in results if result.repeats is not None)


def test_a_repeated_answer_grows_no_older_than_allowed(lamp: Path, tmp_path: Path, memory_broker: BrokerConfig) -> None:
    source = pictures(tmp_path / "on", [200] * 20)
    results, _, _ = run(lamp, source, memory_broker, gate=8.0, gate_max_age_ms=60)
    assert all(result.frame - result.repeats <= 4 for result in results if result.repeats is not None)
    assert sum(result.repeats is None for result in results) >= 5
