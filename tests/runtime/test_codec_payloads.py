"""What decoders make of payloads from anywhere: real pictures of other encoders, garbage, damage and bombs."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from runtime.codec import Codec, JpegCodec, RawCodec, jpeg_size
from runtime.errors import PacketError
from runtime.manifest import CutSpec

BYTES = CutSpec(after="", tensor="", shape=(4, 8, 8), dtype="uint8")
FLOATS = CutSpec(after="", tensor="", shape=(3, 5, 7), dtype="float32")
FRAME = CutSpec(after="", tensor="", shape=(24, 40, 3), dtype="uint8")
GIBI = 1 << 30


def noise(*shape: int) -> NDArray[np.uint8]:
    return np.random.default_rng(5).integers(0, 256, shape, np.uint8)


def jpeg(height: int, width: int, *flags: int) -> bytes:
    return bytes(cv2.imencode(".jpg", noise(height, width, 3), flags)[1].tobytes())


def with_exif(data: bytes, orientation: int) -> bytes:
    """The JPEG with an APP1 segment that asks viewers to turn the picture."""
    tiff = b"MM\x00\x2a\x00\x00\x00\x08\x00\x01\x01\x12\x00\x03\x00\x00\x00\x01" + bytes([0, orientation, 0, 0])
    app1 = b"Exif\x00\x00" + tiff + bytes(4)
    return data[:2] + b"\xff\xe1" + (len(app1) + 2).to_bytes(2, "big") + app1 + data[2:]


def promising(data: bytes, height: int, width: int) -> bytes:
    """The JPEG with another size in its frame header."""
    at = data.index(b"\xff\xc0") + 5
    return data[:at] + height.to_bytes(2, "big") + width.to_bytes(2, "big") + data[at + 4 :]


def two_faced(trick: bytes) -> bytes:
    """A JPEG that is huge to a decoder, and of a good size to a reader that takes `trick` for a segment."""
    small, huge = jpeg(*FRAME.shape[:2]), promising(jpeg(*FRAME.shape[:2]), 20_000, 20_000)
    at = small.index(b"\xff\xc0")
    data = huge[:2] + trick + huge[at : at + 19] + huge[2:at] + huge[at + 19 :]
    hidden = 4 + int.from_bytes(data[4:6], "big")
    return data + bytes(max(0, hidden - len(data))) + small[at:]


def zstd_frame(content_size: int, *, blocks: bytes = b"\x01\x00\x00") -> bytes:
    """A zstd frame with an eight-byte content size, and by default one empty last block."""
    return b"\x28\xb5\x2f\xfd\xe0" + content_size.to_bytes(8, "little") + blocks


CODEC_CASES: list[tuple[Codec, CutSpec]] = [
    (RawCodec(BYTES), BYTES),
    (RawCodec(FLOATS), FLOATS),
    (JpegCodec(FRAME, 75), FRAME),
]


def gives_this_cut_or_packet_error(codec: Codec, cut: CutSpec, payload: bytes) -> None:
    try:
        tensor = codec.decode(payload)
    except PacketError:
        return
    assert tensor.shape == (1, *cut.shape)
    assert tensor.dtype == cut.dtype


@pytest.mark.parametrize(("codec", "cut"), CODEC_CASES, ids=["raw uint8", "raw float32", "jpeg"])
def test_garbage_gives_a_packet_error_or_features_of_this_cut(codec: Codec, cut: CutSpec) -> None:
    starts = (b"", b"\x28\xb5\x2f\xfd", b"\xff\xd8\xff", zstd_frame(int(np.prod(cut.shape)), blocks=b""))

    @settings(max_examples=500)
    @given(st.sampled_from(starts), st.binary(max_size=200), st.sampled_from((b"", b"\xff\xd9")))
    def holds(start: bytes, middle: bytes, end: bytes) -> None:
        gives_this_cut_or_packet_error(codec, cut, start + middle + end)

    holds()


@pytest.mark.parametrize(("codec", "cut"), CODEC_CASES, ids=["raw uint8", "raw float32", "jpeg"])
def test_a_damaged_payload_gives_a_packet_error_or_features_of_this_cut(codec: Codec, cut: CutSpec) -> None:
    whole = codec.encode(noise(1, *cut.shape).astype(cut.dtype))

    @settings(max_examples=500)
    @given(st.lists(st.tuples(st.integers(0, 999_999), st.integers(1, 255)), min_size=1, max_size=4))
    def holds(flips: list[tuple[int, int]]) -> None:
        data = bytearray(whole)
        for position, change in flips:
            # Half of the flips hit the headers, where they do most.
            data[position // 2 % (len(data) if position % 2 else 40)] ^= change
        gives_this_cut_or_packet_error(codec, cut, bytes(data))

    holds()


@pytest.mark.parametrize(("codec", "cut"), CODEC_CASES, ids=["raw uint8", "raw float32", "jpeg"])
def test_a_payload_cut_short_or_with_more_behind_it_is_refused(codec: Codec, cut: CutSpec) -> None:
    whole = codec.encode(noise(1, *cut.shape).astype(cut.dtype))
    for length in range(len(whole)):
        with pytest.raises(PacketError):
            codec.decode(whole[:length])
    with pytest.raises(PacketError):
        codec.decode(whole + b"\x00")


def zeros(nbytes: int) -> bytes:
    return zstandard.ZstdCompressor(level=3).compress(bytes(nbytes))


def test_the_zstd_bomb_of_the_tests_is_one() -> None:
    assert zstandard.get_frame_parameters(zstd_frame(GIBI)).content_size == GIBI


REFUSED_RAW: dict[str, Callable[[], bytes]] = {
    "promises 1 GiB": lambda: zstd_frame(GIBI),
    "is 64 MiB of zeros": lambda: zeros(1 << 26),
    "promises nothing, unfolds to 64 MiB": lambda: zstandard.ZstdCompressor(write_content_size=False).compress(
        bytes(1 << 26)
    ),
    "promises this cut, unfolds to 64 MiB": lambda: zstd_frame(256, blocks=zeros(1 << 26)[9:]),
    "promises this cut, holds nothing": lambda: zstd_frame(256),
    "one byte less": lambda: zeros(255),
    "one byte more": lambda: zeros(257),
    "two frames": lambda: zeros(256) + zeros(256),
    "a skippable frame": lambda: b"\x50\x2a\x4d\x18\x04\x00\x00\x00abcd",
    "nothing": lambda: b"",
}


@pytest.mark.parametrize("make", REFUSED_RAW.values(), ids=REFUSED_RAW)
def test_raw_refuses_what_is_not_one_zstd_frame_of_this_cut(make: Callable[[], bytes]) -> None:
    with pytest.raises(PacketError):
        RawCodec(BYTES).decode(make())


REFUSED_JPEG: dict[str, Callable[[], bytes]] = {
    "promises 60000x60000": lambda: promising(jpeg(24, 40), 60_000, 60_000),
    "promises 0x0": lambda: promising(jpeg(24, 40), 0, 0),
    "one row more": lambda: jpeg(25, 40),
    "turned": lambda: jpeg(40, 24),
    "two frame headers": lambda: jpeg(24, 40)[:2] + jpeg(24, 40)[2:-2].replace(b"\xff\xda", jpeg(9, 9)[2:], 1),
    "a PNG": lambda: cv2.imencode(".png", noise(24, 40, 3))[1].tobytes(),
    "a WebP": lambda: cv2.imencode(".webp", noise(24, 40, 3))[1].tobytes(),
    "a fill byte that hides the frame header": lambda: two_faced(b"\xff"),
    "a marker without a length that hides the frame header": lambda: two_faced(b"\xff\x01"),
    "a restart marker that hides the frame header": lambda: two_faced(b"\xff\xd0"),
    "cut in the middle of the scan": lambda: jpeg(24, 40)[:700],
    "nothing": lambda: b"",
}


@pytest.mark.parametrize("make", REFUSED_JPEG.values(), ids=REFUSED_JPEG)
def test_jpeg_refuses_what_is_not_a_jpeg_of_this_cut(make: Callable[[], bytes]) -> None:
    with pytest.raises(PacketError):
        JpegCodec(FRAME, 75).decode(make())


def test_no_bomb_makes_the_decoder_take_more_memory_than_the_cut() -> None:
    if not Path("/proc/self/status").exists():
        pytest.skip("only Linux tells the most memory that a process ever took")
    bombs = [
        ("raw", zstd_frame(GIBI)),
        ("raw", zstd_frame(256, blocks=zeros(1 << 26)[9:])),
        ("jpeg", promising(jpeg(24, 40), 60_000, 60_000)),
        *(("jpeg", two_faced(trick)) for trick in (b"\xff", b"\xff\x01", b"\xff\xd0")),
    ]
    script = (
        "import re, sys\n"
        "from pathlib import Path\n"
        "from runtime.codec import JpegCodec, RawCodec\n"
        "from runtime.errors import PacketError\n"
        "from runtime.manifest import CutSpec\n"
        "cut = lambda *shape: CutSpec(after='', tensor='', shape=shape, dtype='uint8')\n"
        "codecs = {'raw': RawCodec(cut(4, 8, 8)), 'jpeg': JpegCodec(cut(24, 40, 3), 75)}\n"
        "codecs['jpeg'].decode(codecs['jpeg'].encode(__import__('numpy').zeros((1, 24, 40, 3), 'uint8')))\n"
        "peak = lambda: int(re.search(r'VmHWM:\\s+(\\d+) kB', Path('/proc/self/status').read_text())[1])\n"
        "before = peak()\n"
        f"for name, bomb in {bombs!r}:\n"
        "    try:\n"
        "        codecs[name].decode(bomb)\n"
        "    except PacketError:\n"
        "        continue\n"
        "    sys.exit(f'{name} took a bomb')\n"
        "print(peak() - before)\n"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-"], input=script, cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) * 1024 < 16 << 20


def test_a_jpeg_of_endless_scans_does_not_keep_a_node_busy() -> None:
    size = (224, 224)
    codec = JpegCodec(CutSpec(after="", tensor="", shape=(*size, 3), dtype="uint8"), 75)
    whole = cv2.imencode(".jpg", np.zeros((*size, 3), np.uint8), [cv2.IMWRITE_JPEG_PROGRESSIVE, 1])[1].tobytes()
    scan = whole[whole.rindex(b"\xff\xda") : -2]
    start = time.thread_time()
    with pytest.raises(PacketError):
        codec.decode(whole[:-2] + scan * 100_000 + b"\xff\xd9")
    assert time.thread_time() - start < 1


REAL_JPEGS = {
    "plain": (),
    "progressive": (cv2.IMWRITE_JPEG_PROGRESSIVE, 1),
    "optimized": (cv2.IMWRITE_JPEG_OPTIMIZE, 1),
    "restart markers": (cv2.IMWRITE_JPEG_RST_INTERVAL, 1),
    "quality 100": (cv2.IMWRITE_JPEG_QUALITY, 100),
    "4:4:4": (cv2.IMWRITE_JPEG_SAMPLING_FACTOR, cv2.IMWRITE_JPEG_SAMPLING_FACTOR_444),
}


@pytest.mark.parametrize("flags", REAL_JPEGS.values(), ids=REAL_JPEGS)
@pytest.mark.parametrize("size", [(1, 1), (24, 40), (300, 7), (224, 224)])
def test_the_size_of_a_real_jpeg_is_read(size: tuple[int, int], flags: tuple[int, ...]) -> None:
    data = jpeg(*size, *flags)
    assert jpeg_size(data) == size
    assert jpeg_size(with_exif(data, 6)) == size
    grey = cv2.imencode(".jpg", noise(*size), flags)[1].tobytes()
    assert jpeg_size(grey) == size


@pytest.mark.parametrize("flags", REAL_JPEGS.values(), ids=REAL_JPEGS)
def test_any_real_jpeg_of_this_cut_is_decoded(flags: tuple[int, ...]) -> None:
    codec = JpegCodec(FRAME, 75)
    data = jpeg(24, 40, *flags)
    pixels = codec.decode(data)
    assert pixels.shape == (1, 24, 40, 3)
    # The features are the pixels as sent: an EXIF that asks for a turn is not followed.
    for orientation in range(1, 9):
        np.testing.assert_array_equal(codec.decode(with_exif(data, orientation)), pixels)


@settings(max_examples=500)
@given(st.binary(max_size=60), st.integers(0, 700))
def test_the_size_of_anything_else_is_none_or_two_numbers(data: bytes, length: int) -> None:
    for candidate in (data, b"\xff\xd8\xff" + data, jpeg(9, 9)[:length], jpeg(9, 9)[:length] + data):
        size = jpeg_size(candidate)
        assert size is None or all(0 <= side <= 0xFFFF for side in size)
