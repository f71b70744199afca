"""Pictures in memory that two processes share: one lays them down, the other looks at them where they lie.

The memory has no name and no file, so nothing is left of it however the processes end. It holds a few places of one
picture each, and a socket carries who may use which: a picture's place is the reader's from the message that tells of
it until the reader has let go of the last array over it, which it says with one byte.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import socket
import threading
import weakref
from collections import deque

import msgspec
import numpy as np

from runtime.datatypes import Pixels
from runtime.errors import CameraError

# One that is being answered, one that waits, one that replaces it, and one that is being laid.
PLACES = 4
MAX_MESSAGE_BYTES = 65_536


class Laid(msgspec.Struct, tag="laid", array_like=True, frozen=True):
    """A picture lies in a place; the fields of a Frame."""

    place: int
    place_bytes: int
    height: int
    width: int
    captured_ns: int
    index: int
    skipped: int


class Started(msgspec.Struct, tag="started", array_like=True, frozen=True):
    """The other process runs; it begins to open the camera."""


class Failed(msgspec.Struct, tag="failed", array_like=True, frozen=True):
    """A CameraError: its sentence and its reason."""

    sentence: str
    reason: str


Message = Started | Laid | Failed


class Writer:
    """The side that lays pictures; a `Room`. Takes places back on a thread of its own, and ends when told `gone`."""

    def __init__(self, channel: socket.socket, memory_fd: int) -> None:
        self._channel = channel
        self._memory_fd = memory_fd
        self._memory: mmap.mmap | None = None
        self._place_bytes = 0
        self._free: deque[int] = deque(range(PLACES))
        self._taken = -1
        self.gone = threading.Event()

    def free(self) -> bool:
        """Whether there is a place for one more picture now."""
        return bool(self._free)

    def place(self, height: int, width: int) -> Pixels:
        """The place for the next picture, uint8 (height, width, 3); the first one decides how large places are.

        Raises:
            CameraError: the picture is larger than the first one.
        """
        needed = height * width * 3
        if self._memory is None:
            self._place_bytes = -(-needed // mmap.PAGESIZE) * mmap.PAGESIZE
            os.ftruncate(self._memory_fd, PLACES * self._place_bytes)
            self._memory = mmap.mmap(self._memory_fd, PLACES * self._place_bytes)
        if needed > self._place_bytes:
            raise CameraError(f"pictures have grown to {width}x{height}; the camera is opened again", "resized")
        self._taken = self._free.popleft()
        flat = np.frombuffer(self._memory, np.uint8, needed, self._taken * self._place_bytes)
        return flat.reshape(height, width, 3)

    def tell(self, captured_ns: int, index: int, skipped: int, pixels: Pixels) -> None:
        """Hand the picture over that was laid last."""
        height, width = pixels.shape[:2]
        self.send(Laid(self._taken, self._place_bytes, height, width, captured_ns, index, skipped))

    def send(self, message: Message) -> None:
        """Send a message.

        Raises:
            OSError: the other side has gone.
        """
        self._channel.sendall(msgspec.msgpack.encode(message))

    def take_back(self) -> None:
        """Take places back until the other side has gone."""
        with contextlib.suppress(OSError):
            while data := self._channel.recv(PLACES):
                self._free.extend(data)
        self.gone.set()


class Reader:
    """The side that looks at pictures. The arrays stay valid after `close`, and whatever becomes of the writer."""

    def __init__(self, channel: socket.socket, memory_fd: int) -> None:
        self._channel = channel
        self._memory_fd = memory_fd
        self._memory: mmap.mmap | None = None
        self._held: set[int] = set()

    def receive(self, timeout_s: float) -> Message | None:
        """The next message; None when the writer has gone.

        Raises:
            TimeoutError: there was none for `timeout_s` seconds.
            OSError: this side was closed.
        """
        self._channel.settimeout(timeout_s)
        try:
            data = self._channel.recv(MAX_MESSAGE_BYTES)
        except ConnectionResetError:
            # Told first, and once, when the writer went without having read all that was given back; what it had said
            # before comes after that.
            data = self._channel.recv(MAX_MESSAGE_BYTES)
        return msgspec.msgpack.decode(data, type=Message) if data else None

    def pixels(self, laid: Laid) -> Pixels:
        """The picture of a message, read-only uint8 (height, width, 3): where it lies, or copied if places run out."""
        if self._memory is None:
            self._memory = mmap.mmap(self._memory_fd, PLACES * laid.place_bytes, access=mmap.ACCESS_READ)
        shape = (laid.height, laid.width, 3)
        flat = np.frombuffer(self._memory, np.uint8, laid.height * laid.width * 3, laid.place * laid.place_bytes)
        if len(self._held) >= PLACES - 1:  # whoever keeps pictures for long must not stop the camera
            pixels = flat.reshape(shape).copy()
            self._give_back(laid.place)
            return pixels
        self._held.add(laid.place)
        weakref.finalize(flat, self._give_back, laid.place).atexit = False
        return flat.reshape(shape)  # a view: `flat` lives as long as any array over it

    def wake(self) -> None:
        """Make a pending `receive` end, now and for ever."""
        with contextlib.suppress(OSError):
            self._channel.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Close the socket and the descriptor of the memory."""
        self._channel.close()
        os.close(self._memory_fd)

    def _give_back(self, place: int) -> None:
        self._held.discard(place)
        with contextlib.suppress(OSError):  # the writer has gone, or this side was closed
            self._channel.send(bytes([place]), socket.MSG_DONTWAIT)
