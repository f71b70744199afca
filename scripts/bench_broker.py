"""A Mosquitto for the measuring scripts: the shipped configuration on a free loopback port."""

from __future__ import annotations

import contextlib
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


class Broker:
    """A broker process that can be killed and started again on its port."""

    def __init__(self, binary: str, folder: Path) -> None:
        self.host = "127.0.0.1"
        with socket.socket() as probe:
            probe.bind((self.host, 0))
            self.port: int = probe.getsockname()[1]
        shipped = (ROOT / "firmware_configs/mosquitto/mosquitto.conf").read_text("utf-8")
        config = folder / "mosquitto.conf"
        config.write_text(re.sub(r"(?m)^listener 1883 ", f"listener {self.port} ", shipped), "utf-8")
        self._command = [binary, "-c", str(config)]
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it, and wait until it takes connections."""
        self._process = subprocess.Popen(self._command, stderr=subprocess.DEVNULL)
        end = time.monotonic() + 10
        while time.monotonic() < end:
            with contextlib.suppress(OSError), socket.create_connection((self.host, self.port), 1):
                return
            time.sleep(0.02)
        sys.exit("mosquitto does not start with firmware_configs/mosquitto/mosquitto.conf")

    def kill(self) -> None:
        """End it at once."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None


@contextlib.contextmanager
def mosquitto() -> Iterator[Broker]:
    """Run a broker for as long as a `with` lasts."""
    binary = shutil.which("mosquitto") or shutil.which("mosquitto", path="/usr/sbin:/usr/local/sbin")
    if binary is None:
        sys.exit("mosquitto is not installed; apt-get install mosquitto")
    with tempfile.TemporaryDirectory() as folder:
        broker = Broker(binary, Path(folder))
        broker.start()
        try:
            yield broker
        finally:
            broker.kill()
