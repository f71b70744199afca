"""Proves a bundle before it is written: replays held-back frames through the runtime's own cascade and codecs.

What is proved: the segments, with every cut's features sent through the raw codec, give the whole model's answer (int8
bit for bit, float within FLOAT_TOLERANCE of the largest logit); the int8 model means what the float model means; which
batches give each frame the answer it gets alone. What is measured: agreement and coverage of every exit, and bytes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import msgspec
import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray
from onnx import ModelProto

from export.agreement import measure
from export.exits_judge import accuracy, judge_seen, see
from export.graph import FRAME
from export.task import Judge, Outputs, open_judge
from runtime import cascade
from runtime.codec import RawCodec
from runtime.datatypes import Features, Tensor
from runtime.errors import BundleError
from runtime.manifest import Bundle, ExitSpec
from runtime.policy import ExitPolicy
from runtime.segment import Head, Segment, load_segments
from runtime.segment_onnx import session_options

FLOAT_TOLERANCE = 1e-5  # of the largest logit, or absolute where that is below 1
MAX_BATCH = 8


@dataclass(frozen=True, slots=True)
class Replayed:
    """What the judge frames became on their way through the segments."""

    features: tuple[list[Tensor], ...]  # by cut, from the frame to the logits
    exit_logits: Mapping[int, NDArray[np.float32]]  # by cut of an exit with a file


def run_whole(model: ModelProto, frames: Iterable[Tensor], threads: int = 1) -> NDArray[np.float32]:
    """The logits of a whole model, frame by frame: (frames, classes)."""
    session = ort.InferenceSession(model.SerializeToString(), session_options(threads))
    output = session.get_outputs()[-1].name
    return np.concatenate([session.run([output], {FRAME: frame})[0] for frame in frames])


def replay(bundle: Bundle, frames: Sequence[Tensor]) -> Replayed:
    """Run frames through every segment as tiers would, each cut's features encoded and decoded between two."""
    manifest = bundle.manifest
    segments, heads = load_segments(bundle, 0, len(manifest.segments) - 1)
    early = {spec.cut: [] for spec in manifest.exits if spec.file is not None}  # type: dict[int, list[Tensor]]
    features: tuple[list[Tensor], ...] = tuple([] for _ in manifest.cuts)
    codecs = [RawCodec(cut) for cut in manifest.cuts[:-1]]
    # A policy without thresholds but the last sends every frame the whole way.
    policy = ExitPolicy({len(manifest.segments): 0.0})
    tiers = [_tier(bundle, segments, heads, index) for index in segments]
    for frame in frames:
        tensor = frame
        for tier, codec in zip(tiers, codecs, strict=True):
            tensor = codec.decode(codec.encode(tensor))
            features[tier.first].append(tensor)
            if tier.first in early:
                early[tier.first].append(heads[tier.first].run(tensor))
            (outcome,) = cascade.run([Features(tier.first, tensor)], tier, policy)
            if outcome.features is None:
                tensor = tier.segments[tier.first].run(tensor)
                said = tier.task.read(tensor[0], manifest.exits[-1])
                if outcome.answer is None or outcome.answer.answer != said.answer:
                    raise BundleError("the cascade's answer is not that of its last segment; report this as a defect")
            else:
                tensor = outcome.features.tensor
        features[-1].append(tensor)
    return Replayed(features, {cut: np.concatenate(rows) for cut, rows in early.items()})


def check_parity(composed: NDArray[np.float32], whole: NDArray[np.float32], *, exact: bool) -> float:
    """Compare the segments' logits with the whole model's; the greatest difference, relative to the largest logit.

    Raises:
        BundleError: they differ by more than they may.
    """
    difference = float(np.abs(composed - whole).max())
    relative = difference / max(1.0, float(np.abs(whole).max()))
    if exact and not np.array_equal(composed, whole):
        raise BundleError(
            f"the int8 segments composed differ from the whole int8 model by {difference:.2g}; "
            "choose other cuts with --cuts, or add --float"
        )
    if not relative <= FLOAT_TOLERANCE:
        raise BundleError(
            f"the segments composed differ from the whole model by {relative:.2g} of its largest logit, "
            f"more than {FLOAT_TOLERANCE:g}; choose other cuts with --cuts"
        )
    return relative


def check_meaning(judge: Judge, quantized: Outputs, floating: Outputs, least: float | None) -> float:
    """Compare the quantized model's outputs with the float model's; how alike they are.

    Raises:
        BundleError: less than `least`, or than the task allows.
    """
    value = judge.like(quantized, floating)
    least = judge.least_likeness if least is None else least
    if not value >= least:
        raise BundleError(
            f"the quantized model is unlike the float model: {judge.likeness} {value:.6f}, below {least:g}; "
            "give more frames like those the model was made for, add --float, or lower --min-likeness"
        )
    return value


def judge_exits(
    bundle: Bundle, frames: Tensor, floating: NDArray[np.float32], labels: NDArray[np.int64] | None
) -> tuple[ExitSpec, ...]:
    """Every exit with what it does in the cascade at every agreement of its table; the last: alone, on all frames."""
    answers = open_judge(bundle).keys(floating)
    seen = see(bundle, frames, batch=1)
    rows = {(row.target, row.cut): row.measured() for row in judge_seen(bundle, seen, answers, labels)}
    *early, last = bundle.manifest.exits
    specs = []
    for spec in early:
        points = tuple(
            msgspec.structs.replace(point, measured=rows[point.agreement, spec.cut]) for point in spec.points
        )
        specs.append(msgspec.structs.replace(spec, points=points, measured=rows[spec.agreement, spec.cut]))
    whole = measure(np.ones(len(answers), np.bool_), seen.answers[-1] == answers)
    if labels is not None:
        right, low, high = (round(value, 6) for value in accuracy(seen.answers[-1], labels))
        whole = msgspec.structs.replace(whole, accuracy=right, accuracy_low=low, accuracy_high=high)
    return (*specs, msgspec.structs.replace(last, measured=whole))


def judge_cascade(bundle: Bundle, frames: Sequence[Tensor], floating: NDArray[np.float32]) -> dict[str, float]:
    """The whole cascade with its thresholds in force: who answers, and how often as the float model would."""
    segments, heads = load_segments(bundle, 0, len(bundle.manifest.segments) - 1)
    tier = cascade.Tier(bundle, segments, heads)
    outcomes = [cascade.run([Features(0, frame)], tier, ExitPolicy.of(bundle))[0] for frame in frames]
    said = [outcome.answer for outcome in outcomes if outcome.answer is not None]
    wanted = open_judge(bundle).keys(floating)
    agrees = [tier.task.key(output.answer) == key for output, key in zip(said, wanted, strict=True)]
    proof = {"cascade_agreement": round(float(np.mean(agrees)), 6)}
    for spec in bundle.manifest.exits:
        share = float(np.mean([output.exit == spec.cut for output in said]))
        proof[f"cascade_answered_at_cut_{spec.cut}"] = round(share, 6)
    return proof


def largest_batch(model: ModelProto, frames: Sequence[Tensor], *, exact: bool) -> int:
    """The largest batch, up to MAX_BATCH, such that it and every smaller one give each frame its own answer."""
    session = ort.InferenceSession(model.SerializeToString(), session_options(1))
    name = session.get_inputs()[0].name
    alone = np.concatenate([session.run(None, {name: frame})[0] for frame in frames[:MAX_BATCH]])
    for size in range(2, len(alone) + 1):
        try:
            together, *_ = session.run(None, {name: np.concatenate(frames[:size])})
        except Exception:  # noqa: BLE001  onnxruntime's own errors share no public base class; any means: not this batch
            return size - 1
        same = np.array_equal(together, alone[:size])
        limit = FLOAT_TOLERANCE * max(1.0, float(np.abs(alone).max()))
        close = together.dtype.kind == "f" and float(np.abs(together - alone[:size]).max()) <= limit
        if not same and (exact or not close):
            return size - 1
    return len(alone)


def _tier(bundle: Bundle, segments: Mapping[int, Segment], heads: Mapping[int, Head], index: int) -> cascade.Tier:
    behind = {cut: head for cut, head in heads.items() if cut == index + 1}
    return cascade.Tier(bundle, {index: segments[index]}, behind)
