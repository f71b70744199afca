"""Writes down what a bundle's manifest says before anything was measured: segments, cuts, tiers, provenance."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from importlib.metadata import version
from itertools import pairwise

from export.bundle import GOLDEN, LABELS
from export.cuts import Cut
from export.frames import FrameSet
from export.graph import opset
from export.quantize import RECIPES, Quantized
from export.recipe import Opened, Recipe
from export.slicing import Chain
from runtime.errors import BundleError
from runtime.manifest import FORMAT, CutSpec, ExitSpec, Manifest, Provenance, SegmentSpec, TierSpec

INDEPENDENT = "taken as independent"
TOOLS = ("kinflow", "numpy", "onnx", "onnxruntime", "onnxslim", "torch")


def draft(
    opened: Opened,
    chosen: Sequence[Cut],
    chain: Chain,
    quantized: Quantized | None,
    frames: FrameSet,
    recipe: Recipe,
) -> Manifest:
    """The manifest of a bundle whose exits are yet to be made: the model's own exit is the only one."""
    ends = [0, *(cut.macs for cut in chosen), opened.macs]
    return Manifest(
        format=FORMAT,
        name=recipe.name or opened.source.name,
        task=recipe.task,
        labels=LABELS,
        preprocess=opened.source.preprocess,
        segments=tuple(
            SegmentSpec(file=segment_file(index), macs=end - start) for index, (start, end) in enumerate(pairwise(ends))
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
        exits=(last_exit(len(chosen) + 1),),
        tiers=share_tiers(recipe.tiers, [cut.macs_ratio for cut in chosen]),
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
            options=_options(recipe),
        ),
        files=(),
        settings=recipe.settings,
    )


def _options(recipe: Recipe) -> dict[str, str]:
    """What has to be said again to open the same detector, and what the promises of exits rest on."""
    detector = recipe.input.detector
    known: dict[str, str | None] = {"frames": INDEPENDENT if recipe.assume_independent else None}
    if detector is not None:
        known |= {"iou": f"{detector.iou_threshold:g}", "boxes": detector.boxes}
    return {name: value for name, value in known.items() if value is not None}


def last_exit(cut: int) -> ExitSpec:
    """The model's own exit: it answers whatever comes."""
    return ExitSpec(cut=cut, file=None, temperature=1.0, threshold=0.0, agreement=1.0)


def segment_file(index: int) -> str:
    """Where segment `index` lies in the bundle."""
    return f"segments/{index}.onnx"


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


def labels_of(opened: Opened) -> tuple[str, ...]:
    """One label a class; numbers where the source knows no names."""
    classes = opened.simplified.classes
    labels = opened.source.labels
    if labels is None:
        return tuple(f"class {index}" for index in range(classes))
    if len(labels) != classes:
        raise BundleError(f"{opened.source.name} has {classes} classes but {len(labels)} labels; make them equal")
    return tuple(label.replace("\n", " ") for label in labels)
