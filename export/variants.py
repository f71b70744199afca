"""The stage of an export that makes variants of the first segment: smaller, faster, with the same features behind.

A ladder of stand-ins (`export.lowrank`), each trained for a moment (`export.distill`), quantized like the segment and
made to write the bundle's own wire, so that every deeper segment and every exit takes what they make unchanged. Only
those that are faster here, and that answer nearly as often as the float model does, are kept. The exits' thresholds are
tested again behind each, since a promise made for the segment's features is none for a variant's (docs/variants.md).
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np
import onnx
import onnxruntime as ort
from numpy.typing import NDArray
from onnx import ModelProto

from export import prove
from export.agreement import pooled
from export.bundle import list_files
from export.distill import distil, steps_for
from export.exits_stage import Fitted, Trunk, choose_points
from export.frames import FrameSet
from export.graph import LOGITS, copy_of, extract, macs, tensor_info, write
from export.layers import shapes_of
from export.lowrank import Analysis, analyse, stand_in, widths
from export.quantize import quantize_part, recipe_of
from export.recipe import Recipe
from export.report import Report
from export.slicing import channels_last
from export.task import Outputs, open_judge
from export.torch_graph import UnknownOperatorError
from runtime.datatypes import Tensor
from runtime.manifest import Bundle, ExitSpec, VariantSpec
from runtime.segment import load_segments
from runtime.segment_onnx import session_options
from runtime.variant import with_each_variant, with_variant

FIRST, STEP = 0.73, 0.04  # share of the segment's cost that the first variant keeps, and how much less each next one
LEAST_SPEEDUP = 1.1
LEAST_AGREEMENT = 0.9  # on the threshold frames, with the whole float model
FITTED = 150  # frames
CALIBRATED = 48  # frames
TURNS, WARM_UP = 50, 3
NOISE = 0.05  # of a measured ratio of times


@dataclass(frozen=True, slots=True)
class Whole:
    """The first segment and what follows, float, as the graph has them: maps channels first."""

    part: ModelProto
    tail: ModelProto


def add_variants(
    bundle: Bundle,
    trunk: Trunk,
    fitted: Sequence[Fitted],
    frames: FrameSet,
    floating: Outputs,
    labels: NDArray[np.int64] | None,
    recipe: Recipe,
    report: Report,
) -> Bundle:
    """Make variants of a staged bundle's first segment, test the exits behind each, judge them, and write them.

    Args:
        bundle: with its exits.
        trunk: what it was made of.
        fitted: the exits, before their thresholds.
        frames: as parted.
        floating: the whole float model's outputs for every frame.
        labels: true classes, where given.
        recipe: how many are wanted, for which target.
        report: told what is done.
    """
    if recipe.variants == 0 or not trunk.chosen:
        return bundle
    report.stage(f"make {recipe.variants} variants of the first segment")
    whole = _whole(trunk)
    fit = frames.of("fit")
    fit = [fit[place] for place in np.linspace(0, len(fit) - 1, min(FITTED, len(fit))).round().astype(int)]
    analysis = analyse(whole.part, fit, tail=whole.tail, seed=recipe.seed)
    kept: list[VariantSpec] = []
    for count, model in _ladder(analysis, whole, trunk, fit, recipe, report):
        number = len(kept) + 1
        file = f"segments/0.v{number}.onnx"
        write(model, bundle.path / file)
        tried = _with(bundle, [*kept, _undecided(bundle, file, count)])
        share = _agreement(with_variant(tried, number), frames.of("threshold"), floating[frames.roles["threshold"]])
        if share < LEAST_AGREEMENT:
            (bundle.path / file).unlink()
            report.note(f"not kept: it agrees on {share:.3f} of the threshold frames only")
            break
        kept.append(tried.manifest.segments[0].variants[-1])
        bundle = tried
        specs, _ = choose_points(fitted, trunk, with_variant(bundle, number), frames, floating, recipe)
        if specs:
            kept[-1] = msgspec.structs.replace(kept[-1], exits=(*specs, bundle.manifest.exits[-1]))
            bundle = _with(bundle, kept)
        kept[-1] = _judged(bundle, number, trunk, model, frames, floating, labels)
        bundle = _with(bundle, kept)
        report.note(
            f"variant {number}: agreement {kept[-1].agreement:.3f} "
            f"[{kept[-1].agreement_low:.3f}, {kept[-1].agreement_high:.3f}] with the whole float model"
        )
    return _with(bundle, kept)


def rows(bundle: Bundle, frames: Sequence[Tensor], floating: Outputs) -> list[dict[str, Any]]:
    """Every variant of the first segment before every tail: time, size and agreement; the segment itself is variant 0.

    A tail is what asks an exit: all segments in between, and its head; here each exit is asked about every frame,
    sure or not.

    Args:
        bundle: any.
        frames: each uint8 (1, height, width, 3), none of which had a part in fitting.
        floating: the whole float model's outputs for them: (frames, …).

    Returns:
        Rows with segment, variant, exit, ms (processor time of one thread), ratio (of the segment's time to it), mb,
        macs, agreement, low, high (95 % Clopper-Pearson), n, cosine (of the features with the segment's own, mean).
    """
    seen = with_each_variant(bundle)
    if len(seen) == 1 or not frames:
        return []
    models = [onnx.load(one.file(one.manifest.segments[0].file)) for one in seen]
    times = time_side_by_side(models, frames[0])
    tails, heads = load_segments(bundle, 0, len(bundle.manifest.segments) - 1)
    own = [tails[0].run(frame) for frame in frames]
    judge = open_judge(bundle)
    answers = judge.keys(floating)
    made: list[dict[str, Any]] = []
    for number, (one, took_ms) in enumerate(zip(seen, times, strict=True)):
        first, _ = load_segments(one, 0, 0)
        tensors = [first[0].run(frame) for frame in frames]
        closeness = _cosine(tensors, own)
        spec = one.manifest.segments[0]
        for index in range(len(tails)):
            if index > 0:
                tensors = [tails[index].run(tensor) for tensor in tensors]
            exit_spec = bundle.exit_at(index + 1)
            if exit_spec is None:
                continue
            head = heads.get(exit_spec.cut)
            said = np.concatenate(tensors if head is None else [head.ask(tensor)[0] for tensor in tensors])
            if head is None:
                share = pooled(judge.marks(said, floating))
            else:
                hits = (said.argmax(axis=1) == answers).astype(np.int64)
                share = pooled(np.stack([hits, np.ones_like(hits)], axis=1))
            made.append(
                {
                    "segment": 0,
                    "variant": number,
                    "exit": exit_spec.cut,
                    "ms": took_ms,
                    "ratio": round(times[0] / took_ms, 3),
                    "mb": round(one.file(spec.file).stat().st_size / 1e6, 4),
                    "macs": spec.macs,
                    "agreement": round(share.share, 6),
                    "low": round(share.low, 6),
                    "high": round(share.high, 6),
                    "n": len(answers),
                    "cosine": round(closeness, 6),
                }
            )
    return made


def time_side_by_side(models: Sequence[ModelProto], frame: Tensor) -> list[float]:
    """Milliseconds of the one thread's processor for a frame, the lower quartile of several turns.

    Models take turns, and what other processes do meanwhile does not count: what is compared are models.
    """
    sessions = [ort.InferenceSession(model.SerializeToString(), session_options(1)) for model in models]
    names = [session.get_inputs()[0].name for session in sessions]
    took: list[list[float]] = [[] for _ in models]
    for turn in range(WARM_UP + TURNS):
        for session, name, times in zip(sessions, names, took, strict=True):
            start_ns = time.thread_time_ns()
            session.run(None, {name: frame})
            if turn >= WARM_UP:
                times.append((time.thread_time_ns() - start_ns) / 1e6)
    return [round(statistics.quantiles(times)[0], 3) for times in took]


def times_ms(bundle: Bundle, frame: Tensor) -> list[float]:
    """What the first segment and its variants take here, by number; empty where there are none."""
    files = [one.manifest.segments[0].file for one in with_each_variant(bundle)]
    return time_side_by_side([onnx.load(bundle.path / file) for file in files], frame) if len(files) > 1 else []


def _ladder(
    analysis: Analysis, whole: Whole, trunk: Trunk, fit: Sequence[Tensor], recipe: Recipe, report: Report
) -> Iterator[tuple[int, ModelProto]]:
    """The variants that are fast enough, as they stand in the bundle, from the most faithful to the fastest.

    Yields:
        Multiply-accumulates, and the graph.
    """
    steps = steps_for(sum(macs(node, trunk.opened.simplified.shapes) for node in whole.part.graph.node))
    tried: set[tuple[int, ...]] = set()
    fastest = 0.0
    for number in range(recipe.variants):
        chosen = widths(analysis, FIRST - STEP * number)
        sizes = tuple(chosen.values())
        whole_sizes = tuple(unit.hidden.width for unit in analysis.units)
        if sizes in tried or sizes == whole_sizes:
            continue
        tried.add(sizes)
        student = stand_in(analysis, chosen)
        segment = _as_segment(student, trunk, fit, recipe)
        own_ms, took_ms = time_side_by_side([trunk.chain.segments[0], segment], fit[0])
        report.note(f"channels {'/'.join(map(str, sizes))}: {own_ms / took_ms:.2f}x as fast")
        if own_ms / took_ms < max(LEAST_SPEEDUP, (1 - NOISE) * fastest):
            continue
        fastest = max(fastest, own_ms / took_ms)
        if steps:
            try:
                student = distil(student, whole.part, whole.tail, fit, steps=steps, seed=recipe.seed)
                segment = _as_segment(student, trunk, fit, recipe)
            except UnknownOperatorError as error:
                report.note(f"not trained: {error}")
                steps = 0
        yield _macs(student), segment


def _whole(trunk: Trunk) -> Whole:
    model, cut = trunk.opened.simplified.trunk(), trunk.chosen[0]
    features = tensor_info(cut.tensor, "float32", cut.shape)
    classes = trunk.opened.simplified.shapes[LOGITS][1:]
    return Whole(
        extract(model, list(model.graph.input), [features], "segment0"),
        extract(model, [features], [tensor_info(LOGITS, "float32", classes)], "tail"),
    )


def _as_segment(student: ModelProto, trunk: Trunk, fit: Sequence[Tensor], recipe: Recipe) -> ModelProto:
    """A stand-in as the bundle needs it: quantized where the bundle is, its maps channels last."""
    model = student
    if recipe.target is not None:
        sample = fit[:: max(1, len(fit) // CALIBRATED)]
        kind = recipe_of(trunk.opened.simplified.trunk())
        model = quantize_part(student, sample, kind, recipe.target, None, trunk.wires[0])
    return channels_last(copy_of(model), first=True)


def _undecided(bundle: Bundle, file: str, count: int) -> VariantSpec:
    return VariantSpec(
        file=file,
        macs=count,
        max_batch_size=1,
        cosine=0.0,
        agreement=0.0,
        agreement_low=0.0,
        agreement_high=1.0,
        n=0,
        exits=bundle.manifest.exits,
    )


def _judged(
    bundle: Bundle,
    number: int,
    trunk: Trunk,
    model: ModelProto,
    frames: FrameSet,
    floating: Outputs,
    labels: NDArray[np.int64] | None,
) -> VariantSpec:
    """A variant with what was measured on the judge frames, and its largest batch."""
    judge, roles = frames.of("judge"), frames.roles["judge"]
    seen = with_variant(bundle, number)
    exits: tuple[ExitSpec, ...] = prove.judge_exits(
        seen, np.concatenate(judge), floating[roles], None if labels is None else labels[roles]
    )
    last = exits[-1].measured
    assert last is not None, "judge_exits measures all"
    (own, made) = (load_segments(one, 0, 0)[0][0] for one in (bundle, seen))
    return msgspec.structs.replace(
        bundle.manifest.segments[0].variants[number - 1],
        max_batch_size=prove.largest_batch(model, judge, exact=trunk.wires[0] is not None),
        cosine=round(_cosine([made.run(frame) for frame in judge], [own.run(frame) for frame in judge]), 6),
        agreement=last.agreement or 0.0,
        agreement_low=last.agreement_low or 0.0,
        agreement_high=last.agreement_high or 0.0,
        n=last.n,
        exits=exits,
    )


def _agreement(bundle: Bundle, frames: Sequence[Tensor], floating: Outputs) -> float:
    """How often the whole chain, every frame sent all the way, answers as the float model does."""
    segments, _ = load_segments(bundle, 0, len(bundle.manifest.segments) - 1)
    said = []
    for frame in frames:
        tensor = frame
        for segment in segments.values():
            tensor = segment.run(tensor)
        said.append(tensor)
    return pooled(open_judge(bundle).marks(np.concatenate(said), floating)).share


def _cosine(left: Sequence[Tensor], right: Sequence[Tensor]) -> float:
    """The mean cosine of features about their mean, as they stand on the wire."""
    centre = np.concatenate(right).astype(np.float64).mean(axis=0)
    values = []
    for one, other in zip(left, right, strict=True):
        a, b = ((value[0].astype(np.float64) - centre).reshape(-1) for value in (one, other))
        values.append(float(a @ b) / max(float(np.linalg.norm(a) * np.linalg.norm(b)), 1e-30))
    return float(np.mean(values))


def _macs(model: ModelProto) -> int:
    shapes = shapes_of(model)
    return sum(macs(node, shapes) for node in model.graph.node)


def _with(bundle: Bundle, variants: Sequence[VariantSpec]) -> Bundle:
    first, *rest = bundle.manifest.segments
    segments = (msgspec.structs.replace(first, variants=tuple(variants)), *rest)
    manifest = msgspec.structs.replace(bundle.manifest, segments=segments, files=list_files(bundle.path))
    return Bundle(bundle.path, manifest, bundle.id, bundle.labels)
