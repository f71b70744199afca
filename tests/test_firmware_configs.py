"""Every shipped configuration file is loaded by the program that it is for."""

from __future__ import annotations

import configparser
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from paho.mqtt.client import Client, MQTTMessage
from paho.mqtt.enums import CallbackAPIVersion, MQTTProtocolVersion

from runtime import config
from runtime.camera import open_camera
from runtime.config import DeviceConfig, NodeConfig
from runtime.packet import HEADER, MAX_PAYLOAD_BYTES
from runtime.topics import Subtree, publish_bytes, requests
from runtime.watchdog import PERIOD_S

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

FOLDER = Path(__file__).parent.parent / "firmware_configs"
FILES = sorted(path for path in FOLDER.rglob("*") if path.is_file())
BOARDS = FOLDER / "boards"


def kind_of(path: Path) -> str:
    """What a file is, by its place and name; it is an error to ship what nothing here loads."""
    relative = path.relative_to(FOLDER).as_posix()
    for kind, pattern in {
        "board": r"boards/[a-z0-9]+(-[a-z0-9]+)+\.(device|edge|cloud)\.toml",
        "unit": r"systemd/kinflow-(device|node@)\.service",
        "broker": r"mosquitto/mosquitto\.conf",
        "acl": r"mosquitto/acl",
        "readme": r"README\.md",
    }.items():
        if re.fullmatch(pattern, relative):
            return kind
    return f"firmware_configs/{relative} is of no kind that tests/test_firmware_configs.py knows; add a test for it"


def of_kind(kind: str) -> list[Any]:
    return [pytest.param(path, id=path.name) for path in FILES if kind_of(path) == kind]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(FOLDER).as_posix())
def test_every_file_is_of_a_kind_that_is_loaded(path: Path) -> None:
    assert kind_of(path) in {"board", "unit", "broker", "acl", "readme"}, kind_of(path)


@pytest.mark.parametrize("path", of_kind("board"))
def test_a_board_config_loads_and_is_short(path: Path) -> None:
    tier = path.suffixes[-2]
    text = path.read_text("utf-8")
    assert text.startswith("# Kinflow"), "begin with a comment that says what the file is for and how to use it"
    least = 'bundle = "b"\nbroker.host = "h"'
    loaded: DeviceConfig | NodeConfig
    defaults: DeviceConfig | NodeConfig
    if tier == ".device":
        loaded, defaults = config.load(path, DeviceConfig), config.parse(least, DeviceConfig)
    else:
        loaded, defaults = config.load(path, NodeConfig), config.parse(least, NodeConfig)
        assert (loaded.uplink is not None) == (tier == ".edge")
    assert loaded.bundle == "/var/lib/kinflow/bundles/current"
    assert not re.search(r"(?m)^[^#]*(password\s*=|://\S*@)", text), "no secrets in a config"
    for key, value in tomllib.loads(text).items():
        if not isinstance(value, dict):
            assert value != getattr(defaults, key), f"{key} is the default: leave it out"


@pytest.mark.parametrize("path", of_kind("board"))
def test_what_a_board_config_suggests_in_comments_loads_too(path: Path) -> None:
    text = re.sub(r"(?m)^#(?=[\[a-z])", "", path.read_text("utf-8"))
    if path.suffixes[-2] == ".device":
        suggested = config.parse(text, DeviceConfig)
        for name, camera in suggested.camera.items():
            open_camera(name, camera)  # opens nothing yet, but refuses what could never be opened
    else:
        config.parse(text, NodeConfig)


def unit(path: Path) -> configparser.ConfigParser:
    # strict=False: systemd takes some keys, such as DeviceAllow, more than once.
    parser = configparser.ConfigParser(strict=False, interpolation=None, delimiters=("=",), comment_prefixes=("#",))
    parser.optionxform = str  # type: ignore[assignment,method-assign]
    parser.read_string(path.read_text("utf-8"))
    return parser


@pytest.mark.parametrize("path", of_kind("unit"))
def test_a_unit_starts_what_exists_and_behaves(path: Path) -> None:
    service = unit(path)["Service"]
    command = re.fullmatch(
        r"/opt/kinflow/bin/kinflow (device|node) --config /etc/kinflow/(\S+)\.toml", service["ExecStart"]
    )
    assert command is not None, service["ExecStart"]
    for tier in ["edge", "cloud"] if command[2] == "%i" else [command[2]]:
        assert list(BOARDS.glob(f"*.{tier}.toml")), f"no config in boards/ becomes /etc/kinflow/{tier}.toml"
    assert service["Type"] == "notify"
    assert int(service["WatchdogSec"]) >= 6 * PERIOD_S  # it is told three times in that time, at least
    assert service["Restart"] == "on-failure"  # which a watchdog's time-out is
    assert service["RestartPreventExitStatus"].split() == ["64", "65", "78"]
    assert service["User"] == "kinflow"
    assert "MemoryMax" in service
    assert unit(path)["Unit"]["StartLimitIntervalSec"] == "0"
    assert "network-online" not in path.read_text("utf-8")


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed")
@pytest.mark.parametrize("path", of_kind("unit"))
def test_systemd_accepts_the_unit(path: Path, tmp_path: Path) -> None:
    # systemd wants the program to exist, and this machine need not have it installed.
    text = path.read_text("utf-8").replace("/opt/kinflow/bin/kinflow", "/bin/true")
    copy = tmp_path / path.name.replace("@.", "@edge.")
    copy.write_text(text, "utf-8")
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", str(copy)], capture_output=True, text=True, check=False
    )
    complaints = [line for line in (done.stdout + done.stderr).splitlines() if "kinflow" in line]
    assert not complaints
    if "--offline" in subprocess.run(["systemd-analyze", "--help"], capture_output=True, text=True, check=True).stdout:
        command = ["systemd-analyze", "security", "--offline=yes", "--threshold=40", str(copy)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout[-200:]


def test_the_readme_names_the_folders() -> None:
    text = (FOLDER / "README.md").read_text("utf-8")
    folders = {path.name for path in FOLDER.iterdir() if path.is_dir()}
    assert set(re.findall(r"(?m)^\| `(\w+)/`", text)) == folders


class Inbox:
    """A client of the real broker that keeps what arrives."""

    def __init__(self, port: int, subscriptions: list[str], username: str | None = None) -> None:
        self.messages: list[tuple[str, bytes]] = []
        self.arrived = threading.Condition()
        self._ready = threading.Event()
        self.codes: list[str] = []
        self.client = Client(CallbackAPIVersion.VERSION2, protocol=MQTTProtocolVersion.MQTTv5)
        if username is not None:
            self.client.username_pw_set(username, f"password of {username}")
        self.client.on_message = self._received
        self.client.on_subscribe = lambda *_: self._ready.set()
        self.client.on_connect = self._connected
        self._subscriptions = subscriptions
        self.client.connect("127.0.0.1", port)
        self.client.loop_start()
        assert self._ready.wait(5), f"the broker said {self.codes}"

    def _connected(self, client: Client, userdata: Any, flags: Any, reason: Any, properties: Any) -> None:
        self.codes.append(str(reason))
        client.subscribe([(topic, 1) for topic in self._subscriptions])

    def _received(self, client: Client, userdata: Any, message: MQTTMessage) -> None:
        with self.arrived:
            self.messages.append((message.topic, bytes(message.payload)))
            self.arrived.notify_all()

    def wait_for(self, holds: Callable[[list[tuple[str, bytes]]], bool]) -> bool:
        with self.arrived:
            return self.arrived.wait_for(lambda: holds(self.messages), timeout=5)

    def topics(self) -> list[str]:
        with self.arrived:
            return [topic for topic, _ in self.messages]

    def close(self) -> None:
        self.client.disconnect()
        self.client.loop_stop()
        # A client closes its sockets only when it is deleted, and these make a circle that would delay that.
        self.client.on_connect = self.client.on_message = self.client.on_subscribe = None


def test_the_broker_carries_our_largest_packet_and_comes_back(mosquitto: Any) -> None:
    topic = Subtree("home", "d", "x" * 64).request("0" * 8, 0)
    payload = bytes(HEADER.size + MAX_PAYLOAD_BYTES)
    configured = int(re.findall(r"(?m)^max_packet_size (\d+)", (FOLDER / "mosquitto/mosquitto.conf").read_text())[0])
    assert publish_bytes(topic, len(payload), qos=1) < configured
    for _ in range(2):
        inbox = Inbox(mosquitto.port, [topic])
        inbox.client.publish(topic, payload, qos=1)
        assert inbox.wait_for(lambda messages: bool(messages))
        assert len(inbox.messages[0][1]) == len(payload)
        inbox.close()
        mosquitto.restart()
    assert "Error" not in mosquitto.log()


@pytest.fixture
def guarded_port(start_mosquitto: Any, tmp_path: Path) -> int:
    """The port of a broker that asks for names, with the shipped acl."""
    if shutil.which("mosquitto_passwd") is None:
        pytest.skip("mosquitto_passwd is not installed")
    passwords = tmp_path / "passwords"
    acl = tmp_path / "acl"
    acl.write_text((FOLDER / "mosquitto" / "acl").read_text("utf-8"), "utf-8")
    passwords.touch(mode=0o644)
    for username in ("porch", "barn", "edge", "cloud", "events", "viewer"):
        command = ["mosquitto_passwd", "-b", str(passwords), username, f"password of {username}"]
        subprocess.run(command, check=True, capture_output=True)
    ours = [parent for parent in tmp_path.parents if parent.name.startswith(("pytest-", "popen-"))]
    for path in (passwords, acl, tmp_path, *ours):
        path.chmod(path.stat().st_mode | (0o755 if path.is_dir() else 0o644))  # the broker is another user
    broker = start_mosquitto(f"\nallow_anonymous false\npassword_file {passwords}\nacl_file {acl}\n")
    return int(broker.port)


def test_the_acl_keeps_devices_apart(guarded_port: int) -> None:
    porch, barn, node = Subtree("home", "d", "porch"), Subtree("home", "d", "barn"), Subtree("home", "n", "edge")
    clients = {
        "porch": Inbox(guarded_port, [f"{porch}/#", f"{barn}/#", "#"], "porch"),
        "barn": Inbox(guarded_port, [barn.replies], "barn"),
        "edge": Inbox(guarded_port, [requests("home", "d"), requests("home", "d", "pool"), node.replies], "edge"),
        "cloud": Inbox(guarded_port, [requests("home", "n"), requests("home", "d")], "cloud"),
        "events": Inbox(guarded_port, ["kinflow/v1/home/#"], "events"),
        "viewer": Inbox(guarded_port, ["kinflow/v1/home/#"], "viewer"),
    }
    try:
        for sender, topic in [
            ("barn", barn.request("01234567", 3)),
            ("porch", porch.request("01234567", 3)),
            ("porch", barn.request("01234567", 3)),  # not its own: refused
            ("porch", barn.replies),  # posing as a node: refused
            ("porch", Subtree("elsewhere", "d", "porch").stats),  # another site: refused
            ("edge", node.request("01234567", 9)),
            ("edge", barn.replies),
            ("edge", barn.availability),  # posing as a device: refused
            ("cloud", node.replies),
            ("porch", porch.event("cam0")),
            ("events", porch.again),
            ("events", porch.replies),  # asks for events, and nothing else: refused
            ("viewer", porch.replies),  # only looks: refused
            ("porch", porch.availability),
        ]:
            clients[sender].client.publish(topic, sender.encode(), qos=1).wait_for_publish(5)
        last = (porch.availability, b"porch")
        assert clients["viewer"].wait_for(lambda messages: last in messages)
        assert sorted(clients["viewer"].messages) == sorted(
            [
                (barn.request("01234567", 3), b"barn"),
                (porch.request("01234567", 3), b"porch"),
                (node.request("01234567", 9), b"edge"),
                (barn.replies, b"edge"),
                (node.replies, b"cloud"),
                (porch.event("cam0"), b"porch"),
                (porch.again, b"events"),
                last,
            ]
        )
        assert clients["barn"].wait_for(lambda messages: len(messages) == 1)
        assert clients["porch"].wait_for(lambda messages: last in messages)
        own = {porch.request("01234567", 3), porch.event("cam0"), porch.again, porch.availability}
        assert set(clients["porch"].topics()) == own
        assert clients["events"].wait_for(lambda messages: len(messages) == 1)
        assert clients["events"].topics() == [porch.event("cam0")]
        asked = {barn.request("01234567", 3), porch.request("01234567", 3)}
        assert clients["edge"].wait_for(lambda messages: len(messages) == 5)
        assert set(clients["edge"].topics()) == asked | {node.replies}
        assert clients["cloud"].wait_for(lambda messages: len(messages) == 1)
        assert clients["cloud"].topics() == [node.request("01234567", 9)]
    finally:
        for client in clients.values():
            client.close()


def test_defaults_in_a_config_are_spelled_as_the_site_in_the_acl() -> None:
    site = msgspec.structs.fields(DeviceConfig)
    default = next(field.default for field in site if field.name == "site")
    rules = re.findall(r"(?m)^(?:pattern|topic) \w+ kinflow/v1/(\w+)/", (FOLDER / "mosquitto" / "acl").read_text())
    assert rules
    assert set(rules) == {default}
