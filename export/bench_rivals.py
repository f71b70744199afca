"""What a user without Kinflow would send: the same pixels as JPEG, WebP or AVIF, whole or shrunk first.

Every picture goes through the whole float model. Rivals get their better settings: optimized Huffman tables, and AVIF
at a slower speed than its default.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import cv2
import numpy as np

from export.bench_frames import Whole
from export.bench_rows import Point, Samples, clock, rival_bytes, summarize
from export.task import Outputs, open_judge
from runtime.datatypes import Pixels, Tensor
from runtime.manifest import Bundle

AVIF_SPEED = (
    8  # OpenCV's default is 9, the fastest; 8 takes four times as long for 4 % fewer bytes, 6 nine times for 7 %
)
CAMERA = "the camera"


@dataclass(frozen=True, slots=True)
class Rival:
    """A picture codec with the settings to try."""

    name: str
    suffix: str
    settings: tuple[int, ...]  # besides the quality
    quality: int  # OpenCV's name for it
    qualities: tuple[int, ...]  # at the model's own size
    shrunk: tuple[int, ...]  # when shrunk first


RIVALS = (
    Rival(
        "JPEG",
        ".jpg",
        (cv2.IMWRITE_JPEG_OPTIMIZE, 1),
        cv2.IMWRITE_JPEG_QUALITY,
        (20, 35, 50, 75, 90, 95, 98),
        (70, 90),
    ),
    Rival("WebP", ".webp", (), cv2.IMWRITE_WEBP_QUALITY, (15, 35, 60, 80, 90, 96, 100), (70, 92)),
    Rival(
        "AVIF",
        ".avif",
        (cv2.IMWRITE_AVIF_SPEED, AVIF_SPEED),
        cv2.IMWRITE_AVIF_QUALITY,
        (35, 50, 65, 80, 92, 98),
        (60, 85),
    ),
)
SHRUNK = (5 / 7, 4 / 7)  # of the model's input: 160 and 128 px of 224


def judge_rivals(
    bundle: Bundle,
    frames: Sequence[Tensor],
    logits: Outputs,
    whole: Whole,
    track: Callable[[Sequence[int]], Iterable[int]],
    *,
    quick: bool = False,
) -> list[Point]:
    """Judge every picture codec, quality and size.

    Args:
        bundle: whose topics and input size are used.
        frames: each uint8 (1, height, width, 3).
        logits: the whole float model's on the frames as they are, (frames, classes).
        whole: the whole float model.
        track: wraps the places of the frames, to show how far it is.
        quick: fewer qualities, and only as large as the model's input.
    """
    height, width = bundle.manifest.preprocess.height, bundle.manifest.preprocess.width
    places = _places(min(height, width), quick=quick)
    samples = [Samples() for _ in places]
    judge = open_judge(bundle)
    for number in track(range(len(frames))):
        for (rival, _, quality, size), sample in zip(places, samples, strict=True):
            pixels = _through(rival, quality, size, frames[number][0], sample, bundle)
            sample.judge(judge, whole.run(pixels[np.newaxis]), logits[number : number + 1])
    return [
        summarize(
            sample,
            way="picture",
            cut=0,
            after=CAMERA,
            codec=rival.name,
            rate=rate,
            parameter=float(quality),
            side_px=size,
        )
        for (rival, rate, quality, size), sample in zip(places, samples, strict=True)
    ]


def missing() -> list[str]:
    """The picture codecs that the installed OpenCV cannot write: not every build has AVIF."""
    return [rival.name for rival in RIVALS if not cv2.haveImageWriter(rival.suffix)]


def count_rivals(*, quick: bool) -> int:
    """How many pictures `judge_rivals` makes of a frame."""
    return len(_places(224, quick=quick))


def _places(side: int, *, quick: bool) -> list[tuple[Rival, int, int, int | None]]:
    return [
        (rival, rate, quality, size)
        for rival in RIVALS
        if rival.name not in missing()
        for size in (None, *(round(side * share) for share in SHRUNK))
        for rate, quality in enumerate(rival.qualities if size is None else rival.shrunk)
        if not quick or (size is None and rate % 2)
    ]


def _through(rival: Rival, quality: int, size: int | None, pixels: Pixels, samples: Samples, bundle: Bundle) -> Pixels:
    height, width = pixels.shape[:2]
    now = clock(1)
    start = now()
    picture = cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR)
    if size is not None:
        share = size / min(height, width)
        picture = cv2.resize(picture, (round(width * share), round(height * share)), interpolation=cv2.INTER_AREA)
    ok, data = cv2.imencode(rival.suffix, picture, [rival.quality, quality, *rival.settings])
    if not ok:
        raise ValueError(f"OpenCV could not encode a frame of shape {pixels.shape} as {rival.name}")
    middle = now()
    shown = cv2.imdecode(data, cv2.IMREAD_COLOR)
    assert shown is not None, "OpenCV reads what it wrote"
    if size is not None:
        shown = cv2.resize(shown, (width, height), interpolation=cv2.INTER_LINEAR)
    seen = cv2.cvtColor(shown, cv2.COLOR_BGR2RGB).astype(np.uint8, copy=False)
    samples.encode_ms.append((middle - start) * 1e3)
    samples.decode_ms.append((now() - middle) * 1e3)
    samples.sent(data.size, rival_bytes(bundle, data.size))
    return seen
