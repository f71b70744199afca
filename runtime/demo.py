"""The main job on a real clip, with the bundle that ships: nothing to set up, nothing to train, no torch."""

from __future__ import annotations

import contextlib
import os
import sys
import time
import webbrowser
from pathlib import Path

import click

from runtime import manifest
from runtime.config import CameraConfig
from runtime.demo_clips import CORNER, STREET_KNOWN, cut_out, fetch_street, fetch_traffic, has_debian_packages
from runtime.errors import CameraError
from runtime.sim import present, tell_page
from runtime.simulation import TIERS, Simulation

REFERENCE = Path(__file__).parent / "reference" / "pedestrian"
FRAMES = 200  # of the street; 20 s at its own pace
NO_EARLY_ANSWERS = (
    "The early exit was sure of no frame of this clip, so all of them went up: it was fitted to other\n"
    "scenes and answers only what was tested, so it keeps silent here."
)


def demo_clip(folder: Path) -> Path:
    """The demo's clip, fetched by package name into `folder` the first time: a corner of a street, else traffic.

    Raises:
        CameraError: it cannot be fetched, or is not the clip it should be.
    """
    if has_debian_packages():
        try:
            return cut_out(fetch_street(folder), CORNER, STREET_KNOWN, FRAMES, folder)
        except CameraError as error:
            click.echo(f"{error}; showing traffic instead, in which few people walk", err=True)
    return fetch_traffic(folder)


def has_display() -> bool:
    """Whether a browser could show something to whoever sits here."""
    return sys.platform in ("darwin", "win32") or bool(os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"))


def open_page(address: str) -> None:
    """Say where the page is, and show it."""
    tell_page(address)
    with contextlib.suppress(webbrowser.Error):
        webbrowser.open(address)


@click.command()
@click.option("--source", help="A clip or a folder of images of your own; default: a street corner, fetched once.")
@click.option(
    "--codec",
    default="auto",
    show_default=True,
    help="transform or transform:PERCENT for small features that keep that agreement, raw for exact ones, jpeg or "
    "jpeg:QUALITY for the frame itself; auto: transform where the bundle has it, else raw.",
)
@click.option("--no-exits", is_flag=True, help="No early answers: every frame goes through the whole chain.")
@click.option("--no-ui", is_flag=True, help="No web page.")
@click.option("--json", "as_json", is_flag=True, help="One JSON line per frame, then one with the summary.")
def demo_command(source: str | None, codec: str, no_exits: bool, no_ui: bool, as_json: bool) -> None:
    """Find people in a clip, on device, edge and cloud of this machine; sum up who answered and what it cost.

    A web page shows it while it runs. Where there is a display, a browser opens it, and the clip is played again and
    again until Ctrl-C.
    """
    watched = not no_ui and not as_json and sys.stdout.isatty() and has_display()
    start_s = time.monotonic()
    bundle = manifest.load(REFERENCE)
    if source is None:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "kinflow"
        camera = CameraConfig(kind="replay", source=str(demo_clip(cache)), loop=watched)
    else:
        camera = CameraConfig(kind="replay", source=source, loop=watched)
    click.echo(
        f"bundle {bundle.manifest.name} {bundle.key8}: device, edge and cloud as processes, MQTT between them",
        err=True,
    )
    simulation = Simulation(
        bundle,
        camera,
        tiers=TIERS,
        codec=codec,
        early_exits=not no_exits,
        preview=not no_ui,  # broker and page are this machine's own, so no picture leaves it
        on_page=None if no_ui else open_page if watched else tell_page,
    )
    summary = present(simulation, bundle, camera, as_json=as_json)
    if not as_json:
        if not no_exits and summary.tiers[TIERS[0]].frames == summary.degraded_frames:
            click.echo(f"\n{NO_EARLY_ANSWERS}", err=True)
        took_s = time.monotonic() - start_s
        click.echo(f"\n{took_s:.0f} s in all. Next, with a model and frames of your own: see README.md", err=True)
