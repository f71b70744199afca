"""What flows: a Frame becomes Features, an exit head turns Features into an ExitOutput, an answer is a Result."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import msgspec
import numpy as np
from numpy.typing import NDArray

Pixels: TypeAlias = NDArray[np.uint8]  # (height, width, 3), RGB
Tensor: TypeAlias = NDArray[Any]  # (batch, ...), uint8 or float32, C-contiguous
Logits: TypeAlias = NDArray[np.float32]  # (classes,)
Answer: TypeAlias = msgspec.Struct  # what a task says of a frame; its own type, in runtime/task_<name>.py


@dataclass(frozen=True, slots=True)
class Frame:
    """One picture, stamped when it was grabbed. Nobody writes to its pixels while it lives, and it must not either."""

    camera: str
    captured_ns: int  # time.monotonic_ns() at the grab
    pixels: Pixels
    index: int  # position in the source: counts what the camera gave, dropped frames included
    skipped: int = 0  # frames right before this one that were worth answering, but that nobody had room for
    flaw: str | None = None  # why it may not show what is there now, such as "frozen"; None: nothing known against it


@dataclass(frozen=True, slots=True)
class Features:
    """The tensor at a cut for one frame. Cut 0 is the frame as the model sees it: uint8 (1, height, width, 3)."""

    cut: int
    tensor: Tensor  # (1, ...)


@dataclass(frozen=True, slots=True)
class ExitOutput:
    """What an exit says of one frame."""

    exit: int  # the cut at which the exit head hangs; the last exit is the model's own
    confidence: float  # 0..1: how sure the exit is of its answer
    answer: Answer
    distance: float | None = None  # of the frame's features to those the head was fitted on; None: no guard here
    partial: bool = False  # the answer says less than was asked for, so it stands only where nothing better comes


@dataclass(frozen=True, slots=True)
class Result:
    """An answer as applications see it. `degraded` says why this is not the answer that was aimed for, or is None."""

    camera: str
    frame: int  # Frame.index
    task: str
    label: str  # the answer in a word or a few
    confidence: float
    answer: Mapping[str, Any]  # the task's own fields; docs/operations.md
    tier: str  # the tier that answered: its name in the bundle, e.g. "device"
    exit: int
    agreement: float | None  # what this exit was fitted to keep; of the model's own, what was measured
    codec: str | None  # the codec the device sent with; None when nothing was sent
    cut: int | None  # the cut the device sent at
    bytes_up: int  # every byte of MQTT that this frame cost on its way up from the device
    age_ms: float  # from the grab to this answer, on the device's monotonic clock
    timings: Mapping[str, float] = field(default_factory=dict)  # stage → ms; the stages of a node carry its tier
    degraded: str | None = None
    variant: int = 0  # of the first segment, where the device ran it for this answer; 0: the segment itself, or not run
    repeats: int | None = None  # the frame whose answer this repeats, because the picture has hardly changed since


@dataclass(frozen=True, slots=True)
class Dropped:
    """A frame that got no answer at all, and why. No answer is never told as "nothing there"."""

    camera: str
    frame: int
    dropped: str
    label: None = None
