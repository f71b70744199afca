from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from export.frames import COPIES, ROLES, FrameSource, copies, fingerprint, load_frames
from runtime.errors import BundleError
from runtime.manifest import PreprocessSpec

SPEC = PreprocessSpec(height=16, width=16)


def test_roles_never_overlap_and_use_every_frame(photos: Path, clip: Path) -> None:
    frames = load_frames([FrameSource(photos), FrameSource(clip)], SPEC, 200, seed=3)
    used = np.concatenate([frames.roles[role] for role in ROLES])
    assert sorted(used) == list(range(110))
    assert [len(frames.roles[role]) for role in ROLES] == [36 + 30, 12 + 10, 12 + 10]


def test_a_clip_is_parted_in_blocks_of_time(clip: Path) -> None:
    frames = load_frames([FrameSource(clip)], SPEC, 100, seed=3)
    assert [(int(rows.min()), int(rows.max())) for rows in frames.roles.values()] == [(0, 29), (30, 39), (40, 49)]
    # Neighbours in time are held out together.
    assert len(set(frames.groups[frames.roles["fit"]])) == 5


def test_a_stretch_of_a_clip(clip: Path) -> None:
    whole = load_frames([FrameSource(clip)], SPEC, 100, seed=0)
    part = load_frames([FrameSource(clip, first_frame=10, count=25)], SPEC, 100, seed=0)
    assert np.array_equal(part.pixels, whole.pixels[10:35])


def test_photos_are_parted_by_the_seed(photos: Path) -> None:
    one, again, other = (load_frames([FrameSource(photos)], SPEC, 100, seed) for seed in (1, 1, 2))
    assert all(np.array_equal(one.roles[role], again.roles[role]) for role in ROLES)
    assert not np.array_equal(one.roles["fit"], other.roles["fit"])
    assert one.sha256 == again.sha256


def test_the_calibration_list_names_the_frames_that_decide_and_no_judge(photos: Path) -> None:
    frames = load_frames([FrameSource(photos)], SPEC, 100, seed=0)
    listed = set(frames.calibration().split())
    assert {fingerprint(frame) for frame in (*frames.of("fit"), *frames.of("threshold"))} == listed
    assert not listed & {fingerprint(frame) for frame in frames.of("judge")}
    assert len(listed) == 48


def test_a_limit_spreads_over_the_whole_source(clip: Path) -> None:
    frames = load_frames([FrameSource(clip)], SPEC, 20, seed=0)
    whole = load_frames([FrameSource(clip)], SPEC, 100, seed=0)
    assert len(frames.pixels) == 20
    assert np.array_equal(frames.pixels[0], whole.pixels[0])
    assert frames.pixels[-1].mean() > whole.pixels[44].mean()


def test_copies_start_with_the_frame_itself(photos: Path) -> None:
    frame = load_frames([FrameSource(photos)], SPEC, 100, seed=0).of("fit")[0]
    made = list(copies(frame, np.random.default_rng(0)))
    assert len(made) == COPIES
    assert np.array_equal(made[0], frame)
    assert np.array_equal(made[1], frame[:, :, ::-1])
    assert all(copy.shape == frame.shape and copy.dtype == np.uint8 for copy in made)


@pytest.mark.parametrize(
    ("name", "words"), [("nowhere", "does not exist"), ("empty", "no images"), ("few", "only 3 frames")]
)
def test_bad_frames_give_one_sentence(name: str, words: str, photos: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "few").mkdir()
    for path in sorted(photos.iterdir())[:3]:
        (tmp_path / "few" / path.name).write_bytes(path.read_bytes())
    with pytest.raises(BundleError, match=words):
        load_frames([FrameSource(tmp_path / name)], SPEC, 100, seed=0)


def test_a_damaged_photo_is_named(photos: Path, tmp_path: Path) -> None:
    (tmp_path / "x.png").write_bytes(b"no picture")
    with pytest.raises(BundleError, match=r"--frames .*x\.png cannot be read"):
        load_frames([FrameSource(tmp_path)], SPEC, 100, seed=0)
