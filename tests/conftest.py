"""What many tests stand on: free ports, a real broker with the shipped configuration, a stream, honest log calls."""

from __future__ import annotations

import logging
import shutil
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import cv2
import numpy as np
import pytest
from hypothesis import settings

from tests.broker import Mosquitto, a_free_port

# Machines are shared and slow at times; how long an example takes says nothing here. Every run draws the same examples,
# so that a run says of the code only; others are looked for by: scripts/test --hypothesis-profile=explore
settings.register_profile("explore", deadline=None)
settings.register_profile("kinflow", deadline=None, derandomize=True)
settings.load_profile("kinflow")


class FormattingHandler(logging.Handler):
    """Formats every record and lets a wrong log call raise where it stands, instead of on stderr some day."""

    def emit(self, record: logging.LogRecord) -> None:
        record.getMessage()


@pytest.fixture(autouse=True)
def _log_calls_fit() -> Iterator[None]:
    handler = FormattingHandler(logging.DEBUG)
    loggers = [logging.getLogger(name) for name in ("runtime", "export")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.addHandler(handler)
        logger.setLevel(logging.DEBUG)
    yield
    for logger, level in zip(loggers, levels, strict=True):
        logger.removeHandler(handler)
        logger.setLevel(level)


@pytest.fixture(scope="session")
def free_port() -> Callable[[], int]:
    """A function that returns a TCP port of the loopback that nobody listens on."""
    return a_free_port


@pytest.fixture(scope="session")
def mosquitto_binary() -> str:
    """The path of the mosquitto program."""
    binary = shutil.which("mosquitto") or shutil.which("mosquitto", path="/usr/sbin:/usr/local/sbin:/opt/homebrew/sbin")
    if binary is None:
        pytest.fail("mosquitto is not installed; run scripts/test, or apt-get install mosquitto")
    return binary


@pytest.fixture
def start_mosquitto(
    mosquitto_binary: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[..., Mosquitto]]:
    """A function that starts a broker with the shipped configuration and, if given, more lines below it."""
    started: list[Mosquitto] = []

    def start(extra_config: str = "") -> Mosquitto:
        broker = Mosquitto(mosquitto_binary, tmp_path_factory.mktemp("mosquitto"), extra_config)
        started.append(broker)
        broker.restart()
        return broker

    yield start
    for broker in started:
        broker.kill()


@pytest.fixture
def mosquitto(start_mosquitto: Callable[..., Mosquitto]) -> Mosquitto:
    """A running broker: `host`, `port`, `kill()`, `restart()`."""
    return start_mosquitto()


class Stream:
    """An MJPEG stream over HTTP, as network cameras serve it; frame n is of the even grey n % 256.

    `pause()` keeps the connections open and sends nothing; `stop()` closes everything; `start()` serves again.
    """

    def __init__(self) -> None:
        self.port = a_free_port()
        self.url = f"http://127.0.0.1:{self.port}/stream.mjpg"
        self.sent = 0
        self.flowing = threading.Event()
        self._stopped = threading.Event()
        self._server: ThreadingHTTPServer | None = None

    def start(self) -> None:
        stream = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.send_response(200)
                self.send_header("Content-Type", "multipart/x-mixed-replace; boundary=frame")
                self.end_headers()
                try:
                    while not stream._stopped.wait(0.02):
                        if stream.flowing.is_set():
                            picture = np.full((48, 64, 3), stream.sent % 256, np.uint8)
                            jpeg = cv2.imencode(".jpg", picture)[1].tobytes()
                            head = f"--frame\r\nContent-Type: image/jpeg\r\nContent-Length: {len(jpeg)}\r\n\r\n"
                            self.wfile.write(head.encode() + jpeg + b"\r\n")
                            stream.sent += 1
                except OSError:
                    self.close_connection = True

            def log_request(self, code: int | str = "-", size: int | str = "-") -> None:
                """Say nothing."""

        self._stopped.clear()
        self.flowing.set()
        self._server = ThreadingHTTPServer(("127.0.0.1", self.port), Handler)
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def pause(self) -> None:
        self.flowing.clear()

    def stop(self) -> None:
        self._stopped.set()
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
            self._server = None


@pytest.fixture
def stream() -> Iterator[Stream]:
    """A network camera on the loopback."""
    served = Stream()
    served.start()
    yield served
    served.stop()
