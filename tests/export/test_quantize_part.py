"""A part of a network quantized on its own, so that it writes a wire that is given."""

from __future__ import annotations

import numpy as np
import onnxruntime as ort
from onnx import TensorProto, helper

from export.graph import constant
from export.quantize import quantize_part
from export.wires import Wire
from runtime.segment_onnx import session_options

SHAPE = (1, 4, 8, 8)


def test_a_part_that_ends_in_a_residual_writes_a_wire_of_one_scale() -> None:
    generator = np.random.default_rng(0)
    nodes = [
        helper.make_node("Conv", ["x", "first"], ["a"], "first"),
        helper.make_node("Conv", ["a", "second"], ["b"], "second"),
        helper.make_node("Add", ["a", "b"], ["y"], "residual"),
    ]
    weights = [constant(name, generator.normal(size=(4, 4, 1, 1)).astype(np.float32)) for name in ("first", "second")]
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, SHAPE) for name in ("x", "y")]
    graph = helper.make_graph(nodes, "part", ends[:1], ends[1:], weights)
    part = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    frames = [generator.normal(size=SHAPE).astype(np.float32) for _ in range(8)]
    whole = ort.InferenceSession(part.SerializeToString(), session_options(1))
    wanted = [whole.run(None, {"x": frame})[0] for frame in frames]
    most = max(float(np.abs(value).max()) for value in wanted)
    wire = Wire("y", np.array(most / 127, np.float32), np.array(128, np.uint8), 1)

    made = quantize_part(part, frames, "convolutional", "x86-vnni", None, wire)

    session = ort.InferenceSession(made.SerializeToString(), session_options(1))
    for frame, value in zip(frames, wanted, strict=True):
        (stored,) = session.run(None, {"x": frame})
        assert stored.dtype == np.uint8
        assert np.abs((stored.astype(np.float32) - 128) * wire.scale - value).max() < 0.1 * most
