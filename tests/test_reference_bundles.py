"""What ships works on this machine: both reference bundles, and the demo on one of them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest

from runtime.bundle_tool import verify_bundle
from runtime.manifest import load

REFERENCE = Path(__file__).parent.parent / "runtime" / "reference"
TASKS = {"lite0": "classify", "pedestrian": "detect"}


@pytest.mark.parametrize("name", TASKS)
def test_a_reference_bundle_is_sound_and_its_licence_is_told(name: str) -> None:
    assert load(REFERENCE / name).manifest.task == TASKS[name]
    assert verify_bundle(REFERENCE / name).likeness >= 0.9
    assert name in (REFERENCE / "NOTICE").read_text("utf-8")


def test_the_demo_answers_every_frame_of_a_clip(tmp_path: Path) -> None:
    clip = tmp_path / "clip.avi"
    sink = cv2.VideoWriter(str(clip), cv2.CAP_FFMPEG, cv2.VideoWriter.fourcc(*"MJPG"), 5, (96, 72))
    generator = np.random.default_rng(0)
    for _ in range(10):
        sink.write(cv2.resize(generator.integers(0, 256, (6, 8, 3), dtype=np.uint8), (96, 72)))
    sink.release()
    command = [sys.executable, "-m", "runtime.cli", "demo", "--source", str(clip), "--no-ui", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr
    *lines, last = [json.loads(line) for line in done.stdout.splitlines()]
    answered = [line for line in lines if "dropped" not in line]
    assert len(lines) + last["summary"]["dropped"].get("stale", 0) >= 10
    assert answered
    assert {line["task"] for line in answered} == {"detect"}
    assert all(line["answer"]["size"] == [96, 72] for line in answered)
