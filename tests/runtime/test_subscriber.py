from __future__ import annotations

import contextlib
import socket
import threading
import time

from runtime.config import BrokerConfig
from runtime.subscriber import Subscriber
from tests.patience import until


def test_a_broker_that_takes_long_to_answer_is_waited_for_longer_and_longer() -> None:
    server = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        """Answer whoever is still there after a second."""
        with contextlib.suppress(OSError):
            while True:
                connection, _ = server.accept()
                with connection, contextlib.suppress(OSError):
                    connection.recv(4096)
                    time.sleep(1)
                    connection.sendall(bytes([0x20, 2, 0, 0]))
                    connection.recv(4096)
                    connection.sendall(bytes([0x90, 3, 0, 1, 1]))
                    connection.recv(4096)

    threading.Thread(target=serve, daemon=True).start()
    broker = BrokerConfig(host="127.0.0.1", port=server.getsockname()[1], version="3.1.1")
    subscriber = Subscriber(broker, "listener", "a/+", 60, lambda topic, payload: None, list)
    subscriber._answer_s = 0.4
    stop = threading.Event()
    running = threading.Thread(target=subscriber.run, args=(stop,))
    running.start()
    until(lambda: subscriber._acknowledged, 20)
    stop.set()
    running.join()
    server.close()
