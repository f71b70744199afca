"""The thread that drives a camera, and the slot in which it leaves the latest frame."""

from __future__ import annotations

import logging
import random
import threading
import time
from collections.abc import Callable
from typing import Literal, TypeAlias

from runtime.camera import Camera, open_camera
from runtime.config import CameraConfig
from runtime.counters import Counters
from runtime.datatypes import Frame
from runtime.errors import CameraError

Status: TypeAlias = Literal["starting", "online", "stalled", "offline"]

RETRY_FIRST_S = 0.5
RETRY_MAX_S = 30.0
CLOSE_S = 2.0

log = logging.getLogger(__name__)


class Capture:
    """Always holds the latest frame of one camera, and opens the camera again whenever it fails.

    A frame that nobody took before the next came is dropped and counted (`frames_dropped_total`, reason stale):
    an answer about an old picture is worth less than one about a new one. Only a replay with `realtime=False` waits
    until its frame is taken, so that every frame gets its answer. A replay that fails is not opened again.

    `waits` tells such a replay apart. `wake` (an Event that is set, or a function) is called on the capture thread
    when there is a frame to take, and once at the end. The other methods belong to any thread.
    """

    def __init__(
        self, name: str, config: CameraConfig, counters: Counters, wake: threading.Event | Callable[[], None]
    ) -> None:
        """Make a capture that has not been started.

        Raises:
            ConfigError: no retry could ever open this camera.
        """
        self.name = name
        self._config = config
        self._counters = counters
        self._wake: Callable[[], None] = wake.set if isinstance(wake, threading.Event) else wake
        # Whether the camera waits for its frame to be taken, instead of replacing it.
        self.waits = config.kind == "replay" and not config.realtime
        slowest_s = 2.0 / config.max_fps if config.max_fps else 0.0
        self._patience_s = max(config.read_timeout_s, slowest_s)
        self._changed = threading.Condition()
        self._closed = threading.Event()
        self._slot: Frame | None = None
        self._done = False
        self._error: CameraError | None = None
        self._status: Status = "starting"
        self._since = time.monotonic()  # of the last sign of life
        self._camera: Camera = open_camera(name, config)
        self._thread = threading.Thread(target=self._run, name=f"kinflow-capture-{name}", daemon=True)

    def start(self) -> None:
        """Begin to capture. Returns at once."""
        self._since = time.monotonic()
        self._thread.start()

    def take(self) -> Frame | None:
        """The latest frame, at most once; None when there is no new one."""
        with self._changed:
            frame, self._slot = self._slot, None
            if frame is not None:
                if self.waits:
                    self._since = time.monotonic()
                self._changed.notify_all()
            return frame

    @property
    def ended(self) -> bool:
        """Whether no frame will come any more and the last one was taken; see `error` for why."""
        with self._changed:
            return self._done and self._slot is None

    @property
    def error(self) -> CameraError | None:
        """What is wrong with the camera now: None while frames come, and when a replay came to its end."""
        with self._changed:
            return self._error

    @property
    def status(self) -> Status:
        """`stalled`: no frame for `read_timeout_s`, even if the read still hangs; `offline`: it cannot be opened."""
        with self._changed:
            silent_s = time.monotonic() - self._since
            if self._done:
                return "offline"
            if self._status == "starting" and silent_s > self._config.open_timeout_s + self._patience_s:
                return "stalled"
            # A replay whose frame nobody took yet is not to blame for the silence.
            if self._status == "online" and silent_s > self._patience_s and not (self.waits and self._slot):
                return "stalled"
            return self._status

    def close(self) -> None:
        """Release the camera and end the thread; waits for at most two seconds, a read may hang for longer."""
        self._closed.set()
        self._camera.close()
        with self._changed:
            if self._slot is not None:
                self._counters.add("frames_dropped_total", camera=self.name, reason="stopping")
            self._slot = None
            self._changed.notify_all()
        if self._thread.ident is not None:
            self._thread.join(CLOSE_S)
        if self._thread.is_alive():
            log.warning("camera %s still hangs in a read, it is left behind", self.name)

    def _run(self) -> None:
        finished = False
        try:
            self._drive()
            finished = True
        finally:
            # Even after an error of our own, which the thread's hook prints, the device must hear that this is over.
            with self._changed:
                if not finished:
                    self._error = CameraError(f"camera {self.name}: capture broke down; see the traceback in the log")
                self._done = True
            self._wake()

    def _drive(self) -> None:
        failures = 0
        while not self._closed.is_set():
            given = False
            try:
                for frame in self._camera.frames():
                    if self._closed.is_set():
                        return
                    if failures:
                        log.info("camera %s is back", self.name)
                    given, failures = True, 0
                    self._offer(frame)
            except CameraError as error:
                with self._changed:
                    self._error = error
                    self._status = "stalled" if given else "offline"
                if self._config.kind == "replay":
                    return
                self._counters.add("camera_failures_total", camera=self.name)
            else:
                return
            delay_s = min(RETRY_MAX_S, RETRY_FIRST_S * 2**failures) * random.uniform(0.5, 1.0)
            failures += 1
            log.warning("%s; trying again in %.1f s", self._error, delay_s)
            self._closed.wait(delay_s)
            self._camera = open_camera(self.name, self._config)

    def _offer(self, frame: Frame) -> None:
        self._counters.add("frames_captured_total", camera=self.name)
        with self._changed:
            if self.waits:
                self._changed.wait_for(lambda: self._slot is None or self._closed.is_set())
            if self._closed.is_set():
                self._counters.add("frames_dropped_total", camera=self.name, reason="stopping")
                return
            stale = self._slot is not None
            self._slot = frame
            self._error = None
            self._status = "online"
            self._since = time.monotonic()
        if stale:
            self._counters.add("frames_dropped_total", camera=self.name, reason="stale")
        self._wake()
