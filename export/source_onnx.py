"""Any ONNX file with one image input: NCHW or NHWC, fixed or open dimensions, weights inside or beside the file."""

from __future__ import annotations

import hashlib
from pathlib import Path

import onnx
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
from onnx import ModelProto

from export.source import InputOptions, Source
from runtime.errors import BundleError
from runtime.manifest import PreprocessSpec


def open_onnx(model: str, options: InputOptions) -> Source:
    """Read the file and see how it wants its pixels."""
    path = Path(model)
    try:
        loaded = onnx.load(path)
        onnx.checker.check_model(loaded, full_check=False)
    except FileNotFoundError as error:
        raise BundleError(
            f"{error.filename or path} does not exist; give the whole model, external data included"
        ) from error
    except (OSError, DecodeError, onnx.checker.ValidationError, ValueError) as error:
        raise BundleError(f"{path} cannot be read as an ONNX model: {str(error).splitlines()[0]}") from error
    layout_is_nchw, height, width = _image_input(loaded, path, options)
    return Source(
        name=path.stem,
        origin=f"{path.name} (SHA-256 {hashlib.sha256(path.read_bytes()).hexdigest()[:16]})",
        model=loaded,
        preprocess=PreprocessSpec(height=height, width=width),
        mean=options.mean or (0.0, 0.0, 0.0),
        std=options.std or (1.0, 1.0, 1.0),
        bgr=options.bgr,
        layout="NCHW" if layout_is_nchw else "NHWC",
    )


def _image_input(model: ModelProto, path: Path, options: InputOptions) -> tuple[bool, int, int]:
    weights = {tensor.name for tensor in model.graph.initializer}
    inputs = [info for info in model.graph.input if info.name not in weights]
    if len(inputs) != 1:
        raise BundleError(f"{path} has {len(inputs)} inputs; Kinflow needs a model with one image input")
    dims = inputs[0].type.tensor_type.shape.dim
    if len(dims) != 4:
        raise BundleError(f"{path}: the input has {len(dims)} dimensions; an image input has 4 (a batch of 3 channels)")
    channels_first = dims[3].dim_value != 3 or dims[1].dim_value == 3
    if channels_first and dims[1].dim_value not in (0, 3):
        raise BundleError(
            f"{path}: the input has {dims[1].dim_value} channels; Kinflow feeds it 3 (RGB, or BGR by --bgr)"
        )
    spatial = dims[2:4] if channels_first else dims[1:3]
    declared = tuple(dim.dim_value for dim in spatial)
    if options.size is not None:
        if any(known not in (0, wanted) for known, wanted in zip(declared, options.size, strict=True)):
            raise BundleError(f"{path} takes {declared[0]}x{declared[1]} pixels; leave out --size or give just that")
        return channels_first, *options.size
    if 0 in declared:
        raise BundleError(f"{path} does not say how large its input is; add --size HEIGHT or --size HEIGHTxWIDTH")
    return channels_first, declared[0], declared[1]
