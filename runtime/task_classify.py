"""The task `classify`: one label for a frame, from the greatest of an exit's logits."""

from __future__ import annotations

from typing import Annotated, Any

import msgspec
import numpy as np

from runtime.datatypes import Answer, ExitOutput, Logits, Tensor
from runtime.errors import BundleError, PacketError
from runtime.manifest import Bundle, ExitSpec

TOP = 5

Score = Annotated[float, msgspec.Meta(ge=0, le=1)]
Index = Annotated[int, msgspec.Meta(ge=0)]


class Classification(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The likeliest labels, best first, with their probabilities after the exit's temperature."""

    topk: Annotated[tuple[tuple[Index, Score], ...], msgspec.Meta(min_length=1, max_length=16)]

    @property
    def label_index(self) -> int:
        """The label that is the answer."""
        return self.topk[0][0]


def classify(logits: Logits, spec: ExitSpec) -> ExitOutput:
    """Read one frame's logits (classes,) as probabilities after the exit's temperature.

    Raises:
        BundleError: a logit is not finite: the graph does not work on this machine.
    """
    if not np.isfinite(logits).all():
        raise BundleError(f"exit {spec.cut} gave a logit that is no number; verify the bundle on this machine")
    scaled = logits.astype(np.float32) / np.float32(spec.temperature)
    scores = np.exp(scaled - scaled.max())
    scores /= scores.sum()
    count = min(TOP, scores.size)
    # By logits, as distinct logits may round to one score; ties fall to the lower index.
    least = np.partition(logits, logits.size - count)[logits.size - count]
    among = np.flatnonzero(logits >= least)
    best = among[np.argsort(-logits[among], kind="stable")[:count]]
    topk = tuple((int(index), float(scores[index])) for index in best)
    return ExitOutput(exit=spec.cut, confidence=topk[0][1], answer=Classification(topk=topk))


class Classify:
    """Labels of a bundle whose last cut has one logit a class."""

    def __init__(self, bundle: Bundle) -> None:
        classes = bundle.manifest.cuts[-1].shape[-1]
        if len(bundle.labels) != classes:
            raise BundleError(
                f"{bundle.manifest.labels} has {len(bundle.labels)} labels for {classes} classes; "
                "export the bundle again"
            )
        self._labels = bundle.labels

    def read(self, output: Tensor, spec: ExitSpec) -> ExitOutput:
        """Logits (classes,); see `classify`."""
        return classify(output, spec)

    def decode(self, data: msgspec.Raw) -> Classification:
        """As `Task.decode`; labels that the bundle does not have are refused."""
        try:
            answer = msgspec.json.decode(data, type=Classification)
        except (msgspec.MsgspecError, UnicodeDecodeError) as error:
            raise PacketError(f"the reply is damaged: {error}") from error
        if any(index >= len(self._labels) for index, _ in answer.topk):
            raise PacketError("the reply names a label that the bundle does not have")
        return answer

    def key(self, answer: Answer) -> int:
        """The label's index."""
        return _own(answer).label_index

    def compare(self, said: Answer, wanted: Answer) -> tuple[int, int]:
        """(1, 1) for the same label, (0, 1) for another."""
        return int(self.key(said) == self.key(wanted)), 1

    def words(self, answer: Answer) -> str:
        """The label."""
        return self._labels[_own(answer).label_index]

    def told(self, answer: Answer, height: int, width: int) -> dict[str, Any]:
        """The label's index, and the likeliest labels with their probabilities."""
        del height, width
        topk = _own(answer).topk
        return {"label_index": topk[0][0], "topk": [[self._labels[index], score] for index, score in topk]}


def _own(answer: Answer) -> Classification:
    assert isinstance(answer, Classification), "one bundle has one task"
    return answer
