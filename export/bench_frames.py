"""What `kinflow bench` judges with: the bundle, the float model it was made from, and frames that had no say in either.

The reference is the whole float model, which a bundle does not hold, so the source is opened again; golden frames
show that it is the same.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

import numpy as np
import onnxruntime as ort
from onnx import ModelProto

from export.bundle import CALIBRATION
from export.detector_layout import BoxFormat
from export.frames import fingerprint
from export.graph import FRAME
from export.recipe import open_model
from export.report import Report
from export.source import DetectorOptions, InputOptions
from export.task import Outputs, open_judge
from runtime.camera_replay import ReplayCamera
from runtime.config import CameraConfig
from runtime.datatypes import Tensor
from runtime.errors import BundleError, CameraError
from runtime.manifest import Bundle
from runtime.preprocess import prepare
from runtime.segment_onnx import session_options

LEAST = 20  # judged frames; fewer say nothing
SLACK = 0.08  # below what an export asks for, as golden frames are few; a wrong --mean or other weights lie far below
LITE0 = "efficientnet-lite0"


class Whole:
    """The whole float model."""

    def __init__(self, model: ModelProto, threads: int) -> None:
        self._session = ort.InferenceSession(model.SerializeToString(), session_options(threads))
        self._output: str = self._session.get_outputs()[-1].name

    def run(self, frame: Tensor) -> Outputs:
        """Map a frame (1, height, width, 3) to its output (1, …)."""
        (output,) = self._session.run([self._output], {FRAME: frame})
        return output  # type: ignore[no-any-return]


@dataclass(frozen=True, slots=True)
class Judges:
    """Frames to judge with, in the order they came in."""

    frames: tuple[Tensor, ...]  # each uint8 (1, height, width, 3)
    left_out: int  # frames that had a say in the bundle, or stood before one in a clip
    checked: bool  # whether the bundle says which frames had a say in it
    sources: tuple[str, ...]  # names without their folders


def open_whole(bundle: Bundle, model: str | None, options: InputOptions, threads: int, report: Report) -> Whole:
    """Open the float model that the bundle was made from.

    Args:
        bundle: whose provenance says what it was made from.
        model: as `kinflow export` takes it; None: what the bundle says, as far as that can be opened again.
        options: as they were given to `kinflow export`.
        threads: for the model.
        report: told what is done.

    Raises:
        BundleError: it is not known, cannot be opened, or is another model.
    """
    origin = bundle.manifest.provenance.source
    if model is None:
        if not origin.startswith(LITE0):
            raise BundleError(f"the bundle was made from {origin}; give that model with --model, as to kinflow export")
        model = "lite0"
    if bundle.manifest.task == "detect":
        options = replace(options, detector=_as_exported(bundle))
    opened = open_model(model, options, report)
    if opened.source.origin != origin:
        raise BundleError(
            f"{model} is {opened.source.origin}, but the bundle was made from {origin}; give that model with --model"
        )
    whole = Whole(opened.simplified.trunk(), threads)
    _check_same(bundle, whole, model)
    return whole


def _as_exported(bundle: Bundle) -> DetectorOptions:
    given = bundle.manifest.provenance.options
    return DetectorOptions(
        boxes=cast(BoxFormat | None, given.get("boxes")),
        names=bundle.labels,
        iou_threshold=float(given.get("iou", DetectorOptions().iou_threshold)),
        fit=bundle.manifest.preprocess.fit,
    )


def read_judges(bundle: Bundle, sources: Sequence[Path], max_frames: int) -> Judges:
    """Read the frames to judge with: at most `max_frames`, spread evenly, none of those that had a say in the bundle.

    Neighbours in a clip are nearly one frame, so a clip counts from behind the last frame that had a say.

    Raises:
        CameraError: a source cannot be read.
        BundleError: too few frames are left.
    """
    listed = calibration(bundle)
    kept: list[Tensor] = []
    left_out = 0
    for source in sources:
        taken, skipped = _read(bundle, source, listed or (), max(1, max_frames // len(sources)))
        kept += taken
        left_out += skipped
    if len(kept) < LEAST:
        raise BundleError(
            f"only {len(kept)} frames are left to judge with, {left_out} had a say in the bundle; "
            f"give {LEAST} or more that kinflow export has not seen"
        )
    return Judges(tuple(kept), left_out, listed is not None, tuple(source.name for source in sources))


def read_clip(bundle: Bundle, clip: Path, max_frames: int) -> Judges:
    """Read consecutive frames of a clip, from behind the last one that had a say in the bundle.

    Raises:
        CameraError: it cannot be read.
        BundleError: too few frames are left.
    """
    listed = calibration(bundle)
    kept: list[Tensor] = []
    seen = 0
    for frame in _frames(bundle, clip):
        seen += 1
        if fingerprint(frame) in (listed or ()):
            kept = []
        elif len(kept) < max_frames:
            kept.append(frame)
    if len(kept) < LEAST:
        raise BundleError(f"--clip {clip.name}: only {len(kept)} of its {seen} frames had no say in the bundle")
    return Judges(tuple(kept), seen - len(kept), listed is not None, (clip.name,))


def clip_fps(clip: Path) -> float:
    """The pace of a clip in frames a second, 25 where it does not say."""
    import cv2

    opened = cv2.VideoCapture(str(clip), cv2.CAP_FFMPEG)
    fps = float(opened.get(cv2.CAP_PROP_FPS))
    opened.release()
    return fps if 0 < fps <= 1000 else 25.0


def calibration(bundle: Bundle) -> frozenset[str] | None:
    """The fingerprints of frames that had a say in the bundle; None where it is too old to tell."""
    if CALIBRATION not in {spec.path for spec in bundle.manifest.files}:
        return None
    return frozenset(bundle.file(CALIBRATION).read_text("ascii").split())


def _read(bundle: Bundle, source: Path, listed: Collection[str], limit: int) -> tuple[list[Tensor], int]:
    # How many there are shows only at the end: every step-th is kept, and the step doubles when that is too many.
    kept: list[Tensor] = []
    step, fresh, left_out = 1, 0, 0
    is_clip = source.is_file()
    for frame in _frames(bundle, source):
        if fingerprint(frame) in listed:
            left_out += 1
            if is_clip:
                left_out += fresh
                kept, step, fresh = [], 1, 0
            continue
        if fresh % step == 0:
            kept.append(frame)
            if len(kept) >= 2 * limit:
                kept = kept[::2]
                step *= 2
        fresh += 1
    if len(kept) > limit:
        kept = [kept[place] for place in np.linspace(0, len(kept) - 1, limit).round().astype(int)]
    return kept, left_out


def _frames(bundle: Bundle, source: Path) -> Iterator[Tensor]:
    camera = ReplayCamera("bench", CameraConfig(kind="replay", source=str(source), realtime=False))
    try:
        for frame in camera.frames():
            yield prepare(frame.pixels, bundle.manifest.preprocess)
    except CameraError as error:
        raise CameraError(str(error).replace("camera bench: ", "")) from error


def _check_same(bundle: Bundle, whole: Whole, model: str) -> None:
    with np.load(bundle.file(bundle.manifest.golden), allow_pickle=False) as golden:
        frames, expected = golden["frames"], golden[f"cut_{len(bundle.manifest.segments)}"]
    found = np.concatenate([whole.run(frame[np.newaxis]) for frame in frames])
    judge = open_judge(bundle)
    if found.shape != expected.shape or not judge.like(found, expected) >= judge.least_likeness - SLACK:
        raise BundleError(
            f"{model} answers the bundle's golden frames otherwise than the bundle does; "
            "give the same --mean, --std, --scale, --bgr and --size as to kinflow export"
        )
