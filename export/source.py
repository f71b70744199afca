"""The source seam: whatever a user calls a model becomes one float ONNX graph, with what is known of its input."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Literal, Protocol

from onnx import ModelProto

from export.detector_layout import BoxFormat
from runtime.errors import BundleError
from runtime.manifest import PreprocessSpec

# How MODEL is written → who opens it. The modules import heavy packages and are loaded only when they are needed.
SOURCES = {
    "lite0": "export.source_lite0:open_lite0",
    "pedestrian": "export.source_pedestrian:open_pedestrian",
    "onnx": "export.source_onnx:open_onnx",
    "torch": "export.source_torch:open_torch",
    "huggingface": "export.source_huggingface:open_huggingface",
}

Channels = tuple[float, float, float]
Fit = Literal["crop", "stretch", "letterbox"]


@dataclass(frozen=True, slots=True)
class DetectorOptions:
    """What the command line says about a detector; None leaves it to the layout of its outputs."""

    boxes: BoxFormat | None = None
    names: tuple[str, ...] | None = None  # of the classes, by index
    iou_threshold: float = 0.6  # where suppression is not in the graph yet
    fit: Fit | None = None


@dataclass(frozen=True, slots=True)
class InputOptions:
    """What the command line says about a model; None leaves it to the source."""

    size: tuple[int, int] | None = None  # height, width
    mean: Channels | None = None  # of pixels 0..1, per channel in the model's order
    std: Channels | None = None
    bgr: bool = False
    detector: DetectorOptions | None = None  # None: a classifier


@dataclass(frozen=True, slots=True)
class Source:
    """A model as its maker left it. Outputs: its own exits' logits, if any, then its logits (or probabilities)."""

    name: str
    origin: str  # for the manifest: what was exported, without any path of this machine
    model: ModelProto
    preprocess: PreprocessSpec
    mean: Channels  # of pixels 0..1
    std: Channels
    bgr: bool = False
    layout: Literal["NCHW", "NHWC"] = "NCHW"
    labels: tuple[str, ...] | None = None


class OpenSource(Protocol):
    """Opens models of one kind."""

    def __call__(self, model: str, options: InputOptions) -> Source:
        """Read the model.

        Raises:
            BundleError: it cannot be read or is no image classifier.
        """
        ...


def open_source(model: str, options: InputOptions) -> Source:
    """Open a model by what the user wrote: `lite0`, FILE.onnx, FILE.py:FACTORY, a directory or a Hugging Face id.

    Raises:
        BundleError: it cannot be read or is no image classifier.
    """
    module, name = SOURCES[_kind(model)].split(":")
    opener: OpenSource = getattr(import_module(module), name)
    return opener(model, options)


def _kind(model: str) -> str:
    if model in SOURCES:
        return model
    if model.endswith(".onnx"):
        return "onnx"
    if ".py:" in model:
        return "torch"
    if model.endswith(".py"):
        raise BundleError(f"{model} needs the name of a function that returns the module: {model}:FACTORY")
    if Path(model).is_file():
        raise BundleError(f"{model} is neither an .onnx file nor FILE.py:FACTORY; export it to ONNX first")
    return "huggingface"
