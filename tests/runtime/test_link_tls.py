"""A link over TLS to a real broker, whose certificate is made for the occasion."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from runtime.link_mqtt import MqttLink
from tests.patience import until


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A certificate of `localhost`, signed by itself, and its key."""
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.fail("openssl is not installed; apt-get install openssl")
    folder = tmp_path_factory.mktemp("certificate")
    given, key = folder / "localhost.pem", folder / "localhost.key"
    made = ["req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-keyout", str(key), "-out", str(given)]
    named = ["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost"]
    subprocess.run([openssl, *made, *named], check=True, capture_output=True)
    return given, key


@pytest.fixture
def secure(
    start_mosquitto: Callable[..., Any], free_port: Callable[[], int], certificate: tuple[Path, Path]
) -> Callable[[str], SimpleNamespace]:
    """Starts a broker that speaks TLS, and gives its address under a name."""
    port = free_port()
    given, key = certificate
    start_mosquitto(f"user root\nlistener {port} 127.0.0.1\ncertfile {given}\nkeyfile {key}\n")
    return lambda host: SimpleNamespace(address=(host, port))


def test_messages_of_any_size_go_both_ways(
    secure: Callable[[str], SimpleNamespace], certificate: tuple[Path, Path], connect: Callable[..., MqttLink]
) -> None:
    heard: list[bytes] = []
    hear = ("a", lambda topic, payload: heard.append(payload))
    link = connect(secure("localhost"), hear=hear, ca_file=str(certificate[0]))
    payloads = [b"small", bytes(range(256)) * 8_000, b"last"]
    for payload in payloads:
        assert link.publish("a", payload, qos=1) > 0
    until(lambda: heard == payloads)


def test_a_broker_of_another_name_is_not_trusted(
    secure: Callable[[str], SimpleNamespace],
    certificate: tuple[Path, Path],
    make_link: Callable[..., MqttLink],
    caplog: pytest.LogCaptureFixture,
) -> None:
    link = make_link(secure("127.0.0.1"), ca_file=str(certificate[0]))
    link.start()
    until(lambda: "certificate verify failed" in caplog.text)
    assert not link.connected
