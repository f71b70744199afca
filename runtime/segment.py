"""The segment seam: anything that turns the tensor at one cut into the tensor at the next.

Exit heads are run through the same seam: their first output is the logits, the second, if any, their guard's distance.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import Protocol

from runtime.datatypes import Tensor
from runtime.manifest import Bundle

RUNNERS = {"onnx": "runtime.segment_onnx:OnnxSegment"}
HEADS = {"onnx": "runtime.segment_onnx:OnnxHead"}


class Segment(Protocol):
    """One runnable graph."""

    def run(self, batch: Tensor) -> Tensor:
        """Map (batch, …) at one cut to (batch, …) at the next."""
        ...


class Head(Segment, Protocol):
    """An exit head: `run` gives its logits alone."""

    def ask(self, batch: Tensor) -> tuple[Tensor, Tensor | None]:
        """Logits (batch, classes), and the distance (batch,) to what the head was fitted on, if it has a guard."""
        ...


class HeadRunner(Protocol):
    """Loads exit heads of one kind."""

    def __call__(self, bundle: Bundle, file: str, *, threads: int) -> Head:
        """Load one head; as `SegmentRunner`."""
        ...


class SegmentRunner(Protocol):
    """Loads graphs of one kind."""

    def __call__(self, bundle: Bundle, file: str, *, threads: int) -> Segment:
        """Load one file of the bundle.

        Raises:
            BundleError: the file is damaged or the installed runtime cannot load it.
        """
        ...


def load_graph(bundle: Bundle, file: str, *, threads: int = 1, runner: str = "onnx") -> Segment:
    """Load one file of the bundle that has one input and one output.

    Raises:
        BundleError: it is damaged or cannot be loaded.
    """
    module, name = RUNNERS[runner].split(":")
    load: SegmentRunner = getattr(import_module(module), name)
    return load(bundle, file, threads=threads)


def load_segments(
    bundle: Bundle, first: int, last: int, *, threads: int = 1, runner: str = "onnx"
) -> tuple[Mapping[int, Segment], Mapping[int, Head]]:
    """Load segments `first` … `last` and the exit heads behind them.

    Returns:
        Segments by segment index, exit heads by the cut they hang at.

    Raises:
        BundleError: a file is damaged or cannot be loaded.
    """
    module, name = RUNNERS[runner].split(":")
    load: SegmentRunner = getattr(import_module(module), name)
    segments = {
        index: load(bundle, bundle.manifest.segments[index].file, threads=threads) for index in range(first, last + 1)
    }
    module, name = HEADS[runner].split(":")
    load_head: HeadRunner = getattr(import_module(module), name)
    heads = {
        spec.cut: load_head(bundle, spec.file, threads=threads)
        for spec in bundle.manifest.exits
        if spec.file is not None and first < spec.cut <= last + 1
    }
    return segments, heads
