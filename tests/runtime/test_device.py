from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest

from runtime.config import BrokerConfig, CameraConfig, DeviceConfig, NodeConfig
from runtime.counters import Counters
from runtime.datatypes import Dropped, ExitOutput, Result
from runtime.device import Device
from runtime.errors import BundleError, CameraError, ConfigError
from runtime.link import open_link
from runtime.node import Node
from runtime.task_classify import Classification

Serving = Callable[[Device | Node], AbstractContextManager[None]]
LineOf = Result | Dropped


def replay(source: Path, **settings: Any) -> dict[str, CameraConfig]:
    return {"front": CameraConfig(kind="replay", source=str(source), realtime=False, **settings)}


def run(config: DeviceConfig) -> tuple[list[Result], list[Dropped], dict[str, int]]:
    lines: list[LineOf] = []
    device = Device(config, lines.append)
    device.run(threading.Event())
    results = [line for line in lines if isinstance(line, Result)]
    dropped = [line for line in lines if isinstance(line, Dropped)]
    return results, dropped, device.counters.snapshot()


def test_answers_through_a_node_are_those_of_the_whole_chain_bit_for_bit(
    shared_bundle: Path,
    photos: Path,
    memory_broker: BrokerConfig,
    serving: Serving,
    whole_answers: Callable[[Path, Path], list[ExitOutput]],
) -> None:
    node = Node(NodeConfig(bundle=str(shared_bundle), broker=memory_broker, id="box", early_exits=False))
    with serving(node):
        config = DeviceConfig(
            bundle=str(shared_bundle), broker=memory_broker, id="cam", early_exits=False, camera=replay(photos)
        )
        results, dropped, counters = run(config)
    assert not dropped
    assert len(results) == 40
    assert counters['frames_captured_total{camera="front"}'] == 40
    for result, whole in zip(
        sorted(results, key=lambda line: line.frame), whole_answers(shared_bundle, photos), strict=True
    ):
        assert isinstance(whole.answer, Classification)
        assert (result.answer["label_index"], result.confidence) == (whole.answer.label_index, whole.confidence)
        assert [score for _, score in result.answer["topk"]] == [score for _, score in whole.answer.topk]
        assert (result.tier, result.exit, result.codec, result.cut, result.degraded) == ("cloud", 3, "raw", 1, None)
        assert result.agreement == 1.0
        assert result.bytes_up > 44
        assert 0 <= sum(result.timings.values()) <= result.age_ms + 1


def test_a_confident_exit_answers_without_a_byte(
    shared_bundle: Path, photos: Path, memory_broker: BrokerConfig
) -> None:
    results, dropped, counters = run(
        DeviceConfig(bundle=str(shared_bundle), broker=memory_broker, id="cam", budget_ms=200, camera=replay(photos))
    )
    early = [result for result in results if result.degraded is None]
    assert early
    assert not dropped
    assert all((line.tier, line.exit, line.bytes_up, line.agreement) == ("device", 1, 0, 0.9) for line in early)
    assert all(line.confidence >= 0.6 for line in early)
    assert "offload_bytes_total" not in counters or len(early) < 40


def test_answers_that_the_guard_withholds_are_counted(
    make_bundle: Callable[..., Path], tmp_path: Path, photos: Path, memory_broker: BrokerConfig
) -> None:
    bundle = make_bundle(tmp_path / "guarded", thresholds=(0.0, None), distance_limit=0.0)
    config = DeviceConfig(
        bundle=str(bundle), broker=memory_broker, id="cam", last_segment=2, camera=replay(photos, frames=7)
    )
    results, dropped, counters = run(config)
    assert not dropped
    assert [result.exit for result in results] == [3] * 7
    assert counters['answers_withheld_total{exit="1",reason="unlike"}'] == 7


def test_an_agreement_that_the_bundle_does_not_know_is_refused(
    shared_bundle: Path, photos: Path, memory_broker: BrokerConfig
) -> None:
    config = DeviceConfig(bundle=str(shared_bundle), broker=memory_broker, agreement=0.97, camera=replay(photos))
    with pytest.raises(ConfigError, match=r"agreement: the bundle has no thresholds for 0\.97; choose one of 0\.9"):
        Device(config)


def test_nobody_above_and_the_budget_ends(shared_bundle: Path, photos: Path, memory_broker: BrokerConfig) -> None:
    config = DeviceConfig(
        bundle=str(shared_bundle),
        broker=memory_broker,
        id="cam",
        early_exits=False,
        budget_ms=50,
        camera=replay(photos, frames=6),
    )
    results, dropped, counters = run(config)
    assert not dropped
    assert [result.degraded for result in results] == ["deadline"] * 6
    assert all((result.tier, result.exit, result.agreement) == ("device", 1, None) for result in results)
    assert all(45 <= result.age_ms < 1000 for result in results)
    assert counters['results_degraded_total{camera="front",reason="deadline"}'] == 6


def test_an_answer_older_than_the_budget_is_never_told_as_fresh(
    shared_bundle: Path, photos: Path, memory_broker: BrokerConfig
) -> None:
    lines: list[LineOf] = []

    def slow(line: LineOf) -> None:
        lines.append(line)
        time.sleep(0.05)  # meanwhile the next frame is grabbed, and gets old

    config = DeviceConfig(
        bundle=str(shared_bundle),
        broker=memory_broker,
        id="cam",
        last_segment=2,
        budget_ms=30,
        camera=replay(photos, frames=6),
    )
    Device(config, slow).run(threading.Event())
    results = [line for line in lines if isinstance(line, Result)]
    assert len(results) == 6
    assert all((result.degraded == "deadline") == (result.age_ms > 30) for result in results)
    assert sum(result.degraded == "deadline" and result.agreement is None for result in results) >= 4


def test_no_broker_and_the_device_still_answers(
    shared_bundle: Path, photos: Path, free_port: Callable[[], int]
) -> None:
    config = DeviceConfig(
        bundle=str(shared_bundle),
        broker=BrokerConfig(host="127.0.0.1", port=free_port()),
        id="cam",
        early_exits=False,
        camera=replay(photos, frames=5),
    )
    results, dropped, _ = run(config)
    assert not dropped
    assert [result.degraded for result in results] == ["offline"] * 5


def test_a_live_camera_never_waits_for_the_window(
    shared_bundle: Path, photos: Path, memory_broker: BrokerConfig
) -> None:
    camera = CameraConfig(kind="replay", source=str(photos), realtime=True, max_fps=100, frames=20)
    config = DeviceConfig(
        bundle=str(shared_bundle),
        broker=memory_broker,
        id="cam",
        early_exits=False,
        max_in_flight=1,
        budget_ms=1000,
        camera={"front": camera},
    )
    results, dropped, counters = run(config)
    reasons = [result.degraded for result in results]
    # The first frame fills the window until the device stops or its budget ends; the others are answered at once.
    assert reasons.count("busy") == len(results) - 1
    stale = counters.get('frames_dropped_total{camera="front",reason="stale"}', 0)
    assert len(results) + len(dropped) + stale == counters['frames_captured_total{camera="front"}']


def test_without_any_exit_a_frame_is_dropped_with_its_reason(
    tmp_path: Path, make_bundle: Callable[..., Path], photos: Path, memory_broker: BrokerConfig
) -> None:
    bundle = make_bundle(tmp_path / "bare", heads=False)
    config = DeviceConfig(
        bundle=str(bundle), broker=memory_broker, id="cam", budget_ms=30, camera=replay(photos, frames=3)
    )
    results, dropped, counters = run(config)
    assert not results
    assert [(line.frame, line.dropped, line.label) for line in dropped] == [(n, "deadline", None) for n in range(3)]
    assert counters['frames_dropped_total{camera="front",reason="deadline"}'] == 3


def test_a_node_with_another_bundle_refuses_and_says_why(
    tmp_path: Path,
    make_bundle: Callable[..., Path],
    shared_bundle: Path,
    photos: Path,
    memory_broker: BrokerConfig,
    serving: Serving,
) -> None:
    other = make_bundle(tmp_path / "other", thresholds=(0.5, 0.5))
    node = Node(NodeConfig(bundle=str(other), broker=memory_broker, id="box"))
    with serving(node):
        results, _, _ = run(
            DeviceConfig(
                bundle=str(shared_bundle),
                broker=memory_broker,
                id="cam",
                early_exits=False,
                camera=replay(photos, frames=3),
            )
        )
    assert all("install the same on every tier" in (result.degraded or "") for result in results)
    assert node.counters.snapshot()['packets_refused_total{reason="bundle"}'] == 3


def test_pictures_instead_of_features_are_one_of_the_codecs(
    shared_bundle: Path, photos: Path, memory_broker: BrokerConfig, serving: Serving
) -> None:
    node = Node(NodeConfig(bundle=str(shared_bundle), broker=memory_broker, id="box", early_exits=False))
    with serving(node):
        results, _, _ = run(
            DeviceConfig(
                bundle=str(shared_bundle),
                broker=memory_broker,
                id="cam",
                codec="jpeg:90",
                camera=replay(photos, frames=5),
            )
        )
    assert [(result.tier, result.codec, result.cut) for result in results] == [("cloud", "jpeg", 0)] * 5


def test_garbage_among_the_replies_is_counted_and_harmless(
    shared_bundle: Path, photos: Path, memory_broker: BrokerConfig, serving: Serving
) -> None:
    node = Node(NodeConfig(bundle=str(shared_bundle), broker=memory_broker, id="box", early_exits=False))
    device = Device(
        DeviceConfig(
            bundle=str(shared_bundle),
            broker=memory_broker,
            id="cam",
            early_exits=False,
            camera={"front": CameraConfig(kind="replay", source=str(photos), max_fps=50)},
        ),
    )
    stranger = open_link(memory_broker, client_id="stranger", counters=device.counters)
    with serving(node), serving(device):
        stranger.start()
        for index in range(200):
            stranger.publish("kinflow/v1/home/d/cam/res", os.urandom(index))
    stranger.close()
    assert device.counters.snapshot()['packets_refused_total{reason="damaged"}'] == 200


def test_all_segments_on_the_device_need_nobody(shared_bundle: Path, photos: Path, memory_broker: BrokerConfig) -> None:
    config = DeviceConfig(
        bundle=str(shared_bundle),
        broker=memory_broker,
        id="cam",
        last_segment=2,
        early_exits=False,
        camera=replay(photos, frames=4),
    )
    results, _, counters = run(config)
    assert [(result.tier, result.exit, result.degraded) for result in results] == [("device", 3, None)] * 4
    assert "offload_bytes_total" not in counters


def test_what_applications_see(shared_bundle: Path, photos: Path, memory_broker: BrokerConfig) -> None:
    seen: dict[str, list[bytes]] = {}
    watcher = open_link(memory_broker, client_id="watcher", counters=Counters())
    watcher.subscribe("kinflow/v1/home/d/cam/#", lambda topic, payload: seen.setdefault(topic, []).append(payload))
    watcher.start()
    run(DeviceConfig(bundle=str(shared_bundle), broker=memory_broker, id="cam", camera=replay(photos, frames=3)))
    watcher.close()
    root = "kinflow/v1/home/d/cam"
    assert seen[f"{root}/availability"] == [b"online", b"offline"]
    assert len(seen[f"{root}/cam/front/result"]) == 3
    assert b'"label":"label' in seen[f"{root}/cam/front/result"][0]
    assert b'"bundle":"' in seen[f"{root}/birth"][0]
    assert seen[f"{root}/cam/front/status"][-1] == b"offline"
    assert b"results_total" in seen[f"{root}/stats"][-1]


def test_a_clip_that_is_not_there_ends_the_device(shared_bundle: Path, memory_broker: BrokerConfig) -> None:
    config = DeviceConfig(
        bundle=str(shared_bundle), broker=memory_broker, id="cam", camera=replay(Path("/nowhere/clip.mp4"))
    )
    with pytest.raises(CameraError, match=r"/nowhere/clip\.mp4"):
        run(config)


def test_settings_that_do_not_fit_the_bundle(shared_bundle: Path, memory_broker: BrokerConfig, photos: Path) -> None:
    def device(**settings: Any) -> Device:
        return Device(DeviceConfig(bundle=str(shared_bundle), broker=memory_broker, id="cam", **settings))

    with pytest.raises(ConfigError, match="last_segment: 3 is not one of the bundle's 3 segments"):
        device(last_segment=3)
    with pytest.raises(ConfigError, match=r"codec 'jpeg:33' is not in the bundle; it has jpeg:50"):
        device(codec="jpeg:33")
    with pytest.raises(ConfigError, match="codec 'gif' is unknown"):
        device(codec="gif")


def test_a_damaged_segment_is_refused_at_the_start(tiny_bundle: Path, memory_broker: BrokerConfig) -> None:
    (tiny_bundle / "segments/0.onnx").write_bytes(b"")
    with pytest.raises(BundleError, match="copy the bundle again"):
        Device(DeviceConfig(bundle=str(tiny_bundle), broker=memory_broker, id="cam"))


def test_a_lone_device_has_nobody_to_send_pictures_to(
    shared_bundle: Path, photos: Path, memory_broker: BrokerConfig
) -> None:
    config = DeviceConfig(
        bundle=str(shared_bundle),
        broker=memory_broker,
        id="cam",
        last_segment=2,
        codec="jpeg:50",
        camera=replay(photos, frames=4),
    )
    results, _, _ = run(config)
    assert [(result.tier, result.degraded) for result in results] == [("device", None)] * 4


def test_what_a_callers_own_code_raises_ends_the_run_with_it(
    shared_bundle: Path, photos: Path, memory_broker: BrokerConfig, serving: Serving
) -> None:
    """Also on the link's thread, where the link would swallow it."""

    def fail(result: LineOf) -> None:
        raise ZeroDivisionError

    node = Node(NodeConfig(bundle=str(shared_bundle), broker=memory_broker, id="box", early_exits=False))
    config = DeviceConfig(
        bundle=str(shared_bundle), broker=memory_broker, id="cam", early_exits=False, camera=replay(photos)
    )
    device = Device(config, fail)
    with serving(node), pytest.raises(ZeroDivisionError):
        device.run(threading.Event())
