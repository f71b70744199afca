"""A variant of the first segment in force: other features, other thresholds, the same bundle."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from runtime import manifest
from runtime.bundle_tool import describe
from runtime.config import BrokerConfig, CameraConfig, DeviceConfig, NodeConfig
from runtime.datatypes import Dropped, Result
from runtime.device import Device
from runtime.errors import BundleError, ConfigError
from runtime.manifest import FileSpec, VariantSpec
from runtime.node import Node
from runtime.segment import load_segments
from runtime.variant import with_each_variant, with_variant

Serving = Callable[[Device | Node], AbstractContextManager[None]]
FILE = "segments/0.v1.onnx"


def add_variant(path: Path, *, threshold: float | None = 0.6) -> Path:
    """Give a bundle a variant of its first segment whose weights are a little smaller."""
    model = onnx.load(path / "segments/0.onnx")
    (weight,) = [tensor for tensor in model.graph.initializer if tensor.name == "weight"]
    weight.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(weight) * np.float32(0.97), "weight"))
    data = model.SerializeToString()
    (path / FILE).write_bytes(data)
    known = manifest.load(path).manifest
    first, *rest = known.segments
    early = tuple(msgspec.structs.replace(spec, threshold=threshold, agreement=0.8) for spec in known.exits[:-1])
    variant = VariantSpec(
        file=FILE,
        macs=1,
        max_batch_size=4,
        cosine=0.99,
        agreement=0.9,
        agreement_low=0.8,
        agreement_high=0.95,
        n=50,
        exits=(*early, known.exits[-1]),
    )
    spec = FileSpec(path=FILE, size_bytes=len(data), sha256=hashlib.sha256(data).hexdigest())
    manifest.save(
        msgspec.structs.replace(
            known,
            segments=(msgspec.structs.replace(first, variants=(variant,)), *rest),
            files=(*known.files, spec),
        ),
        path,
    )
    return path


@pytest.fixture
def varied(tiny_bundle: Path) -> Path:
    return add_variant(tiny_bundle)


def answers(config: DeviceConfig) -> list[Result]:
    lines: list[Result | Dropped] = []
    Device(config, lines.append).run(threading.Event())
    return sorted((line for line in lines if isinstance(line, Result)), key=lambda line: line.frame)


def settings(path: Path, broker: BrokerConfig, photos: Path, **more: Any) -> DeviceConfig:
    camera = {"front": CameraConfig(kind="replay", source=str(photos), realtime=False)}
    return DeviceConfig(bundle=str(path), broker=broker, id="cam", camera=camera, **more)


def test_a_variant_takes_the_place_of_the_first_segment_and_its_exits(varied: Path) -> None:
    bundle = manifest.load(varied)
    seen = with_variant(bundle, 1)
    assert (seen.id, seen.key, seen.labels) == (bundle.id, bundle.key, bundle.labels)
    assert [spec.file for spec in seen.manifest.segments] == [FILE, "segments/1.onnx", "segments/2.onnx"]
    assert seen.manifest.segments[0].max_batch_size == 4
    assert [spec.agreement for spec in seen.manifest.exits] == [0.8, 0.8, 1.0]
    assert with_variant(bundle, 0) is bundle
    assert [one.manifest.segments[0].file for one in with_each_variant(bundle)] == ["segments/0.onnx", FILE]


def test_deeper_segments_take_what_a_variant_makes(varied: Path) -> None:
    bundle = manifest.load(varied)
    segments, _ = load_segments(bundle, 0, 2)
    others, _ = load_segments(with_variant(bundle, 1), 0, 0)
    frame = np.random.default_rng(0).integers(0, 256, (1, 16, 16, 3), np.uint8)
    own, variant = segments[0].run(frame), others[0].run(frame)
    assert (variant.shape, variant.dtype) == (own.shape, own.dtype)
    assert not np.array_equal(variant, own)
    assert segments[2].run(segments[1].run(variant)).shape == (1, 5)


def test_a_variant_that_is_not_there_is_refused_with_those_that_are(varied: Path, shared_bundle: Path) -> None:
    with pytest.raises(ConfigError, match=r"variant: 2 is not in the bundle, which has 0 \(the segment itself\) to 1"):
        with_variant(manifest.load(varied), 2)
    with pytest.raises(ConfigError, match="which has none but 0"):
        with_variant(manifest.load(shared_bundle), 1)


def test_a_device_and_a_node_answer_through_a_variant(
    varied: Path, photos: Path, memory_broker: BrokerConfig, serving: Serving
) -> None:
    node = Node(NodeConfig(bundle=str(varied), broker=memory_broker, id="box", early_exits=False))
    with serving(node):
        own = answers(settings(varied, memory_broker, photos, early_exits=False))
        made = answers(settings(varied, memory_broker, photos, early_exits=False, variant=1))
    assert [line.variant for line in own] == [0] * 40
    assert [line.variant for line in made] == [1] * 40
    assert {(line.tier, line.exit) for line in made} == {("cloud", 3)}
    assert any(left.confidence != right.confidence for left, right in zip(own, made, strict=True))


def test_the_thresholds_behind_a_variant_are_its_own_on_the_device_and_on_the_node(
    tmp_path: Path,
    make_bundle: Callable[..., Path],
    photos: Path,
    memory_broker: BrokerConfig,
    serving: Serving,
) -> None:
    path = add_variant(make_bundle(tmp_path / "silent", thresholds=(0.0, 0.0)), threshold=None)
    with serving(Node(NodeConfig(bundle=str(path), broker=memory_broker, id="box"))):
        own = answers(settings(path, memory_broker, photos))
        made = answers(settings(path, memory_broker, photos, variant=1))
    assert {(line.tier, line.exit) for line in own} == {("device", 1)}
    assert {(line.tier, line.exit) for line in made} == {("cloud", 3)}


def test_a_device_that_sends_pictures_sends_nothing_of_its_variant(
    varied: Path, photos: Path, memory_broker: BrokerConfig, serving: Serving
) -> None:
    with serving(Node(NodeConfig(bundle=str(varied), broker=memory_broker, id="box", early_exits=False))):
        made = answers(settings(varied, memory_broker, photos, codec="jpeg", variant=1))
    assert {(line.tier, line.variant, line.cut) for line in made} == {("cloud", 0, 0)}


def test_a_bundle_shows_its_variants(varied: Path) -> None:
    assert "0.900 [0.800, 0.950]" in describe(manifest.load(varied))


def test_a_variant_whose_bytes_were_changed_is_refused(varied: Path) -> None:
    data = bytearray((varied / FILE).read_bytes())
    data[-20] ^= 1
    (varied / FILE).write_bytes(bytes(data))
    with pytest.raises(BundleError, match=r"0.v1.onnx is not the file that was exported"):
        load_segments(with_variant(manifest.load(varied), 1), 0, 0)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda tree: tree["segments"][0]["variants"][0].update(file="segments/9.onnx"), "not in the list of files"),
        (lambda tree: tree["segments"][0]["variants"][0]["exits"].pop(0), "are not the bundle's"),
        (lambda tree: tree["segments"][0]["variants"][0]["exits"].pop(), "exits must be in order"),
        (
            lambda tree: tree["segments"][1].update(variants=tree["segments"][0]["variants"]),
            "only the first segment may have variants",
        ),
    ],
)
def test_variants_that_make_no_sense_are_refused(varied: Path, change: Callable[[Any], Any], sentence: str) -> None:
    tree = json.loads((varied / "manifest.json").read_text())
    change(tree)
    (varied / "manifest.json").write_text(json.dumps(tree))
    with pytest.raises(BundleError, match=sentence):
        manifest.load(varied)
