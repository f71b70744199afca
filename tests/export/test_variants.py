"""Variants of a first segment, made, judged and written by a real export of a network whose channels are redundant."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest

from export.distill import steps_for
from export.draft import segment_file
from export.frames import FrameSource, load_frames
from export.graph import Index
from export.pipeline import Exported, export
from export.prove import run_whole
from export.recipe import Recipe, open_model
from export.report import Report
from export.source import InputOptions
from export.variants import rows
from runtime.bundle_tool import describe, verify_bundle
from runtime.manifest import load
from runtime.segment import load_segments
from runtime.variant import with_variant

NET = """
import torch
from torch import nn

class Net(nn.Module):
    input_size, mean, std = 32, 0.5, 0.5

    def __init__(self):
        super().__init__()
        torch.manual_seed(2)
        self.stem = nn.Conv2d(3, 16, 3, 2, 1)
        self.expand, self.project = nn.Conv2d(16, 192, 1), nn.Conv2d(192, 16, 1)
        self.depth = nn.Conv2d(192, 192, 3, 1, 1, groups=192)
        for layer in (self.expand, self.depth):  # every channel three times: two thirds of them tell nothing new
            layer.weight.data = layer.weight.data[:64].repeat(3, 1, 1, 1)
            layer.bias.data = layer.bias.data[:64].repeat(3)
        self.down = nn.Conv2d(16, 48, 3, 2, 1)
        self.last = nn.Conv2d(48, 64, 3, 2, 1)
        self.head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 5))

    def forward(self, x):
        x = torch.relu(self.stem(x))
        x = self.project(nn.functional.relu6(self.depth(nn.functional.relu6(self.expand(x)))))
        x = torch.relu(self.last(torch.relu(self.down(x))))
        return self.head(x) * 60

def factory(): return Net()
"""
SILENT = Report(silent=True)


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory, photos: Path) -> Recipe:
    path = tmp_path_factory.mktemp("wide") / "net.py"
    path.write_text(NET)
    return Recipe(
        model=f"{path}:factory",
        frames=(FrameSource(photos),),
        tiers=("device", "cloud"),
        cuts=("project",),
        agreement=0.8,
        variants=2,
    )


@pytest.fixture(scope="module")
def varied(wide: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    return export(wide, tmp_path_factory.mktemp("bundles") / "varied", SILENT)


def test_a_bundle_has_faster_variants_that_agree(varied: Exported) -> None:
    manifest = varied.bundle.manifest
    variants = manifest.segments[0].variants
    assert variants
    assert not any(spec.variants for spec in manifest.segments[1:])
    for number, spec in enumerate(variants, start=1):
        assert spec.file == f"segments/0.v{number}.onnx"
        assert spec.macs < manifest.segments[0].macs
        assert spec.n == 12
        assert spec.agreement >= 0.75
        assert spec.cosine > 0.95
        assert spec.agreement_low <= spec.agreement <= spec.agreement_high
        assert [one.file for one in spec.exits] == [one.file for one in manifest.exits]
        assert all(one.measured is not None for one in spec.exits)
    assert [spec.macs for spec in variants] == sorted((spec.macs for spec in variants), reverse=True)
    verify_bundle(varied.bundle.path)
    assert "variant of segment 0" in describe(varied.bundle)


def test_what_a_variant_makes_is_the_bundles_own_wire(varied: Exported) -> None:
    bundle = varied.bundle
    own, variant = (onnx.load(bundle.path / file) for file in (segment_file(0), "segments/0.v1.onnx"))
    scales = []
    for model in (own, variant):
        assert [dim.dim_value for dim in model.graph.output[0].type.tensor_type.shape.dim][1:] == [16, 16, 16]
        index = Index(model)
        quantizer = next(node for node in reversed(index.nodes) if node.op_type == "QuantizeLinear")
        scales.append([index.constant(name) for name in quantizer.input[1:]])
    for left, right in zip(*scales, strict=True):
        assert left is not None
        assert right is not None
        np.testing.assert_array_equal(left, right)


def test_rows_have_every_variant_before_every_tail(varied: Exported, wide: Recipe) -> None:
    bundle = load(varied.bundle.path)
    frames = load_frames(wide.frames, bundle.manifest.preprocess, 60, 0).of("judge")
    opened = open_model(wide.model, InputOptions(), SILENT)
    table = rows(bundle, frames, run_whole(opened.simplified.trunk(), frames))
    count = len(bundle.manifest.segments[0].variants) + 1
    assert [(row["variant"], row["exit"]) for row in table] == [
        (number, spec.cut) for number in range(count) for spec in bundle.manifest.exits
    ]
    last = {row["variant"]: row for row in table if row["exit"] == bundle.manifest.exits[-1].cut}
    for number, spec in enumerate(bundle.manifest.segments[0].variants, start=1):
        assert last[number]["agreement"] == pytest.approx(spec.agreement)
        assert last[number]["cosine"] == pytest.approx(spec.cosine, abs=1e-6)
        assert last[number]["ratio"] > 1
        assert last[number]["mb"] < last[0]["mb"] + 0.05
    assert last[0]["cosine"] == 1
    assert rows(bundle, [], np.zeros((0, 5), np.float32)) == []


def test_a_float_bundle_has_variants_too(wide: Recipe, tmp_path: Path) -> None:
    made = export(replace(wide, target=None, variants=1), tmp_path / "float", SILENT)
    (spec,) = made.bundle.manifest.segments[0].variants
    assert spec.agreement >= 0.9
    segments, _ = load_segments(with_variant(made.bundle, 1), 0, 1)
    frame = np.zeros((1, 32, 32, 3), np.uint8)
    features = segments[0].run(frame)
    assert features.dtype == np.float32
    assert segments[1].run(features).shape == (1, 5)


def test_without_variants_nothing_is_made(wide: Recipe, tmp_path: Path) -> None:
    made = export(replace(wide, variants=0), tmp_path / "none", SILENT)
    assert made.bundle.manifest.segments[0].variants == ()
    assert not list(made.bundle.path.glob("segments/*.v*"))
    shutil.rmtree(made.bundle.path)


def test_large_stand_ins_are_not_trained() -> None:
    assert steps_for(1) > steps_for(300_000_000) > 0
    assert steps_for(10**12) == 0
