"""Device, edge and cloud as processes of this machine, with a broker between them."""

from __future__ import annotations

import contextlib
import json
import logging
import secrets
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from runtime.camera_replay import ReplayCamera
from runtime.codec import find_rate
from runtime.config import BrokerConfig, CameraConfig, UiConfig
from runtime.counters import Counters
from runtime.datatypes import Dropped, Result
from runtime.errors import ConfigError, KinflowError, LinkError
from runtime.link import Handler, open_link
from runtime.manifest import Bundle
from runtime.topics import Subtree
from runtime.ui import Page, free_port
from runtime.variant import with_variant

START_S = 30.0
STOP_S = 10.0
KNOCK_S = 3.0
TIERS = ("device", "edge", "cloud")
CAMERA = "cam0"
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

    `on_page` asks for the page of `kinflow ui`: it is called with its address when it is there, before the first frame.
    """

    def __init__(
        self,
        bundle: Bundle,
        camera: CameraConfig,
        *,
        tiers: Sequence[str] = TIERS,
        broker: tuple[str, int] | None = None,
        codec: str = "auto",
        variant: int = 0,
        early_exits: bool = True,
        budget_ms: int = 2000,
        max_in_flight: int = 4,
        cameras: int = 1,
        preview: bool = False,
        on_page: Callable[[str], None] | None = None,
    ) -> None:
        if tuple(tiers) not in {TIERS[:1], TIERS[:2], TIERS}:
            raise ConfigError(f"--tiers {','.join(tiers)}: choose device, device,edge or device,edge,cloud")
        if len(tiers) > 1:  # told here, before anything is started
            find_rate(bundle, 0 if codec.startswith("jpeg") else bundle.manifest.tiers[0].last_segment + 1, codec)
        with_variant(bundle, variant)
        self._bundle = bundle
        self._cameras = spread(camera, cameras)
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
            "max_in_flight": max_in_flight,
        }
        self._site = f"sim-{secrets.token_hex(4)}"
        self._stack = contextlib.ExitStack()
        self._nodes: dict[str, subprocess.Popen[bytes]] = {}
        self.counters: dict[str, dict[str, int]] = {}  # tier → its counters at the end

    def __enter__(self) -> Simulation:
        with contextlib.ExitStack() as stack:
            self._folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="kinflow-sim-")))
            if self._broker is None:
                self._broker_config = BrokerConfig(host="127.0.0.1", port=_start_broker(stack), version="3.1.1")
            else:
                self._broker_config = BrokerConfig(host=self._broker[0], port=self._broker[1])
                _knock(*self._broker)
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
        self._stack.close()

    def lines(self) -> Iterator[Line]:
        """Run the device to the end of its source, and yield what becomes of each frame, as it happens.

        Raises:
            KinflowError: the device ended with an error, which it has printed.
        """
        settings = dict(self._settings, **self._device_settings)
        last = self._last_segments()["device"]
        tables = {f"camera.{name}": _table(camera) for name, camera in self._cameras.items()}
        config = self._write("device", {"last_segment": last, **settings}, {**tables, **self._preview})
        with _process(["device", "--config", str(config), "--json"]) as device:
            assert device.stdout is not None
            for line in device.stdout:
                tree = msgspec.json.decode(line)
                if tree.get("event") == "stopped":
                    self.counters["device"] = tree["counters"]
                else:
                    kind: type[Line] = Dropped if "dropped" in tree else Result
                    yield msgspec.convert(tree, kind)
            if device.wait() != 0:
                raise _ended("device", device.returncode)
        for tier, node in self._nodes.items():
            node.terminate()
            output, _ = node.communicate(timeout=STOP_S)
            self.counters[tier] = msgspec.json.decode(output)["counters"] if output else {}

    def _last_segments(self) -> dict[str, int]:
        """The tiers' shares: those of the bundle, and the last tier takes what is left."""
        specs = self._bundle.manifest.tiers
        lasts = {tier: specs[min(index, len(specs) - 1)].last_segment for index, tier in enumerate(self.tiers)}
        return {**lasts, self.tiers[-1]: len(self._bundle.manifest.segments) - 1}

    def _start_nodes(self, stack: contextlib.ExitStack) -> None:
        online = {tier: threading.Event() for tier in self.tiers[1:]}
        watcher = open_link(self._broker_config, client_id=f"{self._site}-watch", counters=Counters())
        for tier, event in online.items():
            watcher.subscribe(Subtree(self._site, "n", tier).availability, _sets(event))
        watcher.start()
        stack.callback(watcher.close)
        for index, tier in enumerate(self.tiers[1:], 1):
            settings = {
                "tier": tier,
                "serves": "devices" if index == 1 else "nodes",
                "last_segment": self._last_segments()[tier],
                **self._settings,
            }
            # Pictures are for devices only: behind the first segments there is none.
            codec = str(self._device_settings["codec"])
            uplink = {"uplink": {} if codec.startswith("jpeg") else {"codec": codec}}
            config = self._write(tier, settings, uplink if tier != self.tiers[-1] else {})
            self._nodes[tier] = stack.enter_context(_process(["node", "--config", str(config), "--json"]))
        end = time.monotonic() + START_S
        for tier, event in online.items():
            while not event.wait(0.05):
                if self._nodes[tier].poll() is not None:
                    raise _ended(tier, self._nodes[tier].returncode)
                if time.monotonic() > end:
                    host, port = self._broker_config.host, self._broker_config.port
                    raise LinkError(f"the {tier} node did not reach the broker at {host}:{port}; is it running?")

    def _write(self, tier: str, settings: Mapping[str, Any], tables: Mapping[str, Mapping[str, Any]]) -> Path:
        path = self._folder / f"{tier}.toml"
        top = {"bundle": str(self._bundle.path.resolve()), "site": self._site, "id": tier, **settings}
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


def _start_broker(stack: contextlib.ExitStack) -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    command = [sys.executable, "-m", "runtime.broker", str(port)]
    broker = subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)
    stack.callback(_end, broker)
    end = time.monotonic() + START_S
    while time.monotonic() < end and broker.poll() is None:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
            return port
        time.sleep(0.05)
    raise LinkError("the embedded broker did not start; install Mosquitto and name it with --broker HOST:PORT")


@contextlib.contextmanager
def _process(arguments: Sequence[str]) -> Iterator[subprocess.Popen[bytes]]:
    # That three processes connect as they should is no news; with --verbose they tell everything.
    loud = "--verbose" if logging.getLogger().isEnabledFor(logging.DEBUG) else "--quiet"
    # In a session of its own, so that Ctrl-C reaches this process alone, which ends the others in order.
    process = subprocess.Popen(
        [sys.executable, "-m", "runtime.cli", loud, *arguments, "--with-parent"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        _end(process)


def _end(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            pipe.close()


def _ended(tier: str, code: int) -> KinflowError:
    error = KinflowError(f"the {tier} ended with exit code {code}; its own message is above")
    error.exit_code = code if code > 0 else KinflowError.exit_code
    return error
