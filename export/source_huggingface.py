"""A Hugging Face image classifier, by local directory or hub id, through optimum's ONNX export."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import tempfile
import warnings
from pathlib import Path
from typing import Any

import onnx

from export.graph import OPSET
from export.source import Channels, InputOptions, Source
from runtime.errors import BundleError
from runtime.manifest import PreprocessSpec

DEFAULT_SIZE = 224
PREPROCESSOR = "preprocessor_config.json"


def open_huggingface(model: str, options: InputOptions) -> Source:
    """Export the classifier for any batch and read how its preprocessor treats pixels."""
    from transformers import AutoConfig

    directory = Path(model)
    local = directory.is_dir()
    if local and not (directory / "config.json").is_file():
        raise BundleError(f"{model} holds no config.json; give the directory that save_pretrained wrote")
    try:
        with _silence():
            config: Any = AutoConfig.from_pretrained(model)
    except Exception as error:  # hub, network and config errors share no base class
        raise BundleError(
            f"{model} is neither a file, a model directory nor a Hugging Face model that can be fetched from here; "
            "download it first and give its directory"
        ) from error
    preprocessor = _preprocessor(model, local=local)
    spec = _spec(config, preprocessor, options)
    with tempfile.TemporaryDirectory() as scratch:
        loaded = _export(model, Path(scratch), spec)
    names: dict[int, str] = {int(key): str(value) for key, value in (config.id2label or {}).items()}
    normalizes = preprocessor.get("do_normalize", "image_mean" in preprocessor)
    return Source(
        name=directory.resolve().name if local else model.replace("/", "-"),
        origin=f"{config.model_type} {directory.resolve().name if local else model}",
        model=loaded,
        preprocess=spec,
        mean=options.mean or (_channels(preprocessor.get("image_mean", 0.0)) if normalizes else (0.0, 0.0, 0.0)),
        std=options.std or (_channels(preprocessor.get("image_std", 1.0)) if normalizes else (1.0, 1.0, 1.0)),
        bgr=options.bgr or bool(preprocessor.get("do_flip_channel_order", False)),
        labels=tuple(names.get(index, f"class {index}") for index in range(len(names))) or None,
    )


def _export(model: str, scratch: Path, spec: PreprocessSpec) -> onnx.ModelProto:
    from optimum.exporters.onnx import main_export

    try:
        with _silence():
            main_export(
                model,
                output=scratch,
                task="image-classification",
                opset=OPSET,
                do_validation=False,  # export proves itself, on real frames
                height=spec.height,
                width=spec.width,
            )
    except Exception as error:  # optimum raises what its many parts raise
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise BundleError(f"{model} cannot be exported as an image classifier: {reason}") from error
    return onnx.load(scratch / "model.onnx")


def _preprocessor(model: str, *, local: bool) -> dict[str, Any]:
    if local:
        path = Path(model) / PREPROCESSOR
        return json.loads(path.read_text("utf-8")) if path.is_file() else {}
    from transformers.utils.hub import cached_file

    found = cached_file(model, PREPROCESSOR, _raise_exceptions_for_missing_entries=False)
    return {} if found is None else json.loads(Path(found).read_text("utf-8"))


def _spec(config: Any, preprocessor: dict[str, Any], options: InputOptions) -> PreprocessSpec:
    size = preprocessor.get("size", {})
    size = {"shortest_edge": size} if isinstance(size, int) else size
    crop = preprocessor.get("crop_size", {})
    crop = {"height": crop, "width": crop} if isinstance(crop, int) else crop
    ratio, fit = 1.0, "crop"
    if preprocessor.get("do_center_crop") and crop:
        height, width = crop["height"], crop["width"]
        edge = size.get("shortest_edge") or min(size.get("height", height), size.get("width", width))
        ratio = min(1.0, min(height, width) / edge)
    elif "shortest_edge" in size:
        # ConvNeXt's rule: the crop has this edge, and the frame is scaled so that crop_pct of it remains.
        height = width = size["shortest_edge"]
        ratio = preprocessor.get("crop_pct") or 1.0
    elif size:
        height, width, fit = size["height"], size["width"], "stretch"
    else:
        declared = getattr(config, "image_size", DEFAULT_SIZE)
        height, width = (declared, declared) if isinstance(declared, int) else (declared[0], declared[1])
    if options.size is not None:
        height, width = options.size
    return PreprocessSpec(
        height=height, width=width, fit="stretch" if fit == "stretch" else "crop", crop_ratio=float(ratio)
    )


def _channels(value: float | list[float]) -> Channels:
    if isinstance(value, (int, float)):
        return (float(value),) * 3
    return float(value[0]), float(value[1]), float(value[2])


@contextlib.contextmanager
def _silence() -> Any:
    """Keep the exporters' own chatter off our standard output and logs."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)
