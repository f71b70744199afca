"""What a detector's answer is made of, as numbers whose squared changes count: before rows are chosen and suppressed.

How much an answer cares about features is asked by small changes of them (`sensitivity`), which choosing rows hides.
So the candidates are taken before, in coordinates in which every direction counts alike: a score p as 2 asin √p, whose
Fisher information is 1 (the variance-stabilizing transform of a proportion, Anscombe 1948), and the sides of a box in
shares of a tenth of its own size, times the root of how likely something is there. Half the squared distance of two
frames' evidence is then about the divergence, in nats, of what is said there, as of independent events and of corners
that are known to a tenth of a box.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from numpy.typing import NDArray
from onnx import ModelProto, helper

from export.graph import FRAME, constant, copy_of, finish
from runtime.datatypes import Tensor
from runtime.segment_onnx import session_options

EVIDENCE = "evidence"
PREFIX = "kinflow/evidence/"
MOST_FRAMES = 100
LEAST = 1e-5  # of a score: the root's slope has no end at 0
WORTH = 0.02  # candidates that never scored so high on the fit frames say nothing
MOST = 4096  # scores, and boxes, that are kept
KNOWN = 0.1  # of a box's size: how well its corners are meant to be known


def evidence_model(raw: ModelProto, frames: Sequence[Tensor]) -> ModelProto:
    """The graph FRAME → EVIDENCE, float32 (batch, n).

    Args:
        raw: FRAME → candidates (batch, count, 4 + classes), boxes x1, y1, x2, y2 in shares, and scores.
        frames: of the fit part, each uint8 (1, height, width, 3): what is likely where.
    """
    session = ort.InferenceSession(raw.SerializeToString(), session_options(1))
    places = np.linspace(0, len(frames) - 1, min(len(frames), MOST_FRAMES)).round().astype(int)
    seen = [session.run(None, {FRAME: frames[place]})[0][0] for place in places]
    likely = np.mean([table[:, 4:] for table in seen], axis=0)  # (count, classes)
    highest = np.max([table[:, 4:] for table in seen], axis=0)
    sides = np.mean([np.abs(table[:, [2, 3]] - table[:, [0, 1]]) for table in seen], axis=0)  # (count, 2)
    model = copy_of(raw)
    columns = raw.graph.output[0].name
    count, classes = likely.shape
    scored = _highest(highest.ravel())
    boxed = _highest(highest.max(axis=1))
    # Weights are those of the mean, since a weight that moved with a score would count the score by the box's place.
    weights = np.sqrt(likely.max(axis=1)[boxed])[:, np.newaxis] / (KNOWN * np.maximum(sides[boxed], 1e-3))
    flat: dict[str, NDArray[Any]] = {
        "scores": np.array([place // classes * (4 + classes) + 4 + place % classes for place in scored], np.int64),
        "boxes": np.array([place * (4 + classes) + side for place in boxed for side in range(4)], np.int64),
        "shape": np.array([-1, count * (4 + classes)], np.int64),
        "weights": np.concatenate([weights, weights], axis=1).astype(np.float32).reshape(1, -1),
        "least": np.array(LEAST, np.float32),
        "most": np.array(1 - LEAST, np.float32),
        "twice": np.array(2, np.float32),
    }
    model.graph.initializer.extend(constant(f"{PREFIX}{name}", value) for name, value in flat.items())
    steps: list[tuple[str, list[str], str, dict[str, Any]]] = [
        ("Reshape", [columns, "shape"], "flat", {}),
        ("Gather", ["flat", "scores"], "p", {"axis": 1}),
        ("Clip", ["p", "least", "most"], "inside", {}),
        ("Sqrt", ["inside"], "root", {}),
        ("Asin", ["root"], "angle", {}),
        ("Mul", ["angle", "twice"], "stable", {}),
        ("Gather", ["flat", "boxes"], "corners", {"axis": 1}),
        ("Mul", ["corners", "weights"], "weighed", {}),
        ("Concat", ["stable", "weighed"], EVIDENCE, {"axis": 1}),
    ]
    known = {columns, EVIDENCE}
    for op_type, inputs, output, attributes in steps:
        names = [name if name in known else f"{PREFIX}{name}" for name in inputs]
        made = output if output in known else f"{PREFIX}{output}"
        model.graph.node.append(helper.make_node(op_type, names, [made], f"{PREFIX}{op_type}_{output}", **attributes))
    size = len(flat["scores"]) + len(flat["boxes"])
    del model.graph.output[:]
    model.graph.output.append(helper.make_tensor_value_info(EVIDENCE, onnx.TensorProto.FLOAT, ["batch", size]))
    return finish(model)


def _highest(scores: NDArray[np.floating]) -> NDArray[np.int64]:
    """The places of at most MOST scores worth keeping, and of one at least, rising."""
    order = np.argsort(-scores, kind="stable")[:MOST]
    kept = order[scores[order] >= WORTH]
    return np.sort(kept if len(kept) else order[:1])
