"""Quantized coefficients ↔ bytes. Pure: books and layouts come from the bundle, zstd does the coding (docs/codec.md).

Coefficients lie in the order of their spread over the calibration frames, widest first. Neighbours form groups, small
ones where coefficients are wide and large ones where they are almost always zero, so that each group holds about as
much information as the next; a book lists the 255 likeliest groups of its kind, and what goes to zstd is each group's
place in its book, one byte. One Huffman table, trained on the calibration frames and kept in a dictionary, then suits
all of them. What no book holds is patched: the gap to the coefficient, and what to add to it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeAlias

import numpy as np
import zstandard
from numpy.typing import NDArray

from runtime.errors import PacketError

Levels: TypeAlias = NDArray[np.int16]  # (n,), quantized coefficients: what both sides hold of a frame, exactly
Longs: TypeAlias = NDArray[np.int64]
Ints: TypeAlias = NDArray[np.int32]  # narrow where a frame is touched: what fits the heap costs no page faults
Hashes: TypeAlias = NDArray[np.uint32]  # sums of levels times weights, modulo 2 ** 32

BOOK_ROWS = 255
MOST_SMALL = 127  # coefficients of a group, and kinds of them: what many small numbers are kept in allows no more
RETRIES = 2
PLACE_BITS = 32
SLOT_BITS = 14
MAX_TRIES = 200
MORE = 255  # a byte of a patch that says: add 255 and read on
MAX_MAGNITUDE = 4094  # of what is packed: twice a level's, for differences
MAX_PATCH_BYTES = 2 + 2 * MAX_MAGNITUDE // MORE  # of one coefficient; a payload that unfolds to more is an attack
ZSTD = {"format": zstandard.FORMAT_ZSTD1_MAGICLESS, "write_content_size": 0, "write_dict_id": 0, "write_checksum": 0}
SIZE_BITS = 0xE0  # of a frame's first byte, set when it names its size, which would be allocated unseen
ZSTD_LEVEL = 1  # there is nothing to find but the Huffman table; higher levels gain under 1 % at five times the time


@dataclass(frozen=True)
class Books:
    """The likeliest groups of every kind."""

    rows: tuple[Levels, ...]  # by kind: (up to BOOK_ROWS, group size), the first of them all zero

    @cached_property
    def sizes(self) -> Longs:
        """The group size of each kind."""
        return np.array([rows.shape[1] for rows in self.rows], np.int64)

    @cached_property
    def flat(self) -> Levels:
        """All rows of all kinds, one behind the other."""
        return np.concatenate([rows.ravel() for rows in self.rows])

    @cached_property
    def finder(self) -> Finder:
        """Finds groups in these books; made when first needed, which only senders do."""
        return Finder(self)


class LevelPacker:
    """Packs levels (n,) of one cut, rate and activity. Belongs to one thread."""

    def __init__(self, count: int, books: Books, groups: Sequence[int], dictionary: bytes) -> None:
        """Lay the groups out.

        Args:
            count: number of coefficients.
            books: of the bundle.
            groups: how many groups of each kind there are, in the order of the coefficients; what lies behind the
                last group is taken for zero unless a patch says otherwise.
            dictionary: of zstd, as trained on calibration frames; empty for none.

        Raises:
            ValueError: the groups do not fit the coefficients, or are too large or of too many kinds.
        """
        if max(books.sizes.max(), len(books.rows)) > MOST_SMALL:
            raise ValueError(f"groups of {books.sizes.max()} in {len(books.rows)} kinds; {MOST_SMALL} is the most")
        sizes = np.repeat(books.sizes, groups)
        ends = np.cumsum(sizes)
        self._covered = int(ends[-1]) if ends.size else 0
        if self._covered > count + int(books.sizes.max()):
            raise ValueError(f"groups of {self._covered} coefficients do not fit {count}")
        self._count = count
        self._starts = ends - sizes
        kinds = np.repeat(np.arange(len(books.rows)), groups)
        self._kinds = kinds.astype(np.uint8)
        group = np.repeat(np.arange(sizes.size), sizes)
        place = np.arange(self._covered) - self._starts[group]
        offsets = np.concatenate([[0], np.cumsum([rows.size for rows in books.rows])])
        self._flat = books.flat
        self._group, self._sizes = group.astype(np.int32), sizes
        self._row_start = (offsets[kinds][group] + place).astype(np.int32)
        self._row_size = sizes[group].astype(np.int16)
        self._rows_of_kind = np.array([len(rows) for rows in books.rows], np.uint8)[kinds]
        self._books, self._place = books, place.astype(np.uint8)
        compression = zstandard.ZstdCompressionParameters.from_level(ZSTD_LEVEL, **ZSTD)
        shared: dict[str, Any] = {"dict_data": zstandard.ZstdCompressionDict(dictionary)} if dictionary else {}
        self._compressor = zstandard.ZstdCompressor(compression_params=compression, **shared)
        self._decompressor = zstandard.ZstdDecompressor(
            format=zstandard.FORMAT_ZSTD1_MAGICLESS, max_window_size=1 << 20, **shared
        )

    def pack(self, levels: Levels) -> bytes:
        """Return levels (n,), of at most MAX_MAGNITUDE, as bytes."""
        return self._compressor.compress(self.symbols(levels))

    def unpack(self, payload: bytes) -> Levels:
        """Return the levels (n,) that `payload` holds.

        Raises:
            PacketError: it is not what `pack` writes.
        """
        most = self._sizes.size + MAX_PATCH_BYTES * self._count
        if not payload or payload[0] & SIZE_BITS:
            raise PacketError("the payload is no zstd frame of this cut and rate: it names its size")
        try:
            data = self._decompressor.decompress(payload, max_output_size=most, allow_extra_data=False)
        except zstandard.ZstdError as error:
            raise PacketError(f"the payload is no zstd frame of this cut and rate: {error}") from error
        return self.levels(data)

    def symbols(self, levels: Levels) -> bytes:
        """What zstd is given: a byte for each group, the gaps of all patches, then what they add."""
        wide = np.zeros(max(self._count, self._covered), np.int32)
        wide[: self._count] = levels
        hashes = self._hashes(wide)
        symbols, found = self._finder.rows(self._kinds, hashes)
        left = wide if found.all() else wide.copy()
        for _ in range(RETRIES):
            lost = np.flatnonzero(~found)
            if not lost.size:
                break
            # Without its largest coefficient a group is likelier to be in its book; a patch then adds that one.
            largest = self._largest(left, lost)
            hashes[lost] -= left[largest].view(np.uint32) * self._weights[largest]
            left[largest] = 0
            symbols[lost], found[lost] = self._finder.rows(self._kinds[lost], hashes[lost])
        wide[: self._covered] -= self._held(symbols)
        places = np.flatnonzero(wide)
        gaps = np.diff(places, prepend=-1) - 1
        added = wide[places].astype(np.int64)
        return symbols.tobytes() + _counted(gaps) + _counted(np.where(added < 0, -2 * added - 1, 2 * added - 2))

    def levels(self, symbols: bytes) -> Levels:
        """The way back from `symbols`.

        Raises:
            PacketError: the bytes are not what `symbols` writes.
        """
        head = np.frombuffer(symbols, np.uint8, count=min(len(symbols), self._sizes.size))
        if head.size < self._sizes.size or (head >= self._rows_of_kind).any():
            raise PacketError(f"the payload does not hold the {self._sizes.size} groups of this cut and rate")
        wide = np.zeros(max(self._count, self._covered), np.int32)
        wide[: self._covered] = self._held(head)
        numbers = _uncounted(np.frombuffer(symbols, np.uint8)[head.size :])
        if numbers.size % 2:
            raise PacketError("the payload ends within a patch")
        gaps, codes = np.split(numbers, 2)
        places = np.cumsum(gaps + 1) - 1
        if places.size and places[-1] >= wide.size:
            raise PacketError("a patch of the payload lies behind the last coefficient")
        wide[places] += np.where(codes % 2 == 1, -(codes + 1) // 2, codes // 2 + 1)
        if wide[self._count :].any() or np.abs(wide).max(initial=0) > MAX_MAGNITUDE:
            raise PacketError("the payload holds a level out of range")
        return wide[: self._count].astype(np.int16)

    @cached_property
    def _finder(self) -> Finder:
        return self._books.finder

    @cached_property
    def _weights(self) -> Hashes:
        return self._finder.weights[self._place]

    def _hashes(self, wide: Ints) -> Hashes:
        if not self._starts.size:
            return np.zeros(0, np.uint32)
        hashes: Hashes = np.add.reduceat(
            wide[: self._covered].view(np.uint32) * self._weights, self._starts, dtype=np.uint32
        )
        return hashes

    def _held(self, symbols: NDArray[np.uint8]) -> Levels:
        held: Levels = self._flat[self._row_start + symbols[self._group] * self._row_size]
        return held

    def _largest(self, wide: Ints, groups: Longs) -> Longs:
        """The place of the largest coefficient of each of `groups`."""
        sizes = self._sizes[groups]
        starts = np.cumsum(sizes) - sizes
        places = np.arange(sizes.sum()) + np.repeat(self._starts[groups] - starts, sizes)
        # The place rides in the low bits, so that one reduction finds both.
        found: Longs = np.maximum.reduceat((np.abs(wide[places]).astype(np.int64) << PLACE_BITS) | places, starts)
        return found & ((1 << PLACE_BITS) - 1)


class Finder:
    """Finds groups in their books by hash: a table for each kind in which no two of its rows meet."""

    def __init__(self, books: Books) -> None:
        generator = np.random.default_rng(0)
        self.weights = generator.integers(1, 1 << 32, int(books.sizes.max()), dtype=np.uint32) | np.uint32(1)
        kinds = len(books.rows)
        self._table = np.zeros((kinds, 1 << SLOT_BITS), np.uint8)
        self._factors = np.ones(kinds, np.uint32)
        hashes = [rows.astype(np.uint32) @ self.weights[: rows.shape[1]] for rows in books.rows]
        for kind, known in enumerate(hashes):
            slots = self._slots(known, self._factors[kind])
            # A few tries part 255 rows; rows that a book holds twice could never be parted, and lose nothing by it.
            for _ in range(MAX_TRIES):
                if np.unique(slots).size == slots.size:
                    break
                self._factors[kind] = generator.integers(1, 1 << 32, dtype=np.uint32) | np.uint32(1)
                slots = self._slots(known, self._factors[kind])
            self._table[kind, slots] = np.arange(known.size)
        self._first = np.cumsum([0, *(known.size for known in hashes[:-1])])
        self._hashes = np.concatenate(hashes)

    def rows(self, kinds: NDArray[np.uint8], hashes: Hashes) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
        """The row of each group in the book of its kind (0 where there is none), and whether there is one."""
        symbols = self._table[kinds, self._slots(hashes, self._factors[kinds])]
        found = self._hashes[self._first[kinds] + symbols] == hashes
        symbols[~found] = 0
        return symbols, found

    @staticmethod
    def _slots(hashes: Hashes, factors: Hashes | np.uint32) -> Longs:
        slots: Longs = ((hashes * factors) >> np.uint32(32 - SLOT_BITS)).astype(np.int64)
        return slots


def _counted(numbers: Longs) -> bytes:
    """Numbers from 0 on as bytes: MORE for each whole 255, then the rest."""
    ends = np.cumsum(numbers // MORE + 1)
    data = np.full(int(ends[-1]) if ends.size else 0, MORE, np.uint8)
    data[ends - 1] = numbers % MORE
    return data.tobytes()


def _uncounted(data: NDArray[np.uint8]) -> Longs:
    """The way back from `_counted`.

    Raises:
        PacketError: the bytes end within a number.
    """
    ends = np.flatnonzero(data != MORE)
    if data.size and (not ends.size or ends[-1] != data.size - 1):
        raise PacketError("the payload ends within a patch")
    if not ends.size:
        return np.zeros(0, np.int64)
    return np.add.reduceat(data.astype(np.int64), np.concatenate([[0], ends[:-1] + 1]))
