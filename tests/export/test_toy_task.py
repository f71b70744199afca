"""Adding a task touches its own file and one row on each side: a caption goes from export to an answer."""

from __future__ import annotations

import dataclasses
import threading
import uuid
from pathlib import Path

import pytest

from export.pipeline import export
from export.recipe import Recipe
from export.report import Report
from export.task import JUDGES
from runtime.config import BrokerConfig, CameraConfig, DeviceConfig, NodeConfig
from runtime.datatypes import Dropped, Result
from runtime.device import Device
from runtime.node import Node
from runtime.task import TASKS


def test_a_caption_is_exported_and_comes_from_above(
    recipe: Recipe, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(TASKS, "caption", "tests.toy_task:Caption")
    monkeypatch.setitem(JUDGES, "caption", "tests.toy_task:CaptionJudge")
    bundle = export(dataclasses.replace(recipe, task="caption"), tmp_path / "bundle", Report(silent=True)).bundle
    assert bundle.manifest.task == "caption"
    assert bundle.manifest.proof["words"] > 0.8

    broker = BrokerConfig(host=uuid.uuid4().hex, kind="memory")
    node = Node(NodeConfig(bundle=str(bundle.path), broker=broker, id="box"))
    stop = threading.Event()
    serving = threading.Thread(target=node.run, args=(stop,), name="node")
    serving.start()
    said: list[Result | Dropped] = []
    try:
        camera = CameraConfig(kind="replay", source=str(photos), realtime=False)
        config = DeviceConfig(
            bundle=str(bundle.path),
            broker=broker,
            id="cam",
            camera={"front": camera},
            early_exits=False,
            budget_ms=20_000,
        )
        Device(config, said.append).run(threading.Event())
    finally:
        stop.set()
        serving.join(30)
    results = [line for line in said if isinstance(line, Result)]
    assert len(results) == len(said) == 60
    assert {result.task for result in results} == {"caption"}
    assert {result.tier for result in results} == {"cloud"}
    assert all(result.answer == {"caption": result.label, "of": [40, 36]} for result in results)
    assert all(" before " in result.label for result in results)
