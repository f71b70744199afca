"""The thread that drives a camera, and the slot in which it leaves the latest frame."""

from __future__ import annotations

import logging
import random
import threading
import time
from collections.abc import Callable, Generator
from contextlib import closing, nullcontext
from dataclasses import replace
from typing import Literal, TypeAlias

from runtime.camera import Camera, open_camera
from runtime.config import CameraConfig
from runtime.counters import Counters
from runtime.datatypes import Frame
from runtime.errors import CameraError
from runtime.freshness import Stillness

Status: TypeAlias = Literal["starting", "online", "late", "frozen", "stalled", "offline"]

RETRY_FIRST_S = 0.5
RETRY_MAX_S = 30.0
CLOSE_S = 5.0  # a process that drives a camera is given two of them to end
FROZEN_RETRY_MAX_S = 3600.0
HANG_S = 60.0  # beyond the camera's own time-outs

log = logging.getLogger(__name__)


class Capture:
    """Always holds the latest frame of one camera, and opens the camera again whenever it fails.

    A frame that nobody took before the next came is dropped and counted (`frames_dropped_total`, reason stale):
    an answer about an old picture is worth less than one about a new one. Only a replay with `realtime=False` waits
    until its frame is taken, so that every frame gets its answer. A replay that fails is not opened again.

    A live camera's frame that comes more than `max_lag_ms` late is dropped (reason late). One that is the same picture
    for `frozen_after_s` is still handed out, but says so (`Frame.flaw`), and the camera is opened again, more and more
    rarely as long as that does not help.

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
        self._since = time.monotonic()  # of the last frame
        self._stirred = self._since  # when this thread last got out of the camera, with a frame or without
        self._stillness = Stillness() if config.kind != "replay" and config.frozen_after_s else None
        self._thaw_s = config.frozen_after_s  # a picture that stays the same for so long has its camera opened again
        self._late_since: float | None = None
        self._camera: Camera = open_camera(name, config)
        self._thread = threading.Thread(target=self._run, name=f"kinflow-capture-{name}", daemon=True)

    def start(self) -> None:
        """Begin to capture. Returns at once."""
        self._since = self._stirred = time.monotonic()
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
    def hangs(self) -> bool:
        """Whether the capture itself is stuck: neither a frame nor a failure for far longer than time-outs allow."""
        with self._changed:
            if self._done or self._thread.ident is None or (self.waits and self._slot is not None):
                return False
            allowed_s = self._config.open_timeout_s + self._patience_s + RETRY_MAX_S + HANG_S
            return time.monotonic() - self._stirred > allowed_s

    @property
    def status(self) -> Status:
        """What applications are told (docs/operations.md).

        `late`: frames come, but too late; `frozen`: always the same picture; `stalled`: no frame for `read_timeout_s`,
        even if the read still hangs; `offline`: it cannot be opened.
        """
        with self._changed:
            silent_s = time.monotonic() - self._since
            if self._done:
                return "offline"
            if self._status == "starting" and silent_s > self._config.open_timeout_s + self._patience_s:
                return "stalled"
            # A replay whose frame nobody took yet is not to blame for the silence.
            if (
                self._status in ("online", "late", "frozen")
                and silent_s > self._patience_s
                and not (self.waits and self._slot)
            ):
                return "stalled"
            return self._status

    def close(self) -> None:
        """Release the camera and end the thread; waits for at most five seconds."""
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
            log.warning("camera %s still hangs, it is left behind", self.name)

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
                frames = self._camera.frames()
                # Closed by hand, so that a camera that is left for its frozen picture is released before it is opened.
                with closing(frames) if isinstance(frames, Generator) else nullcontext():
                    for frame in frames:
                        if self._closed.is_set():
                            return
                        if failures:
                            log.info("camera %s is back", self.name)
                        given, failures = True, 0
                        self._judge(frame)
            except CameraError as error:
                with self._changed:
                    # A new one: whoever keeps it, a log handler too, would keep the frames of its traceback with it.
                    self._error = CameraError(str(error), error.reason)
                    if error.reason not in ("late", "frozen"):
                        self._status = "stalled" if given else "offline"
                    self._stirred = time.monotonic()
                if self._config.kind == "replay":
                    return
                self._counters.add("camera_failures_total", camera=self.name, reason=error.reason)
            else:
                return
            delay_s = min(RETRY_MAX_S, RETRY_FIRST_S * 2**failures) * random.uniform(0.5, 1.0)
            failures += 1
            log.warning("%s; trying again in %.1f s", str(self._error), delay_s)
            self._closed.wait(delay_s)
            self._camera = open_camera(self.name, self._config)

    def _judge(self, frame: Frame) -> None:
        """Offer a frame that shows what is there now; drop one that is late, and mark one that is frozen.

        Raises:
            CameraError: the camera is better opened again.
        """
        if frame.skipped:
            self._counters.add("frames_captured_total", frame.skipped, camera=self.name)
            self._counters.add("frames_dropped_total", frame.skipped, camera=self.name, reason="stale")
        if self._config.kind == "replay":
            self._offer(frame, "online")
            return
        now_s = time.monotonic()
        lag_s = now_s - frame.captured_ns / 1e9
        if lag_s > self._config.max_lag_ms / 1000:
            self._late_since = now_s if self._late_since is None else self._late_since
            self._counters.add("frames_captured_total", camera=self.name)
            self._counters.add("frames_dropped_total", camera=self.name, reason="late")
            with self._changed:
                self._status = "late"
                self._since = self._stirred = now_s
            if now_s - self._late_since > self._config.read_timeout_s:
                self._late_since = None
                raise CameraError(f"camera {self.name}: its frames come {lag_s:.1f} s late", "late")
            return
        self._late_since = None
        still_s = 0.0 if self._stillness is None else self._stillness.look(frame.pixels, now_s)
        if still_s < self._config.frozen_after_s or self._stillness is None:
            self._thaw_s = self._config.frozen_after_s
            self._offer(frame, "online")
            return
        self._offer(replace(frame, flaw="frozen"), "frozen")
        if still_s >= self._thaw_s:
            self._thaw_s = still_s + min(still_s, FROZEN_RETRY_MAX_S)
            raise CameraError(f"camera {self.name}: the same picture for {still_s:.0f} s", "frozen")

    def _offer(self, frame: Frame, status: Status) -> None:
        self._counters.add("frames_captured_total", camera=self.name)
        with self._changed:
            self._stirred = time.monotonic()
            if self.waits:
                self._changed.wait_for(lambda: self._slot is None or self._closed.is_set())
            if self._closed.is_set():
                self._counters.add("frames_dropped_total", camera=self.name, reason="stopping")
                return
            stale = self._slot is not None
            self._slot = frame
            self._error = None
            self._status = status
            self._since = self._stirred = time.monotonic()
        if stale:
            self._counters.add("frames_dropped_total", camera=self.name, reason="stale")
        self._wake()
