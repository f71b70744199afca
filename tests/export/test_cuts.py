from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import ModelProto, TensorProto, helper

from export.cuts import Cut, default_cuts, list_cuts, named_cuts, separators
from export.graph import constant, static_shapes
from runtime.errors import ConfigError


def graph_of(edges: list[list[int]]) -> ModelProto:
    """Node k sums the tensors it names, 0 being the input; the last node makes the output."""
    nodes = [
        helper.make_node("Sum", [f"t{source}" for source in sources], [f"t{place}"], f"n{place}")
        for place, sources in enumerate(edges, start=1)
    ]
    info = helper.make_tensor_value_info
    last = f"t{len(edges)}"
    graph = helper.make_graph(
        nodes, "g", [info("t0", TensorProto.FLOAT, [1, 4])], [info(last, TensorProto.FLOAT, [1, 4])]
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])


def separates(edges: list[list[int]], tensor: int) -> bool:
    """Whether no way leads from the input to the output once `tensor` is gone."""
    reached = {0}
    for place, sources in enumerate(edges, start=1):
        if place != tensor and any(source in reached and source != tensor for source in sources):
            reached.add(place)
    return len(edges) not in reached


@st.composite
def edge_lists(draw: st.DrawFn) -> list[list[int]]:
    size = draw(st.integers(1, 12))
    return [
        draw(st.lists(st.integers(max(0, place - 4), place), min_size=1, max_size=3, unique=True))
        for place in range(size)
    ]


@given(edge_lists())
def test_exactly_the_separating_tensors_are_found(edges: list[list[int]]) -> None:
    connected = not separates(edges, -1)
    wanted = [f"t{place}" for place in range(1, len(edges)) if separates(edges, place)] if connected else []
    found = separators(graph_of(edges))
    assert found == wanted or not connected


def test_branch_that_leads_nowhere_hides_no_cut() -> None:
    # t2 is read by nobody whom the output needs.
    assert separators(graph_of([[0], [1], [1], [3]])) == ["t1", "t3"]


def test_residual_hides_what_it_spans() -> None:
    assert separators(graph_of([[0], [1], [2, 1], [3]])) == ["t1", "t3"]


def convolution_chain() -> ModelProto:
    info = helper.make_tensor_value_info
    weights = [constant("w1", np.ones((4, 3, 1, 1), np.float32)), constant("w2", np.ones((2, 4, 1, 1), np.float32))]
    nodes = [
        helper.make_node("Conv", ["x", "w1"], ["a"], "/blocks.0/conv/Conv"),
        helper.make_node("Relu", ["a"], ["b"], "/blocks.0/act/Relu"),
        helper.make_node("Conv", ["b", "w2"], ["c"], "/blocks.1/conv/Conv"),
        helper.make_node("Reshape", ["c", "shape"], ["d"], "/Reshape"),
        helper.make_node("Conv", ["d", "w3"], ["y"], "/head/Conv"),
    ]
    weights += [constant("shape", np.array([1, 2, 16, 4], np.int64)), constant("w3", np.ones((1, 2, 1, 1), np.float32))]
    graph = helper.make_graph(
        nodes,
        "g",
        [info("x", TensorProto.FLOAT, [1, 3, 8, 8])],
        [info("y", TensorProto.FLOAT, [1, 1, 16, 4])],
        weights,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])


def test_a_place_is_listed_once_with_its_cost() -> None:
    model = convolution_chain()
    cuts = list_cuts(model, static_shapes(model))
    assert [(cut.tensor, cut.after, cut.shape) for cut in cuts] == [
        ("b", "block 0", (4, 8, 8)),
        ("c", "block 1", (2, 8, 8)),
    ]
    assert [cut.macs for cut in cuts] == [64 * 12, 64 * 12 + 64 * 8]
    assert cuts[0].aliases == ("a", "b")
    assert cuts[1].aliases == ("c", "d")


def cut(index: int, elements: int, ratio: float) -> Cut:
    return Cut(index, f"t{index}", (f"t{index}",), f"block {index}", (elements,), round(ratio * 100), ratio)


def test_default_cuts_are_the_smallest_near_their_share() -> None:
    cuts = [cut(1, 5, 0.1), cut(2, 90, 0.3), cut(3, 80, 0.34), cut(4, 80, 0.45), cut(5, 70, 0.7), cut(6, 10, 0.9)]
    assert [found.index for found in default_cuts(cuts, 3)] == [3, 5]
    assert [found.index for found in default_cuts(cuts, 1)] == []
    # 0.7 and 0.34 lie within a quarter of one half.
    assert [found.index for found in default_cuts(cuts, 2)] == [5]


def test_a_model_without_a_place_near_a_share_gets_fewer_cuts() -> None:
    assert [found.index for found in default_cuts([cut(1, 5, 0.4)], 3)] == [1]


def test_cuts_are_named_by_number_tensor_or_layer() -> None:
    cuts = [cut(1, 5, 0.2), cut(2, 5, 0.5), cut(3, 5, 0.7)]
    assert [found.index for found in named_cuts(cuts, ["t3", "1", "block 2"])] == [1, 2, 3]
    with pytest.raises(ConfigError, match=r"no cut 'block 9'.*3 that exist"):
        named_cuts(cuts, ["block 9"])
