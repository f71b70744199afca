"""Device, edge and cloud as processes of this machine, with a broker between them."""

from __future__ import annotations

import contextlib
import json
import math
import secrets
import socket
import subprocess
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from runtime.camera_replay import ReplayCamera
from runtime.codec import find_rate
from runtime.config import BrokerConfig, CameraConfig, UiConfig
from runtime.counters import Counters
from runtime.datatypes import Dropped, Result
from runtime.errors import ConfigError, LinkError
from runtime.link import Handler, open_link
from runtime.manifest import Bundle
from runtime.objective import Objective
from runtime.processes import START_S, STOP_S, OwnBroker, end, ended, kill, start_tier, tier
from runtime.scenario import Scenario
from runtime.shaper import Shaper
from runtime.strikes import Step, Strikes
from runtime.summary import Move
from runtime.topics import Subtree
from runtime.ui import Page, free_port
from runtime.variant import with_variant

KNOCK_S = 3.0
TIERS = ("device", "edge", "cloud")
CAMERA = "cam0"
CUT_S = 2.0  # for so long a cut waits for a packet to cut
WATCHED_STATS_S = 2.0  # whoever looks at the page wants counters sooner

Line = Result | Dropped


def spread(camera: CameraConfig, count: int) -> dict[str, CameraConfig]:
    """So many cameras, cam0, cam1, …, of one source, each beginning at another place of it.

    Raises:
        CameraError: the source is missing, empty or damaged.
    """
    rest = max(0, ReplayCamera(CAMERA, camera).length() - camera.first_frame) if count > 1 else 0
    starts = [camera.first_frame + rest * index // count for index in range(count)]
    return {f"cam{index}": msgspec.structs.replace(camera, first_frame=start) for index, start in enumerate(starts)}


class Simulation:
    """The processes of one run, started from `start` on, ended when the context ends.

    `broker` is the address of one that runs, or the path of a Mosquitto to start; else the embedded one is started.
    With a `scenario`, the device reaches it through a shaped link; the nodes do not. The scenario's clock starts with
    the first frame, and its end ends the run. Of a node that was killed, only the last life's counters are known.
    `on_page` asks for the page of `kinflow ui`: it is called with its address when it is there, before the first frame.
    `device` has more settings of the device, as its configuration has them; `uplink_codec` is the edge node's.
    With an `objective` the device plans; set before `lines`, `on_move` is called with every plan as it is taken.
    """

    def __init__(
        self,
        bundle: Bundle,
        camera: CameraConfig,
        *,
        tiers: Sequence[str] = TIERS,
        broker: tuple[str, int] | Path | None = None,
        scenario: Scenario | None = None,
        codec: str = "auto",
        uplink_codec: str | None = None,
        variant: int = 0,
        early_exits: bool = True,
        budget_ms: int = 2000,
        max_in_flight: int | None = None,
        cameras: int = 1,
        preview: bool = False,
        on_page: Callable[[str], None] | None = None,
        device: Mapping[str, str | bool | float] | None = None,
        objective: Objective | None = None,
    ) -> None:
        if tuple(tiers) not in {TIERS[:1], TIERS[:2], TIERS}:
            raise ConfigError(f"--tiers {','.join(tiers)}: choose device, device,edge or device,edge,cloud")
        if len(tiers) > 1:  # told here, before anything is started
            find_rate(bundle, 0 if codec.startswith("jpeg") else bundle.manifest.tiers[0].last_segment + 1, codec)
        with_variant(bundle, variant)
        for what in {each.what for each in scenario.kills} if scenario is not None else ():
            if what in TIERS and what not in tiers:
                raise ConfigError(f"the scenario kills the {what} node, which does not run; add it to --tiers")
            if what == "broker" and isinstance(broker, tuple):
                raise ConfigError("the scenario kills the broker: leave out --broker, or give a Mosquitto by its path")
        if scenario is not None:
            if not camera.realtime:
                raise ConfigError("a scenario is told in seconds of the clip's own pace; leave out --fast")
            loops = camera.loop or (math.isfinite(scenario.duration_s) and camera.frames is None)
            camera = msgspec.structs.replace(camera, loop=loops, stalls=scenario.stalls)
        self._bundle = bundle
        self._cameras = spread(camera, cameras)
        self.budget_ms = budget_ms
        self.scenario = scenario
        self.link_bytes: list[tuple[int, int]] = []  # of each phase, up and down; known at the end
        self.start_s: float | None = None  # time.monotonic() when the first frame was grabbed
        self.end_s = 0.0  # of the clock that starts there: when the last line came
        self.moves: list[Move] = []  # plans, in the order of time
        self.struck: Counter[str] = Counter()  # what was killed so far, how often; `mid-packet`: in the midst of one
        self.on_move: Callable[[Move], None] | None = None
        self._objective = {} if objective is None else {"objective": _table(objective)}
        self._shaper: Shaper | None = None
        self._own: OwnBroker | None = None
        self._preview = {"preview": {"enabled": True}} if preview else {}
        self._on_page = on_page
        self._page: Page | None = None
        self.tiers = tuple(tiers)
        self._broker = broker
        self._settings: dict[str, Any] = {"early_exits": early_exits}
        self._settings |= {} if on_page is None else {"stats_interval_s": WATCHED_STATS_S}
        self._device_settings = {
            "codec": codec,
            "variant": variant,
            "budget_ms": budget_ms,
            **({} if max_in_flight is None else {"max_in_flight": max_in_flight}),
            **(device or {}),
        }
        self._uplink_codec = uplink_codec
        self._site = f"sim-{secrets.token_hex(4)}"
        self._stack = contextlib.ExitStack()
        self._nodes: dict[str, subprocess.Popen[bytes]] = {}
        self.counters: dict[str, dict[str, int]] = {}  # tier → its counters at the end

    @property
    def broker(self) -> BrokerConfig:
        """Where the nodes and whoever watches reach the broker, past the shaped link. Known when it has started."""
        return self._broker_config

    @property
    def device(self) -> Subtree:
        """The topics of the device."""
        return Subtree(self._site, "d", "device")

    def __enter__(self) -> Simulation:
        with contextlib.ExitStack() as stack:
            self._folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="kinflow-sim-")))
            if isinstance(self._broker, tuple):
                self._broker_config = BrokerConfig(host=self._broker[0], port=self._broker[1])
                _knock(*self._broker)
            else:
                self._own = stack.enter_context(OwnBroker(self._broker, self._folder))
                version = self._own.version
                self._broker_config = BrokerConfig(host="127.0.0.1", port=self._own.port, version=version)
            self._device_broker = self._broker_config
            if self.scenario is not None:
                target = (self._broker_config.host, self._broker_config.port)
                self._shaper = stack.enter_context(Shaper(target, self.scenario))
                host, port = self._shaper.address
                self._device_broker = msgspec.structs.replace(self._broker_config, host=host, port=port)
            if self._on_page is not None:
                where = UiConfig()
                config = self._write("page", {}, {})
                self._page = stack.enter_context(Page(config, where.host, free_port(where.host, where.port)))
            self._start_nodes(stack)
            if self._page is not None and self._on_page is not None:
                self._page.wait()
                self._on_page(self._page.address)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *failure: object) -> None:
        if self._shaper is not None:
            self.link_bytes = self._shaper.bytes_passed()
        self._stack.close()

    def lines(self) -> Iterator[Line]:
        """Run the device to the end of its source, and yield what becomes of each frame, as it happens.

        Raises:
            KinflowError: the device ended with an error, which it has printed.
        """
        settings = dict(self._settings, **self._device_settings)
        last = self._last_segments()["device"]
        tables = {f"camera.{name}": _table(camera) for name, camera in self._cameras.items()}
        broker = {"broker": _table(self._device_broker)}
        config = self._write(
            "device", {"last_segment": last, **settings}, {**broker, **self._objective, **tables, **self._preview}
        )
        with tier(["device", "--config", str(config), "--json"]) as device, self._strikes(device) as strikes:
            assert device.stdout is not None
            for line in device.stdout:
                now_s = time.monotonic()
                tree = msgspec.json.decode(line)
                if tree.get("event") == "plan":
                    self._moved(tree, now_s)
                    continue
                if self.start_s is None:
                    self.start_s = now_s - tree.get("age_ms", 0.0) / 1000
                    strikes.begin(self.start_s)
                    if self._shaper is not None:
                        self._shaper.begin(self.start_s)
                self.end_s = now_s - self.start_s
                if tree.get("event") == "stopped":
                    self.counters["device"] = tree["counters"]
                else:
                    kind: type[Line] = Dropped if "dropped" in tree else Result
                    yield msgspec.convert(tree, kind)
            if device.wait() != 0:
                raise ended("device", device.returncode)
        for name, node in self._nodes.items():
            if node.poll() is None:  # a scenario may have killed it
                node.terminate()
                output, _ = node.communicate(timeout=STOP_S)
                self.counters[name] = msgspec.json.decode(output)["counters"] if output else {}

    def _moved(self, told: Mapping[str, Any], now_s: float) -> None:
        at_s = 0.0 if self.start_s is None else round(now_s - self.start_s, 3)
        words = {name: told[name] for name in ("plan", "why", "reason", "rung")}
        self.moves.append(Move(at_s=at_s, **words))
        if self.on_move is not None:
            self.on_move(self.moves[-1])

    def _strikes(self, device: subprocess.Popen[bytes]) -> Strikes:
        scenario = self.scenario
        kills, duration_s = ((), math.inf) if scenario is None else (scenario.kills, scenario.duration_s)
        return Strikes(kills, duration_s, self._strike, device.terminate)

    def _strike(self, step: Step) -> None:
        """Let something go down or come back, on the thread of the strikes."""
        what = step.kill.what
        assert self._shaper is not None
        if not step.comes_back:
            self.struck[what] += 1
        if what in self._nodes:
            if step.comes_back:
                self._nodes[what] = start_tier(["node", "--config", str(self._folder / f"{what}.toml"), "--json"])
            else:
                kill(self._nodes[what])
            return
        if not step.comes_back and step.kill.mid_packet:
            cut = threading.Event()
            self._shaper.cut(cut.set)
            if cut.wait(CUT_S):
                self.struck["mid-packet"] += 1
            else:
                self._shaper.cut(None)
        if what == "broker" and self._own is not None:
            if step.comes_back:
                self._own.start()
            else:
                self._own.kill()
        elif not step.comes_back:
            self._shaper.reset()
        self._shaper.refuse(not step.comes_back)

    def _last_segments(self) -> dict[str, int]:
        """The tiers' shares: those of the bundle, and the last tier takes what is left."""
        specs = self._bundle.manifest.tiers
        lasts = {tier: specs[min(index, len(specs) - 1)].last_segment for index, tier in enumerate(self.tiers)}
        return {**lasts, self.tiers[-1]: len(self._bundle.manifest.segments) - 1}

    def _start_nodes(self, stack: contextlib.ExitStack) -> None:
        online = {name: threading.Event() for name in self.tiers[1:]}
        stack.callback(self._end_nodes)
        watcher = open_link(self._broker_config, client_id=f"{self._site}-watch", counters=Counters())
        for name, event in online.items():
            watcher.subscribe(Subtree(self._site, "n", name).availability, _sets(event))
        watcher.start()
        stack.callback(watcher.close)
        for index, name in enumerate(self.tiers[1:], 1):
            settings = {
                "tier": name,
                "serves": "devices" if index == 1 else "nodes",
                "last_segment": self._last_segments()[name],
                **self._settings,
            }
            # Pictures are for devices only: behind the first segments there is none.
            codec = self._uplink_codec or str(self._device_settings["codec"])
            uplink = {"uplink": {} if codec.startswith("jpeg") else {"codec": codec}}
            config = self._write(name, settings, uplink if name != self.tiers[-1] else {})
            self._nodes[name] = start_tier(["node", "--config", str(config), "--json"])
        end_s = time.monotonic() + START_S
        for name, event in online.items():
            while not event.wait(0.05):
                if self._nodes[name].poll() is not None:
                    raise ended(name, self._nodes[name].returncode)
                if time.monotonic() > end_s:
                    host, port = self._broker_config.host, self._broker_config.port
                    raise LinkError(f"the {name} node did not reach the broker at {host}:{port}; is it running?")

    def _end_nodes(self) -> None:
        for node in self._nodes.values():
            end(node)

    def _write(self, name: str, settings: Mapping[str, Any], tables: Mapping[str, Mapping[str, Any]]) -> Path:
        path = self._folder / f"{name}.toml"
        top = {"bundle": str(self._bundle.path.resolve()), "site": self._site, "id": name, **settings}
        path.write_text(_toml({"": top, "broker": _table(self._broker_config), **tables}), "utf-8")
        return path


def _knock(host: str, port: int) -> None:
    try:
        socket.create_connection((host, port), KNOCK_S).close()
    except OSError as error:
        raise LinkError(f"no broker answers at {host}:{port} ({error.strerror or error}); is it running?") from error


def _sets(online: threading.Event) -> Handler:
    def heard(topic: str, payload: bytes) -> None:
        if payload == b"online":
            online.set()

    return heard


def _table(struct: msgspec.Struct) -> dict[str, Any]:
    """The fields that a config has to name: those that are set."""
    return {name: value for name, value in msgspec.structs.asdict(struct).items() if value is not None}


def _toml(tables: Mapping[str, Mapping[str, Any]]) -> str:
    """Write tables of plain values as TOML, whose strings, numbers and booleans are those of JSON."""
    lines = []
    for name, table in tables.items():
        lines += [f"[{name}]"] if name else []
        lines += [f"{key} = {json.dumps(value, ensure_ascii=False)}" for key, value in table.items()]
    return "\n".join(lines) + "\n"
