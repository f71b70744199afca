"""Cameras that another program reads: it writes raw frames to its standard output, and is killed when it stays silent.

For the Raspberry Pi's own camera that program is rpicam-vid, for a Jetson's gst-launch-1.0: both reach hardware that
OpenCV from pip cannot. Frames follow each other without any header, so both sides have to know size and format.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import selectors
import shlex
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from typing import IO

import cv2
import msgspec
import numpy as np
from numpy.typing import NDArray

from runtime.camera import redacted
from runtime.config import CameraConfig, PixelFormat
from runtime.datatypes import Frame, Pixels
from runtime.errors import CameraError, ConfigError
from runtime.freshness import Rate

RPICAM_PROGRAMS = ("rpicam-vid", "libcamera-vid")  # the latter is its name up to Raspberry Pi OS of 2023
RPICAM_SIZE = (640, 480)
RPICAM_WIDTH_STEP = 64  # its rows are padded to this many pixels, on a Pi 5
PIPE_BYTES = 1 << 20
STDERR_BYTES = 4096
END_S = 1.0

_BYTES: dict[PixelFormat, float] = {  # for a pixel
    **dict.fromkeys(("i420", "i420-full", "nv12"), 1.5),
    **dict.fromkeys(("rgb", "bgr"), 3),
    "bgrx": 4,
    "gray8": 1,
}
_CODES: dict[PixelFormat, int] = {
    "i420": cv2.COLOR_YUV2RGB_I420,
    "nv12": cv2.COLOR_YUV2RGB_NV12,
    "bgr": cv2.COLOR_BGR2RGB,
    "bgrx": cv2.COLOR_BGRA2RGB,
    "gray8": cv2.COLOR_GRAY2RGB,
}
_Raw = NDArray[np.uint8]  # one frame as it is written, flat


class PipeCamera:
    """Frames of a program; its process and all that it started are ended when it stays silent, and at the end.

    Each frame is stamped when its first byte can be read. A frame that the program holds back is older than that.
    """

    def __init__(self, name: str, config: CameraConfig) -> None:
        """Check what no retry can heal.

        Raises:
            ConfigError: the command or the size is missing, or the size does not go with the format.
        """
        width, height = config.width, config.height
        if width is None or height is None:
            raise ConfigError(f"camera {name}: width and height: missing; of a pipe nobody else can know them")
        if width % 8 or height % 2:
            raise ConfigError(
                f"camera {name}: {width}x{height}: a pipe's width must be a multiple of 8 and its height of 2, "
                "as programs pad rows of other widths in ways of their own"
            )
        try:
            self._command = shlex.split(config.source)
        except ValueError as error:
            raise ConfigError(f"camera {name}: source: {str(error).lower()} in the command") from error
        if not self._command or config.source.isdigit():
            raise ConfigError(f"camera {name}: source must be a command that writes raw frames to its standard output")
        cv2.setNumThreads(1)  # more make a busy small board slower, and the preprocessing after us shares this setting
        self._name = name
        self._config = config
        self._size = (height, width)
        self._closed = threading.Event()
        self._process: subprocess.Popen[bytes] | None = None

    def frames(self) -> Iterator[Frame]:
        """Start the program and yield its frames as they come, at most `max_fps` of them a second.

        Raises:
            CameraError: it cannot be started, ended, or stayed silent for too long.
        """
        with self._driven() as (process, stdout, stderr), selectors.DefaultSelector() as ready:
            log = _LastLine(stderr)
            ready.register(stdout, selectors.EVENT_READ)
            ready.register(stderr, selectors.EVENT_READ)
            rate = Rate(self._config.max_fps)
            height, width = self._size
            raw = np.empty(int(height * width * _BYTES[self._config.format]), np.uint8)
            limit_s = self._config.open_timeout_s + self._config.read_timeout_s
            index = 0
            while not self._closed.is_set():
                captured_ns = self._fill(raw, process, ready, log, limit_s)
                if captured_ns is None:
                    return
                limit_s = self._config.read_timeout_s
                if rate.keeps(captured_ns):
                    yield Frame(self._name, captured_ns, _rgb(raw, self._config.format, height, width), index)
                index += 1

    def close(self) -> None:
        """Make `frames` end at once."""
        self._closed.set()
        if self._process is not None:
            _signal(self._process, signal.SIGTERM)

    def _fill(
        self,
        raw: _Raw,
        process: subprocess.Popen[bytes],
        ready: selectors.BaseSelector,
        log: _LastLine,
        limit_s: float,
    ) -> int | None:
        """Read one frame into `raw`. Returns when its first byte was there, in ns; None when closed meanwhile."""
        view = raw.data
        done = captured_ns = 0
        deadline_s = time.monotonic() + limit_s
        while done < len(view):
            events = ready.select(max(0.0, deadline_s - time.monotonic()))
            if self._closed.is_set():
                return None
            if not events:
                raise self._error(f"wrote no whole frame for {limit_s:.3g} s; it is ended", "silent", log)
            for key, _ in events:
                if key.fileobj is log.stream:
                    if not log.read():
                        ready.unregister(log.stream)
                    continue
                captured_ns = captured_ns or time.monotonic_ns()
                count = os.readv(key.fd, [view[done:]])
                if count == 0:
                    ended = _exit(process)
                    log.read()
                    raise self._error(f"ended ({ended})", "broken", log)
                done += count
        return captured_ns

    @contextlib.contextmanager
    def _driven(self) -> Iterator[tuple[subprocess.Popen[bytes], IO[bytes], IO[bytes]]]:
        try:
            self._process = process = subprocess.Popen(
                self._command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                bufsize=0,
                start_new_session=True,
            )
        except OSError as error:
            sentence = f"camera {self._name}: {self._command[0]} cannot be started: {error.strerror}"
            raise CameraError(sentence, "open") from error
        stdout, stderr = process.stdout, process.stderr
        assert stdout is not None
        assert stderr is not None
        try:
            with contextlib.suppress(OSError):  # more than this system allows: a smaller pipe only costs more wake-ups
                fcntl.fcntl(stdout.fileno(), fcntl.F_SETPIPE_SZ, PIPE_BYTES)
            yield process, stdout, stderr
        finally:
            # Asked first: a killed client can leave a Jetson's camera service unable to open the camera again.
            _signal(process, signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(END_S)
            _signal(process, signal.SIGKILL)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(END_S)
            stdout.close()
            stderr.close()

    def _error(self, what: str, reason: str, log: _LastLine) -> CameraError:
        said = f": {log.line}" if log.line else ""
        return CameraError(f"camera {self._name}: {self._command[0]} {what}{said}", reason)


def rpicam(name: str, config: CameraConfig) -> PipeCamera:
    """The camera on a Raspberry Pi's ribbon cable, number `source`, through rpicam-vid.

    It is asked for uncompressed frames: a JPEG would cost the processor twice, here and there. They come as rpicam-apps
    write them for `--codec yuv420`: I420 in the full range of JPEG.

    Raises:
        ConfigError: the number or the size is none that it takes.
    """
    width, height = config.width or RPICAM_SIZE[0], config.height or RPICAM_SIZE[1]
    if not config.source.isdigit():
        raise ConfigError(f"camera {name}: source must be the camera's number, such as 0, as rpicam-hello lists them")
    if width % RPICAM_WIDTH_STEP:
        raise ConfigError(f"camera {name}: width: {width} must be a multiple of {RPICAM_WIDTH_STEP} for rpicam-vid")
    program = next((known for known in RPICAM_PROGRAMS if shutil.which(known)), RPICAM_PROGRAMS[0])
    command = f"{program} --camera {config.source} --timeout 0 --nopreview --width {width} --height {height} "
    command += f"--framerate {config.max_fps} " if config.max_fps else ""
    command += "--codec yuv420 --flush --output -"
    made = msgspec.structs.replace(config, source=command, width=width, height=height, format="i420-full")
    return PipeCamera(name, made)


class _LastLine:
    """What a program said last on its standard error; the rest is read and forgotten, so that it need not wait."""

    def __init__(self, stream: IO[bytes]) -> None:
        self.stream = stream
        self._tail = b""

    @property
    def line(self) -> str:
        """The last line that is not empty, without secrets."""
        lines = [line for line in self._tail.decode(errors="replace").splitlines() if line.strip()]
        return redacted("".join(letter for letter in lines[-1] if letter.isprintable())) if lines else ""

    def read(self) -> bool:
        """Read what is there; False at the end."""
        data = os.read(self.stream.fileno(), STDERR_BYTES)
        self._tail = (self._tail + data)[-STDERR_BYTES:]
        return bool(data)


def _rgb(raw: _Raw, layout: PixelFormat, height: int, width: int) -> Pixels:
    """A frame as it was written → RGB, in memory of its own."""
    if layout == "rgb":
        return raw.reshape(height, width, 3).copy()
    if layout == "i420-full":
        luma = raw[: height * width].reshape(height, width)
        blue, red = (
            cv2.resize(plane, (width, height), interpolation=cv2.INTER_NEAREST)
            for plane in raw[height * width :].reshape(2, height // 2, width // 2)
        )
        return cv2.cvtColor(cv2.merge([luma, red, blue]), cv2.COLOR_YCrCb2RGB).astype(np.uint8, copy=False)
    rows = raw.reshape((height, width, -1) if layout in ("bgr", "bgrx") else (-1, width))
    return cv2.cvtColor(rows, _CODES[layout]).astype(np.uint8, copy=False)


def _signal(process: subprocess.Popen[bytes], number: signal.Signals) -> None:
    """Send a signal to a program and to all that it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, number)


def _exit(process: subprocess.Popen[bytes]) -> str:
    try:
        code = process.wait(END_S)
    except subprocess.TimeoutExpired:
        return "it closed its output"
    return f"exit code {code}" if code >= 0 else signal.Signals(-code).name
