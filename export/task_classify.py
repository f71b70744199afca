"""The task `classify` in an export: outputs are logits (frames, classes), an answer is the greatest one's label."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from export.agreement import cosine
from export.graph import Shape
from export.task import Marks, Outputs
from export.wires import Wire
from runtime.manifest import Bundle


class ClassifyJudge:
    """Agreement is the share of frames with the same label; the divergence is Kullback and Leibler's."""

    agreement = "the share of frames whose answer is that of the whole, unsplit float model"
    distance = "KL"
    front_kind = None
    likeness = "mean cosine of the logits"
    proof = "logit_cosine"
    least_likeness = 0.98

    def __init__(self, bundle: Bundle) -> None:
        del bundle

    def keys(self, outputs: Outputs) -> NDArray[np.int64]:
        """The label of each frame."""
        labels: NDArray[np.int64] = outputs.argmax(axis=1)
        return labels

    def marks(self, said: Outputs, wanted: Outputs) -> Marks:
        """(1, 1) for the same label, (0, 1) for another."""
        same = self.keys(said) == self.keys(wanted)
        return np.stack([same, np.ones_like(same)], axis=1).astype(np.int64)

    def divergence(self, wanted: Outputs, said: Outputs) -> NDArray[np.float64]:
        """`kl`, in nats."""
        return kl(wanted, said)

    def head_logits(self, outputs: Outputs) -> NDArray[np.float32]:
        """The model's own."""
        return outputs

    def front(self, wire: Wire | None, shape: Shape, features: NDArray[np.float32], outputs: Outputs) -> None:
        """None: any head is a classifier's."""
        del wire, shape, features, outputs

    def owed(self, keys: NDArray[np.int64]) -> None:
        """The promise is about the frames that are answered."""
        del keys

    def like(self, said: Outputs, wanted: Outputs) -> float:
        """The mean cosine of the logits."""
        return cosine(said, wanted)


def kl(whole: Outputs, other: Outputs) -> NDArray[np.float64]:
    """KL(whole || other) of the softmax of two sets of logits (frames, classes): (frames,) nats, never below 0."""
    left, right = _log_softmax(whole), _log_softmax(other)
    divergence: NDArray[np.float64] = np.maximum((np.exp(left) * (left - right)).sum(axis=1), 0.0)
    return divergence


def _log_softmax(logits: Outputs) -> NDArray[np.float64]:
    shifted = logits.astype(np.float64)
    shifted -= shifted.max(axis=1, keepdims=True)
    shifted -= np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return shifted
