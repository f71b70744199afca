from __future__ import annotations

import contextlib
import math
import socket
import threading
import time
from collections.abc import Iterator

import pytest

from runtime.scenario import Outage, Phase, Scenario, Way
from runtime.shaper import MAX_CONNECTIONS, Shaper
from tests.patience import until

OPEN = Way()


def phase(way: Way, duration_s: float = math.inf, start_s: float = 0.0, outage: Outage = "none") -> Phase:
    return Phase("", start_s, duration_s, way, way, outage)


class Echo:
    """Gives back what it gets, and keeps it."""

    def __init__(self) -> None:
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.address: tuple[str, int] = self.listener.getsockname()
        self.heard: list[bytes] = []
        self.reading = threading.Event()
        self.reading.set()
        self.thread = threading.Thread(target=self._accept, daemon=True)
        self.thread.start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = self.listener.accept()
                threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        with connection, contextlib.suppress(OSError):
            while self.reading.wait(20) and (data := connection.recv(65536)):
                self.heard.append(data)
                connection.sendall(data)

    def close(self) -> None:
        self.reading.set()
        with contextlib.suppress(OSError):
            self.listener.shutdown(socket.SHUT_RDWR)
        self.listener.close()
        self.thread.join(10)


@pytest.fixture
def echo() -> Iterator[Echo]:
    server = Echo()
    yield server
    server.close()


def connect(shaper: Shaper) -> socket.socket:
    return socket.create_connection(shaper.address, 20)


def read(sock: socket.socket, count: int) -> bytes:
    found = b""
    while len(found) < count and (data := sock.recv(65536)):
        found += data
    return found


@pytest.mark.parametrize(
    "way", [OPEN, Way(rate=2e6, delay_s=0.01, jitter_s=0.005, loss=0.01), Way(rate=300_000, loss=0.05)]
)
def test_bytes_pass_unchanged_both_ways(echo: Echo, way: Way) -> None:
    data = bytes(range(256)) * 800
    with Shaper(echo.address, Scenario((phase(way),))) as shaper, connect(shaper) as sock:
        sender = threading.Thread(target=sock.sendall, args=(data,))
        sender.start()
        assert read(sock, len(data)) == data
        sender.join()
        until(lambda: shaper.bytes_passed() == [(len(data), len(data))])
        sock.shutdown(socket.SHUT_WR)
        assert read(sock, 1) == b"", "the end of the stream passes as well, and comes back"


def test_a_round_trip_takes_at_least_both_delays(echo: Echo) -> None:
    with Shaper(echo.address, Scenario((phase(Way(delay_s=0.1)),))) as shaper, connect(shaper) as sock:
        start_s = time.monotonic()
        sock.sendall(b"x")
        assert read(sock, 1) == b"x"
        assert time.monotonic() - start_s >= 0.2


def test_a_slow_link_makes_its_sender_wait(echo: Echo) -> None:
    with Shaper(echo.address, Scenario((phase(Way(rate=0.0)),))) as shaper, connect(shaper) as sock:
        sock.setblocking(False)
        taken = 0
        with contextlib.suppress(BlockingIOError):
            while taken < 64 << 20:
                taken += sock.send(bytes(65536))
        assert taken < 4 << 20, "kernels and the proxy hold little, as before a real link"
        assert shaper.bytes_passed() == [(0, 0)]


def test_a_sink_that_does_not_read_stops_the_sender_and_loses_nothing(echo: Echo) -> None:
    echo.reading.clear()
    data = bytes(range(256)) * (4 << 12)
    with Shaper(echo.address, Scenario((phase(OPEN),))) as shaper, connect(shaper) as sock:
        sender = threading.Thread(target=sock.sendall, args=(data,))
        sender.start()
        time.sleep(0.2)
        echo.reading.set()
        assert read(sock, len(data)) == data
        sender.join()


def test_phases_follow_the_clock_that_begin_starts(echo: Echo) -> None:
    scenario = Scenario((phase(OPEN, 1e6), phase(Way(rate=0.0), 1e6, 1e6), phase(OPEN, 1e6, 2e6)))
    with Shaper(echo.address, scenario) as shaper, connect(shaper) as sock:
        sock.sendall(b"one")
        assert read(sock, 3) == b"one"
        shaper.begin(time.monotonic() - 1.5e6)
        time.sleep(0.1)
        sock.sendall(b"two")
        sock.settimeout(0.3)
        with pytest.raises(TimeoutError):
            sock.recv(3)
        assert echo.heard == [b"one"]
        shaper.begin(time.monotonic() - 2.5e6)
        sock.settimeout(20)
        assert read(sock, 3) == b"two", "TCP loses nothing, it only waits"
        until(lambda: shaper.bytes_passed() == [(3, 3), (0, 0), (3, 3)])


def test_a_refusing_link_resets_what_is_there_and_refuses_what_comes(echo: Echo) -> None:
    scenario = Scenario((phase(OPEN, 1e6), phase(OPEN, 1e6, 1e6, "refused"), phase(OPEN, 1e6, 2e6)))
    with Shaper(echo.address, scenario) as shaper:
        with connect(shaper) as sock:
            shaper.begin(time.monotonic() - 1.5e6)
            with pytest.raises(ConnectionResetError):
                sock.recv(1)
        until(lambda: _refused(shaper))
        shaper.begin(time.monotonic() - 2.5e6)
        until(lambda: _reachable(shaper))


def _refused(shaper: Shaper) -> bool:
    try:
        connect(shaper).close()
    except ConnectionRefusedError:
        return True
    except ConnectionResetError:  # it stopped listening amid the handshake
        pass
    return False


def _reachable(shaper: Shaper) -> bool:
    try:
        connect(shaper).close()
    except (ConnectionRefusedError, ConnectionResetError):  # reset: it stopped listening amid the handshake
        return False
    return True


def test_a_broker_that_is_down_is_refused_and_its_connections_are_left_to_it(echo: Echo) -> None:
    with Shaper(echo.address, Scenario((phase(OPEN),))) as shaper, connect(shaper) as sock:
        sock.sendall(b"x")
        assert read(sock, 1) == b"x"
        shaper.refuse(True)
        until(lambda: not _reachable(shaper))
        sock.sendall(b"y")
        assert read(sock, 1) == b"y"
        shaper.refuse(False)
        until(lambda: _reachable(shaper))


def test_a_cut_lets_half_a_packet_pass_and_no_more(echo: Echo) -> None:
    done = threading.Event()
    with Shaper(echo.address, Scenario((phase(OPEN),))) as shaper, connect(shaper) as sock:
        sock.sendall(b"whole")
        assert read(sock, 5) == b"whole"
        shaper.cut(done.set)
        time.sleep(0.1)
        sock.sendall(b"0123456789")
        assert done.wait(20)
        with pytest.raises(ConnectionResetError):
            read(sock, 10)
        until(lambda: b"".join(echo.heard) in (b"whole", b"whole01234"))
        with connect(shaper) as again:
            again.sendall(b"next")
            assert read(again, 4) == b"next", "only one packet was asked for"


def test_reset_ends_every_connection(echo: Echo) -> None:
    with Shaper(echo.address, Scenario((phase(OPEN),))) as shaper, connect(shaper) as one, connect(shaper) as two:
        for sock in (one, two):
            sock.sendall(b"x")
            assert read(sock, 1) == b"x"
        shaper.reset()
        for sock in (one, two):
            with pytest.raises(ConnectionResetError):
                sock.recv(1)


def test_a_target_that_is_gone_resets_its_client(echo: Echo) -> None:
    echo.close()
    with Shaper(echo.address, Scenario((phase(OPEN),))) as shaper:
        assert _resets(shaper)


def _resets(shaper: Shaper) -> bool:
    try:
        with connect(shaper) as sock:
            sock.sendall(b"anybody there?")
            return sock.recv(1) == b""
    except ConnectionResetError:
        return True


def test_half_open_connections_are_bounded(echo: Echo) -> None:
    before = threading.active_count()
    with contextlib.ExitStack() as stack:
        shaper = stack.enter_context(Shaper(echo.address, Scenario((phase(Way(rate=0.0)),))))
        socks = [stack.enter_context(connect(shaper)) for _ in range(MAX_CONNECTIONS + 5)]
        until(lambda: len(shaper._pairs) == MAX_CONNECTIONS)
        with pytest.raises(ConnectionResetError):
            socks[0].recv(1)
    until(lambda: threading.active_count() <= before)


def test_nothing_of_a_connection_tried_in_vain_ever_arrives(echo: Echo) -> None:
    scenario = Scenario((phase(Way(rate=0.0), 1e6), phase(OPEN, 1e6, 1e6)))
    with Shaper(echo.address, scenario) as shaper:
        for _ in range(3):
            with connect(shaper) as sock:
                sock.sendall(b"in vain")
        until(lambda: shaper._accepted == 3 and not shaper._pairs)
        shaper.begin(time.monotonic() - 1.5e6)
        with connect(shaper) as sock:
            sock.sendall(b"now")
            assert read(sock, 3) == b"now"
        assert echo.heard == [b"now"]
