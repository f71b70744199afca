from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest

from export.draft import share_tiers
from export.pipeline import Exported, export
from export.prove import replay, run_whole
from export.recipe import Recipe, choose_cuts, open_model
from export.report import Report
from export.source import InputOptions
from runtime.bundle_tool import verify_bundle
from runtime.errors import BundleError
from runtime.manifest import load

SILENT = Report(silent=True)


def test_a_bundle_holds_what_was_proved(exported: Exported) -> None:
    manifest = exported.bundle.manifest
    assert [spec.cut for spec in manifest.exits] == [1, 2, 3]
    assert [cut.dtype for cut in manifest.cuts] == ["uint8", "uint8", "uint8", "float32"]
    assert [codec.name for codec in manifest.cuts[0].codecs] == ["raw", "jpeg"]
    assert manifest.proof["parity_max_difference"] == 0
    assert manifest.proof["parity_bit_identical_ratio"] == 1
    assert manifest.proof["logit_cosine"] > 0.98
    assert manifest.provenance.frames == {"fit": 36, "threshold": 12, "judge": 12}
    assert all(spec.max_batch_size == 8 for spec in manifest.segments)
    assert exported.bundle.labels == ("red", "green", "blue", "grey", "black", "white")
    assert verify_bundle(exported.bundle.path).bit_identical


def test_every_exit_was_judged_on_all_judge_frames(exported: Exported) -> None:
    for spec in exported.bundle.manifest.exits:
        assert spec.measured is not None
        assert spec.measured.n == 12
        assert spec.measured.coverage == pytest.approx(spec.measured.answered / 12, abs=1e-6)
    assert exported.bundle.manifest.exits[-1].measured.coverage == 1  # type: ignore[union-attr]


def test_no_path_of_this_machine_is_in_the_manifest(exported: Exported, net: str) -> None:
    text = (exported.bundle.path / "manifest.json").read_text()
    assert str(Path(net).parent) not in text
    assert str(exported.bundle.path.parent) not in text


def test_the_same_recipe_gives_the_same_bundle(exported: Exported, recipe: Recipe, tmp_path: Path) -> None:
    again = export(recipe, tmp_path / "again", SILENT)
    assert again.bundle.manifest == exported.bundle.manifest
    assert again.bundle.id == exported.bundle.id


def test_float_segments_give_the_whole_models_logits(recipe: Recipe, bundle_of: Callable[[Recipe], Exported]) -> None:
    made = bundle_of(replace(recipe, target=None))
    manifest = made.bundle.manifest
    assert manifest.proof["parity_max_difference"] <= 1e-5
    assert manifest.proof["logit_cosine"] == pytest.approx(1)
    assert [cut.dtype for cut in manifest.cuts] == ["uint8", "float32", "float32", "float32"]
    assert verify_bundle(made.bundle.path).bit_identical


def test_a_models_own_exits_are_kept(recipe: Recipe, net: str, bundle_of: Callable[[Recipe], Exported]) -> None:
    import torch

    own = replace(recipe, model=f"{net}:with_exits", target=None)
    opened = open_model(own.model, InputOptions(), SILENT)
    chosen = choose_cuts(opened, own)
    assert [cut.after for cut in chosen] == ["stage1 0", "Add"] or len(chosen) == 2
    made = bundle_of(own)
    golden = np.load(made.bundle.path / "golden/golden.npz")
    frame = golden["frames"][:1]
    seen = replay(made.bundle, [frame])
    namespace: dict[str, object] = {}
    exec(Path(net).read_text(), namespace)
    module = namespace["with_exits"]().eval()  # type: ignore[operator]
    pixels = torch.from_numpy((frame.astype(np.float32) / 255 - 0.5) / 0.5).permute(0, 3, 1, 2)
    with torch.no_grad():
        first, second, last = (logits.numpy() for logits in module(pixels))
    assert np.allclose(seen.exit_logits[1], first, atol=1e-4)
    assert np.allclose(seen.exit_logits[2], second, atol=1e-4)
    assert np.allclose(seen.features[-1][0], last, atol=1e-4)


def test_own_exits_hang_on_the_uint8_wire(recipe: Recipe, net: str, bundle_of: Callable[[Recipe], Exported]) -> None:
    made = bundle_of(replace(recipe, model=f"{net}:with_exits"))
    head = onnx.load(made.bundle.path / "exits/1.onnx")
    assert head.graph.input[0].type.tensor_type.elem_type == onnx.TensorProto.UINT8
    assert made.bundle.manifest.proof["parity_max_difference"] == 0


def test_a_final_softmax_is_removed(net: str) -> None:
    plain = open_model(f"{net}:plain", InputOptions(), SILENT).simplified
    softmax = open_model(
        f"{net}:softmax", InputOptions(size=(32, 32), mean=(0.5,) * 3, std=(0.5,) * 3), SILENT
    ).simplified
    assert "Softmax" not in [node.op_type for node in softmax.whole.graph.node]
    frame = np.random.default_rng(0).integers(0, 256, (1, 32, 32, 3), dtype=np.uint8)
    assert np.allclose(run_whole(plain.whole, [frame]), run_whole(softmax.whole, [frame]), atol=1e-5)


def test_a_bundle_below_its_tolerance_is_not_written(recipe: Recipe, tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"mean cosine of the logits 0\.9.* below 1; .*--float"):
        export(replace(recipe, min_likeness=1.0), tmp_path / "out", SILENT)
    assert list(tmp_path.iterdir()) == []


def test_what_is_there_is_replaced_only_when_told(exported: Exported, recipe: Recipe, tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"exists; give another --out, or --force"):
        export(recipe, exported.bundle.path, SILENT)
    (tmp_path / "precious.txt").write_text("mine")
    with pytest.raises(BundleError, match="no bundle"):
        export(recipe, tmp_path, SILENT, force=True)
    assert (tmp_path / "precious.txt").read_text() == "mine"


def test_times_lie_beside_the_contract(exported: Exported) -> None:
    assert (exported.bundle.path / "profile.json").is_file()
    assert "profile.json" not in {spec.path for spec in exported.bundle.manifest.files}
    before = exported.bundle.id
    assert load(exported.bundle.path).id == before


@pytest.mark.parametrize(
    ("names", "ends", "lasts"),
    [
        (("device", "edge", "cloud"), [0.3, 0.7], [0, 1, 2]),
        (("device", "edge", "cloud"), [0.5], [0, 1]),
        (("device", "edge"), [0.1, 0.4, 0.9], [1, 3]),
        (("device", "edge", "cloud"), [0.1, 0.2, 0.3, 0.35, 0.6, 0.9], [3, 4, 6]),
        (("device",), [0.3, 0.7], [2]),
        (("a", "b", "c"), [0.9, 0.95], [0, 1, 2]),
    ],
)
def test_segments_are_shared_evenly(names: tuple[str, ...], ends: list[float], lasts: list[int]) -> None:
    assert [tier.last_segment for tier in share_tiers(names, ends)] == lasts
