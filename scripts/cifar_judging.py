"""Judges a bundle's exits, under the bundle's own policy, on images that had no part in making it, and on shifted ones.

Agreement is equality with the whole float model's own answer on the very same pixels, shifted or not. What an exit
promises holds for all frames that are answered there or at an exit before it (export/risk.py), and counts as broken
when the whole 95 % interval of that agreement lies below it.
"""

from __future__ import annotations

import gzip
import statistics
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from export.agreement import clopper_pearson
from runtime import cascade
from runtime.datatypes import Features
from runtime.errors import BundleError
from runtime.manifest import Bundle, PreprocessSpec
from runtime.policy import ExitPolicy
from runtime.preprocess import prepare
from runtime.segment import load_segments

Images = NDArray[np.uint8]
BATCH = 100  # when only answers count, not times
SUFFIXES = {".jpg", ".jpeg", ".png"}


@dataclass(frozen=True, slots=True)
class Answers:
    """Which exit answered each image, and with which class."""

    exits: NDArray[np.int64]  # the cut it hangs at
    classes: NDArray[np.int64]
    withheld: NDArray[np.int64]  # (images, cuts): 1 where an exit was sure and its guard did not know the image


@dataclass(frozen=True, slots=True)
class ExitRow:
    """What one exit did, or it and all before it together."""

    cut: int
    together: bool
    answered: int
    withheld: int
    coverage: float  # of all images
    agreement: float | None  # of the answered; None when there are none
    low: float | None
    high: float | None
    accuracy: float | None  # of the answered, where labels are known
    whole_accuracy: float | None  # of the whole float model, on the same images


@dataclass(frozen=True, slots=True)
class Judged:
    """One set of images."""

    images: str
    n: int
    macs_saved: float  # share of the whole model's, the heads of the exits that were asked counted
    rows: tuple[ExitRow, ...]  # by exit alone, then by exit with those before it
    unguarded: ExitRow  # all early exits together, had they no guard


def shifts(images: Images, seed: int) -> Iterator[tuple[str, Images]]:
    """Noise and blur of rising strength, and a camera hung upside down, on uint8 (images, height, width, 3)."""
    generator = np.random.default_rng(seed)
    for sigma in (8, 16, 32):
        noisy = images + generator.normal(0, sigma, images.shape).astype(np.float32)
        yield f"noise of {sigma} grey levels", np.clip(np.rint(noisy), 0, 255).astype(np.uint8)
    for blur in (0.7, 1.0, 1.5):
        yield (
            f"blur of {blur} pixels",
            np.stack([cv2.GaussianBlur(image, (0, 0), blur) for image in images]).astype(np.uint8, copy=False),
        )
    yield "upside down", np.ascontiguousarray(images[:, ::-1, ::-1])


def others(path: Path, limit: int) -> Images:
    """Other images, 32x32 RGB: a folder of photos, or a gzipped IDX file of grey ones (as Fashion-MNIST comes)."""
    spec = PreprocessSpec(height=32, width=32)
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.suffix.lower() in SUFFIXES)[:limit]
        pictures = [cv2.imread(str(file), cv2.IMREAD_COLOR) for file in files]
        found = [picture[:, :, ::-1].astype(np.uint8, copy=False) for picture in pictures if picture is not None]
    else:
        try:
            data = gzip.decompress(path.read_bytes())
        except OSError as error:
            raise BundleError(f"{path} is neither a folder of photos nor a gzipped IDX file: {error}") from error
        magic, count, height, width = np.frombuffer(data, ">u4", 4)
        if magic != 2051:
            raise BundleError(f"{path} is no IDX file of images; give one whose name has images-idx3")
        grey = np.frombuffer(data, np.uint8, offset=16).reshape(count, height, width)[:limit]
        found = [np.repeat(picture[:, :, np.newaxis], 3, axis=2) for picture in grey]
    if not found:
        raise BundleError(f"{path} holds no images that can be read; give a folder of .jpg or .png files")
    return np.concatenate([prepare(picture, spec) for picture in found])


def run(tier: cascade.Tier, images: Images, policy: ExitPolicy) -> Answers:
    """Run images (images, height, width, 3) through all segments of the bundle."""
    manifest = tier.bundle.manifest
    exits, classes, withheld = [], [], np.zeros((len(images), len(manifest.cuts)), np.int64)
    # A larger batch than was proved to be exact would be another judge than the board is.
    size = min(BATCH, *(segment.max_batch_size for segment in manifest.segments))
    for start in range(0, len(images), size):
        batch = [Features(0, prepare(image, manifest.preprocess)) for image in images[start : start + size]]
        for row, outcome in enumerate(cascade.run(batch, tier, policy), start):
            assert outcome.answer is not None, "the last exit answers whatever comes"
            exits.append(outcome.answer.exit)
            classes.append(tier.task.key(outcome.answer.answer))
            withheld[row, list(outcome.withheld)] = 1
    return Answers(np.array(exits), np.array(classes), withheld)


def whole_tier(bundle: Bundle) -> cascade.Tier:
    """All of the bundle as one tier, on one thread."""
    return cascade.Tier(bundle, *load_segments(bundle, 0, len(bundle.manifest.segments) - 1))


def judge(
    words: str, tier: cascade.Tier, images: Images, whole: NDArray[np.int64], labels: NDArray[np.int64] | None
) -> Judged:
    """Coverage, agreement and accuracy of every exit, and the compute saved, on one set of images.

    Args:
        whole: the whole float model's answers to the images; `labels`: what is right, where that is known.
    """
    policy = ExitPolicy.of(tier.bundle)
    answers = run(tier, images, policy)
    unguarded = run(tier, images, replace(policy, limits={}))
    last_early = tier.bundle.manifest.exits[-1].cut - 1
    return Judged(
        words,
        len(whole),
        saved(tier.bundle, answers),
        tuple(rows(tier.bundle, answers, whole, labels)),
        _row(last_early, True, unguarded, whole, labels),
    )


def rows(bundle: Bundle, answers: Answers, whole: NDArray[np.int64], labels: NDArray[np.int64] | None) -> list[ExitRow]:
    """Every exit alone, then every exit with those before it."""
    cuts = [spec.cut for spec in bundle.manifest.exits]
    return [_row(cut, together, answers, whole, labels) for together in (False, True) for cut in cuts]


def saved(bundle: Bundle, answers: Answers) -> float:
    """The share of the whole model's multiply-accumulates that the answers did without; heads are charged for."""
    ends = np.cumsum([segment.macs for segment in bundle.manifest.segments]).tolist()
    policy = ExitPolicy.of(bundle)
    cost, asked = {}, 0
    for spec in bundle.manifest.exits:
        asked += spec.macs if policy.may_answer(spec.cut) else 0
        cost[spec.cut] = ends[spec.cut - 1] + asked
    return 1 - float(np.mean([cost[int(cut)] for cut in answers.exits])) / float(ends[-1])


def measured_saving(tier: cascade.Tier, images: Images) -> tuple[float, float]:
    """Milliseconds a frame without and with the early exits, one frame at a time, the two in turns; means of the same
    images, after the medians of three runs of each."""
    early, late = ExitPolicy.of(tier.bundle), ExitPolicy.of(tier.bundle, early=False)
    spec = tier.bundle.manifest.preprocess
    spent: dict[bool, list[float]] = {True: [], False: []}
    for image in images:
        frame = Features(0, prepare(image, spec))
        turns: dict[bool, list[float]] = {True: [], False: []}
        for _ in range(3):
            for way, policy in ((True, early), (False, late)):
                (outcome,) = cascade.run([frame], tier, policy)
                turns[way].append(sum(outcome.timings.values()))
        for way, times in turns.items():
            spent[way].append(statistics.median(times))
    return statistics.fmean(spent[False]), statistics.fmean(spent[True])


def _row(
    cut: int, together: bool, answers: Answers, whole: NDArray[np.int64], labels: NDArray[np.int64] | None
) -> ExitRow:
    mine = answers.exits <= cut if together else answers.exits == cut
    said, withheld = int(mine.sum()), int(answers.withheld[:, cut].sum())
    if said == 0:
        return ExitRow(cut, together, 0, withheld, 0.0, None, None, None, None, None)
    hits = int((answers.classes == whole)[mine].sum())
    low, high = clopper_pearson(hits, said)
    right = None if labels is None else float((answers.classes == labels)[mine].mean())
    whole_right = None if labels is None else float((whole == labels)[mine].mean())
    return ExitRow(cut, together, said, withheld, said / len(whole), hits / said, low, high, right, whole_right)
