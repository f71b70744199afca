"""A classifier of CIFAR-10 with two early exits, as a user would bring it.

`kinflow export scripts/cifar_network.py:factory` takes it. Plain 3x3 convolutions at 32, 16, 8 and 4 pixels a side,
with batch norm, ReLU and residual additions. An exit is a branch of its own: one or two strided convolutions, the mean
over space, one linear layer. `scripts/bench_cifar train` trains all exits together.
"""

from __future__ import annotations

import os
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor, nn

WEIGHTS = "KINFLOW_CIFAR_WEIGHTS"  # the environment variable that holds the path of the trained weights
BESIDE = Path(__file__).with_name("cifar_network.pt")  # where they are looked for without it
LABELS = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


def conv(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    """A 3x3 convolution with batch norm and ReLU."""
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)
    )


class Residual(nn.Module):
    """Two convolutions beside the identity."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.body = nn.Sequential(conv(channels, channels), conv(channels, channels))

    def forward(self, features: Tensor) -> Tensor:
        """Float (batch, channels, height, width) in and out."""
        added: Tensor = features + self.body(features)
        return added


def head(*widths: int) -> nn.Sequential:
    """Strided convolutions of `widths`, the mean over space, and the logits."""
    steps = [conv(before, after, 2) for before, after in pairwise(widths)]
    return nn.Sequential(*steps, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], len(LABELS)))


class CifarNetwork(nn.Module):
    """About 78 million multiplications a frame; its exits hang at about a fifth and a half of them."""

    input_size = (32, 32)
    mean = (0.4914, 0.4822, 0.4465)
    std = (0.2470, 0.2435, 0.2616)
    labels = LABELS

    def __init__(self) -> None:
        super().__init__()
        self.stage1 = nn.Sequential(conv(3, 24), conv(24, 48, 2), Residual(48))
        self.stage2 = nn.Sequential(conv(48, 128, 2), Residual(128))
        self.stage3 = nn.Sequential(Residual(128), conv(128, 256, 2), Residual(256))
        self.exit1, self.exit2, self.last = head(48, 96, 128), head(128, 192), head(256)

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Logits (batch, 10) of exit 1, exit 2 and the whole network, for normalised float (batch, 3, 32, 32)."""
        early = self.stage1(image)
        middle = self.stage2(early)
        return self.exit1(early), self.exit2(middle), self.last(self.stage3(middle))


def factory() -> nn.Module:
    """The trained network; its weights are those that `scripts/bench_cifar train` wrote."""
    path = Path(os.environ.get(WEIGHTS, BESIDE))
    if not path.is_file():
        raise FileNotFoundError(f"no weights at {path}; run scripts/bench_cifar train, or set {WEIGHTS} to their path")
    network = CifarNetwork()
    network.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    return network.eval()
