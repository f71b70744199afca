from __future__ import annotations

import math
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from export.risk import (
    Thresholds,
    Words,
    answering,
    answers_needed,
    choose,
    frames_wanted,
    independent_share,
    loosest,
    p_value,
)


def words(generator: np.random.Generator, frames: int, *, dip: float = 0.0) -> Words:
    """Two exits on frames that are more or less hard; `dip`: how much oftener the surest answers are wrong."""
    ease = generator.normal(0, 1, frames)
    confidence, agrees = [], []
    for bias in (3.0, 5.0):
        seen = ease + generator.normal(0, 0.6, frames)
        sure = 1 / (1 + np.exp(-(bias + 2.5 * seen + generator.normal(0, 0.4, frames))))
        right = 1 / (1 + np.exp(-(bias + 2.5 * seen)))
        agrees.append(generator.random(frames) < right - dip * (sure > 0.9995))
        confidence.append(sure)
    shape = np.array(confidence)
    return Words(shape, np.array(agrees), np.ones_like(shape, np.bool_))


def broken(world: Words, thresholds: Thresholds, agreement: float) -> bool:
    first = answering(world, thresholds)
    errors = answers = 0
    for place, threshold in enumerate(thresholds):
        mine = first == place
        errors, answers = errors + int((mine & ~world.agrees[place]).sum()), answers + int(mine.sum())
        if threshold is not None and errors > (1 - agreement) * answers:
            return True
    return False


@pytest.mark.parametrize(("agreement", "dip"), [(0.9, 0.0), (0.95, 0.1), (0.9, 0.2)])
def test_the_promise_is_broken_no_oftener_than_stated(agreement: float, dip: float) -> None:
    generator = np.random.default_rng(3)
    world = words(generator, 100_000, dip=dip)
    draws, bad, answered = 60, 0, 0.0
    for _ in range(draws):
        thresholds = choose(
            words(generator, 200, dip=dip), words(generator, 300, dip=dip), agreement, (0.8, 0.5), confidence=0.9
        )
        bad += broken(world, thresholds, agreement)
        answered += float((answering(world, thresholds) >= 0).mean()) / draws
    # Were the chance of a broken promise just the allowed .1, more would be seen less than once in a thousand times.
    assert bad <= draws * 0.1 + 3 * math.sqrt(draws * 0.1 * 0.9)
    assert answered > (0.3 if dip == 0 else 0.0)


def test_a_pilot_that_misleads_costs_coverage_and_breaks_no_promise() -> None:
    generator = np.random.default_rng(4)
    world = words(generator, 100_000)
    bad = 0
    for _ in range(40):
        rosy = words(generator, 200)
        rosy = Words(rosy.confidence, rosy.agrees | (rosy.confidence > 0.5), rosy.within)
        bad += broken(world, choose(rosy, words(generator, 300), 0.95, (0.8, 0.5), confidence=0.9), 0.95)
    assert bad <= 40 * 0.1 + 3 * math.sqrt(40 * 0.1 * 0.9)


@settings(deadline=None)
@given(st.integers(0, 30), st.integers(0, 30), st.floats(0.01, 0.99))
def test_the_p_value_is_the_exact_binomial_tail(errors: int, more: int, risk: float) -> None:
    count = errors + more
    share = Fraction(risk)
    exact = sum(math.comb(count, k) * share**k * (1 - share) ** (count - k) for k in range(errors + 1))
    assert p_value(errors, count, risk) == pytest.approx(float(exact), rel=1e-9)


@pytest.mark.parametrize(("agreement", "needed"), [(0.98, 149), (0.9, 29), (1.0, None)])
def test_so_many_answers_without_an_error_are_needed(agreement: float, needed: int | None) -> None:
    assert answers_needed(agreement) == needed
    if needed is not None:
        assert p_value(0, needed, 1 - agreement) <= 0.05 < p_value(0, needed - 1, 1 - agreement)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10_000), st.integers(20, 148))
def test_too_few_frames_promise_nothing(seed: int, frames: int) -> None:
    generator = np.random.default_rng(seed)
    sure = Words(generator.random((2, frames)), np.ones((2, frames), np.bool_), np.ones((2, frames), np.bool_))
    pilot = Words(generator.random((2, 500)), np.ones((2, 500), np.bool_), np.ones((2, 500), np.bool_))
    assert choose(pilot, sure, 0.98, (1, 1)) == (None, None)
    assert choose(pilot, sure, 1.0, (1, 1)) == (None, None)


def test_exits_that_are_always_right_answer_as_soon_as_there_are_frames_enough() -> None:
    generator = np.random.default_rng(0)
    pilot, tested = (
        Words(generator.random((1, n)), np.ones((1, n), np.bool_), np.ones((1, n), np.bool_)) for n in (400, 400)
    )
    (threshold,) = choose(pilot, tested, 0.98, (1,))
    assert threshold is not None
    assert (tested.confidence >= threshold).mean() > 0.9
    wanted = frames_wanted(pilot, 0, 0.98)
    assert wanted is not None
    assert 149 <= wanted <= 1000


def test_an_exit_that_is_never_right_gets_no_threshold_and_no_number_of_frames() -> None:
    generator = np.random.default_rng(0)
    pilot, tested = (
        Words(generator.random((2, n)), np.array([[False] * n, [True] * n]), np.ones((2, n), np.bool_))
        for n in (300, 600)
    )
    first, second = choose(pilot, tested, 0.95, (2, 1))
    assert first is None
    assert second is not None
    assert frames_wanted(pilot, 0, 0.95) is None


def test_frames_beyond_the_guards_limit_are_not_answered_and_go_on() -> None:
    within = np.array([[True, False, False], [True, True, False]])
    given_words = Words(np.full((2, 3), 0.9), np.ones((2, 3), np.bool_), within)
    assert list(answering(given_words, (0.5, 0.5))) == [0, 1, -1]
    assert list(answering(given_words, (None, 0.95))) == [-1, -1, -1]


@settings(deadline=None)
@given(st.lists(st.tuples(st.sampled_from([0.1, 0.3, 0.5, 0.9]), st.booleans()), max_size=40), st.floats(0.0, 1.0))
def test_the_loosest_threshold_is_the_least_confidence_at_the_nominal_risk(
    said: list[tuple[float, bool]], risk: float
) -> None:
    confidence = np.array([value for value, _ in said])
    agrees = np.array([value for _, value in said], np.bool_)
    kept = [
        level
        for level in sorted(set(confidence))
        if (~agrees[confidence >= level]).sum() + 1 <= risk * ((confidence >= level).sum() + 1)
    ]
    assert loosest(confidence, agrees, risk) == (kept[0] if kept else None)


def test_frames_that_follow_each_other_count_for_what_they_are_worth() -> None:
    generator = np.random.default_rng(0)
    fresh = generator.normal(0, 1, 4000)
    assert independent_share([fresh]) == pytest.approx(1, abs=0.1)
    assert independent_share([np.repeat(fresh[:400], 10)]) == pytest.approx(0.1, rel=0.2)
    assert independent_share([np.ones(50), fresh]) == independent_share([fresh])
    pilot, tested = (
        Words(generator.random((1, n)), np.ones((1, n), np.bool_), np.ones((1, n), np.bool_)) for n in (400, 400)
    )
    assert choose(pilot, tested, 0.98, (1,)) != (None,)
    assert choose(pilot, replace(tested, share=0.3), 0.98, (1,)) == (None,)
