"""Reads the user's frames as the device will see them, and parts them by role so that no frame has two.

Exits are fitted on `fit` frames, thresholds chosen on `threshold` frames, everything measured on `judge` frames:
60, 20 and 20 of a hundred, and 40, 40 and 20 of every hundred beyond the first 500. Photos are shuffled first, by the
seed. Frames of a clip are parted in contiguous blocks, since neighbours in time are nearly one frame, and a shuffle
would put one of them on each side.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import cv2
import numpy as np
from numpy.typing import NDArray

from runtime.camera_replay import IMAGE_SUFFIXES, ReplayCamera
from runtime.config import CameraConfig
from runtime.datatypes import Tensor
from runtime.errors import BundleError, CameraError
from runtime.manifest import PreprocessSpec
from runtime.preprocess import prepare

Role = Literal["fit", "threshold", "judge"]
ROLES: tuple[Role, ...] = get_args(Role)
SHARES = (0.6, 0.2)  # fit, threshold; the rest judges
# Of more frames than so many, heads gain little from more to fit and thresholds much from more to be tested on.
FEW = 500
SHARES_BEYOND = (0.4, 0.4)
CALIBRATING: tuple[Role, ...] = ("fit", "threshold")
LEAST = 20
FOLDS = 5  # blocks of a clip's fit frames that are held out in turn
COPIES = 4  # of each fit frame, itself included


@dataclass(frozen=True, slots=True)
class FrameSource:
    """A folder of photos or a clip, or a stretch of one."""

    path: Path
    first_frame: int = 0
    count: int | None = None


@dataclass(frozen=True, slots=True)
class FrameSet:
    """All frames, prepared, and who may use which."""

    pixels: Tensor  # uint8 (frames, height, width, 3)
    roles: dict[Role, NDArray[np.int64]]  # role → positions in `pixels`
    groups: NDArray[np.int64]  # frames of one group are near each other in time, and are held out together
    sha256: str
    names: tuple[str, ...]  # of the pictures' files, without folders; empty for frames of a clip
    places: NDArray[np.int64]  # (frames, 2): the number of its source, and its position there

    def of(self, role: Role) -> list[Tensor]:
        """The frames of one role, each uint8 (1, height, width, 3)."""
        return [self.pixels[position : position + 1] for position in self.roles[role]]

    def calibration(self) -> str:
        """The fingerprint of every frame that had a say in the bundle, one a line, sorted; judge frames had none."""
        return "".join(sorted({fingerprint(frame) + "\n" for role in CALIBRATING for frame in self.of(role)}))


def fingerprint(frame: Tensor) -> str:
    """16 hexadecimal digits that stand for a frame's pixels as the model sees them, uint8 (1, height, width, 3)."""
    return hashlib.sha256(np.ascontiguousarray(frame).data).hexdigest()[:16]


def load_frames(sources: Sequence[FrameSource], spec: PreprocessSpec, max_frames: int, seed: int) -> FrameSet:
    """Read at most `max_frames` frames, spread evenly over each source, and part them.

    Raises:
        BundleError: a source cannot be read, or there are too few frames to part.
    """
    pixels: list[Tensor] = []
    names: list[str] = []
    places: list[tuple[int, int]] = []
    roles: dict[Role, list[int]] = {role: [] for role in ROLES}
    groups: list[int] = []
    generator = np.random.default_rng(seed)
    for number, source in enumerate(sources):
        taken, positions_there, named = _read(source, spec, max(1, max_frames // len(sources)))
        names.extend(named)
        places.extend((number, position) for position in positions_there)
        order = list(range(len(taken)))
        is_clip = source.path.is_file()
        if not is_clip:
            generator.shuffle(order)
        for role, positions in zip(ROLES, _parts(order), strict=True):
            roles[role].extend(len(pixels) + position for position in positions)
        block = max(1, -(-_bounds(len(taken))[0] // FOLDS)) if is_clip else 1
        start = max(groups, default=-1) + 1
        groups.extend(start + position // block for position in range(len(taken)))
        pixels.extend(taken)
    if len(pixels) < LEAST:
        given = ", ".join(str(source.path) for source in sources)
        raise BundleError(f"{given}: only {len(pixels)} frames; give at least {LEAST}, better some hundreds")
    stacked = np.concatenate(pixels)
    return FrameSet(
        pixels=stacked,
        roles={role: np.array(sorted(positions), np.int64) for role, positions in roles.items()},
        groups=np.array(groups, np.int64),
        sha256=hashlib.sha256(stacked.data).hexdigest(),
        names=tuple(names),
        places=np.array(places, np.int64),
    )


def copies(frame: Tensor, generator: np.random.Generator) -> Iterator[Tensor]:
    """A fit frame, its mirror image, and closer, lighter or darker looks at it: what a camera might see as well."""
    height, width = frame.shape[1:3]
    for number in range(COPIES):
        pixels = frame[0]
        if number > 1:
            zoom = generator.uniform(0.6, 1.0)
            rows, columns = max(1, int(height * zoom)), max(1, int(width * zoom))
            top, left = generator.integers(0, height - rows + 1), generator.integers(0, width - columns + 1)
            near = np.ascontiguousarray(pixels[top : top + rows, left : left + columns])
            scaled = cv2.resize(near, (width, height), interpolation=cv2.INTER_LINEAR_EXACT)
            light = (scaled.astype(np.float32) - 128) * generator.uniform(0.7, 1.3) + generator.uniform(103, 153)
            pixels = np.clip(light, 0, 255).astype(np.uint8)
        yield np.ascontiguousarray(pixels[:, ::-1] if number % 2 else pixels)[np.newaxis]


def _parts(order: list[int]) -> tuple[list[int], list[int], list[int]]:
    first, second = _bounds(len(order))
    return order[:first], order[first:second], order[second:]


def _bounds(count: int) -> tuple[int, int]:
    """Where the threshold frames start and end."""
    few, beyond = min(count, FEW), max(0, count - FEW)
    fit, threshold = (few * share + beyond * more for share, more in zip(SHARES, SHARES_BEYOND, strict=True))
    return round(fit), round(fit + threshold)


def frames_for(threshold_frames: int) -> int:
    """How many frames it takes in all for so many threshold frames."""
    beyond = max(0.0, threshold_frames - FEW * SHARES[1])
    return math.ceil(min(FEW, threshold_frames / SHARES[1]) + beyond / SHARES_BEYOND[1])


def _read(source: FrameSource, spec: PreprocessSpec, limit: int) -> tuple[list[Tensor], list[int], list[str]]:
    if not source.path.exists():
        raise BundleError(f"--frames {source.path} does not exist; give a folder of images or a video file")
    config = CameraConfig(
        kind="replay",
        source=str(source.path),
        realtime=False,
        first_frame=source.first_frame,
        frames=source.count,
    )
    # How long a clip is shows only at its end: every step-th frame is kept, and the step doubles when that is too many.
    kept: list[tuple[int, Tensor]] = []
    step = 1
    try:
        for position, frame in enumerate(ReplayCamera("export", config).frames()):
            if position % step:
                continue
            kept.append((position, prepare(frame.pixels, spec)))
            if len(kept) >= 2 * limit:
                kept = kept[::2]
                step *= 2
    except CameraError as error:
        raise BundleError(str(error).replace("camera export: ", "--frames ")) from error
    if len(kept) > limit:
        kept = [kept[place] for place in np.linspace(0, len(kept) - 1, limit).round().astype(int)]
    files = sorted(path.name for path in source.path.iterdir()) if source.path.is_dir() else []
    pictures = [name for name in files if Path(name).suffix.lower() in IMAGE_SUFFIXES]
    return (
        [pixels for _, pixels in kept],
        [position for position, _ in kept],
        [pictures[source.first_frame + position] if pictures else "" for position, _ in kept],
    )
