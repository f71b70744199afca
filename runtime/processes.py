"""Processes of this machine that a simulation starts: tiers, and a broker of its own. None outlives who started it."""

from __future__ import annotations

import contextlib
import logging
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

from runtime.errors import KinflowError, LinkError

START_S = 30.0
STOP_S = 10.0

MOSQUITTO = """listener {port} 127.0.0.1
allow_anonymous true
persistence false
set_tcp_nodelay true
max_queued_messages 1000
"""


class OwnBroker:
    """A broker on a free port of the loopback that can be killed and started again there.

    With a path it is that Mosquitto, else the embedded broker. The context ends it.
    """

    def __init__(self, program: Path | None, folder: Path) -> None:
        # Bound as long as this lives, so that nobody else is given the port while the broker is down.
        self._holder = socket.socket()
        self._holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._holder.bind(("127.0.0.1", 0))
        self.port: int = self._holder.getsockname()[1]
        self.version: Literal["5", "3.1.1"] = "3.1.1" if program is None else "5"
        self._command = [sys.executable, "-m", "runtime.broker", str(self.port)]
        if program is not None:
            settings = folder / "mosquitto.conf"
            settings.write_text(MOSQUITTO.format(port=self.port), "utf-8")
            self._command = [str(program), "-c", str(settings)]
        self._named = "the embedded broker" if program is None else str(program)
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> OwnBroker:
        self.start()
        return self

    def __exit__(self, *failure: object) -> None:
        if self._process is not None:
            end(self._process)
        self._holder.close()

    def start(self) -> None:
        """Start it, and wait until it takes connections.

        Raises:
            LinkError: it does not start.
        """
        self._process = process = subprocess.Popen(
            self._command, stdin=subprocess.PIPE, stderr=subprocess.DEVNULL, start_new_session=True
        )
        end_s = time.monotonic() + START_S
        while time.monotonic() < end_s and process.poll() is None:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), 1):
                return
            time.sleep(0.02)
        end(process)
        raise LinkError(f"{self._named} did not start; give a Mosquitto 2 by its path, or one that runs as HOST:PORT")

    def kill(self) -> None:
        """End it at once, without a word to anybody."""
        if self._process is not None:
            kill(self._process)


def start_tier(arguments: Sequence[str]) -> subprocess.Popen[bytes]:
    """Start `kinflow` with these arguments; its standard output is a pipe."""
    # That three processes connect as they should is no news; with --verbose they tell everything.
    loud = "--verbose" if logging.getLogger().isEnabledFor(logging.DEBUG) else "--quiet"
    # In a session of its own, so that Ctrl-C reaches this process alone, which ends the others in order.
    return subprocess.Popen(
        [sys.executable, "-m", "runtime.cli", loud, *arguments, "--with-parent"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        start_new_session=True,
    )


@contextlib.contextmanager
def tier(arguments: Sequence[str]) -> Iterator[subprocess.Popen[bytes]]:
    """Run `kinflow` with these arguments while a `with` lasts."""
    process = start_tier(arguments)
    try:
        yield process
    finally:
        end(process)


def end(process: subprocess.Popen[bytes]) -> None:
    """Ask a process to end, make it end if it does not, and close its pipes."""
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    _close(process)


def kill(process: subprocess.Popen[bytes]) -> None:
    """End a process at once, as a power cut would, and close its pipes."""
    process.kill()
    process.wait()
    _close(process)


def ended(name: str, code: int) -> KinflowError:
    """What to raise when a tier ended by itself with an exit code."""
    error = KinflowError(f"the {name} ended with exit code {code}; its own message is above")
    error.exit_code = code if code > 0 else KinflowError.exit_code
    return error


def _close(process: subprocess.Popen[bytes]) -> None:
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            pipe.close()
