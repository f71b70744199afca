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


@contextlib.contextmanager
def mosquitto() -> Iterator[tuple[str, int]]:
    """Run a broker for as long as a `with` lasts; gives its host and port."""
    binary = shutil.which("mosquitto") or shutil.which("mosquitto", path="/usr/sbin:/usr/local/sbin")
    if binary is None:
        sys.exit("mosquitto is not installed; apt-get install mosquitto")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    shipped = (ROOT / "firmware_configs/mosquitto/mosquitto.conf").read_text("utf-8")
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder) / "mosquitto.conf"
        config.write_text(re.sub(r"(?m)^listener 1883 ", f"listener {port} ", shipped), "utf-8")
        broker = subprocess.Popen([binary, "-c", str(config)], stderr=subprocess.DEVNULL)
        try:
            end = time.monotonic() + 10
            while time.monotonic() < end:
                with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                    break
                time.sleep(0.02)
            yield "127.0.0.1", port
        finally:
            broker.terminate()
            broker.wait(10)
