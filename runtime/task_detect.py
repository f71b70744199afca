"""The task `detect`: boxes with a label and a score each; an early exit says only that nothing is there.

The last cut of a detector has shape (n, 6): rows of x1, y1, x2, y2 as shares of the model's input, score, and class
index, by falling score and padded with zeros. An early exit's head has two logits: nothing, and something. "Something"
without boxes is less than was asked for, so it never stands as an early answer; it is what a device can still say when
everything above it is gone, and it is not the same as "nothing".
"""

from __future__ import annotations

from collections import Counter
from typing import Annotated, Any

import msgspec
import numpy as np

from runtime.boxes import COLUMNS, SCORE, match
from runtime.datatypes import Answer, ExitOutput, Tensor
from runtime.errors import BundleError, PacketError
from runtime.manifest import Bundle, ExitSpec
from runtime.preprocess import window

NOTHING, SOMETHING = 0, 1  # an early exit's logits, and the keys of answers
MOST_BOXES = 1024

Score = Annotated[float, msgspec.Meta(ge=0, le=1)]
Index = Annotated[int, msgspec.Meta(ge=0)]
Side = Annotated[float, msgspec.Meta(ge=-16, le=16)]


class Settings(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The task's settings in the manifest."""

    score_threshold: Annotated[float, msgspec.Meta(gt=0, lt=1)] = 0.5  # least score of a box that is told


class Box(msgspec.Struct, frozen=True, forbid_unknown_fields=True, array_like=True):
    """One object; x1, y1 is the upper left corner, in shares of the model's input."""

    label_index: Index
    score: Score
    x1: Side
    y1: Side
    x2: Side
    y2: Side

    def row(self) -> tuple[float, ...]:
        """As the last cut has it."""
        return (self.x1, self.y1, self.x2, self.y2, self.score, self.label_index)


class Detections(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Boxes by falling score; None: it is known only whether something is there, not where."""

    boxes: Annotated[tuple[Box, ...], msgspec.Meta(max_length=MOST_BOXES)] | None
    presence: Score  # how likely something is there: of boxes the greatest score, of an early exit its probability

    def rows(self) -> Tensor:
        """float64 (boxes, 6), as runtime.boxes takes them."""
        rows = [box.row() for box in self.boxes or ()]
        return np.array(rows, np.float64).reshape(-1, COLUMNS)


class Detect:
    """Boxes of a bundle whose last cut has shape (n, 6)."""

    def __init__(self, bundle: Bundle) -> None:
        shape = bundle.manifest.cuts[-1].shape
        if len(shape) != 2 or shape[1] != COLUMNS or shape[0] > MOST_BOXES:
            raise BundleError(
                f"a detector's last cut has shape (boxes, {COLUMNS}), not {shape}; export the bundle again"
            )
        try:
            self._settings = msgspec.convert(bundle.manifest.settings, Settings)
        except msgspec.ValidationError as error:
            raise BundleError(f"the manifest's settings do not fit the task detect: {error}") from error
        self._labels = bundle.labels
        self._preprocess = bundle.manifest.preprocess

    def read(self, output: Tensor, spec: ExitSpec) -> ExitOutput:
        """Boxes (n, 6) of the last exit; the two logits (2,) of an early one.

        Raises:
            BundleError: a value is not finite, or a class is none of the bundle's.
        """
        if not np.isfinite(output).all():
            raise BundleError(f"exit {spec.cut} gave a value that is no number; verify the bundle on this machine")
        return self._last(output, spec) if spec.file is None else _early(output, spec)

    def _last(self, output: Tensor, spec: ExitSpec) -> ExitOutput:
        scores = np.clip(output[:, SCORE], 0.0, 1.0)
        presence = float(scores.max(initial=0.0))
        kept = output[scores >= self._settings.score_threshold]
        boxes = tuple(
            Box(int(label), float(min(score, 1.0)), float(x1), float(y1), float(x2), float(y2))
            for x1, y1, x2, y2, score, label in kept
        )
        if any(not 0 <= box.label_index < len(self._labels) for box in boxes):
            raise BundleError(
                f"exit {spec.cut} gave a class beyond the {len(self._labels)} labels; give --labels of the model"
            )
        answer = Detections(boxes=boxes, presence=presence)
        return ExitOutput(exit=spec.cut, confidence=presence if boxes else 1 - presence, answer=answer)

    def decode(self, data: msgspec.Raw) -> Detections:
        """As `Task.decode`; labels that the bundle does not have are refused."""
        try:
            answer = msgspec.json.decode(data, type=Detections)
        except (msgspec.MsgspecError, UnicodeDecodeError) as error:
            raise PacketError(f"the reply is damaged: {error}") from error
        if any(box.label_index >= len(self._labels) for box in answer.boxes or ()):
            raise PacketError("the reply names a label that the bundle does not have")
        return answer

    def key(self, answer: Answer) -> int:
        """Whether something is there: NOTHING or SOMETHING."""
        own = _own(answer)
        if own.boxes is None:
            return SOMETHING if own.presence >= 0.5 else NOTHING
        return SOMETHING if own.boxes else NOTHING

    def compare(self, said: Answer, wanted: Answer) -> tuple[int, int]:
        """Matched boxes twice, and the boxes of both: the parts of F1 at IoU .5; (1, 1) where neither has any.

        An answer without boxes counts as one that has none.
        """
        found = match(_own(said).rows(), _own(wanted).rows())
        same = 2 * len(found.pairs)
        total = same + len(found.left_only) + len(found.right_only)
        return (same, total) if total else (1, 1)

    def words(self, answer: Answer) -> str:
        """`3 person, 1 dog`; `person` for a single one; `nothing`; `something` where it is not known what."""
        own = _own(answer)
        if own.boxes is None:
            return "something" if self.key(own) == SOMETHING else "nothing"
        if not own.boxes:
            return "nothing"
        counted = Counter(self._labels[box.label_index] for box in own.boxes)
        if counted.total() == 1:
            return next(iter(counted))
        return ", ".join(f"{count} {label}" for label, count in counted.items())

    def told(self, answer: Answer, height: int, width: int) -> dict[str, Any]:
        """Boxes in pixels of the frame, cut off at its borders."""
        own = _own(answer)
        boxes = None if own.boxes is None else [self._in_frame(box, height, width) for box in own.boxes]
        return {"boxes": boxes, "presence": own.presence, "size": [width, height]}

    def _in_frame(self, box: Box, height: int, width: int) -> dict[str, Any]:
        seen = window(height, width, self._preprocess)
        xs = [min(max(seen.left + x * seen.width, 0), width) for x in (box.x1, box.x2)]
        ys = [min(max(seen.top + y * seen.height, 0), height) for y in (box.y1, box.y2)]
        corners = [round(value, 1) for value in (xs[0], ys[0], xs[1], ys[1])]
        return {"label": self._labels[box.label_index], "score": box.score, "box": corners}


def _early(logits: Tensor, spec: ExitSpec) -> ExitOutput:
    scaled = logits.astype(np.float64) / spec.temperature
    nothing = float(1 / (1 + np.exp(np.clip(scaled[SOMETHING] - scaled[NOTHING], -60, 60))))
    empty = nothing >= 0.5
    answer = Detections(boxes=() if empty else None, presence=1 - nothing)
    return ExitOutput(exit=spec.cut, confidence=max(nothing, 1 - nothing), answer=answer, partial=not empty)


def _own(answer: Answer) -> Detections:
    assert isinstance(answer, Detections), "one bundle has one task"
    return answer
