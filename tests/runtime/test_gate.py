"""The gate: repeats only what has hardly changed, never for long, and tightens when audits show a broken promise."""

from __future__ import annotations

import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from runtime.datatypes import Pixels, Tensor
from runtime.drift import LEVELS, Detector, Level, refutes_above
from runtime.gate import AUDIT_FRAMES, Gate, Repeat, Rule, change, small

STEP_NS = 100_000_000
RULE = Rule(threshold=20.0, allowed=0.05, max_age_ns=10 * STEP_NS)
PICTURES = hnp.arrays(np.uint8, (12, 16), elements=st.integers(0, 255))


def scene(left: int | None = None, noise: int = 0, seed: int = 0) -> Pixels:
    """A grey room of 100 x 100 pixels, with a bright visitor at `left`."""
    pixels = np.full((100, 100, 3), 100, np.int64)
    if left is not None:
        pixels[20:80, left : left + 20] = 220
    pixels += np.random.default_rng(seed).integers(-noise, noise + 1, pixels.shape)
    return pixels.clip(0, 255).astype(np.uint8)


def differ(one: str, two: str) -> float:
    return float(one != two)


def run(gate: Gate[str], frames: list[Pixels], answers: list[str]) -> list[str | None]:
    """What was repeated for each frame; None where it was computed."""
    said: list[str | None] = []
    for number, (pixels, answer) in enumerate(zip(frames, answers, strict=True)):
        repeat = gate.ask(pixels, number * STEP_NS)
        said.append(None if repeat is None else repeat.answer)
        if repeat is None:
            gate.answered(number * STEP_NS, answer)
    return said


@given(PICTURES, PICTURES)
def test_change_is_symmetric_and_within_its_range(one: Tensor, two: Tensor) -> None:
    assert change(one, one) == 0
    assert change(one, two) == change(two, one)
    assert 0 <= change(one, two) <= 255


@pytest.mark.parametrize(("side", "expected"), [(300, 75), (224, 56), (320, 80), (640, 80), (64, 64)])
def test_pictures_are_small(side: int, expected: int) -> None:
    assert small(np.zeros((side, side, 3), np.uint8)).shape == (expected, expected)


def test_a_small_visitor_counts_as_much_as_a_large_one_and_noise_little() -> None:
    empty = small(scene())
    visitor = small(scene(40))
    crowd = scene(40)
    crowd[20:80] = 220
    assert change(empty, visitor) == change(empty, small(crowd)) == 120
    assert change(empty, small(scene(noise=10, seed=1))) < 10


def test_a_still_scene_is_repeated_but_never_for_longer_than_the_greatest_age() -> None:
    gate: Gate[str] = Gate(RULE, differ)
    said = run(gate, [scene(noise=5, seed=number) for number in range(400)], ["nobody"] * 400)
    longest, stretch = 0, 0
    for one in said:
        stretch = stretch + 1 if one is not None else 0
        longest = max(longest, stretch)
    assert longest == 10
    computed = sum(one is None for one in said)
    assert 400 // 11 < computed <= 400 // 11 + 400 // AUDIT_FRAMES + 1


def test_a_visitor_is_computed() -> None:
    gate: Gate[str] = Gate(RULE, differ)
    frames = [scene()] * 3 + [scene(40)] + [scene(40)] * 3
    said = run(gate, frames, ["nobody"] * 3 + ["somebody"] * 4)
    assert said[3] is None
    assert "nobody" not in said[3:]


def test_slow_change_adds_up() -> None:
    """Each frame is nearly the one before, but not the one whose answer is repeated."""
    gate: Gate[str] = Gate(RULE, differ)
    frames = [np.full((100, 100, 3), 100 + 3 * number, np.uint8) for number in range(20)]
    assert sum(one is None for one in run(gate, frames, ["nobody"] * 20)) >= 3


@given(
    st.lists(st.tuples(st.integers(0, 3), st.sampled_from(["now", "later", "lost"])), max_size=60), st.integers(0, 5)
)
def test_only_answers_in_hand_are_repeated_and_the_newest_of_them(course: list[tuple[int, str]], seed: int) -> None:
    gate: Gate[int] = Gate(RULE, lambda one, two: 0.0, seed)
    newest = -1
    late: list[int] = []
    for number, (place, fate) in enumerate(course):
        repeat: Repeat[int] | None = gate.ask(scene(place * 20), number)
        if repeat is not None:
            assert repeat.answer == newest
            assert repeat.of_ns == newest
        elif fate == "now":
            gate.answered(number, number)
            newest = number
        elif fate == "later":
            late.append(number)
        else:
            gate.lost(number)
        if late and number % 3 == 2:
            came = late.pop()
            gate.answered(came, came)
            newest = max(newest, came)


def test_one_frame_in_a_stretch_is_audited() -> None:
    gate: Gate[str] = Gate(RULE, differ, seed=3)
    audits = 0
    for number in range(20 * AUDIT_FRAMES):
        if gate.ask(scene(), number) is None:
            audits += gate.answered(number, "nobody") is not None
    assert audits == 20


def test_a_scene_that_changes_unseen_tightens_the_gate_and_a_calm_one_loosens_it_again() -> None:
    """The picture says nothing of what the model says: then repeating is wrong, and stops."""
    gate: Gate[str] = Gate(RULE, differ)
    flickering = random.Random(1)
    frames = [scene(noise=60, seed=number) for number in range(4_000)]
    for number, pixels in enumerate(frames):
        if gate.ask(pixels, number * STEP_NS) is None:
            gate.answered(number * STEP_NS, flickering.choice(["a", "b", "c"]))
    tight = gate.level
    assert tight >= 1
    still = run(gate, [scene(noise=60, seed=number) for number in range(100)], ["a"] * 100)
    for number in range(4_000, 24_000):
        if gate.ask(frames[number % 4_000], number * STEP_NS) is None:
            gate.answered(number * STEP_NS, "a")
    assert gate.level == 0
    assert still.count(None) > 10


def test_while_the_promise_is_kept_the_threshold_stays() -> None:
    alarms = 0
    for seed in range(200):
        level, generator = Level(0.05), random.Random(seed)
        for _ in range(200):
            loss = float(generator.random() < 0.04)
            alarms += level.observe(loss, loss) != 0
    # At the limit there would be one in 200 drawn frames; kept with room there are far fewer.
    assert alarms / (200 * 200) < 1 / 400


def test_a_broken_promise_is_found_soon() -> None:
    found = []
    for seed in range(50):
        detector, generator = Detector(0.05, above=True), random.Random(seed)
        count = 1
        while not detector.observe(float(generator.random() < 0.25)):
            count += 1
        found.append(count)
    assert np.mean(found) < 50


@given(st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), max_size=300))
def test_the_level_stays_within_its_range(losses: list[tuple[float, float]]) -> None:
    level = Level(0.05)
    for loss, looser in losses:
        before = level.number
        moved = level.observe(loss, looser)
        assert level.number == before + moved
        assert 0 <= level.number <= LEVELS
        assert 0 <= level.share() <= 1
    assert level.share(LEVELS) == 0


def test_a_true_mean_is_seldom_refuted() -> None:
    """At most in 5 % of all tries, whatever the losses look like."""
    generator = np.random.default_rng(0)
    refuted = 0
    for _ in range(400):
        losses = (generator.random(300) < 0.1) * 0.5  # mean .05
        refuted += refutes_above(losses, 0.05, 0.05)
    assert refuted / 400 < 0.08
    assert refutes_above([0.0] * 100, 0.05, 0.05)
    assert not refutes_above([0.0] * 50, 0.05, 0.05)
