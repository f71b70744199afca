"""Opening a TCP or TLS connection to a broker by its name: every wait is bounded, and ends when the caller does.

The system's look-up of a name cannot be interrupted, and takes 5 to 30 s while no name server answers. So it runs in a
thread of its own, one at a time; who wants to connect waits a little for it, and then takes the address that worked
last, as a name server often is away for longer than the way to the broker.
"""

from __future__ import annotations

import errno
import os
import select
import socket
import ssl
import threading
import time
from collections.abc import Callable
from typing import Any

LOOK_UP_S = 4.0  # without an address that has worked before; with one:
LOOK_UP_AGAIN_S = 1.0
TURN_S = 0.1  # between two looks whether the caller has ended
UNDER_WAY = (errno.EINPROGRESS, errno.EWOULDBLOCK)

Address = tuple[Any, Any, int, str, Any]  # as getaddrinfo has it: family, type, protocol, canonical name, where
LookUp = Callable[[str, int], list[Address]]


class UnansweredError(TimeoutError):
    """Somebody takes the connection and does not answer."""


def look_up(host: str, port: int) -> list[Address]:
    """The addresses of a host, by whatever the system asks."""
    return list(socket.getaddrinfo(host, port, type=socket.SOCK_STREAM))


class Dialer:
    """Connects to one broker, on one thread at a time.

    Args:
        host: its name or address.
        port: of TCP.
        tls: given: the connection speaks TLS, to a broker of this name.
        ended: once it is set, every wait ends with a ConnectionAbortedError.
        look_up: gives the addresses of a name, and may take long.
    """

    def __init__(
        self,
        host: str,
        port: int,
        tls: ssl.SSLContext | None,
        ended: threading.Event,
        look_up: LookUp = look_up,
    ) -> None:
        self._host = host
        self._port = port
        self._tls = tls
        self._ended = ended
        self._look_up = look_up
        self._search: _Search | None = None
        self._worked: Address | None = None

    def dial(self, connect_s: float, answer_s: float) -> socket.socket:
        """Connect, trying one address after the other.

        Args:
            connect_s: how long an address may take to accept.
            answer_s: how long it may then be silent amid TLS.

        Raises:
            TimeoutError: nobody accepted in time; UnansweredError: accepted, and went silent before TLS stood.
            OSError: refused, no way there, no such name, no trust.
        """
        failure: OSError = OSError(f"{self._host} has no address")
        for address in self._addresses():
            try:
                sock = self._secured(self._connected(address, connect_s), answer_s)
            except ConnectionAbortedError:
                raise
            except OSError as error:
                failure = error
            else:
                self._worked = address
                return sock
        raise failure

    def _addresses(self) -> list[Address]:
        """What the name stands for; while nobody says, the address that worked last."""
        search, patience_s = self._search, 0.0
        if search is None or search.failure is not None:  # what failed then may be there by now
            search = self._search = _Search(lambda: self._look_up(self._host, self._port))
            patience_s = LOOK_UP_AGAIN_S
        if self._until(search.done.wait, LOOK_UP_S if self._worked is None else patience_s):
            self._search = None
            if search.failure is None:
                return search.found
        if self._worked is not None:
            return [self._worked]
        raise search.failure or socket.gaierror(socket.EAI_AGAIN, "no name server answers")

    def _connected(self, address: Address, connect_s: float) -> socket.socket:
        family, kind, protocol, _, where = address
        sock = socket.socket(family, kind, protocol)
        try:
            sock.setblocking(False)
            code = sock.connect_ex(where)
            if code in UNDER_WAY:
                if not self._until(_ready(sock, select.POLLOUT), connect_s):
                    raise TimeoutError(errno.ETIMEDOUT, os.strerror(errno.ETIMEDOUT))
                code = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
            if code:
                raise OSError(code, os.strerror(code))
        except BaseException:
            sock.close()
            raise
        return sock

    def _secured(self, sock: socket.socket, answer_s: float) -> socket.socket:
        if self._tls is None:
            return sock
        try:
            secured = self._tls.wrap_socket(sock, server_hostname=self._host, do_handshake_on_connect=False)
        except BaseException:
            sock.close()
            raise
        try:
            while (wanted := _wanted(secured)) is not None:
                if not self._until(_ready(secured, wanted), answer_s):
                    raise UnansweredError(errno.ETIMEDOUT, "no answer amid TLS")
        except BaseException:
            secured.close()
            raise
        return secured

    def _until(self, comes: Callable[[float], bool], seconds: float) -> bool:
        """Whether it came in time; `comes` waits for it for as long as it is told."""
        end_s = time.monotonic() + seconds
        while not self._ended.is_set():
            left_s = end_s - time.monotonic()
            if comes(max(0.0, min(left_s, TURN_S))):
                return True
            if left_s <= 0:
                return False
        raise ConnectionAbortedError(errno.ECONNABORTED, "the caller has ended")


class _Search:
    """One look-up, in a thread that nobody waits for."""

    def __init__(self, look_up: Callable[[], list[Address]]) -> None:
        self.done = threading.Event()
        self.found: list[Address] = []
        self.failure: OSError | None = None
        self._look_up = look_up
        threading.Thread(target=self._run, name="kinflow-look-up", daemon=True).start()

    def _run(self) -> None:
        try:
            self.found = self._look_up()
        except OSError as error:
            self.failure = error
        except ValueError as error:  # a label of a name may be too long
            self.failure = OSError(str(error))
        self.done.set()


def _ready(sock: socket.socket, what: int) -> Callable[[float], bool]:
    """What waits until `sock` is ready."""
    poll = select.poll()
    poll.register(sock, what)
    return lambda wait_s: bool(poll.poll(wait_s * 1000))


def _wanted(sock: ssl.SSLSocket) -> int | None:
    """Go on with TLS as far as it goes. Returns what it waits for; None: it stands."""
    try:
        sock.do_handshake()
    except ssl.SSLWantReadError:
        return select.POLLIN
    except ssl.SSLWantWriteError:
        return select.POLLOUT
    return None
