"""The codec seam, features ↔ bytes, and the codecs that need nothing fitted: `raw` and `jpeg`.

`jpeg` works at cut 0 only, where the features are the frame itself: sending a picture is one of the choices, not
another system. A codec object keeps its contexts between frames and belongs to one thread.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any, Protocol, runtime_checkable

import cv2
import numpy as np
import zstandard

from runtime.datatypes import Tensor
from runtime.errors import ConfigError, PacketError
from runtime.levels import Levels
from runtime.manifest import Bundle, CodecSpec, CutSpec

CODECS = {"raw": 1, "jpeg": 2, "transform": 3}  # name → id on the wire; ids are never used again for something else
JPEG_HEADERS_BYTES = 4096  # more than all tables of a JPEG take
ZSTD_LEVEL = 3  # higher levels gain under 1 % on plain activations


class Codec(Protocol):
    """One codec at one cut and rate."""

    def encode(self, tensor: Tensor) -> bytes:
        """Return the features (1, …) of one frame as bytes."""
        ...

    def decode(self, payload: bytes) -> Tensor:
        """Return the features (1, …) that `payload` holds.

        Raises:
            PacketError: the payload is not what `encode` writes at this cut.
        """
        ...


@runtime_checkable
class ReferenceCodec(Codec, Protocol):
    """A codec that can also code features against an earlier frame's levels, when both sides hold them.

    Levels compare only within one bundle, cut, codec and rate.
    """

    def encode_against(self, tensor: Tensor, reference: Levels | None) -> tuple[bytes, Levels]:
        """Return the features (1, …) as bytes, and the levels that a decoder will hold after reading them."""
        ...

    def decode_against(self, payload: bytes, reference: Levels | None) -> tuple[Tensor, Levels]:
        """Return the features (1, …) and the levels that `payload` holds.

        Raises:
            PacketError: the payload is not what `encode_against` writes at this cut against this reference.
        """
        ...


class RawCodec:
    """The features as they are, bit for bit, behind zstd; float32 with its bytes sorted into planes first."""

    def __init__(self, cut: CutSpec) -> None:
        self._shape = (1, *cut.shape)
        self._dtype = np.dtype(cut.dtype)
        self._nbytes = int(np.prod(cut.shape)) * self._dtype.itemsize
        self._compressor = zstandard.ZstdCompressor(level=ZSTD_LEVEL, write_checksum=False)
        self._decompressor = zstandard.ZstdDecompressor(max_window_size=1 << 27)

    def encode(self, tensor: Tensor) -> bytes:
        """Return the features (1, …) of one frame as a zstd frame."""
        _check(tensor, self._shape, self._dtype)
        data = np.ascontiguousarray(tensor).reshape(-1)
        if self._dtype.itemsize > 1:
            data = np.ascontiguousarray(data.view(np.uint8).reshape(-1, self._dtype.itemsize).T)
        return self._compressor.compress(data.data)

    def decode(self, payload: bytes) -> Tensor:
        """Return the features (1, …); never allocates more than this cut's size."""
        try:
            promised = zstandard.get_frame_parameters(payload).content_size
            if promised != self._nbytes:
                raise PacketError(f"the payload unfolds to {promised} bytes, this cut has {self._nbytes}")
            data = self._decompressor.decompress(payload, allow_extra_data=False)
        except zstandard.ZstdError as error:
            raise PacketError(f"the payload is no zstd frame: {error}") from error
        flat = np.frombuffer(data, np.uint8)
        if self._dtype.itemsize > 1:
            flat = np.ascontiguousarray(flat.reshape(self._dtype.itemsize, -1).T).reshape(-1).view(self._dtype)
        return flat.reshape(self._shape)


class JpegCodec:
    """The frame as a JPEG of the model's input size. Lossy: what a user without Kinflow would send."""

    def __init__(self, cut: CutSpec, quality: int) -> None:
        if len(cut.shape) != 3 or cut.shape[2] != 3 or cut.dtype != "uint8":
            raise ConfigError("codec jpeg works on frames only, at cut 0; choose raw for features")
        self._shape = (1, *cut.shape)
        # At quality 100 noise stays below its raw size; more could only hold scan upon scan to keep a node busy.
        self._max_bytes = int(np.prod(cut.shape)) + JPEG_HEADERS_BYTES
        self._quality = [cv2.IMWRITE_JPEG_QUALITY, quality]

    def encode(self, tensor: Tensor) -> bytes:
        """Return the frame (1, height, width, 3) RGB as a JPEG."""
        _check(tensor, self._shape, np.dtype(np.uint8))
        ok, data = cv2.imencode(".jpg", cv2.cvtColor(tensor[0], cv2.COLOR_RGB2BGR), self._quality)
        if not ok:
            raise ValueError(f"OpenCV could not encode a frame of shape {tensor.shape}")
        return data.tobytes()

    def decode(self, payload: bytes) -> Tensor:
        """Return the frame (1, height, width, 3) RGB; the size is checked before a pixel is decoded."""
        if len(payload) > self._max_bytes or not payload.endswith(b"\xff\xd9"):
            raise PacketError(f"the payload of {len(payload)} bytes is no whole JPEG of a frame at this cut")
        size = jpeg_size(payload)
        if size != self._shape[1:3]:
            raise PacketError(f"the payload is a JPEG of (height, width) {size}, this cut has {self._shape[1:3]}")
        flags = cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION
        try:
            pixels = cv2.imdecode(np.frombuffer(payload, np.uint8), flags)
        except cv2.error as error:
            raise PacketError("the payload is a damaged JPEG") from error
        if pixels is None or pixels.shape != self._shape[1:]:
            raise PacketError("the payload is a damaged JPEG")
        return np.ascontiguousarray(cv2.cvtColor(pixels, cv2.COLOR_BGR2RGB))[np.newaxis]


def _check(tensor: Tensor, shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
    if tensor.shape != shape or tensor.dtype != dtype:
        raise ValueError(f"features {tensor.shape} {tensor.dtype} are not {shape} {dtype}")


def jpeg_size(data: bytes) -> tuple[int, int] | None:
    """The (height, width) that a JPEG's frame header promises, or None when `data` is no JPEG.

    What decoders read in their own ways before the first scan (fill bytes, markers without a length) is refused, or a
    payload could show a small frame here and unfold to a huge one there.
    """
    if data[:2] != b"\xff\xd8":
        return None
    position = 2
    size: tuple[int, int] | None = None
    while position + 4 <= len(data) and data[position] == 0xFF:
        marker, length = data[position + 1], int.from_bytes(data[position + 2 : position + 4], "big")
        if length < 2 or not 0xC0 <= marker <= 0xFE or 0xD0 <= marker <= 0xD9:
            return None
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            if size is not None or position + 9 > len(data):
                return None
            size = (
                int.from_bytes(data[position + 5 : position + 7], "big"),
                int.from_bytes(data[position + 7 : position + 9], "big"),
            )
        if marker == 0xDA:
            return size
        position += 2 + length
    return None


AUTO = "auto"  # in a config: transform where the bundle has it, else raw
# Of agreement: what the rate in force may cost where none was asked for.
LITTLE = 0.02


def split_name(text: str) -> tuple[str, int | None]:
    """Split a codec as people write it, `jpeg:75` or `auto`, into name and parameter.

    Raises:
        ConfigError: the codec is unknown or its parameter is no number.
    """
    name, _, parameter = text.partition(":")
    if name not in CODECS and text != AUTO:
        raise ConfigError(f"codec {text!r} is unknown; choose one of {', '.join((AUTO, *CODECS))}")
    if not parameter:
        return name, None
    if not parameter.isdecimal():
        raise ConfigError(f"codec {text!r}: {parameter!r} must be a whole number")
    return name, int(parameter)


def find_rate(bundle: Bundle, cut: int, text: str) -> tuple[str, int]:
    """Find what a codec as people write it means at a cut: its name, and its rate as an index into the manifest's.

    Raises:
        ConfigError: the bundle has no such codec or rate at this cut.
    """
    name, parameter = split_name(text)
    if name == AUTO:
        has = {spec.name for spec in bundle.manifest.cuts[cut].codecs}
        name = "transform" if "transform" in has else "raw"
    for spec in bundle.manifest.cuts[cut].codecs:
        if spec.name != name:
            continue
        if parameter is None:
            return name, _usual_rate(bundle, spec)
        for rate, known in enumerate(spec.rates):
            if known.parameter == parameter:
                return name, rate
        choices = ", ".join(f"{name}:{known.parameter:g}" for known in spec.rates)
        raise ConfigError(f"codec {text!r} is not in the bundle; it has {choices}")
    choices = ", ".join(spec.name for spec in bundle.manifest.cuts[cut].codecs) or "none"
    raise ConfigError(f"codec {name!r} does not work at cut {cut}; the bundle has {choices} there")


def _usual_rate(bundle: Bundle, spec: CodecSpec) -> int:
    """The coarsest rate that was measured to cost little, else the finest; without measurements the middle one."""
    measured = [rate.agreement for rate in spec.rates]
    least = bundle.manifest.proof.get("whole_agreement", 1.0) - LITTLE
    if any(agreement is None for agreement in measured):
        return len(spec.rates) // 2
    return next((rate for rate, agreement in enumerate(measured) if (agreement or 0.0) >= least), len(measured) - 1)


class Codecs:
    """All codecs of a bundle, made when first needed and kept. Belongs to one thread."""

    def __init__(self, bundle: Bundle) -> None:
        self._bundle = bundle
        self._made: dict[tuple[int, int, int], Codec] = {}
        self._transforms: dict[int, Any] = {}  # by cut; shared by all rates

    def get(self, cut: int, codec_id: int, rate: int) -> Codec:
        """The codec for what a packet's header names.

        Raises:
            PacketError: the bundle has no such codec or rate at this cut.
        """
        made = self._made.get((cut, codec_id, rate))
        if made is None:
            made = self._make(cut, codec_id, rate)
            self._made[cut, codec_id, rate] = made
        return made

    def _make(self, cut: int, codec_id: int, rate: int) -> Codec:
        cuts = self._bundle.manifest.cuts
        if cut >= len(cuts) - 1:
            raise PacketError(f"cut {cut} is not one of this bundle's {len(cuts) - 1}")
        spec = next((spec for spec in cuts[cut].codecs if CODECS.get(spec.name) == codec_id), None)
        if spec is None or rate >= len(spec.rates):
            raise PacketError(f"codec {codec_id} at rate {rate} is not in this bundle at cut {cut}")
        if spec.name == "jpeg":
            return JpegCodec(cuts[cut], round(spec.rates[rate].parameter))
        if spec.name == "raw":
            return RawCodec(cuts[cut])
        module = import_module("runtime.codec_transform")
        if cut not in self._transforms:
            self._transforms[cut] = module.open_transform(self._bundle, cuts[cut], spec)
        codec: Codec = module.TransformCodec(self._transforms[cut], rate)
        return codec
