"""Judges a bundle's exits, under the bundle's own policy, on images that had no part in making it, and on shifted ones.

Agreement is equality with the whole float model's own answer on the very same pixels, shifted or not. A promise counts
as broken when the whole 95 % interval of the agreement lies below it.
"""

from __future__ import annotations

import gzip
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import onnx
from numpy.typing import NDArray

from export.agreement import clopper_pearson
from export.graph import macs
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


@dataclass(frozen=True, slots=True)
class ExitRow:
    """What one exit did, or all of them together (`cut` None)."""

    cut: int | None
    answered: int
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
    rows: tuple[ExitRow, ...]  # by exit; then the early ones together; then all


def shifts(images: Images, seed: int) -> Iterator[tuple[str, Images]]:
    """Noise and blur of rising strength on uint8 (images, height, width, 3)."""
    generator = np.random.default_rng(seed)
    for sigma in (8, 16, 32):
        noisy = images + generator.normal(0, sigma, images.shape).astype(np.float32)
        yield f"noise of {sigma} grey levels", np.clip(np.rint(noisy), 0, 255).astype(np.uint8)
    for blur in (0.7, 1.0, 1.5):
        yield (
            f"blur of {blur} pixels",
            np.stack([cv2.GaussianBlur(image, (0, 0), blur) for image in images]).astype(np.uint8, copy=False),
        )


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


def head_macs(bundle: Bundle) -> dict[int, int]:
    """The multiply-accumulates of every exit's head for one frame, by cut; 0 for the last."""
    costs: dict[int, int] = {}
    for spec in bundle.manifest.exits:
        costs[spec.cut] = 0
        if spec.file is None:
            continue
        model = onnx.shape_inference.infer_shapes(onnx.load(bundle.file(spec.file)))
        values = (*model.graph.input, *model.graph.output, *model.graph.value_info)
        shapes = {
            value.name: tuple(side.dim_value or 1 for side in value.type.tensor_type.shape.dim) for value in values
        }
        shapes |= {weight.name: tuple(weight.dims) for weight in model.graph.initializer}
        costs[spec.cut] = sum(macs(node, shapes) for node in model.graph.node)
    return costs


def run(bundle: Bundle, tier: cascade.Tier, images: Images, policy: ExitPolicy) -> Answers:
    """Run images (images, height, width, 3) through all segments of the bundle."""
    spec = bundle.manifest.preprocess
    exits, classes = [], []
    # A larger batch than was proved to be exact would be another judge than the board is.
    size = min(BATCH, *(segment.max_batch_size for segment in bundle.manifest.segments))
    for start in range(0, len(images), size):
        batch = [Features(0, prepare(image, spec)) for image in images[start : start + size]]
        for outcome in cascade.run(batch, tier, policy):
            assert outcome.answer is not None, "the last exit answers whatever comes"
            exits.append(outcome.answer.exit)
            classes.append(outcome.answer.label_index)
    return Answers(np.array(exits), np.array(classes))


def whole_tier(bundle: Bundle) -> cascade.Tier:
    """All of the bundle as one tier, on one thread."""
    return cascade.Tier(bundle, *load_segments(bundle, 0, len(bundle.manifest.segments) - 1))


def judge(
    words: str, bundle: Bundle, answers: Answers, whole: NDArray[np.int64], labels: NDArray[np.int64] | None
) -> Judged:
    """Coverage, agreement and accuracy of every exit, and the compute saved, from answers to one set of images."""
    cuts = [spec.cut for spec in bundle.manifest.exits]
    rows = [_row(cut, answers.exits == cut, answers, whole, labels) for cut in cuts]
    rows.append(_row(None, answers.exits < cuts[-1], answers, whole, labels))
    rows.append(_row(None, answers.exits <= cuts[-1], answers, whole, labels))
    return Judged(words, len(whole), _saved(bundle, answers), tuple(rows))


def measured_saving(bundle: Bundle, tier: cascade.Tier, images: Images) -> tuple[float, float]:
    """Milliseconds a frame without and with the early exits, one frame at a time, the two in turns; means of the same
    images, after the medians of three runs of each."""
    early, late = ExitPolicy.of(bundle), ExitPolicy.of(bundle, early=False)
    spec = bundle.manifest.preprocess
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
    cut: int | None,
    rows: NDArray[np.bool_],
    answers: Answers,
    whole: NDArray[np.int64],
    labels: NDArray[np.int64] | None,
) -> ExitRow:
    said = int(rows.sum())
    if said == 0:
        return ExitRow(cut, 0, 0.0, None, None, None, None, None)
    hits = int((answers.classes == whole)[rows].sum())
    low, high = clopper_pearson(hits, said)
    right = None if labels is None else float((answers.classes == labels)[rows].mean())
    whole_right = None if labels is None else float((whole == labels)[rows].mean())
    return ExitRow(cut, said, said / len(whole), hits / said, low, high, right, whole_right)


def _saved(bundle: Bundle, answers: Answers) -> float:
    heads = head_macs(bundle)
    ends: Sequence[int] = np.cumsum([segment.macs for segment in bundle.manifest.segments]).tolist()
    policy = ExitPolicy.of(bundle)
    cost = {
        cut: ends[cut - 1] + sum(spent for at, spent in heads.items() if at <= cut and policy.may_answer(at))
        for cut in heads
    }
    return 1 - float(np.mean([cost[int(cut)] for cut in answers.exits])) / ends[-1]
