"""Live cameras through OpenCV: USB and other V4L2 cameras, RTSP and HTTP streams, GStreamer pipelines."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import cv2
import numpy as np

from runtime.camera import Room, redacted
from runtime.config import CameraConfig
from runtime.datatypes import Frame, Pixels
from runtime.errors import CameraError, ConfigError
from runtime.freshness import Lag, Rate


class OpencvCamera:
    """Frames of a live source, each stamped when it was grabbed.

    Of an RTSP stream, whose time stamps are the camera's, a frame that comes late is stamped as much earlier. Open and
    read time-outs hold for URLs, mostly; V4L2 has its own of 10 s and GStreamer its own of 30 s. So this is driven by a
    process that can be killed (`camera_apart`).
    """

    def __init__(self, name: str, config: CameraConfig) -> None:
        """Check what no retry can heal.

        Raises:
            ConfigError: the source is none that OpenCV can open, or this OpenCV lacks GStreamer.
        """
        # One thread: more make a busy small board slower, and the preprocessing after us shares this setting.
        cv2.setNumThreads(1)
        # OpenCV's own warnings quote the source with its password; what matters is in our error.
        cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_ERROR)
        self._name = name
        self._config = config
        self._backend = _backend(name, config.source)
        self._closed = threading.Event()
        self._picture: Pixels | None = None

    def frames(self, room: Room | None = None) -> Iterator[Frame]:
        """Yield frames as they come, at most `max_fps` of them a second; their pixels lie in `room`, if given.

        Raises:
            CameraError: the camera cannot be opened, or gave no frame within its read time-out.
        """
        capture = self._open()
        try:
            rate = Rate(self._config.max_fps)
            lag = Lag() if self._config.source.startswith(("rtsp://", "rtsps://")) else None
            index = -1
            skipped = 0
            last_ns = 0
            while not self._closed.is_set():
                if not capture.grab():
                    raise self._error("gives no frames any more; check its cable, power and network", "silent")
                now_ns = captured_ns = time.monotonic_ns()
                if lag is not None:
                    captured_ns -= lag.of(round(capture.get(cv2.CAP_PROP_POS_MSEC) * 1e6), now_ns)
                index += 1
                if not rate.keeps(now_ns):
                    continue
                if room is not None and not room.free():
                    skipped += 1
                    continue
                last_ns = max(captured_ns, last_ns + 1)  # a shorter way must not put a frame before its forerunner
                pixels = self._decode(capture, room)
                yield Frame(camera=self._name, captured_ns=last_ns, pixels=pixels, index=index, skipped=skipped)
                skipped = 0
        finally:
            capture.release()

    def close(self) -> None:
        """Make `frames` end after the read that is pending."""
        self._closed.set()

    def _open(self) -> cv2.VideoCapture:
        config = self._config
        capture = cv2.VideoCapture()
        try:
            if self._backend == cv2.CAP_V4L2:
                opened = _open_v4l2(capture, config)
            elif self._backend == cv2.CAP_FFMPEG:
                timeouts = [
                    *(cv2.CAP_PROP_OPEN_TIMEOUT_MSEC, round(config.open_timeout_s * 1000)),
                    *(cv2.CAP_PROP_READ_TIMEOUT_MSEC, round(config.read_timeout_s * 1000)),
                ]
                opened = capture.open(config.source, cv2.CAP_FFMPEG, timeouts)
            else:
                opened = capture.open(config.source, self._backend)
        except cv2.error as error:
            raise self._error("cannot be opened; check that source names a camera", "open") from error
        if not opened:
            raise self._error("cannot be opened; check that it is connected, on, and used by no other program", "open")
        return capture

    def _decode(self, capture: cv2.VideoCapture, room: Room | None) -> Pixels:
        try:
            done, picture = capture.retrieve(self._picture)
            if not done or picture is None:
                raise self._error("gave a frame that cannot be decoded; choose another stream or format")
            self._picture = picture.astype(np.uint8, copy=False)  # used again: fresh memory has to be mapped first
            place = None if room is None else room.place(*self._picture.shape[:2])
            return cv2.cvtColor(self._picture, cv2.COLOR_BGR2RGB, place).astype(np.uint8, copy=False)
        except cv2.error as error:
            raise self._error("gives frames that are no colour pictures; choose another stream or format") from error

    def _error(self, what: str, reason: str = "broken") -> CameraError:
        return CameraError(f"camera {self._name}: {redacted(self._config.source)} {what}", reason)


def _open_v4l2(capture: cv2.VideoCapture, config: CameraConfig) -> bool:
    if config.source.isdigit():
        opened = capture.open(int(config.source), cv2.CAP_V4L2)
    else:
        opened = capture.open(config.source, cv2.CAP_V4L2)
    if opened:
        if config.width is not None:
            capture.set(cv2.CAP_PROP_FRAME_WIDTH, config.width)
        if config.height is not None:
            capture.set(cv2.CAP_PROP_FRAME_HEIGHT, config.height)
        capture.set(cv2.CAP_PROP_BUFFERSIZE, 1)  # a queue in the driver would hand out old pictures
    return opened


def _backend(name: str, source: str) -> int:
    if " ! " in source:
        if not cv2.videoio_registry.hasBackend(cv2.CAP_GSTREAMER):
            raise ConfigError(
                f"camera {name}: source is a GStreamer pipeline but this OpenCV has none, like every OpenCV from pip; "
                "use the OpenCV that comes with JetPack or the distribution, or an rtsp:// address"
            )
        return cv2.CAP_GSTREAMER
    if source.isdigit() or source.startswith("/dev/"):
        return cv2.CAP_V4L2
    if "://" in source:
        return cv2.CAP_FFMPEG
    raise ConfigError(
        f"camera {name}: source {source!r} must be a V4L2 index such as 0, a /dev path, an rtsp or http address "
        'or a GStreamer pipeline; for files set kind = "replay"'
    )
