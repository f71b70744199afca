from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from export.exits_stress import EACH, KINDS, SHARE, above, floors, strange_copies
from export.risk import Words, answering, choose

LEVELS = [0.2, 0.4, 0.6, 0.8, 1.0]


def words(said: list[tuple[float, float, bool, bool, bool, bool]], owed: list[bool] | None = None) -> Words:
    """Two exits: confidences, whether they agree, whether they are within the guard's limit."""
    columns = [np.array([row[place] for row in said]) for place in range(6)]
    return Words(
        np.array(columns[:2], np.float64).reshape(2, -1),
        np.array(columns[2:4], np.bool_).reshape(2, -1),
        np.array(columns[4:], np.bool_).reshape(2, -1),
        None if owed is None else np.array(owed, np.bool_),
    )


row = st.tuples(
    st.sampled_from(LEVELS), st.sampled_from(LEVELS), st.booleans(), st.booleans(), st.booleans(), st.booleans()
)


def wrong_at(strange: Words, place: int, left: np.ndarray, level: float) -> tuple[int, int]:
    mine = left & strange.within[place] & (strange.confidence[place] >= level)
    return int((mine & ~strange.agrees[place]).sum()), int(mine.sum())


@settings(deadline=None)
@given(st.lists(row, max_size=60), st.sampled_from([0.5, 0.7, 0.9, 0.98]))
def test_above_its_floor_an_exit_is_wrong_on_strange_frames_no_oftener_than_stated(
    said: list[tuple[float, float, bool, bool, bool, bool]], agreement: float
) -> None:
    strange = words(said)
    left = np.ones(len(said), np.bool_)
    risk = SHARE * (1 - agreement)
    for place, floor in enumerate(floors(strange, agreement)):
        errors, answers = wrong_at(strange, place, left, floor)
        assert answers == 0 or errors + 1 <= risk * (answers + 1)
        # And no lower one would do.
        asked = strange.confidence[place][left & strange.within[place]]
        for level in (level for level in set(asked.tolist()) if level < floor):
            errors, answers = wrong_at(strange, place, left, level)
            assert errors + 1 > risk * (answers + 1)
        left &= ~(strange.within[place] & (strange.confidence[place] >= floor))


def test_where_a_promise_is_about_some_frames_only_a_share_of_those_may_be_wrong() -> None:
    said = [(0.9, 0.9, False, True, True, True), *[(0.8, 0.8, True, True, True, True)] * 39]
    # One of 40 is wrong, and half of a tenth may be: of the answered ones, or of the owed ones.
    assert floors(words(said), 0.9)[0] == 0.0
    assert floors(words(said, [True] * 40), 0.9)[0] == 0.0
    assert floors(words(said, [True] + [False] * 39), 0.9)[0] > 0.9


def test_frames_that_the_guard_holds_back_raise_no_floor() -> None:
    said = [(1.0, 1.0, False, False, False, False)] * 50
    assert floors(words(said), 0.98) == (0.0, 0.0)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10_000), st.lists(st.floats(0, 1), min_size=2, max_size=2))
def test_no_threshold_is_chosen_below_its_floor(seed: int, least: list[float]) -> None:
    generator = np.random.default_rng(seed)
    pilot, tested = (
        Words(generator.random((2, n)), generator.random((2, n)) < 0.99, np.ones((2, n), np.bool_)) for n in (400, 600)
    )
    thresholds = choose(above(pilot, least), above(tested, least), 0.9, (2, 1))
    for threshold, floor in zip(thresholds, least, strict=True):
        assert threshold is None or threshold >= floor
    # What was tested is what will run, where only thresholds are known.
    assert np.array_equal(answering(tested, thresholds), answering(above(tested, least), thresholds))


@pytest.mark.parametrize("size", [(32, 32), (21, 30)])
def test_strange_copies_are_frames_of_every_kind_and_the_same_for_the_same_seed(size: tuple[int, int]) -> None:
    generator = np.random.default_rng(0)
    frames = [generator.integers(0, 256, (1, *size, 3), dtype=np.uint8) for _ in range(len(KINDS))]
    first, again = (
        [copy for number in range(len(frames)) for copy in strange_copies(frames, number, np.random.default_rng(1))]
        for _ in range(2)
    )
    assert len(first) == EACH * len(frames)
    for number, (copy, same) in enumerate(zip(first, again, strict=True)):
        assert copy.shape == (1, *size, 3)
        assert copy.dtype == np.uint8
        assert np.array_equal(copy, same)
        assert not np.array_equal(copy, frames[number // EACH])
    by_kind = [(number // EACH + number % EACH * len(KINDS) // EACH) % len(KINDS) for number in range(len(first))]
    assert sorted(by_kind) == sorted(list(range(len(KINDS))) * EACH)
