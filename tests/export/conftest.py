"""Small real networks, frames and one bundle that the tests of `export` share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest

from export.frames import FrameSource
from export.pipeline import Exported, export
from export.recipe import Recipe
from export.report import Report

NET = """
import torch
from torch import nn

class Net(nn.Module):
    input_size, mean, std = 32, 0.5, 0.5
    labels = ["red", "green", "blue", "grey", "black", "white"]

    def __init__(self, exits):
        super().__init__()
        torch.manual_seed(1)
        def stage(i, o): return nn.Sequential(nn.Conv2d(i, o, 3, 2, 1), nn.BatchNorm2d(o), nn.ReLU())
        def head(c): return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(c, 6))
        self.stage1, self.stage2, self.stage3 = stage(3, 8), stage(8, 16), stage(16, 32)
        self.mix = nn.Conv2d(16, 16, 1)
        self.head1, self.head2, self.head = head(8), head(16), head(32)
        self.exits = exits

    def forward(self, x):
        a = self.stage1(x)
        b = self.stage2(a)
        b = b + self.mix(b)
        y = self.head(self.stage3(b)) * 4
        return (self.head1(a) * 4, self.head2(b) * 4, y) if self.exits else y

def plain(): return Net(exits=False)
def with_exits(): return Net(exits=True)
def softmax(): return nn.Sequential(Net(exits=False), nn.Softmax(1))
def broken(): return nn.Linear(7, 7)
def no_module(): return 7


def raises(): return 1 // 0
"""


@pytest.fixture(scope="session")
def net(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The path of a file with factories of small networks."""
    path = tmp_path_factory.mktemp("net") / "net.py"
    path.write_text(NET)
    return str(path)


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 60 pictures: a soft colour ground, a shape, and grain."""
    folder = tmp_path_factory.mktemp("photos")
    generator = np.random.default_rng(7)
    for number in range(60):
        ground = cv2.resize(generator.integers(0, 256, (3, 3, 3), dtype=np.uint8), (40, 36))
        centre = tuple(int(value) for value in generator.integers(8, 28, 2))
        colour = tuple(int(value) for value in generator.integers(0, 256, 3))
        cv2.circle(ground, centre, int(generator.integers(3, 12)), colour, -1)
        grain = generator.normal(0, 6, ground.shape)
        cv2.imwrite(str(folder / f"{number:03}.png"), np.clip(ground + grain, 0, 255).astype(np.uint8))
    return folder


@pytest.fixture(scope="session")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A clip of 50 frames in which a square moves."""
    path = tmp_path_factory.mktemp("clip") / "clip.avi"
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"MJPG"), 10, (48, 40))
    for number in range(50):
        frame = np.full((40, 48, 3), 3 * number, np.uint8)
        frame[5:15, number % 38 : number % 38 + 10] = (255, 0, 0)
        writer.write(frame)
    writer.release()
    return path


@pytest.fixture(scope="session")
def recipe(net: str, photos: Path) -> Recipe:
    """How the shared bundle is made."""
    return Recipe(model=f"{net}:plain", frames=(FrameSource(photos),), agreement=0.8)


@pytest.fixture(scope="session")
def bundle_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Recipe], Exported]:
    """A function that exports a recipe, once for all tests that ask for it. Who changes the bundle works on a copy."""
    made: list[tuple[Recipe, Exported]] = []

    def find_or_export(recipe: Recipe) -> Exported:
        for known, bundle in made:
            if known == recipe:
                return bundle
        made.append((recipe, export(recipe, tmp_path_factory.mktemp("bundles") / "bundle", Report(silent=True))))
        return made[-1][1]

    return find_or_export


@pytest.fixture(scope="session")
def exported(recipe: Recipe, bundle_of: Callable[[Recipe], Exported]) -> Exported:
    """An int8 bundle of the small network. Tests that change it work on a copy."""
    return bundle_of(recipe)
