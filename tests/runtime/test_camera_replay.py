from __future__ import annotations

import threading
import time
from pathlib import Path

import cv2
import numpy as np
import pytest

from runtime.camera_replay import ReplayCamera
from runtime.config import CameraConfig
from runtime.datatypes import Frame
from runtime.errors import CameraError

FPS = 20


@pytest.fixture
def clip(tmp_path: Path) -> Path:
    """Thirty frames that grow brighter."""
    path = tmp_path / "clip.mp4"
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"mp4v"), FPS, (64, 48))
    for level in range(30):
        writer.write(np.full((48, 64, 3), level * 8, np.uint8))
    writer.release()
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "photos"
    path.mkdir()
    for number, suffix in enumerate(["bmp", "jpg", "png", "webp", "jpeg"]):
        pixels = np.zeros((20 + number, 30, 3), np.uint8)
        pixels[..., 2] = 200  # red, in OpenCV's order
        assert cv2.imwrite(str(path / f"{number}.{suffix}"), pixels)
    (path / "notes.txt").write_text("not an image")
    return path


def replay(source: Path, **settings: object) -> list[Frame]:
    config = CameraConfig(kind="replay", source=str(source), **({"realtime": False} | settings))  # type: ignore[arg-type]
    return list(ReplayCamera("cam0", config).frames())


def test_a_clip_gives_every_frame_in_order_as_rgb(clip: Path) -> None:
    frames = replay(clip)
    assert [frame.index for frame in frames] == list(range(30))
    levels = [int(frame.pixels.mean()) for frame in frames]
    assert levels == sorted(levels)
    assert all(abs(level - index * 8) < 8 for index, level in enumerate(levels))
    assert {frame.pixels.shape for frame in frames} == {(48, 64, 3)}
    assert {frame.camera for frame in frames} == {"cam0"}


def test_frames_own_their_pixels(clip: Path) -> None:
    frames = replay(clip, frames=3)
    assert all(frame.pixels.flags.owndata and frame.pixels.flags.c_contiguous for frame in frames)
    assert not np.shares_memory(frames[0].pixels, frames[1].pixels)


def test_a_folder_gives_its_images_by_name(folder: Path) -> None:
    frames = replay(folder)
    assert [frame.pixels.shape[0] for frame in frames] == [20, 21, 22, 23, 24]
    assert all(frame.pixels[..., 0].mean() > 190 and frame.pixels[..., 2].mean() < 10 for frame in frames)


def test_first_frame_and_frames_choose_a_piece(clip: Path, folder: Path) -> None:
    assert [frame.index for frame in replay(clip, first_frame=5, frames=4)] == [5, 6, 7, 8]
    assert [frame.index for frame in replay(folder, first_frame=3, frames=9)] == [3, 4]


def test_a_loop_goes_on_counting(clip: Path) -> None:
    frames = replay(clip, first_frame=20, loop=True, frames=25)
    assert [frame.index for frame in frames] == list(range(20, 45))
    assert np.array_equal(frames[0].pixels, frames[10].pixels)


def test_realtime_keeps_the_clips_pace(clip: Path) -> None:
    start_ns = time.monotonic_ns()
    frames = replay(clip, realtime=True, frames=11)
    assert time.monotonic_ns() - start_ns >= 10e9 / FPS
    stamps = [frame.captured_ns for frame in frames]
    assert stamps == sorted(stamps)
    assert start_ns < stamps[0]
    assert (stamps[-1] - stamps[0]) / 1e9 >= 0.9 * 10 / FPS
    assert np.median(np.diff(stamps)) / 1e9 == pytest.approx(1 / FPS, rel=0.3)


def test_max_fps_leaves_frames_out(clip: Path) -> None:
    assert [frame.index for frame in replay(clip, realtime=True, max_fps=FPS / 4, frames=3)] == [0, 4, 8]


def test_max_fps_is_the_pace_of_a_folder(folder: Path) -> None:
    start = time.monotonic()
    frames = replay(folder, realtime=True, max_fps=20)
    assert time.monotonic() - start >= 4 / 20
    assert [frame.index for frame in frames] == [0, 1, 2, 3, 4]
    assert np.median(np.diff([frame.captured_ns for frame in frames])) / 1e9 == pytest.approx(1 / 20, rel=0.3)


def test_close_ends_a_wait(folder: Path) -> None:
    camera = ReplayCamera("cam0", CameraConfig(kind="replay", source=str(folder), max_fps=0.01))
    frames = camera.frames()
    next(frames)
    threading.Timer(0.1, camera.close).start()
    start = time.monotonic()
    assert list(frames) == []
    assert time.monotonic() - start < 5


def test_what_cannot_be_replayed_is_named(tmp_path: Path, clip: Path, folder: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    text = tmp_path / "text.mp4"
    text.write_text("not a video")
    for source, words in [
        (tmp_path / "missing.mp4", "does not exist"),
        (empty, "holds no images"),
        (text, "cannot be read as a video"),
    ]:
        with pytest.raises(CameraError, match=words) as caught:
            replay(source)
        assert str(source) in str(caught.value)
        assert "\n" not in str(caught.value)
    with pytest.raises(CameraError, match="no frame 30"):
        replay(clip, first_frame=30)
    with pytest.raises(CameraError, match="no frame 5"):
        replay(folder, first_frame=5)


def test_a_damaged_image_is_named(folder: Path) -> None:
    (folder / "2.png").write_bytes(b"\x89PNG damaged")
    with pytest.raises(CameraError, match=r"2\.png cannot be read as an image"):
        replay(folder)


def test_a_stall_gives_no_frame_for_a_while(clip: Path) -> None:
    stalls = ((4 / FPS, 3 / FPS), (8 / FPS, 1 / FPS))
    assert [frame.index for frame in replay(clip, realtime=True, stalls=stalls, frames=6)] == [0, 1, 2, 3, 7, 9]
    with_fewer = replay(clip, realtime=True, stalls=stalls, max_fps=FPS / 2, frames=3)
    assert [frame.index for frame in with_fewer] == [0, 2, 10]
