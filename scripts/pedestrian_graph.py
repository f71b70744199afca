"""Puts the pedestrian detector together: the network's heads, boxes from anchors, non-maximum suppression.

Pure. The layout is that of TensorFlow's detection API, the most common one of SSD detectors: detection_boxes
(1, 100, 4) as ymin, xmin, ymax, xmax in shares of the image, detection_scores and detection_classes (1, 100), the
first class being 1, and num_detections (1).
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np
import onnx
import onnxslim
from numpy.typing import NDArray
from onnx import ModelProto, TensorProto, helper

from export.detector_rows import ROWS, Builder, Candidates, suppress
from export.graph import copy_of, finish, rename

SIZE = 300
INPUT = "image"
FIELDS = ("detection_boxes", "detection_scores", "detection_classes", "num_detections")
LABELS = ("person",)
TOLD = 0.05  # rows below this score are noise, and come in any order
IOU_THRESHOLD = 0.6  # as in the frozen graph, read from its own constants
LEAST_SCORE = 1e-8
BOX_SCALES = (10.0, 10.0, 5.0, 5.0)  # of encoded y, x, height, width
PERSON = 1  # class of the two logits; 0 is the background
# How TensorFlow's scopes are called in listings of cuts; numbers after a point are those of blocks.
SCOPES = (
    (r"FeatureExtractor/MobilenetV2/expanded_conv_(\d+)", r"block.\1"),
    (r"FeatureExtractor/MobilenetV2/expanded_conv", "block.0"),
    (r"FeatureExtractor/MobilenetV2/layer_19_(\d)_Conv2d_(\d)_\dx\d(?:_s\d)?_\d+", r"extra.\2/\1"),
    (r"FeatureExtractor/MobilenetV2/Conv_1", "last"),
    (r"FeatureExtractor/MobilenetV2/Conv", "stem"),
    (r"BoxPredictor_(\d+)", r"head.\1"),
)


@dataclass(frozen=True, slots=True)
class Answers:
    """What a detector says of frames: float32 (frames, 100, 4), (frames, 100), (frames, 100), (frames,)."""

    boxes: NDArray[np.float32]
    scores: NDArray[np.float32]
    classes: NDArray[np.float32]
    number: NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Differences:
    """The greatest differences between two answers."""

    scores: float  # of all rows
    boxes: float  # of rows with a score of TOLD; infinite where their classes differ
    rows: int  # that are told


def differences(said: Answers, wanted: Answers) -> Differences:
    """Compare row by row."""
    told = wanted.scores >= TOLD
    boxes = float(np.abs(said.boxes - wanted.boxes)[told].max(initial=0.0))
    if not np.array_equal(said.classes[told], wanted.classes[told]):
        boxes = np.inf
    return Differences(float(np.abs(said.scores - wanted.scores).max(initial=0.0)), boxes, int(told.sum()))


def assemble(heads: ModelProto, anchors: NDArray[np.float32]) -> ModelProto:
    """The whole detector.

    Args:
        heads: pixels scaled to -1..1, (1, 3, 300, 300) → encoded boxes (1, anchors, 1, 4), logits (1, anchors, 2).
        anchors: (anchors, 4), ymin, xmin, ymax, xmax in shares of the image.
    """
    model: ModelProto = onnxslim.slim(copy_of(heads))
    rename_scopes(model)
    rename(model, model.graph.input[0].name, INPUT)
    boxes, logits = (output.name for output in model.graph.output)
    build = Builder(prefix="detect/")
    scores = build.add("Sigmoid", build.columns(logits, PERSON))
    candidates = Candidates(decode(build, boxes, anchors), scores, len(anchors), classes=1)
    rows = suppress(build, candidates, IOU_THRESHOLD, LEAST_SCORE)
    scored = build.add("Squeeze", build.columns(rows, 4), build.ints(2))
    numbered = build.add("Add", build.columns(rows, 5), build.scalar(1.0))
    found = build.add("Cast", build.add("Greater", scored, build.scalar(0.0)), to=TensorProto.FLOAT)
    fields = {
        # TensorFlow clips boxes after suppressing, not before.
        "detection_boxes": build.add("Clip", build.columns(rows, 0, 1, 2, 3), build.scalar(0.0), build.scalar(1.0)),
        "detection_scores": scored,
        "detection_classes": build.add("Squeeze", numbered, build.ints(2)),
        "num_detections": build.add("ReduceSum", found, build.ints(1), keepdims=0),
    }
    for name, made in fields.items():
        build.nodes.append(helper.make_node("Identity", [made], [name], f"detect/{name}"))
    build.append_to(model)
    del model.graph.output[:]
    most = min(ROWS, len(anchors))
    shapes = {"detection_boxes": (1, most, 4), "num_detections": (1,)}
    model.graph.output.extend(
        helper.make_tensor_value_info(name, TensorProto.FLOAT, shapes.get(name, (1, most))) for name in fields
    )
    finish(model)
    # Where Ultralytics' models have theirs, too.
    model.metadata_props.add(key="names", value=repr(dict(enumerate(LABELS))))
    onnx.checker.check_model(model, full_check=True)
    return model


def decode(build: Builder, encoded: str, anchors: NDArray[np.float32]) -> str:
    """Boxes (1, anchors, 4) as ymin, xmin, ymax, xmax: SSD's box coder (Liu et al., 2016, section 2.2)."""
    ymin, xmin, ymax, xmax = anchors.astype(np.float64).T
    centres = np.stack([(ymin + ymax) / 2, (xmin + xmax) / 2], axis=1)
    sizes = np.stack([ymax - ymin, xmax - xmin], axis=1)
    flat = build.add("Squeeze", encoded, build.ints(2))
    moves = build.columns(flat, 0, 1)
    moves = build.add("Mul", moves, build.value((sizes / BOX_SCALES[:2]).astype(np.float32)[np.newaxis]))
    centre = build.add("Add", moves, build.value(centres.astype(np.float32)[np.newaxis]))
    growth = build.add("Exp", build.add("Div", build.columns(flat, 2, 3), build.floats(*BOX_SCALES[2:])))
    half = build.add("Mul", growth, build.value((sizes / 2).astype(np.float32)[np.newaxis]))
    return build.add("Concat", build.add("Sub", centre, half), build.add("Add", centre, half), axis=2)


def rename_scopes(model: ModelProto) -> None:
    """Give nodes short names of numbered blocks, and tensors those of the nodes that make them."""
    renamed: dict[str, str] = {}
    for node in model.graph.node:
        for pattern, words in SCOPES:
            if re.match(pattern, node.name):
                node.name = "/" + re.sub(pattern, words, node.name, count=1)
                renamed |= {
                    name: node.name if place == 0 else f"{node.name}_{place}" for place, name in enumerate(node.output)
                }
                break
    for node in model.graph.node:
        node.input[:] = [renamed.get(name, name) for name in node.input]
        node.output[:] = [renamed.get(name, name) for name in node.output]
    for info in model.graph.output:
        info.name = renamed.get(info.name, info.name)
