"""What goes through a codec comes back, and a codec that is written is found in the bundle."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from runtime import manifest
from runtime.codec import CODECS, Codecs, JpegCodec, RawCodec, find_rate, split_name
from runtime.datatypes import Tensor
from runtime.errors import ConfigError, PacketError
from runtime.manifest import Bundle, CodecSpec, CutSpec, RateSpec

BYTES = CutSpec(after="", tensor="", shape=(4, 8, 8), dtype="uint8")
FLOATS = CutSpec(after="", tensor="", shape=(3, 5, 7), dtype="float32")
FRAME = CutSpec(after="", tensor="", shape=(24, 40, 3), dtype="uint8")


def noise(*shape: int) -> NDArray[np.uint8]:
    return np.random.default_rng(5).integers(0, 256, shape, np.uint8)


@pytest.mark.parametrize("cut", [BYTES, FLOATS], ids=["uint8", "float32"])
def test_raw_keeps_every_bit_of_any_features(cut: CutSpec) -> None:
    codec = RawCodec(cut)
    nbytes = int(np.prod(cut.shape)) * np.dtype(cut.dtype).itemsize

    @given(st.binary(min_size=nbytes, max_size=nbytes))
    def holds(data: bytes) -> None:
        tensor = np.frombuffer(data, cut.dtype).reshape(1, *cut.shape)
        back = codec.decode(codec.encode(tensor))
        assert (back.shape, back.dtype, back.tobytes()) == (tensor.shape, tensor.dtype, data)
        assert back.flags.c_contiguous

    holds()


def test_raw_keeps_nan_infinities_and_negative_zero() -> None:
    odd = np.array([np.nan, -np.nan, np.inf, -np.inf, -0.0, 1e-45], np.float32)
    tensor = np.resize(odd, (1, *FLOATS.shape))
    codec = RawCodec(FLOATS)
    assert codec.decode(codec.encode(tensor)).tobytes() == tensor.tobytes()


def test_raw_takes_features_that_are_not_contiguous() -> None:
    codec = RawCodec(BYTES)
    tensor = noise(1, 8, 8, 4).transpose(0, 3, 1, 2)
    np.testing.assert_array_equal(codec.decode(codec.encode(tensor)), tensor)


@pytest.mark.parametrize(
    "tensor", [noise(1, 4, 8, 9), noise(2, 4, 8, 8), noise(4, 8, 8), np.zeros((1, 4, 8, 8), np.float32)]
)
def test_raw_refuses_to_encode_what_is_not_of_its_cut(tensor: Tensor) -> None:
    with pytest.raises(ValueError, match="are not"):
        RawCodec(BYTES).encode(tensor)


def test_jpeg_gives_back_nearly_the_frame_with_red_still_red() -> None:
    frame = np.full((1, *FRAME.shape), (200, 30, 60), np.uint8)
    codec = JpegCodec(FRAME, 95)
    back = codec.decode(codec.encode(frame))
    assert back.shape == frame.shape
    assert back.flags.c_contiguous
    assert np.abs(back.astype(int) - frame).max() <= 4


@pytest.mark.parametrize("size", [(16, 16), (17, 31), (24, 40), (224, 224)])
def test_jpeg_takes_its_own_worst_case_noise_at_quality_100(size: tuple[int, int]) -> None:
    codec = JpegCodec(CutSpec(after="", tensor="", shape=(*size, 3), dtype="uint8"), 100)
    assert codec.decode(codec.encode(noise(1, *size, 3))).shape == (1, *size, 3)


@pytest.mark.parametrize("cut", [BYTES, FLOATS], ids=["uint8", "float32"])
def test_jpeg_works_on_frames_only(cut: CutSpec) -> None:
    with pytest.raises(ConfigError, match="codec jpeg works on frames only"):
        JpegCodec(cut, 75)


@pytest.fixture(scope="module")
def bundle(shared_bundle: Path) -> Bundle:
    return manifest.load(shared_bundle)


@pytest.mark.parametrize(
    ("text", "expected"), [("raw", ("raw", None)), ("jpeg:75", ("jpeg", 75)), ("jpeg", ("jpeg", None))]
)
def test_a_codec_is_written_as_name_and_parameter(text: str, expected: tuple[str, int | None]) -> None:
    assert split_name(text) == expected


@pytest.mark.parametrize("text", ["", "png", "JPEG", "jpeg:x", "jpeg:7.5", "jpeg:-1", "jpeg:²", "raw:1:2"])
def test_a_codec_written_wrongly_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"^codec .*(choose one of|whole number)"):
        split_name(text)


@pytest.mark.parametrize(
    ("cut", "text", "expected"),
    [
        (0, "raw", ("raw", 0)),
        (0, "jpeg", ("jpeg", 1)),
        (0, "jpeg:50", ("jpeg", 0)),
        (0, "jpeg:90", ("jpeg", 2)),
        (2, "raw", ("raw", 0)),
    ],
)
def test_a_written_codec_is_found_in_the_bundle(bundle: Bundle, cut: int, text: str, expected: tuple[str, int]) -> None:
    assert find_rate(bundle, cut, text) == expected


@pytest.mark.parametrize(
    ("cut", "text", "sentence"),
    [
        (0, "jpeg:60", "it has jpeg:50, jpeg:75, jpeg:90"),
        (1, "jpeg", "does not work at cut 1; the bundle has raw there"),
        (3, "raw", "does not work at cut 3; the bundle has none there"),
    ],
)
def test_a_codec_that_the_bundle_lacks_is_refused_with_what_it_has(
    bundle: Bundle, cut: int, text: str, sentence: str
) -> None:
    with pytest.raises(ConfigError, match=sentence):
        find_rate(bundle, cut, text)


def test_codecs_are_made_once_and_fit_their_cut(bundle: Bundle) -> None:
    codecs = Codecs(bundle)
    assert isinstance(codecs.get(0, CODECS["jpeg"], 2), JpegCodec)
    codec = codecs.get(2, CODECS["raw"], 0)
    assert codecs.get(2, CODECS["raw"], 0) is codec
    tensor = noise(1, 6, 4, 4)
    np.testing.assert_array_equal(codec.decode(codec.encode(tensor)), tensor)


@settings(max_examples=300)
@given(st.integers(0, 255), st.integers(0, 255), st.integers(0, 255))
def test_any_header_names_a_codec_of_the_bundle_or_is_refused(
    shared_bundle: Path, cut: int, codec_id: int, rate: int
) -> None:
    has = {(cut, 1, 0) for cut in range(3)} | {(0, 2, rate) for rate in range(3)}
    codecs = Codecs(manifest.load(shared_bundle))
    if (cut, codec_id, rate) in has:
        codecs.get(cut, codec_id, rate)
        return
    with pytest.raises(PacketError):
        codecs.get(cut, codec_id, rate)


def test_a_codec_that_this_kinflow_does_not_know_is_refused_by_packet_error(bundle: Bundle) -> None:
    def with_codecs(cut: CutSpec) -> CutSpec:
        return msgspec.structs.replace(cut, codecs=(manifest.CodecSpec(name="newer", rates=()), *cut.codecs))

    newer = msgspec.structs.replace(bundle.manifest, cuts=tuple(with_codecs(cut) for cut in bundle.manifest.cuts))
    codecs = Codecs(Bundle(bundle.path, newer, bundle.id, bundle.labels))
    assert isinstance(codecs.get(1, CODECS["raw"], 0), RawCodec)
    with pytest.raises(PacketError):
        codecs.get(1, 99, 0)


@pytest.mark.parametrize(
    ("measured", "whole", "rate"),
    [
        ((0.7, 0.93, 0.97), 0.98, 2),
        ((0.7, 0.96, 0.97), 0.98, 1),
        ((0.7, 0.86, 0.87), 0.88, 1),
        ((0.5, 0.6, 0.7), 0.98, 2),
        ((None, None, None), 0.98, 1),
    ],
)
def test_the_usual_rate_is_the_coarsest_that_costs_little(
    shared_bundle: Path, measured: tuple[float | None, ...], whole: float, rate: int
) -> None:
    bundle = manifest.load(shared_bundle)
    rates = tuple(
        RateSpec(parameter=parameter, agreement=value) for parameter, value in zip((50, 75, 90), measured, strict=True)
    )
    first, *rest = bundle.manifest.cuts
    first = msgspec.structs.replace(first, codecs=(CodecSpec(name="jpeg", rates=rates),))
    made = msgspec.structs.replace(bundle.manifest, cuts=(first, *rest), proof={"whole_agreement": whole})
    assert find_rate(dataclasses.replace(bundle, manifest=made), 0, "jpeg") == ("jpeg", rate)
