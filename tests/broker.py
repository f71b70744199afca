"""A real broker with the shipped configuration, which tests kill, pause and start again."""

from __future__ import annotations

import re
import signal
import socket
import subprocess
import time
from pathlib import Path

import pytest

BROKER_CONFIG = Path(__file__).parent.parent / "firmware_configs" / "mosquitto" / "mosquitto.conf"


def a_free_port() -> int:
    """A TCP port of the loopback that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


class Mosquitto:
    """A real broker that can be killed and started again on the same port."""

    def __init__(self, binary: str, directory: Path, extra_config: str = "") -> None:
        self.host = "127.0.0.1"
        self.port = a_free_port()
        self.address = (self.host, self.port)
        self._config = directory / "mosquitto.conf"
        self._log = directory / "mosquitto.log"
        shipped = BROKER_CONFIG.read_text("utf-8")
        # The port is the only thing that differs from what users get.
        text, replaced = re.subn(r"(?m)^listener 1883 ", f"listener {self.port} ", shipped)
        assert replaced == 1, "mosquitto.conf must have exactly one line that begins with: listener 1883"
        self._config.write_text(text + extra_config, "utf-8")
        self._command = [binary, "-c", str(self._config)]
        self._process: subprocess.Popen[bytes] | None = None

    def restart(self) -> None:
        """Start the broker, after killing it when it still runs; returns when it accepts connections."""
        self.kill()
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(self._command, stdout=log, stderr=log)
        deadline = time.monotonic() + 10
        while True:
            try:
                socket.create_connection((self.host, self.port), timeout=1).close()
            except OSError:
                if self._process.poll() is not None or time.monotonic() > deadline:
                    pytest.fail(f"mosquitto did not start: {self.log()}")
                time.sleep(0.01)
            else:
                return

    def pause(self) -> None:
        """Let the broker stand still: it keeps its connections and reads nothing."""
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Let it go on."""
        assert self._process is not None
        self._process.send_signal(signal.SIGCONT)

    def kill(self) -> None:
        """End the broker at once, as a power cut would."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def log(self) -> str:
        """What the broker has logged so far."""
        return self._log.read_text("utf-8", errors="replace")
