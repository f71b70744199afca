from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime.datatypes import Pixels
from runtime.freshness import Lag, Rate, Stillness

MS = 1_000_000


def scene(height: int = 480, width: int = 640) -> Pixels:
    rng = np.random.default_rng(0)
    return rng.integers(0, 256, (height, width, 3)).astype(np.uint8)


def test_the_same_picture_is_still_for_as_long_as_it_comes() -> None:
    stillness, pixels = Stillness(), scene()
    assert [stillness.look(pixels.copy(), 10 + second / 5) for second in range(0, 101, 25)] == [0, 5, 10, 15, 20]


def test_a_scene_without_motion_is_not_still_while_its_sensor_has_noise() -> None:
    """One sample in a thousand by one grey level, from picture to picture."""
    rng, stillness, pixels = np.random.default_rng(1), Stillness(), scene()
    for number in range(200):
        noisy = pixels.copy()
        noisy[rng.random(noisy.shape) < 0.001] ^= 1
        assert stillness.look(noisy, number / 10) == 0


def test_what_changes_between_the_samples_is_found_when_whole_pictures_are_compared() -> None:
    """A clock in a corner: a few pixels, once a second."""
    stillness, pixels = Stillness(), scene()
    worst = 0.0
    for number in range(600):
        pixels[1, 1] = number // 10 % 60
        worst = max(worst, stillness.look(pixels, number / 10))
    assert worst < 3


def test_a_picture_that_moves_again_is_not_still() -> None:
    stillness, pixels = Stillness(), scene()
    for number in range(50):
        stillness.look(pixels, float(number))
    assert stillness.look(pixels[::-1], 50) == 0
    assert stillness.look(pixels[::-1], 51) == 1


@pytest.mark.parametrize("shape", [(1, 1), (63, 64), (64, 63), (480, 640), (1, 2000)])
def test_pictures_of_any_size_are_compared(shape: tuple[int, int]) -> None:
    stillness, pixels = Stillness(), scene(*shape)
    assert [stillness.look(pixels, time_s) for time_s in (0, 1, 2, 3)] == [0, 1, 2, 3]
    assert stillness.look(scene(7, 9), 4) == 0


@given(st.lists(st.integers(0, 3), min_size=1, max_size=40))
def test_stillness_is_the_time_since_the_picture_changed(shown: list[int]) -> None:
    """Pictures that differ in every sample, one a second."""
    stillness = Stillness()
    since = 0
    for second, grey in enumerate(shown):
        if second and shown[second - 1] != grey:
            since = second
        assert stillness.look(np.full((70, 70, 3), grey, np.uint8), float(second)) == second - since


@given(st.lists(st.integers(0, 5000), min_size=1, max_size=50), st.integers(-(10**12), 10**12))
def test_a_lag_is_what_a_frame_has_more_than_the_fastest_so_far(delays_ms: list[int], offset_ms: int) -> None:
    lag = Lag()
    for number, delay_ms in enumerate(delays_ms):
        source_ms = number * 100
        found = lag.of(source_ms * MS, (source_ms + offset_ms + delay_ms) * MS)
        assert found == (delay_ms - min(delays_ms[: number + 1])) * MS


def test_a_stream_that_begins_again_is_not_late() -> None:
    lag = Lag()
    assert [lag.of(source * MS, now * MS) for source, now in ((0, 0), (40, 45), (80, 90))] == [0, 5 * MS, 10 * MS]
    assert lag.of(0, 130 * MS) == 0
    assert lag.of(40 * MS, 180 * MS) == 10 * MS


def test_a_clock_that_stands_still_says_nothing() -> None:
    lag = Lag()
    assert [lag.of(0, number * 40 * MS) for number in range(1000)] == [0] * 1000


def test_a_lag_that_stays_is_the_new_normal_after_ten_minutes() -> None:
    """A way that has become longer for good is no reason to drop every frame from then on."""
    lag = Lag()
    assert lag.of(0, 0) == 0
    found = [lag.of(second * 1000 * MS, (second * 1000 + 300) * MS) for second in range(1, 660)]
    assert found[500] == 300 * MS
    assert found[-1] == 0


@given(st.floats(0.5, 60), st.floats(1, 120))
def test_a_rate_is_kept(max_fps: float, fps: float) -> None:
    rate = Rate(max_fps)
    kept = sum(rate.keeps(int(number * 1e9 / fps)) for number in range(400))
    seconds = 399 / fps
    assert kept <= seconds * max_fps + 2
    assert kept >= min(400, seconds * max_fps * 0.99) * (1 if fps >= 2 * max_fps or fps <= max_fps else 0.5) - 1


def test_without_a_rate_every_frame_is_kept() -> None:
    rate = Rate(None)
    assert all(rate.keeps(number) for number in range(10))
