"""A bundle of three tiny segments, made of real ONNX, for tests of the runtime that need no real network."""

from __future__ import annotations

import contextlib
import hashlib
import io
import itertools
import threading
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from runtime import cascade, manifest
from runtime.camera_replay import ReplayCamera
from runtime.config import BrokerConfig, CameraConfig
from runtime.counters import Counters
from runtime.datatypes import ExitOutput, Features
from runtime.device import Device
from runtime.link import Handler
from runtime.link_mqtt import MqttLink
from runtime.manifest import (
    CodecSpec,
    CutSpec,
    ExitSpec,
    FileSpec,
    Manifest,
    PreprocessSpec,
    Provenance,
    RateSpec,
    SegmentSpec,
    TierSpec,
)
from runtime.node import Node
from runtime.policy import ExitPolicy
from runtime.preprocess import prepare
from runtime.segment import load_segments
from tests.patience import until

CLASSES = 5
RAW = CodecSpec(name="raw", rates=(RateSpec(parameter=0),))
JPEG = CodecSpec(name="jpeg", rates=tuple(RateSpec(parameter=quality) for quality in (50, 75, 90)))


def _graph(
    nodes: Sequence[onnx.NodeProto],
    constants: dict[str, np.ndarray],
    source: tuple[int, Sequence[int]],
    sink: tuple[int, Sequence[int]],
    *more: onnx.ValueInfoProto,
) -> bytes:
    graph = helper.make_graph(
        list(nodes),
        "segment",
        [helper.make_tensor_value_info("in", source[0], ["N", *source[1]])],
        [helper.make_tensor_value_info("out", sink[0], ["N", *sink[1]]), *more],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    onnx.checker.check_model(model)
    data: bytes = model.SerializeToString()
    return data


def _scalar(value: float, dtype: type[np.generic]) -> np.ndarray:
    return np.array(value, dtype)


def _files(rng: np.random.Generator, logit_scale: float, *, guarded: bool) -> dict[str, bytes]:
    pixels, eight, four = (
        (TensorProto.UINT8, (16, 16, 3)),
        (TensorProto.UINT8, (4, 8, 8)),
        (TensorProto.UINT8, (6, 4, 4)),
    )
    node = helper.make_node

    def weights(*shape: int) -> np.ndarray:
        return rng.normal(0, 0.4, shape).astype(np.float32)

    def conv(channels_in: int, channels_out: int, head: list[onnx.NodeProto], start: str) -> list[onnx.NodeProto]:
        return [
            *head,
            node("Conv", [start, "weight"], ["conv"], strides=[2, 2], pads=[1, 1, 1, 1]),
            node("Relu", ["conv"], ["relu"]),
            node("QuantizeLinear", ["relu", "scale", "zero"], ["out"]),
        ]

    prologue = [
        node("Transpose", ["in"], ["nchw"], perm=[0, 3, 1, 2]),
        node("Cast", ["nchw"], ["cast"], to=TensorProto.FLOAT),
        node("Mul", ["cast", "norm"], ["float"]),
    ]
    dequantize = [node("DequantizeLinear", ["in", "scale", "zero"], ["float"])]
    head = [
        *dequantize,
        node("GlobalAveragePool", ["float"], ["pool"]),
        node("Flatten", ["pool"], ["flat"]),
        node("Gemm", ["flat", "weight"], ["out"], transB=1),
    ]
    guard = [node("ReduceMax", ["flat"], ["distance"], axes=[1], keepdims=0)] if guarded else []
    distance = [helper.make_tensor_value_info("distance", TensorProto.FLOAT, ["N"])] if guarded else []
    logits = (TensorProto.FLOAT, (CLASSES,))
    quantizer = {"scale": _scalar(0.05, np.float32), "zero": _scalar(0, np.uint8)}
    norm = {"norm": _scalar(1 / 64, np.float32)}
    return {
        "segments/0.onnx": _graph(
            conv(3, 4, prologue, "float"), {**quantizer, **norm, "weight": weights(4, 3, 3, 3)}, pixels, eight
        ),
        "segments/1.onnx": _graph(
            conv(4, 6, dequantize, "float"), {**quantizer, "weight": weights(6, 4, 3, 3)}, eight, four
        ),
        "segments/2.onnx": _graph(
            head, {**quantizer, "weight": weights(CLASSES, 6) * np.float32(8 * logit_scale)}, four, logits
        ),
        "exits/1.onnx": _graph(
            [*head, *guard], {**quantizer, "weight": weights(CLASSES, 4) * 4}, eight, logits, *distance
        ),
        "exits/2.onnx": _graph(
            [*head, *guard], {**quantizer, "weight": weights(CLASSES, 6) * 4}, four, logits, *distance
        ),
        "labels.txt": "\n".join(f"label {index}" for index in range(CLASSES)).encode(),
    }


def write_tiny_bundle(
    path: Path,
    *,
    thresholds: tuple[float | None, float | None] = (0.6, 0.6),
    heads: bool = True,
    logit_scale: float = 1.0,
    distance_limit: float | None = None,
) -> Path:
    """Write the tiny bundle to `path`: uint8 cuts of 4x8x8 and 6x4x4, five classes, 16x16 pixels.

    With a `distance_limit` its exits have a guard, whose distance is the greatest of the pooled features.
    """
    rng = np.random.default_rng(0)
    files = _files(rng, logit_scale, guarded=distance_limit is not None)
    golden = io.BytesIO()
    np.savez(golden, frames=rng.integers(0, 256, (2, 16, 16, 3), np.uint8))
    files["golden/golden.npz"] = golden.getvalue()
    for name, data in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(data)
    cuts = [((16, 16, 3), "uint8"), ((4, 8, 8), "uint8"), ((6, 4, 4), "uint8"), ((CLASSES,), "float32")]
    manifest.save(
        Manifest(
            format=manifest.FORMAT,
            name="tiny",
            task="classify",
            labels="labels.txt",
            preprocess=PreprocessSpec(height=16, width=16),
            segments=tuple(SegmentSpec(file=f"segments/{index}.onnx", macs=1, max_batch_size=8) for index in range(3)),
            cuts=tuple(
                CutSpec(
                    after=f"layer {index}",
                    tensor=f"t{index}",
                    shape=shape,
                    dtype=dtype,  # type: ignore[arg-type]
                    codecs=(RAW, JPEG) if index == 0 else (RAW,) if index < 3 else (),
                )
                for index, (shape, dtype) in enumerate(cuts)
            ),
            exits=(
                *(
                    ExitSpec(
                        cut=cut,
                        file=f"exits/{cut}.onnx",
                        temperature=1.0,
                        threshold=threshold,
                        agreement=0.9,
                        distance_limit=distance_limit,
                    )
                    for cut, threshold in enumerate(thresholds, 1)
                    if heads
                ),
                ExitSpec(cut=3, file=None, temperature=1.0, threshold=0.0, agreement=1.0),
            ),
            tiers=tuple(
                TierSpec(name=name, last_segment=index) for index, name in enumerate(("device", "edge", "cloud"))
            ),
            golden="golden/golden.npz",
            proof={},
            provenance=Provenance(
                source="made by hand",
                tools={},
                target="any",
                quantization="uint8 cuts",
                opset=17,
                seed=0,
                frames={},
                frames_sha256="",
            ),
            files=tuple(
                FileSpec(path=name, size_bytes=len(data), sha256=hashlib.sha256(data).hexdigest())
                for name, data in files.items()
            ),
        ),
        path,
    )
    return path


@pytest.fixture
def tiny_bundle(tmp_path: Path) -> Path:
    """A fresh tiny bundle that a test may damage."""
    return write_tiny_bundle(tmp_path / "tiny")


@pytest.fixture(scope="session")
def shared_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny bundle for tests that only read it."""
    return write_tiny_bundle(tmp_path_factory.mktemp("bundle") / "tiny")


@pytest.fixture(scope="session")
def make_bundle() -> Callable[..., Path]:
    """The function that writes a tiny bundle, for tests that need other thresholds."""
    return write_tiny_bundle


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of forty pictures that differ."""
    import cv2

    folder = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(1)
    for index, low in itertools.islice(enumerate(itertools.cycle(range(0, 200, 7))), 40):
        cv2.imwrite(str(folder / f"{index:03}.png"), rng.integers(low, low + 56, (24, 32, 3)).astype(np.uint8))
    return folder


@contextlib.contextmanager
def _serving(tier: Device | Node) -> Iterator[None]:
    stop = threading.Event()
    thread = threading.Thread(target=tier.run, args=(stop,), name="tier")
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join(15)
        assert not thread.is_alive(), "the tier did not stop"


@pytest.fixture(scope="session")
def serving() -> Callable[[Device | Node], contextlib.AbstractContextManager[None]]:
    """Runs a device or a node in a thread for as long as a `with` lasts."""
    return _serving


@pytest.fixture
def make_link() -> Iterator[Callable[..., MqttLink]]:
    """A function that makes a link to whatever has an `address`; what else it is given are the broker's settings."""
    links: list[MqttLink] = []

    def make(
        server: Any, name: str = "one", *, counters: Counters | None = None, beat: str | None = None, **settings: Any
    ) -> MqttLink:
        config = BrokerConfig(host=server.address[0], port=server.address[1], **settings)
        will = (f"will/{name}", b"gone")
        links.append(MqttLink(config, client_id=name, will=will, counters=counters or Counters(), beat=beat))
        return links[-1]

    yield make
    for link in links:
        link.close()


@pytest.fixture
def connect(make_link: Callable[..., MqttLink]) -> Callable[..., MqttLink]:
    """A function that makes a link as `make_link` does, with a subscription to `hear`, and connects it."""

    def open_one(server: Any, name: str = "one", *, hear: tuple[str, Handler] | None = None, **more: Any) -> MqttLink:
        link = make_link(server, name, **more)
        if hear is not None:
            link.subscribe(*hear)
        link.start()
        until(lambda: link.connected)
        return link

    return open_one


@pytest.fixture
def memory_broker() -> BrokerConfig:
    """A broker in memory that no other test uses."""
    return BrokerConfig(host=f"memory-{uuid.uuid4()}", kind="memory")


@pytest.fixture(scope="session")
def whole_answers() -> Callable[[Path, Path], list[ExitOutput]]:
    """What the whole chain says of every picture of a folder, run in this process without any link."""

    def answers(bundle_path: Path, source: Path) -> list[ExitOutput]:
        bundle = manifest.load(bundle_path)
        last = len(bundle.manifest.segments) - 1
        tier = cascade.Tier(bundle, *load_segments(bundle, 0, last))
        policy = ExitPolicy.of(bundle, early=False)
        found = []
        for frame in ReplayCamera("cam", CameraConfig(kind="replay", source=str(source), realtime=False)).frames():
            features = Features(0, prepare(frame.pixels, bundle.manifest.preprocess))
            answer = cascade.run([features], tier, policy)[0].answer
            assert answer is not None
            found.append(answer)
        return found

    return answers
