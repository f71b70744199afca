"""Makes exit heads without labels: a linear map from pooled features to the whole float model's own logits.

The penalty of the ridge regression is chosen by leaving out one group of neighbouring frames at a time, in closed
form. Temperature and threshold come from other frames: the temperature by likelihood of the whole model's answers, the
threshold as the least confidence at which the wanted share of answers agrees.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, TensorProto, helper

from export.graph import FRAME, LOGITS, OPSET, Index, Shape, constant, copy_of, extract, finish, tensor_info
from export.slicing import on_wire
from export.wires import Wire
from runtime.datatypes import Tensor
from runtime.manifest import Bundle, ExitSpec
from runtime.policy import classify
from runtime.segment import load_segments
from runtime.segment_onnx import session_options

PENALTIES = tuple(10.0**power for power in np.arange(-3.0, 4.5, 0.5))  # relative to the mean variance of a feature

Matrix = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class LinearHead:
    """Logits = pooled features @ weight + bias."""

    weight: NDArray[np.float32]  # (channels, classes)
    bias: NDArray[np.float32]
    penalty: float


def pool(features: Tensor, wire: Wire | None) -> NDArray[np.float32]:
    """The mean over space or tokens of features as they stand on the wire: (batch, channels)."""
    values = features.astype(np.float32)
    if wire is not None:
        values = (values - wire.zero_point.astype(np.float32)) * wire.scale
    rest = tuple(range(1, features.ndim - 1))
    pooled: NDArray[np.float32] = values.mean(axis=rest, dtype=np.float32) if rest else values
    return pooled


def observe(
    bundle: Bundle, trunk: ModelProto, frames: Iterable[Tensor], wires: Sequence[Wire | None]
) -> tuple[list[NDArray[np.float32]], NDArray[np.float32]]:
    """Pooled features at every cut, as the segments make them, and the whole float model's logits."""
    segments, _ = load_segments(bundle, 0, len(wires) - 1)
    session = ort.InferenceSession(trunk.SerializeToString(), session_options(1))
    pooled: list[list[NDArray[np.float32]]] = [[] for _ in wires]
    logits: list[Tensor] = []
    for frame in frames:
        logits.append(session.run([LOGITS], {FRAME: frame})[0])
        tensor = frame
        for index, wire in enumerate(wires):
            tensor = segments[index].run(tensor)
            pooled[index].append(pool(tensor, wire))
    return [np.concatenate(rows) for rows in pooled], np.concatenate(logits)


def fit_head(pooled: NDArray[np.float32], logits: NDArray[np.float32], groups: NDArray[np.int64]) -> LinearHead:
    """Fit a head to the whole model's logits on the fit frames."""
    features = pooled.astype(np.float64)
    # What is added to all logits of a frame changes no answer, so nothing is spent on it.
    target = logits.astype(np.float64) - logits.mean(axis=1, keepdims=True)
    centre, spread = features.mean(axis=0), features.std(axis=0)
    spread = np.where(spread > 1e-6 * max(1e-12, float(spread.max())), spread, 1.0)
    scaled = (features - centre) / spread
    offset = target.mean(axis=0)
    left, singular, right = np.linalg.svd(scaled, full_matrices=False)
    projected = left.T @ (target - offset)
    penalty = min(
        PENALTIES, key=lambda value: _held_out_error(left, singular, projected, target, offset, groups, value)
    )
    strength = penalty * len(features)
    weight = (right.T * (singular / (singular**2 + strength))) @ projected
    weight /= spread[:, np.newaxis]
    return LinearHead(weight.astype(np.float32), (offset - centre @ weight).astype(np.float32), penalty)


def _held_out_error(
    left: Matrix,
    singular: Matrix,
    projected: Matrix,
    target: Matrix,
    offset: Matrix,
    groups: NDArray[np.int64],
    penalty: float,
) -> float:
    shrunk = singular**2 / (singular**2 + penalty * len(left))
    residual = target - offset - (left * shrunk) @ projected
    error = 0.0
    for group in np.unique(groups):
        rows = groups == group
        # The mean, fitted as well, takes its own share of every frame: the constant part of the hat matrix.
        hat = (left[rows] * shrunk) @ left[rows].T + 1 / len(left)
        error += float((np.linalg.solve(np.eye(len(hat)) - hat, residual[rows]) ** 2).sum())
    return error


def head_model(head: LinearHead, wire: Wire | None, shape: Shape, name: str) -> ModelProto:
    """A fitted head as a graph that reads the features as they stand on the wire."""
    axes = list(range(1, len(shape)))
    nodes = [helper.make_node("Gemm", ["pooled", "weight", "bias"], [LOGITS], "classify")]
    if axes:
        nodes.insert(0, helper.make_node("ReduceMean", ["values"], ["pooled"], "pool", axes=axes, keepdims=0))
    else:
        nodes[0].input[0] = "values"
    weights = [constant("weight", head.weight), constant("bias", head.bias)]
    nodes, weights = _read_wire(nodes, weights, wire, "values", shape)
    graph = helper.make_graph(
        nodes,
        name,
        [tensor_info("features", "float32" if wire is None else "uint8", shape)],
        [helper.make_tensor_value_info(LOGITS, TensorProto.FLOAT, ["batch", len(head.bias)])],
        weights,
    )
    return finish(helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)]))


def own_head(whole: ModelProto, output: str, cut_tensor: str, wire: Wire | None, shape: Shape, name: str) -> ModelProto:
    """The model's own exit `output` as a graph that reads the features as they stand on the wire.

    `shape` is that of the tensor in the graph, without the batch.
    """
    declared = next(info for info in whole.graph.output if info.name == output)
    part = extract(copy_of(whole), [tensor_info(cut_tensor, "float32", shape)], [declared], name)
    nodes, weights = list(part.graph.node), list(part.graph.initializer)
    values = cut_tensor
    if on_wire(shape) != shape:
        values = "wire/values"
        nodes.insert(0, helper.make_node("Transpose", [values], [cut_tensor], "wire/read", perm=[0, 3, 1, 2]))
    nodes, weights = _read_wire(nodes, weights, wire, values, on_wire(shape))
    graph = helper.make_graph(
        nodes,
        name,
        [tensor_info("features", "float32" if wire is None else "uint8", on_wire(shape))],
        list(part.graph.output),
        weights,
    )
    return finish(helper.make_model(graph, opset_imports=list(part.opset_import)))


def _read_wire(
    nodes: list[NodeProto], weights: list[TensorProto], wire: Wire | None, values: str, shape: Shape
) -> tuple[list[NodeProto], list[TensorProto]]:
    if wire is None:
        return [helper.make_node("Identity", ["features"], [values], "read"), *nodes], weights
    names = ["wire/scale", "wire/zero_point"]
    read = helper.make_node("DequantizeLinear", ["features", *names], [values], "read", axis=len(shape))
    return [read, *nodes], [*weights, constant(names[0], wire.scale), constant(names[1], wire.zero_point)]


def own_exit_cut(whole: ModelProto, output: str, tensors: list[str]) -> str | None:
    """The deepest of `tensors` (in the trunk's order) through which alone an own exit sees the frame."""
    index = Index(whole)
    source = whole.graph.input[0].name
    for tensor in reversed(tensors):
        rest = index.ancestors([output], stop=[tensor])
        through = any(tensor in node.input for node in rest) or tensor == output
        if through and not any(source in node.input for node in rest):
            return tensor
    return None


def choose_temperature(logits: NDArray[np.float32], answers: NDArray[np.int64]) -> float:
    """The temperature under which the whole model's answers are likeliest, by golden-section search."""

    def loss(power: float) -> float:
        scaled = logits.astype(np.float64) / np.exp(power)
        scaled -= scaled.max(axis=1, keepdims=True)
        log_sum = np.log(np.exp(scaled).sum(axis=1))
        return float(np.mean(log_sum - scaled[np.arange(len(answers)), answers]))

    low, high, ratio = np.log(0.02), np.log(50.0), (np.sqrt(5) - 1) / 2
    for _ in range(40):
        left, right = high - ratio * (high - low), low + ratio * (high - low)
        low, high = (low, right) if loss(left) <= loss(right) else (left, high)
    return round(float(np.exp((low + high) / 2)), 4)


def choose_threshold(confidence: NDArray[np.float64], agrees: NDArray[np.bool_], wanted: float) -> float | None:
    """The least confidence at which at least `wanted` of the answers agree, or None when there is none."""
    order = np.argsort(-confidence, kind="stable")
    ranked, hits = confidence[order], np.cumsum(agrees[order])
    best: float | None = None
    for place, value in enumerate(ranked):
        last_of_ties = place + 1 == len(ranked) or ranked[place + 1] < value
        if last_of_ties and hits[place] >= wanted * (place + 1):
            best = float(value)
    return best


def calibrate(
    cut: int, file: str, logits: NDArray[np.float32], answers: NDArray[np.int64], agreement: float
) -> ExitSpec:
    """Choose temperature and threshold of one exit from its logits on the threshold frames."""
    spec = ExitSpec(
        cut=cut, file=file, temperature=choose_temperature(logits, answers), threshold=None, agreement=agreement
    )
    said = [classify(row, spec) for row in logits]
    confidence = np.array([output.confidence for output in said])
    agrees = np.array([output.label_index for output in said]) == answers
    threshold = choose_threshold(confidence, agrees, agreement)
    return ExitSpec(cut=cut, file=file, temperature=spec.temperature, threshold=threshold, agreement=agreement)
