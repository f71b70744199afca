"""A subscriber for whom the broker keeps a session: what comes while it is away is there when it is back.

A connection of its own instead of a Link, because what matters here is the other way about: messages are acknowledged
only when they have been dealt with, and one that comes while nobody is there is kept. Whoever finds that something is
missing may ask for it.
"""

from __future__ import annotations

import logging
import random
import threading
import time
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

from paho.mqtt.client import Client, ConnectFlags, MQTTMessage
from paho.mqtt.enums import MQTTErrorCode, MQTTProtocolVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties
from paho.mqtt.reasoncodes import ReasonCode

from runtime.config import BrokerConfig
from runtime.credentials import read_password, tls_context
from runtime.dialing import Dialer, UnansweredError
from runtime.errors import LinkError
from runtime.mqtt_client import DialedClient

log = logging.getLogger(__name__)

CONNECT_TIMEOUT_S = 5.0
ANSWER_MIN_S, ANSWER_MAX_S = 5.0, 30.0  # twice as long after each silence
PAUSE_MIN_S, PAUSE_MAX_S = 0.25, 5.0
TURN_S = 0.25
STEADY_S = 1.0  # a connection that has lived so long was a good one
SHORT_IN_A_ROW = 3
FIVE, THREE = MQTTProtocolVersion.MQTTv5, MQTTProtocolVersion.MQTTv311


class Subscriber:
    """Everything on one topic filter, at QoS 1.

    Args:
        broker: where to listen.
        name: the client id.
        topic_filter: what to.
        keep_s: how long the broker keeps the session when we are away; 0: not at all.
        hear: called with topic and payload of every message; it is acknowledged afterwards. May return a topic to
            which an empty message is to go.
        anew: called when the broker has no session of ours, and may have had messages; gives such topics.
    """

    def __init__(
        self,
        broker: BrokerConfig,
        name: str,
        topic_filter: str,
        keep_s: int,
        hear: Callable[[str, bytes], str | None],
        anew: Callable[[], Iterable[str]],
    ) -> None:
        self._broker = broker
        self._name = name
        self._filter = topic_filter
        self._keep_s = keep_s
        self._hear = hear
        self._anew = anew
        self._session = False  # whether the broker had one of ours
        self._where = f"{broker.host}:{broker.port}"
        self._password = read_password(broker)
        self._tls = tls_context(broker)
        self._protocol = THREE if broker.version == "3.1.1" else FIVE
        self._acknowledged = False
        self._answer_s = ANSWER_MIN_S
        self._fatal = ""
        self._problem = ""

    def run(self, stop: threading.Event) -> None:
        """Listen until `stop` is set, however often the broker goes away.

        Raises:
            LinkError: the broker refuses us, so trying again cannot help.
        """
        dialer = Dialer(self._broker.host, self._broker.port, self._tls, stop)
        pause_s = PAUSE_MIN_S
        short = 0  # connections in a row that were accepted and soon lost
        while not stop.is_set():
            self._acknowledged = False
            start_s = time.monotonic()
            self._serve(dialer, stop)
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

    def _serve(self, dialer: Dialer, stop: threading.Event) -> None:
        """Connect once, and stay until the connection ends."""
        client = self._client(dialer)
        given: dict[str, Any] = {}
        if self._protocol == FIVE:
            kept = Properties(PacketTypes.CONNECT)  # type: ignore[no-untyped-call]
            kept.SessionExpiryInterval = self._keep_s
            given = {"clean_start": self._keep_s == 0, "properties": kept}
        try:
            client.connect(self._broker.host, self._broker.port, self._broker.keepalive_s, **given)
        except UnansweredError:
            self._unanswered()
            return
        except (OSError, ValueError) as error:
            if stop.is_set():
                return
            self._say(f"cannot reach the broker at {self._where}: {error}")
            return
        end_s = time.monotonic() + self._answer_s
        while not stop.is_set() and not self._fatal:
            if client.loop(TURN_S) != MQTTErrorCode.MQTT_ERR_SUCCESS:
                break
            if not self._acknowledged and time.monotonic() > end_s:
                self._unanswered()
                return
        if stop.is_set() or self._fatal:
            client.disconnect()
            client.loop(0)
        elif self._acknowledged:
            self._say(f"lost the broker at {self._where}")
        else:
            self._say(f"{self._where} takes no CONNECT; is it an MQTT broker, and does it want TLS?")

    def _unanswered(self) -> None:
        self._say(f"{self._where} does not answer within {self._answer_s:g} s; is the broker well?")
        self._answer_s = min(2 * self._answer_s, ANSWER_MAX_S)

    def _client(self, dialer: Dialer) -> Client:
        options: dict[str, Any] = {} if self._protocol == FIVE else {"clean_session": self._keep_s == 0}
        dial = partial(dialer.dial, CONNECT_TIMEOUT_S, self._answer_s)
        client = DialedClient(dial, client_id=self._name, protocol=self._protocol, **options)
        if self._broker.username is not None:
            client.username_pw_set(self._broker.username, self._password)
        if self._tls is not None:
            client.tls_set_context(self._tls)
        client.on_connect = self._connected
        client.on_subscribe = self._subscribed
        client.on_message = self._received
        return client

    def _connected(
        self, client: Client, userdata: object, flags: ConnectFlags, reason: ReasonCode, properties: Properties | None
    ) -> None:
        if not reason.is_failure:
            self._acknowledged = True
            self._session = flags.session_present
            self._answer_s = ANSWER_MIN_S
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
        if not self._session:
            for topic in self._anew():
                client.publish(topic, b"", qos=1)

    def _received(self, client: Client, userdata: object, message: MQTTMessage) -> None:
        wanted = self._hear(message.topic, bytes(message.payload))
        if wanted is not None:
            client.publish(wanted, b"", qos=1)

    def _say(self, problem: str) -> None:
        # The same sentence every few seconds helps nobody.
        log.log(logging.DEBUG if problem == self._problem else logging.WARNING, "%s; trying again", problem)
        self._problem = problem
