"""A device that plans, with real nodes: over a link that becomes narrow and wide again, and with nobody above."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import msgspec
import pytest

from runtime import manifest
from runtime.config import BrokerConfig, CameraConfig, DeviceConfig, NodeConfig
from runtime.counters import Counters
from runtime.course import Course
from runtime.datatypes import Dropped, Result
from runtime.device import Device
from runtime.errors import ConfigError
from runtime.link import open_link
from runtime.metered import MeteredLink
from runtime.node import Node
from runtime.objective import Objective
from runtime.scenario import Scenario, parse
from runtime.shaper import Shaper
from runtime.steering import Steering
from runtime.topics import Subtree
from tests.patience import until

Serving = Callable[[Device | Node], AbstractContextManager[None]]
SHARE = {50: 0.93, 75: 0.95, 90: 0.99}


def figures(path: Path) -> Path:
    """Give the tiny bundle's JPEG rates figures, so that there is something to choose from; raw keeps less."""
    told = manifest.load(path).manifest
    replace = msgspec.structs.replace
    jpeg = tuple(
        replace(rate, bytes_p50=600, bytes_p95=700, agreement=SHARE[round(rate.parameter)], n=100)
        for rate in told.cuts[0].codecs[1].rates
    )
    first = replace(told.cuts[0], codecs=(replace(told.cuts[0].codecs[1], rates=jpeg),))
    manifest.save(replace(told, cuts=(first, *told.cuts[1:]), proof={"whole_agreement": 0.9}), path)
    return path


class Watcher:
    """Hears the plans of a device."""

    def __init__(self, broker: BrokerConfig) -> None:
        self.plans: list[tuple[float, dict[str, Any]]] = []
        self._link = open_link(broker, client_id="watcher", counters=Counters())
        self._link.subscribe(Subtree("home", "d", "cam").plan, self._heard)
        self._link.start()

    def _heard(self, topic: str, data: bytes) -> None:
        self.plans.append((time.monotonic(), msgspec.json.decode(data)))

    def close(self) -> None:
        self._link.close()


def planning(bundle: Path, broker: BrokerConfig, photos: Path, objective: Objective, **settings: Any) -> DeviceConfig:
    camera = {"front": CameraConfig(kind="replay", source=str(photos), loop=True, max_fps=20)}
    return DeviceConfig(bundle=str(bundle), broker=broker, id="cam", camera=camera, objective=objective, **settings)


def test_a_narrow_link_steps_down_and_a_wide_one_back_up(
    tiny_bundle: Path, photos: Path, mosquitto: Any, serving: Serving
) -> None:
    bundle = figures(tiny_bundle)
    direct = BrokerConfig(host=mosquitto.host, port=mosquitto.port)
    scenario: Scenario = parse(
        'seed = 1\n[link]\nrate = "8mbit"\ndelay = "20ms"\n'
        '[[phase]]\nduration = "1000s"\n[[phase]]\nduration = "1000s"\nrate = "100kbit"\n[[phase]]\nduration = "60s"\n'
    )
    watcher = Watcher(direct)
    node = Node(NodeConfig(bundle=str(bundle), broker=direct, id="box"))
    lines: list[Result | Dropped] = []
    with Shaper((direct.host, direct.port), scenario) as shaper, serving(node):
        narrow = BrokerConfig(host=shaper.address[0], port=shaper.address[1])
        objective = Objective(latency_p95_ms=600, deepest_segment=1)
        device = Device(planning(bundle, narrow, photos, objective, early_exits=False), lines.append)

        def forty_more_lines() -> None:
            wanted = len(lines) + 40
            until(lambda: len(lines) >= wanted)

        with serving(device):
            until(lambda: watcher.plans and watcher.plans[-1][1]["codec"] == "jpeg")
            forty_more_lines()
            on_wide, before = watcher.plans[-1][1], len(watcher.plans)
            assert on_wide["codec"] == "jpeg"
            shaper.begin(time.monotonic() - 1001)
            until(lambda: watcher.plans[-1][1]["codec"] in ("raw", None), what="it did not step down")
            forty_more_lines()
            on_narrow = watcher.plans[-1][1]
            assert on_narrow["codec"] in ("raw", None)
            shaper.begin(time.monotonic() - 2001)
            until(lambda: watcher.plans[-1][1]["codec"] == "jpeg", what="it did not step back up")
    watcher.close()
    assert on_narrow["bytes_a_frame"] < on_wide["bytes_a_frame"]
    assert " instead of " in watcher.plans[before][1]["why"]
    assert device.counters.total("planner_moves_total") >= 2
    sent = {(line.cut, line.codec) for line in lines if isinstance(line, Result) and line.degraded is None}
    assert (0, "jpeg") in sent
    # Nobody takes an old answer for a fresh one: what came from above was within the budget.
    assert all(line.age_ms <= 2100 for line in lines if isinstance(line, Result))


def test_nobody_above_then_somebody(
    shared_bundle: Path, photos: Path, memory_broker: BrokerConfig, serving: Serving
) -> None:
    watcher = Watcher(memory_broker)
    lines: list[Result | Dropped] = []
    objective = Objective(latency_p95_ms=300, deepest_segment=0)
    config = planning(shared_bundle, memory_broker, photos, objective, early_exits=False, budget_ms=300)
    device = Device(config, lines.append)
    with serving(device):
        until(lambda: watcher.plans and watcher.plans[-1][1]["rung"] == "local variant only")
        until(lambda: len(lines) >= 30)
        assert watcher.plans[-1][1]["cut"] is None
        assert "has ever come back" in watcher.plans[-1][1]["why"]
        alone = len(lines)
        with serving(Node(NodeConfig(bundle=str(shared_bundle), broker=memory_broker, id="box"))):
            until(lambda: any(plan["cut"] == 1 for _, plan in watcher.plans))
            until(lambda: any(isinstance(line, Result) and line.tier == "cloud" for line in lines))
    watcher.close()
    results = [line for line in lines if isinstance(line, Result)]
    assert len(results) == len(lines)
    assert {line.degraded for line in results[alone - 10 : alone]} == {"plan"}
    assert any(line.tier == "cloud" and line.degraded is None for line in results[alone:])
    assert device.counters.total("planner_probes_total") >= 2
    # A copy that goes up to learn something answers nothing: every frame has one line.
    frames = [line.frame for line in lines]
    assert (
        len(frames)
        == len(set(frames))
        == sum(count for name, count in device.counters.snapshot().items() if name.startswith("results_total"))
    )


def test_no_early_exit_answers_a_copy_that_asks_whether_the_link_is_back(
    shared_bundle: Path, photos: Path, memory_broker: BrokerConfig
) -> None:
    """It would not go up."""
    bundle, counters = manifest.load(shared_bundle), Counters()
    link = MeteredLink(open_link(memory_broker, client_id="cam", counters=counters), counters)
    config = planning(shared_bundle, memory_broker, photos, Objective(latency_p95_ms=300, deepest_segment=0))
    steering = Steering(config, bundle, link, Subtree("home", "d", "cam"), counters)
    link.start()
    until(lambda: link.connected)
    assert len(steering.course("front").policy.thresholds) > 1
    for sent_ns in (1, 2):
        steering.missed(sent_ns)
    steering.tick()
    copies: list[Course] = []

    def asked() -> bool:
        copies.extend(aside for aside in [steering.aside()] if aside is not None)
        return bool(copies)

    until(asked)
    link.close()
    assert copies[0].copy
    assert set(copies[0].policy.thresholds) == {bundle.manifest.exits[-1].cut}


def test_without_an_objective_nothing_is_planned(
    shared_bundle: Path, photos: Path, memory_broker: BrokerConfig, serving: Serving
) -> None:
    watcher = Watcher(memory_broker)
    camera = {"front": CameraConfig(kind="replay", source=str(photos), realtime=False, frames=5)}
    config = DeviceConfig(bundle=str(shared_bundle), broker=memory_broker, id="cam", budget_ms=50, camera=camera)
    device = Device(config)
    device.run(threading.Event())
    watcher.close()
    assert watcher.plans == []
    assert not [name for name in device.counters.snapshot() if name.startswith("planner_")]


def test_a_segment_that_there_is_not_is_told(shared_bundle: Path, memory_broker: BrokerConfig) -> None:
    config = DeviceConfig(bundle=str(shared_bundle), broker=memory_broker, objective=Objective(deepest_segment=7))
    with pytest.raises(ConfigError, match=r"objective\.deepest_segment: the bundle has segments 0 to 2"):
        Device(config)
