"""What befalls a simulated system, and when: the link's values by phase, kills, camera stalls. Pure but for `load`.

A scenario is a TOML file; docs/operations.md tells how to write one, scripts/scenarios/ has some. Everything in it is a
function of the seconds since the first frame was grabbed, and of the scenario's seed.
"""

from __future__ import annotations

import math
import random
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import msgspec

from runtime.config import NotEmpty, Positive, printable, sentence
from runtime.errors import ConfigError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

Victim = Literal["broker", "edge", "cloud", "link"]
Outage = Literal["none", "silent", "refused"]

_RATE = re.compile(r"(\d+(?:\.\d+)?) ?(bit|kbit|mbit|gbit|)(?:/s)?", re.IGNORECASE)
_TIME = re.compile(r"(\d+(?:\.\d+)?) ?(ms|s|min)")
_SHARE = re.compile(r"(\d+(?:\.\d+)?) ?(%?)")
_BITS = {"bit": 1, "kbit": 1_000, "mbit": 1_000_000, "gbit": 1_000_000_000}
_SECONDS = {"ms": 0.001, "s": 1.0, "min": 60.0}


class _Struct(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    pass


class WayConfig(_Struct, frozen=True, kw_only=True):
    """One direction of a link; what is left out is taken from where it was said last."""

    rate: NotEmpty | None = None  # such as "256kbit"; "unlimited"; "0": nothing passes
    delay: NotEmpty | None = None  # one way, such as "80ms"
    jitter: NotEmpty | None = None  # up to so much more delay
    loss: NotEmpty | None = None  # share of TCP segments that get lost once, such as "1%"


class PhaseConfig(WayConfig, frozen=True, kw_only=True):
    """Values of the link for a while; those it leaves out are the ones of [link]."""

    duration: NotEmpty
    name: str = ""  # default: what it sets
    outage: Outage = "none"  # silent: nothing passes, nobody is told; refused: connections are reset and refused
    down: WayConfig = WayConfig()  # where the way from the broker differs


class KillConfig(_Struct, frozen=True, kw_only=True):
    """Ends something at once, as a power cut would, and starts it again later; again and again, if told."""

    what: Victim  # link: its connections are reset, and refused until `down` has passed
    at: NotEmpty
    down: NotEmpty = "1s"
    down_most: NotEmpty | None = None  # given: between `down` and this, the logarithm drawn evenly
    repeat: Positive = 1
    pause: NotEmpty = "5s"  # from its coming back to the next time
    mid_packet: Annotated[float, msgspec.Meta(ge=0, le=1)] = 0.0  # share of kills after half of a packet; not of nodes


class StallConfig(_Struct, frozen=True, kw_only=True):
    """The camera gives no frame for a while."""

    at: NotEmpty
    lasts: NotEmpty = "3s"
    repeat: Positive = 1
    pause: NotEmpty = "5s"


class ScenarioConfig(_Struct, frozen=True, kw_only=True):
    """A scenario as it stands in its file."""

    phase: list[PhaseConfig]
    title: str = ""
    seed: int = 0
    link: WayConfig = WayConfig()  # what holds in every phase that does not say otherwise
    kill: list[KillConfig] = []
    stall: list[StallConfig] = []


@dataclass(frozen=True, slots=True)
class Way:
    """One direction of a link."""

    rate: float = math.inf  # bytes a second
    delay_s: float = 0.0
    jitter_s: float = 0.0
    loss: float = 0.0


@dataclass(frozen=True, slots=True)
class Phase:
    """The link from `start_s` on, for `duration_s`."""

    name: str
    start_s: float
    duration_s: float
    up: Way  # from the device to the broker
    down: Way
    outage: Outage = "none"

    @property
    def open(self) -> bool:
        """Whether anything passes."""
        return self.outage == "none" and self.up.rate > 0 and self.down.rate > 0


@dataclass(frozen=True, slots=True)
class Kill:
    """One end of something, and how long it stays away."""

    what: Victim
    at_s: float
    down_s: float
    mid_packet: bool = False


@dataclass(frozen=True, slots=True)
class Scenario:
    """A schedule: phases without gaps from 0 on, kills in order, stalls of the camera as (start, length)."""

    phases: tuple[Phase, ...]
    kills: tuple[Kill, ...] = ()
    stalls: tuple[tuple[float, float], ...] = ()
    title: str = ""
    seed: int = 0

    @property
    def duration_s(self) -> float:
        """Seconds from the first frame to the end; infinite for a link that never changes."""
        return self.phases[-1].start_s + self.phases[-1].duration_s

    def index(self, at_s: float) -> int:
        """Which phase holds at a time; before the first the first, after the last the last."""
        later = (number for number, phase in enumerate(self.phases) if phase.start_s > at_s)
        return max(0, next(later, len(self.phases)) - 1)

    def next_change_s(self, at_s: float) -> float:
        """When the phase after the one at a time begins; infinite in the last one."""
        return next((phase.start_s for phase in self.phases if phase.start_s > at_s), math.inf)


def fixed(rate: str | None, delay: str | None, jitter: str | None, loss: str | None) -> Scenario:
    """A link of these values that never changes.

    Raises:
        ConfigError: a value cannot be read.
    """
    config = WayConfig(rate=rate, delay=delay, jitter=jitter, loss=loss)
    way = _way("--", config)
    return Scenario((Phase(_named(config), 0.0, math.inf, way, way),))


def load(path: Path) -> Scenario:
    """Read a scenario's file.

    Raises:
        ConfigError: it cannot be read, or something in it is unknown, missing or impossible.
    """
    try:
        text = path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is no UTF-8 text"
        raise ConfigError(f"the scenario {path} cannot be read: {reason}") from error
    return parse(text, str(path))


def parse(text: str, name: str = "scenario") -> Scenario:
    """Read TOML text as a scenario.

    Raises:
        ConfigError: one sentence with the path of the key, and the nearest key that exists.
    """
    try:
        config = msgspec.convert(tomllib.loads(text), ScenarioConfig)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{name} is not TOML: {error}") from error
    except msgspec.ValidationError as error:
        raise ConfigError(f"{name}: {printable(sentence(str(error), ScenarioConfig))}") from error
    try:
        return _scenario(config)
    except ConfigError as error:
        raise ConfigError(f"{name}: {error}") from error


def rate(text: str) -> float:
    """Bytes a second of `256kbit`, `1.5mbit/s`, `0` or `unlimited`.

    Raises:
        ConfigError: it is none of these.
    """
    if text == "unlimited":
        return math.inf
    found = _RATE.fullmatch(text.strip())
    if found is None or (not found[2] and float(found[1])):
        raise ConfigError(f"{text!r} is no rate; write it like 256kbit, 8mbit, 0 or unlimited")
    return float(found[1]) * _BITS.get(found[2].lower(), 0) / 8


def seconds(text: str) -> float:
    """Seconds of `80ms`, `60s` or `5min`.

    Raises:
        ConfigError: it is none of these.
    """
    found = _TIME.fullmatch(text.strip())
    if found is None:
        raise ConfigError(f"{text!r} is no time; write it like 80ms, 60s or 5min")
    return float(found[1]) * _SECONDS[found[2]]


def share(text: str) -> float:
    """A share from 0 to 1, below 1, of `1%` or `0.01`.

    Raises:
        ConfigError: it is none of these.
    """
    found = _SHARE.fullmatch(text.strip())
    value = float(found[1]) / (100 if found[2] else 1) if found else math.nan
    if not value < 1:
        raise ConfigError(f"{text!r} is no share below 1; write it like 1% or 0.01")
    return value


def _read(key: str, text: str | None, reader: Callable[[str], float], default: float) -> float:
    if text is None:
        return default
    try:
        return reader(text)
    except ConfigError as error:
        raise ConfigError(f"{key}: {error}") from error


def _way(key: str, config: WayConfig, rest: Way = Way()) -> Way:
    return Way(
        _read(f"{key}rate", config.rate, rate, rest.rate),
        _read(f"{key}delay", config.delay, seconds, rest.delay_s),
        _read(f"{key}jitter", config.jitter, seconds, rest.jitter_s),
        _read(f"{key}loss", config.loss, share, rest.loss),
    )


def _named(config: WayConfig) -> str:
    words = [f"{name} {value}" for name, value in msgspec.structs.asdict(config).items() if value is not None]
    return ", ".join(words) or "unlimited"


def _scenario(config: ScenarioConfig) -> Scenario:
    if not config.phase:
        raise ConfigError("phase: empty; write at least one table [[phase]]")
    usual = _way("link.", config.link)
    phases: list[Phase] = []
    start_s = 0.0
    for number, given in enumerate(config.phase):
        key = f"phase[{number}]."
        up = _way(key, given, usual)
        down = _way(f"{key}down.", given.down, up)
        duration_s = _read(f"{key}duration", given.duration, seconds, 0.0)
        if duration_s <= 0:
            raise ConfigError(f"{key}duration: a phase lasts longer than nothing")
        said = given.rate if given.outage == "none" else given.outage
        name = given.name or said or f"phase {number}"
        phases.append(Phase(name, start_s, duration_s, up, down, given.outage))
        start_s += duration_s
    luck = random.Random(config.seed)
    kills = [kill for number, given in enumerate(config.kill) for kill in _kills(f"kill[{number}].", given, luck)]
    stalls = [stall for number, given in enumerate(config.stall) for stall in _stalls(f"stall[{number}].", given)]
    ends = [(f"the kills of {kill.what}", kill.at_s + kill.down_s) for kill in kills]
    ends += [("the stalls", at_s + lasts_s) for at_s, lasts_s in stalls]
    for words, end_s in sorted(ends, key=lambda pair: -pair[1])[:1]:
        if end_s > start_s:
            raise ConfigError(
                f"{words} end {end_s:.0f} s after the start, the phases after {start_s:.0f} s: lengthen a phase"
            )
    return Scenario(
        tuple(phases),
        tuple(sorted(kills, key=lambda kill: kill.at_s)),
        tuple(sorted(stalls)),
        config.title,
        config.seed,
    )


def _kills(key: str, config: KillConfig, luck: random.Random) -> Iterator[Kill]:
    if config.mid_packet and config.what in ("edge", "cloud"):
        raise ConfigError(f"{key}mid_packet: only of broker and link; a node's packets are not watched")
    least_s = _read(f"{key}down", config.down, seconds, 0.0)
    most_s = _read(f"{key}down_most", config.down_most, seconds, least_s)
    if not 0 < least_s <= most_s:
        raise ConfigError(f"{key}down: longer than nothing, and no longer than down_most")
    at_s, pause_s = _read(f"{key}at", config.at, seconds, 0.0), _read(f"{key}pause", config.pause, seconds, 0.0)
    for _ in range(config.repeat):
        down_s = math.exp(luck.uniform(math.log(least_s), math.log(most_s)))
        yield Kill(config.what, at_s, down_s, luck.random() < config.mid_packet)
        at_s += down_s + pause_s


def _stalls(key: str, config: StallConfig) -> Iterator[tuple[float, float]]:
    at_s, lasts_s, pause_s = (
        _read(f"{key}{name}", text, seconds, 0.0)
        for name, text in (("at", config.at), ("lasts", config.lasts), ("pause", config.pause))
    )
    for number in range(config.repeat):
        yield at_s + number * (lasts_s + pause_s), lasts_s
