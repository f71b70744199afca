"""The process that drives a camera whose calls may hang for ever; `camera_apart` starts and kills it."""

from __future__ import annotations

import os
import socket
import threading

import msgspec

from runtime.camera import open_source
from runtime.config import CameraConfig
from runtime.errors import CameraError
from runtime.shared_frames import MAX_MESSAGE_BYTES, Failed, Started, Writer


def main(channel_fd: int, memory_fd: int) -> None:
    """Lay a camera's pictures into shared memory until the other side goes.

    Args:
        channel_fd: a Unix socket of kind SEQPACKET; its first message is (camera's name, its CameraConfig).
        memory_fd: empty memory, to be made as large as the pictures want it.
    """
    channel = socket.socket(fileno=channel_fd)
    name, config = msgspec.msgpack.decode(channel.recv(MAX_MESSAGE_BYTES), type=tuple[str, CameraConfig])
    room = Writer(channel, memory_fd)
    threading.Thread(target=_end_with_parent, args=(room,), daemon=True).start()
    try:
        room.send(Started())
        for frame in open_source(name, config).frames(room):
            room.tell(frame.captured_ns, frame.index, frame.skipped, frame.pixels)
    except CameraError as error:
        sentence = str(error) if error.reason != "resized" else f"camera {name}: {error}"
        room.send(Failed(sentence, error.reason))
    except OSError:
        if not room.gone.wait(1.0):
            raise


def _end_with_parent(room: Writer) -> None:
    room.take_back()
    os._exit(0)  # the camera may hang in a call of its own, and nobody looks at its pictures any more
