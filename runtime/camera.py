"""The camera seam: an iterator of frames. What may hang for ever runs in a process of its own, which can be killed."""

from __future__ import annotations

import re
from collections.abc import Iterator
from importlib import import_module
from typing import Protocol

from runtime.config import CameraConfig
from runtime.datatypes import Frame, Pixels

CAMERAS = {
    "opencv": "runtime.camera_apart:ApartCamera",
    "rpicam": "runtime.camera_pipe:rpicam",
    "pipe": "runtime.camera_pipe:PipeCamera",
    "replay": "runtime.camera_replay:ReplayCamera",
}
# What a process of its own drives: calls that no time-out of theirs ends for certain.
SOURCES = {"opencv": "runtime.camera_opencv:OpencvCamera"}
_SECRETS = (
    (re.compile(r"://\S*@"), "://***@"),  # to the last @: a password may hold one
    (re.compile(r"\?\S*"), "?***"),
    (re.compile(r"\b(user-id|user-pw|user|password|token)=\S+", re.IGNORECASE), r"\1=***"),
)


class Camera(Protocol):
    """A source of frames."""

    def frames(self) -> Iterator[Frame]:
        """Yield frames as they come, each stamped when it was grabbed; end when the source ends.

        Raises:
            CameraError: the source cannot be opened, or gave no frame within its read time-out.
        """
        ...

    def close(self) -> None:
        """Release the source; a pending read ends soon."""
        ...


class CameraFactory(Protocol):
    """Makes cameras of one kind."""

    def __call__(self, name: str, config: CameraConfig) -> Camera:
        """Make a camera that has not been opened."""
        ...


class Room(Protocol):
    """Where a source lays its pictures, so that they need not be copied there."""

    def free(self) -> bool:
        """Whether there is a place for one more picture now."""
        ...

    def place(self, height: int, width: int) -> Pixels:
        """The place for the next picture, uint8 (height, width, 3); to be asked for only where one is free.

        Raises:
            CameraError: the picture is larger than the first one, which the places were made for.
        """
        ...


class Source(Protocol):
    """A camera that a process of its own drives."""

    def frames(self, room: Room | None = None) -> Iterator[Frame]:
        """As a camera's; the pixels lie in `room`, and while nothing is free there, frames are skipped and counted."""
        ...

    def close(self) -> None:
        """As a camera's."""
        ...


class SourceFactory(Protocol):
    """Makes sources of one kind."""

    def __call__(self, name: str, config: CameraConfig) -> Source:
        """Make a source that has not been opened."""
        ...


def open_camera(name: str, config: CameraConfig) -> Camera:
    """Make the camera that `config.kind` names.

    Raises:
        ConfigError: no retry could ever open it.
    """
    module, attribute = CAMERAS[config.kind].split(":")
    factory: CameraFactory = getattr(import_module(module), attribute)
    return factory(name, config)


def open_source(name: str, config: CameraConfig) -> Source:
    """Make the source that `config.kind` names, for a process of its own.

    Raises:
        ConfigError: no retry could ever open it.
    """
    module, attribute = SOURCES[config.kind].split(":")
    factory: SourceFactory = getattr(import_module(module), attribute)
    return factory(name, config)


def redacted(source: str) -> str:
    """`source` without what may be a secret, for logs and errors."""
    for pattern, replacement in _SECRETS:
        source = pattern.sub(replacement, source)
    return source
