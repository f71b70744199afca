from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from runtime.camera import CAMERAS
from runtime.capture import Capture
from runtime.config import CameraConfig
from runtime.counters import Counters
from runtime.datatypes import Frame
from runtime.errors import CameraError, ConfigError
from tests.patience import until


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


def command(tmp_path: Path, body: str) -> dict[str, Any]:
    """Settings of a camera that is a program of ours, which writes 64x48 RGB with the `show` of this body."""
    program = tmp_path / "camera.py"
    program.write_text(
        "import os, sys, time\n"
        "def show(grey, after_s=0.02):\n"
        "    sys.stdout.buffer.write(bytes([grey % 256]) * (64 * 48 * 3)); sys.stdout.flush(); time.sleep(after_s)\n"
        + body
    )
    return {"kind": "pipe", "source": f"{sys.executable} {program}", "width": 64, "height": 48, "format": "rgb"}


def test_a_frozen_picture_is_told_handed_out_with_its_flaw_and_opened_again(
    tmp_path: Path, begin: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The program is stuck at one picture until it was started a third time."""
    monkeypatch.setattr("runtime.capture.RETRY_FIRST_S", 0.01)
    starts = tmp_path / "starts"
    body = f"open({str(starts)!r}, 'a').write('x')\nstarts = len(open({str(starts)!r}).read())\nn = 0\n"
    settings = command(tmp_path, body + "while True:\n    show(n if starts >= 3 else 7)\n    n += 1\n")
    capture, counters, _ = begin(**settings, frozen_after_s=0.5)
    until(lambda: capture.status == "online")
    first = None
    while first is None:
        first = capture.take()
    assert first.flaw is None
    until(lambda: capture.status == "frozen")
    until(lambda: (frame := capture.take()) is not None and frame.flaw == "frozen")
    until(lambda: starts.read_text() == "xx")
    until(lambda: (frame := capture.take()) is not None and frame.flaw == "frozen")
    assert capture.status == "frozen"  # opening it again has not helped
    until(lambda: capture.status == "online")
    until(lambda: (frame := capture.take()) is not None and frame.flaw is None)
    assert starts.read_text() == "xxx"
    assert counters.snapshot()['camera_failures_total{camera="cam0",reason="frozen"}'] == 2


def test_a_frozen_camera_is_opened_again_more_and_more_rarely(
    tmp_path: Path, begin: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("runtime.capture.RETRY_FIRST_S", 0.01)
    capture, counters, _ = begin(**command(tmp_path, "while True: show(7)\n"), frozen_after_s=0.25)
    start_s = time.monotonic()
    until(lambda: counters.total("camera_failures_total") == 3)
    assert time.monotonic() - start_s > 0.25 * (1 + 1 + 2)
    assert capture.status == "frozen"


def test_frozen_after_0_never_calls_a_picture_frozen(tmp_path: Path, begin: Any) -> None:
    capture, counters, _ = begin(**command(tmp_path, "while True: show(7)\n"), frozen_after_s=0)
    until(lambda: counters.total("frames_captured_total") > 50)
    assert capture.status == "online"
    assert counters.total("camera_failures_total") == 0


def test_a_replayed_still_is_not_frozen(tmp_path: Path, begin: Any) -> None:
    for number in range(3):
        assert cv2.imwrite(str(tmp_path / f"{number}.png"), np.full((8, 8, 3), 7, np.uint8))
    capture, counters, _ = begin(kind="replay", source=str(tmp_path), loop=True, max_fps=200, frozen_after_s=0.05)
    until(lambda: counters.total("frames_captured_total") > 50)
    assert capture.status == "online"
    frame = capture.take()
    assert frame is not None
    assert frame.flaw is None


class LateCamera:
    """Frames that come as late as `lag_s` says, one every 10 ms; what a stream with a full buffer gives."""

    lag_s = 0.0
    opened = 0

    def __init__(self, name: str, config: CameraConfig) -> None:
        self.closed = threading.Event()

    def frames(self) -> Iterator[Frame]:
        type(self).opened += 1
        index = 0
        while not self.closed.wait(0.01):
            stamp_ns = time.monotonic_ns() - int(type(self).lag_s * 1e9)
            yield Frame("cam0", stamp_ns, np.full((8, 8, 3), index % 256, np.uint8), index, skipped=index % 2)
            index += 1

    def close(self) -> None:
        self.closed.set()


def test_late_frames_are_dropped_and_a_camera_that_stays_late_is_opened_again(
    begin: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(CAMERAS, "opencv", f"{__name__}:LateCamera")
    monkeypatch.setitem(sys.modules, __name__, sys.modules[LateCamera.__module__])
    monkeypatch.setattr("runtime.capture.RETRY_FIRST_S", 0.01)
    LateCamera.lag_s, LateCamera.opened = 0.0, 0
    capture, counters, _ = begin(max_lag_ms=500, read_timeout_s=0.4)
    until(lambda: capture.status == "online")
    LateCamera.lag_s = 2.0
    until(lambda: capture.status == "late")
    capture.take()
    time.sleep(0.1)
    assert capture.take() is None
    until(lambda: LateCamera.opened == 2)
    assert capture.status == "late"
    assert "come 2.0 s late" in str(capture.error)
    LateCamera.lag_s = 0.1
    until(lambda: capture.status == "online")
    counts = counters.snapshot()
    assert counts['camera_failures_total{camera="cam0",reason="late"}'] == 1
    assert counts['frames_dropped_total{camera="cam0",reason="late"}'] > 10


def test_frames_that_nobody_had_room_for_are_counted(begin: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(CAMERAS, "opencv", f"{__name__}:LateCamera")
    monkeypatch.setitem(sys.modules, __name__, sys.modules[LateCamera.__module__])
    LateCamera.lag_s = 0.0
    capture, counters, _ = begin()
    until(lambda: counters.total("frames_captured_total") > 30)
    capture.close()
    counts = counters.snapshot()
    captured = counts['frames_captured_total{camera="cam0"}']
    # Every other frame came with one that was skipped, and nobody took any.
    assert counters.total("frames_dropped_total") == captured
    assert counts['frames_dropped_total{camera="cam0",reason="stale"}'] >= captured - 1


class DeafCamera:
    """One whose reading ends neither by itself nor by `close`."""

    released = threading.Event()

    def __init__(self, name: str, config: CameraConfig) -> None:
        pass

    def frames(self) -> Iterator[Frame]:
        self.released.wait()
        yield from ()

    def close(self) -> None:
        pass


def test_a_capture_hangs_when_its_camera_does_for_longer_than_all_time_outs(
    begin: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(CAMERAS, "opencv", f"{__name__}:DeafCamera")
    monkeypatch.setitem(sys.modules, __name__, sys.modules[DeafCamera.__module__])
    monkeypatch.setattr("runtime.capture.RETRY_MAX_S", 0.2)
    monkeypatch.setattr("runtime.capture.HANG_S", 0.2)
    DeafCamera.released.clear()
    start_s = time.monotonic()
    capture, _, _ = begin(open_timeout_s=0.2, read_timeout_s=0.2)
    assert not capture.hangs
    until(lambda: capture.hangs)
    assert time.monotonic() - start_s >= 0.8
    DeafCamera.released.set()
    until(lambda: capture.ended)
    assert not capture.hangs
