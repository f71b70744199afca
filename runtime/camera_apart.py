"""A camera in a process of its own: one that hangs is killed and can be opened again.

What OpenCV does in `open` and `read` may hang for ever in a driver or a network library, and a thread cannot be ended
from outside. The other process converts each picture right into memory that both share, so handing it over costs a
message of some 30 bytes and no copy; decoding happens there as well, beside this process' interpreter.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator

import cv2
import msgspec

from runtime.camera import open_source
from runtime.config import CameraConfig
from runtime.datatypes import Frame
from runtime.errors import CameraError
from runtime.shared_frames import Failed, Laid, Reader, Started

START_S = 30.0  # for a small, busy board to start Python and load OpenCV
GRACE_S = 1.0  # on top of the camera's own time-outs, whose sentences say more than ours
KILL_S = 2.0
# The same modules as here, whatever the environment and the working folder say.
_PROGRAM = (
    "import sys; sys.path[:] = sys.argv[3:]; "
    "from runtime.camera_worker import main; main(int(sys.argv[1]), int(sys.argv[2]))"
)

log = logging.getLogger(__name__)


class ApartCamera:
    """Frames of a source that another process drives; that process is killed when it stays silent, and at the end."""

    def __init__(self, name: str, config: CameraConfig) -> None:
        """Check what no retry can heal.

        Raises:
            ConfigError: the source can never be opened.
        """
        open_source(name, config)
        cv2.setNumThreads(1)  # of the preprocessing here: more make a busy small board slower
        self._name = name
        self._config = config
        self._closed = threading.Event()
        self._reader: Reader | None = None

    def frames(self) -> Iterator[Frame]:
        """Start the process and yield its frames as they come.

        Raises:
            CameraError: what the source raised there; or the process was silent for too long, or broke down.
        """
        with self._driven() as (reader, process):
            patience_s = max(self._config.read_timeout_s, 2.0 / self._config.max_fps if self._config.max_fps else 0.0)
            limit_s = START_S
            while not self._closed.is_set():
                try:
                    message = reader.receive(limit_s)
                except TimeoutError as error:
                    what = f"gave nothing for {limit_s:.3g} s; it is killed"
                    raise self._error(what, "silent") from error
                except OSError:
                    message = None
                if self._closed.is_set():
                    return
                if isinstance(message, Laid):
                    limit_s = patience_s + GRACE_S
                    yield Frame(
                        camera=self._name,
                        captured_ns=message.captured_ns,
                        pixels=reader.pixels(message),
                        index=message.index,
                        skipped=message.skipped,
                    )
                elif isinstance(message, Started):
                    limit_s = self._config.open_timeout_s + patience_s + GRACE_S
                elif isinstance(message, Failed):
                    raise CameraError(message.sentence, message.reason)
                else:
                    raise self._error(f"broke down ({_end(process)}); see the log right before", "broken")

    def close(self) -> None:
        """Make `frames` end at once."""
        self._closed.set()
        if self._reader is not None:
            self._reader.wake()

    @contextlib.contextmanager
    def _driven(self) -> Iterator[tuple[Reader, subprocess.Popen[bytes]]]:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        memory_fd = os.memfd_create(f"kinflow-{self._name}", os.MFD_CLOEXEC)
        self._reader = reader = Reader(ours, memory_fd)
        process: subprocess.Popen[bytes] | None = None
        try:
            # Not as an argument, which every program may read: a source may hold a password.
            ours.sendall(msgspec.msgpack.encode((self._name, self._config)))
            with theirs:
                process = subprocess.Popen(
                    [sys.executable, "-I", "-c", _PROGRAM, str(theirs.fileno()), str(memory_fd), *sys.path],
                    stdin=subprocess.DEVNULL,
                    pass_fds=(theirs.fileno(), memory_fd),
                    start_new_session=True,  # Ctrl-C is for us to handle
                )
            yield reader, process
        finally:
            reader.wake()
            reader.close()
            if process is not None:
                end(process, self._name)

    def _error(self, what: str, reason: str) -> CameraError:
        return CameraError(f"camera {self._name}: its process {what}", reason)


def end(process: subprocess.Popen[bytes], name: str) -> None:
    """Kill a process and wait for its end, for at most two seconds: a driver may hold even a killed one."""
    process.kill()
    try:
        process.wait(KILL_S)
    except subprocess.TimeoutExpired:
        log.error("camera %s: its process %d hangs in a driver and cannot be killed", name, process.pid)


def _end(process: subprocess.Popen[bytes]) -> str:
    try:
        code = process.wait(KILL_S)
    except subprocess.TimeoutExpired:
        return "it closed its channel"
    return f"exit code {code}" if code >= 0 else signal.Signals(-code).name
