"""The command `kinflow events`: prints what devices tell comes and goes, each event once, and says what is missing."""

from __future__ import annotations

import logging
import signal
import socket
import sys
import threading
import time
from pathlib import Path
from types import FrameType
from typing import Annotated

import click
import msgspec

from runtime import config, topics
from runtime.config import NodeConfig, printable
from runtime.errors import ConfigError
from runtime.inbox import MOST_SESSIONS, Inbox, Session
from runtime.subscriber import Subscriber
from runtime.ui import broker_at

log = logging.getLogger(__name__)

DAY_S = 86_400
ASK_PAUSE_S = 5.0  # one gap is often told by many events


class Heard(msgspec.Struct, frozen=True):
    """What of an event is looked at here."""

    session: Annotated[str, msgspec.Meta(min_length=1, max_length=64)]  # we keep it
    sequence: Annotated[int, msgspec.Meta(ge=1)]
    type: str
    camera: str
    label: str
    score: float
    duration_ms: float
    age_ms: float | None = None
    reason: str | None = None


@click.command()
@click.option("--broker", metavar="HOST:PORT", help="The broker that devices publish to, such as 127.0.0.1:1883.")
@click.option(
    "--config",
    "path",
    type=click.Path(path_type=Path),
    help="In place of --broker: a node's TOML, for its broker with password and certificates, and its site.",
)
@click.option("--site", help="Default: that of --config, else home.")
@click.option("--device", help="Only this device's events. Default: all devices of the site.")
@click.option(
    "--id",
    "name",
    help="A name that stays the same: under it the broker keeps what comes while we are away. Two that run at a time"
    " need two names. Default: made of the host's name, the site and the device.",
)
@click.option(
    "--keep",
    "keep_s",
    type=click.IntRange(0, 2**32 - 2),
    default=DAY_S,
    show_default=True,
    metavar="SECONDS",
    help="How long the broker keeps events for us while we are away. 0: not at all.",
)
@click.option(
    "--seen",
    "seen",
    type=click.Path(path_type=Path),
    help="A file that remembers what was printed: the next start prints nothing again, and notices gaps.",
)
@click.option("--json", "as_json", is_flag=True, help="Print every event as a JSON line, as it came, with its device.")
def events_command(
    broker: str | None,
    path: Path | None,
    site: str | None,
    device: str | None,
    name: str | None,
    keep_s: int,
    seen: Path | None,
    as_json: bool,
) -> None:
    """Print what comes, stays and goes before the cameras of a site, as devices tell it, until Ctrl-C.

    Devices keep an event until the broker has confirmed it, and send it again when in doubt; this command prints each
    once, and says on standard error how many are missing. After the first start the broker keeps what comes while the
    command is away, for as long as --keep says, under the name --id.

    \b
    A line: when it happened by this machine's clock (dashes where nobody knows),
    device and camera, new, update or end, label, score, how long it was seen.
        14:03:22.4  porch/cam0  new     person  0.91  0.2 s
        14:03:31.0  porch/cam0  end     person  0.88  8.7 s  gone

    \b
    Examples:
        kinflow events --broker 192.168.1.10:1883
        kinflow events --broker 192.168.1.10:1883 --device porch --json | my-program
    """
    if (path is None) == (broker is None):
        raise ConfigError("kinflow events: name either a broker by --broker HOST:PORT or a node's settings by --config")
    if path is not None:
        node = config.load(path, NodeConfig)
        listened, site = node.broker, site or node.site
    else:
        listened, site = broker_at(broker or ""), site or "home"
    for option, value in (("--site", site), ("--device", device)):
        if value is not None and not topics.valid_id(value):
            raise ConfigError(f"{option} {value!r}: must be 1 to 64 letters, digits, '_' or '-'")
    name = name or "-".join(["kinflow-events", socket.gethostname(), site, *([device] if device else [])])
    stop = threading.Event()

    def ask_to_stop(number: int, frame: FrameType | None) -> None:
        stop.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, ask_to_stop)
    printer = Printer(as_json, None if seen is None else Memory(seen))
    try:
        Subscriber(listened, name, topics.events(site, device), keep_s, printer.put, printer.all_again).run(stop)
    finally:
        click.echo(printer.summary(), err=True)


class Memory:
    """What was seen, in a file that is written anew each time.

    Raises:
        ConfigError: the file cannot be read or written, or holds something else.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._works = True
        try:
            text = path.read_bytes() if path.exists() else b"[]"
            self.inbox = Inbox(msgspec.json.decode(text, type=list[Session]))
            self._write()
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise ConfigError(f"--seen {path} is no file of ours ({error}); name another one or remove it") from error
        except OSError as error:
            raise ConfigError(f"--seen {path} cannot be used: {error.strerror}; name another file") from error

    def save(self) -> None:
        """Write down what the inbox knows now."""
        try:
            self._write()
        except OSError as error:
            log.log(logging.WARNING if self._works else logging.DEBUG, "--seen %s: %s", self._path, error.strerror)
            self._works = False

    def _write(self) -> None:
        new = self._path.with_name(f"{self._path.name}.new")
        new.write_bytes(msgspec.json.encode(self.inbox.known))
        new.replace(self._path)


class Printer:
    """Prints each event once; with a memory, over all runs that share it."""

    def __init__(self, as_json: bool, memory: Memory | None) -> None:
        self._as_json = as_json
        self._memory = memory
        self._inbox = Inbox() if memory is None else memory.inbox
        self._printed = 0
        self._again = 0
        self._asked_s: dict[str, float] = {}  # by topic, of time.monotonic()

    def put(self, topic: str, payload: bytes) -> str | None:
        """A message has come. Returns the topic on which its device is to be asked for what is missing before it."""
        found = topics.report(topic)
        try:
            event = msgspec.json.decode(payload, type=Heard)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            log.warning("%s: no event that this version can read: %s", printable(topic), printable(str(error)))
            return None
        if found is None:
            log.warning("%s: no event of a device", printable(topic))
            return None
        who = found[0].name
        taken = self._inbox.take(str(found[0]), event.session, event.sequence)
        if taken.skipped:
            told = f"before number {event.sequence} of session {printable(event.session)}"
            log.warning("%s: %s missing %s", who, _plural(taken.skipped), told)
        if not taken.new:
            self._again += 1
            return None
        self._printed += 1
        if self._as_json:
            line = msgspec.json.encode({"site": found[0].site, "device": who, **msgspec.json.decode(payload)})
        else:
            line = sentence(who, event, time.time()).encode()
        sys.stdout.buffer.write(line + b"\n")
        sys.stdout.buffer.flush()
        if self._memory is not None:
            self._memory.save()
        return self._ask(found[0].again) if taken.skipped else None

    def all_again(self) -> list[str]:
        """The topics on which all devices that were ever heard are to be asked for what may be missing."""
        asked = dict.fromkeys(f"{session.sender}/again" for session in self._inbox.known)
        return [topic for topic in asked if topics.report(topic) is not None]  # a file may hold anything

    def _ask(self, topic: str) -> str | None:
        now_s = time.monotonic()
        if now_s - self._asked_s.get(topic, -ASK_PAUSE_S) < ASK_PAUSE_S:
            return None
        if len(self._asked_s) == MOST_SESSIONS:
            self._asked_s.clear()
        self._asked_s[topic] = now_s
        return topic

    def summary(self) -> str:
        """One sentence on all of it."""
        missing = self._inbox.missing
        return f"{_plural(self._printed)} printed, {missing} missing, {self._again} came again and were left out"


def sentence(device: str, event: Heard, now_s: float) -> str:
    """An event as a line for people; `now_s` is the time of day in seconds since 1970."""
    when = "--:--:--.-"
    if event.age_ms is not None:
        then_s = now_s - event.age_ms / 1000
        when = time.strftime("%H:%M:%S", time.localtime(then_s)) + f".{int(then_s * 10) % 10}"
    words = f"{when}  {device}/{event.camera}  {event.type:6}  {event.label}  {event.score:.2f}"
    return printable(f"{words}  {event.duration_ms / 1000:.1f} s  {event.reason or ''}".rstrip())


def _plural(count: int) -> str:
    return f"{count} event" if count == 1 else f"{count} events"
