from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest

from runtime.datatypes import Pixels
from runtime.demo_clips import Window, cut_out, fetch_street, fetch_traffic
from runtime.errors import CameraError


def read(path: Path) -> list[Pixels]:
    source = cv2.VideoCapture(str(path), cv2.CAP_FFMPEG)
    frames: list[Pixels] = []
    while True:
        given, pixels = source.read()
        if not given:
            return frames
        frames.append(np.asarray(pixels, np.uint8))


@pytest.fixture
def clip(tmp_path: Path) -> Path:
    path = tmp_path / "clip.avi"
    sink = cv2.VideoWriter(str(path), cv2.CAP_FFMPEG, cv2.VideoWriter.fourcc(*"MJPG"), 10, (64, 48))
    generator = np.random.default_rng(0)
    for _ in range(12):
        sink.write(cv2.resize(generator.integers(0, 256, (6, 8, 3), dtype=np.uint8), (64, 48)))
    sink.release()
    return path


def test_a_window_is_cut_out_without_loss_and_once(clip: Path, tmp_path: Path) -> None:
    made = cut_out(clip, Window(8, 4, 32, 24), 3, 5, tmp_path)
    expected = [pixels[4:28, 8:40] for pixels in read(clip)[3:8]]
    assert [found.shape for found in read(made)] == [(24, 32, 3)] * 5
    assert all(map(np.array_equal, read(made), expected))
    written = made.stat().st_mtime_ns
    assert cut_out(clip, Window(8, 4, 32, 24), 3, 5, tmp_path) == made
    assert made.stat().st_mtime_ns == written
    assert len(read(cut_out(clip, Window(8, 4, 32, 24), 10, None, tmp_path))) == 2


def test_a_clip_that_cannot_be_read_is_told(tmp_path: Path) -> None:
    (tmp_path / "clip.avi").write_bytes(b"no video")
    with pytest.raises(CameraError, match="could not be cut out of"):
        cut_out(tmp_path / "clip.avi", Window(0, 0, 32, 24), 0, None, tmp_path)
    assert not list(tmp_path.glob("*.mkv"))


def test_another_file_in_its_place_is_not_taken_for_the_clip(tmp_path: Path) -> None:
    for name, fetch in (("vtest.avi", fetch_street), ("bikes.mp4", fetch_traffic)):
        (tmp_path / name).write_bytes(b"another")
        with pytest.raises(CameraError, match="is not the clip it should be; delete it"):
            fetch(tmp_path)
