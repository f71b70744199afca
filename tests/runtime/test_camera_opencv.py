from __future__ import annotations

import itertools
import time
from typing import Any

import cv2
import numpy as np
import pytest

from runtime.camera import open_camera, redacted
from runtime.camera_opencv import OpencvCamera
from runtime.config import CameraConfig
from runtime.errors import CameraError, ConfigError


def test_a_stream_gives_rgb_frames_stamped_when_they_came(stream: Any) -> None:
    camera = OpencvCamera("cam0", CameraConfig(source=stream.url, read_timeout_s=5))
    before_ns = time.monotonic_ns()
    frames = list(itertools.islice(camera.frames(), 8))
    assert [frame.index for frame in frames] == list(range(8))
    stamps = [frame.captured_ns for frame in frames]
    assert before_ns < stamps[0] <= time.monotonic_ns()
    assert stamps == sorted(stamps)
    assert all(frame.pixels.shape == (48, 64, 3) and frame.pixels.flags.owndata for frame in frames)
    assert [int(frame.pixels.mean()) for frame in frames] == sorted({int(frame.pixels.mean()) for frame in frames})
    camera.close()
    assert list(camera.frames()) == []


def test_max_fps_leaves_frames_out(stream: Any) -> None:
    camera = OpencvCamera("cam0", CameraConfig(source=stream.url, max_fps=5))
    taken = list(itertools.islice(camera.frames(), 4))
    assert (taken[-1].captured_ns - taken[0].captured_ns) / 1e9 >= 2.4 / 5
    assert taken[-1].index > 4


def test_a_stream_that_falls_silent_times_out(stream: Any) -> None:
    camera = OpencvCamera("cam0", CameraConfig(source=stream.url, read_timeout_s=0.5))
    frames = camera.frames()
    assert np.ptp(next(frames).pixels) <= 2
    stream.pause()
    with pytest.raises(CameraError, match="gives no frames any more"):
        list(frames)


def test_a_camera_that_is_not_there_is_named(free_port: Any) -> None:
    url = f"http://user:secret@127.0.0.1:{free_port()}/stream"
    for source in (url, "97", "/dev/video97"):
        with pytest.raises(CameraError, match=r"camera porch: .* cannot be opened") as caught:
            next(OpencvCamera("porch", CameraConfig(source=source, open_timeout_s=2)).frames())
        assert "secret" not in str(caught.value)
        assert "\n" not in str(caught.value)


def test_nobody_hears_the_password(capfd: pytest.CaptureFixture[str], free_port: Any) -> None:
    for scheme in ("rtsp", "http"):
        url = f"{scheme}://user:secret@127.0.0.1:{free_port()}/stream?token=hidden"
        with pytest.raises(CameraError):
            next(OpencvCamera("cam0", CameraConfig(source=url, open_timeout_s=2)).frames())
    output = "".join(capfd.readouterr())
    assert "secret" not in output
    assert "hidden" not in output


@pytest.mark.parametrize(
    ("source", "shown"),
    [
        ("rtsp://user:p@ss/word@10.0.0.5:554/live", "rtsp://***@10.0.0.5:554/live"),
        ("http://10.0.0.5/mjpg?user=a&password=b", "http://10.0.0.5/mjpg?***"),
        (
            "rtspsrc location=rtsp://a:b@cam/live user-pw=hidden ! decodebin ! appsink",
            "rtspsrc location=rtsp://***@cam/live user-pw=*** ! decodebin ! appsink",
        ),
        ("/dev/video0", "/dev/video0"),
    ],
)
def test_secrets_are_left_out(source: str, shown: str) -> None:
    assert redacted(source) == shown


def test_what_no_retry_heals_is_refused_at_once() -> None:
    with pytest.raises(ConfigError, match='for files set kind = "replay"'):
        open_camera("cam0", CameraConfig(source="clip.mp4"))
    if not cv2.videoio_registry.hasBackend(cv2.CAP_GSTREAMER):
        with pytest.raises(ConfigError, match="comes with JetPack"):
            open_camera("cam0", CameraConfig(source="videotestsrc ! videoconvert ! appsink"))
