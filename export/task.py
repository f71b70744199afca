"""The task seam of an export: how outputs are compared with the whole float model's, and what early exits learn.

The other half of `runtime.task`: one file for each task, and a row here. `outputs` are what the last output of a graph
gives for frames, float32 (frames, …): logits (frames, classes), boxes (frames, n, 6).
"""

from __future__ import annotations

from importlib import import_module
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto

from export.graph import Shape
from export.wires import Wire
from runtime.manifest import Bundle
from runtime.task import open_task

Outputs = NDArray[np.float32]
Marks = NDArray[np.int64]  # (frames, 2): what is the same in two answers, and all that could be

JUDGES = {
    "classify": "export.task_classify:ClassifyJudge",
    "detect": "export.task_detect:DetectJudge",
}


class Judge(Protocol):
    """Compares the outputs of one bundle with those of the whole float model."""

    agreement: str  # what it is, in words
    distance: str  # what `divergence` is called
    front_kind: str | None  # what `front` makes, in words; None: it makes none
    likeness: str  # what `like` measures, in words
    proof: str  # and its name in the manifest's proof
    least_likeness: float  # below it a quantized model is not the same model any more

    def __init__(self, bundle: Bundle) -> None: ...

    def keys(self, outputs: Outputs) -> NDArray[np.int64]:
        """What early exits are judged by (frames,), as `runtime.task.Task.key`."""
        ...

    def marks(self, said: Outputs, wanted: Outputs) -> Marks:
        """`runtime.task.Task.compare`, frame by frame."""
        ...

    def divergence(self, wanted: Outputs, said: Outputs) -> NDArray[np.float64]:
        """How far each answer is from the wanted one, finer than agreement: (frames,), 0 for the same."""
        ...

    def head_logits(self, outputs: Outputs) -> NDArray[np.float32]:
        """The logits (frames, keys) that early exits are fitted to give."""
        ...

    def front(
        self, wire: Wire | None, shape: Shape, features: NDArray[np.float32], outputs: Outputs
    ) -> ModelProto | None:
        """A front of an exit's head that only this task has; None where it does not fit.

        Args:
            wire: how the features stand on the wire.
            shape: theirs on the wire.
            features: of fit frames, as the float model has them: (frames, …).
            outputs: the whole float model's for the same frames.
        """
        ...

    def owed(self, keys: NDArray[np.int64]) -> NDArray[np.bool_] | None:
        """The frames (frames,) that the promise of early exits is about; None: those that they answer.

        With None, of the answered frames a share may be wrong. Else, of these frames a share may be answered wrongly.
        """
        ...

    def like(self, said: Outputs, wanted: Outputs) -> float:
        """How alike two models' outputs are on the same frames, up to 1."""
        ...


def open_judge(bundle: Bundle) -> Judge:
    """The judge of a bundle's task.

    Raises:
        BundleError: as `runtime.task.open_task`.
    """
    open_task(bundle)
    module, name = JUDGES[bundle.manifest.task].split(":")
    kind: type[Judge] = getattr(import_module(module), name)
    return kind(bundle)
