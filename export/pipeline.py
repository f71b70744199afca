"""The stages of an export, in order: open, simplify, cut, read frames, quantize, slice, fit exits,
fit codecs, prove, write."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec
import numpy as np
import onnx
from numpy.typing import NDArray

from export import prove, timing
from export.agreement import pooled
from export.atlas_stage import write_atlas
from export.bundle import CALIBRATION, GOLDEN, LABELS, check_out, list_files, staging, write_arrays
from export.codecs import fit_codecs, measure_codecs
from export.cuts import Cut
from export.draft import draft, labels_of, last_exit, segment_file
from export.evidence import evidence_model
from export.exits_judge import accuracy
from export.exits_stage import Trunk, choose_points, exits_ms, fit_exits
from export.frames import FrameSet, load_frames
from export.gate_stage import fit_gate
from export.graph import write
from export.labels import read_labels
from export.quantize import RECIPES, Quantized, quantize
from export.recipe import Opened, Recipe, choose_cuts, open_model
from export.report import Report
from export.slicing import Chain, slice_float, slice_quantized
from export.task import open_judge
from export.variants import add_variants, times_ms
from export.wires import channel_ranges
from runtime.manifest import Bundle, SegmentSpec, load, save, verify_files

GOLDEN_FRAMES = 4
CALIBRATING = 500  # fit frames that the quantizer looks at, at most: more of them hardly widen its ranges


@dataclass(frozen=True, slots=True)
class Exported:
    """A bundle that was written, and how fast its segments ran here."""

    bundle: Bundle
    segment_ms: tuple[float, ...]
    whole_ms: float


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
    labels = None if recipe.labels is None else read_labels(recipe.labels, frames.names, labels_of(opened))
    report.note(", ".join(f"{len(positions)} {role}" for role, positions in frames.roles.items()))
    if opened.raw is not None:
        opened = replace(opened, evidence=evidence_model(opened.raw, frames.of("fit")))
    report.stage("run the whole float model")
    trunk = opened.simplified.trunk()
    everything = [frames.pixels[place : place + 1] for place in range(len(frames.pixels))]
    floating = prove.run_whole(trunk, report.track(everything, "float"), recipe.threads)
    chain, quantized = _chain(opened, chosen, frames, recipe, report)
    with staging(out, force=force) as scratch:
        bundle = _assemble(opened, chosen, chain, quantized, frames, floating, labels, recipe, scratch, report)
        report.stage("time the segments on this machine")
        whole_ms, segment_ms = _profile(chain, bundle, everything[0], scratch)
        save(bundle.manifest, scratch)
        staged = load(scratch)
        verify_files(staged)
        write_atlas(staged, frames, trunk, recipe, whole_ms, report)
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
    fit = fit[:: -(-len(fit) // CALIBRATING)]
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
    floating: NDArray[np.float32],
    labels: NDArray[np.int64] | None,
    recipe: Recipe,
    scratch: Path,
    report: Report,
) -> Bundle:
    """Write everything but the manifest into `scratch`, prove it, and return what the manifest is to say."""
    names = labels_of(opened)
    (scratch / LABELS).write_text("\n".join(names) + "\n", "utf-8")
    (scratch / CALIBRATION).write_text(frames.calibration(), "ascii")
    for index, segment in enumerate(chain.segments):
        write(segment, scratch / segment_file(index))
    exact = quantized is not None
    first = draft(opened, chosen, chain, quantized, frames, recipe)
    bundle = Bundle(scratch, msgspec.structs.replace(first, files=list_files(scratch)), "0" * 64, names)

    report.stage("fit exit heads")
    trunk = Trunk(opened, chosen, chain, quantized.wires if quantized is not None else (None,) * len(chosen))
    fitted = fit_exits(trunk, bundle, frames, recipe, report)
    report.stage("choose thresholds")
    last = last_exit(len(chosen) + 1)
    bundle = _with(bundle, exits=(*(made.spec for made in fitted), last), files=list_files(scratch))
    specs, notes = choose_points(fitted, trunk, bundle, frames, floating, recipe)
    for note in notes:
        report.note(note)
    bundle = _with(bundle, exits=(*specs, last))
    cuts = fit_codecs(opened, chosen, trunk.wires, bundle, frames, floating, recipe, report)
    bundle = _with(bundle, cuts=cuts, files=list_files(scratch))
    gate = fit_gate(bundle, [source.path for source in recipe.frames], frames, floating, report)
    bundle = _with(bundle, gate=gate)
    bundle = add_variants(bundle, trunk, fitted, frames, floating, labels, recipe, report)
    return _prove(bundle, chain, frames, floating, labels, recipe, report, exact=exact)


def _prove(
    bundle: Bundle,
    chain: Chain,
    frames: FrameSet,
    floating: NDArray[np.float32],
    labels: NDArray[np.int64] | None,
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
    judging = open_judge(bundle)
    proof[judging.proof] = round(prove.check_meaning(judging, whole, reference, recipe.min_likeness), 6)
    share = pooled(judging.marks(whole, reference))
    proof["whole_agreement"] = round(share.share, 6)
    proof["whole_agreement_low"], proof["whole_agreement_high"] = round(share.low, 6), round(share.high, 6)
    truth = None if labels is None else labels[frames.roles["judge"]]
    if truth is not None:
        for name, logits in (("float", reference), ("whole", whole)):
            right, low, high = accuracy(judging.keys(logits), truth)
            proof |= {f"{name}_accuracy": round(right, 6), f"{name}_accuracy_low": round(low, 6)}
            proof[f"{name}_accuracy_high"] = round(high, 6)
    specs = prove.judge_exits(bundle, np.concatenate(judge), reference, truth)
    cuts = measure_codecs(bundle, seen.features, reference, report)
    segments = _batches(bundle, chain, seen, exact=exact)
    bundle = _with(bundle, exits=specs, cuts=cuts, segments=segments)
    proof |= prove.judge_cascade(bundle, judge, reference)
    golden = {"frames": np.concatenate(judge[:GOLDEN_FRAMES])}
    golden |= {f"cut_{cut}": np.concatenate(seen.features[cut][:GOLDEN_FRAMES]) for cut in range(1, len(seen.features))}
    write_arrays(bundle.path / GOLDEN, golden)
    return _with(bundle, proof=proof, files=list_files(bundle.path))


def _batches(bundle: Bundle, chain: Chain, seen: prove.Replayed, *, exact: bool) -> tuple[SegmentSpec, ...]:
    """Each segment with the largest batch for which it, and the exit head behind it, answers as alone."""
    specs = []
    for index, spec in enumerate(bundle.manifest.segments):
        size = prove.largest_batch(chain.segments[index], seen.features[index], exact=exact)
        exit_spec = bundle.exit_at(index + 1)
        if exit_spec is not None and exit_spec.file is not None:
            head = onnx.load(bundle.path / exit_spec.file)
            size = min(size, prove.largest_batch(head, seen.features[index + 1], exact=False))
        specs.append(msgspec.structs.replace(spec, max_batch_size=size))
    return tuple(specs)


def _profile(chain: Chain, bundle: Bundle, frame: NDArray[np.uint8], scratch: Path) -> tuple[float, tuple[float, ...]]:
    """Times differ from machine to machine and from run to run, so they lie beside the manifest."""
    whole_ms, segment_ms = timing.time_chain(chain, frame)
    profile = {"machine": timing.machine(), "threads": 1, "whole_ms": whole_ms, "segment_ms": segment_ms}
    profile["variant_ms"] = times_ms(bundle, frame)
    profile["exit_ms"] = exits_ms(bundle, frame)
    (scratch / "profile.json").write_bytes(msgspec.json.format(msgspec.json.encode(profile), indent=1))
    return whole_ms, segment_ms


def _with(bundle: Bundle, **fields: object) -> Bundle:
    manifest = msgspec.structs.replace(bundle.manifest, **fields)
    return Bundle(bundle.path, manifest, bundle.id, bundle.labels)
