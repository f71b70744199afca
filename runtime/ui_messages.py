"""The messages that the page reads, as far as it draws them, and no more of each than there is room for. Pure.

Nothing is believed to be well made: whoever may publish on the broker may send anything.
"""

from __future__ import annotations

from typing import Annotated, Any, TypeAlias

import msgspec

from runtime.codec import jpeg_size
from runtime.errors import PacketError
from runtime.ui_plan import Plan

AVAILABILITIES = (b"online", b"offline", b"")  # a retained message that was taken back has no payload
STATUSES = (b"starting", b"online", b"late", b"frozen", b"stalled", b"offline", b"")
KINDS = ("availability", "birth", "stats", "plan", "result", "status", "event", "preview")
MOST_BOXES = 100
MOST_COUNTERS = 500
MOST_JSON_BYTES = 256 * 1024
MOST_PREVIEW_BYTES = 1024 * 1024

Share = Annotated[float, msgspec.Meta(ge=0, le=1)]
Count = Annotated[int, msgspec.Meta(ge=0, le=2**53)]
Milliseconds = Annotated[float, msgspec.Meta(ge=0, le=1e12)]
Pixel = Annotated[float, msgspec.Meta(ge=-1e6, le=1e6)]
Side = Annotated[int, msgspec.Meta(ge=1, le=65_536)]
Word = Annotated[str, msgspec.Meta(max_length=200)]


class Box(msgspec.Struct, frozen=True):
    """One object, its corners in pixels of the camera's frame."""

    label: Word
    score: Share
    box: tuple[Pixel, Pixel, Pixel, Pixel]


class Answer(msgspec.Struct, frozen=True):
    """The part of a result that is the task's own, as far as it can be drawn."""

    topk: tuple[tuple[Word, Share], ...] = ()
    boxes: tuple[Box, ...] | None = None
    presence: Share | None = None
    size: tuple[Side, Side] | None = None  # width and height of the frame


class Said(msgspec.Struct, frozen=True):
    """A result as the page reads it; what it does not know is left alone (docs/wire.md, "Result")."""

    label: Word
    confidence: Share
    tier: Word
    age_ms: Milliseconds
    frame: int = 0
    exit: int = 0
    task: Word = "classify"
    answer: Answer = Answer()
    agreement: Share | None = None
    codec: Word | None = None
    bytes_up: Count = 0
    timings: dict[Word, float] = {}
    degraded: Annotated[str, msgspec.Meta(max_length=500)] | None = None
    repeats: int | None = None
    variant: int = 0


class Birth(msgspec.Struct, frozen=True):
    """What a device or a node says of itself when it connects."""

    bundle: Word = ""
    kinflow: Word = ""
    machine: Word = ""
    tier: Word = ""
    codec: Word = ""
    last_segment: int | None = None
    variant: int = 0


class Happening(msgspec.Struct, frozen=True):
    """An event of a camera, as far as it is shown."""

    type: Word
    label: Word
    id: Word = ""
    session: Word = ""
    sequence: int = 0  # 0: not numbered


Stats: TypeAlias = dict[str, int]
Told: TypeAlias = "Said | Birth | Happening | Plan | Stats | bytes"


def read(kind: str, payload: bytes) -> Told | None:
    """Read a message: a result, birth, event, plan or stats as what it says, everything else as it came.

    Returns:
        None for a birth that was taken back.

    Raises:
        PacketError: it makes no sense, is too large, or its kind is not one of `KINDS`.
    """
    if len(payload) > (MOST_PREVIEW_BYTES if kind == "preview" else MOST_JSON_BYTES):
        raise PacketError(f"a message of kind {kind} has {len(payload)} bytes, more than the page reads")
    known = {"availability": AVAILABILITIES, "status": STATUSES}
    if kind in known and payload in known[kind]:
        return payload
    if kind == "preview":
        if jpeg_size(payload) is None:
            raise PacketError("a preview is no JPEG")
        return payload
    if kind not in _JSON:
        raise PacketError(f"a message of kind {kind[:40]} is not one that the page knows")
    if kind == "birth" and not payload:
        return None
    try:
        told: Told = msgspec.json.decode(payload, type=_JSON[kind])
    except (msgspec.DecodeError, UnicodeDecodeError) as error:  # a ValidationError is a DecodeError
        raise PacketError(f"a message of kind {kind} is not as it should be: {error}") from error
    if isinstance(told, dict) and len(told) > MOST_COUNTERS:
        raise PacketError(f"stats have {len(told)} counters, more than the page reads")
    if isinstance(told, Said) and told.answer.boxes is not None and len(told.answer.boxes) > MOST_BOXES:
        answer = msgspec.structs.replace(told.answer, boxes=told.answer.boxes[:MOST_BOXES])
        told = msgspec.structs.replace(told, answer=answer)
    return told


_JSON: dict[str, Any] = {"result": Said, "birth": Birth, "event": Happening, "plan": Plan, "stats": dict[Word, Count]}
