from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from runtime.capture import Capture
from runtime.config import CameraConfig
from runtime.counters import Counters
from runtime.datatypes import Frame
from runtime.errors import CameraError, ConfigError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for number in range(20):
        assert cv2.imwrite(str(tmp_path / f"{number:02}.png"), np.full((8, 8, 3), number, np.uint8))
    return tmp_path


@pytest.fixture
def begin() -> Iterator[Callable[..., tuple[Capture, Counters, threading.Event]]]:
    made: list[Capture] = []

    def start(**settings: Any) -> tuple[Capture, Counters, threading.Event]:
        counters, wake = Counters(), threading.Event()
        capture = Capture("cam0", CameraConfig(**settings), counters, wake)
        made.append(capture)
        capture.start()
        return capture, counters, wake

    yield start
    for capture in made:
        capture.close()
    assert not [thread.name for thread in threading.enumerate() if thread.name.startswith("kinflow-capture")]


def until(holds: Callable[[], object], timeout_s: float = 15.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not holds():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.005)


def take_all(capture: Capture, wake: threading.Event, pause_s: float = 0.0) -> list[Frame]:
    frames = []
    while not capture.ended:
        assert wake.wait(10)
        wake.clear()
        frame = capture.take()
        if frame is not None:
            frames.append(frame)
            time.sleep(pause_s)
    return frames


def test_a_replay_at_full_speed_waits_for_whoever_takes(folder: Path, begin: Any) -> None:
    capture, counters, wake = begin(kind="replay", source=str(folder), realtime=False)
    frames = take_all(capture, wake, pause_s=0.01)
    assert [frame.index for frame in frames] == list(range(20))
    assert [int(frame.pixels.mean()) for frame in frames] == list(range(20))
    assert counters.snapshot() == {'frames_captured_total{camera="cam0"}': 20}
    assert capture.error is None
    assert capture.status == "offline"


def test_the_latest_frame_wins(folder: Path, begin: Any) -> None:
    capture, counters, _ = begin(kind="replay", source=str(folder), max_fps=100)
    until(lambda: counters.total("frames_captured_total") == 20)
    until(lambda: capture._done)
    assert not capture.ended  # the last frame is still there
    frame = capture.take()
    assert frame is not None
    assert frame.index == 19
    assert capture.take() is None
    assert capture.ended
    assert counters.snapshot() == {
        'frames_captured_total{camera="cam0"}': 20,
        'frames_dropped_total{camera="cam0",reason="stale"}': 19,
    }


def test_every_frame_is_taken_or_counted(folder: Path, begin: Any) -> None:
    capture, counters, wake = begin(kind="replay", source=str(folder), max_fps=200)
    taken = len(take_all(capture, wake, pause_s=0.02))
    assert 0 < taken < 20
    assert taken + counters.total("frames_dropped_total") == counters.total("frames_captured_total") == 20


def test_wake_may_be_a_function(folder: Path) -> None:
    calls: list[str] = []
    capture = Capture(
        "porch",
        CameraConfig(kind="replay", source=str(folder), max_fps=1000),
        Counters(),
        lambda: calls.append(threading.current_thread().name),
    )
    assert capture.status == "starting"
    capture.start()
    until(lambda: len(calls) == 21)
    assert set(calls) == {"kinflow-capture-porch"}
    capture.close()


def test_a_replay_that_cannot_be_opened_ends_with_its_error(tmp_path: Path, begin: Any) -> None:
    capture, counters, wake = begin(kind="replay", source=str(tmp_path / "missing.mp4"))
    assert wake.wait(5)
    until(lambda: capture.ended)
    assert isinstance(capture.error, CameraError)
    assert "does not exist" in str(capture.error)
    assert counters.snapshot() == {}


def test_a_replay_that_breaks_in_the_middle_ends_with_its_error(folder: Path, begin: Any) -> None:
    (folder / "03.png").write_bytes(b"damaged")
    capture, _, wake = begin(kind="replay", source=str(folder), realtime=False)
    assert [frame.index for frame in take_all(capture, wake)] == [0, 1, 2]
    assert "03.png cannot be read" in str(capture.error)


def test_what_no_retry_heals_is_raised_at_once() -> None:
    with pytest.raises(ConfigError, match="replay"):
        Capture("cam0", CameraConfig(source="clip.mp4"), Counters(), threading.Event())


def test_a_camera_that_is_off_is_tried_again_until_it_is_on(stream: Any, begin: Any) -> None:
    stream.stop()
    capture, counters, wake = begin(source=stream.url, open_timeout_s=2)
    until(lambda: capture.status == "offline")
    assert "cannot be opened" in str(capture.error)
    assert not capture.ended
    stream.start()
    assert wake.wait(15)
    assert capture.take() is not None
    assert capture.status == "online"
    assert capture.error is None
    assert counters.total("camera_failures_total") >= 1


def test_a_silent_camera_is_stalled_then_offline_then_back(stream: Any, begin: Any) -> None:
    capture, counters, wake = begin(source=stream.url, open_timeout_s=1, read_timeout_s=1)
    assert wake.wait(15)
    until(lambda: capture.status == "online")
    stream.pause()
    until(lambda: capture.status == "stalled")
    stream.stop()
    until(lambda: capture.status == "offline")
    captured = counters.total("frames_captured_total")
    stream.start()
    until(lambda: capture.status == "online")
    assert counters.total("frames_captured_total") > captured


def test_close_ends_a_waiting_thread_and_counts_what_nobody_took(folder: Path, begin: Any) -> None:
    capture, counters, wake = begin(kind="replay", source=str(folder), realtime=False)
    assert wake.wait(5)
    start = time.monotonic()
    capture.close()
    assert time.monotonic() - start < 2
    assert capture.ended
    assert capture.take() is None
    dropped = counters.snapshot()['frames_dropped_total{camera="cam0",reason="stopping"}']
    assert dropped == counters.total("frames_captured_total")


def test_a_slow_taker_does_not_make_a_replay_look_stalled(folder: Path, begin: Any) -> None:
    capture, _, wake = begin(kind="replay", source=str(folder), realtime=False, read_timeout_s=0.05)
    assert wake.wait(5)
    time.sleep(0.2)
    assert capture.status == "online"
