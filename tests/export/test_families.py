"""Every family of networks from a local directory with random weights: the segments give the whole model's answer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from export.cuts import default_cuts
from export.frames import FrameSource, load_frames
from export.graph import FRAME
from export.prove import largest_batch, run_whole
from export.quantize import quantize
from export.recipe import open_model
from export.report import Report
from export.slicing import Chain, slice_float, slice_quantized
from export.source import InputOptions
from export.wires import channel_ranges
from runtime.errors import BundleError
from runtime.segment_onnx import session_options

TOKENS = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 64}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "vit": ("ViT", {**TOKENS, "image_size": 32, "patch_size": 8}),
    "deit": ("DeiT", {**TOKENS, "image_size": 32, "patch_size": 8}),
    "resnet": ("ResNet", {"embedding_size": 16, "hidden_sizes": [16, 32, 48], "depths": [1, 1, 1]}),
    "mobilenet_v2": ("MobileNetV2", {"depth_multiplier": 0.35, "image_size": 64}),
    "convnext": ("ConvNext", {"hidden_sizes": [16, 24, 32, 48], "depths": [1, 1, 2, 1], "image_size": 64}),
    "swin": ("Swin", {"image_size": 64, "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4}),
    "mobilevit": (
        "MobileViT",
        {"image_size": 64, "hidden_sizes": [24, 32, 40], "neck_hidden_sizes": [8, 12, 16, 20, 24, 28, 64]},
    ),
}
PREPROCESSOR = {
    "size": {"shortest_edge": 72},
    "do_center_crop": True,
    "crop_size": {"height": 64, "width": 64},
    "image_mean": [0.485, 0.456, 0.406],
    "image_std": [0.229, 0.224, 0.225],
}


@pytest.fixture(scope="module")
def model_directory(tmp_path_factory: pytest.TempPathFactory) -> Any:
    def make(family: str) -> Path:
        stem, settings = FAMILIES[family]
        directory = tmp_path_factory.mktemp("hub") / family
        torch.manual_seed(0)
        config = getattr(transformers, f"{stem}Config")(num_labels=7, **settings)
        model = getattr(transformers, f"{stem}ForImageClassification")(config)
        # The library's own random weights are so small that a deep network's logits vanish.
        for module in model.modules():
            if isinstance(module, (torch.nn.Conv2d, torch.nn.Linear)):
                torch.nn.init.kaiming_normal_(module.weight)
        model.save_pretrained(directory)
        if family not in ("vit", "deit"):
            (directory / "preprocessor_config.json").write_text(json.dumps(PREPROCESSOR))
        return directory

    return make


def compose(chain: Chain, frames: list[Any]) -> Any:
    import onnxruntime as ort

    sessions = [ort.InferenceSession(model.SerializeToString(), session_options(1)) for model in chain.segments]
    rows = []
    for frame in frames:
        tensor = frame
        for session in sessions:
            (tensor,) = session.run(None, {session.get_inputs()[0].name: tensor})
        rows.append(tensor)
    return np.concatenate(rows)


@pytest.mark.parametrize("family", FAMILIES)
def test_segments_give_the_whole_models_answer(family: str, model_directory: Any, photos: Path) -> None:
    opened = open_model(str(model_directory(family)), InputOptions(), Report(silent=True))
    frames = load_frames([FrameSource(photos)], opened.source.preprocess, 60, seed=0).of("judge")
    trunk, shapes = opened.simplified.trunk(), opened.simplified.shapes
    ranges = channel_ranges(trunk, opened.cuts, frames, 1)
    for cuts in (default_cuts(opened.cuts, 3), list(opened.cuts)):
        floating = slice_float(trunk, cuts, shapes)
        whole = run_whole(floating.whole, frames)
        assert np.abs(compose(floating, frames) - whole).max() <= 1e-5 * max(1, np.abs(whole).max())
        quantized = slice_quantized(quantize(trunk, shapes, cuts, frames, ranges, "x86-vnni"), cuts, shapes)
        assert set(quantized.dtypes[:-1]) == {"uint8"}
        exact = run_whole(quantized.whole, frames)
        assert np.array_equal(compose(quantized, frames), exact)
        assert largest_batch(quantized.whole, frames, exact=True) == 8
        correlation = np.corrcoef(exact.ravel(), whole.ravel())[0, 1]
        assert correlation > 0.9, correlation


def test_what_the_directory_says_of_its_input_is_kept(model_directory: Any) -> None:
    source = open_model(str(model_directory("resnet")), InputOptions(), Report(silent=True)).source
    assert (source.preprocess.height, source.preprocess.width, source.preprocess.fit) == (64, 64, "crop")
    assert source.preprocess.crop_ratio == pytest.approx(64 / 72)
    assert source.mean == (0.485, 0.456, 0.406)
    assert source.labels == tuple(f"LABEL_{index}" for index in range(7))
    assert source.model.graph.input[0].name != FRAME


def test_a_hub_id_that_cannot_be_fetched_gives_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(BundleError, match="nor a Hugging Face model that can be fetched from here"):
        open_model("nobody/nothing", InputOptions(), Report(silent=True))
