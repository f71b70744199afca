"""The command `kinflow sim`: the whole system on a laptop, shown as it runs and summed up."""

from __future__ import annotations

import contextlib
import logging
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import click
import msgspec
import numpy as np

from runtime import manifest, packet
from runtime.camera_replay import ReplayCamera
from runtime.codec import JpegCodec
from runtime.config import CameraConfig, printable, sentence
from runtime.datatypes import Dropped, Result
from runtime.errors import ConfigError
from runtime.live import LiveTable
from runtime.manifest import Bundle
from runtime.objective import Objective, problem
from runtime.phases import tabulate
from runtime.preprocess import prepare
from runtime.scenario import Scenario, fixed
from runtime.scenario import load as load_scenario
from runtime.simulation import CAMERA, TIERS, Line, Simulation
from runtime.summary import Move, Summary, held, summarize, text
from runtime.topics import Subtree, publish_bytes

JPEG_QUALITIES = (75, 90)


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
    grabbed: list[tuple[float, Line]] = []  # seconds of the scenario
    # Ctrl-C ends a run as the end of its source does: what came so far is summed up.
    with simulation, contextlib.suppress(KeyboardInterrupt):
        for line in simulation.lines():
            age_s = line.age_ms / 1000 if isinstance(line, Result) else 0.0
            grabbed.append((time.monotonic() - age_s - (simulation.start_s or 0.0), line))
            lines.append(line)
            show(line)
    device = simulation.counters.get("device", {})
    # What the device dropped after taking it is among the lines already.
    slots = {
        reason: sum(
            count
            for name, count in device.items()
            if name.startswith("frames_dropped_total{") and name.endswith(f'reason="{reason}"}}')
        )
        for reason in ("stale", "stopping")
    }
    scenario = simulation.scenario
    phases = None if scenario is None else tabulate(grabbed, scenario, simulation.budget_ms, simulation.link_bytes)
    end_s = simulation.end_s if scenario is None else min(simulation.end_s, scenario.duration_s)
    plans = held(simulation.moves, end_s)
    uplink = simulation.counters.get("edge", {}).get("offload_bytes_total", 0) if len(simulation.tiers) > 2 else None
    return summarize(
        lines,
        tiers=simulation.tiers,
        stale={reason: count for reason, count in slots.items() if count},
        uplink_bytes=uplink,
        jpeg_bytes=jpeg_bytes(bundle, camera, {line.frame for line in lines}),
        phases=phases or (),
        plans=plans,
    )


def present(simulation: Simulation, bundle: Bundle, camera: CameraConfig, *, as_json: bool) -> Summary:
    """Run a simulation for a person, as a live table on a terminal and as lines elsewhere, or for a program."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    if not logging.getLogger().isEnabledFor(logging.DEBUG):
        logging.getLogger("runtime").setLevel(logging.WARNING)
    if as_json:
        simulation.on_move = lambda move: click.echo(
            msgspec.json.encode({"event": "plan", **msgspec.to_builtins(move)})
        )
        summary = run(simulation, bundle, camera, lambda line: click.echo(msgspec.json.encode(line)))
        click.echo(msgspec.json.encode({"summary": summary}))
        return summary
    if sys.stdout.isatty():
        table = LiveTable(simulation.tiers)
        simulation.on_move = table.moved
        with table as show:
            summary = run(simulation, bundle, camera, show)
    else:
        simulation.on_move = lambda move: click.echo(told(move))
        summary = run(simulation, bundle, camera, lambda line: click.echo(plain(line)))
    click.echo("\n" + text(summary))
    return summary


def tell_page(address: str) -> None:
    """Say where the page is."""
    click.echo(f"the page is at {address}", err=True)


def told(move: Move) -> str:
    """A plan for a person."""
    return f"{move.at_s:>6.1f} s  {move.rung}: {move.why}"


def plain(line: Line) -> str:
    """A line of a run for a person."""
    name = "" if line.camera == CAMERA else f"  {line.camera}"
    if isinstance(line, Dropped):
        return f"{line.frame:>6}  {'-':<7}{line.dropped:<34}{name}"
    words = f"{line.label:.30}"
    flag = "" if line.degraded is None else f"  degraded: {line.degraded}"
    if line.repeats is not None:
        flag = f"  repeats {line.repeats}"
    return (
        f"{line.frame:>6}  {line.tier:<7}exit {line.exit}  {words:<31}{line.confidence:>5.2f}"
        f"{line.bytes_up:>9,} B{line.age_ms:>9.1f} ms{flag}{name}"
    )


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--source", required=True, help="A video file or a folder of images.")
@click.option(
    "--broker",
    metavar="HOST:PORT|PATH",
    help="A broker that runs already, or the path of a Mosquitto to run; default: an embedded one.",
)
@click.option(
    "--tiers", default=",".join(TIERS), show_default=True, help="Fewer tiers; the last one takes all that is left."
)
@click.option(
    "--codec",
    default="auto",
    show_default=True,
    help="transform or transform:PERCENT for small features that keep that agreement, raw for exact ones, jpeg or "
    "jpeg:QUALITY for the frame itself; auto: transform where the bundle has it, else raw.",
)
@click.option(
    "--variant",
    type=click.IntRange(0),
    default=0,
    show_default=True,
    help="Of the first segment, as `kinflow bundle show` lists them; 0: the segment itself.",
)
@click.option(
    "--objective",
    metavar="KEY=VALUE,…",
    help="Let the device plan, as with a table [objective], such as optimize=agreement,latency_p95_ms=900 "
    "(docs/planner.md).",
)
@click.option("--no-exits", is_flag=True, help="No early answers: every frame goes through the whole chain.")
@click.option(
    "--fast", is_flag=True, help="Every frame, as fast as it goes; default: the clip's pace, latest frame wins."
)
@click.option(
    "--first-frame", type=click.IntRange(0), default=0, show_default=True, help="Where in the source to start."
)
@click.option("--frames", type=click.IntRange(min=1), help="Stop after so many frames.")
@click.option("--max-fps", type=click.FloatRange(0, min_open=True), help="Leave out what the clip has above this rate.")
@click.option(
    "--scenario",
    type=click.Path(path_type=Path),
    help="TOML: how the device's link to the broker changes, who is killed when; ends the run (docs/operations.md).",
)
@click.option("--rate", help="Of the device's link to the broker, each way, such as 256kbit.")
@click.option("--delay", help="One way, such as 80ms.")
@click.option("--jitter", help="Up to so much more delay, such as 20ms.")
@click.option("--loss", help="Share of TCP segments that are lost once, such as 1%.")
@click.option("--loop", is_flag=True, help="Start again at the end of the source.")
@click.option(
    "--cameras",
    type=click.IntRange(1, 64),
    default=1,
    show_default=True,
    help="So many cameras on the device, each beginning at another place of the source.",
)
@click.option("--ui", is_flag=True, help="Serve a web page of the run, on this machine only; its address is printed.")
@click.option("--preview", is_flag=True, help="With --ui: the cameras' pictures behind the boxes.")
@click.option(
    "--budget-ms", type=click.IntRange(1), default=2000, show_default=True, help="A frame is answered within this."
)
@click.option(
    "--max-in-flight",
    type=click.IntRange(1),
    help="Frames that may wait for an answer from above  [default: 4; with --objective as many as are in time].",
)
@click.option("--json", "as_json", is_flag=True, help="One JSON line per frame, then one with the summary.")
def sim_command(
    bundle: Path,
    source: str,
    broker: str | None,
    tiers: str,
    codec: str,
    variant: int,
    objective: str | None,
    no_exits: bool,
    fast: bool,
    first_frame: int,
    frames: int | None,
    max_fps: float | None,
    scenario: Path | None,
    rate: str | None,
    delay: str | None,
    jitter: str | None,
    loss: str | None,
    loop: bool,
    cameras: int,
    ui: bool,
    preview: bool,
    budget_ms: int,
    max_in_flight: int | None,
    as_json: bool,
) -> None:
    """Run BUNDLE on device, edge and cloud, three processes of this machine, with frames from a clip."""
    loaded = manifest.load(bundle)
    camera = CameraConfig(
        kind="replay",
        source=source,
        max_fps=max_fps,
        realtime=not fast,
        first_frame=first_frame,
        frames=frames,
        loop=loop,
    )
    simulation = Simulation(
        loaded,
        camera,
        tiers=tiers.split(","),
        broker=None if broker is None else _broker(broker),
        scenario=_scenario(scenario, (rate, delay, jitter, loss)),
        codec=codec,
        variant=variant,
        early_exits=not no_exits,
        budget_ms=budget_ms,
        max_in_flight=max_in_flight,
        cameras=cameras,
        preview=preview,
        on_page=tell_page if ui else None,
        objective=None if objective is None else read_objective(objective),
    )
    present(simulation, loaded, camera, as_json=as_json)


def read_objective(text: str) -> Objective:
    """The table `[objective]` written as key=value pairs, with commas between them.

    Raises:
        ConfigError: as for the table itself.
    """
    tree: dict[str, str] = {}
    for pair in text.split(","):
        key, equals, value = (part.strip() for part in pair.partition("="))
        if not (key and equals and value) or key in tree:
            raise ConfigError(
                f"--objective {text!r}: write it as key=value pairs, such as optimize=bytes,min_agreement=.9"
            )
        tree[key] = value
    try:
        objective = msgspec.convert({"objective": tree}, _Given, strict=False).objective
    except msgspec.ValidationError as error:
        raise ConfigError(f"--objective: {printable(sentence(str(error), _Given))}") from error
    wrong = problem(objective)
    if wrong is not None:
        raise ConfigError(f"--objective: {wrong}")
    return objective


class _Given(msgspec.Struct):
    objective: Objective


def _broker(text: str) -> tuple[str, int] | Path:
    host, _, port = text.rpartition(":")
    if host and port.isdigit():
        return host, int(port)
    if shutil.which(text) is not None:
        return Path(text)
    raise ConfigError(
        f"--broker {text!r}: write it as HOST:PORT, such as 127.0.0.1:1883, or give the path of a Mosquitto"
    )


def _scenario(path: Path | None, link: tuple[str | None, str | None, str | None, str | None]) -> Scenario | None:
    if path is None:
        return None if link == (None,) * 4 else fixed(*link)
    if link != (None,) * 4:
        raise ConfigError(
            "--rate, --delay, --jitter and --loss are the scenario's to say; leave them or --scenario out"
        )
    return load_scenario(path)
