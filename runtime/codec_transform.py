"""The transform codec: features as coarsely quantized coefficients of directions that matter to the answer.

The graphs of a cut, fitted by `export`, turn features into coefficients and back; both are linear, so one step for all
coefficients is the rate. Levels, the coefficients in steps, are packed by `runtime.levels`. Between frames only the
difference of levels to those of an earlier frame is packed, and a coefficient keeps its level until it has clearly
left it. docs/codec.md derives it all.
"""

from __future__ import annotations

from dataclasses import dataclass
from io import BytesIO
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtime.datatypes import Tensor
from runtime.errors import BundleError, PacketError
from runtime.levels import MAX_MAGNITUDE, Books, LevelPacker, Levels
from runtime.manifest import Bundle, CodecSpec, CutSpec
from runtime.segment import Segment, load_graph

MAX_LEVEL = MAX_MAGNITUDE // 2  # so that differences of levels can be packed as well
HYSTERESIS = 1.0  # steps that a coefficient may be off its last level before it moves


@dataclass(frozen=True, slots=True)
class Tables:
    """What a cut's codec knows besides its graphs; the same on every tier."""

    count: int  # coefficients
    steps: NDArray[np.float32]  # (rates,)
    centroids: NDArray[np.float32]  # (rates, 2): mean distance of a coefficient from its level, in steps, outwards
    books: Books
    groups: NDArray[np.int32]  # (rates, activities, kinds): how many groups of each kind
    expected: NDArray[np.float32]  # (rates, activities): levels that are not zero, by the calibration frames
    dictionaries: tuple[tuple[bytes, ...], ...]  # by rate and activity

    def dump(self) -> bytes:
        """The tables as the bytes of an .npz file; the same tables give the same bytes."""
        flat = [data for row in self.dictionaries for data in row]
        buffer = BytesIO()
        np.savez_compressed(
            buffer,
            count=np.array(self.count),
            steps=self.steps,
            centroids=self.centroids,
            book_rows=np.concatenate([rows.ravel() for rows in self.books.rows]),
            book_shapes=np.array([rows.shape for rows in self.books.rows], np.int32),
            groups=self.groups,
            expected=self.expected,
            dictionaries=np.frombuffer(b"".join(flat), np.uint8),
            dictionary_sizes=np.array([len(data) for data in flat], np.int32),
        )
        return buffer.getvalue()

    @staticmethod
    def parse(data: bytes, name: str) -> Tables:
        """Read what `dump` wrote.

        Raises:
            BundleError: it is something else.
        """
        try:
            with np.load(BytesIO(data), allow_pickle=False) as arrays:
                shapes = [(int(rows), int(size)) for rows, size in arrays["book_shapes"]]
                ends = np.cumsum([rows * size for rows, size in shapes])[:-1]
                parts = np.split(arrays["book_rows"].astype(np.int16), ends)
                books = Books(tuple(part.reshape(shape) for part, shape in zip(parts, shapes, strict=True)))
                groups = arrays["groups"].astype(np.int32)
                whole = arrays["dictionaries"].tobytes()
                stops = np.cumsum(arrays["dictionary_sizes"]).tolist()
                flat = [whole[start:stop] for start, stop in zip([0, *stops[:-1]], stops, strict=True)]
                activities = groups.shape[1]
                rows = [tuple(flat[place : place + activities]) for place in range(0, len(flat), activities)]
                tables = Tables(
                    count=int(arrays["count"]),
                    steps=arrays["steps"].astype(np.float32),
                    centroids=arrays["centroids"].astype(np.float32),
                    books=books,
                    groups=groups,
                    expected=arrays["expected"].astype(np.float32),
                    dictionaries=tuple(rows),
                )
        except Exception as error:  # zip, numpy and indexing raise many kinds; all mean the same here
            raise BundleError(f"{name} holds no tables of the codec transform ({error}); export again") from error
        rates, activities, kinds = tables.groups.shape
        if (
            tables.steps.shape != (rates,)
            or tables.centroids.shape != (rates, 2)
            or tables.expected.shape != (rates, activities)
            or len(tables.dictionaries) != rates
            or kinds != len(books.rows)
            or not (tables.steps > 0).all()
        ):
            raise BundleError(f"{name}: the tables of the codec transform do not fit each other; export again")
        return tables


class Transform:
    """The graphs and tables of one cut, shared by all of its rates; each is loaded when first needed."""

    def __init__(self, bundle: Bundle, cut: CutSpec, spec: CodecSpec, *, threads: int = 1) -> None:
        if spec.encoder is None or spec.decoder is None or spec.tables is None:
            raise BundleError("the codec transform needs an encoder, a decoder and tables; export again")
        self._bundle, self._threads = bundle, threads
        self._encoder_file, self._decoder_file = spec.encoder, spec.decoder
        self._encoder: Segment | None = None
        self._decoder: Segment | None = None
        self.shape, self.dtype = (1, *cut.shape), np.dtype(cut.dtype)
        self.tables = Tables.parse(bundle.file(spec.tables).read_bytes(), spec.tables)
        if len(spec.rates) != len(self.tables.steps):
            raise BundleError(f"{spec.tables} has {len(self.tables.steps)} rates, the manifest {len(spec.rates)}")
        self._packers: dict[tuple[int, int], LevelPacker] = {}

    def analyse(self, tensor: Tensor) -> NDArray[np.float32]:
        """Features (1, …) as coefficients (n,)."""
        if self._encoder is None:
            self._encoder = load_graph(self._bundle, self._encoder_file, threads=self._threads)
        coefficients: NDArray[np.float32] = self._encoder.run(tensor).reshape(-1)
        if coefficients.size != self.tables.count:
            raise BundleError(f"{self._encoder_file} gives {coefficients.size} coefficients, not {self.tables.count}")
        return coefficients

    def synthesize(self, coefficients: NDArray[np.float32]) -> Tensor:
        """Coefficients (n,) as features (1, …)."""
        if self._decoder is None:
            self._decoder = load_graph(self._bundle, self._decoder_file, threads=self._threads)
        features = self._decoder.run(coefficients.reshape(1, -1))
        if features.shape != self.shape or features.dtype != self.dtype:
            raise BundleError(f"{self._decoder_file} gives {features.shape} {features.dtype}, not what lies at its cut")
        return features

    def packer(self, rate: int, activity: int) -> LevelPacker:
        """The packer for levels that stand alone (activity 0) or for differences of that activity."""
        packer = self._packers.get((rate, activity))
        if packer is None:
            # All activities of a rate at once: how busy a scene can get shows over hours, and memory should not grow
            # for so long.
            for each in range(self.tables.groups.shape[1]) if activity else (0,):
                if (rate, each) not in self._packers:
                    self._packers[rate, each] = self._packer(rate, each)
            packer = self._packers[rate, activity]
        return packer

    def _packer(self, rate: int, activity: int) -> LevelPacker:
        tables = self.tables
        try:
            return LevelPacker(
                tables.count, tables.books, tables.groups[rate, activity], tables.dictionaries[rate][activity]
            )
        except Exception as error:  # zstd's own error for a bad dictionary, and whatever wrong groups lead to
            raise BundleError(f"the tables of the codec transform cannot be used: {error}") from error


class TransformCodec:
    """The codec of one cut at one rate. Belongs to one thread, with all that share its Transform."""

    def __init__(self, transform: Transform, rate: int) -> None:
        self._transform = transform
        self._rate = rate
        tables = transform.tables
        self._step = float(tables.steps[rate])
        self._values = values_of(np.arange(-MAX_LEVEL, MAX_LEVEL + 1), self._step, tables.centroids[rate])
        self._expected = tables.expected[rate, 1:]

    def encode(self, tensor: Tensor) -> bytes:
        """Return the features (1, …) of one frame as bytes that stand alone."""
        return self.encode_against(tensor, None)[0]

    def decode(self, payload: bytes) -> Tensor:
        """Return the features (1, …) of bytes that stand alone."""
        return self.decode_against(payload, None)[0]

    def encode_against(self, tensor: Tensor, reference: Levels | None) -> tuple[bytes, Levels]:
        """Return features (1, …) as bytes, alone or against a reference's levels (n,), and the levels they stand for.

        A difference begins with one byte, its activity: how busy it is, which chooses among the tables.
        """
        if tensor.shape != self._transform.shape or tensor.dtype != self._transform.dtype:
            raise ValueError(
                f"features {tensor.shape} {tensor.dtype} are not {self._transform.shape} {self._transform.dtype}"
            )
        levels = self.quantize(self._transform.analyse(tensor), reference)
        if reference is None:
            return self._transform.packer(self._rate, 0).pack(levels), levels
        difference: Levels = levels - reference
        activity = self._activity(difference)
        return bytes([activity]) + self._transform.packer(self._rate, activity).pack(difference), levels

    def decode_against(self, payload: bytes, reference: Levels | None) -> tuple[Tensor, Levels]:
        """Return the features (1, …) and the levels (n,) that `payload` holds.

        Raises:
            PacketError: the payload is not what `encode_against` writes with this reference.
        """
        if reference is None:
            levels = self._transform.packer(self._rate, 0).unpack(payload)
        else:
            activity = payload[0] if payload else 0
            if not 1 <= activity <= self._expected.size:
                raise PacketError(f"the payload names activity {activity}, this rate has 1 to {self._expected.size}")
            wide = reference.astype(np.int32) + self._transform.packer(self._rate, activity).unpack(payload[1:])
            levels = np.clip(wide, -MAX_LEVEL, MAX_LEVEL).astype(np.int16)
            if not np.array_equal(levels, wide):
                raise PacketError("the payload's difference leads out of the range of levels")
        if np.abs(levels).max(initial=0) > MAX_LEVEL:
            raise PacketError("the payload holds a level out of range")
        return self._transform.synthesize(self.dequantize(levels)), levels

    def quantize(self, coefficients: NDArray[np.float32], reference: Levels | None) -> Levels:
        """Coefficients (n,) in whole steps; those that did not clearly leave the reference's level keep it."""
        steps = coefficients * np.float32(1 / self._step)
        levels: Levels = np.clip(np.rint(steps), -MAX_LEVEL, MAX_LEVEL).astype(np.int16)
        if reference is None:
            return levels
        kept = np.abs(steps - reference) <= HYSTERESIS
        levels[kept] = reference[kept]
        return levels

    def dequantize(self, levels: Levels) -> NDArray[np.float32]:
        """Levels (n,) as the coefficients that are to be expected where they stand."""
        return self._values[levels.astype(np.int64) + MAX_LEVEL]

    def _activity(self, difference: Levels) -> int:
        """The activity whose expected number of changed levels is nearest."""
        changed = np.count_nonzero(difference)
        ratios: Any = np.log((self._expected + 1) / (changed + 1))
        return int(np.argmin(np.abs(ratios))) + 1


def values_of(levels: NDArray[Any], step: float, centroids: NDArray[np.float32]) -> NDArray[np.float32]:
    """Where the coefficients of each level lie on average, given the centroids (2,) of levels of 1 and of more."""
    magnitude = np.abs(levels)
    outwards = np.select([magnitude == 0, magnitude == 1], [np.float32(0), centroids[0]], centroids[1])
    values: NDArray[np.float32] = (np.sign(levels) * (magnitude + outwards) * np.float32(step)).astype(np.float32)
    return values


def open_transform(bundle: Bundle, cut: CutSpec, spec: CodecSpec) -> Transform:
    """Load a cut's transform; what the codec seam calls."""
    return Transform(bundle, cut, spec)
