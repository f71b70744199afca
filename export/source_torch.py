"""A user's own torch module, `path/to/file.py:factory`, and the way from any torch module to ONNX.

`factory()` returns an nn.Module that takes float (batch, 3, height, width) and returns logits, or a tuple of logits
of which all but the last come from its own early exits. It may carry `input_size`, `mean`, `std` and `labels`.
"""

from __future__ import annotations

import hashlib
import importlib.util
import io
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import onnx
import torch
from onnx import ModelProto

from export.graph import OPSET
from export.source import Channels, InputOptions, Source
from runtime.errors import BundleError
from runtime.manifest import PreprocessSpec

DEFAULT_SIZE = (224, 224)


def open_torch(model: str, options: InputOptions) -> Source:
    """Run the user's factory and trace what it returns."""
    file, _, name = model.rpartition(":")
    path = Path(file)
    factory = _factory(path, name)
    try:
        module = factory()
    except Exception as error:
        raise BundleError(f"{model} failed: {_told(error, path)}") from error
    if not isinstance(module, torch.nn.Module):
        raise BundleError(f"{model} returned a {type(module).__name__}; it must return a torch.nn.Module")
    size = options.size or _pair(getattr(module, "input_size", DEFAULT_SIZE))
    labels = getattr(module, "labels", None)
    return Source(
        name=path.stem,
        origin=f"{path.name}:{name} (SHA-256 {hashlib.sha256(path.read_bytes()).hexdigest()[:16]})",
        model=to_onnx(module, size),
        preprocess=PreprocessSpec(height=size[0], width=size[1]),
        mean=options.mean or _channels(getattr(module, "mean", 0.0)),
        std=options.std or _channels(getattr(module, "std", 1.0)),
        bgr=options.bgr,
        labels=None if labels is None else tuple(map(str, labels)),
    )


def to_onnx(module: torch.nn.Module, size: tuple[int, int]) -> ModelProto:
    """Trace a module for one frame of `size`; its outputs come in the order the module returns them."""
    module = module.eval().cpu()
    example = torch.zeros(1, 3, *size)
    try:
        with torch.inference_mode():
            outputs = module(example)
    except Exception as error:
        raise BundleError(
            f"the module does not take float input of shape (1, 3, {size[0]}, {size[1]}): {_told(error, None)}"
        ) from error
    count = len(outputs) if isinstance(outputs, (tuple, list)) else 1
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the tracer warns of its own age and of every shape it bakes in
        torch.onnx.export(
            module,
            (example,),
            buffer,  # type: ignore[arg-type]  # a buffer is fine for the tracer
            input_names=["image"],
            output_names=[f"output{position}" for position in range(count)],
            opset_version=OPSET,
            dynamo=False,
        )
    return onnx.load_model_from_string(buffer.getvalue())


def _factory(path: Path, name: str) -> Callable[[], Any]:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if not path.is_file() or spec is None or spec.loader is None:
        raise BundleError(f"{path} does not exist; give the file as path/to/file.py:factory")
    namespace = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(path.parent.resolve()))  # the file's neighbours, as when it is run by itself
    try:
        spec.loader.exec_module(namespace)
    except Exception as error:
        raise BundleError(f"{path} cannot be imported: {_told(error, path)}") from error
    factory = getattr(namespace, name, None)
    if not callable(factory):
        raise BundleError(f"{path} has no function {name!r}; give the name of one that returns the module")
    return factory  # type: ignore[no-any-return]


def _told(error: Exception, path: Path | None) -> str:
    """The user's own error in one line, with the deepest line of their file that it passed."""
    reason = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
    passed = [frame for frame in traceback.extract_tb(error.__traceback__) if path and Path(frame.filename) == path]
    return f"{reason} ({path.name}, line {passed[-1].lineno})" if path and passed else reason


def _pair(size: int | Sequence[int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))


def _channels(value: float | Sequence[float]) -> Channels:
    if isinstance(value, (int, float)):
        return (float(value),) * 3
    return float(value[0]), float(value[1]), float(value[2])
