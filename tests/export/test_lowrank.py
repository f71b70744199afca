"""Stand-ins are nested, lose what the theory says, and fit where the original stood."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from export.components import principal_basis, principal_order
from export.distill import distil
from export.graph import Index, constant
from export.hidden import find_hidden, narrow
from export.layers import biased_output, layer_of, patches, rows, shapes_of, split
from export.lowrank import analyse, decompose, stand_in, widths
from export.variants import time_side_by_side
from runtime.segment_onnx import session_options

Values = dict[str, NDArray[np.generic]]


def graph(nodes: list[NodeProto], weights: Values, given: list[int | str], made: list[int | str] | None) -> ModelProto:
    made_graph = helper.make_graph(
        nodes,
        "part",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, given)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, made)],
        [constant(name, value) for name, value in weights.items()],
    )
    model = helper.make_model(made_graph, opset_imports=[helper.make_opsetid("", 17)])
    model.ir_version = 8
    return model


def conv(name: str, source: str, made: str, **options: Any) -> NodeProto:
    return helper.make_node("Conv", [source, f"{name}.w", f"{name}.b"], [made], name, **options)


def inverted_residual(generator: np.random.Generator) -> ModelProto:
    """Two expand-depthwise-project blocks, the second with a residual; the hidden channels are partly redundant."""
    normal = generator.standard_normal
    weights: Values = {"low": np.array(0, np.float32), "high": np.array(6, np.float32)}
    nodes = []
    source = "x"
    for block, (inputs, hidden, outputs) in enumerate(((4, 24, 8), (8, 32, 8))):
        shapes = {"expand": (hidden, inputs, 1, 1), "depth": (hidden, 1, 3, 3), "project": (outputs, hidden, 1, 1)}
        mixed = normal((hidden, 6)) @ normal((6, inputs))
        for kind, shape in shapes.items():
            value = normal(shape) / np.sqrt(np.prod(shape[1:]))
            if kind == "expand":
                value = (mixed + 0.2 * normal((hidden, inputs))).reshape(shape) / 3
            weights[f"{block}.{kind}.w"] = value.astype(np.float32)
            weights[f"{block}.{kind}.b"] = (0.1 * normal(shape[0])).astype(np.float32)
        names = [f"{block}.{part}" for part in ("e", "ec", "d", "dc")]
        nodes += [
            conv(f"{block}.expand", source, names[0]),
            helper.make_node("Clip", [names[0], "low", "high"], [names[1]], f"{block}.clip"),
            conv(f"{block}.depth", names[1], names[2], group=hidden, pads=[1, 1, 1, 1]),
            helper.make_node("Clip", [names[2], "low", "high"], [names[3]], f"{block}.clip2"),
            conv(f"{block}.project", names[3], f"{block}.p"),
        ]
        source = f"{block}.p"
    nodes.append(helper.make_node("Add", ["1.p", "0.p"], ["y"], "add"))
    return graph(nodes, weights, ["batch", 4, 12, 12], ["batch", 8, 12, 12])


def mlp(generator: np.random.Generator) -> ModelProto:
    """Tokens through a MatMul, a bias, a bend, a MatMul and a residual."""
    weights: Values = {
        "up": generator.standard_normal((16, 48)).astype(np.float32) / 4,
        "bias": generator.standard_normal(48).astype(np.float32) / 4,
        "down": generator.standard_normal((48, 16)).astype(np.float32) / 7,
    }
    nodes = [
        helper.make_node("MatMul", ["x", "up"], ["u"], "up"),
        helper.make_node("Add", ["u", "bias"], ["ub"], "bias"),
        helper.make_node("Relu", ["ub"], ["h"], "relu"),
        helper.make_node("MatMul", ["h", "down"], ["d"], "down"),
        helper.make_node("Add", ["d", "x"], ["y"], "add"),
    ]
    return graph(nodes, weights, ["batch", 20, 16], ["batch", 20, 16])


def run(model: ModelProto, value: Any) -> Any:
    session = ort.InferenceSession(model.SerializeToString(), session_options(1))
    return session.run(None, {"x": value})[0]


def smooth(generator: np.random.Generator, shape: tuple[int, ...], count: int) -> list[Any]:
    return [generator.standard_normal((1, *shape)).astype(np.float32) for _ in range(count)]


MODELS = {"inverted residual": (inverted_residual, (4, 12, 12)), "mlp": (mlp, (20, 16))}


@pytest.fixture(params=MODELS)
def case(request: pytest.FixtureRequest) -> tuple[ModelProto, list[Any], list[Any]]:
    """A graph, the inputs it is fitted on, and others."""
    make, shape = MODELS[request.param]
    generator = np.random.default_rng(3)
    return make(generator), smooth(generator, shape, 30), smooth(generator, shape, 10)


def lost(model: ModelProto, other: ModelProto, inputs: list[Any]) -> float:
    wanted = np.concatenate([run(model, value) for value in inputs])
    made = np.concatenate([run(other, value) for value in inputs])
    assert made.shape == wanted.shape
    assert made.dtype == wanted.dtype
    return float(((made - wanted) ** 2).mean() / wanted.var())


def test_the_smaller_the_stand_in_the_more_it_loses_on_inputs_it_has_not_seen(
    case: tuple[ModelProto, list[Any], list[Any]],
) -> None:
    model, fitted, others = case
    analysis = analyse(model, fitted)
    losses, sizes = [], []
    for ratio in (1.0, 0.8, 0.6, 0.4):
        made = stand_in(analysis, widths(analysis, ratio, multiple=4))
        losses.append(lost(model, made, others))
        sizes.append(made.ByteSize())
    assert losses[0] == 0
    assert losses == sorted(losses)
    assert losses[-1] < 0.6
    assert sizes[1:] == sorted(sizes[1:], reverse=True)
    assert sizes[1] < sizes[0]


def test_makers_of_a_smaller_stand_in_are_the_first_channels_of_a_larger_one(
    case: tuple[ModelProto, list[Any], list[Any]],
) -> None:
    model, fitted, _ = case
    analysis = analyse(model, fitted)
    unit = next(unit for unit in analysis.units if unit.order is not None)
    full = {unit.hidden.reader: unit.hidden.width for unit in analysis.units}
    made = []
    for width in (8, 16):
        index = Index(stand_in(analysis, {**full, unit.hidden.reader: width}))
        node = next(node for node in index.nodes if node.name == unit.hidden.maker)
        layer = layer_of(node, index)
        assert layer is not None
        made.append(layer.weight)
    assert len(made[0]) == 8
    np.testing.assert_array_equal(made[0], made[1][:8])


def test_fitting_again_takes_back_most_of_what_was_lost(case: tuple[ModelProto, list[Any], list[Any]]) -> None:
    model, fitted, others = case
    analysis = analyse(model, fitted)
    unit = next(unit for unit in analysis.units if unit.order is not None)
    plain = ModelProto()
    plain.CopyFrom(model)
    assert unit.order is not None
    narrow(plain, unit.hidden, unit.order[:16])
    full = {unit.hidden.reader: unit.hidden.width for unit in analysis.units}
    fitted_again = stand_in(analysis, {**full, unit.hidden.reader: 16})
    assert lost(model, fitted_again, others) < 0.8 * lost(model, plain, others)


def test_the_same_inputs_give_the_same_bytes(case: tuple[ModelProto, list[Any], list[Any]]) -> None:
    model, fitted, _ = case
    first, second = (decompose(model, fitted, 0.6, multiple=4).SerializeToString(deterministic=True) for _ in range(2))
    assert first == second


def test_a_tail_shifts_channels_to_what_the_answer_needs() -> None:
    generator = np.random.default_rng(5)
    model, inputs = inverted_residual(generator), smooth(generator, (4, 12, 12), 20)
    weight = generator.standard_normal((8, 5)).astype(np.float32)
    nodes = [
        helper.make_node("ReduceMean", ["x"], ["mean"], "mean", axes=[2, 3], keepdims=0),
        helper.make_node("MatMul", ["mean", "w"], ["y"], "head"),
    ]
    tail = graph(nodes, {"w": weight}, ["batch", 8, 12, 12], ["batch", 5])
    plain, weighed = analyse(model, inputs, multiple=4), analyse(model, inputs, tail=tail, multiple=4)
    for left, right in zip(plain.units, weighed.units, strict=True):
        scale = right.errors[4] / left.errors[4]
        assert scale > 0
        np.testing.assert_allclose(right.errors, left.errors * scale)


def test_a_graph_that_cannot_be_made_smaller_stays_as_it_is() -> None:
    model = graph([helper.make_node("Relu", ["x"], ["y"], "relu")], {}, ["batch", 4], ["batch", 4])
    inputs = smooth(np.random.default_rng(0), (4,), 3)
    assert [node.op_type for node in decompose(model, inputs, 0.5).graph.node] == ["Relu"]


@pytest.mark.parametrize("kind", ["Conv", "strided", "Gemm", "MatMul"])
def test_a_layer_split_at_full_rank_makes_the_same(kind: str) -> None:
    generator = np.random.default_rng(1)
    weights: Values = {"b": generator.standard_normal(6).astype(np.float32)}
    if kind in ("Conv", "strided"):
        weights["w"] = generator.standard_normal((6, 5, 3, 3)).astype(np.float32)
        options: dict[str, Any] = (
            {"pads": [1, 1, 1, 1]} if kind == "Conv" else {"strides": [2, 2], "pads": [0, 0, 1, 1]}
        )
        nodes = [helper.make_node("Conv", ["x", "w", "b"], ["y"], "layer", **options)]
        shape: tuple[int, ...] = (5, 8, 8)
    elif kind == "Gemm":
        weights["w"] = generator.standard_normal((5, 6)).astype(np.float32)
        nodes = [helper.make_node("Gemm", ["x", "w", "b"], ["y"], "layer")]
        shape = (5,)
    else:
        weights["w"] = generator.standard_normal((5, 6)).astype(np.float32)
        nodes = [
            helper.make_node("MatMul", ["x", "w"], ["m"], "layer"),
            helper.make_node("Add", ["b", "m"], ["y"], "bias"),
        ]
        shape = (7, 5)
    model = graph(nodes, weights, ["batch", *shape], None)
    value = generator.standard_normal((1, *shape)).astype(np.float32)
    index = Index(model)
    layer = layer_of(index.nodes[0], index)
    assert layer is not None
    assert biased_output(layer.node, index) == "y"
    made = run(model, value)
    places = np.arange(made.size // 6)
    by_hand = patches(value, layer, places) @ layer.flat.T + np.asarray(weights["b"], np.float64)
    np.testing.assert_allclose(by_hand, rows(made, layer.node, places), atol=1e-4)
    basis = np.linalg.qr(generator.standard_normal((6, 6)))[0]
    split(model, layer, basis, basis.T)
    np.testing.assert_allclose(run(model, value), made, atol=1e-4)
    assert len(model.graph.node) == len(nodes) + 1


def test_hidden_channels_in_another_order_change_nothing(case: tuple[ModelProto, list[Any], list[Any]]) -> None:
    model, _, others = case
    (first, *_) = find_hidden(model, shapes_of(model))
    narrow(model_copy := ModelProto.FromString(model.SerializeToString()), first, np.arange(first.width)[::-1])
    assert lost(model, model_copy, others) < 1e-9


def test_channels_that_others_read_are_not_hidden() -> None:
    generator = np.random.default_rng(1)
    weights: Values = {name: generator.standard_normal((4, 4)).astype(np.float32) for name in ("a", "b")}
    nodes = [
        helper.make_node("MatMul", ["x", "a"], ["h"], "a"),
        helper.make_node("MatMul", ["h", "b"], ["m"], "b"),
        helper.make_node("Add", ["m", "h"], ["y"], "add"),
    ]
    model = graph(nodes, weights, ["batch", 4], ["batch", 4])
    assert find_hidden(model, shapes_of(model)) == []


def test_training_brings_a_stand_in_nearer_and_is_the_same_again() -> None:
    generator = np.random.default_rng(4)
    teacher, inputs = inverted_residual(generator), smooth(generator, (4, 12, 12), 40)
    others = smooth(generator, (4, 12, 12), 10)
    head = generator.standard_normal((8, 5)).astype(np.float32)
    tail = graph(
        [
            helper.make_node("GlobalAveragePool", ["x"], ["p"], "pool"),
            helper.make_node("Flatten", ["p"], ["f"], "flatten"),
            helper.make_node("Gemm", ["f", "w"], ["y"], "head"),
        ],
        {"w": head},
        ["batch", 8, 12, 12],
        ["batch", 5],
    )
    student = ModelProto.FromString(teacher.SerializeToString())
    for tensor in student.graph.initializer:
        if tensor.name.endswith(".w"):
            value = numpy_helper.to_array(tensor)
            tensor.CopyFrom(numpy_helper.from_array(value * np.float32(0.9), tensor.name))
    threads = torch.get_num_threads()
    trained = distil(student, teacher, tail, inputs, steps=30, seed=0)
    assert lost(teacher, trained, others) < 0.5 * lost(teacher, student, others)
    again = distil(student, teacher, tail, inputs, steps=30, seed=0)
    assert again.SerializeToString(deterministic=True) == trained.SerializeToString(deterministic=True)
    assert torch.get_num_threads() == threads


def test_a_stand_in_that_is_as_good_as_it_gets_is_left_alone() -> None:
    generator = np.random.default_rng(4)
    weight = generator.standard_normal((6, 6)).astype(np.float32)
    layer = helper.make_node("MatMul", ["x", "w"], ["y"], "layer")
    model = graph([layer], {"w": weight}, ["batch", 6], ["batch", 6])
    kept = distil(model, model, model, smooth(generator, (6,), 20), steps=5, seed=0)
    assert kept.SerializeToString() == model.SerializeToString()


def test_a_graph_with_more_to_do_takes_longer() -> None:
    weight = np.ones((512, 512), np.float32)
    small = [helper.make_node("MatMul", ["x", "w"], ["y"], "one")]
    large = [
        helper.make_node("MatMul", ["x" if step == 0 else f"m{step}", "w"], [f"m{step + 1}"], f"{step}")
        for step in range(8)
    ]
    large[-1].output[0] = "y"
    models = [graph(nodes, {"w": weight}, ["batch", 64, 512], None) for nodes in (small, large)]
    fast, slow = time_side_by_side(models, np.ones((1, 64, 512), np.float32))
    assert slow > 2 * fast


matrices = arrays(np.float64, (30, 6), elements=st.floats(-3, 3, width=16))


@settings(max_examples=40, deadline=None)
@given(matrices, arrays(np.float64, (4, 6), elements=st.floats(-2, 2, width=16)))
def test_what_selection_says_is_lost_is_what_least_squares_lose(values: Any, weight: Any) -> None:
    values = values + np.random.default_rng(0).standard_normal(values.shape)
    values -= values.mean(axis=0)
    order, errors = principal_order(values.T @ values / 30, weight)
    assert sorted(order) == list(range(6))
    assert np.all(np.diff(errors) <= 1e-9)
    wanted = values @ weight.T
    for width in (1, 3, 6):
        fitted = values[:, order[:width]]
        rest = wanted - fitted @ np.linalg.lstsq(fitted, wanted, rcond=None)[0]
        assert errors[width] == pytest.approx(float((rest**2).sum() / 30), abs=1e-6)


@settings(max_examples=40, deadline=None)
@given(matrices, arrays(np.float64, (8, 6), elements=st.floats(-2, 2, width=16)))
def test_components_lose_what_the_whitened_svd_says_and_nothing_else(values: Any, weight: Any) -> None:
    generator = np.random.default_rng(0)
    values = values + generator.standard_normal(values.shape)
    values -= values.mean(axis=0)
    weight = weight + generator.standard_normal(weight.shape)
    covariance = values.T @ values / 30
    basis, errors = principal_basis(covariance, weight)
    singular = np.linalg.svd(weight @ np.linalg.cholesky(covariance + 1e-12 * np.eye(6)), compute_uv=False)
    for width in (1, 3, 5):
        least = float((singular[width:] ** 2).sum())  # Eckart-Young: no matrix of this rank loses less
        assert errors[width] == pytest.approx(least, rel=1e-4, abs=1e-6)
        known = values @ basis[:width].T
        rest = values @ weight.T
        rest = rest - known @ np.linalg.lstsq(known, rest, rcond=None)[0]
        assert float((rest**2).sum() / 30) == pytest.approx(least, rel=1e-3, abs=1e-6)
    np.testing.assert_allclose(np.diag(basis @ covariance @ basis.T), 1, rtol=1e-3)
