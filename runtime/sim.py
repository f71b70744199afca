"""Device, edge and cloud as processes of this machine, with a broker between them: the whole system on a laptop."""

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

import click
import msgspec
import numpy as np

from runtime import manifest, packet
from runtime.camera_replay import ReplayCamera
from runtime.codec import JpegCodec
from runtime.config import BrokerConfig, CameraConfig
from runtime.counters import Counters
from runtime.datatypes import Dropped, Result
from runtime.errors import ConfigError, KinflowError, LinkError
from runtime.link import Handler, open_link
from runtime.live import LiveTable
from runtime.manifest import Bundle
from runtime.preprocess import prepare
from runtime.summary import Summary, summarize, text
from runtime.topics import Subtree, publish_bytes

START_S = 30.0
STOP_S = 10.0
TIERS = ("device", "edge", "cloud")
JPEG_QUALITIES = (75, 90)
CAMERA = "cam0"

Line = Result | Dropped


class Simulation:
    """The processes of one run, started from `start` on, ended when the context ends."""

    def __init__(
        self,
        bundle: Bundle,
        camera: CameraConfig,
        *,
        tiers: Sequence[str] = TIERS,
        broker: tuple[str, int] | None = None,
        codec: str = "raw",
        early_exits: bool = True,
        budget_ms: int = 2000,
        max_in_flight: int = 4,
    ) -> None:
        if tuple(tiers) not in {TIERS[:1], TIERS[:2], TIERS}:
            raise ConfigError(f"--tiers {','.join(tiers)}: choose device, device,edge or device,edge,cloud")
        self._bundle = bundle
        self._camera = camera
        self.tiers = tuple(tiers)
        self._broker = broker
        self._settings = {"early_exits": early_exits}
        self._device_settings = {"codec": codec, "budget_ms": budget_ms, "max_in_flight": max_in_flight}
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
            self._start_nodes(stack)
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
        config = self._write("device", {"last_segment": last, **settings}, {f"camera.{CAMERA}": _table(self._camera)})
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
            config = self._write(tier, settings, {"uplink": {}} if tier != self.tiers[-1] else {})
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
        lines += [f"{key} = {json.dumps(value)}" for key, value in table.items()]
    return "\n".join(lines) + "\n"


def _start_broker(stack: contextlib.ExitStack) -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    broker = subprocess.Popen([sys.executable, "-m", "runtime.broker", str(port)], stdin=subprocess.PIPE)
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
    process = subprocess.Popen([sys.executable, "-m", "runtime.cli", loud, *arguments], stdout=subprocess.PIPE)
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


def jpeg_bytes(bundle: Bundle, camera: CameraConfig, frames: set[int]) -> dict[str, float]:
    """What the same frames cost as JPEGs at the model's size, with the same packet header, topic and framing.

    Args:
        bundle: says what size the model sees.
        camera: the replay that the frames came from.
        frames: the indices of the frames that count.

    Returns:
        JPEG quality → mean bytes of one frame.
    """
    sizes: dict[int, list[int]] = {quality: [] for quality in JPEG_QUALITIES}
    codecs = {quality: JpegCodec(bundle.manifest.cuts[0], quality) for quality in JPEG_QUALITIES}
    topic = Subtree("home", "d", "device").request(bundle.key8, 0)
    once = msgspec.structs.replace(camera, realtime=False, loop=False, max_fps=None)
    for frame in ReplayCamera(CAMERA, once).frames():
        if frame.index in frames:
            pixels = prepare(frame.pixels, bundle.manifest.preprocess)
            for quality, codec in codecs.items():
                sizes[quality].append(publish_bytes(topic, packet.HEADER.size + len(codec.encode(pixels))))
    return {str(quality): float(np.mean(found)) for quality, found in sizes.items() if found}


def run(simulation: Simulation, bundle: Bundle, camera: CameraConfig, show: Callable[[Line], None]) -> Summary:
    """Run a simulation to its end, show each line, and sum up."""
    lines: list[Line] = []
    with simulation:
        for line in simulation.lines():
            lines.append(line)
            show(line)
    prefix = f'frames_dropped_total{{camera="{CAMERA}",reason="'
    device = simulation.counters.get("device", {})
    # What the device dropped after taking it is among the lines already.
    slots = {reason: device.get(f'{prefix}{reason}"}}', 0) for reason in ("stale", "stopping")}
    uplink = simulation.counters.get("edge", {}).get("offload_bytes_total", 0) if len(simulation.tiers) > 2 else None
    return summarize(
        lines,
        tiers=simulation.tiers,
        stale={reason: count for reason, count in slots.items() if count},
        uplink_bytes=uplink,
        jpeg_bytes=jpeg_bytes(bundle, camera, {line.frame for line in lines}),
    )


def present(simulation: Simulation, bundle: Bundle, camera: CameraConfig, *, as_json: bool) -> Summary:
    """Run a simulation for a person, as a live table on a terminal and as lines elsewhere, or for a program."""
    if not logging.getLogger().isEnabledFor(logging.DEBUG):
        logging.getLogger("runtime").setLevel(logging.WARNING)
    if as_json:
        summary = run(simulation, bundle, camera, lambda line: click.echo(msgspec.json.encode(line)))
        click.echo(msgspec.json.encode({"summary": summary}))
        return summary
    if sys.stdout.isatty():
        with LiveTable(simulation.tiers) as show:
            summary = run(simulation, bundle, camera, show)
    else:
        summary = run(simulation, bundle, camera, lambda line: click.echo(plain(line)))
    click.echo("\n" + text(summary))
    return summary


def plain(line: Line) -> str:
    """A line of a run for a person."""
    if isinstance(line, Dropped):
        return f"{line.frame:>6}  {'-':<7}{line.dropped:<34}"
    words = f"{line.label:.30}"
    flag = "" if line.degraded is None else f"  degraded: {line.degraded}"
    return (
        f"{line.frame:>6}  {line.tier:<7}exit {line.exit}  {words:<31}{line.confidence:>5.2f}"
        f"{line.bytes_up:>9,} B{line.age_ms:>9.1f} ms{flag}"
    )


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--source", required=True, help="A video file or a folder of images.")
@click.option("--broker", metavar="HOST:PORT", help="A broker that runs already; default: an embedded one.")
@click.option(
    "--tiers", default=",".join(TIERS), show_default=True, help="Fewer tiers; the last one takes all that is left."
)
@click.option(
    "--codec", default="raw", show_default=True, help="raw, or jpeg or jpeg:QUALITY to send the frame itself."
)
@click.option("--no-exits", is_flag=True, help="No early answers: every frame goes through the whole chain.")
@click.option(
    "--fast", is_flag=True, help="Every frame, as fast as it goes; default: the clip's pace, latest frame wins."
)
@click.option("--first-frame", default=0, show_default=True, help="Where in the source to start.")
@click.option("--frames", type=click.IntRange(min=1), help="Stop after so many frames.")
@click.option("--loop", is_flag=True, help="Start again at the end of the source.")
@click.option("--budget-ms", default=2000, show_default=True, help="A frame is answered within this.")
@click.option("--max-in-flight", default=4, show_default=True, help="Frames that may wait for an answer from above.")
@click.option("--json", "as_json", is_flag=True, help="One JSON line per frame, then one with the summary.")
def sim_command(
    bundle: Path,
    source: str,
    broker: str | None,
    tiers: str,
    codec: str,
    no_exits: bool,
    fast: bool,
    first_frame: int,
    frames: int | None,
    loop: bool,
    budget_ms: int,
    max_in_flight: int,
    as_json: bool,
) -> None:
    """Run BUNDLE on device, edge and cloud, three processes of this machine, with frames from a clip."""
    loaded = manifest.load(bundle)
    camera = CameraConfig(
        kind="replay", source=source, realtime=not fast, first_frame=first_frame, frames=frames, loop=loop
    )
    simulation = Simulation(
        loaded,
        camera,
        tiers=tiers.split(","),
        broker=None if broker is None else _address(broker),
        codec=codec,
        early_exits=not no_exits,
        budget_ms=budget_ms,
        max_in_flight=max_in_flight,
    )
    present(simulation, loaded, camera, as_json=as_json)


def _address(text: str) -> tuple[str, int]:
    host, _, port = text.rpartition(":")
    if not host or not port.isdigit():
        raise ConfigError(f"--broker {text!r}: write it as HOST:PORT, such as 127.0.0.1:1883")
    return host, int(port)
