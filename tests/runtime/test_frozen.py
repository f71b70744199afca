"""A camera that shows one picture for ever, through a whole device."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

from runtime.config import BrokerConfig, CameraConfig, DeviceConfig, NodeConfig
from runtime.counters import Counters
from runtime.datatypes import Dropped, Result
from runtime.device import Device
from runtime.link import open_link
from runtime.node import Node
from tests.patience import until


def test_answers_about_a_frozen_picture_say_so_and_cost_no_link(
    shared_bundle: Path,
    tmp_path: Path,
    memory_broker: BrokerConfig,
    serving: Callable[[Device | Node], AbstractContextManager[None]],
) -> None:
    """The program shows its moving pictures once: when it is opened again it is stuck from the start."""
    program = tmp_path / "camera.py"
    program.write_text(
        "import os, sys, time\n"
        "def show(grey):\n"
        "    sys.stdout.buffer.write(bytes([grey]) * (64 * 48 * 3)); sys.stdout.flush(); time.sleep(0.02)\n"
        f"if not os.path.exists({str(tmp_path / 'shown')!r}):\n"
        f"    open({str(tmp_path / 'shown')!r}, 'w').close()\n"
        "    for grey in range(40): show(grey)\n"
        "while True: show(40)\n"
    )
    source = f"{sys.executable} {program}"
    camera = CameraConfig(kind="pipe", source=source, width=64, height=48, format="rgb", frozen_after_s=0.5)
    config = DeviceConfig(
        bundle=str(shared_bundle), broker=memory_broker, id="cam", early_exits=False, camera={"front": camera}
    )
    lines: list[Result | Dropped] = []
    statuses: list[bytes] = []
    listener = open_link(memory_broker, client_id="listener", counters=Counters())
    listener.subscribe("kinflow/v1/home/d/cam/cam/front/status", lambda _, payload: statuses.append(payload))
    listener.start()
    stop = threading.Event()

    def heard(line: Result | Dropped) -> None:
        lines.append(line)
        if sum(isinstance(said, Result) and said.degraded == "frozen" for said in lines) == 5:
            stop.set()

    node = Node(NodeConfig(bundle=str(shared_bundle), broker=memory_broker, id="box", early_exits=False))
    device = Device(config, heard)
    with serving(node):
        timer = threading.Timer(30, stop.set)
        timer.start()
        device.run(stop)
        timer.cancel()
    until(lambda: b"frozen" in statuses)
    listener.close()
    results = [line for line in lines if isinstance(line, Result)]
    frozen = [result for result in results if result.degraded == "frozen"]
    fresh = [result for result in results if result.degraded is None]
    assert len(frozen) >= 5
    assert all((line.tier, line.bytes_up, line.agreement) == ("device", 0, None) for line in frozen)
    assert {line.tier for line in fresh} == {"cloud"}
    assert frozen[0].frame > 40
    counts = device.counters.snapshot()
    assert counts['results_degraded_total{camera="front",reason="frozen"}'] == len(frozen)
    assert [status for status in statuses if status in (b"online", b"frozen")][:2] == [b"online", b"frozen"]
    done = device.counters.total("results_total") + device.counters.total("frames_dropped_total")
    assert device.counters.total("frames_captured_total") == done
