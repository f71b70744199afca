from __future__ import annotations

import itertools
import threading
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime.config import BrokerConfig, CameraConfig, DeviceConfig, PreviewConfig
from runtime.counters import Counters
from runtime.device import Device
from runtime.link import open_link
from runtime.preview import Pace, small_jpeg

SECOND = 1_000_000_000


@given(st.lists(st.integers(0, SECOND), min_size=1, max_size=200), st.integers(1, 30))
def test_a_pace_never_lets_more_through_than_it_may(steps: list[int], per_second: int) -> None:
    pace, now, taken = Pace(1 / per_second), 0, []
    for step in steps:
        now += step
        if pace.due("porch", now):
            taken.append(now)
    assert len(taken) >= 1
    period = int(SECOND / per_second)
    assert all(later - earlier >= period for earlier, later in itertools.pairwise(taken))
    assert len(taken) <= now // period + 1


def test_cameras_do_not_wait_for_each_other() -> None:
    pace = Pace(1.0)
    assert pace.due("porch", 5)
    assert pace.due("garden", 6)
    assert not pace.due("porch", 7)


@pytest.mark.parametrize(
    ("given_size", "shown"), [((272, 640), (204, 480)), ((90, 120), (90, 120)), ((1, 2000), (1, 480))]
)
def test_a_preview_is_small_and_keeps_its_proportions(given_size: tuple[int, int], shown: tuple[int, int]) -> None:
    pixels = np.zeros((*given_size, 3), np.uint8)
    pixels[..., 0] = 200  # red, and not blue
    picture = cv2.imdecode(np.frombuffer(small_jpeg(pixels, 480, 60), np.uint8), cv2.IMREAD_COLOR)
    assert picture is not None
    assert picture.shape[:2] == shown
    blue, _, red = picture.reshape(-1, 3).mean(0)
    assert red > 180 > 30 > blue


def watched(
    bundle: Path, photos: Path, broker: BrokerConfig, preview: PreviewConfig
) -> tuple[list[tuple[str, bytes]], dict[str, int]]:
    heard: list[tuple[str, bytes]] = []
    watcher = open_link(broker, client_id="watcher", counters=Counters())
    watcher.subscribe("kinflow/v1/home/d/+/cam/+/+", lambda topic, payload: heard.append((topic, payload)))
    watcher.start()
    camera = CameraConfig(kind="replay", source=str(photos), realtime=False, frames=8)
    settings: dict[str, Any] = {"bundle": str(bundle), "broker": broker, "id": "board", "last_segment": 0}
    device = Device(DeviceConfig(**settings, camera={"porch": camera}, preview=preview))
    device.run(threading.Event())
    watcher.close()
    return heard, device.counters.snapshot()


def test_no_picture_leaves_a_device_unless_it_is_asked_for(
    shared_bundle: Path, photos: Path, memory_broker: BrokerConfig
) -> None:
    heard, counters = watched(shared_bundle, photos, memory_broker, PreviewConfig())
    assert {topic.rpartition("/")[2] for topic, _ in heard} >= {"result"}
    assert not [topic for topic, payload in heard if topic.endswith("/preview") or payload.startswith(b"\xff\xd8")]
    assert not [counter for counter in counters if counter.startswith("preview_")]


def test_a_preview_that_is_switched_on_comes_and_is_counted(
    shared_bundle: Path, photos: Path, memory_broker: BrokerConfig
) -> None:
    heard, counters = watched(shared_bundle, photos, memory_broker, PreviewConfig(enabled=True, width=24))
    pictures = [payload for topic, payload in heard if topic == "kinflow/v1/home/d/board/cam/porch/preview"]
    assert pictures
    for data in pictures:
        picture = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
        assert picture is not None
        assert picture.shape[1] == 24
    assert counters['preview_bytes_total{camera="porch"}'] > sum(map(len, pictures))


def test_frames_are_weighed_as_jpegs_now_and_then(
    shared_bundle: Path, photos: Path, memory_broker: BrokerConfig
) -> None:
    _, counters = watched(shared_bundle, photos, memory_broker, PreviewConfig())
    frames = counters["jpeg_equivalent_frames_total"]
    assert 1 <= frames < 8
    assert 300 < counters["jpeg_equivalent_bytes_total"] / frames < 100_000
