"""A network camera over RTSP: a real server, in Debian's packages that scripts/test installs."""

from __future__ import annotations

import functools
import itertools
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from runtime.camera_apart import ApartCamera
from runtime.capture import Capture
from runtime.config import CameraConfig
from runtime.counters import Counters
from runtime.datatypes import Frame
from tests.patience import until

SERVER = Path(__file__).parent.parent / "rtsp_server.py"
NEEDED = "import gi; gi.require_version('GstRtspServer', '1.0'); gi.require_version('Gst', '1.0')"


@functools.cache
def python_with_gstreamer() -> str | None:
    for python in ("/usr/bin/python3", shutil.which("python3")):
        if python and subprocess.run([python, "-c", NEEDED], capture_output=True, check=False).returncode == 0:
            return python
    return None


pytestmark = pytest.mark.skipif(
    python_with_gstreamer() is None or shutil.which("gst-launch-1.0") is None,
    reason="GStreamer's RTSP server is not installed; scripts/test installs it",
)


class RtspCamera:
    """A camera in the network that can be switched off, and one whose network can go deaf."""

    def __init__(self, port: int) -> None:
        self.url = f"rtsp://127.0.0.1:{port}/live"
        self._port = port
        self.start()

    def start(self) -> None:
        python = python_with_gstreamer()
        assert python is not None
        self.process = subprocess.Popen([python, str(SERVER), str(self._port)], stdout=subprocess.PIPE)
        assert self.process.stdout is not None
        assert int(self.process.stdout.readline()) == self._port

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()
        assert self.process.stdout is not None
        self.process.stdout.close()


@pytest.fixture
def rtsp(free_port: Callable[[], int]) -> Iterator[RtspCamera]:
    camera = RtspCamera(free_port())
    yield camera
    camera.stop()


@pytest.fixture
def begin(rtsp: RtspCamera) -> Iterator[Callable[..., tuple[Capture, Counters]]]:
    made: list[Capture] = []

    def start(**settings: Any) -> tuple[Capture, Counters]:
        counters = Counters()
        capture = Capture("porch", CameraConfig(source=rtsp.url, **settings), counters, threading.Event())
        made.append(capture)
        capture.start()
        return capture, counters

    yield start
    for capture in made:
        capture.close()


def wait_for_frame(capture: Capture) -> Frame:
    end_s = time.monotonic() + 40
    while (frame := capture.take()) is None:
        assert time.monotonic() < end_s
        time.sleep(0.002)
    return frame


def test_frames_of_a_stream_are_new_and_in_order(rtsp: RtspCamera) -> None:
    camera = ApartCamera("porch", CameraConfig(source=rtsp.url))
    frames = camera.frames()
    stamps = []
    for frame in frames:
        assert frame.pixels.shape == (240, 320, 3)
        assert int(frame.pixels.max()) > 200  # the ball
        stamps.append(frame.captured_ns)
        if len(stamps) == 75:
            break
    camera.close()
    assert list(frames) == []
    assert stamps == sorted(set(stamps))
    # By the stream's own clock frames are 40 ms apart or more, whatever the way here did to them: they come in heaps,
    # some are skipped, and now and then the clock is set back by a frame that was faster than all before.
    gaps_ms = sorted((after - before) / 1e6 for before, after in itertools.pairwise(stamps))
    assert gaps_ms[len(gaps_ms) // 2] > 30


def test_a_camera_that_is_switched_off_and_on_comes_back(rtsp: RtspCamera, begin: Any) -> None:
    capture, counters = begin(open_timeout_s=3, read_timeout_s=1.5)
    wait_for_frame(capture)
    assert capture.status == "online"
    rtsp.stop()
    until(lambda: capture.status in ("stalled", "offline"))
    until(lambda: capture.status == "offline")
    assert "cannot be opened" in str(capture.error)
    rtsp.start()
    until(lambda: capture.status == "online")
    wait_for_frame(capture)
    assert counters.total("camera_failures_total") >= 2


def test_a_network_that_goes_deaf_is_noticed_and_left(rtsp: RtspCamera, begin: Any) -> None:
    """The connection stays open, and nothing comes: what hangs a plain VideoCapture for half a minute."""
    capture, counters = begin(open_timeout_s=3, read_timeout_s=1.5)
    wait_for_frame(capture)
    rtsp.process.send_signal(signal.SIGSTOP)
    start_s = time.monotonic()
    until(lambda: capture.status == "stalled")
    until(lambda: counters.total("camera_failures_total") >= 1)
    assert time.monotonic() - start_s < 8
    rtsp.process.send_signal(signal.SIGCONT)
    until(lambda: capture.status == "online")
    wait_for_frame(capture)


def test_what_a_full_buffer_holds_back_is_dropped_as_late(rtsp: RtspCamera, begin: Any) -> None:
    """Whoever drives the camera sleeps for three seconds: what gathered meanwhile is old, and not answered."""
    capture, counters = begin(read_timeout_s=20, max_lag_ms=800)
    for _ in range(25):
        wait_for_frame(capture)
    (worker,) = (child for child in psutil.Process().children() if "runtime.camera_worker" in " ".join(child.cmdline()))
    worker.suspend()
    time.sleep(0.1)
    capture.take()
    time.sleep(3)
    worker.resume()
    dropped = counters.total("frames_dropped_total")
    ages_s: list[float] = []
    end_s = time.monotonic() + 10
    while time.monotonic() < end_s and len(ages_s) < 25:
        frame = capture.take()
        if frame is not None:
            ages_s.append(time.monotonic() - frame.captured_ns / 1e9)
        time.sleep(0.002)
    assert len(ages_s) == 25
    assert max(ages_s) < 1.8  # the limit, and the time until we took it; those that were held back are up to 3 s old
    assert counters.snapshot()['frames_dropped_total{camera="porch",reason="late"}'] > 0
    # Of the 75 of three seconds all that are over 0.8 s old; some come so fast then that there is no room for them.
    assert counters.total("frames_dropped_total") - dropped >= 40
    assert capture.status == "online"
    assert counters.total("camera_failures_total") == 0
