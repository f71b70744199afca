"""Which heads an exit may get: the model's own, linear ones on pooled features or behind a branch, or the task's own.

A branch is the trunk's next layers: as they are (in an int8 bundle in int8), or made smaller (`export.lowrank`), which
reaches deeper for the same cost.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import onnxruntime as ort
from onnx import ModelProto

from export.cuts import Cut
from export.exits import POOLINGS, Pooling, Shapes, branch, branch_front, own_head, own_part, pooled_front
from export.frames import FrameSet
from export.graph import FRAME, LOGITS, Shape, extract, tensor_info
from export.lowrank import decompose
from export.quantize import quantize_part, recipe_of
from export.recipe import Opened, Recipe
from export.slicing import Chain, on_wire
from export.task import Judge
from export.wires import Wire
from runtime.datatypes import Tensor
from runtime.segment_onnx import session_options

BRANCHES = (0.1, 0.2, 0.35)  # multiply-accumulates of a branch, as shares of those behind its cut
SMALLER = 0.5  # what is left of the multiply-accumulates of a branch that is made smaller
SAMPLE = 48  # fit frames that it is made smaller by, and that a model's own exit is quantized by
OWN_SAMPLE = 320  # fit frames that a head of the task's own kind is fitted on
BEHIND: Pooling = "moments"  # a branch


@dataclass(frozen=True, slots=True)
class Trunk:
    """What the exits hang on."""

    opened: Opened
    chosen: Sequence[Cut]
    chain: Chain
    wires: Sequence[Wire | None]

    def at(self, place: int) -> tuple[Wire | None, Shape]:
        """How the features stand on the wire at a chosen cut."""
        return self.wires[place], on_wire(self.chosen[place].shape)


@dataclass(slots=True)
class Candidate:
    """A head that may be the best at its cut, and what its front made of the fit frames and their copies."""

    kind: str
    front: ModelProto  # of a model's own exit: the whole head
    own: bool = False
    rows: list[Tensor] = field(default_factory=list)


def candidates_at(trunk: Trunk, place: int, frames: FrameSet, judge: Judge, recipe: Recipe) -> list[Candidate]:
    """Every head that is to be tried at a chosen cut, the cheapest first."""
    cut = trunk.chosen[place]
    wire, shape = trunk.at(place)
    own = trunk.opened.own.get(cut.tensor)
    if own is not None:
        part = own_part(trunk.opened.simplified.whole, own, cut.tensor, cut.shape, f"exit{place + 1}")
        kind = recipe_of(trunk.opened.simplified.trunk())
        if recipe.target is not None and wire is not None and kind == "convolutional":
            part = quantize_part(part, _features(trunk, cut, frames, recipe), kind, recipe.target, wire, None)
        return [Candidate("the model's own exit", own_head(part, wire, cut.shape), own=True)]
    poolings: list[Pooling] = ["mean"]
    if recipe.heads != "linear" and len(shape) > 1:
        poolings += ["moments", "grid"]
    pooled = [Candidate(POOLINGS[pooling], pooled_front(wire, shape, pooling)) for pooling in poolings]
    pooled += _of_the_task(trunk, place, frames, judge, recipe)
    branches = [] if recipe.heads == "linear" else _branches(trunk, place, frames, recipe)
    return branches if recipe.heads == "branch" and branches else pooled + branches


def _of_the_task(trunk: Trunk, place: int, frames: FrameSet, judge: Judge, recipe: Recipe) -> list[Candidate]:
    """A head of the task's own kind, where it has one."""
    if judge.front_kind is None:
        return []
    fit = frames.of("fit")
    fit = fit[:: max(1, len(fit) // OWN_SAMPLE)][:OWN_SAMPLE]
    features = _features(trunk, trunk.chosen[place], frames, recipe, OWN_SAMPLE)
    session = ort.InferenceSession(trunk.opened.simplified.trunk().SerializeToString(), session_options(recipe.threads))
    outputs = [session.run([LOGITS], {FRAME: frame})[0] for frame in fit]
    front = judge.front(*trunk.at(place), np.concatenate(features), np.concatenate(outputs))
    return [] if front is None else [Candidate(judge.front_kind, front)]


def _branches(trunk: Trunk, place: int, frames: FrameSet, recipe: Recipe) -> list[Candidate]:
    """Heads behind the trunk's next layers, up to the next chosen cut; the longest also made smaller."""
    cut, wire = trunk.chosen[place], trunk.wires[place]
    found: list[Candidate] = []
    ends = _ends(trunk, place)
    for end in ends:
        kind = trunk.chain.dtypes[place + 1]
        shapes = cut.shape, end.shape
        layers = branch(trunk.chain.whole, trunk.chain.wires[place + 1], end.tensor, kind, shapes)
        found.append(Candidate(f"{POOLINGS[BEHIND]} behind {end.after}", branch_front(layers, wire, shapes, BEHIND)))
    if ends:
        found.append(_smaller(trunk, cut, ends[-1], wire, frames, recipe))
    return found


def _ends(trunk: Trunk, place: int) -> list[Cut]:
    """Where branches end: each the cut with nearest to its share of the work behind the one they hang at."""
    cut, total = trunk.chosen[place], trunk.opened.macs
    behind = trunk.chosen[place + 1].index if place + 1 < len(trunk.chosen) else len(trunk.opened.cuts) + 1
    made = {tensor for node in trunk.chain.whole.graph.node for tensor in node.output}
    deeper = [
        other
        for other in trunk.opened.cuts
        if cut.index < other.index < behind and other.macs > cut.macs and other.tensor in made
    ]
    wanted = {
        min(deeper, key=lambda other: abs(other.macs - cut.macs - share * (total - cut.macs))).index
        for share in BRANCHES
        if deeper
    }
    return [other for other in deeper if other.index in wanted]


def _smaller(trunk: Trunk, cut: Cut, end: Cut, wire: Wire | None, frames: FrameSet, recipe: Recipe) -> Candidate:
    inputs = _features(trunk, cut, frames, recipe)
    shapes: Shapes = cut.shape, end.shape
    whole = trunk.opened.simplified.trunk()
    layers = decompose(branch(whole, cut.tensor, end.tensor, "float32", shapes), inputs, SMALLER, seed=recipe.seed)
    return Candidate(f"{POOLINGS[BEHIND]} behind {end.after} made smaller", branch_front(layers, wire, shapes, BEHIND))


def _features(trunk: Trunk, cut: Cut, frames: FrameSet, recipe: Recipe, most: int = SAMPLE) -> list[Tensor]:
    """What the float model has at a cut for some of the fit frames, each (1, …)."""
    whole = trunk.opened.simplified.trunk()
    before = extract(whole, list(whole.graph.input), [tensor_info(cut.tensor, "float32", cut.shape)], "before")
    session = ort.InferenceSession(before.SerializeToString(), session_options(recipe.threads))
    fit = frames.of("fit")
    step = max(1, len(fit) // most)
    return [session.run(None, {FRAME: frame})[0] for frame in fit[::step][:most]]
