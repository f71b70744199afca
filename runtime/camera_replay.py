"""A video file or a folder of images as a camera: for demos, tests and measurements."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from functools import partial
from pathlib import Path

import cv2
import numpy as np

from runtime.config import CameraConfig
from runtime.datatypes import Frame, Pixels
from runtime.errors import CameraError

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".webp"})
FOLDER_FPS = 10.0  # of a folder without max_fps, and of a clip that does not know its own

_Read = Callable[[], Pixels]  # decodes the frame that was just reached; BGR


class ReplayCamera:
    """Frames of a file in order, at the file's own pace or as fast as they are taken.

    The index of a frame is its place in the source, `first_frame` included; when looping it goes on counting.
    """

    def __init__(self, name: str, config: CameraConfig) -> None:
        # One thread: more make a busy small board slower, and the preprocessing after us shares this setting.
        cv2.setNumThreads(1)
        self._name = name
        self._config = config
        self._path = Path(config.source)
        self._closed = threading.Event()

    def frames(self) -> Iterator[Frame]:
        """Yield frames until the source or `frames` ends.

        Raises:
            CameraError: the source is missing, empty or damaged.
        """
        if not self._path.exists():
            raise CameraError(f"camera {self._name}: {self._path} does not exist; give a video file or a folder")
        images = self._images() if self._path.is_dir() else None
        fps = (self._config.max_fps or FOLDER_FPS) if images is not None else self._clip_fps()
        pace = _Pace(fps, self._config.max_fps, self._config.stalls, self._closed) if self._config.realtime else None
        index = self._config.first_frame
        given = 0
        while True:
            before = index
            # Closed by hand, so that a consumer that stops early leaves no decoder open.
            with closing(self._clip() if images is None else self._folder(images)) as source:
                for read in source:
                    if pace is None or pace.keeps():
                        captured_ns = time.monotonic_ns()
                        pixels = cv2.cvtColor(read(), cv2.COLOR_BGR2RGB).astype(np.uint8, copy=False)
                        if self._closed.is_set():
                            return
                        yield Frame(camera=self._name, captured_ns=captured_ns, pixels=pixels, index=index)
                        given += 1
                    index += 1
                    if self._closed.is_set() or given == self._config.frames:
                        return
            if index == before:
                raise CameraError(
                    f"camera {self._name}: {self._path} has no frame {self._config.first_frame}; "
                    "give another file or a lower first_frame"
                )
            if not self._config.loop:
                return

    def length(self) -> int:
        """How many frames the source has; of a clip, what its header says.

        Raises:
            CameraError: the source is missing, empty or damaged.
        """
        if not self._path.exists():
            raise CameraError(f"camera {self._name}: {self._path} does not exist; give a video file or a folder")
        if self._path.is_dir():
            return len(self._images())
        clip = self._open()
        frames = int(clip.get(cv2.CAP_PROP_FRAME_COUNT))
        clip.release()
        return max(frames, 0)

    def close(self) -> None:
        """Make `frames` end, at once when it waits."""
        self._closed.set()

    def _images(self) -> list[Path]:
        images = sorted(path for path in self._path.iterdir() if path.suffix.lower() in IMAGE_SUFFIXES)
        if not images:
            raise CameraError(
                f"camera {self._name}: the folder {self._path} holds no images; "
                f"put in files that end in {', '.join(sorted(IMAGE_SUFFIXES))}"
            )
        return images

    def _folder(self, images: list[Path]) -> Generator[_Read, None, None]:
        for path in images[self._config.first_frame :]:
            yield partial(self._image, path)

    def _image(self, path: Path) -> Pixels:
        pixels = cv2.imread(str(path), cv2.IMREAD_COLOR)
        if pixels is None:
            raise CameraError(f"camera {self._name}: {path} cannot be read as an image; replace or remove it")
        return pixels.astype(np.uint8, copy=False)

    def _open(self) -> cv2.VideoCapture:
        clip = cv2.VideoCapture(str(self._path), cv2.CAP_FFMPEG)
        if not clip.isOpened():
            raise CameraError(f"camera {self._name}: {self._path} cannot be read as a video; give another file")
        return clip

    def _clip_fps(self) -> float:
        clip = self._open()
        fps = float(clip.get(cv2.CAP_PROP_FPS))
        clip.release()
        return fps if 0 < fps <= 1000 else FOLDER_FPS

    def _clip(self) -> Generator[_Read, None, None]:
        clip = self._open()

        def decode() -> Pixels:
            done, pixels = clip.retrieve()
            if not done:
                raise CameraError(f"camera {self._name}: a frame of {self._path} is damaged; give another file")
            return pixels.astype(np.uint8, copy=False)

        try:
            # Grabbing is exact; seeking by CAP_PROP_POS_FRAMES lands beside the frame with some encoders.
            position = 0
            while clip.grab():
                if position >= self._config.first_frame:
                    yield decode
                position += 1
        finally:
            clip.release()


class _Pace:
    """Waits for each frame of a source to be due, and leaves out those above the wanted rate or due in a stall."""

    def __init__(
        self, fps: float, max_fps: float | None, stalls: tuple[tuple[float, float], ...], closed: threading.Event
    ) -> None:
        self._fps = fps
        self._stalls = stalls
        self._share = min(1.0, max_fps / fps) if max_fps else 1.0
        self._closed = closed
        self._start_ns = time.monotonic_ns()
        self._count = 0

    def keeps(self) -> bool:
        """Wait until the next frame is due; whether it is one of those to keep."""
        count, self._count = self._count, self._count + 1
        if self._share < 1.0 and int(count * self._share) == int((count - 1) * self._share) and count:
            return False
        due_s = (self._start_ns - time.monotonic_ns()) / 1e9 + count / self._fps
        if due_s > 0:
            self._closed.wait(due_s)
        return not any(start_s <= count / self._fps < start_s + length_s for start_s, length_s in self._stalls)
