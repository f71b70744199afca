from __future__ import annotations

import socket
import threading
from collections.abc import Callable
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from paho.mqtt.client import Client, topic_matches_sub
from paho.mqtt.enums import CallbackAPIVersion, MQTTProtocolVersion

from runtime.topics import Subtree, publish_bytes, report, reports, requests, sender, valid_id

V5, V311 = MQTTProtocolVersion.MQTTv5, MQTTProtocolVersion.MQTTv311
PUBLISH, PUBACK = 3, 4
ids = st.text("abcxyzABCXYZ0189_-", min_size=1, max_size=64)


class Sink:
    """Speaks just enough MQTT on the loopback to be published to, and notes the size of every PUBLISH it read."""

    def __init__(self, protocol: int) -> None:
        self._protocol = protocol
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self.sizes: list[int] = []
        self._thread = threading.Thread(target=self._serve, name="sink")
        self._thread.start()

    def _serve(self) -> None:
        with self._listener, self._listener.accept()[0] as connection, connection.makefile("rb") as stream:
            while first := stream.read(1):
                length = header = 0
                while True:
                    digit = stream.read(1)[0]
                    length |= (digit & 0x7F) << 7 * header
                    header += 1
                    if digit < 0x80:
                        break
                body = stream.read(length)
                if first[0] >> 4 == 1:
                    connection.sendall(b"\x20\x03\x00\x00\x00" if self._protocol == V5 else b"\x20\x02\x00\x00")
                elif first[0] >> 4 == PUBLISH:
                    self.sizes.append(1 + header + length)
                    if first[0] & 0x06:
                        topic_bytes = int.from_bytes(body[:2], "big")
                        connection.sendall(bytes([PUBACK << 4, 2]) + body[2 + topic_bytes : 4 + topic_bytes])

    def join(self) -> list[int]:
        self._thread.join(10)
        assert not self._thread.is_alive()
        return self.sizes


@pytest.mark.parametrize("protocol", [V5, V311], ids=["5", "3.1.1"])
@pytest.mark.parametrize("qos", [0, 1])
def test_publish_bytes_are_those_that_paho_puts_on_the_wire(protocol: MQTTProtocolVersion, qos: int) -> None:
    topics = (Subtree("home", "d", "cam").request("0123abcd", 1), "kinflow/v1/Küche/d/cam/res")
    messages = []
    for topic in topics:
        around = 2 + len(topic.encode()) + (2 if qos else 0) + (1 if protocol == V5 else 0)
        for limit in (127, 16_383, 2_097_151):
            messages += [(topic, limit - around + more) for more in (-1, 0, 1, 2)]
        messages += [(topic, 0), (topic, 44)]
    sink = Sink(protocol)
    client = Client(CallbackAPIVersion.VERSION2, client_id="test", protocol=protocol)
    client.connect("127.0.0.1", sink.port)
    client.loop_start()
    for topic, size in messages:
        client.publish(topic, bytes(size), qos).wait_for_publish(10)
    client.disconnect()
    client.loop_stop()
    expected = [publish_bytes(topic, size, qos=qos, mqtt5=protocol == V5) for topic, size in messages]
    assert sink.join() == expected


@given(ids, st.sampled_from(["d", "n"]), ids, ids, st.integers(0, 255), ids)
def test_a_request_topic_is_matched_by_the_filter_and_names_its_sender(
    site: str, role: str, name: str, pool: str, cut: int, key8: str
) -> None:
    subtree = Subtree(site, "d" if role == "d" else "n", name)
    topic = subtree.request(key8, cut)
    assert topic_matches_sub(requests(site, subtree.role), topic)
    assert requests(site, subtree.role, pool) == f"$share/{pool}/{requests(site, subtree.role)}"
    assert sender(topic) == subtree


TREE: list[tuple[Callable[[Subtree], str], str]] = [
    (str, "kinflow/v1/home/d/cam"),
    (lambda tree: tree.availability, "kinflow/v1/home/d/cam/availability"),
    (lambda tree: tree.birth, "kinflow/v1/home/d/cam/birth"),
    (lambda tree: tree.stats, "kinflow/v1/home/d/cam/stats"),
    (lambda tree: tree.replies, "kinflow/v1/home/d/cam/res"),
    (lambda tree: tree.request("0123abcd", 2), "kinflow/v1/home/d/cam/req/0123abcd/2"),
    (lambda tree: tree.result("front"), "kinflow/v1/home/d/cam/cam/front/result"),
    (lambda tree: tree.camera_status("front"), "kinflow/v1/home/d/cam/cam/front/status"),
]


@pytest.mark.parametrize(("make", "topic"), TREE, ids=[topic for _, topic in TREE])
def test_every_topic_lies_below_its_senders_own_id(make: Callable[[Subtree], str], topic: str) -> None:
    assert make(Subtree("home", "d", "cam")) == topic
    assert sender(topic) == (Subtree("home", "d", "cam") if "/req/" in topic else None)


@pytest.mark.parametrize(
    "topic",
    [
        "",
        "/" * 7,
        "kinflow/v1/home/d/cam/req/0123abcd",
        "kinflow/v1/home/d/cam/req/0123abcd/1/more",
        "kinflow/v1/home/x/cam/req/0123abcd/1",
        "kinflow/v2/home/d/cam/req/0123abcd/1",
        "other/v1/home/d/cam/req/0123abcd/1",
        "kinflow/v1//d/cam/req/0123abcd/1",
        "kinflow/v1/home/d//req/0123abcd/1",
        "kinflow/v1/home/d/+/req/0123abcd/1",
        "kinflow/v1/home/d/cam\n/req/0123abcd/1",
        "kinflow/v1/home/d/cam/res/0123abcd/1",
    ],
)
def test_what_is_no_request_has_no_sender(topic: str) -> None:
    assert sender(topic) is None


@given(st.text(max_size=200))
def test_any_topic_has_a_sender_or_none(topic: str) -> None:
    assert sender(topic) is None


@pytest.mark.parametrize(
    ("name", "valid"),
    [
        ("cam", True),
        ("a" * 64, True),
        ("A-Z_09", True),
        ("", False),
        ("a" * 65, False),
        ("a/b", False),
        ("a+b", False),
        ("#", False),
        ("$share", False),
        ("a b", False),
        ("cam\n", False),
        ("ü", False),
        ("٣", False),
    ],
)
def test_an_id_is_ascii_letters_digits_dash_and_underscore(name: str, valid: bool) -> None:
    assert valid_id(name) is valid


@given(ids, st.sampled_from("dn"), ids, ids)
def test_every_report_is_heard_and_read(site: str, role: Literal["d", "n"], name: str, camera: str) -> None:
    own = Subtree(site, role, name)
    told = {
        own.availability: (None, "availability"),
        own.birth: (None, "birth"),
        own.stats: (None, "stats"),
        own.plan: (None, "plan"),
        own.result(camera): (camera, "result"),
        own.camera_status(camera): (camera, "status"),
        own.preview(camera): (camera, "preview"),
    }
    for topic, said in told.items():
        assert sum(topic_matches_sub(wanted, topic) for wanted in reports(site)) == 1
        assert report(topic) == (own, *said)
    for topic in (own.replies, own.request("0123abcd", 3)):
        assert not any(topic_matches_sub(wanted, topic) for wanted in reports(site))


@given(st.text("/abd+#kinflow1v", max_size=60))
def test_what_is_no_report_is_none_or_matches_a_filter(text: str) -> None:
    read = report(f"kinflow/v1/{text}")
    assert read is None or f"kinflow/v1/{text}".startswith(f"{read[0]}/")
    assert report(text) is None or text.startswith("kinflow/v1/")
