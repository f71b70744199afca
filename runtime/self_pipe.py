"""Wakes a thread that waits in select(): the self-pipe trick (D. J. Bernstein)."""

from __future__ import annotations

import contextlib
import socket


class SelfPipe:
    """A pair of sockets: `wake`, from any thread, makes this one readable until `drain`."""

    def __init__(self) -> None:
        self._near, self._far = socket.socketpair()
        for end in (self._near, self._far):
            end.setblocking(False)

    def fileno(self) -> int:
        """What select() waits for."""
        return self._near.fileno()

    def wake(self) -> None:
        """Let the thread that waits go on."""
        with contextlib.suppress(OSError):  # full, so it is awake; or closed, so it is over
            self._far.send(b"x")

    def drain(self) -> None:
        """Be readable no more."""
        with contextlib.suppress(BlockingIOError):
            self._near.recv(4096)

    def close(self) -> None:
        """Give the sockets back."""
        self._near.close()
        self._far.close()
