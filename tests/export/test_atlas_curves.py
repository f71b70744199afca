from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from export.atlas_curves import Curve, bytes_at, compare, isotonic, kl_quality

values = arrays(np.float64, st.integers(1, 12), elements=st.floats(0, 1))


@st.composite
def measured(draw: st.DrawFn) -> tuple[list[float], list[float]]:
    """Sizes, each of its own, and qualities: a curve as noise may leave it."""
    sizes = draw(st.lists(st.integers(1, 10**6), min_size=1, max_size=9, unique=True))
    quality = draw(st.lists(st.floats(0, 1), min_size=len(sizes), max_size=len(sizes)))
    return [float(size) for size in sizes], quality


@given(values)
def test_isotonic_is_monotone_keeps_the_mean_and_does_nothing_twice(sequence: np.ndarray) -> None:
    fitted = isotonic(sequence)
    assert (np.diff(fitted) >= 0).all()
    assert fitted.mean() == pytest.approx(sequence.mean(), abs=1e-12)
    assert isotonic(fitted) == pytest.approx(fitted)


@given(values, values)
def test_isotonic_is_the_nearest_monotone_sequence(sequence: np.ndarray, other: np.ndarray) -> None:
    size = min(len(sequence), len(other))
    target, rival = sequence[:size], np.sort(other[:size])
    assert ((isotonic(target) - target) ** 2).sum() <= ((rival - target) ** 2).sum() + 1e-12


@given(measured(), st.floats(0, 1), st.floats(0, 1))
def test_better_never_costs_less(curve: tuple[list[float], list[float]], one: float, other: float) -> None:
    low, high = sorted((one, other))
    assert bytes_at(*curve, low)[0] <= bytes_at(*curve, high)[0] * (1 + 1e-9)


@given(measured(), st.floats(0, 1), st.floats(0.01, 100))
def test_the_cost_lies_among_the_sizes_and_scales_with_them(
    curve: tuple[list[float], list[float]], wanted: float, factor: float
) -> None:
    sizes, quality = curve
    cost, bound = bytes_at(sizes, quality, wanted)
    if math.isinf(cost):
        assert isotonic(np.array(quality)[np.argsort(sizes)])[-1] < wanted
        assert not bound
    else:
        assert min(sizes) * (1 - 1e-9) <= cost <= max(sizes) * (1 + 1e-9)
    scaled = bytes_at([factor * size for size in sizes], quality, wanted)[0]
    assert scaled == pytest.approx(cost * factor) or scaled == cost


def test_a_rising_curve_is_read_off_at_its_points_and_between_them_on_a_log_scale() -> None:
    sizes, quality = [400.0, 100.0, 1600.0], [0.9, 0.8, 1.0]
    found = [bytes_at(sizes, quality, wanted) for wanted in (0.7, 0.8, 0.85, 0.9, 1.0)]
    assert [cost for cost, _ in found] == pytest.approx([100, 100, 200, 400, 1600])
    assert [bound for _, bound in found] == [True, False, False, False, False]
    assert bytes_at(sizes, [0.9, 0.8, 0.95], 0.96) == (math.inf, False)


def test_a_lucky_point_does_not_reach_what_its_neighbours_miss() -> None:
    cost, _ = bytes_at([100.0, 200.0, 400.0], [0.96, 0.90, 0.97], 0.95)
    assert 200 < cost < 400


def agreeing(*shares: float, frames: int = 200) -> np.ndarray:
    return np.array([[place < share * frames for place in range(frames)] for share in shares], np.float64)


def test_a_rival_of_thrice_the_bytes_is_thrice_as_dear_in_every_draw() -> None:
    sizes = np.outer([100.0, 200.0, 400.0], np.random.default_rng(0).uniform(0.5, 1.5, 200))
    quality = agreeing(0.8, 0.9, 0.99)
    ours, double, triple = Curve(sizes, quality), Curve(2.5 * sizes, quality), Curve(3 * sizes, quality)
    found = compare({"ours": ours}, {"triple": triple}, 0.95)["ours"]
    assert found.rival == "triple"
    assert [found.ratio, found.ratio_low, found.ratio_high] == pytest.approx([3, 3, 3])
    assert found.cost.low < found.cost.at < found.cost.high
    better = compare({"ours": ours}, {"triple": triple, "double": double}, 0.95)["ours"]
    assert better.rival == "double"
    assert better.ratio == pytest.approx(2.5)


def test_what_is_not_reached_has_no_ratio() -> None:
    sizes = np.full((2, 200), 100.0) * [[1], [2]]
    good, bad = Curve(sizes, agreeing(0.9, 1.0)), Curve(sizes, agreeing(0.5, 0.6))
    unrivalled = compare({"ours": good}, {"bad": bad}, 0.95)["ours"]
    assert unrivalled.rival is None
    assert math.isinf(unrivalled.ratio)
    hopeless = compare({"ours": bad}, {"good": good}, 0.95)["ours"]
    assert (hopeless.rival, hopeless.ratio) == ("good", 0)
    assert math.isinf(hopeless.cost.at)
    neither = compare({"ours": bad}, {"bad": bad}, 0.95)["ours"]
    assert math.isnan(neither.ratio)
    assert math.isinf(compare({"ours": good}, {}, 0.95)["ours"].rival_cost.at)


def test_divergence_is_read_off_in_nats() -> None:
    sizes = np.full((2, 50), 100.0) * [[1], [4]]
    kl = np.full((2, 50), 1.0) * [[0.4], [0.1]]
    found = compare({"ours": Curve(sizes, -kl)}, {"same": Curve(2 * sizes, -kl)}, 0.2, kl=True)["ours"]
    assert [found.cost.at, found.ratio] == pytest.approx([200, 2])
    assert np.isfinite(kl_quality(np.zeros(3))).all()


def test_the_seed_decides_the_draws() -> None:
    curve = Curve(np.random.default_rng(0).uniform(50, 150, (3, 60)).cumsum(axis=0), agreeing(0.7, 0.9, 1.0, frames=60))
    one, again, other = (compare({"a": curve}, {"b": curve}, 0.85, seed=seed)["a"].cost for seed in (1, 1, 2))
    assert one == again
    assert (one.low, one.high) != (other.low, other.high)
