from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime.capture import Capture
from runtime.config import BrokerConfig, CameraConfig
from runtime.counters import Counters
from runtime.link import open_link
from runtime.watchdog import Drain, Notifier, Watchdog


class Systemd:
    """The other end of the protocol: a real datagram socket."""

    def __init__(self, address: str) -> None:
        self.address = address
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind("\0" + address[1:] if address.startswith("@") else address)
        self._socket.settimeout(10)

    def environ(self, **more: str) -> dict[str, str]:
        return {"NOTIFY_SOCKET": self.address, **more}

    def hear(self) -> list[str]:
        return self._socket.recv(4096).decode().splitlines()

    def waits(self) -> bool:
        """Whether nothing was said that has not been heard."""
        self._socket.settimeout(0.05)
        try:
            self._socket.recv(4096, socket.MSG_PEEK)
        except TimeoutError:
            return True
        finally:
            self._socket.settimeout(10)
        return False

    def close(self) -> None:
        self._socket.close()


@pytest.fixture(params=["path", "abstract"])
def systemd(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Systemd]:
    address = str(tmp_path / "notify") if request.param == "path" else f"@kinflow-test-{os.getpid()}"
    ear = Systemd(address)
    yield ear
    ear.close()


def link() -> Any:
    return open_link(BrokerConfig(host="watchdog", kind="memory"), client_id="test", counters=Counters())


def make(
    environ: dict[str, str], waiting: Callable[[], int] = lambda: 0, done: Callable[[], int] = lambda: 0, **more: Any
) -> Watchdog:
    return Watchdog(link(), waiting=waiting, done=done, environ=environ, **more)


def test_ready_well_and_stopping_are_told(systemd: Systemd) -> None:
    watchdog = make(systemd.environ(WATCHDOG_USEC="600000"), done=lambda: 12)
    watchdog.ready()
    assert systemd.hear() == ["READY=1"]
    heard_s = []
    for _ in range(4):
        while systemd.waits():
            watchdog.tend()
        assert systemd.hear() == ["STATUS=broker away; 12 done", "WATCHDOG=1"]
        heard_s.append(time.monotonic())
    # Three times in the time that systemd waits; the first comes at once.
    assert heard_s[-1] - heard_s[0] >= 0.55
    assert sorted(np.diff(heard_s))[1] < 0.35
    watchdog.stopping()
    assert systemd.hear() == ["STOPPING=1", "STATUS=stopping"]


def test_without_watchdogsec_only_the_state_is_told(systemd: Systemd) -> None:
    for environ in (systemd.environ(), systemd.environ(WATCHDOG_USEC="600000", WATCHDOG_PID="1")):
        make(environ).tend()
        assert systemd.hear() == ["STATUS=broker away; 0 done"]


def test_what_we_start_cannot_speak_for_us(systemd: Systemd) -> None:
    environ = systemd.environ(WATCHDOG_USEC="1000000", WATCHDOG_PID=str(os.getpid()), HOME="/")
    assert Notifier(environ).watchdog_s == 1.0
    assert environ == {"HOME": "/"}


def test_without_systemd_nothing_happens() -> None:
    watchdog = make({})
    watchdog.ready()
    watchdog.tend()
    watchdog.stopping()


def test_a_systemd_that_is_gone_stops_nothing(systemd: Systemd, caplog: pytest.LogCaptureFixture) -> None:
    watchdog = make(systemd.environ())
    systemd.close()
    watchdog.ready()
    assert "systemd cannot be told READY=1" in caplog.text


def test_it_is_not_well_while_what_waits_is_not_done(systemd: Systemd, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("runtime.watchdog.STUCK_S", 0.2)
    done = 5
    watchdog = make(systemd.environ(WATCHDOG_USEC="60000"), waiting=lambda: 3, done=lambda: done)

    def told() -> list[str]:
        while systemd.waits():
            watchdog.tend()
        return systemd.hear()

    assert told()[-1] == "WATCHDOG=1"
    end_s = time.monotonic() + 5
    while (last := told())[-1] == "WATCHDOG=1":
        assert time.monotonic() < end_s
    assert last[0].startswith("STATUS=3 frames wait, and none was done for 0 s; broker away")
    assert len(last) == 1
    done = 6
    assert told()[-1] == "WATCHDOG=1"


class HangingCapture(Capture):
    """A capture that says of itself that it hangs; that it can is for its own tests."""

    hangs = True


def test_it_is_not_well_while_a_capture_hangs(systemd: Systemd, tmp_path: Path) -> None:
    config = CameraConfig(kind="replay", source=str(tmp_path))
    captures = [kind("porch", config, Counters(), threading.Event()) for kind in (Capture, HangingCapture)]
    make(systemd.environ(WATCHDOG_USEC="1000000"), captures=captures[:1]).tend()
    assert systemd.hear() == ["STATUS=porch starting; broker away; 0 done", "WATCHDOG=1"]
    make(systemd.environ(WATCHDOG_USEC="1000000"), captures=captures).tend()
    assert systemd.hear() == [
        "STATUS=the capture of camera porch hangs; porch starting; porch starting; broker away; 0 done"
    ]


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 1)), min_size=1, max_size=50))
def test_stuck_is_the_time_since_the_last_progress(steps: list[tuple[int, int]]) -> None:
    drain, done, since = Drain(), 0, 0
    for second, (waiting, more) in enumerate(steps):
        done += more
        if more or not waiting or not second:
            since = second
        assert drain.stuck_s(waiting, done, float(second)) == second - since


def test_systemd_hears_a_real_device(systemd: Systemd, tiny_bundle: Path, tmp_path: Path, free_port: Any) -> None:
    """The program itself, as the unit starts it: ready once its model has run, well while frames are answered."""
    config = tmp_path / "device.toml"
    config.write_text(
        f'bundle = "{tiny_bundle}"\n[broker]\nhost = "127.0.0.1"\nport = {free_port()}\n'
        '[camera.porch]\nkind = "pipe"\nsource = "cat /dev/urandom"\nwidth = 64\nheight = 48\nmax_fps = 20\n'
    )
    process = subprocess.Popen(
        [sys.executable, "-m", "runtime.cli", "device", "--config", str(config)],
        env={**os.environ, **systemd.environ(WATCHDOG_USEC="900000")},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        systemd._socket.settimeout(60)
        assert systemd.hear() == ["READY=1"]
        for _ in range(30):
            status, *rest = systemd.hear()
            assert rest == ["WATCHDOG=1"]
            if "porch online" in status and int(status.split()[-2]) > 5:
                break
        else:
            pytest.fail(status)
        process.terminate()
        while (said := systemd.hear())[0] != "STOPPING=1":
            assert said[1:] == ["WATCHDOG=1"]
        assert process.wait(20) == 0
    finally:
        process.kill()
        process.wait()
