"""Levels ↔ bytes: exact for all levels, near what information theory allows, and safe against any bytes."""

from __future__ import annotations

import contextlib
from itertools import product

import numpy as np
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime.errors import PacketError
from runtime.levels import MAX_MAGNITUDE, ZSTD, Books, LevelPacker, Levels

COUNT = 40


def book(size: int, most: int, rows: int = 255) -> Levels:
    """Groups of small levels, the smallest first."""
    groups = sorted(product(range(-most, most + 1), repeat=size), key=lambda group: sum(map(abs, group)))
    return np.array(groups[:rows], np.int16)


BOOKS = Books((book(1, 100), book(2, 5), book(4, 1), book(8, 1, rows=40)))
GROUPS = (3, 4, 3, 2)  # 3 + 8 + 12 + 16 = 39 of the 40 coefficients


@pytest.fixture(scope="module")
def packer() -> LevelPacker:
    return LevelPacker(COUNT, BOOKS, GROUPS, b"")


anything = st.lists(st.integers(-MAX_MAGNITUDE, MAX_MAGNITUDE), min_size=COUNT, max_size=COUNT)
sparse = st.dictionaries(st.integers(0, COUNT - 1), st.integers(-3, 3)).map(
    lambda known: [known.get(place, 0) for place in range(COUNT)]
)


@given(st.one_of(anything, sparse))
def test_what_was_packed_comes_back(values: list[int]) -> None:
    levels = np.array(values, np.int16)
    packer = LevelPacker(COUNT, BOOKS, GROUPS, b"")
    assert np.array_equal(packer.unpack(packer.pack(levels)), levels)
    assert np.array_equal(packer.levels(packer.symbols(levels)), levels)


@pytest.mark.parametrize("groups", [(0, 0, 0, 0), (40, 0, 0, 0), (0, 0, 0, 5), (1, 20, 0, 0)])
def test_any_layout_is_exact(groups: tuple[int, ...]) -> None:
    levels = np.random.default_rng(0).integers(-9, 10, COUNT).astype(np.int16)
    packer = LevelPacker(COUNT, BOOKS, groups, b"")
    assert np.array_equal(packer.unpack(packer.pack(levels)), levels)


def test_a_group_in_its_book_is_one_byte(packer: LevelPacker) -> None:
    levels = np.zeros(COUNT, np.int16)
    levels[:3], levels[3], levels[11] = (100, -100, 7), 2, -1
    assert len(packer.symbols(levels)) == sum(GROUPS)


def test_what_no_group_covers_is_patched(packer: LevelPacker) -> None:
    levels = np.zeros(COUNT, np.int16)
    levels[39] = 1
    assert len(packer.symbols(levels)) == sum(GROUPS) + 2  # a gap, and what to add


def test_groups_that_do_not_fit_are_told() -> None:
    with pytest.raises(ValueError, match="do not fit"):
        LevelPacker(COUNT, BOOKS, (90, 0, 0, 0), b"")


@given(st.binary(max_size=200))
@settings(max_examples=300)
def test_no_bytes_do_harm(data: bytes) -> None:
    packer = LevelPacker(COUNT, BOOKS, GROUPS, b"")
    for read in (packer.unpack, packer.levels):
        try:
            levels = read(data)
        except PacketError:
            continue
        assert levels.shape == (COUNT,)
        assert levels.dtype == np.int16


@given(anything, st.data())
def test_damaged_bytes_are_refused_or_are_other_levels(values: list[int], data: st.DataObject) -> None:
    packer = LevelPacker(COUNT, BOOKS, GROUPS, b"")
    payload = bytearray(packer.pack(np.array(values, np.int16)))
    payload[data.draw(st.integers(0, len(payload) - 1))] ^= data.draw(st.integers(1, 255))
    with contextlib.suppress(PacketError):
        assert packer.unpack(bytes(payload)).shape == (COUNT,)


def test_a_bomb_is_refused_before_it_unfolds(packer: LevelPacker) -> None:
    compression = zstandard.ZstdCompressionParameters.from_level(19, **ZSTD)
    bomb = zstandard.ZstdCompressor(compression_params=compression).compress(bytes(10_000_000))
    with pytest.raises(PacketError, match="no zstd frame"):
        packer.unpack(bomb)


@pytest.mark.parametrize(
    ("symbols", "words"),
    [
        (bytes(5), "does not hold"),
        (bytes([250] * 12), "does not hold"),  # a row that no book has
        (bytes(12) + bytes([255]), "ends within"),
        (bytes(12) + bytes([3]), "ends within"),
        (bytes(12) + bytes([60, 0]), "behind the last"),
        (bytes(12) + bytes([0]) + bytes([255] * 300) + bytes([0]), "out of range"),
    ],
)
def test_wrong_symbols_are_told(packer: LevelPacker, symbols: bytes, words: str) -> None:
    with pytest.raises(PacketError, match=words):
        packer.levels(symbols)
