"""Sensitivity: torch runs ONNX graphs as onnxruntime does, and gradients and probes find the same directions."""

from __future__ import annotations

import numpy as np
import onnxruntime as ort
import onnxslim
import pytest
import torch
from onnx import ModelProto, helper, numpy_helper

from export.graph import OPSET, finish, tensor_info
from export.sensitivity import Tail, by_gradients, by_probes, sensitivity
from export.source_torch import to_onnx
from export.torch_graph import TorchGraph, UnknownOperatorError
from export.transform import Layout, layout_of

CHANNELS, SIDE = 6, 8


def tail_model() -> ModelProto:
    """Mean over a map, then a linear layer that reads channels 0 and 1 only."""
    weight = np.zeros((CHANNELS, 5), np.float32)
    weight[:2] = np.random.default_rng(0).normal(size=(2, 5))
    graph = helper.make_graph(
        [
            helper.make_node("GlobalAveragePool", ["x"], ["pooled"]),
            helper.make_node("Flatten", ["pooled"], ["flat"]),
            helper.make_node("Gemm", ["flat", "weight"], ["y"], alpha=8.0),
        ],
        "tail",
        [tensor_info("x", "float32", (CHANNELS, SIDE, SIDE))],
        [tensor_info("y", "float32", (5,))],
        [numpy_helper.from_array(weight, "weight")],
    )
    return finish(helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)]))


@pytest.fixture(scope="module")
def case() -> tuple[Tail, np.ndarray, Layout]:
    layout = layout_of((SIDE, SIDE, CHANNELS))
    features = np.random.default_rng(1).normal(size=(40, SIDE * SIDE, CHANNELS)).astype(np.float32)
    return Tail(tail_model(), 10_000, 8, maps=True), features, layout


@pytest.mark.parametrize("method", [by_gradients, by_probes])
def test_only_what_is_read_matters(case: tuple[Tail, np.ndarray, Layout], method: object) -> None:
    tail, features, layout = case
    found = method(tail, features, layout, 0)  # type: ignore[operator]
    assert found.shape == (len(layout.band_sizes), CHANNELS, CHANNELS)
    # The mean over a map is its lowest frequency, the first band.
    assert np.trace(found[0]) > 1e3 * max(np.trace(band) for band in found[1:])
    assert np.abs(found[0][2:, 2:]).max() < 1e-2 * np.trace(found[0])


def test_probes_find_what_gradients_find(case: tuple[Tail, np.ndarray, Layout]) -> None:
    tail, features, layout = case
    gradients, probes = by_gradients(tail, features, layout, 0)[0], by_probes(tail, features, layout, 0)[0]
    cosine = (gradients * probes).sum() / np.sqrt((gradients**2).sum() * (probes**2).sum())
    assert cosine > 0.9
    assert 0.3 < np.trace(probes) / np.trace(gradients) < 3


def test_the_same_seed_gives_the_same(case: tuple[Tail, np.ndarray, Layout]) -> None:
    tail, features, layout = case
    assert np.array_equal(by_probes(tail, features, layout, 3), by_probes(tail, features, layout, 3))
    assert np.array_equal(by_gradients(tail, features, layout, 3), by_gradients(tail, features, layout, 3))


class Everything(torch.nn.Module):
    """Operators that classifiers are made of."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.depthwise = torch.nn.Conv2d(8, 8, 3, padding=2, dilation=2, groups=8)
        self.norm = torch.nn.LayerNorm(8)
        self.query = torch.nn.Linear(8, 8)
        self.out = torch.nn.Linear(8, 4)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        x = torch.nn.functional.max_pool2d(torch.nn.functional.relu6(self.conv(image)), 3, 2, 1)
        x = torch.nn.functional.hardswish(self.depthwise(x)) + torch.sigmoid(x)
        tokens = self.norm(x.flatten(2).transpose(1, 2))
        weights = torch.softmax(self.query(tokens) @ tokens.transpose(1, 2), -1)
        tokens = tokens + weights @ tokens
        logits: torch.Tensor = self.out(torch.nn.functional.gelu(tokens).mean(1))
        return logits


def test_torch_runs_the_graph_as_onnxruntime_does() -> None:
    torch.manual_seed(0)
    model = onnxslim.slim(to_onnx(Everything(), (32, 32)))
    image = torch.randn(1, 3, 32, 32)
    (expected,) = ort.InferenceSession(model.SerializeToString()).run(None, {"image": image.numpy()})
    assert np.allclose(TorchGraph(model)(image).detach().numpy(), expected, atol=1e-5)


def unknown() -> ModelProto:
    graph = helper.make_graph(
        [helper.make_node("ArgMax", ["x"], ["y"], axis=1)],
        "unknown",
        [tensor_info("x", "float32", (CHANNELS, SIDE, SIDE))],
        [tensor_info("y", "float32", (1, SIDE, SIDE))],
    )
    return finish(helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)]))


def test_an_operator_without_gradient_is_named() -> None:
    with pytest.raises(UnknownOperatorError, match="ArgMax"):
        TorchGraph(unknown())


def test_probes_take_over_where_torch_cannot_run_the_graph(case: tuple[Tail, np.ndarray, Layout]) -> None:
    tail, features, layout = case
    model = tail_model()
    model.graph.node[0].op_type = "GlobalMaxPool"  # known to onnxruntime only
    found, method = sensitivity(Tail(model, tail.macs, tail.batch, maps=True), features, layout, 0, "gradients")
    assert method == "probes"
    assert np.isfinite(found).all()
