"""A third task, as whoever adds one would write it: a caption of two words. Both halves stand here for once."""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from export.graph import Shape
from export.task import Marks, Outputs
from export.wires import Wire
from runtime.datatypes import Answer, ExitOutput, Tensor
from runtime.errors import PacketError
from runtime.manifest import Bundle, ExitSpec


class Words(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The places of the two likeliest words."""

    first: int
    second: int


class Caption:
    def __init__(self, bundle: Bundle) -> None:
        self._labels = bundle.labels

    def read(self, output: Tensor, spec: ExitSpec) -> ExitOutput:
        first, second = np.argsort(-output, kind="stable")[:2]
        sure = float(1 / (1 + np.exp(output[second] - output[first])))
        return ExitOutput(exit=spec.cut, confidence=sure, answer=Words(int(first), int(second)))

    def decode(self, data: msgspec.Raw) -> Words:
        try:
            return msgspec.json.decode(data, type=Words)
        except msgspec.MsgspecError as error:
            raise PacketError(f"the reply is damaged: {error}") from error

    def key(self, answer: Answer) -> int:
        return _own(answer).first

    def compare(self, said: Answer, wanted: Answer) -> tuple[int, int]:
        left, right = _own(said), _own(wanted)
        return len({left.first, left.second} & {right.first, right.second}), 2

    def words(self, answer: Answer) -> str:
        own = _own(answer)
        return f"{self._labels[own.first]} before {self._labels[own.second]}"

    def told(self, answer: Answer, height: int, width: int) -> dict[str, Any]:
        return {"caption": self.words(answer), "of": [width, height]}


class CaptionJudge:
    agreement, distance = "the share of words", "words that differ"
    front_kind = None
    likeness, proof, least_likeness = "share of words", "words", 0.8

    def __init__(self, bundle: Bundle) -> None:
        del bundle

    def keys(self, outputs: Outputs) -> NDArray[np.int64]:
        first: NDArray[np.int64] = outputs.argmax(axis=1)
        return first

    def marks(self, said: Outputs, wanted: Outputs) -> Marks:
        both = zip(np.argsort(-said, axis=1)[:, :2], np.argsort(-wanted, axis=1)[:, :2], strict=True)
        return np.array([(len({*left} & {*right}), 2) for left, right in both], np.int64)

    def divergence(self, wanted: Outputs, said: Outputs) -> NDArray[np.float64]:
        marks = self.marks(said, wanted)
        shares: NDArray[np.float64] = 1 - marks[:, 0] / marks[:, 1]
        return shares

    def head_logits(self, outputs: Outputs) -> NDArray[np.float32]:
        return outputs

    def front(self, wire: Wire | None, shape: Shape, features: NDArray[np.float32], outputs: Outputs) -> None:
        del wire, shape, features, outputs

    def owed(self, keys: NDArray[np.int64]) -> None:
        del keys

    def like(self, said: Outputs, wanted: Outputs) -> float:
        return float(self.marks(said, wanted)[:, 0].mean() / 2)


def _own(answer: Answer) -> Words:
    assert isinstance(answer, Words)
    return answer
