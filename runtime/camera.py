"""The camera seam: an iterator of frames, and the thread that always holds the latest one."""

from __future__ import annotations

from collections.abc import Iterator
from importlib import import_module
from typing import Protocol

from runtime.config import CameraConfig
from runtime.datatypes import Frame

CAMERAS = {"opencv": "runtime.camera_opencv:OpencvCamera", "replay": "runtime.camera_replay:ReplayCamera"}


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


def open_camera(name: str, config: CameraConfig) -> Camera:
    """Make the camera that `config.kind` names."""
    module, attribute = CAMERAS[config.kind].split(":")
    factory: CameraFactory = getattr(import_module(module), attribute)
    return factory(name, config)
