from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import onnx
import onnxruntime as ort
import pytest

from export.exits_judge import BINS, judge, see
from export.frames import FrameSource, load_frames
from export.pipeline import Exported, export
from export.prove import run_whole
from export.recipe import Recipe, open_model
from export.report import Report
from runtime import cascade
from runtime.datatypes import Features
from runtime.errors import BundleError
from runtime.policy import ExitPolicy
from runtime.segment import load_segments

SILENT = Report(silent=True)
TARGETS = [0.8, 0.9, 0.95, 0.98, 0.99]


@pytest.fixture(scope="module")
def many_photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 900 pictures that the small network answers differently, and whose classes are easy to tell early."""
    folder = tmp_path_factory.mktemp("many")
    generator = np.random.default_rng(5)
    for number in range(900):
        ground = cv2.resize(generator.integers(0, 256, (2, 2, 3), dtype=np.uint8), (32, 32))
        cv2.imwrite(str(folder / f"{number:04}.png"), ground)
    return folder


@pytest.fixture(scope="module")
def answering(recipe: Recipe, net: str, many_photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """A bundle with frames enough for its exits to answer."""
    many = replace(recipe, frames=(FrameSource(many_photos),), model=f"{net}:plain")
    return export(many, tmp_path_factory.mktemp("answering") / "many", SILENT)


def test_every_exit_has_a_row_for_every_agreement(answering: Exported) -> None:
    *early, last = answering.bundle.manifest.exits
    for spec in early:
        assert [point.agreement for point in spec.points] == TARGETS
        assert spec.points[0].threshold == spec.threshold
        assert spec.points[0].measured == spec.measured
        assert spec.macs > 0
        assert spec.distance_limit is not None
    assert last.points == ()
    assert any(spec.threshold is not None for spec in early), "900 frames are enough for one exit at least"
    for spec in early:
        assert (spec.note is None) == (spec.threshold is not None)


def test_the_promise_holds_on_the_judge_frames(answering: Exported) -> None:
    for spec in answering.bundle.manifest.exits[:-1]:
        for point in spec.points:
            if point.threshold is not None:
                assert point.measured is not None
                assert point.measured.answered > 0
                # Of each exit alone, and within what so few frames can tell.
                assert point.measured.agreement_high is not None
                assert point.measured.agreement_high >= point.agreement


def test_the_judge_says_what_the_cascade_does(answering: Exported, net: str, many_photos: Path) -> None:
    bundle = answering.bundle
    opened = open_model(f"{net}:plain", replace(Recipe("", ())).input, SILENT)
    frames = load_frames([FrameSource(many_photos)], bundle.manifest.preprocess, 120, seed=9)
    logits = run_whole(opened.simplified.trunk(), [frames.pixels[row : row + 1] for row in range(120)])
    labels = np.arange(120) % 6
    rows = judge(bundle, frames.pixels, logits, labels)
    assert [row.target for row in rows[::3]] == TARGETS
    tier = cascade.Tier(bundle, *load_segments(bundle, 0, 2))
    for target in TARGETS:
        policy = ExitPolicy.of(bundle, agreement=target)
        outcomes = [cascade.run([Features(0, frames.pixels[row : row + 1])], tier, policy)[0] for row in range(120)]
        for row in (row for row in rows if row.target == target):
            mine = [at for at, out in enumerate(outcomes) if out.answer is not None and out.answer.exit == row.cut]
            said = np.array([outcomes[at].answer.answer.label_index for at in mine], np.int64)  # type: ignore[union-attr]
            assert row.answered == len(mine)
            assert row.withheld == sum(row.cut in outcome.withheld for outcome in outcomes)
            assert sum(count for count, _ in row.histogram) == row.reached
            assert len(row.histogram) == BINS
            if mine:
                assert row.agreement == pytest.approx(np.mean(said == logits[mine].argmax(axis=1)))
                assert row.accuracy == pytest.approx(np.mean(said == labels[mine]))
            else:
                assert row.agreement is None
        assert sum(row.answered for row in rows if row.target == target) == 120


def test_frames_unlike_any_known_are_held_back(answering: Exported) -> None:
    bundle = answering.bundle
    generator = np.random.default_rng(0)
    noise = generator.integers(0, 2, (60, 32, 32, 3), dtype=np.uint8) * 255
    seen = see(bundle, noise)
    limits = [spec.distance_limit for spec in bundle.manifest.exits[:-1]]
    assert all((distance > limit).mean() > 0.9 for distance, limit in zip(seen.distance, limits, strict=False))


@pytest.mark.parametrize("target", [None, "x86-vnni"])
def test_own_exits_get_a_guard_beside_their_own_logits(
    recipe: Recipe, net: str, bundle_of: Callable[[Recipe], Exported], target: str | None
) -> None:
    made = bundle_of(replace(recipe, model=f"{net}:with_exits", target=target))
    for spec in made.bundle.manifest.exits[:-1]:
        assert spec.kind == "the model's own exit"
        assert spec.distance_limit is not None
        head = onnx.load(made.bundle.path / (spec.file or ""))
        assert [output.name for output in head.graph.output][1:] == ["distance"]


def test_own_exits_of_a_quantized_bundle_are_quantized_and_answer_as_the_float_ones(
    recipe: Recipe, net: str, bundle_of: Callable[[Recipe], Exported]
) -> None:
    opened = open_model(f"{net}:with_exits", replace(Recipe("", ())).input, SILENT)
    made = bundle_of(replace(recipe, model=f"{net}:with_exits", target="x86-vnni")).bundle
    frames = np.random.default_rng(0).integers(0, 256, (200, 32, 32, 3), dtype=np.uint8)
    whole = ort.InferenceSession(opened.simplified.whole.SerializeToString())
    seen = see(made, frames)
    for place, output in enumerate(opened.simplified.exits):
        head = onnx.load(made.path / (made.manifest.exits[place].file or ""))
        assert any(weight.data_type == onnx.TensorProto.INT8 for weight in head.graph.initializer)
        floating = whole.run([output], {whole.get_inputs()[0].name: frames})[0]
        assert (seen.answers[place] == floating.argmax(axis=1)).mean() > 0.9


@pytest.mark.parametrize("target", [None, "x86-vnni"])
def test_a_branch_is_the_trunks_next_layers_and_a_head(
    recipe: Recipe, bundle_of: Callable[[Recipe], Exported], target: str | None
) -> None:
    branch = replace(recipe, heads="branch", target=target, cuts=("1",))
    made = bundle_of(branch)
    spec = made.bundle.manifest.exits[0]
    assert "spreads behind" in spec.kind
    head = onnx.load(made.bundle.path / (spec.file or ""))
    assert any(node.op_type == "Conv" for node in head.graph.node)
    (linear, _) = bundle_of(replace(recipe, heads="linear", cuts=("1",))).bundle.manifest.exits
    assert linear.kind == "linear on means"
    assert spec.macs > linear.macs


def test_labels_give_accuracies_and_change_nothing_else(
    exported: Exported, recipe: Recipe, photos: Path, tmp_path: Path
) -> None:
    names = sorted(path.name for path in photos.iterdir())
    labels = tmp_path / "labels.csv"
    labels.write_text("".join(f"{name},{number % 6}\n" for number, name in enumerate(names)))
    made = export(replace(recipe, labels=labels), tmp_path / "labelled", SILENT).bundle.manifest
    plain = exported.bundle.manifest
    assert [spec.threshold for spec in made.exits] == [spec.threshold for spec in plain.exits]
    assert {key for key in made.proof if key not in plain.proof} == {
        f"{name}_accuracy{end}" for name in ("float", "whole") for end in ("", "_low", "_high")
    }
    last = made.exits[-1].measured
    assert last is not None
    assert last.accuracy == made.proof["whole_accuracy"]
    labels.write_text("a.png,0\n")
    with pytest.raises(BundleError, match=r"has no line for 000\.png and 59 other frames"):
        export(replace(recipe, labels=labels), tmp_path / "wrong", SILENT)
