"""A detector goes the whole way: exported with everything, run on three tiers, judged, and shown."""

from __future__ import annotations

import json
import threading
import uuid
from pathlib import Path

import cv2
import numpy as np
import onnx
import onnx.shape_inference
import pytest
from click.testing import CliRunner

from export.bench import bench_group
from export.cli import export_command
from runtime import cascade
from runtime.bundle_tool import describe, verify_bundle
from runtime.config import BrokerConfig, CameraConfig, DeviceConfig, NodeConfig, UplinkConfig
from runtime.datatypes import Dropped, Result
from runtime.device import Device
from runtime.manifest import Bundle, load
from runtime.node import Node
from runtime.preprocess import prepare
from runtime.segment import load_segments
from tests.export.detectors import SIDE, frames, yolo_v8


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures twice as wide as they are high, so that boxes have a way to go back to them."""
    folder = tmp_path_factory.mktemp("pictures")
    for number, frame in enumerate(frames(60)):
        cv2.imwrite(str(folder / f"{number:02}.png"), cv2.resize(frame[0], (2 * SIDE, SIDE)))
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "small.onnx"
    onnx.save(onnx.shape_inference.infer_shapes(yolo_v8()), path)
    return path


@pytest.fixture(scope="module")
def exported(model: Path, photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    folder = tmp_path_factory.mktemp("bundles")
    (folder / "names.txt").write_text("cat\ndog\nbird\n")
    arguments = [model, "--task", "detect", "--classes", folder / "names.txt", "--score", 0.6, "--float"]
    arguments += ["--frames", photos, "--out", folder / "small", "--variants", 0, "--json"]
    done = CliRunner().invoke(export_command, [str(argument) for argument in arguments])
    assert done.exit_code == 0, done.output
    return load(folder / "small")


def test_the_manifest_says_what_was_made(exported: Bundle) -> None:
    manifest = exported.manifest
    assert (manifest.task, manifest.settings) == ("detect", {"score_threshold": 0.6})
    assert manifest.preprocess.fit == "letterbox"
    assert manifest.cuts[-1].shape[1:] == (6,)
    assert manifest.proof["box_f1"] == 1.0
    assert manifest.provenance.options["iou"] == "0.6"
    transform = [codec for cut in manifest.cuts[1:-1] for codec in cut.codecs if codec.name == "transform"]
    assert len(transform) == len(manifest.cuts) - 2
    assert all(0 <= (rate.agreement or 0) <= 1 for codec in transform for rate in codec.rates)
    assert verify_bundle(exported.path).likeness == 1.0
    assert "3 classes" in describe(exported)


def test_boxes_come_back_through_two_nodes_as_the_whole_model_finds_them(exported: Bundle, photos: Path) -> None:
    broker = BrokerConfig(host=uuid.uuid4().hex, kind="memory")
    path = str(exported.path)
    uplink = UplinkConfig(codec="raw")
    nodes = [
        Node(NodeConfig(bundle=path, broker=broker, id="box", uplink=uplink)),
        Node(NodeConfig(bundle=path, broker=broker, id="sky", serves="nodes")),
    ]
    stop = threading.Event()
    threads = [threading.Thread(target=node.run, args=(stop,), name=f"node{place}") for place, node in enumerate(nodes)]
    for thread in threads:
        thread.start()
    said: list[Result | Dropped] = []
    try:
        camera = CameraConfig(kind="replay", source=str(photos), realtime=False)
        config = DeviceConfig(
            bundle=path, broker=broker, id="cam", camera={"front": camera}, codec="raw", gate="off", budget_ms=60_000
        )
        Device(config, said.append).run(threading.Event())
    finally:
        stop.set()
        for thread in threads:
            thread.join(30)
    segments, heads = load_segments(exported, 0, len(exported.manifest.segments) - 1)
    tier = cascade.Tier(exported, segments, heads)
    results = sorted((line for line in said if isinstance(line, Result)), key=lambda line: line.frame)
    assert len(results) == len(said) == 60
    last = [result for result in results if result.tier == "cloud"]
    assert len(last) > 30
    found = 0
    for result in last:
        picture = cv2.imread(str(photos / f"{result.frame:02}.png"))
        assert picture is not None
        tensor = prepare(np.ascontiguousarray(picture[:, :, ::-1]).astype(np.uint8), exported.manifest.preprocess)
        for segment in segments.values():
            tensor = segment.run(tensor)
        output = tier.task.read(tensor[0], exported.manifest.exits[-1])
        assert result.answer == tier.task.told(output.answer, SIDE, 2 * SIDE)
        assert result.confidence == output.confidence
        found += len(result.answer["boxes"])
    assert found > 10
    assert {result.task for result in results} == {"detect"}


def test_it_is_judged_by_its_boxes(exported: Bundle, model: Path, tmp_path: Path) -> None:
    others = tmp_path / "others"
    others.mkdir()
    for number, frame in enumerate(frames(24, seed=9)):
        cv2.imwrite(str(others / f"{number:02}.png"), cv2.resize(frame[0], (2 * SIDE, SIDE)))
    arguments = ["atlas", exported.path, "--model", model, "--frames", others, "--json"]
    done = CliRunner().invoke(bench_group, [str(argument) for argument in arguments])
    assert done.exit_code == 0, done.output
    atlas = json.loads(done.stdout)
    assert atlas["distance_is"] == "1 - F1"
    assert atlas["ceiling"]["agreement"] == 1.0
    by_rate = [row for row in atlas["rows"] if row["codec"] == "transform" and row["cut"] == 1]
    assert by_rate[0]["bytes_p50"] < by_rate[-1]["bytes_p50"]
    assert by_rate[0]["agreement"] <= by_rate[-1]["agreement"]
    page = (exported.path / "atlas.html").read_text()
    assert "F1 of the boxes" in page
    assert "1 - F1" in page
