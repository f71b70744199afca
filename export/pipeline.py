"""The stages of an export, in order: open, simplify, cut, read frames, quantize, slice, fit exits, prove, write."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

import msgspec
import numpy as np

from runtime.errors import BundleError
from runtime.manifest import (
    FORMAT,
    Bundle,
    CutSpec,
    ExitSpec,
    Manifest,
    Provenance,
    SegmentSpec,
    TierSpec,
    load,
    save,
    verify_files,
)

from export import exits, prove, timing
from export.agreement import clopper_pearson
from export.bundle import GOLDEN, LABELS, check_out, list_files, staging, write_arrays
from export.cuts import Cut, default_cuts, list_cuts, named_cuts
from export.frames import FrameSet, FrameSource, load_frames
from export.graph import opset, write
from export.quantize import RECIPES, Quantized, channel_ranges, quantize
from export.report import Report
from export.simplify import Simplified, simplify
from export.slicing import Chain, slice_float, slice_quantized
from export.source import InputOptions, Source, open_source

TOOLS = ("kinflow", "numpy", "onnx", "onnxruntime", "onnxslim", "torch")
GOLDEN_FRAMES = 4
DEFAULT_TIERS = ("device", "edge", "cloud")


@dataclass(frozen=True, slots=True)
class Recipe:
    """Everything that decides a bundle."""

    model: str
    frames: tuple[FrameSource, ...]
    input: InputOptions = field(default_factory=InputOptions)
    tiers: tuple[str, ...] = DEFAULT_TIERS
    cuts: tuple[str, ...] = ()  # empty: the default rule
    agreement: float = 0.98
    target: str | None = "x86-vnni"  # None: float
    min_cosine: float = 0.98
    max_frames: int = 500
    seed: int = 0
    name: str | None = None
    threads: int = 1


@dataclass(frozen=True, slots=True)
class Exported:
    """A bundle that was written, and how fast its segments ran here."""

    bundle: Bundle
    segment_ms: tuple[float, ...]
    whole_ms: float


@dataclass(frozen=True, slots=True)
class Opened:
    """A model, ready to be cut."""

    source: Source
    simplified: Simplified
    cuts: tuple[Cut, ...]
    own: dict[str, str]  # tensor of a cut → the model's own exit that hangs there


def open_model(model: str, options: InputOptions, report: Report) -> Opened:
    """Open a model, bring it into the one form and find its cuts.

    Raises:
        BundleError: it cannot be read or cut.
    """
    report.stage(f"open {model}")
    source = open_source(model, options)
    report.stage("simplify and find every cut")
    simplified = simplify(source)
    cuts = list_cuts(simplified.trunk(), simplified.shapes)
    if not cuts:
        raise BundleError(f"{source.name} has no place to be cut: no tensor alone separates its input from its output")
    tensors = [cut.tensor for cut in cuts]
    own: dict[str, str] = {}
    for output in simplified.exits:
        tensor = exits.own_exit_cut(simplified.whole, output, tensors)
        if tensor is None:
            raise BundleError(f"the model's own exit {output} hangs at no cut; let it read what all of the rest reads too")
        own[tensor] = output
    report.note(f"{len(cuts)} cuts, {len(own)} exits of its own, batch {'open' if simplified.batchable else 'fixed'}")
    return Opened(source, simplified, tuple(cuts), own)


def choose_cuts(opened: Opened, recipe: Recipe) -> list[Cut]:
    """The cuts of the command line, else those of the model's own exits, else by the default rule."""
    if recipe.cuts:
        return named_cuts(opened.cuts, recipe.cuts)
    own = [cut for cut in opened.cuts if cut.tensor in opened.own]
    return own or default_cuts(opened.cuts, len(recipe.tiers))


def export(recipe: Recipe, out: Path, report: Report, *, force: bool = False) -> Exported:
    """Make, prove and write a bundle.

    Raises:
        KinflowError: one sentence; nothing is left behind at `out`.
    """
    check_out(out, force=force)
    opened = open_model(recipe.model, recipe.input, report)
    chosen = choose_cuts(opened, recipe)
    report.note("cuts after " + ", ".join(f"{cut.after} ({cut.macs_ratio:.0%})" for cut in chosen))
    report.stage("read frames")
    frames = load_frames(recipe.frames, opened.source.preprocess, recipe.max_frames, recipe.seed)
    report.note(", ".join(f"{len(positions)} {role}" for role, positions in frames.roles.items()))
    report.stage("run the whole float model")
    trunk = opened.simplified.trunk()
    everything = [frames.pixels[place : place + 1] for place in range(len(frames.pixels))]
    floating = prove.run_whole(trunk, report.track(everything, "float"), recipe.threads)
    chain, quantized = _chain(opened, chosen, frames, recipe, report)
    with staging(out, force=force) as scratch:
        bundle = _assemble(opened, chosen, chain, quantized, frames, floating, recipe, scratch, report)
        report.stage("time the segments on this machine")
        whole_ms, segment_ms = _profile(chain, everything[0], scratch)
        save(bundle.manifest, scratch)
        verify_files(load(scratch))
    return Exported(load(out), segment_ms, whole_ms)


def _chain(
    opened: Opened, chosen: Sequence[Cut], frames: FrameSet, recipe: Recipe, report: Report
) -> tuple[Chain, Quantized | None]:
    trunk, shapes = opened.simplified.trunk(), opened.simplified.shapes
    if recipe.target is None:
        report.stage("slice (float)")
        return slice_float(trunk, chosen, shapes), None
    report.stage(f"quantize for {recipe.target}")
    fit = frames.of("fit")
    ranges = channel_ranges(trunk, chosen, report.track(fit, "ranges"), recipe.threads)
    quantized = quantize(trunk, shapes, chosen, report.track(fit, "calibration"), ranges, recipe.target)
    report.note(RECIPES[quantized.recipe])
    report.stage("slice")
    return slice_quantized(quantized, chosen, shapes), quantized


def _assemble(
    opened: Opened,
    chosen: Sequence[Cut],
    chain: Chain,
    quantized: Quantized | None,
    frames: FrameSet,
    floating: np.ndarray[tuple[int, ...], np.dtype[np.float32]],
    recipe: Recipe,
    scratch: Path,
    report: Report,
) -> Bundle:
    """Write everything but the manifest into `scratch`, prove it, and return what the manifest is to say."""
    labels = _labels(opened)
    (scratch / LABELS).write_text("\n".join(labels) + "\n", "utf-8")
    for index, segment in enumerate(chain.segments):
        write(segment, scratch / f"segments/{index}.onnx")
    exact = quantized is not None
    draft = _draft(opened, chosen, chain, quantized, frames, recipe)
    bundle = Bundle(scratch, msgspec.structs.replace(draft, files=list_files(scratch)), "0" * 64, labels)

    report.stage("fit exit heads")
    fit, threshold = frames.roles["fit"], frames.roles["threshold"]
    seen = prove.replay(bundle, frames.of("fit"))
    wires = quantized.wires if quantized is not None else (None,) * len(chosen)
    for place, (cut, wire) in enumerate(zip(chosen, wires, strict=True)):
        name = f"exit{place + 1}"
        if cut.tensor in opened.own:
            whole = opened.simplified.whole
            model = exits.own_head(whole, opened.own[cut.tensor], cut.tensor, wire, cut.shape, name)
        else:
            pooled = np.concatenate([exits.pool(features, wire) for features in seen.features[place + 1]])
            head = exits.fit_head(pooled, floating[fit], frames.groups[fit])
            model = exits.head_model(head, wire, cut.shape, name)
        write(model, scratch / _exit_file(place + 1))
    del seen
    report.stage("choose temperatures and thresholds")
    specs = [_exit(place + 1) for place in range(len(chosen))]
    last = ExitSpec(cut=len(chosen) + 1, file=None, temperature=1.0, threshold=0.0, agreement=1.0)
    bundle = _with(bundle, exits=(*specs, last), files=list_files(scratch))
    seen = prove.replay(bundle, frames.of("threshold"))
    answers = floating[threshold].argmax(axis=1)
    specs = [
        exits.calibrate(spec.cut, _exit_file(spec.cut), seen.exit_logits[spec.cut], answers, recipe.agreement)
        for spec in specs
    ]
    bundle = _with(bundle, exits=(*specs, last))
    return _prove(bundle, chain, frames, floating, recipe, report, exact=exact)


def _prove(
    bundle: Bundle,
    chain: Chain,
    frames: FrameSet,
    floating: np.ndarray[tuple[int, ...], np.dtype[np.float32]],
    recipe: Recipe,
    report: Report,
    *,
    exact: bool,
) -> Bundle:
    judge = frames.of("judge")
    report.stage(f"prove on {len(judge)} held-back frames")
    reference = floating[frames.roles["judge"]]
    seen = prove.replay(bundle, judge)
    composed = np.concatenate(seen.features[-1])
    whole = prove.run_whole(chain.whole, report.track(judge, "whole"))
    proof = {"judge_frames": float(len(judge))}
    proof["parity_max_difference"] = prove.check_parity(composed, whole, exact=exact)
    proof["parity_bit_identical_ratio"] = float(np.mean((composed == whole).all(axis=1)))
    proof["logit_cosine"] = round(prove.check_meaning(whole, reference, recipe.min_cosine), 6)
    hits = int((whole.argmax(axis=1) == reference.argmax(axis=1)).sum())
    low, high = clopper_pearson(hits, len(judge))
    proof["whole_agreement"] = round(hits / len(judge), 6)
    proof["whole_agreement_low"], proof["whole_agreement_high"] = round(low, 6), round(high, 6)
    measured = prove.judge_exits(bundle, seen, reference)
    specs = tuple(msgspec.structs.replace(spec, measured=measured[spec.cut]) for spec in bundle.manifest.exits)
    cuts = prove.measure_codecs(bundle.manifest.cuts, seen.features)
    segments = _batches(bundle, chain, seen, exact=exact)
    bundle = _with(bundle, exits=specs, cuts=cuts, segments=segments)
    proof |= prove.judge_cascade(bundle, judge, reference)
    golden = {"frames": np.concatenate(judge[:GOLDEN_FRAMES])}
    golden |= {
        f"cut_{cut}": np.concatenate(seen.features[cut][:GOLDEN_FRAMES]) for cut in range(1, len(seen.features))
    }
    write_arrays(bundle.path / GOLDEN, golden)
    return _with(bundle, proof=proof, files=list_files(bundle.path))


def _batches(bundle: Bundle, chain: Chain, seen: prove.Replayed, *, exact: bool) -> tuple[SegmentSpec, ...]:
    """Each segment with the largest batch for which it, and the exit head behind it, answers as alone."""
    import onnx

    specs = []
    for index, spec in enumerate(bundle.manifest.segments):
        size = prove.largest_batch(chain.segments[index], seen.features[index], exact=exact)
        exit_spec = bundle.exit_at(index + 1)
        if exit_spec is not None and exit_spec.file is not None:
            head = onnx.load(bundle.path / exit_spec.file)
            size = min(size, prove.largest_batch(head, seen.features[index + 1], exact=False))
        specs.append(msgspec.structs.replace(spec, max_batch_size=size))
    return tuple(specs)


def _profile(chain: Chain, frame: np.ndarray[tuple[int, ...], np.dtype[np.uint8]], scratch: Path) -> tuple[float, tuple[float, ...]]:
    """Times differ from machine to machine and from run to run, so they lie beside the manifest."""
    whole_ms = round(timing.run_ms(chain.whole, frame), 3)
    segment_ms = tuple(timing.time_segments(chain.segments, frame))
    profile = {"machine": timing.machine(), "threads": 1, "whole_ms": whole_ms, "segment_ms": segment_ms}
    (scratch / "profile.json").write_bytes(msgspec.json.format(msgspec.json.encode(profile), indent=1))
    return whole_ms, segment_ms


def _draft(
    opened: Opened,
    chosen: Sequence[Cut],
    chain: Chain,
    quantized: Quantized | None,
    frames: FrameSet,
    recipe: Recipe,
) -> Manifest:
    total = sum(_macs(opened, chosen))
    ends = [cut.macs for cut in chosen]
    return Manifest(
        format=FORMAT,
        name=recipe.name or opened.source.name,
        task="classify",
        labels=LABELS,
        preprocess=opened.source.preprocess,
        segments=tuple(
            SegmentSpec(file=f"segments/{index}.onnx", macs=macs) for index, macs in enumerate(_macs(opened, chosen))
        ),
        cuts=tuple(
            CutSpec(after=after, tensor=tensor, shape=shape, dtype=dtype)
            for after, tensor, shape, dtype in zip(
                ("the camera", *(cut.after for cut in chosen), "the last layer"),
                (chain.wires[0], *(cut.tensor for cut in chosen), chain.wires[-1]),
                chain.shapes,
                chain.dtypes,
                strict=True,
            )
        ),
        exits=(ExitSpec(cut=len(chosen) + 1, file=None, temperature=1.0, threshold=0.0, agreement=1.0),),
        tiers=share_tiers(recipe.tiers, [end / total for end in ends]),
        golden=GOLDEN,
        proof={},
        provenance=Provenance(
            source=opened.source.origin,
            tools={tool: version(tool) for tool in TOOLS} | {"python": platform.python_version()},
            target="float" if recipe.target is None else recipe.target,
            quantization="none" if quantized is None else RECIPES[quantized.recipe],
            opset=opset(chain.whole),
            seed=recipe.seed,
            frames={role: len(positions) for role, positions in frames.roles.items()},
            frames_sha256=frames.sha256,
        ),
        files=(),
    )


def share_tiers(names: Sequence[str], ends: Sequence[float]) -> tuple[TierSpec, ...]:
    """Share segments, which end at these shares of the work, among tiers: as even as the cuts allow.

    With fewer segments than tiers the last tiers get none and are left out.
    """
    segments = len(ends) + 1
    used = names[:segments]
    tiers: list[TierSpec] = []
    first = 0
    for place, name in enumerate(used[:-1]):
        wanted = (place + 1) / len(used)
        # Every later tier needs a segment of its own.
        possible = range(first, segments - (len(used) - place - 1))
        last = min(possible, key=lambda index: abs(ends[index] - wanted))
        tiers.append(TierSpec(name=name, last_segment=last))
        first = last + 1
    return (*tiers, TierSpec(name=used[-1], last_segment=segments - 1))


def _macs(opened: Opened, chosen: Sequence[Cut]) -> list[int]:
    total = round(opened.cuts[-1].macs / opened.cuts[-1].macs_ratio) if opened.cuts[-1].macs else 0
    ends = [0, *(cut.macs for cut in chosen), total]
    return [end - start for start, end in zip(ends, ends[1:], strict=False)]


def _labels(opened: Opened) -> tuple[str, ...]:
    classes = opened.simplified.classes
    labels = opened.source.labels
    if labels is None:
        return tuple(f"class {index}" for index in range(classes))
    if len(labels) != classes:
        raise BundleError(f"{opened.source.name} has {classes} classes but {len(labels)} labels; make them equal")
    return tuple(label.replace("\n", " ") for label in labels)


def _exit_file(cut: int) -> str:
    return f"exits/{cut}.onnx"


def _exit(cut: int) -> ExitSpec:
    return ExitSpec(cut=cut, file=_exit_file(cut), temperature=1.0, threshold=None, agreement=1.0)


def _with(bundle: Bundle, **fields: object) -> Bundle:
    manifest = msgspec.structs.replace(bundle.manifest, **fields)
    return Bundle(bundle.path, manifest, bundle.id, bundle.labels)


def time_cuts(opened: Opened, recipe: Recipe, report: Report) -> dict[str, list[timing.Timed]]:
    """Time the model before and after every cut: float, and int8 unless the recipe says float.

    Without frames the int8 model is calibrated on noise: its answers would be worthless, its speed is the same.
    """
    trunk, shapes, cuts = opened.simplified.trunk(), opened.simplified.shapes, opened.cuts
    frame = timing.noise(shapes[trunk.graph.input[0].name][1:], recipe.seed)
    report.stage("time every cut, float")
    wires = range(1, len(cuts) + 1)
    timed = {"float": timing.time_chain(slice_float(trunk, cuts, shapes), report.track(wires, "float"), frame)}
    if recipe.target is not None:
        report.stage(f"time every cut, int8 for {recipe.target}")
        if recipe.frames:
            frames = load_frames(recipe.frames, opened.source.preprocess, min(recipe.max_frames, 50), recipe.seed)
            sample = frames.of("fit")
        else:
            sample = [frame]
        ranges = channel_ranges(trunk, cuts, sample, recipe.threads)
        quantized = quantize(trunk, shapes, cuts, sample, ranges, recipe.target)
        chain = slice_quantized(quantized, cuts, shapes)
        timed["int8"] = timing.time_chain(chain, report.track(wires, "int8"), frame)
    return timed
