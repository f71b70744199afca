"""Matching of boxes: laws that hold for any two answers."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

from runtime.boxes import iou, match

Rows = NDArray[np.float32]


@st.composite
def answers(draw: st.DrawFn) -> Rows:
    count = draw(st.integers(0, 6))
    grid = draw(hnp.arrays(np.int64, (count, 6), elements=st.integers(0, 8)))
    rows = np.zeros((count, 6), np.float32)
    rows[:, :2] = np.minimum(grid[:, :2], grid[:, 2:4]) / 8
    rows[:, 2:4] = np.maximum(grid[:, :2], grid[:, 2:4]) / 8
    rows[:, 4] = grid[:, 4] / 8
    rows[:, 5] = grid[:, 5] % 2
    return rows


def box(x1: float, y1: float, x2: float, y2: float, score: float = 0.9, label: int = 0) -> list[float]:
    return [x1, y1, x2, y2, score, label]


def rows(*boxes: list[float]) -> Rows:
    return np.array(boxes, np.float32).reshape(-1, 6)


@given(answers(), answers())
def test_every_box_is_matched_once_or_left_over_once(left: Rows, right: Rows) -> None:
    found = match(left, right)
    assert sorted([one for one, _ in found.pairs] + list(found.left_only)) == list(np.flatnonzero(left[:, 4] > 0))
    assert sorted([two for _, two in found.pairs] + list(found.right_only)) == list(np.flatnonzero(right[:, 4] > 0))


@given(answers(), answers())
def test_matched_boxes_overlap_by_half_and_are_of_one_class(left: Rows, right: Rows) -> None:
    for one, two in match(left, right).pairs:
        assert left[one, 5] == right[two, 5]
        assert iou(left, right)[one, two] >= 0.5


@given(answers(), answers())
def test_nothing_that_could_be_matched_is_left_over_on_both_sides(left: Rows, right: Rows) -> None:
    found = match(left, right)
    overlaps = iou(left, right)
    for one in found.left_only:
        for two in found.right_only:
            assert left[one, 5] != right[two, 5] or overlaps[one, two] < 0.5


@given(answers())
def test_an_answer_agrees_with_itself_but_for_boxes_without_area(rows: Rows) -> None:
    solid = rows[(rows[:, 2] > rows[:, 0]) & (rows[:, 3] > rows[:, 1])]
    assert match(solid, solid).f1 == 1.0


@given(answers(), answers())
def test_overlap_is_symmetric_and_a_share(left: Rows, right: Rows) -> None:
    overlaps = iou(left, right)
    assert overlaps.shape == (len(left), len(right))
    assert (overlaps >= 0).all()
    assert (overlaps <= 1).all()
    assert np.allclose(overlaps, iou(right, left).T)


@given(answers(), answers())
def test_padding_changes_nothing(left: Rows, right: Rows) -> None:
    padded = np.concatenate([right, np.zeros((3, 6), np.float32)])
    assert match(left, padded) == match(left, right)


def test_the_surer_box_chooses_first() -> None:
    left = rows(box(0, 0, 10, 10, 0.6), box(0, 0, 10, 9, 0.8))
    assert match(left, rows(box(0, 0, 10, 10))).pairs == ((1, 0),)


def test_it_takes_what_it_overlaps_most() -> None:
    right = rows(box(0, 0, 10, 8), box(0, 0, 10, 9))
    assert match(rows(box(0, 0, 10, 10)), right).pairs == ((0, 1),)


def test_f1_counts_what_either_has_alone() -> None:
    left = rows(box(0, 0, 10, 10), box(50, 50, 60, 60))
    assert match(left, rows(box(0, 0, 10, 9))).f1 == pytest.approx(2 / 3)
    assert match(left, rows()).f1 == 0.0
    assert match(rows(), rows()).f1 == 1.0


def test_overlap_of_a_known_pair() -> None:
    assert iou(rows(box(0, 0, 2, 2)), rows(box(1, 0, 3, 2)))[0, 0] == pytest.approx(1 / 3)
