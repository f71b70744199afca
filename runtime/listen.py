"""The command `kinflow events`: prints what devices tell comes and goes, each event once, and says what is missing.

A connection of its own instead of a Link, because what matters here is the other way about: the broker keeps a session
for us while we are away, and a message is acknowledged only when it has been printed.
"""

from __future__ import annotations

import logging
import random
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import click
import msgspec
from paho.mqtt.client import Client, MQTTMessage
from paho.mqtt.enums import CallbackAPIVersion, MQTTErrorCode, MQTTProtocolVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties
from paho.mqtt.reasoncodes import ReasonCode

from runtime import config, topics
from runtime.config import BrokerConfig, NodeConfig, printable
from runtime.credentials import read_password, tls_context
from runtime.errors import ConfigError, LinkError
from runtime.inbox import Inbox
from runtime.ui import broker_at

log = logging.getLogger(__name__)

CONNECT_TIMEOUT_S = 5.0
PAUSE_MIN_S, PAUSE_MAX_S = 0.25, 5.0
TURN_S = 0.25
DAY_S = 86_400
STEADY_S = 1.0  # a connection that has lived so long was a good one
SHORT_IN_A_ROW = 3
FIVE, THREE = MQTTProtocolVersion.MQTTv5, MQTTProtocolVersion.MQTTv311


class Heard(msgspec.Struct, frozen=True):
    """What of an event is looked at here."""

    session: str
    sequence: int
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
@click.option("--json", "as_json", is_flag=True, help="Print every event as a JSON line, as it came, with its device.")
def events_command(
    broker: str | None,
    path: Path | None,
    site: str | None,
    device: str | None,
    name: str | None,
    keep_s: int,
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
    printer = Printer(as_json)
    try:
        Listener(listened, name, topics.events(site, device), keep_s, printer.put).run(stop)
    finally:
        click.echo(printer.summary(), err=True)


class Printer:
    """Prints each event once."""

    def __init__(self, as_json: bool) -> None:
        self._as_json = as_json
        self._inbox = Inbox()
        self._printed = 0
        self._again = 0

    def put(self, topic: str, payload: bytes) -> None:
        """A message has come."""
        found = topics.report(topic)
        try:
            event = msgspec.json.decode(payload, type=Heard)
        except msgspec.DecodeError as error:
            log.warning("%s: no event that this version can read: %s", printable(topic), printable(str(error)))
            return
        if found is None or event.sequence < 1:
            log.warning("%s: no event of a device", printable(topic))
            return
        who = found[0].name
        taken = self._inbox.take(str(found[0]), event.session, event.sequence)
        if taken.skipped:
            told = f"before number {event.sequence} of session {printable(event.session)}"
            log.warning("%s: %s missing %s", who, _plural(taken.skipped), told)
        if not taken.new:
            self._again += 1
            return
        self._printed += 1
        if self._as_json:
            line = msgspec.json.encode({"site": found[0].site, "device": who, **msgspec.json.decode(payload)})
        else:
            line = sentence(who, event, time.time()).encode()
        sys.stdout.buffer.write(line + b"\n")
        sys.stdout.buffer.flush()

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


class Listener:
    """A subscriber at QoS 1 for whom the broker keeps a session.

    Args:
        broker: where to listen.
        name: the client id.
        topic_filter: what to.
        keep_s: how long the broker keeps the session when we are away; 0: not at all.
        hear: called with topic and payload of every message; it is acknowledged afterwards.
    """

    def __init__(
        self, broker: BrokerConfig, name: str, topic_filter: str, keep_s: int, hear: Callable[[str, bytes], None]
    ) -> None:
        self._broker = broker
        self._name = name
        self._filter = topic_filter
        self._keep_s = keep_s
        self._hear = hear
        self._where = f"{broker.host}:{broker.port}"
        self._password = read_password(broker)
        self._tls = tls_context(broker)
        self._protocol = THREE if broker.version == "3.1.1" else FIVE
        self._acknowledged = False
        self._fatal = ""
        self._problem = ""

    def run(self, stop: threading.Event) -> None:
        """Listen until `stop` is set, however often the broker goes away.

        Raises:
            LinkError: the broker refuses us, so trying again cannot help.
        """
        pause_s = PAUSE_MIN_S
        short = 0  # connections in a row that were accepted and soon lost
        while not stop.is_set():
            self._acknowledged = False
            start_s = time.monotonic()
            self._serve(stop)
            if self._fatal:
                raise LinkError(self._fatal)
            if not self._acknowledged and self._broker.version == "auto":
                # A broker without MQTT 5 may just hang up, so the two versions take turns until one is accepted.
                self._protocol = THREE if self._protocol == FIVE else FIVE
            short = short + 1 if self._acknowledged and time.monotonic() - start_s < STEADY_S else 0
            if short == SHORT_IN_A_ROW and not stop.is_set():
                other = "does another client use this name? give one of them another by --id"
                log.warning("%s is dropped soon after it is accepted; %s", self._name, other)
            good = self._acknowledged and short < SHORT_IN_A_ROW
            pause_s = PAUSE_MIN_S if good else min(pause_s * 2, PAUSE_MAX_S)
            stop.wait(pause_s * random.uniform(0.5, 1.0))

    def _serve(self, stop: threading.Event) -> None:
        """Connect once, and stay until the connection ends."""
        client = self._client()
        given: dict[str, Any] = {}
        if self._protocol == FIVE:
            kept = Properties(PacketTypes.CONNECT)  # type: ignore[no-untyped-call]
            kept.SessionExpiryInterval = self._keep_s
            given = {"clean_start": self._keep_s == 0, "properties": kept}
        try:
            client.connect(self._broker.host, self._broker.port, self._broker.keepalive_s, **given)
        except (OSError, ValueError) as error:
            self._say(f"cannot reach the broker at {self._where}: {error}")
            return
        end_s = time.monotonic() + CONNECT_TIMEOUT_S
        while not stop.is_set() and not self._fatal:
            if client.loop(TURN_S) != MQTTErrorCode.MQTT_ERR_SUCCESS:
                break
            if not self._acknowledged and time.monotonic() > end_s:
                break
        if stop.is_set() or self._fatal:
            client.disconnect()
            client.loop(0)
        elif self._acknowledged:
            self._say(f"lost the broker at {self._where}")
        else:
            self._say(f"{self._where} takes no CONNECT; is it an MQTT broker, and does it want TLS?")

    def _client(self) -> Client:
        options: dict[str, Any] = {} if self._protocol == FIVE else {"clean_session": self._keep_s == 0}
        client = Client(CallbackAPIVersion.VERSION2, client_id=self._name, protocol=self._protocol, **options)
        client.connect_timeout = CONNECT_TIMEOUT_S
        if self._broker.username is not None:
            client.username_pw_set(self._broker.username, self._password)
        if self._tls is not None:
            client.tls_set_context(self._tls)
        client.on_connect = self._connected
        client.on_subscribe = self._subscribed
        client.on_message = self._received
        return client

    def _connected(
        self, client: Client, userdata: object, flags: object, reason: ReasonCode, properties: Properties | None
    ) -> None:
        if not reason.is_failure:
            self._acknowledged = True
            client.subscribe(self._filter, qos=1)
        elif "protocol" not in str(reason).lower():
            self._fatal = f"the broker at {self._where} refuses us: {reason}; give its password by --config"

    def _subscribed(
        self, client: Client, userdata: object, mid: int, reasons: list[ReasonCode], properties: Properties | None
    ) -> None:
        if any(reason.is_failure for reason in reasons):
            self._fatal = f"the broker at {self._where} refuses {self._filter}: {reasons[0]}; look at its ACL"
            return
        self._problem = ""
        log.info("listening for %s at %s", self._filter, self._where)

    def _received(self, client: Client, userdata: object, message: MQTTMessage) -> None:
        self._hear(message.topic, bytes(message.payload))

    def _say(self, problem: str) -> None:
        # The same sentence every few seconds helps nobody.
        log.log(logging.DEBUG if problem == self._problem else logging.WARNING, "%s; trying again", problem)
        self._problem = problem


def _plural(count: int) -> str:
    return f"{count} event" if count == 1 else f"{count} events"
