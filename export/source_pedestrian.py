"""The detector of people that scripts/build_pedestrian makes: SSDLite with MobileNetV2, MIT."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

from export.source import InputOptions, Source
from export.source_onnx import open_onnx
from runtime.errors import BundleError

HALF = (0.5, 0.5, 0.5)  # mean and deviation: it was trained on pixels from -1 to 1


def open_pedestrian(model: str, options: InputOptions) -> Source:
    """Open it where the script leaves it, in the cache."""
    path = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "kinflow" / f"{model}.onnx"
    if not path.exists():
        raise BundleError(f"{path} is not there yet; run scripts/build_pedestrian, which makes it")
    return open_onnx(str(path), replace(options, mean=HALF, std=HALF, bgr=False))
