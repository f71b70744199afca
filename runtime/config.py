"""Settings of a device and of a node: TOML for people, one definition for name, type and default.

The least that works is a broker and a bundle; write down only what differs from the defaults.
"""

from __future__ import annotations

import difflib
import re
import socket
import sys
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args

import msgspec

from runtime.errors import ConfigError
from runtime.objective import Objective, problem
from runtime.topics import valid_id

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

Port = Annotated[int, msgspec.Meta(ge=1, le=65535)]
NotEmpty = Annotated[str, msgspec.Meta(min_length=1)]
Positive = Annotated[int, msgspec.Meta(ge=1, le=2**31 - 1)]
Seconds = Annotated[float, msgspec.Meta(gt=0, le=1e6)]
Agreement = Annotated[float, msgspec.Meta(gt=0, le=1)]
PixelFormat = Literal["i420", "i420-full", "nv12", "rgb", "bgr", "bgrx", "gray8"]
TierName = Annotated[str, msgspec.Meta(min_length=1, max_length=64)]


class _Struct(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    pass


class BrokerConfig(_Struct, frozen=True):
    """How to reach an MQTT broker."""

    host: NotEmpty
    port: Port = 1883
    kind: Literal["mqtt", "memory"] = "mqtt"
    version: Literal["auto", "5", "3.1.1"] = "auto"  # of MQTT; auto: 5, and 3.1.1 where the broker does not take it
    username: str | None = None
    password_file: str | None = None  # a file, so that no secret stands in a config
    ca_file: str | None = None  # given: TLS, and the broker's certificate must be signed by this
    cert_file: str | None = None
    key_file: str | None = None
    keepalive_s: Port = 15
    # Nothing was heard for so long: a beat is sent; for as long again: the connection is given up. 0: neither.
    heartbeat_s: Annotated[float, msgspec.Meta(ge=0, le=3600)] = 5.0
    max_unsent_messages: Positive = 64  # what waits for the socket or the broker's word; more is refused and counted
    max_unsent_bytes: Positive = 8 * 1024 * 1024
    loss_ratio: Annotated[float, msgspec.Meta(ge=0, lt=1)] = 0.0  # kind memory only: share of messages that get lost
    loss_seed: int = 0  # which ones


class CameraConfig(_Struct, frozen=True):
    """Where frames come from."""

    kind: Literal["opencv", "rpicam", "pipe", "replay"] = "opencv"
    # V4L2 index, URL or GStreamer string; rpicam: the camera's number; pipe: a command that writes raw frames to its
    # standard output; replay: a video file or a folder of images.
    source: str = "0"
    width: Positive | None = None  # asked of a V4L2 camera, it may give something else; of rpicam; said of a pipe
    height: Positive | None = None
    format: PixelFormat = "i420"  # pipe: what the command writes, in GStreamer's words
    max_fps: Annotated[float, msgspec.Meta(gt=0)] | None = None  # more frames than this are not worth answering
    realtime: bool = (
        True  # replay: at the clip's own pace, the latest frame wins; false: every frame, as fast as it goes
    )
    loop: bool = False  # replay: start again at the end
    first_frame: Annotated[int, msgspec.Meta(ge=0)] = 0  # replay
    frames: Positive | None = None  # replay: stop after so many
    stalls: tuple[tuple[float, float], ...] = ()  # replay: from a second on, for so many, it gives no frame; to try out
    open_timeout_s: Seconds = 10.0
    read_timeout_s: Seconds = 5.0  # no frame for so long: the camera is stalled and is opened again
    max_lag_ms: Positive = 1000  # frames that come later than this after they were due are dropped
    frozen_after_s: Annotated[float, msgspec.Meta(ge=0, le=1e6)] = 30.0  # the same picture for so long; 0: never


class PreviewConfig(_Struct, frozen=True):
    """Small pictures of every camera, for the page. Off by default: then no picture ever leaves the device for it."""

    enabled: bool = False
    max_fps: Annotated[float, msgspec.Meta(gt=0, le=30)] = 2.0
    width: Annotated[int, msgspec.Meta(ge=16, le=1920)] = 480  # in pixels, at most; a smaller frame stays as it is
    quality: Annotated[int, msgspec.Meta(ge=1, le=100)] = 60  # of the JPEG


class EventsConfig(_Struct, frozen=True):
    """What comes, stays and goes before each camera, told apart from single answers."""

    enabled: bool | None = None  # default: for objects, not for labels of whole pictures
    confirm_frames: Annotated[int, msgspec.Meta(ge=1, le=1000)] = 3  # answers that something is in before it is told
    gone_ms: Positive = 2000  # shown to be away for so long, it has ended
    update_ms: Positive = 1000  # between two updates of one event
    store: NotEmpty = "memory"  # where events wait for the broker; else a path: a file that outlives the process
    store_messages: Positive = 10_000  # over this, the oldest are lost, and counted
    store_bytes: Positive = 4 * 1024 * 1024
    store_s: Seconds = 86_400.0  # older ones are lost, and counted
    drain_per_second: Annotated[float, msgspec.Meta(gt=0, le=10_000)] = 20.0  # of events that had to wait
    # What the broker confirmed so long ago or less is sent again after a lost connection: a broker that dies forgets
    # what it has confirmed and not passed on yet. 0: nothing is.
    resend_s: Annotated[float, msgspec.Meta(ge=0, le=3600)] = 30.0


class DeviceConfig(_Struct, frozen=True):
    """Everything `kinflow device` can be told."""

    bundle: NotEmpty
    broker: BrokerConfig
    site: str = "home"
    id: str = ""  # default: the host's name
    camera: dict[str, CameraConfig] = msgspec.field(default_factory=lambda: {"cam0": CameraConfig()})
    last_segment: Annotated[int, msgspec.Meta(ge=0)] | None = None  # deepest local segment; default: the bundle's
    variant: Annotated[int, msgspec.Meta(ge=0, le=255)] = 0  # of the first segment, faster and less exact; 0: itself
    early_exits: bool = True
    agreement: Agreement | None = None  # a row of the bundle's table of thresholds; default: what it was exported with
    codec: str = (
        "auto"  # transform or transform:PERCENT, raw, jpeg or jpeg:QUALITY (the frame itself); see codec.find_rate
    )
    budget_ms: Positive = 2000  # a frame is answered within this, by the best local exit if need be
    between_frames: bool = True  # where the codec can: send what differs from the last frame answered from above
    # Frames waiting for an answer from above; more are answered locally. Default: 4; with an objective the planner says
    # how many, 32 at the most.
    max_in_flight: Positive | None = None
    # The gate repeats answers while pictures hardly change. auto: as the bundle was fitted, if it was; a number: up to
    # this change, 0 to 255.
    gate: str | float = "auto"
    gate_max_age_ms: Positive | None = None  # of a repeated answer; default: the bundle's, or 2000
    # Which results are published: all; changes (of the label, or whether it is degraded, and one a second); none.
    results: Literal["all", "changes", "none"] = "all"
    threads: Positive = 1
    stats_interval_s: Seconds = 60.0
    objective: Objective | None = None  # given: the device plans what it sends, and whether (docs/planner.md)
    events: EventsConfig = EventsConfig()
    preview: PreviewConfig = PreviewConfig()


class UiConfig(_Struct, frozen=True):
    """The page that shows what cameras see and who answers; there is no login, so whoever reaches the port sees it."""

    host: NotEmpty = "127.0.0.1"  # only this machine; 0.0.0.0 lets everybody in who reaches it
    port: Port = 8080


class UplinkConfig(_Struct, frozen=True):
    """The next tier above a node."""

    broker: BrokerConfig | None = None  # default: the broker this node serves on
    site: str | None = None  # default: this node's site
    codec: str = "auto"  # as a device's, but for jpeg
    between_frames: bool = True  # where the codec can: send what differs from the last frame answered from above
    max_in_flight: Positive = 64


class NodeConfig(_Struct, frozen=True):
    """Everything `kinflow node` can be told. A node with an uplink is an edge node, one without is the cloud."""

    bundle: NotEmpty
    broker: BrokerConfig
    site: str = "home"
    id: str = ""  # default: the host's name
    tier: TierName | None = None  # name of this tier in results; default: edge with an uplink, cloud without
    serves: Literal["devices", "nodes"] = "devices"
    pool: str | None = None  # share the work with other nodes of this name ($share); not on the embedded broker
    uplink: UplinkConfig | None = None
    last_segment: Annotated[int, msgspec.Meta(ge=0)] | None = None  # default: the bundle's for this tier
    early_exits: bool = True
    agreement: Agreement | None = None  # as of a device; the same on every tier, or the promise is of neither
    max_batch_size: Positive = 8
    max_queue_delay_ms: Annotated[float, msgspec.Meta(ge=0, le=60_000)] = 0.0  # how long a frame may wait for company
    max_queue_frames: Positive = 256
    max_queue_bytes: Positive = 64 * 1024 * 1024
    max_reference_bytes: Positive = 64 * 1024 * 1024  # earlier frames kept, which later ones are coded against
    threads: Positive = 1
    stats_interval_s: Seconds = 60.0
    ui: UiConfig | None = None  # given: `kinflow node` serves the page as well, as it does with --ui


Config = TypeVar("Config", DeviceConfig, NodeConfig)


def load(path: Path, kind: type[Config]) -> Config:
    """Read a TOML file as a DeviceConfig or a NodeConfig; relative paths are taken from the file's folder.

    Raises:
        ConfigError: the file cannot be read or a key is unknown, missing or of the wrong type.
    """
    try:
        text = path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is no UTF-8 text"
        raise ConfigError(f"the config {path} cannot be read: {reason}") from error
    config = parse(text, kind, name=str(path))
    replaced: dict[str, Any] = {
        "bundle": str(path.parent / config.bundle),
        "broker": _from_folder(config.broker, path.parent),
    }
    if isinstance(config, DeviceConfig) and config.events.store != "memory":
        store = str(path.parent / config.events.store)
        replaced["events"] = msgspec.structs.replace(config.events, store=store)
    if isinstance(config, NodeConfig) and config.uplink is not None and config.uplink.broker is not None:
        upper = _from_folder(config.uplink.broker, path.parent)
        replaced["uplink"] = msgspec.structs.replace(config.uplink, broker=upper)
    return msgspec.structs.replace(config, **replaced)


def _from_folder(broker: BrokerConfig, folder: Path) -> BrokerConfig:
    """The same broker with its files' paths taken from `folder`."""
    names = ("password_file", "ca_file", "cert_file", "key_file")
    files = {name: getattr(broker, name) for name in names}
    return msgspec.structs.replace(
        broker, **{name: str(folder / file) for name, file in files.items() if file is not None}
    )


def parse(text: str, kind: type[Config], name: str = "config") -> Config:
    """Read TOML text as a DeviceConfig or a NodeConfig.

    Raises:
        ConfigError: one sentence with the path of the key, and the nearest key that exists.
    """
    try:
        tree = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{name} is not TOML: {error}") from error
    try:
        config = msgspec.convert(tree, kind)
    except msgspec.ValidationError as error:
        words = sentence(str(error), kind).replace(".*", f".{_wrong_camera(tree)}", 1)
        raise ConfigError(f"{name}: {printable(words)}") from error
    if not config.id:
        config = msgspec.structs.replace(config, id=re.sub(r"[^A-Za-z0-9_-]", "-", socket.gethostname())[:64] or "host")
    _check(config, name)
    return config


def _check(config: DeviceConfig | NodeConfig, name: str) -> None:
    brokers = {"broker": config.broker}
    if isinstance(config, NodeConfig) and config.uplink is not None and config.uplink.broker is not None:
        brokers["uplink.broker"] = config.uplink.broker
    for key, broker in brokers.items():
        if broker.loss_ratio and broker.kind != "memory":
            raise ConfigError(f"{name}: {key}.loss_ratio: only the broker in memory loses on purpose; leave it out")
        if broker.ca_file is None and (broker.cert_file is not None or broker.key_file is not None):
            raise ConfigError(f"{name}: {key}.ca_file: missing; without it cert_file and key_file do nothing")
        if broker.username is None and broker.password_file is not None:
            raise ConfigError(f"{name}: {key}.username: missing; without it password_file does nothing")
    levels = {"site": config.site, "id": config.id}
    if isinstance(config, DeviceConfig):
        if not config.camera:
            raise ConfigError(f"{name}: camera is empty; name at least one camera or leave the table out")
        gate = config.gate
        if gate not in ("auto", "off") and not (isinstance(gate, float) and 0 <= gate <= 255):
            raise ConfigError(f"{name}: gate: {gate!r} is none of auto, off or a number from 0 to 255")
        wrong = None if config.objective is None else problem(config.objective)
        if wrong is not None:
            raise ConfigError(f"{name}: {wrong}")
        levels.update({f"camera.{camera}": camera for camera in config.camera})
    else:
        levels.update({"pool": config.pool} if config.pool is not None else {})
        levels.update({"tier": config.tier} if config.tier is not None else {})
        if config.uplink is not None and config.uplink.site is not None:
            levels["uplink.site"] = config.uplink.site
    for key, value in levels.items():
        if not valid_id(value):
            raise ConfigError(
                f"{name}: {key}: {value!r} must be 1 to 64 letters, digits, '_' or '-': it becomes part of a topic"
            )


def sentence(message: str, kind: type[Any]) -> str:
    """Turn msgspec's words about a tree that is no `kind` into ours: the path first, and the nearest known key."""
    problem, _, path = message.partition(" - at `$.")
    path = path.rstrip("`").replace("[...]", ".*")
    unknown = re.fullmatch(r"Object contains unknown field `(.+)`", problem, re.DOTALL)
    if unknown:
        key = unknown[1]
        full = f"{path}.{key}" if path else key
        known = list(_fields_at(kind, path.split(".") if path else []))
        near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
        hint = f"; did you mean {near[0]}?" if near else f"; known keys: {', '.join(sorted(known))}"
        return f"{full}: unknown key{hint}"
    missing = re.fullmatch(r"Object missing required field `(.+)`", problem)
    if missing:
        return f"{path}.{missing[1]}: missing" if path else f"{missing[1]}: missing"
    if problem.startswith("Invalid enum value"):
        *parents, key = path.split(".")
        problem += f"; choose one of {', '.join(get_args(_fields_at(kind, parents)[key]))}"
    problem = problem.replace("`object", "`table")  # as TOML calls it
    return f"{path}: {problem[0].lower()}{problem[1:]}" if path else problem


def printable(words: str) -> str:
    """The same words on one line: keys of a file may hold anything."""
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in words)


def _wrong_camera(tree: dict[str, Any]) -> str:
    """The camera whose settings are wrong: msgspec names no keys of tables whose keys are free."""
    cameras = tree.get("camera")
    for name, settings in cameras.items() if isinstance(cameras, dict) else ():
        try:
            msgspec.convert(settings, CameraConfig)
        except msgspec.ValidationError:
            return str(name)
    return "*"


def _fields_at(kind: type[Any], path: list[str]) -> dict[str, Any]:
    """The keys of a table and their types."""
    fields = {field.name: field.type for field in msgspec.structs.fields(kind)}
    if not path:
        return fields
    inner = fields.get(path[0].partition("[")[0])  # of an array all items are alike
    rest = path[1:]
    structs = [
        part for part in (inner, *get_args(inner)) if isinstance(part, type) and issubclass(part, msgspec.Struct)
    ]
    if rest and rest[0] == "*":
        rest = rest[1:]
    return _fields_at(structs[0], rest) if structs else {}
