"""The gate of a bundle: fitted where there is a clip and a detector, judged on held-back frames."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray

from export.frames import FrameSet, FrameSource, load_frames
from export.gate_stage import fit_gate
from export.report import Report
from runtime.gate_spec import GateSpec
from runtime.manifest import (
    FORMAT,
    Bundle,
    CutSpec,
    ExitSpec,
    Manifest,
    PreprocessSpec,
    Provenance,
    SegmentSpec,
    TierSpec,
)

SIDE = 64
FPS = 10.0


def bundle(task: str) -> Bundle:
    """A bundle as far as it is made when the gate is fitted."""
    made = Manifest(
        format=FORMAT,
        name="visitor",
        task=task,
        labels="labels.txt",
        preprocess=square(),
        segments=(SegmentSpec(file="segments/0.onnx", macs=1),),
        cuts=(
            CutSpec(after="the camera", tensor="frame", shape=(SIDE, SIDE, 3), dtype="uint8"),
            CutSpec(after="the last layer", tensor="out", shape=(2, 6), dtype="float32"),
        ),
        exits=(ExitSpec(cut=1, file=None, temperature=1.0, threshold=0.0, agreement=1.0),),
        tiers=(TierSpec(name="device", last_segment=0),),
        golden="golden/golden.npz",
        proof={},
        provenance=Provenance(
            source="", tools={}, target="any", quantization="", opset=17, seed=0, frames={}, frames_sha256=""
        ),
        files=(),
    )
    return Bundle(Path(), made, "0" * 64, ("visitor",))


def square() -> PreprocessSpec:
    return PreprocessSpec(height=SIDE, width=SIDE, fit="stretch")


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A visitor who comes and goes, in 600 frames."""
    path = tmp_path_factory.mktemp("clip") / "visitor.mkv"
    sink = cv2.VideoWriter(str(path), cv2.CAP_FFMPEG, cv2.VideoWriter.fourcc(*"FFV1"), FPS, (SIDE, SIDE))
    generator = np.random.default_rng(0)
    for number in range(600):
        picture = generator.integers(90, 111, (SIDE, SIDE, 3))
        if number % 40 >= 20:
            left = 2 * (number % 40 - 20)
            picture[16:48, left : left + 12] = 220
        sink.write(picture.astype(np.uint8))
    sink.release()
    return path


def answers(frames: FrameSet) -> NDArray[np.float32]:
    """What a perfect detector says, read off the pixels: (frames, 2, 6)."""
    rows = np.zeros((len(frames.pixels), 2, 6), np.float32)
    for place, pixels in enumerate(frames.pixels):
        columns = np.flatnonzero(pixels[16:48].mean(axis=(0, 2)) > 160)
        if len(columns):
            rows[place, 0] = (columns[0] / SIDE, 0.25, (columns[-1] + 1) / SIDE, 0.75, 0.9, 0)
    return rows


def fitted(source: FrameSource, *, task: str = "detect", most: int = 2000) -> GateSpec | None:
    frames = load_frames([source], square(), most, 0)
    return fit_gate(bundle(task), [source.path], frames, answers(frames), Report())


def test_a_clip_gives_a_gate_that_keeps_its_promise_on_held_back_frames(
    clip: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spec = fitted(FrameSource(clip))
    assert spec is not None
    assert spec.threshold is not None
    assert spec.fitted_on > spec.judged_on > 60
    assert spec.judged_repeated is not None
    assert spec.judged_repeated > 0.4
    assert spec.judged_agreement is not None
    assert spec.judged_agreement >= spec.kept
    assert "held-back" in capsys.readouterr().err


def test_every_other_frame_is_half_the_pace(clip: Path) -> None:
    spec = fitted(FrameSource(clip), most=300)
    assert spec is not None
    assert spec.fitted_on < 300
    assert spec.threshold is not None


def test_too_short_a_clip_gives_none_and_says_why(clip: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spec = fitted(FrameSource(clip, count=40))
    assert spec is not None
    assert spec.threshold is None
    assert "clip" in str(spec.note)
    assert str(spec.note) in capsys.readouterr().err


def test_a_classifier_gets_none(clip: Path) -> None:
    assert fitted(FrameSource(clip, count=40), task="classify") is None


def test_frames_know_their_place_in_their_source(clip: Path, tmp_path: Path) -> None:
    cv2.imwrite(str(tmp_path / "one.png"), np.zeros((SIDE, SIDE, 3), np.uint8))
    sources = [FrameSource(clip, first_frame=100, count=40), FrameSource(tmp_path)]
    frames = load_frames(sources, square(), 40, 0)
    assert frames.places[:20].tolist() == [[0, place] for place in range(0, 40, 2)]
    assert frames.places[20:].tolist() == [[1, 0]]
