"""What the devices and nodes of a site have told of themselves, kept small: everything the page draws. Pure.

`Site.hear` takes MQTT messages with the time they came; the rest says what they add up to. Whatever comes, memory stays
bounded: so many machines, cameras and answers are kept, and no message is believed to be well made.
"""

from __future__ import annotations

import re
from collections import Counter, deque
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from runtime.codec import jpeg_size
from runtime.errors import PacketError
from runtime.inbox import Inbox
from runtime.topics import Subtree, report
from runtime.ui_messages import KINDS, Birth, Happening, Said, read
from runtime.ui_plan import Plan, Planning

WINDOW_S = 60.0  # ages, confidences and shares are those of the answers of so long
SERIES_S = 120  # what goes on is drawn for so long
SMOOTH_S = 5  # each point of a drawn line stands for so many seconds up to it
MOST_MACHINES = 128
MOST_CAMERAS = 64
MOST_ANSWERS = 6000  # kept of the window, over all cameras
MOST_TIERS = 8
MOST_EVENTS = 20
MOST_SESSIONS = 4  # of a device, whose events are told from each other
OTHER_TIER = "other"
OF_CAMERAS = ("result", "status", "event", "preview")


@dataclass(slots=True)
class Camera:
    """One camera of a device, and its last answer."""

    device: str
    name: str
    status: str | None = None
    said: Said | None = None
    said_s: float = 0.0  # when the last answer came
    told_size: tuple[int, int] | None = None  # width and height of its frames, where an answer has told them
    preview: bytes | None = None
    shape: tuple[int, int] | None = None  # height and width of the preview
    previews: int = 0  # how many have come
    events: deque[Happening] = field(default_factory=lambda: deque(maxlen=MOST_EVENTS))
    heard: Inbox = field(default_factory=lambda: Inbox(most_sessions=MOST_SESSIONS))  # events come again at times

    @property
    def size(self) -> tuple[int, int] | None:
        """Width and height of its frames, or of the preview where no answer tells them."""
        return self.told_size or (self.shape and (self.shape[1], self.shape[0]))


@dataclass(slots=True)
class Machine:
    """A device or a node."""

    role: Literal["d", "n"]
    name: str
    online: bool | None = None  # None: not told
    birth: Birth | None = None
    stats: dict[str, int] = field(default_factory=dict)
    stats_s: float | None = None
    planning: Planning = field(default_factory=Planning)

    @property
    def jpeg_bytes(self) -> float | None:
        """What one frame of this device costs as a JPEG at the model's size; None while nobody has weighed one."""
        frames = self.stats.get("jpeg_equivalent_frames_total", 0)
        return self.stats.get("jpeg_equivalent_bytes_total", 0) / frames if frames else None

    def total(self, counter: str) -> int:
        """The sum over all labels of a counter."""
        return sum(count for key, count in self.stats.items() if key.partition("{")[0] == counter)


class _Kept(NamedTuple):
    """What the window keeps of an answer."""

    heard_s: float
    tier: str
    age_ms: float
    confidence: float
    repeats: bool


@dataclass(slots=True)
class _Second:
    """What came in one second."""

    tiers: Counter[str] = field(default_factory=Counter)
    devices: Counter[str] = field(default_factory=Counter)
    bytes_up: int = 0


@dataclass(frozen=True, slots=True)
class TierFigures:
    """The answers of one tier in the window."""

    tier: str
    answers: int
    share: float
    age_p50_ms: float
    age_p95_ms: float
    repeats: int  # of the answers, those that repeat an earlier one
    confidences: tuple[int, ...]  # how many of a confidence of 0 to .1, .1 to .2, …


@dataclass(frozen=True, slots=True)
class Series:
    """What went on, one value for each second of `SERIES_S`, the last one the second before now; None: nothing came."""

    shares: dict[str, list[float | None]]  # tier → its share of the answers, 0..1
    bytes_up: list[float | None]  # a second, over all devices
    jpeg_bytes: list[float | None]  # a second, had every answered frame gone up as a JPEG; None too: not known


@dataclass(frozen=True, slots=True)
class Loss:
    """Frames, packets or requests that did not get what was aimed for, by reason, since their machine started."""

    machine: str
    counter: str
    reason: str
    count: int


LOSSES = (
    "frames_dropped_total",
    "results_degraded_total",
    "requests_dropped_total",
    "packets_refused_total",
    "replies_dropped_total",
)
_REASON = re.compile(r'[{,]reason="([^"]*)"')


class Site:
    """Everything that is known of one site."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.machines: dict[tuple[str, str], Machine] = {}
        self.cameras: dict[tuple[str, str], Camera] = {}
        self.refused: Counter[str] = Counter()  # messages that were not understood, by kind
        self.answers = 0
        self._kept: deque[_Kept] = deque(maxlen=MOST_ANSWERS)
        self._seconds: dict[int, _Second] = {}
        self._tiers: dict[str, None] = {}

    def hear(self, topic: str, payload: bytes, now_s: float) -> None:
        """Take a message in. One that makes no sense is counted in `refused`, and changes nothing.

        Args:
            topic: any.
            payload: any.
            now_s: when it came, in seconds of a clock that never goes back.
        """
        told = report(topic)
        if told is None or told[0].site != self.name:
            self.refused["topic"] += 1
            return
        who, camera, kind = told
        try:
            self._take(who, camera, kind, payload, now_s)
        except PacketError:
            # Kinds come from the topic, and anybody may publish: only known ones become a name to count by.
            self.refused[kind if kind in KINDS else "kind"] += 1

    def _take(self, who: Subtree, camera_name: str | None, kind: str, payload: bytes, now_s: float) -> None:
        if camera_name is not None and kind == "state":
            return  # what stays until the next event; the page shows answers
        if (camera_name is None) == (kind in OF_CAMERAS) or (camera_name is not None and who.role != "d"):
            raise PacketError("nobody tells that there")
        said = read(kind, payload)
        machine = self._machine(who.role, who.name)
        if camera_name is None:
            if isinstance(said, dict):
                machine.stats, machine.stats_s = said, now_s
            elif isinstance(said, Plan):
                machine.planning.take(said, now_s)
            elif kind == "birth":
                machine.birth = said if isinstance(said, Birth) else None
            else:
                machine.online = None if not said else said == b"online"
            return
        camera = self._camera(who.name, camera_name)
        if isinstance(said, Said):
            self._answered(camera, said, now_s)
        elif isinstance(said, Happening):
            if said.sequence < 1 or camera.heard.take(camera.device, said.session, said.sequence).new:
                camera.events.append(said)
        elif isinstance(said, bytes) and kind == "preview":
            camera.preview, camera.previews = said, camera.previews + 1
            camera.shape = jpeg_size(said)
        elif isinstance(said, bytes):
            camera.status = said.decode() or None

    def _machine(self, role: Literal["d", "n"], name: str) -> Machine:
        if (role, name) not in self.machines and len(self.machines) >= MOST_MACHINES:
            raise PacketError("there is no room for more machines")
        return self.machines.setdefault((role, name), Machine(role, name))

    def _camera(self, device: str, name: str) -> Camera:
        if (device, name) not in self.cameras and len(self.cameras) >= MOST_CAMERAS:
            raise PacketError("there is no room for more cameras")
        return self.cameras.setdefault((device, name), Camera(device, name))

    def _answered(self, camera: Camera, said: Said, now_s: float) -> None:
        camera.said, camera.said_s = said, now_s
        camera.told_size = said.answer.size or camera.told_size
        tier = said.tier
        if tier not in self._tiers and len(self._tiers) >= MOST_TIERS:
            tier = OTHER_TIER
        self._tiers.setdefault(tier)
        self.answers += 1
        planner = self.machines.get(("d", camera.device))
        if planner is not None and said.repeats is None:
            planner.planning.answered(said.age_ms, said.bytes_up, now_s)
        self._kept.append(_Kept(now_s, tier, said.age_ms, said.confidence, said.repeats is not None))
        second = self._seconds.get(int(now_s))
        if second is None:
            second = self._seconds[int(now_s)] = _Second()
            for old in [start for start in self._seconds if start < now_s - SERIES_S - SMOOTH_S - 1]:
                del self._seconds[old]
        second.tiers[tier] += 1
        second.devices[camera.device] += 1
        second.bytes_up += said.bytes_up

    @property
    def tiers(self) -> list[str]:
        """The tiers that have answered: device, edge and cloud first, the others as they came."""
        known = [tier for tier in ("device", "edge", "cloud") if tier in self._tiers]
        return known + [tier for tier in self._tiers if tier not in known]

    def per_second(self, now_s: float) -> tuple[float, float, float | None]:
        """Answers, bytes up, and bytes had all been JPEGs (None: not known), a second, of the last `SMOOTH_S`."""
        frames, bytes_up, jpeg_bytes = self._sum(int(now_s) - SMOOTH_S, int(now_s))
        return frames / SMOOTH_S, bytes_up / SMOOTH_S, None if jpeg_bytes is None else jpeg_bytes / SMOOTH_S

    def figures(self, now_s: float) -> list[TierFigures]:
        """Of each tier that has answered in the last `WINDOW_S`, in the order of `tiers`."""
        while self._kept and self._kept[0].heard_s < now_s - WINDOW_S:
            self._kept.popleft()
        found = []
        for tier in self.tiers:
            kept = [answer for answer in self._kept if answer.tier == tier]
            if not kept:
                continue
            ages = sorted(answer.age_ms for answer in kept)
            bins = Counter(min(9, int(answer.confidence * 10)) for answer in kept)
            found.append(
                TierFigures(
                    tier=tier,
                    answers=len(kept),
                    share=len(kept) / len(self._kept),
                    age_p50_ms=_quantile(ages, 0.5),
                    age_p95_ms=_quantile(ages, 0.95),
                    repeats=sum(answer.repeats for answer in kept),
                    confidences=tuple(bins[index] for index in range(10)),
                )
            )
        return found

    def median_age_ms(self) -> float:
        """Of all answers that `figures` has counted; 0 when there are none."""
        return _quantile(sorted(answer.age_ms for answer in self._kept), 0.5)

    def series(self, now_s: float) -> Series:
        """What went on in the last `SERIES_S`, second by second."""
        shares: dict[str, list[float | None]] = {tier: [] for tier in self.tiers}
        up: list[float | None] = []
        jpeg: list[float | None] = []
        for end in range(int(now_s) - SERIES_S + 1, int(now_s) + 1):
            frames, bytes_up, jpeg_bytes = self._sum(end - SMOOTH_S, end)
            by_tier: Counter[str] = Counter()
            for second in self._between(end - SMOOTH_S, end):
                by_tier.update(second.tiers)
            for tier, values in shares.items():
                values.append(by_tier[tier] / frames if frames else None)
            up.append(bytes_up / SMOOTH_S if frames else None)
            jpeg.append(jpeg_bytes / SMOOTH_S if frames and jpeg_bytes is not None else None)
        return Series(shares, up, jpeg)

    def _between(self, start: int, end: int) -> list[_Second]:
        return [self._seconds[second] for second in range(start, end) if second in self._seconds]

    def _sum(self, start: int, end: int) -> tuple[int, int, float | None]:
        """Answers, bytes up, and bytes had all been JPEGs (None: not known), from start to before end."""
        seconds = self._between(start, end)
        devices: Counter[str] = Counter()
        for second in seconds:
            devices.update(second.devices)
        jpeg_bytes: float | None = 0.0
        for device, frames in devices.items():
            machine = self.machines.get(("d", device))
            each = None if machine is None else machine.jpeg_bytes
            jpeg_bytes = None if each is None or jpeg_bytes is None else jpeg_bytes + frames * each
        return sum(devices.values()), sum(second.bytes_up for second in seconds), jpeg_bytes

    def losses(self) -> list[Loss]:
        """What was lost, by machine, counter and reason; in the order of `LOSSES`, the greatest of each first."""
        sums: Counter[tuple[str, str, str]] = Counter()
        for machine in self.machines.values():
            for key, count in machine.stats.items():
                name, found = key.partition("{")[0], _REASON.search(key)
                if name in LOSSES and count:
                    sums[machine.name, name, found[1] if found else ""] += count
        losses = [Loss(*where, count) for where, count in sums.items()]
        return sorted(losses, key=lambda loss: (LOSSES.index(loss.counter), -loss.count, loss.machine, loss.reason))

    def odd_bundles(self) -> set[tuple[str, str]]:
        """The machines, by role and name, whose bundle is not the one that most of those online hold."""
        held = {
            key: machine.birth.bundle
            for key, machine in self.machines.items()
            if machine.birth is not None and machine.birth.bundle and machine.online
        }
        if len(set(held.values())) < 2:
            return set()
        (most, _), *_ = Counter(held.values()).most_common(1)
        return {key for key, bundle in held.items() if bundle != most}


def _quantile(values: list[float], share: float) -> float:
    """The value nearest to a quantile of sorted values."""
    return values[int(share * (len(values) - 1) + 0.5)] if values else 0.0
