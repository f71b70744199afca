"""The CIFAR-10 scripts, as far as they go without the data set."""

from __future__ import annotations

import gzip
import sys
from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch

from export.frames import FrameSource
from export.pipeline import Exported, export
from export.recipe import Recipe, open_model
from export.report import Report
from export.source import InputOptions
from runtime.errors import BundleError
from runtime.policy import ExitPolicy

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))

import cifar_judging
import cifar_network
import cifar_training

SILENT = Report(silent=True)
MODEL = f"{cifar_network.__file__}:factory"


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights of the network before any training."""
    path = tmp_path_factory.mktemp("weights") / "weights.pt"
    torch.manual_seed(3)
    torch.save(cifar_network.CifarNetwork().state_dict(), path)
    return path


@pytest.fixture(scope="module")
def made(weights: Path, photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """A float bundle of that network."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(cifar_network.WEIGHTS, str(weights))
        recipe = Recipe(model=MODEL, frames=(FrameSource(photos),), target=None, agreement=0.5)
        return export(recipe, tmp_path_factory.mktemp("cifar") / "bundle", SILENT)


def test_its_own_exits_are_kept_early_and_cheap(made: Exported) -> None:
    manifest = made.bundle.manifest
    assert [spec.cut for spec in manifest.exits] == [1, 2, 3]
    assert [spec.shape for spec in manifest.cuts] == [(32, 32, 3), (16, 16, 48), (8, 8, 128), (10,)]
    ends = np.cumsum([segment.macs for segment in manifest.segments])
    assert 0.15 < ends[0] / ends[2] < 0.25
    assert 0.45 < ends[1] / ends[2] < 0.55
    # By hand: 3x3 convolutions of stride 2 from 16 to 8 to 4 pixels, then 128 to 10; the guards add a little.
    heads = np.array([spec.macs for spec in manifest.exits[:2]])
    assert heads == pytest.approx([9 * 48 * 96 * 64 + 9 * 96 * 128 * 16 + 1280, 9 * 128 * 192 * 16 + 1920], rel=0.01)


def test_without_weights_the_user_is_told_how_to_get_them(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(cifar_network.WEIGHTS, str(tmp_path / "none.pt"))
    with pytest.raises(BundleError, match="bench_cifar train"):
        open_model(MODEL, InputOptions(), SILENT)


def test_answers_come_from_the_exit_whose_logits_give_them(made: Exported, weights: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (12, 32, 32, 3), dtype=np.uint8)
    network = cifar_network.CifarNetwork()
    network.load_state_dict(torch.load(weights, weights_only=True))
    mean, std = torch.tensor(network.mean), torch.tensor(network.std)
    pixels = ((torch.from_numpy(images) / 255 - mean) / std).permute(0, 3, 1, 2)
    with torch.inference_mode():
        logits = network.eval()(pixels.float())
    tier = cifar_judging.whole_tier(made.bundle)
    answers = cifar_judging.run(tier, images, ExitPolicy.of(made.bundle, early=False))
    assert set(answers.exits) == {3}
    assert answers.classes.tolist() == logits[2].argmax(1).tolist()
    judged = cifar_judging.judge("noise", tier, images, answers.classes, None)
    assert judged.rows[-1].agreement is not None
    assert judged.rows[-1].answered == judged.n == 12
    assert judged.unguarded.answered >= judged.rows[-2].answered
    assert judged.rows[0].accuracy is None


def test_a_judgement_counts_by_exit_and_charges_the_heads_that_were_asked(made: Exported) -> None:
    exits = tuple(msgspec.structs.replace(spec, threshold=0.5) for spec in made.bundle.manifest.exits)
    manifest = msgspec.structs.replace(made.bundle.manifest, exits=exits)
    bundle = replace(made.bundle, manifest=manifest)
    answers = cifar_judging.Answers(np.array([1, 1, 2, 3]), np.array([0, 1, 2, 3]), np.eye(4, dtype=np.int64))
    rows = cifar_judging.rows(bundle, answers, np.array([0, 9, 2, 3]), np.array([0, 1, 2, 9]))
    first, second, last, _, early, everything = rows
    assert (first.answered, first.coverage, first.agreement, first.accuracy) == (2, 0.5, 0.5, 1.0)
    assert (second.agreement, last.accuracy, last.whole_accuracy) == (1.0, 0.0, 0.0)
    assert (early.together, early.answered, everything.answered) == (True, 3, 4)
    assert (first.withheld, last.withheld) == (1, 1)
    assert everything.agreement == 0.75
    one, two, three = (segment.macs for segment in manifest.segments)
    spent = 4 * (one + exits[0].macs) + 2 * (two + exits[1].macs) + three
    assert cifar_judging.saved(bundle, answers) == pytest.approx(1 - spent / (4 * (one + two + three)))


def test_shifts_keep_the_form_and_grow() -> None:
    images = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), dtype=np.uint8)
    made = dict(cifar_judging.shifts(images, 0))
    assert all(shifted.shape == images.shape and shifted.dtype == np.uint8 for shifted in made.values())
    away = [float(np.abs(shifted.astype(float) - images).mean()) for shifted in made.values()]
    assert away[:3] == sorted(away[:3])
    assert away[3:6] == sorted(away[3:6])
    assert np.array_equal(made["upside down"][0, 0, 0], images[0, -1, -1])
    again = dict(cifar_judging.shifts(images, 0))
    assert all(np.array_equal(again[words], shifted) for words, shifted in made.items())


def test_grey_images_of_an_idx_file_become_colour(tmp_path: Path) -> None:
    grey = np.arange(2 * 28 * 28, dtype=np.uint32).astype(np.uint8).reshape(2, 28, 28)
    path = tmp_path / "images.gz"
    path.write_bytes(gzip.compress(np.array([2051, 2, 28, 28], ">u4").tobytes() + grey.tobytes()))
    read = cifar_judging.others(path, 5)
    assert read.shape == (2, 32, 32, 3)
    assert np.array_equal(read[..., 0], read[..., 2])
    labels = tmp_path / "labels.gz"
    labels.write_bytes(gzip.compress(np.array([2049, 2, 1, 1], ">u4").tobytes() + b"ab"))
    with pytest.raises(BundleError, match="images-idx3"):
        cifar_judging.others(labels, 5)


def test_augmentation_shifts_mirrors_and_cuts_one_square() -> None:
    columns = np.broadcast_to(np.arange(32, dtype=np.uint8)[None, None, :, None] * 4, (64, 32, 32, 3))
    made = cifar_training.augment(columns, np.random.default_rng(0), 32)
    hole = np.array([round(255 * value) for value in cifar_network.CifarNetwork.mean])
    holes = (made == hole).all(axis=3).sum(axis=(1, 2))
    assert set(holes) == {cifar_training.HOLE**2}
    rows = made[:, :, :, 0].max(axis=1)  # without the hole, every row of an image is the same ramp
    assert made.shape == (64, 32, 32, 3)
    assert len({row.tobytes() for row in rows}) > 8
    assert cifar_training.augment(columns, np.random.default_rng(0), 24).shape == (64, 24, 24, 3)
