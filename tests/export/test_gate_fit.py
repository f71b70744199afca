"""The gate's threshold: what the fit promises holds on frames it has not seen."""

from __future__ import annotations

import numpy as np
import pytest

from export.gate_fit import Changes, Stretch, alike_for, fit, kept_low, run, stretch_means
from runtime.datatypes import Tensor

SIDE = 64


def scene(frames: int, seed: int) -> tuple[list[Tensor], list[int]]:
    """A room where a bright visitor stands still for a while, moves, or is away; and where it is, in steps."""
    generator = np.random.default_rng(seed)
    pixels: list[Tensor] = []
    places: list[int] = []
    place, left = 0, 0
    for _ in range(frames):
        if left == 0:
            place, left = int(generator.integers(0, 4)), int(generator.integers(3, 15))
        left -= 1
        picture = generator.integers(90, 111, (SIDE, SIDE, 3))
        if place:
            picture[16:48, place * 12 : place * 12 + 8] = 200
        pixels.append(picture.astype(np.uint8))
        places.append(place)
    return pixels, places


def stretch(frames: int, seed: int, flicker: float = 0.0) -> Stretch:
    """With `flicker` the model changes its mind for a share of frames though nothing moves."""
    pixels, places = scene(frames, seed)
    generator = np.random.default_rng(seed + 1)
    said = [100 + number if generator.random() < flicker else place for number, place in enumerate(places)]
    return Stretch.of(pixels, lambda one, two: float(said[one] != said[two]), fps=10)


def test_repeats_while_nothing_moves_and_keeps_it_on_other_frames() -> None:
    fitted = fit([stretch(600, 1)])
    assert fitted.threshold is not None
    assert fitted.course is not None
    judged = run(Changes(stretch(600, 50)), fitted.threshold)
    assert judged.share > 0.6
    assert judged.kept >= 0.95


def test_a_model_that_changes_its_mind_over_nothing_is_not_repeated_much() -> None:
    steady, fickle = fit([stretch(600, 1)]), fit([stretch(600, 1, flicker=0.3)])
    assert steady.course is not None
    assert fickle.course is None or fickle.course.share < 0.3 * steady.course.share


def test_a_quiet_camera_does_not_pay_for_a_busy_one() -> None:
    calm = Stretch.of([np.full((SIDE, SIDE, 3), 90, np.uint8)] * 3000, lambda one, two: 0.0, fps=10)
    busy = stretch(400, 1, flicker=0.3)
    fitted = fit([calm, busy])
    assert fit([calm]).threshold is not None
    assert fitted.threshold is None or run(Changes(busy), fitted.threshold).kept >= 0.95


def test_what_is_promised_holds_for_most_scenes() -> None:
    broken = 0
    for seed in range(8):
        fitted = fit([stretch(400, 10 * seed, flicker=0.01)])
        if fitted.threshold is not None:
            broken += run(Changes(stretch(1000, 10 * seed + 5, flicker=0.01)), fitted.threshold).kept < 0.95
    assert broken <= 2


def test_too_few_frames_promise_nothing() -> None:
    assert fit([stretch(40, 1)]).threshold is None
    assert "clip" in str(fit([stretch(40, 1)]).note)
    assert fit([]).threshold is None


def test_no_answer_grows_older_than_allowed() -> None:
    pixels = [np.full((SIDE, SIDE, 3), 100, np.uint8)] * 100
    course = run(Changes(Stretch.of(pixels, lambda one, two: 0.0, fps=10, max_age_s=0.5)), 255.0)
    computed = np.flatnonzero(~course.repeated)
    assert max(np.diff(computed)) == 6


@pytest.mark.parametrize("length", [1, 4, 16])
def test_frames_that_stay_alike_count_for_one(length: int) -> None:
    values = np.repeat(np.random.default_rng(0).random(1024 // length), length)
    assert 0.6 * length <= alike_for(values) <= 2 * length + 1


def test_means_of_stretches_leave_nothing_out() -> None:
    losses = np.arange(10.0)
    assert list(stretch_means(losses, 3)) == [1.0, 4.0, 7.5]
    assert list(stretch_means(losses, 50)) == [4.5]


def test_the_lower_bound_lies_below_the_mean_and_nears_it() -> None:
    generator = np.random.default_rng(2)
    few, many = (generator.random(count) * 0.1 for count in (200, 5000))
    assert kept_low(few) < kept_low(many) < 1 - many.mean()
    assert kept_low(many) > 0.93
