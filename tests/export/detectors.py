"""Small real detectors of every layout, as ONNX graphs, and what their answers should be, in plain numpy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray
from onnx import ModelProto, TensorProto, helper

from export.detector_rows import Builder
from export.source import Source
from runtime.manifest import PreprocessSpec

Array = NDArray[Any]
SIDE, CLASSES, OPSET = 64, 3, 17
STRIDES = (8, 16, 32)
CELLS = sum((SIDE // stride) ** 2 for stride in STRIDES)


@dataclass
class Net:
    """A backbone with a head at each stride; `anchors` candidates a cell."""

    anchors: int = 1
    classes: int = CLASSES
    opset: int = OPSET
    build: Builder = field(default_factory=lambda: Builder(prefix="net/"))
    boxes: str = ""  # (1, count, 4), centre and size in pixels
    objectness: str = ""  # (1, count, 1)
    scores: str = ""  # (1, count, classes)
    outputs: list[tuple[str, str, int]] = field(default_factory=list)  # name, tensor, element type

    def __post_init__(self) -> None:
        build, generator = self.build, np.random.default_rng(5)
        width = 5 + self.classes

        def conv(values: str, channels: int, wanted: int, *, stride: int, size: int) -> str:
            weight = generator.normal(0, np.sqrt(2 / (channels * size * size)), (wanted, channels, size, size))
            bias = generator.normal(0, 0.2, wanted)
            names = [build.value(weight.astype(np.float32)), build.value(bias.astype(np.float32))]
            return build.add("Conv", values, *names, strides=[stride, stride], pads=[size // 2] * 4)

        values, channels, tables = "image", 3, []
        for place, wanted in enumerate((8, 8, 12, 12, 16)):
            values = build.add("Relu", conv(values, channels, wanted, stride=2, size=3))
            channels = wanted
            if 2 ** (place + 1) not in STRIDES:
                continue
            head = conv(values, channels, self.anchors * width, stride=1, size=1)
            cells = (SIDE // 2 ** (place + 1)) ** 2
            by_cell = build.add("Transpose", head, perm=[0, 2, 3, 1])
            tables.append(build.add("Reshape", by_cell, build.ints(1, cells * self.anchors, width)))
        table = build.add("Concat", *tables, axis=1)
        grid, stride = (build.value(value) for value in self._grid())
        place_xy = build.add("Add", build.add("Sigmoid", build.columns(table, 0, 1)), grid)
        size_wh = build.add("Exp", build.add("Mul", build.columns(table, 2, 3), build.scalar(0.3)))
        size_wh = build.add("Mul", build.add("Mul", size_wh, build.scalar(2.0)), stride)
        self.boxes = build.add("Concat", build.add("Mul", place_xy, stride), size_wh, axis=2)
        self.objectness = build.add("Sigmoid", build.columns(table, 4))
        self.scores = build.add("Sigmoid", build.columns(table, *range(5, width)))

    def _grid(self) -> tuple[Array, Array]:
        places, strides = [], []
        for stride in STRIDES:
            y, x = np.mgrid[0 : SIDE // stride, 0 : SIDE // stride].reshape(2, -1)
            places.append(np.repeat(np.stack([x, y], axis=1), self.anchors, axis=0))
            strides.append(np.full((len(places[-1]), 1), stride))
        return (
            np.concatenate(places).astype(np.float32)[np.newaxis],
            np.concatenate(strides).astype(np.float32)[np.newaxis],
        )

    def gives(self, name: str, tensor: str, elem_type: int = TensorProto.FLOAT) -> None:
        """Make a tensor an output."""
        self.build.nodes.append(helper.make_node("Identity", [tensor], [name], name))
        self.outputs.append((name, name, elem_type))

    def model(self, batch: int | str = 1) -> ModelProto:
        info = helper.make_tensor_value_info
        graph = helper.make_graph(
            self.build.nodes,
            "detector",
            [info("image", TensorProto.FLOAT, [batch, 3, SIDE, SIDE])],
            [info(tensor, elem_type, None) for _, tensor, elem_type in self.outputs],
            self.build.constants,
        )
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", self.opset)], ir_version=8)

    def corners(self) -> str:
        """Boxes as x1, y1, x2, y2 in pixels."""
        half = self.build.add("Mul", self.build.columns(self.boxes, 2, 3), self.build.scalar(0.5))
        centre = self.build.columns(self.boxes, 0, 1)
        return self.build.add(
            "Concat", self.build.add("Sub", centre, half), self.build.add("Add", centre, half), axis=2
        )


def yolo_v8() -> ModelProto:
    net = Net()
    table = net.build.add("Concat", net.boxes, net.scores, axis=2)
    net.gives("output0", net.build.add("Transpose", table, perm=[0, 2, 1]))
    return net.model()


def yolo_v5() -> ModelProto:
    net = Net(anchors=3)
    net.gives("output", net.build.add("Concat", net.boxes, net.objectness, net.scores, axis=2))
    return net.model()


def yolo_v10(rows: int = 25) -> ModelProto:
    """The highest classes' scores, chosen without suppression; boxes are corners in pixels."""
    net = Net()
    build, boxes = net.build, net.corners()
    best = build.add("TopK", net.scores, build.ints(1), outputs=2, axis=-1)
    flat = build.add("Squeeze", best, build.ints(2))
    top = build.add("TopK", flat, build.ints(rows), outputs=2, axis=1)
    places = build.add("Unsqueeze", f"{top}_1", build.ints(2))
    label = build.add("GatherND", build.add("Cast", f"{best}_1", to=TensorProto.FLOAT), places, batch_dims=1)
    score = build.add("Unsqueeze", top, build.ints(2))
    net.gives("output0", build.add("Concat", build.add("GatherND", boxes, places, batch_dims=1), score, label, axis=2))
    return net.model()


def _suppressed(net: Net) -> tuple[str, str, str]:
    """A list, as long as what is found, of the detector's own boxes (k, 4) in pixels, scores (k,) and classes (k,)."""
    build, boxes = net.build, net.corners()
    by_class = build.add("Transpose", net.scores, perm=[0, 2, 1])
    limits = build.ints(30), build.floats(0.5), build.floats(0.3)
    selected = build.add("NonMaxSuppression", boxes, by_class, *limits)
    scores = build.add("GatherND", by_class, selected)
    order = build.add("TopK", scores, build.add("Shape", scores), outputs=2)
    chosen = build.add("Gather", selected, f"{order}_1", axis=0)
    place = build.add("Squeeze", build.columns(chosen, 2), build.ints(1))
    found = build.add("Gather", build.add("Squeeze", boxes, build.ints(0)), place, axis=0)
    return found, order, build.add("Squeeze", build.columns(chosen, 1), build.ints(1))


def torchvision() -> ModelProto:
    net = Net()
    boxes, scores, classes = _suppressed(net)
    net.gives("boxes", boxes)
    net.gives("labels", net.build.add("Add", classes, net.build.ints(1)), TensorProto.INT64)
    net.gives("scores", scores)
    return net.model()


def tensorflow(rows: int = 100, number: int = 40) -> ModelProto:
    """Padded to `rows`; what lies behind `number` is of no account."""
    net = Net()
    build = net.build
    boxes, scores, classes = _suppressed(net)
    shares = build.add("Mul", build.columns(boxes, 1, 0, 3, 2), build.scalar(1 / SIDE))
    classes = build.add("Cast", build.add("Add", classes, build.ints(1)), to=TensorProto.FLOAT)
    for name, values, width in (("boxes", shares, 4), ("scores", scores, 0), ("classes", classes, 0)):
        free = np.full((rows, width) if width else (rows,), 0.7, np.float32)
        padded = build.add("Concat", values, build.value(free), axis=0)
        cut = build.add("Slice", padded, build.ints(0), build.ints(rows), build.ints(0))
        shape = (1, rows, width) if width else (1, rows)
        net.gives(f"detection_{name}", build.add("Reshape", cut, build.ints(*shape)))
    found = build.add("Cast", build.add("Shape", scores), to=TensorProto.FLOAT)
    net.gives("num_detections", build.add("Min", found, build.floats(number)))
    return net.model()


def source_of(model: ModelProto) -> Source:
    return Source(
        name="small",
        origin="a test",
        model=model,
        preprocess=PreprocessSpec(height=SIDE, width=SIDE),
        mean=(0.0, 0.0, 0.0),
        std=(1.0, 1.0, 1.0),
    )


def frames(count: int, seed: int = 1) -> list[NDArray[np.uint8]]:
    """Frames of large soft blobs, each (1, side, side, 3)."""
    generator = np.random.default_rng(seed)
    coarse = generator.integers(0, 256, (count, 1, 4, 4, 3))
    fine = generator.integers(-20, 20, (count, 1, SIDE, SIDE, 3))
    blown = coarse.repeat(SIDE // 4, axis=2).repeat(SIDE // 4, axis=3)
    return list(np.clip(blown + fine, 0, 255).astype(np.uint8))


def run(model: ModelProto, frame: NDArray[np.uint8]) -> list[Array]:
    """The original graph's outputs for a frame."""
    image = np.ascontiguousarray(frame.transpose(0, 3, 1, 2)).astype(np.float32) / np.float32(255)
    outputs: list[Array] = ort.InferenceSession(model.SerializeToString()).run(None, {"image": image})
    return outputs


def overlap(left: Array, right: Array) -> float:
    width = min(left[2], right[2]) - max(left[0], right[0])
    height = min(left[3], right[3]) - max(left[1], right[1])
    shared = max(0.0, float(width)) * max(0.0, float(height))
    area = sum(float((box[2] - box[0]) * (box[3] - box[1])) for box in (left, right))
    return shared / max(area - shared, 1e-12)


def suppressed(boxes: Array, scores: Array, iou: float, least: float, most: int) -> Array:
    """Rows (most, 6), by the plainest means: the best class of each, then greedily within each class."""
    label, best = scores.argmax(axis=1), scores.max(axis=1)
    kept: list[int] = []
    for place in np.argsort(-best, kind="stable"):
        rivals = [other for other in kept if label[other] == label[place]]
        if best[place] > least and all(overlap(boxes[place], boxes[other]) <= iou for other in rivals):
            kept.append(int(place))
    return padded([[*boxes[place], best[place], label[place]] for place in kept], most)


def padded(rows: Sequence[Sequence[float]], most: int) -> Array:
    table = np.zeros((most, 6), np.float32)
    for place, row in enumerate(rows[:most]):
        table[place] = row
        table[place, :4] = np.clip(row[:4], 0, 1)
    return table
