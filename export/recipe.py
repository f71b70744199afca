"""What decides a bundle, and the model it is made from: opened, simplified, every cut found."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from onnx import ModelProto

from export import exits, timing
from export.cuts import Cut, default_cuts, list_cuts, named_cuts
from export.detector import simplify_detector
from export.frames import FrameSource, load_frames
from export.graph import macs
from export.quantize import quantize
from export.report import Report
from export.simplify import Simplified, simplify
from export.slicing import slice_float, slice_quantized
from export.source import InputOptions, Source, open_source
from export.wires import channel_ranges
from runtime.errors import BundleError

DEFAULT_TIERS = ("device", "edge", "cloud")


@dataclass(frozen=True, slots=True)
class Recipe:
    """Everything that decides a bundle."""

    model: str
    frames: tuple[FrameSource, ...]
    input: InputOptions = field(default_factory=InputOptions)
    tiers: tuple[str, ...] = DEFAULT_TIERS
    cuts: tuple[str, ...] = ()  # empty: the default rule
    task: str = "classify"  # a key of runtime.task.TASKS
    settings: dict[str, Any] = field(default_factory=dict)  # the task's own, for the manifest
    agreement: float = 0.98
    assume_independent: bool = False  # frames of clips, in the tests behind the exits' promises
    heads: Literal["auto", "linear", "branch"] = "auto"
    labels: Path | None = None  # a file with the true class of each picture
    sensitivity: Literal["gradients", "probes"] = "gradients"
    refine_minutes: float = 0.0
    variants: int = 0  # of the first segment, at most so many
    target: str | None = "x86-vnni"  # None: float
    min_likeness: float | None = None  # None: what the task asks
    max_frames: int = 2000
    seed: int = 0
    name: str | None = None
    threads: int = 1


@dataclass(frozen=True, slots=True)
class Opened:
    """A model, ready to be cut."""

    source: Source
    simplified: Simplified
    cuts: tuple[Cut, ...]
    macs: int  # of the whole trunk, for one frame
    own: dict[str, str]  # tensor of a cut → the model's own exit that hangs there
    raw: ModelProto | None = None  # of a detector: FRAME → its candidates; None: they were not found
    evidence: ModelProto | None = None  # FRAME → what its answers are made of; made of `raw` once there are frames


def open_model(model: str, options: InputOptions, report: Report) -> Opened:
    """Open a model, bring it into the one form and find its cuts.

    Raises:
        BundleError: it cannot be read or cut.
    """
    report.stage(f"open {model}")
    source = open_source(model, options)
    report.stage("simplify and find every cut")
    raw = None
    if options.detector is None:
        simplified = simplify(source)
    else:
        detector = simplify_detector(source, options.detector)
        source, simplified, raw = detector.source, detector.simplified, detector.raw
        noun = "class" if simplified.classes == 1 else "classes"
        report.note(f"a detector of {simplified.classes} {noun}, outputs: {detector.layout}")
    trunk = simplified.trunk()
    cuts = list_cuts(trunk, simplified.shapes)
    if not cuts:
        raise BundleError(f"{source.name} has no place to be cut: no tensor alone separates its input from its output")
    tensors = [cut.tensor for cut in cuts]
    own: dict[str, str] = {}
    for output in simplified.exits:
        tensor = exits.own_exit_cut(simplified.whole, output, tensors)
        if tensor is None:
            raise BundleError(
                f"the model's own exit {output} hangs at no cut; let it read what all of the rest reads too"
            )
        own[tensor] = output
    report.note(f"{len(cuts)} cuts, {len(own)} exits of its own, batch {'open' if simplified.batchable else 'fixed'}")
    total = sum(macs(node, simplified.shapes) for node in trunk.graph.node)
    return Opened(source, simplified, tuple(cuts), total, own, raw)


def choose_cuts(opened: Opened, recipe: Recipe) -> list[Cut]:
    """The cuts of the command line, else those of the model's own exits, else by the default rule."""
    if recipe.cuts:
        return named_cuts(opened.cuts, recipe.cuts)
    own = [cut for cut in opened.cuts if cut.tensor in opened.own]
    return own or default_cuts(opened.cuts, len(recipe.tiers))


def time_cuts(opened: Opened, recipe: Recipe, report: Report) -> dict[str, list[timing.Timed]]:
    """Time the model before and after every cut: float, and int8 unless the recipe says float.

    Without frames the int8 model is calibrated on noise: its answers would be worthless, its speed is the same.
    """
    trunk, shapes, cuts = opened.simplified.trunk(), opened.simplified.shapes, opened.cuts
    frame = timing.noise(shapes[trunk.graph.input[0].name][1:], recipe.seed)
    report.stage("time every cut, float")
    wires = range(1, len(cuts) + 1)
    timed = {"float": timing.time_cuts(slice_float(trunk, cuts, shapes), report.track(wires, "float"), frame)}
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
        timed["int8"] = timing.time_cuts(chain, report.track(wires, "int8"), frame)
    return timed
