"""What tests of the runtime share: tiny bundles, brokers, links, and tiers that run in a thread."""

from __future__ import annotations

import contextlib
import itertools
import threading
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from runtime import cascade, manifest
from runtime.camera_replay import ReplayCamera
from runtime.config import BrokerConfig, CameraConfig
from runtime.counters import Counters
from runtime.datatypes import ExitOutput, Features
from runtime.device import Device
from runtime.link import Handler
from runtime.link_mqtt import MqttLink
from runtime.manifest import (
    Bundle,
)
from runtime.node import Node
from runtime.policy import ExitPolicy
from runtime.preprocess import prepare
from runtime.segment import load_segments
from tests.patience import until
from tests.tiny_bundle import write_tiny_bundle
from tests.transform_bundle import add_transform, transform_files


@pytest.fixture
def tiny_bundle(tmp_path: Path) -> Path:
    """A fresh tiny bundle that a test may damage."""
    return write_tiny_bundle(tmp_path / "tiny")


@pytest.fixture(scope="session")
def shared_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny bundle for tests that only read it."""
    return write_tiny_bundle(tmp_path_factory.mktemp("bundle") / "tiny")


@pytest.fixture(scope="session")
def transform_bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The tiny bundle with the codec transform at cuts 1 and 2, for tests that only read it."""
    path = write_tiny_bundle(tmp_path_factory.mktemp("transform") / "tiny")
    cuts = manifest.load(path).manifest.cuts
    return add_transform(path, {place: transform_files(cuts[place]) for place in (1, 2)})


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
