"""Events: what comes, stays and goes before a camera, out of one answer a frame. Pure.

An event is one object that was seen (`events_objects`), or one label that a camera's pictures kept (`events_labels`):
told as `new` once, as `update` when it has changed, and as `end` once. Answers are taken in the order of their frames
(`in_order`). No answer is never "nothing there": only an answer that was neither degraded nor silent about places can
make something go. docs/events.md has the rules and the JSON.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Literal, Protocol

Corners = tuple[float, float, float, float]  # x1, y1, x2, y2 in pixels of the camera's frame
Untold = Callable[[str], None]  # called with the reason for everything that is not told

FOLLOWERS = {
    "objects": "runtime.events_objects:Objects",
    "labels": "runtime.events_labels:Labels",
}
FOLLOWS = {"detect": "objects", "classify": "labels"}  # by task; of others nothing is followed
MOST = 64  # objects followed at once, by camera


@dataclass(frozen=True, slots=True)
class Sighting:
    """One object of an answer, or one label with its score."""

    label: str
    score: float  # 0..1
    box: Corners | None = None  # None: the label of a whole picture


@dataclass(frozen=True, slots=True)
class Seen:
    """One answer. `tells`: what is not in it is not there; of a degraded answer that is not so."""

    frame: int
    captured_ns: int  # time.monotonic_ns() at the grab
    found: tuple[Sighting, ...] | None  # None: the answer does not say what or where; labels: best first
    tells: bool = True


@dataclass(frozen=True, slots=True)
class Event:
    """One word about one event. Durations only: a board may not know what time it is (docs/events.md)."""

    id: str  # unique over cameras and restarts
    type: Literal["new", "update", "end"]
    camera: str
    frame: int  # of the answer that made us say this
    label: str
    score: float  # smoothed over frames
    top_score: float  # the highest single one so far
    box: Corners | None  # smoothed over frames, in pixels of the camera's frame
    duration_ms: float  # from the first to the last frame that it was seen in
    age_ms: float | None = None  # from the grab of `frame` to this message, see `forwarding`; None: not known
    reason: Literal["gone", "replaced", "stopping"] | None = None  # of an end
    session: str = ""  # names the run of the device, see `forwarding`
    sequence: int = 0  # counts the events of all cameras of that run, from 1


@dataclass(frozen=True, slots=True)
class Settings:
    """When something is told."""

    confirm_frames: int  # answers that something must be in before it is told
    gone_ms: float  # shown to be away for so long, it has ended
    update_ms: float  # least time between two updates of one event, but for a new label


class Follower(Protocol):
    """What makes events of a camera's answers."""

    def __init__(self, camera: str, ids: Ids, settings: Settings, untold: Untold) -> None: ...

    def follow(self, seen: Seen) -> list[Event]:
        """Take the answer of a later frame than any before."""
        ...

    def present(self) -> Mapping[str, str] | None:
        """Id → label of all events that have begun and not ended; None while it is not known yet."""
        ...

    def stop(self) -> list[Event]:
        """End all events, as nobody will look any more."""
        ...


class Ids:
    """Numbers events: `<session>-<camera>-<number>`."""

    def __init__(self, session: str, camera: str) -> None:
        self._prefix = f"{session}-{camera}"
        self._count = 0

    def next(self) -> str:
        """An id that was never given before."""
        self._count += 1
        return f"{self._prefix}-{self._count}"


def open_follower(kind: str, camera: str, session: str, settings: Settings, untold: Untold) -> Follower:
    """The follower of a camera; `kind` is a key of FOLLOWERS."""
    module, name = FOLLOWERS[kind].split(":")
    chosen: type[Follower] = getattr(import_module(module), name)
    return chosen(camera, Ids(session, camera), settings, untold)


def counts(present: Mapping[str, str]) -> dict[str, int]:
    """How many of each label there are."""
    return {label: list(present.values()).count(label) for label in sorted(set(present.values()))}
