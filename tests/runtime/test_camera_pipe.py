"""The contract with programs that write raw frames: stand-ins emit the byte streams that the real ones do."""

from __future__ import annotations

import itertools
import os
import shlex
import shutil
import sys
import threading
import time
from pathlib import Path

import cv2
import numpy as np
import psutil
import pytest
from numpy.typing import NDArray

from runtime.camera import open_camera
from runtime.camera_pipe import PipeCamera
from runtime.config import CameraConfig, PixelFormat
from runtime.datatypes import Frame, Pixels
from runtime.errors import CameraError, ConfigError

WIDTH, HEIGHT = 64, 48


def picture() -> Pixels:
    """Four fields: red, green, blue and a grey, each larger than any filter."""
    pixels = np.empty((HEIGHT, WIDTH, 3), np.uint8)
    half_height, half_width = HEIGHT // 2, WIDTH // 2
    pixels[:half_height, :half_width] = (200, 40, 40)
    pixels[:half_height, half_width:] = (40, 180, 40)
    pixels[half_height:, :half_width] = (40, 40, 220)
    pixels[half_height:, half_width:] = (120, 120, 120)
    return pixels


def planes(pixels: Pixels, *, full: bool) -> tuple[NDArray[np.uint8], NDArray[np.uint8], NDArray[np.uint8]]:
    """Y, U and V of BT.601, chroma halved, by the standard's own equations; `full`: as in JPEG, 0 to 255."""
    red, green, blue = (pixels[..., channel].astype(np.float64) for channel in range(3))
    luma = 0.299 * red + 0.587 * green + 0.114 * blue
    chroma_u, chroma_v = (blue - luma) / 1.772, (red - luma) / 1.402
    if full:
        scaled = (luma, chroma_u + 128, chroma_v + 128)
    else:
        scaled = (16 + luma * 219 / 255, 128 + chroma_u * 224 / 255, 128 + chroma_v * 224 / 255)
    rounded = [np.clip(np.rint(plane), 0, 255).astype(np.uint8) for plane in scaled]
    return rounded[0], rounded[1][::2, ::2], rounded[2][::2, ::2]


def written(pixels: Pixels, layout: PixelFormat) -> bytes:
    """A frame as programs write it in this format."""
    if layout == "nv12":
        luma, chroma_u, chroma_v = planes(pixels, full=False)
        return luma.tobytes() + np.stack([chroma_u, chroma_v], axis=-1).tobytes()
    if layout in ("i420", "i420-full"):
        return b"".join(plane.tobytes() for plane in planes(pixels, full=layout == "i420-full"))
    if layout == "gray8":
        return planes(pixels, full=True)[0].tobytes()
    if layout == "bgrx":
        return np.dstack([pixels[..., ::-1], np.zeros(pixels.shape[:2], np.uint8)]).tobytes()
    return (pixels if layout == "rgb" else pixels[..., ::-1]).tobytes()


def stand_in(tmp_path: Path, frame: bytes, *, frames: int = 10**9, then: str = "", pause_s: float = 0.01) -> str:
    """A command that writes `frame` again and again, its first four bytes counting where the frame is no picture."""
    (tmp_path / "frame.raw").write_bytes(frame)
    program = tmp_path / "stand_in.py"
    program.write_text(
        "import os, sys, time\n"
        f"frame = open({str(tmp_path / 'frame.raw')!r}, 'rb').read()\n"
        "print('[0:01:02.3] INFO Camera camera_manager.cpp:327 libcamera v0.5', file=sys.stderr, flush=True)\n"
        f"for _ in range({frames}):\n"
        f"    sys.stdout.buffer.write(frame); sys.stdout.flush(); time.sleep({pause_s})\n"
        f"{then}\n"
    )
    return f"{shlex.quote(sys.executable)} {shlex.quote(str(program))}"


def camera(source: str, layout: PixelFormat = "rgb", **settings: float) -> PipeCamera:
    return PipeCamera(
        "porch",
        CameraConfig(kind="pipe", source=source, width=WIDTH, height=HEIGHT, format=layout, **settings),  # type: ignore[arg-type]
    )


@pytest.mark.parametrize("layout", ["i420", "i420-full", "nv12", "rgb", "bgr", "bgrx", "gray8"])
def test_every_format_becomes_the_same_picture(layout: PixelFormat, tmp_path: Path) -> None:
    frames = camera(stand_in(tmp_path, written(picture(), layout)), layout).frames()
    before_ns = time.monotonic_ns()
    taken = list(itertools.islice(frames, 3))
    expected = picture() if layout != "gray8" else np.repeat(planes(picture(), full=True)[0][..., None], 3, axis=2)
    for frame in taken:
        # The edges of fields are where halved chroma and its interpolation may differ.
        inner = np.abs(frame.pixels.astype(int) - expected)[4:-4, 4:-4]
        assert int(np.median(inner)) <= 2
        assert [int(frame.pixels[y, x, 0]) for y, x in ((8, 8), (8, 56))] == pytest.approx(
            [int(expected[y, x, 0]) for y, x in ((8, 8), (8, 56))], abs=3
        )
        assert before_ns < frame.captured_ns <= time.monotonic_ns()
    assert [frame.index for frame in taken] == [0, 1, 2]
    assert taken[0].pixels is not taken[1].pixels


def test_frames_never_slip_against_each_other(tmp_path: Path) -> None:
    """However the pipe cuts the stream, each frame is one frame; 50 of them, each of its own grey."""
    program = tmp_path / "greys.py"
    program.write_text(
        "import os, sys\n"
        f"data = b''.join(bytes([n]) * {WIDTH * HEIGHT * 3} for n in range(50))\n"
        "for start in range(0, len(data), 7919):\n"
        "    sys.stdout.buffer.write(data[start : start + 7919]); sys.stdout.flush()\n"
    )
    frames = camera(f"{sys.executable} {program}").frames()
    taken = list(itertools.islice(frames, 50))
    assert [int(frame.pixels[0, 0, 0]) for frame in taken] == list(range(50))
    assert all(np.ptp(frame.pixels) == 0 for frame in taken)
    with pytest.raises(CameraError, match=r"ended \(exit code 0\)"):
        next(frames)


def test_a_program_that_falls_silent_is_ended_with_all_it_started(tmp_path: Path) -> None:
    frame = written(picture(), "rgb")
    source = stand_in(tmp_path, frame + frame[:100], frames=1, then="time.sleep(600)")
    script = tmp_path / "wrapped.sh"
    script.write_text(f"trap '' TERM\n{source} &\nwait\nsleep 600\n")
    frames = camera(f"sh {script}", read_timeout_s=0.5).frames()
    next(frames)
    started = psutil.Process().children(recursive=True)
    assert len(started) >= 2
    with pytest.raises(CameraError, match=r"wrote no whole frame for 0.5 s") as caught:
        next(frames)
    assert caught.value.reason == "silent"
    _, alive = psutil.wait_procs(started, 5)
    assert not [process for process in alive if process.status() != psutil.STATUS_ZOMBIE]


def test_a_program_that_ends_is_named_with_its_last_words_but_no_password(tmp_path: Path) -> None:
    words = "print('ERROR: *** rtsp://user:secret@cam/live no cameras available ***', file=sys.stderr); sys.exit(255)"
    source = stand_in(tmp_path, written(picture(), "rgb"), frames=1, then=words)
    with pytest.raises(CameraError, match=r"exit code 255\): .*no cameras available") as caught:
        list(camera(source).frames())
    assert "secret" not in str(caught.value)


def test_a_program_that_is_not_installed_is_named() -> None:
    with pytest.raises(CameraError, match="no-such-program cannot be started: No such file") as caught:
        next(camera("no-such-program --width 64").frames())
    assert caught.value.reason == "open"


def test_a_talkative_program_does_not_wait_for_us(tmp_path: Path) -> None:
    source = stand_in(tmp_path, written(picture(), "rgb"), frames=3, then="sys.stderr.write('x' * 10**6 + '\\nlast')")
    taken: list[Frame] = []
    with pytest.raises(CameraError, match="last"):
        taken.extend(camera(source, read_timeout_s=20).frames())
    source = stand_in(
        tmp_path,
        b"",
        frames=1,
        then="sys.stderr.write('x' * 10**6)\nwhile 1: sys.stdout.buffer.write(bytes(9216))",
    )
    assert len(list(itertools.islice(camera(source).frames(), 3))) == 3


def test_close_ends_it_at_once_and_nothing_is_left(tmp_path: Path) -> None:
    opened = len(list(Path("/proc/self/fd").iterdir()))
    for _ in range(3):
        source = stand_in(tmp_path, written(picture(), "rgb"), frames=2, then="time.sleep(600)")
        piped = camera(source, read_timeout_s=60)
        frames = piped.frames()
        next(frames)
        threading.Timer(0.2, piped.close).start()
        start_s = time.monotonic()
        assert len(list(frames)) <= 1
        assert time.monotonic() - start_s < 5
    assert len(list(Path("/proc/self/fd").iterdir())) == opened


def test_max_fps_leaves_frames_out(tmp_path: Path) -> None:
    source = stand_in(tmp_path, written(picture(), "rgb"), pause_s=0.01)
    taken = list(itertools.islice(camera(source, max_fps=10).frames(), 4))
    assert (taken[-1].captured_ns - taken[0].captured_ns) / 1e9 >= 2.4 / 10
    assert taken[-1].index > 6


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"source": "cat /dev/zero"}, "width and height: missing"),
        ({"source": "cat /dev/zero", "width": 62, "height": 48}, "62x48: a pipe's width must be a multiple of 8"),
        ({"source": "cat '/dev/zero", "width": 64, "height": 48}, "no closing quotation"),
        ({"width": 64, "height": 48}, "source must be a command"),
    ],
)
def test_what_no_retry_heals_is_refused_at_once(settings: dict[str, str | int], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        open_camera("porch", CameraConfig(kind="pipe", **settings))  # type: ignore[arg-type]


def test_rpicam_asks_for_what_it_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The stand-in checks its arguments as rpicam-vid would, and writes what `--codec yuv420` makes of a picture."""
    raw = tmp_path / "frame.raw"
    raw.write_bytes(written(picture(), "i420-full"))
    program = tmp_path / "rpicam-vid"
    program.write_text(
        f"#!{sys.executable}\n"
        "import argparse, sys, time\n"
        "parser = argparse.ArgumentParser(allow_abbrev=False)\n"
        "for name in ('width', 'height', 'timeout', 'camera'): parser.add_argument('--' + name, type=int)\n"
        "for name in ('nopreview', 'flush'): parser.add_argument('--' + name, action='store_true')\n"
        "parser.add_argument('--framerate', type=float); parser.add_argument('--codec')\n"
        "parser.add_argument('--output')\n"
        "asked = parser.parse_args()\n"
        f"wanted = dict(width={WIDTH}, height={HEIGHT}, timeout=0, camera=1, nopreview=True, flush=True)\n"
        "wanted.update(framerate=20.0, codec='yuv420', output='-')\n"
        "assert vars(asked) == wanted, vars(asked)\n"
        f"data = open({str(raw)!r}, 'rb').read()\n"
        "while True:\n"
        "    sys.stdout.buffer.write(data); sys.stdout.flush(); time.sleep(1 / asked.framerate)\n"
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    config = CameraConfig(kind="rpicam", source="1", width=WIDTH, height=HEIGHT, max_fps=20)
    made = open_camera("porch", config)
    frames = list(itertools.islice(made.frames(), 3))
    assert int(np.median(np.abs(frames[2].pixels.astype(int) - picture()))) <= 2
    made.close()
    for settings, words in (({"width": 650}, "multiple of 64"), ({"source": "/dev/video0"}, "the camera's number")):
        with pytest.raises(ConfigError, match=words):
            open_camera("porch", CameraConfig(kind="rpicam", **settings))


def test_the_full_range_is_kept(tmp_path: Path) -> None:
    """Black and white of JPEG's range stay black and white; read as TV's range they would clip from 16 and 235 on."""
    ramp = np.repeat(np.repeat(np.arange(0, 256, 4, dtype=np.uint8)[None, :, None], HEIGHT, 0), 3, 2)
    frame = next(camera(stand_in(tmp_path, written(ramp, "i420-full")), "i420-full").frames())
    assert int(np.abs(frame.pixels.astype(int) - ramp).max()) <= 2


@pytest.mark.skipif(shutil.which("gst-launch-1.0") is None, reason="GStreamer is not installed")
@pytest.mark.parametrize(("layout", "caps"), [("i420", "I420"), ("nv12", "NV12"), ("bgrx", "BGRx"), ("rgb", "RGB")])
def test_a_real_gstreamer_pipeline(layout: PixelFormat, caps: str) -> None:
    source = (
        "gst-launch-1.0 --quiet videotestsrc pattern=red ! "
        f"video/x-raw,format={caps},width={WIDTH},height={HEIGHT},framerate=30/1 ! fdsink fd=1"
    )
    piped = camera(source, layout)
    frames = list(itertools.islice(piped.frames(), 5))
    piped.close()
    centre = [frame.pixels[8:-8, 8:-8].reshape(-1, 3).mean(0) for frame in frames]
    for colour in centre:
        assert colour == pytest.approx([255, 0, 0], abs=6), cv2.__version__
