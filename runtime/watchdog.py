"""systemd's watchdog: told that all is well only while it is, so that whatever hangs is started again.

The protocol is sd_notify(3): datagrams of `NAME=value` lines to the Unix socket that the environment names. What is
checked: the loop that runs the model comes round, as it is the one that calls `tend`; no capture hangs beyond its own
time-outs; and what was taken in gets done. A camera that is off, or a broker that is away, is not wrong in this sense:
both are tried again all the time, and starting the process again would plug no cable in.
"""

from __future__ import annotations

import logging
import os
import socket
import time
from collections.abc import Callable, MutableMapping, Sequence

from runtime.capture import Capture
from runtime.counters import Counters
from runtime.link import Link

STUCK_S = 30.0  # with something waiting and nothing done for so long, nothing drains
PERIOD_S = 5.0
NOTIFY_S = 1.0

log = logging.getLogger(__name__)


class Notifier:
    """Sends lines to systemd, if it started this process and asked for them.

    Takes the names of the protocol out of `environ`: processes that we start are not to speak for us.
    """

    def __init__(self, environ: MutableMapping[str, str] | None = None) -> None:
        environ = os.environ if environ is None else environ
        address = environ.pop("NOTIFY_SOCKET", "")
        usec = environ.pop("WATCHDOG_USEC", "")
        pid = environ.pop("WATCHDOG_PID", "")
        # A leading @ stands for the zero byte of an abstract address.
        self._address = "\0" + address[1:] if address.startswith("@") else address
        ours = not pid or pid == str(os.getpid())
        self.watchdog_s = int(usec) / 1e6 if usec.isdigit() and int(usec) and ours and address else None

    def send(self, *lines: str) -> None:
        """Send lines; what cannot be sent is logged, as nothing here may stop the work."""
        if not self._address:
            return
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as channel:
                channel.settimeout(NOTIFY_S)
                channel.sendto("\n".join(lines).encode(), self._address)
        except OSError as error:
            log.warning("systemd cannot be told %s: %s", lines[-1], error.strerror)


class Drain:
    """For how long something has waited while nothing was done. Pure."""

    def __init__(self) -> None:
        self._done = -1
        self._since_s = 0.0

    def stuck_s(self, waiting: int, done: int, now_s: float) -> float:
        """Seconds since `done`, a count that only grows, has last grown or nothing was waiting."""
        if waiting <= 0 or done != self._done:
            self._done, self._since_s = done, now_s
        return now_s - self._since_s


class Watchdog:
    """Watches one tier, from its own loop.

    `waiting` counts what was taken in and not done yet, `done` what was done; both are asked for every few seconds.
    """

    def __init__(
        self,
        link: Link,
        *,
        waiting: Callable[[], int],
        done: Callable[[], int],
        captures: Sequence[Capture] = (),
        environ: MutableMapping[str, str] | None = None,
    ) -> None:
        self._link = link
        self._waiting = waiting
        self._done = done
        self._captures = captures
        self._notifier = Notifier(environ)
        self._drain = Drain()
        self._wrong: list[str] = []
        watchdog_s = self._notifier.watchdog_s
        self._period_s = PERIOD_S if watchdog_s is None else min(PERIOD_S, watchdog_s / 3)
        self._next_s = 0.0

    def ready(self) -> None:
        """Say that the model is loaded and has run, and that work begins."""
        self._notifier.send("READY=1")

    def tend(self) -> None:
        """Tell the state, and that all is well if it is. Cheap, to be called whenever the loop comes round."""
        now_s = time.monotonic()
        if now_s < self._next_s:
            return
        self._next_s = now_s + self._period_s
        done = self._done()
        wrong = self._complaints(done, now_s)
        if wrong != self._wrong:
            if wrong:
                log.error("unwell: %s", "; ".join(wrong))
            else:
                log.info("well again")
            self._wrong = wrong
        cameras = [f"{capture.name} {capture.status}" for capture in self._captures]
        broker = "broker connected" if self._link.connected else "broker away"
        lines = ["STATUS=" + "; ".join([*wrong, *cameras, broker, f"{done} done"])]
        if not wrong and self._notifier.watchdog_s is not None:
            lines.append("WATCHDOG=1")
        self._notifier.send(*lines)

    def stopping(self) -> None:
        """Say that work ends."""
        self._notifier.send("STOPPING=1", "STATUS=stopping")

    def _complaints(self, done: int, now_s: float) -> list[str]:
        wrong = [f"the capture of camera {capture.name} hangs" for capture in self._captures if capture.hangs]
        waiting = self._waiting()
        stuck_s = self._drain.stuck_s(waiting, done, now_s)
        if stuck_s > STUCK_S:
            wrong.append(f"{waiting} frames wait, and none was done for {stuck_s:.0f} s")
        return wrong


def of_device(counters: Counters, link: Link, captures: Sequence[Capture]) -> Watchdog:
    """A device's: each of its frames ends as a result or is counted as dropped."""

    def done() -> int:
        return counters.total("results_total") + counters.total("frames_dropped_total")

    return Watchdog(
        link, waiting=lambda: counters.total("frames_captured_total") - done(), done=done, captures=captures
    )


def of_node(counters: Counters, link: Link, waiting: Callable[[], int]) -> Watchdog:
    """A node's: each of its requests ends as a reply, a refusal or is counted as dropped."""
    ends = ("replies_total", "packets_refused_total", "requests_dropped_total")
    return Watchdog(link, waiting=waiting, done=lambda: sum(counters.total(name) for name in ends))
