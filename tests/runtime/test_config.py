from __future__ import annotations

import re
import socket
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime.config import BrokerConfig, CameraConfig, DeviceConfig, NodeConfig, load, parse
from runtime.errors import ConfigError
from runtime.topics import valid_id

LEAST = 'bundle = "kin"\n[broker]\nhost = "box"\n'
DEVICE, NODE = DeviceConfig, NodeConfig


@pytest.mark.parametrize("kind", [DEVICE, NODE])
def test_a_broker_and_a_bundle_are_enough(kind: type[Any]) -> None:
    config = parse(LEAST, kind)
    assert config == kind(bundle="kin", broker=BrokerConfig(host="box"), id=config.id)
    assert valid_id(config.id)
    assert config.id == re.sub(r"[^A-Za-z0-9_-]", "-", socket.gethostname())[:64]


def test_a_device_without_a_camera_table_has_one_camera() -> None:
    assert parse(LEAST, DEVICE).camera == {"cam0": CameraConfig()}


def test_every_table_is_read() -> None:
    config = parse(
        'id = "cam"\n' + LEAST + "port = 8883\n[camera.front]\nsource = '/dev/video2'\nmax_fps = 10\n[camera.back]\n",
        DEVICE,
    )
    assert (config.id, config.broker.port) == ("cam", 8883)
    assert config.camera == {"front": CameraConfig(source="/dev/video2", max_fps=10.0), "back": CameraConfig()}
    node = parse(LEAST + '[uplink]\ncodec = "raw"\nsite = "cloud"\n[uplink.broker]\nhost = "far"\n', NODE)
    assert node.uplink is not None
    assert node.uplink.broker == BrokerConfig(host="far")


DEVICE_KEYS = (
    "agreement, between_frames, broker, budget_ms, bundle, camera, codec, early_exits, events, gate, "
    "gate_max_age_ms, id, last_segment, max_in_flight, objective, preview, results, site, stats_interval_s, threads"
)
ID_RULE = "must be 1 to 64 letters, digits, '_' or '-': it becomes part of a topic"
WRONG: list[tuple[type[Any], str, str]] = [
    (DEVICE, 'bundel = "kin"\n' + LEAST, "bundel: unknown key; did you mean bundle?"),
    (DEVICE, "budget = 5\n" + LEAST, "budget: unknown key; did you mean budget_ms?"),
    (DEVICE, "zzz = 1\n" + LEAST, f"zzz: unknown key; known keys: {DEVICE_KEYS}"),
    (DEVICE, '"a\\nb" = 1\n' + LEAST, f"a\\nb: unknown key; known keys: {DEVICE_KEYS}"),
    (DEVICE, "gate = 'on'\n" + LEAST, "gate: 'on' is none of auto, off or a number from 0 to 255"),
    (DEVICE, "gate = 300\n" + LEAST, "gate: 300.0 is none of auto, off or a number from 0 to 255"),
    (DEVICE, "gate = true\n" + LEAST, "gate: expected `float | str`, got `bool`"),
    (DEVICE, LEAST + "[events]\nconfirm = 2", "events.confirm: unknown key; did you mean confirm_frames?"),
    (DEVICE, LEAST + "prot = 1", "broker.prot: unknown key; did you mean port?"),
    (DEVICE, LEAST + "[camera.front]\nsauce = '0'", "camera.front.sauce: unknown key; did you mean source?"),
    (DEVICE, LEAST + "[camera.front]\n[camera.back]\nwide = 1", "camera.back.wide: unknown key; did you mean width?"),
    (DEVICE, LEAST + "[camera.'a.b']\nwide = 1", "camera.a.b.wide: unknown key; did you mean width?"),
    (NODE, LEAST + "[uplink]\nkodec = 'raw'", "uplink.kodec: unknown key; did you mean codec?"),
    (NODE, LEAST + "[uplink.broker]\nhots = 'x'", "uplink.broker.hots: unknown key; did you mean host?"),
    (DEVICE, LEAST + "loss_ratio = 0.1", "broker.loss_ratio: only the broker in memory loses on purpose"),
    (NODE, LEAST + "kind = 'memory'\nloss_ratio = 1.0", "broker.loss_ratio: expected `float` < 1.0"),
    (NODE, LEAST + "[camera.front]", "camera: unknown key; known keys: agreement, broker, bundle, early_exits"),
    (DEVICE, "budget_ms = 1.5\n" + LEAST, "budget_ms: expected `int`, got `float`"),
    (DEVICE, "early_exits = 1\n" + LEAST, "early_exits: expected `bool`, got `int`"),
    (DEVICE, LEAST.replace('"kin"', "1979-05-27"), "bundle: expected `str`, got `date`"),
    (DEVICE, LEAST + "port = '1883'", "broker.port: expected `int`, got `str`"),
    (DEVICE, LEAST + "[camera.front]\nwidth = 'a'", "camera.front.width: expected `int | null`, got `str`"),
    (DEVICE, "broker = 'box'\nbundle = 'kin'", "broker: expected `table`, got `str`"),
    (DEVICE, "camera = 0\n" + LEAST, "camera: expected `table`, got `int`"),
    (DEVICE, LEAST + "[camera]\nfront = 0", "camera.front: expected `table`, got `int`"),
    (DEVICE, LEAST + "port = 0", "broker.port: expected `int` >= 1"),
    (DEVICE, LEAST + "port = 65536", "broker.port: expected `int` <= 65535"),
    (DEVICE, LEAST + "keepalive_s = 65536", "broker.keepalive_s: expected `int` <= 65535"),
    (DEVICE, f"budget_ms = {'9' * 30}\n" + LEAST, "budget_ms: expected `int` <= 2147483647"),
    (DEVICE, "stats_interval_s = 0\n" + LEAST, "stats_interval_s: expected `float` > 0.0"),
    (DEVICE, "stats_interval_s = nan\n" + LEAST, "stats_interval_s: expected `float` > 0.0"),
    (DEVICE, "stats_interval_s = inf\n" + LEAST, "stats_interval_s: expected `float` <= 1000000.0"),
    (DEVICE, LEAST + "[camera.front]\nmax_fps = 0", "camera.front.max_fps: expected `float` > 0.0"),
    (NODE, "max_queue_delay_ms = inf\n" + LEAST, "max_queue_delay_ms: expected `float` <= 60000.0"),
    (NODE, "max_batch_size = 0\n" + LEAST, "max_batch_size: expected `int` >= 1"),
    (NODE, f"tier = '{'x' * 65}'\n" + LEAST, "tier: expected `str` of length <= 64"),
    (DEVICE, LEAST + "kind = 'udp'", "broker.kind: invalid enum value 'udp'; choose one of mqtt, memory"),
    (DEVICE, LEAST + "version = '4'", "broker.version: invalid enum value '4'; choose one of auto, 5, 3.1.1"),
    (
        DEVICE,
        LEAST + '[camera.front]\nkind = "a\\nb"',
        "camera.front.kind: invalid enum value 'a\\nb'; choose one of opencv, rpicam, pipe, replay",
    ),
    (NODE, "serves = 'cats'\n" + LEAST, "serves: invalid enum value 'cats'; choose one of devices, nodes"),
    (DEVICE, "bundle = 'kin'", "broker: missing"),
    (DEVICE, "[broker]\nhost = 'box'", "bundle: missing"),
    (DEVICE, "bundle = 'kin'\n[broker]", "broker.host: missing"),
    (DEVICE, "", "bundle: missing"),
    (DEVICE, "id = 'a b'\n" + LEAST, f"id: 'a b' {ID_RULE}"),
    (DEVICE, "id = 'a/b'\n" + LEAST, f"id: 'a/b' {ID_RULE}"),
    (DEVICE, 'id = "a\\n"\n' + LEAST, f"id: 'a\\n' {ID_RULE}"),
    (DEVICE, "site = ''\n" + LEAST, f"site: '' {ID_RULE}"),
    (DEVICE, LEAST + "[camera.'a/b']", f"camera.a/b: 'a/b' {ID_RULE}"),
    (NODE, "pool = '#'\n" + LEAST, f"pool: '#' {ID_RULE}"),
    (NODE, LEAST + "[uplink]\nsite = '+'", f"uplink.site: '+' {ID_RULE}"),
    (DEVICE, LEAST + "[camera]", "camera is empty; name at least one camera or leave the table out"),
]


@pytest.mark.parametrize(("kind", "text", "sentence"), WRONG, ids=[sentence[:50] for _, _, sentence in WRONG])
def test_what_is_wrong_is_said_in_one_line_with_the_keys_path(kind: type[Any], text: str, sentence: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(text, kind, "device.toml")
    assert str(caught.value).startswith(f"device.toml: {sentence}")
    assert str(caught.value).isprintable()


def test_what_is_not_toml_is_said_with_its_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^device\.toml is not TOML: .*line 2") as caught:
        parse("bundle = 'kin'\nbroker\n", DEVICE, "device.toml")
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("content", [None, b"bundle = '\xff'"], ids=["missing", "not UTF-8"])
def test_a_file_that_cannot_be_read_is_said_so(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "device.toml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match=re.escape(f"the config {path} cannot be read: ")) as caught:
        load(path, DEVICE)
    assert str(caught.value).isprintable()


def test_a_folder_is_no_config(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        load(tmp_path, DEVICE)


def test_a_relative_bundle_lies_beside_the_config(tmp_path: Path) -> None:
    path = tmp_path / "node.toml"
    path.write_text(LEAST, "utf-8")
    assert load(path, NODE).bundle == str(tmp_path / "kin")
    path.write_text(LEAST.replace("kin", "/srv/kin"), "utf-8")
    assert load(path, NODE).bundle == str(Path("/srv/kin"))


@given(st.text(max_size=60))
def test_any_text_is_a_config_or_one_sentence(text: str) -> None:
    for candidate in (text, LEAST + text):
        try:
            parse(candidate, DEVICE)
        except ConfigError as error:
            said = str(error)
        else:
            said = ""
        assert "\n" not in said


def test_all_paths_are_taken_from_the_configs_folder(tmp_path: Path) -> None:
    path = tmp_path / "node.toml"
    path.write_text(
        'bundle = "b"\n[broker]\nhost = "h"\nusername = "u"\npassword_file = "secret"\nca_file = "/etc/ca.pem"\n'
        '[uplink.broker]\nhost = "up"\nca_file = "ca.pem"\nkey_file = "keys/up.pem"\n'
    )
    loaded = load(path, NodeConfig)
    assert loaded.bundle == str(tmp_path / "b")
    assert loaded.broker.password_file == str(tmp_path / "secret")
    assert loaded.broker.ca_file == "/etc/ca.pem"
    assert loaded.broker.cert_file is None
    assert loaded.uplink is not None
    assert loaded.uplink.broker is not None
    assert loaded.uplink.broker.key_file == str(tmp_path / "keys/up.pem")


@pytest.mark.parametrize("text", ['bundle = ""\nbroker.host = "h"', 'bundle = "b"\nbroker.host = ""'])
def test_an_empty_bundle_or_host_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="length >= 1"):
        parse(text, NodeConfig)


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ('key_file = "k"', "broker.ca_file: missing"),
        ('cert_file = "c"', "broker.ca_file: missing"),
        ('password_file = "p"', "broker.username: missing"),
    ],
)
def test_a_setting_that_would_do_nothing_is_refused(setting: str, words: str) -> None:
    """Whoever names a key wants TLS, and must not get a connection in the clear."""
    with pytest.raises(ConfigError, match=re.escape(words)):
        parse(f'bundle = "b"\n[broker]\nhost = "h"\n{setting}', NodeConfig)
