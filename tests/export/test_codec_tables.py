"""The tables: books hold the likeliest groups, layouts cover what can be non-zero, packing comes near the entropy."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from export.codec_tables import bits, books, lay_out, level_scales, make_tables, scales
from runtime.codec_transform import Tables
from runtime.errors import BundleError
from runtime.levels import BOOK_ROWS, LevelPacker

FALLING = np.geomspace(20, 0.02, 1500)  # Laplace scales of coefficients, in steps


@pytest.fixture(scope="module")
def tables() -> Tables:
    coefficients = np.random.default_rng(0).laplace(size=(60, FALLING.size)) * FALLING
    return make_tables(coefficients.astype(np.float32), np.array([1.0, 0.5]), 0)


@given(st.floats(0.1, 50))
def test_information_adds_up_to_certainty(scale: float) -> None:
    levels = np.arange(-5000, 5001)
    assert np.isclose((2.0 ** -bits(levels, scale)).sum(), 1, atol=1e-6)


def test_books_begin_with_nothing_and_get_rarer() -> None:
    for rows, scale in zip(books().rows, scales(), strict=True):
        assert len(rows) <= BOOK_ROWS
        assert not rows[0].any()
        assert len(np.unique(rows, axis=0)) == len(rows)
        cost = bits(rows.astype(np.int64), float(scale)).sum(axis=1)
        assert (np.diff(cost) > -1e-9).all()


@settings(max_examples=30)
@given(st.floats(0.02, 30), st.floats(0.05, 1.0), st.integers(1, 3000))
def test_layouts_cover_what_is_wide_enough(first: float, ratio: float, count: int) -> None:
    falling = np.geomspace(first, first * ratio, count)
    covered = int((lay_out(falling) * books().sizes).sum())
    assert covered >= np.count_nonzero(falling > scales()[-1])
    assert covered < count + int(books().sizes.max())


def test_scales_are_found_again() -> None:
    coefficients = np.random.default_rng(1).laplace(size=(400, FALLING.size)) * FALLING
    found = level_scales(coefficients.astype(np.float32), 1.0)
    assert (np.diff(found) <= 0).all()
    wide = FALLING > 0.3
    assert np.median(np.abs(np.log(found[wide] / FALLING[wide]))) < 0.1


def test_bytes_come_near_the_entropy(tables: Tables) -> None:
    levels = np.rint(np.random.default_rng(2).laplace(size=(100, FALLING.size)) * FALLING).astype(np.int16)
    packer = LevelPacker(tables.count, tables.books, tables.groups[0, 0].tolist(), tables.dictionaries[0][0])
    packed = np.mean([len(packer.pack(row)) for row in levels])
    assert packed <= 1.15 * bits(levels.astype(np.int64), FALLING).sum(axis=1).mean() / 8


def test_smaller_steps_cost_more_and_calmer_differences_less(tables: Tables) -> None:
    assert tables.expected[1, 0] > tables.expected[0, 0]
    assert (np.diff(tables.expected[:, 1:], axis=1) < 0).all()


def test_tables_come_back_from_their_file(tables: Tables) -> None:
    data = tables.dump()
    again = Tables.parse(data, "tables.npz")
    assert again.dump() == data
    assert np.array_equal(again.groups, tables.groups)
    assert again.dictionaries == tables.dictionaries
    for rows, other in zip(again.books.rows, tables.books.rows, strict=True):
        assert np.array_equal(rows, other)


@pytest.mark.parametrize("damage", ["cut", "noise", "empty"])
def test_damaged_tables_are_told(tables: Tables, damage: str) -> None:
    data = tables.dump()
    broken = {"cut": data[: len(data) // 2], "noise": bytes(100), "empty": b""}[damage]
    with pytest.raises(BundleError, match=r"tables.npz holds no tables"):
        Tables.parse(broken, "tables.npz")
