"""The task `detect` in an export: outputs are boxes (frames, n, 6), agreement is F1 of matched boxes at IoU .5.

Early exits learn one thing: whether the whole model finds anything. Their promise is recall: of the frames with
something, at most the allowed share is called empty.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto

from export.exits_where import KIND, where_front
from export.graph import Shape
from export.task import Marks, Outputs
from export.wires import Wire
from runtime.boxes import SCORE
from runtime.manifest import Bundle
from runtime.task import open_task
from runtime.task_detect import SOMETHING, Detections, Settings

CERTAIN = 1e-3  # nearer to 0 or 1 than this no score is taken for a probability


class DetectJudge:
    """Agreement is F1 over all boxes of all frames, a frame that is empty in both counting as one box found."""

    agreement = "F1 of the boxes and those of the whole, unsplit float model, matched from an overlap (IoU) of .5 on"
    distance = "1 - F1"
    front_kind = KIND
    likeness = "F1 of matched boxes"
    proof = "box_f1"
    least_likeness = 0.8

    def __init__(self, bundle: Bundle) -> None:
        self._task = open_task(bundle)
        self._last = bundle.manifest.exits[-1]
        self._least = Settings(**bundle.manifest.settings).score_threshold

    def _answers(self, outputs: Outputs) -> list[Detections]:
        answers = [self._task.read(rows, self._last).answer for rows in outputs]
        assert all(isinstance(answer, Detections) for answer in answers), "one bundle has one task"
        return answers  # type: ignore[return-value]

    def keys(self, outputs: Outputs) -> NDArray[np.int64]:
        """Whether something is there."""
        return np.array([self._task.key(answer) for answer in self._answers(outputs)], np.int64)

    def marks(self, said: Outputs, wanted: Outputs) -> Marks:
        """Matched boxes twice, and the boxes of both."""
        pairs = zip(self._answers(said), self._answers(wanted), strict=True)
        return np.array([self._task.compare(left, right) for left, right in pairs], np.int64).reshape(-1, 2)

    def divergence(self, wanted: Outputs, said: Outputs) -> NDArray[np.float64]:
        """One minus the F1 of each frame."""
        marks = self.marks(said, wanted)
        shares: NDArray[np.float64] = 1 - marks[:, 0] / marks[:, 1]
        return shares

    def head_logits(self, outputs: Outputs) -> NDArray[np.float32]:
        """Log-odds of the greatest score, so that a box of the least score that counts is even odds: (frames, 2)."""
        presence = np.clip(outputs[:, :, SCORE].max(axis=1, initial=0.0), CERTAIN, 1 - CERTAIN).astype(np.float64)
        odds = np.log(presence / (1 - presence)) - np.log(self._least / (1 - self._least))
        return np.stack([-odds / 2, odds / 2], axis=1).astype(np.float32)

    def front(
        self, wire: Wire | None, shape: Shape, features: NDArray[np.float32], outputs: Outputs
    ) -> ModelProto | None:
        """`exits_where.where_front`."""
        return where_front(wire, shape, features, outputs)

    def owed(self, keys: NDArray[np.int64]) -> NDArray[np.bool_]:
        """The frames with something."""
        there: NDArray[np.bool_] = keys == SOMETHING
        return there

    def like(self, said: Outputs, wanted: Outputs) -> float:
        """F1 of matched boxes."""
        same, total = self.marks(said, wanted).sum(axis=0)
        return float(same / total)
