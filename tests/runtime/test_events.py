"""Events: laws that hold for any answers in any order, and the rules by example."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime.events import Corners, Event, Follower, Ids, Seen, Settings, Sighting, counts
from runtime.events_labels import Labels
from runtime.events_objects import Objects
from runtime.in_order import InOrder

STEP_NS = 100_000_000
SETTINGS = Settings(confirm_frames=3, gone_ms=500, update_ms=300)
Make = Callable[[Counter[str] | None, Settings], Follower]
HERE: Corners = (100.0, 50.0, 140.0, 150.0)


def objects(untold: Counter[str] | None = None, settings: Settings = SETTINGS) -> Objects:
    counted: Counter[str] = Counter() if untold is None else untold
    return Objects("cam0", Ids("s", "cam0"), settings, lambda reason: counted.update([reason]))


def labels(untold: Counter[str] | None = None, settings: Settings = SETTINGS) -> Labels:
    counted: Counter[str] = Counter() if untold is None else untold
    return Labels("cam0", Ids("s", "cam0"), settings, lambda reason: counted.update([reason]))


def seen(frame: int, *found: Sighting, tells: bool = True) -> Seen:
    return Seen(frame, (frame + 1) * STEP_NS, found, tells)


def silent(frame: int) -> Seen:
    return Seen(frame, (frame + 1) * STEP_NS, None)


def person(box: Corners = HERE, score: float = 0.9, label: str = "person") -> Sighting:
    return Sighting(label, score, box)


def run(follower: Follower, answers: list[Seen]) -> list[Event]:
    return [event for answer in answers for event in follower.follow(answer)]


@st.composite
def sightings(draw: st.DrawFn) -> Sighting:
    x, y = draw(st.integers(0, 12)) * 10.0, draw(st.integers(0, 2)) * 10.0
    width, height = draw(st.integers(0, 4)) * 10.0, draw(st.integers(1, 4)) * 10.0
    label = draw(st.sampled_from(["person", "dog"]))
    return Sighting(label, draw(st.integers(1, 10)) / 10, (x, y, x + width, y + height))


@st.composite
def scenes(draw: st.DrawFn) -> list[Seen]:
    count = draw(st.integers(1, 16))
    found = st.none() | st.lists(sightings(), max_size=4).map(tuple)
    gaps = draw(st.lists(st.integers(1, 30), min_size=count, max_size=count))
    now, answers = 0, []
    for frame, gap in enumerate(gaps):
        now += gap * STEP_NS // 10
        answers.append(Seen(frame, now, draw(found), draw(st.booleans())))
    return answers


def in_order_of_life(events: list[Event]) -> None:
    """Every id begins once, ends at most once, says nothing before or after, and its times do not run backwards."""
    alive: dict[str, Event] = {}
    ended: set[str] = set()
    for event in events:
        assert event.id not in ended
        assert (event.type == "new") == (event.id not in alive)
        assert event.duration_ms >= 0
        assert event.top_score >= event.score - 1e-9 or event.box is None
        assert (event.reason is not None) == (event.type == "end")
        if event.id in alive:
            assert event.frame >= alive[event.id].frame
            assert event.duration_ms >= alive[event.id].duration_ms
            assert event.top_score >= alive[event.id].top_score
        alive[event.id] = event
        if event.type == "end":
            ended.add(event.id)


@pytest.mark.parametrize("make", [objects, labels])
@given(answers=scenes(), confirm=st.integers(1, 4))
def test_every_event_begins_once_and_ends_once(make: Make, answers: list[Seen], confirm: int) -> None:
    follower = make(None, Settings(confirm, 500, 300))
    events = run(follower, answers)
    present = follower.present() or {}
    in_order_of_life(events)
    begun = {event.id for event in events if event.type == "new"}
    assert set(present) == begun - {event.id for event in events if event.type == "end"}
    last = {event.id: event.label for event in events}
    assert all(last[id_] == label for id_, label in present.items())
    stopped = follower.stop()
    in_order_of_life(events + stopped)
    assert {event.id for event in stopped} == set(present)
    assert not follower.present()


@given(scenes())
def test_the_same_answers_give_the_same_events(answers: list[Seen]) -> None:
    assert run(objects(), answers) == run(objects(), answers)
    assert run(labels(), answers) == run(labels(), answers)


@given(scenes(), st.randoms(use_true_random=False), st.integers(1, 8))
def test_late_answers_in_any_order_never_turn_time_back(answers: list[Seen], random: Random, most: int) -> None:
    """As tiers answer in any order; with little room some come too late and are refused."""
    order: InOrder[Seen] = InOrder(most)
    follower = objects()
    events: list[Event] = []
    waiting: list[Seen] = []
    late = 0
    frames: list[int] = []

    def settle_one() -> None:
        nonlocal late
        random.shuffle(waiting)
        answer = waiting.pop()
        free = order.settle(answer.captured_ns, answer)
        late += free is None
        frames.extend(one.frame for one in free or [])
        events.extend(run(follower, free or []))

    for answer in answers:
        free = order.expect(answer.captured_ns)
        frames.extend(one.frame for one in free)
        events.extend(run(follower, free))
        waiting.append(answer)
        if len(waiting) > 5:
            settle_one()
    while waiting:
        settle_one()
    assert frames == sorted(set(frames))
    assert len(frames) + late == len(answers)
    assert len(order) == 0
    assert late == 0 or most < len(answers)
    in_order_of_life(events)


@given(st.permutations(range(8)))
def test_answers_in_any_order_give_what_answers_in_order_give(places: list[int]) -> None:
    answers = [seen(frame, person()) if frame < 4 else seen(frame) for frame in range(8)]
    order: InOrder[Seen] = InOrder()
    follower = objects()
    for answer in answers:
        order.expect(answer.captured_ns)
    freed = [order.settle(answers[place].captured_ns, answers[place]) for place in places]
    assert [event for free in freed for event in run(follower, free or [])] == run(objects(), answers)


def test_a_frame_without_an_answer_holds_nobody_up() -> None:
    order: InOrder[str] = InOrder()
    for key in (1, 2, 3):
        order.expect(key)
    assert order.settle(3, "three") == []
    assert order.settle(2, None) == []
    assert order.settle(1, "one") == ["one", "three"]
    assert order.settle(1, "again") is None


def test_an_object_is_told_after_three_answers_and_ends_when_shown_to_be_gone() -> None:
    answers = [seen(frame, person()) for frame in range(5)] + [seen(frame) for frame in range(5, 12)]
    events = run(objects(), answers)
    assert [(event.type, event.frame) for event in events] == [("new", 2), ("end", 10)]
    assert events[1].duration_ms == 400
    assert events[1].reason == "gone"


def test_an_object_that_walks_keeps_its_id_and_is_updated() -> None:
    answers = [seen(frame, person((frame * 15.0, 50.0, frame * 15.0 + 40, 150.0))) for frame in range(20)]
    events = run(objects(), answers)
    assert {event.id for event in events} == {"s-cam0-1"}
    assert [event.type for event in events] == ["new"] + ["update"] * (len(events) - 1)
    assert 3 <= len(events) - 1 <= 17 // 3 + 1
    assert events[-1].box is not None
    assert events[-1].box[0] == pytest.approx(events[-1].frame * 15.0, abs=8)


def test_two_who_cross_stay_two() -> None:
    answers = []
    for frame in range(20):
        left, right = frame * 20.0, 400 - frame * 20.0
        answers.append(seen(frame, person((left, 0, left + 60, 150)), person((right, 5, right + 60, 155))))
    assert len({event.id for event in run(objects(), answers)}) == 2


def test_a_flicker_is_not_told() -> None:
    untold: Counter[str] = Counter()
    answers = [seen(0, person())] + [seen(frame) for frame in range(1, 6)]
    assert run(objects(untold), answers) == []
    assert untold == {"unconfirmed": 1}


@pytest.mark.parametrize("kind", ["degraded", "silent", "none"])
def test_what_does_not_tell_ends_nothing(kind: str) -> None:
    follower = objects()
    run(follower, [seen(frame, person()) for frame in range(4)])
    for frame in range(4, 100):
        if kind != "none":
            assert follower.follow(silent(frame) if kind == "silent" else seen(frame, tells=False)) == []
    # One answer that tells shows nothing about how long it has been gone.
    assert follower.follow(seen(100)) == []
    assert follower.present() == {"s-cam0-1": "person"}
    assert [event.type for event in run(follower, [seen(frame) for frame in range(101, 107)])] == ["end"]


def test_a_degraded_answer_may_show_that_something_is_there() -> None:
    events = run(objects(), [seen(frame, person(), tells=False) for frame in range(3)])
    assert [event.type for event in events] == ["new"]


def test_nothing_is_known_before_enough_answers_tell() -> None:
    follower = objects()
    assert follower.present() is None
    follower.follow(seen(0, tells=False))
    assert follower.present() is None
    run(follower, [seen(1), seen(2, person()), silent(3)])
    assert follower.present() is None
    follower.follow(seen(4))
    assert follower.present() == {}


def test_a_label_that_changes_its_mind_once_is_smoothed_away() -> None:
    answers = [seen(frame, person(label="dog" if frame == 4 else "person")) for frame in range(10)]
    events = run(objects(), answers)
    assert {event.label for event in events} == {"person"}
    assert len({event.id for event in events}) == 1


def test_objects_followed_are_bounded() -> None:
    untold: Counter[str] = Counter()
    crowd = [person((x * 50.0, y * 50.0, x * 50.0 + 40, y * 50.0 + 40)) for x in range(10) for y in range(8)]
    follower = objects(untold)
    run(follower, [seen(frame, *crowd) for frame in range(4)])
    assert len(follower.present() or {}) == 64
    assert untold["full"] == 4 * 16


def test_a_label_is_told_when_it_has_held() -> None:
    untold: Counter[str] = Counter()
    said = ["cat"] * 5 + ["dog"] + ["cat"] * 4 + ["dog"] * 8
    events = run(labels(untold), [seen(frame, Sighting(label, 0.8)) for frame, label in enumerate(said)])
    assert [(event.type, event.label) for event in events if event.type != "update"] == [
        ("new", "cat"),
        ("end", "cat"),
        ("new", "dog"),
    ]
    assert events[0].frame == 2


def test_degraded_labels_change_nothing() -> None:
    follower = labels()
    run(follower, [seen(frame, Sighting("cat", 0.8)) for frame in range(4)])
    assert run(follower, [seen(frame, Sighting("dog", 0.9), tells=False) for frame in range(4, 30)]) == []
    assert follower.present() == {"s-cam0-1": "cat"}


def test_counts_by_label() -> None:
    assert counts({"a": "person", "b": "dog", "c": "person"}) == {"dog": 1, "person": 2}
