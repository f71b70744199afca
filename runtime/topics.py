"""Every topic name, once, and what a message on a topic costs in bytes (docs/wire.md).

`kinflow/v1/<site>/d/<device>/…` for devices and `kinflow/v1/<site>/n/<node>/…` for nodes: everything of one sender
lies below its own id, so that one ACL line isolates it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

ROOT = "kinflow/v1"
_ID = re.compile(r"[A-Za-z0-9_-]{1,64}")


def valid_id(name: str) -> bool:
    """Whether `name` can be a level of a topic: letters, digits, `_` and `-`, at most 64."""
    return _ID.fullmatch(name) is not None


@dataclass(frozen=True, slots=True)
class Subtree:
    """All topics of one sender: a device (`d`) or a node (`n`)."""

    site: str
    role: Literal["d", "n"]
    name: str

    def __str__(self) -> str:
        return f"{ROOT}/{self.site}/{self.role}/{self.name}"

    @property
    def availability(self) -> str:
        """Retained, and the last will: `online` or `offline`."""
        return f"{self}/availability"

    @property
    def birth(self) -> str:
        """Retained JSON: versions, bundle id, cameras, session."""
        return f"{self}/birth"

    @property
    def stats(self) -> str:
        """JSON of counters, every `stats_interval_s`."""
        return f"{self}/stats"

    @property
    def replies(self) -> str:
        """Packets of kind RESULT and REFUSAL, for the sender of a request."""
        return f"{self}/res"

    @property
    def beat(self) -> str:
        """Empty messages that nobody reads, when nothing was heard from the broker for a while."""
        return f"{self}/beat"

    @property
    def again(self) -> str:
        """Empty messages of consumers that may have missed events, to a device."""
        return f"{self}/again"

    @property
    def plan(self) -> str:
        """Retained JSON: how a device that plans treats frames now, and why."""
        return f"{self}/plan"

    def request(self, key8: str, cut: int) -> str:
        """Packets of kind FEATURES."""
        return f"{self}/req/{key8}/{cut}"

    def result(self, camera: str) -> str:
        """JSON of every Result of a camera."""
        return f"{self}/cam/{camera}/result"

    def event(self, camera: str) -> str:
        """JSON of what begins, changes and ends before a camera."""
        return f"{self}/cam/{camera}/event"

    def state(self, camera: str) -> str:
        """Retained JSON: what is before a camera now."""
        return f"{self}/cam/{camera}/state"

    def camera_status(self, camera: str) -> str:
        """Retained: `starting`, `online`, `late`, `frozen`, `stalled` or `offline`."""
        return f"{self}/cam/{camera}/status"

    def preview(self, camera: str) -> str:
        """Small JPEGs of a camera, only where the device's settings ask for them."""
        return f"{self}/cam/{camera}/preview"


def requests(site: str, role: Literal["d", "n"], pool: str | None = None) -> str:
    """The filter that matches all requests of a site's devices or nodes; with `pool`, a shared subscription."""
    plain = f"{ROOT}/{site}/{role}/+/req/#"
    return plain if pool is None else f"$share/{pool}/{plain}"


def without_share(topic_filter: str) -> str:
    """What a filter matches, whether its subscription is shared or not."""
    return topic_filter.split("/", 2)[2] if topic_filter.startswith("$share/") else topic_filter


def sender(topic: str) -> Subtree | None:
    """The sender whose request came on `topic`, or None when `topic` is no request."""
    levels = topic.split("/")
    if len(levels) != 8 or "/".join(levels[:2]) != ROOT or levels[5] != "req":
        return None
    site, role, name = levels[2:5]
    if not (valid_id(site) and valid_id(name)):
        return None
    if role == "d":
        return Subtree(site, "d", name)
    return Subtree(site, "n", name) if role == "n" else None


def reports(site: str) -> tuple[str, ...]:
    """The filters that match what devices and nodes of a site tell about themselves, and no request or reply."""
    below = f"{ROOT}/{site}/+/+"
    return (*(f"{below}/{kind}" for kind in ("availability", "birth", "stats", "plan")), f"{below}/cam/+/+")


def events(site: str, device: str | None = None) -> str:
    """The filter that matches the events of all cameras of one device, or of all devices, of a site."""
    return f"{ROOT}/{site}/d/{device or '+'}/cam/+/event"


def report(topic: str) -> tuple[Subtree, str | None, str] | None:
    """Who tells what: sender, camera (None: of the sender itself) and kind, or None when `topic` is no report."""
    levels = topic.split("/")
    if "/".join(levels[:2]) != ROOT or not all(valid_id(level) for level in levels[2:]):
        return None
    if len(levels) not in (6, 8) or levels[3] not in ("d", "n") or (len(levels) == 8 and levels[5] != "cam"):
        return None
    who = Subtree(levels[2], "d" if levels[3] == "d" else "n", levels[4])
    return (who, None, levels[5]) if len(levels) == 6 else (who, levels[6], levels[7])


def publish_bytes(topic: str, payload_bytes: int, *, qos: int = 0, mqtt5: bool = True, alias: bool = False) -> int:
    """The size of a PUBLISH on the wire: fixed header, topic, packet identifier, properties, payload (MQTT 5, 3.3).

    `alias`: it carries a topic alias; `topic` is empty where that stands in its place.
    """
    properties = (4 if alias else 1) if mqtt5 else 0
    remaining = 2 + len(topic.encode()) + (2 if qos else 0) + properties + payload_bytes
    length_bytes = 1 + (remaining > 127) + (remaining > 16_383) + (remaining > 2_097_151)
    return 1 + length_bytes + remaining
