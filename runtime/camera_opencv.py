"""Live cameras through OpenCV: USB and other V4L2 cameras, RTSP and HTTP streams, GStreamer pipelines."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Iterator

import cv2
import numpy as np

from runtime.config import CameraConfig
from runtime.datatypes import Frame, Pixels
from runtime.errors import CameraError, ConfigError

_SECRETS = (
    (re.compile(r"://\S*@"), "://***@"),  # to the last @: a password may hold one
    (re.compile(r"\?\S*"), "?***"),
    (re.compile(r"\b(user-id|user-pw|user|password|token)=\S+", re.IGNORECASE), r"\1=***"),
)


def redacted(source: str) -> str:
    """`source` without what may be a secret, for logs and errors."""
    for pattern, replacement in _SECRETS:
        source = pattern.sub(replacement, source)
    return source


class OpencvCamera:
    """Frames of a live source, each stamped when it was grabbed.

    Open and read time-outs hold for URLs. V4L2 has its own of 10 s and GStreamer its own of 30 s, so that `Capture`
    watches the clock as well.
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

    def frames(self) -> Iterator[Frame]:
        """Yield frames as they come, at most `max_fps` of them a second.

        Raises:
            CameraError: the camera cannot be opened, or gave no frame within its read time-out.
        """
        capture = self._open()
        try:
            period_ns = 1e9 / self._config.max_fps if self._config.max_fps else 0.0
            due_ns = 0.0
            index = -1
            while not self._closed.is_set():
                if not capture.grab():
                    raise self._error("gives no frames any more; check its cable, power and network")
                captured_ns = time.monotonic_ns()
                index += 1
                if captured_ns < due_ns:
                    continue
                # Half a period of patience, so that jitter does not cost a camera at just max_fps every other frame.
                due_ns = max(due_ns, captured_ns - period_ns / 2) + period_ns
                yield Frame(camera=self._name, captured_ns=captured_ns, pixels=self._decode(capture), index=index)
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
            raise self._error("cannot be opened; check that source names a camera") from error
        if not opened:
            raise self._error("cannot be opened; check that it is connected, on, and used by no other program")
        return capture

    def _decode(self, capture: cv2.VideoCapture) -> Pixels:
        try:
            done, pixels = capture.retrieve()
            if not done or pixels is None:
                raise self._error("gave a frame that cannot be decoded; choose another stream or format")
            return cv2.cvtColor(pixels, cv2.COLOR_BGR2RGB).astype(np.uint8, copy=False)
        except cv2.error as error:
            raise self._error("gives frames that are no colour pictures; choose another stream or format") from error

    def _error(self, what: str) -> CameraError:
        return CameraError(f"camera {self._name}: {redacted(self._config.source)} {what}")


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
