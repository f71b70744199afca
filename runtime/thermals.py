"""Heat and power of a board: from sysfs, and on a Raspberry Pi from the firmware's throttling flags.

Paths and the command are given, so that tests and other boards point elsewhere. What a board lacks is None or False.
"""

from __future__ import annotations

import subprocess
from dataclasses import dataclass
from pathlib import Path

SYS = Path("/sys")
VCGENCMD = ("vcgencmd", "get_throttled")
COMMAND_S = 2.0
# Bits of `vcgencmd get_throttled`: what is now; the same 16 higher: what has been since the start.
UNDERVOLTAGE, CAPPED, THROTTLED, SOFT_LIMIT = 1, 2, 4, 8
SINCE_START = 16


@dataclass(frozen=True, slots=True)
class Board:
    """What a board says of itself now."""

    celsius: float | None = None  # of its hottest zone; None: it has none
    undervoltage: bool = False
    capped: bool = False  # the processor's frequency, because of the voltage
    throttled: bool = False
    soft_limit: bool = False  # the first of two limits of temperature
    before: tuple[str, ...] = ()  # of these, what has been since the start and is not now


def decode(flags: int) -> Board:
    """The firmware's flags as words."""
    names = {UNDERVOLTAGE: "undervoltage", CAPPED: "capped", THROTTLED: "throttled", SOFT_LIMIT: "soft_limit"}
    return Board(
        undervoltage=bool(flags & UNDERVOLTAGE),
        capped=bool(flags & CAPPED),
        throttled=bool(flags & THROTTLED),
        soft_limit=bool(flags & SOFT_LIMIT),
        before=tuple(name for bit, name in names.items() if flags & bit << SINCE_START and not flags & bit),
    )


class Thermals:
    """Reads a board.

    Sources, each used where it exists: `class/thermal/thermal_zone*/temp` (thousandths of a degree, all boards),
    `devices/platform/soc/soc:firmware/get_throttled` (hexadecimal, Raspberry Pi), else the command; and
    `class/hwmon/hwmon*/in0_lcrit_alarm` of the driver `rpi_volt` (1: undervoltage since it was read last).
    """

    def __init__(self, sysfs: Path = SYS, command: tuple[str, ...] | None = VCGENCMD) -> None:
        self._zones = sorted(sysfs.glob("class/thermal/thermal_zone*/temp"))
        self._flags = next(iter(sorted(sysfs.glob("devices/platform/soc*/soc*:firmware/get_throttled"))), None)
        self._alarms = [
            path.parent / "in0_lcrit_alarm"
            for path in sorted(sysfs.glob("class/hwmon/hwmon*/name"))
            if _read(path) == "rpi_volt"
        ]
        self._command = command if self._flags is None else None

    def read(self) -> Board | None:
        """What the board says now; None: it says nothing."""
        celsius = [value / 1000 for value in (_number(_read(path)) for path in self._zones) if value is not None]
        flags = self._read_flags()
        alarm = any(_read(path) == "1" for path in self._alarms)
        if not celsius and flags is None and not self._alarms:
            return None
        said = decode(flags or 0)
        return Board(
            celsius=max(celsius) if celsius else None,
            undervoltage=said.undervoltage or alarm,
            capped=said.capped,
            throttled=said.throttled,
            soft_limit=said.soft_limit,
            before=said.before,
        )

    def _read_flags(self) -> int | None:
        if self._flags is not None:
            return _number(_read(self._flags), 16)
        if self._command is None:
            return None
        try:
            done = subprocess.run(self._command, capture_output=True, text=True, timeout=COMMAND_S, check=False)
        except (OSError, subprocess.TimeoutExpired):
            self._command = None  # no such board: do not ask again
            return None
        _, _, value = done.stdout.strip().partition("throttled=")
        return _number(value, 16) if done.returncode == 0 else None


def _read(path: Path) -> str | None:
    try:
        return path.read_text("ascii", errors="replace").strip()
    except OSError:
        return None


def _number(text: str | None, base: int = 10) -> int | None:
    try:
        return None if text is None else int(text, base)
    except ValueError:
        return None
