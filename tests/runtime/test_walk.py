"""docs/walk.md tells the truth: its names exist, and one real frame calls them in its order."""

from __future__ import annotations

import ast
import re
import shutil
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import FrameType

import cv2
import msgspec
import numpy as np
import pytest

from runtime import manifest
from runtime.config import BrokerConfig, CameraConfig, DeviceConfig, NodeConfig, UplinkConfig
from runtime.datatypes import Dropped, Result
from runtime.device import Device
from runtime.node import Node

ROOT = Path(__file__).parent.parent.parent
WALK = (ROOT / "docs" / "walk.md").read_text("utf-8")
NAMED = re.compile(r"`((?:runtime|export)/\w+\.py)`\s+`([\w.]+)`")
STEPS = WALK[: WALK.index("With MQTT between the tiers")]


def functions(path: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.parse(path.read_text("utf-8")).body:
        if isinstance(node, ast.FunctionDef):
            found.add(node.name)
        if isinstance(node, ast.ClassDef):
            found.update(f"{node.name}.{inner.name}" for inner in node.body if isinstance(inner, ast.FunctionDef))
    return found


@pytest.mark.parametrize(("file", "name"), sorted(set(NAMED.findall(WALK))))
def test_every_name_of_the_walk_exists(file: str, name: str) -> None:
    assert name in functions(ROOT / file), f"docs/walk.md names {name}, which {file} does not define"


@contextmanager
def traced() -> Iterator[list[tuple[str, str]]]:
    """Collects (file, qualified name) of every call of the project's own functions, on all threads, in order."""
    calls: list[tuple[str, str]] = []

    def note(frame: FrameType, event: str, argument: object) -> None:
        code = frame.f_code
        if event == "call" and code.co_filename.startswith(str(ROOT / "runtime")):
            owner = frame.f_locals.get("self")
            name = code.co_name if owner is None else f"{type(owner).__name__}.{code.co_name}"
            calls.append((Path(code.co_filename).relative_to(ROOT).as_posix(), name))

    threading.setprofile(note)
    sys.setprofile(note)
    try:
        yield calls
    finally:
        sys.setprofile(None)
        threading.setprofile(None)


def serve(tier: Node, stack: ExitStack) -> None:
    stop = threading.Event()
    thread = threading.Thread(target=tier.run, args=(stop,))
    thread.start()
    stack.callback(thread.join, 10)
    stack.callback(stop.set)


def unsure(directory: Path) -> Path:
    """The reference bundle with early exits that are asked of every frame and never sure enough."""
    shutil.copytree(ROOT / "runtime" / "reference" / "lite0", directory)
    known = manifest.load(directory).manifest
    *early, last = known.exits
    asked = [msgspec.structs.replace(spec, threshold=1.1, points=()) for spec in early]
    manifest.save(msgspec.structs.replace(known, exits=(*asked, last)), directory)
    return directory


def test_one_frame_walks_as_written(tmp_path: Path) -> None:
    bundle = unsure(tmp_path / "unsure")
    photos = tmp_path / "photos"
    photos.mkdir()
    cv2.imwrite(str(photos / "frame.png"), np.zeros((40, 40, 3), np.uint8))
    broker = BrokerConfig(host=f"walk-{tmp_path.name}", kind="memory")
    common = {"bundle": str(bundle), "broker": broker}
    cloud = Node(NodeConfig(**common, id="cloud", serves="nodes"))  # type: ignore[arg-type]
    edge = Node(NodeConfig(**common, id="edge", uplink=UplinkConfig()))  # type: ignore[arg-type]
    results: list[Result | Dropped] = []
    camera = {"front": CameraConfig(kind="replay", source=str(photos), realtime=False)}
    device = Device(DeviceConfig(**common, id="cam", camera=camera), results.append)  # type: ignore[arg-type]
    with traced() as calls, ExitStack() as stack:
        serve(cloud, stack)
        serve(edge, stack)
        device.run(threading.Event())
    (result,) = results
    assert isinstance(result, Result)
    assert result.tier == "cloud"

    at = 0
    for step in NAMED.findall(STEPS):
        assert step in calls[at:], f"{step} is not called, or not after what docs/walk.md names before it"
        at += calls[at:].index(step)
