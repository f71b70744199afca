"""Recognizes how a detector lays out its outputs, by their shapes, types and names. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

from export.graph import Shape
from runtime.errors import BundleError

BoxFormat: TypeAlias = Literal["xyxy", "yxyx", "xyxy-pixels", "yxyx-pixels"]
Kind: TypeAlias = Literal["yolo", "yolo with objectness", "rows", "lists"]

UNDERSTOOD = (
    "boxes (1, n, 4), scores (1, n) and classes (1, n), named so, with or without a number of detections; "
    "torchvision's boxes, labels and scores; (1, 4 + classes, n) as of YOLOv8 and v11; (1, n, 5 + classes) as of "
    "YOLOv5 and v7; (1, n, 6) as of YOLOv10"
)
STRIDES = ((8, 16, 32), (8, 16, 32, 64), (4, 8, 16, 32), (16, 32))  # of YOLO's grids
ANCHORS = (1, 3)  # for each cell of a grid
MOST_ROWS = 1000  # that a detector without suppression behind it lists
ROLES = {"boxes": ("box",), "scores": ("score", "conf"), "classes": ("class", "label"), "number": ("num",)}
# What TensorFlow's detectors list beside their answer.
BESIDE = ("raw_", "anchor", "multiclass", "mask", "keypoint")


@dataclass(frozen=True, slots=True)
class Output:
    """An output of the source's graph."""

    name: str
    shape: Shape | None  # for a batch of one; None where it depends on what is found
    is_float: bool

    def __str__(self) -> str:
        shape = "of a shape that depends on what is found" if self.shape is None else str(self.shape)
        return f"{self.name} {shape}"


@dataclass(frozen=True, slots=True)
class Layout:
    """Which output means what."""

    kind: Kind
    outputs: Mapping[str, str]  # role → output: "table", or "boxes", "scores", "classes" and perhaps "number"
    classes: int | None  # None where the outputs do not tell
    swapped: bool = False  # boxes are y1, x1, y2, x2
    pixels: bool = True  # of the model's input; else shares of it
    background: bool = False  # class 0 is the background
    flat: bool = False  # without a batch


def recognize(name: str, outputs: Sequence[Output], size: tuple[int, int], boxes: BoxFormat | None = None) -> Layout:
    """The layout of a detector's outputs.

    Args:
        size: (height, width) of the model's input.
        boxes: how boxes are written; None: as is usual for the layout.

    Raises:
        BundleError: the layout is none that is understood.
    """
    layout = _table(outputs[0], size) if len(outputs) == 1 else _lists(outputs)
    if layout is None:
        given = ", ".join(map(str, outputs))
        raise BundleError(f"{name} gives {given}, which is no layout of a detector that is understood: {UNDERSTOOD}")
    if boxes is None:
        return layout
    if layout.kind not in ("rows", "lists"):
        raise BundleError(f"{name} gives centres and sizes, as {layout.kind} does; leave out --boxes")
    swapped, pixels = boxes.startswith("yx"), boxes.endswith("pixels")
    return Layout(
        layout.kind, layout.outputs, layout.classes, swapped, pixels, background=layout.background, flat=layout.flat
    )


def _table(output: Output, size: tuple[int, int]) -> Layout | None:
    """One output that holds everything."""
    if output.shape is None or len(output.shape) != 3 or output.shape[0] != 1 or not output.is_float:
        return None
    _, rows, columns = output.shape
    place = {"table": output.name}
    on_grid = rows in _grid_cells(size)
    if columns == 6 and rows <= MOST_ROWS and not on_grid:
        return Layout("rows", place, classes=None)
    if columns > 5 and on_grid:
        return Layout("yolo with objectness", place, classes=columns - 5)
    if 4 < rows < columns:
        return Layout("yolo", place, classes=rows - 4)
    return None


def _grid_cells(size: tuple[int, int]) -> set[int]:
    """How many candidates YOLO's usual grids give for an input."""
    height, width = size
    return {
        anchors * sum(-(-height // stride) * -(-width // stride) for stride in strides)
        for strides in STRIDES
        for anchors in ANCHORS
    }


def _lists(outputs: Sequence[Output]) -> Layout | None:
    """Boxes, scores and classes apart."""
    asked = [output for output in outputs if not any(word in output.name.lower() for word in BESIDE)]
    roles: dict[str, Output] = {}
    for output in asked:
        role = _role(output)
        if role is None or role in roles:
            return None
        roles[role] = output
    if not {"boxes", "scores", "classes"} <= roles.keys() or not roles["boxes"].is_float:
        return None
    name, shape = roles["boxes"].name.lower(), roles["boxes"].shape
    known = shape is None or (shape[-1] == 4 and (len(shape) == 2 or (len(shape) == 3 and shape[0] == 1)))
    if not known or (shape is None and "number" in roles):
        return None
    tensorflow = name.startswith(("detection_", "tflite_detection"))
    labelled = "label" in roles["classes"].name.lower()
    return Layout(
        "lists",
        {role: output.name for role, output in roles.items()},
        classes=None,
        swapped=tensorflow,
        pixels=not tensorflow,
        background=labelled or name.startswith("detection_"),
        # A list whose length depends on what is found is torchvision's, which has no batch.
        flat=shape is None or len(shape) == 2,
    )


def _role(output: Output) -> str | None:
    # TensorFlow Lite calls all of its outputs by one name and a number, in this order.
    name = output.name.lower()
    if name.startswith("tflite_detection_postprocess"):
        order = {"": "boxes", ":1": "classes", ":2": "scores", ":3": "number"}
        return order.get(name.removeprefix("tflite_detection_postprocess"))
    return next((role for role, words in ROLES.items() if any(word in name for word in words)), None)
