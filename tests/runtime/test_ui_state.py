"""What the page knows, and how it says it: whatever is published, it stays small, true and harmless."""

from __future__ import annotations

import json
from typing import Any
from xml.etree import ElementTree as ET

import cv2
import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime import ui_charts, ui_plan, ui_plan_view, ui_state, ui_view
from runtime.counters import Counters
from runtime.datatypes import Result
from runtime.events import Event
from runtime.topics import Subtree
from runtime.ui_messages import KINDS
from runtime.ui_state import Camera, Site

BOARD, BOX = Subtree("home", "d", "board"), Subtree("home", "n", "box")
PICTURE = cv2.imencode(".jpg", np.zeros((90, 160, 3), np.uint8))[1].tobytes()
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=12),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)


def result(**changes: Any) -> bytes:
    told: dict[str, Any] = {
        "camera": "porch",
        "frame": 7,
        "task": "detect",
        "label": "1 person",
        "confidence": 0.9,
        "answer": {
            "boxes": [{"label": "person", "score": 0.9, "box": [10.0, 20.0, 30.5, 60.0]}],
            "presence": 0.9,
            "size": [160, 90],
        },
        "tier": "edge",
        "exit": 2,
        "bytes_up": 1000,
        "age_ms": 30.0,
        "what_comes_later": {"is": "left alone"},
    }
    return json.dumps({**told, **changes}).encode()


def heard(*messages: tuple[str, bytes], now_s: float = 1000.0) -> Site:
    site = Site("home")
    for topic, payload in messages:
        site.hear(topic, payload, now_s)
    return site


def camera_of(site: Site) -> Camera:
    return site.cameras["board", "porch"]


def everything(site: Site, now_s: float) -> str:
    """All that the page would draw, as one text."""
    figures = site.figures(now_s)
    parts = [ui_view.summary(site, figures, now_s), ui_view.ages(figures, site.tiers), ui_view.machines(site, now_s)]
    parts += [ui_view.losses(site.losses(), site.machines.values()), ui_plan_view.plans(site, now_s)]
    for camera in site.cameras.values():
        parts += [ui_view.drawing(camera, site.tiers), ui_view.title(camera, site.machines.get(("d", camera.device)))]
        parts += [ui_view.caption(camera, site.tiers), ui_view.flags(camera, now_s), ui_view.details(camera)]
    series = site.series(now_s)
    charts = [ui_charts.shares(series), ui_charts.traffic(series), ui_charts.confidences(figures, site.tiers)]
    assert json.dumps(charts, allow_nan=False)
    return "".join(parts)


def markup(text: str) -> ET.Element:
    return ET.fromstring(f"<all>{text}</all>")


def test_a_result_of_the_device_is_what_the_page_reads() -> None:
    said = Result(
        camera="porch",
        frame=3,
        task="classify",
        label="cat",
        confidence=0.7,
        answer={"label_index": 2, "topk": [["cat", 0.7], ["dog", 0.2]]},
        tier="device",
        exit=1,
        agreement=0.98,
        codec=None,
        cut=None,
        bytes_up=0,
        age_ms=12.0,
        timings={"wait": 0.2},
        degraded="offline",
        repeats=2,
    )
    site = heard((BOARD.result("porch"), msgspec.json.encode(said)))
    assert not site.refused
    camera = camera_of(site)
    assert camera.said is not None
    assert camera.said.answer.topk == (("cat", 0.7), ("dog", 0.2))
    words = " ".join(markup(ui_view.caption(camera, site.tiers) + ui_view.flags(camera, 1000.0)).itertext())
    for word in ("cat", "0.70", "device", "exit 1", "12 ms", "nothing sent", "degraded: offline", "repeats frame 2"):
        assert word in words


def test_an_event_of_the_device_is_what_the_page_reads() -> None:
    said = Event("s-porch-1", "new", "porch", 7, "person", 0.9, 0.95, (1.0, 2.0, 3.0, 4.0), 120.0, age_ms=30.0)
    site = heard((BOARD.result("porch"), result()), (BOARD.event("porch"), msgspec.json.encode(said)))
    assert not site.refused
    assert [(event.type, event.label) for event in camera_of(site).events] == [("new", "person")]
    assert "Events" in ui_view.details(camera_of(site))


def test_an_event_that_comes_again_is_shown_once() -> None:
    def told(session: str, sequence: int) -> tuple[str, bytes]:
        numbered = {"type": "new", "label": f"{session}{sequence}", "session": session, "sequence": sequence}
        return BOARD.event("porch"), json.dumps(numbered).encode()

    site = heard(*(told(*key) for key in [("a", 1), ("a", 3), ("a", 1), ("a", 2), ("a", 3), ("b", 1)]))
    assert not site.refused
    assert [event.label for event in camera_of(site).events] == ["a1", "a3", "a2", "b1"]


def test_boxes_lie_where_the_answer_says_in_the_frame_it_says() -> None:
    site = heard((BOARD.result("porch"), result()))
    drawn = ET.fromstring(ui_view.drawing(camera_of(site), site.tiers))
    assert drawn.attrib["viewBox"] == "0 0 160 90"
    first = drawn.findall("rect")[0].attrib
    assert [float(first[side]) for side in ("x", "y", "width", "height")] == [10.0, 20.0, 20.5, 40.0]
    assert first["stroke"] == ui_view.COLOURS["edge"]


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        ({"boxes": [], "presence": 0.1, "size": [160, 90]}, "nothing here"),
        ({"boxes": None, "presence": 0.8, "size": [160, 90]}, "where is not known"),
        ({"topk": [["cab", 0.5], ["van", 0.3]]}, "van"),
        ({}, "1 person"),
    ],
)
def test_an_answer_without_boxes_is_told_in_their_place(answer: dict[str, Any], words: str) -> None:
    site = heard((BOARD.result("porch"), result(answer=answer)))
    assert words in " ".join(ET.fromstring(ui_view.drawing(camera_of(site), site.tiers)).itertext())


def test_only_a_jpeg_is_a_preview() -> None:
    topic = BOARD.preview("porch")
    site = heard((topic, b"<svg onload=x>"), (topic, b"\xff\xd8\xff" + b"x" * 100), (topic, PICTURE))
    assert site.refused == {"preview": 2}
    camera = camera_of(site)
    assert (camera.preview, camera.previews, camera.size) == (PICTURE, 1, (160, 90))
    site.hear(BOARD.result("porch"), result(answer={"boxes": [], "size": [640, 360]}), 1000.0)
    assert camera.size == (640, 360), "what the answer says goes before the preview's own size"


def test_figures_are_those_of_the_window() -> None:
    site = Site("home")
    for index in range(100):
        said = result(
            tier="device" if index < 60 else "cloud",
            age_ms=float(index),
            confidence=index / 100,
            repeats=index - 1 if index < 20 else None,
        )
        site.hear(BOARD.result("porch"), said, 1000.0 + index / 10)
    device, cloud = site.figures(1010.0)
    assert (device.answers, device.share, cloud.answers) == (60, 0.6, 40)
    assert (device.repeats, cloud.repeats) == (20, 0)
    assert "of 100 in 60 s, 20 repeated" in ui_view.summary(site, [device, cloud], 1010.0)
    assert (device.age_p50_ms, device.age_p95_ms) == (30.0, 56.0)
    assert device.confidences == (10, 10, 10, 10, 10, 10, 0, 0, 0, 0)
    assert site.median_age_ms() == 50.0
    assert [part.tier for part in site.figures(1000.0 + ui_state.WINDOW_S + 6.5)] == ["cloud"]
    assert site.figures(1000.0 + ui_state.WINDOW_S + 11) == []


def test_bytes_stand_beside_those_of_jpegs_once_a_device_has_weighed_one() -> None:
    site = Site("home")
    for second in range(10):
        for _ in range(4):
            site.hear(BOARD.result("porch"), result(bytes_up=500), 1000.0 + second)
    assert site.per_second(1010.0) == (4.0, 2000.0, None)
    assert site.series(1010.0).jpeg_bytes[-1] is None
    counters = Counters()
    counters.add("jpeg_equivalent_bytes_total", 30_000)
    counters.add("jpeg_equivalent_frames_total", 3)
    site.hear(BOARD.stats, msgspec.json.encode(counters.snapshot()), 1010.0)
    assert site.per_second(1010.0) == (4.0, 2000.0, 40_000.0)
    series = site.series(1010.0)
    assert (series.bytes_up[-1], series.jpeg_bytes[-1], series.shares["edge"][-1]) == (2000.0, 40_000.0, 1.0)
    assert series.bytes_up[0] is None, "before anything came"
    assert "20.0 times less than JPEG" in ui_view.summary(site, site.figures(1010.0), 1010.0)


def plan(words: str, **changes: Any) -> bytes:
    told: dict[str, Any] = {
        "plan": words,
        "why": f"{words} instead of <b>another</b>: 4.1 kB would take 890 ms",
        "rung": "full",
    }
    told |= {"reason": "latency", "cut": 1, "latency_p95_ms": 250.0, "bytes_a_frame": 900, "exits": None}
    return json.dumps({**told, **changes}).encode()


def test_a_plan_is_told_with_what_it_predicted_beside_what_came() -> None:
    site = heard((BOARD.plan, plan("transform:60 at cut 1")))
    answers = [result(age_ms=100.0 + n, bytes_up=1000 if n % 2 else 0, tier="edge") for n in range(40)]
    for payload in answers:
        site.hear(BOARD.result("porch"), payload, 1001.0)
    site.hear(BOARD.result("porch"), result(age_ms=9000.0, bytes_up=0, repeats=3), 1001.0)
    text = ui_plan_view.plans(site, 1002.0)
    assert markup(text) is not None
    assert "transform:60 at cut 1" in text
    assert "&lt;b&gt;another" in text
    assert "250 ms / 139 ms" in text
    assert "900 B / 500 B" in text
    assert "moves" not in text, "the first plan may be old, as it is retained"
    site.hear(BOARD.plan, plan("local answers after segment 0", rung="local variant only", cut=None), 1010.0)
    text = ui_plan_view.plans(site, 1014.0)
    assert "local variant only" in text
    assert "4.0 s ago" in text
    assert "250 ms / –" in text, "nothing has been measured of the new plan yet"
    site.hear(BOARD.result("porch"), result(age_ms=20.0, bytes_up=0, tier="device"), 1014.5)
    assert "250 ms / 20 ms" in ui_plan_view.plans(site, 1015.0)


def test_moves_are_kept_within_bounds() -> None:
    site = heard()
    for number in range(200):
        site.hear(BOARD.plan, plan(f"way {number}"), 1000.0 + number)
    assert len(site.machines["d", "board"].planning.moves) == ui_plan.MOST_MOVES
    text = ui_plan_view.plans(site, 1200.0)
    assert text.count(" ago</td>") == ui_plan_view.MOST_SHOWN
    assert "way 199" in text


def test_without_an_objective_nobody_plans() -> None:
    site = heard((BOARD.availability, b"online"))
    assert "none has a table [objective]" in ui_plan_view.plans(site, 1000.0)


def test_losses_are_told_by_reason() -> None:
    counters = Counters()
    counters.add("frames_dropped_total", 3, camera="porch", reason="stale")
    counters.add("frames_dropped_total", 4, camera="gate", reason="stale")
    counters.add("results_degraded_total", 2, camera="gate", reason="deadline")
    counters.add("results_total", 9, camera="gate", tier="device", exit=1)
    site = heard((BOARD.stats, msgspec.json.encode(counters.snapshot())))
    told = [(loss.counter, loss.reason, loss.count) for loss in site.losses()]
    assert told == [("frames_dropped_total", "stale", 7), ("results_degraded_total", "deadline", 2)]
    assert "a newer frame came first" in ui_view.losses(site.losses(), site.machines.values())


def test_machines_that_hold_another_bundle_are_marked() -> None:
    def birth(bundle: str) -> bytes:
        return json.dumps({"bundle": bundle * 64, "kinflow": "0.1.0", "tier": "edge"}).encode()

    others = [Subtree("home", "d", name) for name in ("porch", "gate")]
    messages = [(one.birth, birth("a")) for one in others] + [(BOX.birth, birth("b"))]
    messages += [(one.availability, b"online") for one in (*others, BOX)]
    site = heard(*messages)
    assert site.odd_bundles() == {("n", "box")}
    assert "differs from the others" in ui_view.machines(site, 1000.0)
    site.hear(BOX.availability, b"offline", 1000.0)
    assert site.odd_bundles() == set(), "who is away disturbs nobody"


def test_what_comes_without_end_is_kept_within_bounds() -> None:
    site = Site("home")
    for index in range(3000):
        device = Subtree("home", "d", f"board{index}")
        site.hear(device.result("porch"), result(tier=f"tier{index}"), 1000.0 + index)
        site.hear(device.stats, b'{"results_total": 1}', 1000.0 + index)
    for index in range(ui_state.MOST_ANSWERS + 100):
        site.hear(Subtree("home", "d", "board0").result("porch"), result(), 5000.0 + index / 1000)
    assert len(site.machines) <= ui_state.MOST_MACHINES
    assert len(site.cameras) <= ui_state.MOST_CAMERAS
    assert len(site.tiers) <= ui_state.MOST_TIERS + 1
    assert len(site._seconds) <= ui_state.SERIES_S + ui_state.SMOOTH_S + 2
    assert len(site._kept) == ui_state.MOST_ANSWERS
    assert site.refused
    assert len(everything(site, 5010.0)) < 300_000


@given(
    st.sampled_from([*KINDS, "state", "req", "x"]), st.booleans(), st.binary(max_size=60) | json_values.map(json.dumps)
)
def test_garbage_is_counted_and_changes_nothing(kind: str, of_camera: bool, payload: bytes | str) -> None:
    data = payload.encode() if isinstance(payload, str) else payload
    site = heard((BOARD.result("porch"), result()))
    before = everything(site, 1000.0)
    site.hear(f"{BOARD}/cam/porch/{kind}" if of_camera else f"{BOARD}/{kind}", data, 1000.0)
    if site.refused:
        assert sum(site.refused.values()) == 1
        assert everything(site, 1000.0) == before
    markup(everything(site, 1000.0))


@given(st.text(max_size=40), st.binary(max_size=40))
def test_any_topic_may_come(topic: str, payload: bytes) -> None:
    site = heard((f"kinflow/v1/{topic}", payload), (topic, payload))
    markup(everything(site, 1000.0))


@given(
    st.fixed_dictionaries(
        {},
        optional=dict.fromkeys(
            ("label", "confidence", "tier", "age_ms", "answer", "bytes_up", "degraded", "repeats", "timings"),
            json_values,
        ),
    )
)
def test_a_result_with_wrong_parts_is_refused_or_drawn(parts: dict[str, Any]) -> None:
    site = heard((BOARD.result("porch"), result(**parts)))
    markup(everything(site, 1000.0))


def test_nothing_unseen_turns_the_writing_around() -> None:
    site = heard((BOARD.result("porch"), result(label="a\x00b\u202ec")))
    assert "a\ufffdb\ufffdc" in markup(everything(site, 1000.0)).find(".//svg").attrib["aria-label"]  # type: ignore[union-attr]


@given(st.text("<>&\"'/ab", max_size=40))
def test_words_from_outside_stay_words(word: str) -> None:
    boxes = [{"label": word, "score": 0.5, "box": [0, 0, 5, 5]}]
    said = result(label=word, tier=word, degraded=word, codec=word, answer={"boxes": boxes}, timings={word: 1.0})
    birth = json.dumps({"bundle": word, "kinflow": word, "machine": word, "tier": word, "codec": word}).encode()
    event = json.dumps({"type": word, "label": word}).encode()
    stats = json.dumps({f'frames_dropped_total{{reason="{word}"}}': 1}).encode()
    site = heard(
        (BOARD.result("porch"), said),
        (BOARD.birth, birth),
        (BOARD.event("porch"), event),
        (BOARD.stats, stats),
    )
    assert not site.refused
    known = {"all", "svg", "text", "rect", "div", "span", "i", "b", "small", "section", "header", "code", "h3", "p"}
    known |= {"table", "tr", "td", "th"}
    found = markup(everything(site, 1000.0))
    assert {element.tag for element in found.iter()} <= known
    assert word.strip() in "".join(found.itertext())
