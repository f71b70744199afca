from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from export.agreement import clopper_pearson, cosine, measure


@pytest.mark.parametrize(
    ("hits", "count", "low", "high"),
    [
        # From tables of the beta distribution.
        (0, 10, 0.0, 0.308497),
        (10, 10, 0.691503, 1.0),
        (5, 10, 0.187086, 0.812914),
        (1, 20, 0.001265, 0.248733),
        (294, 300, 0.956979, 0.992626),
    ],
)
def test_known_intervals(hits: int, count: int, low: float, high: float) -> None:
    assert clopper_pearson(hits, count) == pytest.approx((low, high), abs=2e-6)


@given(st.integers(1, 400).flatmap(lambda count: st.tuples(st.integers(0, count), st.just(count))))
def test_interval_holds_the_share(seen: tuple[int, int]) -> None:
    low, high = clopper_pearson(*seen)
    assert 0 <= low <= seen[0] / seen[1] <= high <= 1


def test_agreement_counts_the_answered_only() -> None:
    answered = np.array([True, True, False, True])
    agrees = np.array([True, False, False, True])
    measured = measure(answered, agrees)
    assert (measured.coverage, measured.answered, measured.n) == (0.75, 3, 4)
    assert measured.agreement == pytest.approx(2 / 3, abs=1e-6)


def test_an_exit_that_never_answers_has_no_agreement() -> None:
    measured = measure(np.zeros(3, bool), np.ones(3, bool))
    assert (measured.coverage, measured.agreement, measured.agreement_low) == (0.0, None, None)


def test_cosine_of_dead_logits_is_not_a_number() -> None:
    zeros = np.zeros((2, 3), np.float32)
    assert np.isnan(cosine(zeros, zeros))
    ones = np.ones((2, 3), np.float32)
    assert cosine(ones, 2 * ones) == pytest.approx(1)
