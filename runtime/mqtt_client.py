"""paho's client as the link wants it: one that only reads and writes when told, on a socket that hides no queue."""

from __future__ import annotations

import array
import contextlib
import socket
import struct
import threading
from collections.abc import Callable
from typing import Any

from paho.mqtt.client import Client
from paho.mqtt.enums import CallbackAPIVersion, MQTTProtocolVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties
from paho.mqtt.reasoncodes import ReasonCode

from runtime.reconnect import Version

# Linux. Above so many bytes that TCP may not send yet, the socket counts as full: what is not in the kernel can still
# be overtaken, or dropped when it is late.
TCP_NOTSENT_LOWAT = 25
NOTSENT_BYTES = 4 * 1024
TCP_INFO_BYTES_ACKED = 120  # offset in Linux's struct tcp_info, since 4.1
ABORT = struct.pack("ii", 1, 0)  # SO_LINGER: what is unsent is thrown away, and the other end is told


class DialedClient(Client):
    """paho's, on a connection that `dial` makes: paho's own waits for a name server for as long as that likes."""

    def __init__(self, dial: Callable[[], socket.socket], **options: Any) -> None:
        super().__init__(CallbackAPIVersion.VERSION2, **options)
        self._dial = dial

    def _create_socket(self) -> Any:
        return self._dial()


class MqttClient(DialedClient):
    """paho's, which tells of confirmations only on the thread that made it.

    Elsewhere paho would call `on_publish` for QoS 0, and make a publisher wait for whatever handler runs just then.
    """

    def __init__(
        self,
        client_id: str,
        version: Version,
        on_confirmed: Callable[[int, ReasonCode], None],
        dial: Callable[[], socket.socket],
    ) -> None:
        self._maker = threading.get_ident()
        options: dict[str, Any] = {}
        if version == "5":
            options["protocol"] = MQTTProtocolVersion.MQTTv5
        else:
            options.update(protocol=MQTTProtocolVersion.MQTTv311, clean_session=True)
        super().__init__(dial, client_id=client_id, **options)
        self.max_queued_messages_set(0)  # the link bounds both
        self.max_inflight_messages_set(0)
        self.on_socket_open = _set_up
        # With this set, paho's publish() only queues, and `loop_write` is the one place that writes.
        self.on_socket_register_write = _leave_to_us
        self.on_publish = lambda client, userdata, mid, reason, properties: on_confirmed(mid, reason)

    @property
    def on_publish(self) -> Any:
        """Called when a message is confirmed, with paho's locks held."""
        return super().on_publish if threading.get_ident() == self._maker else None

    @on_publish.setter
    def on_publish(self, function: Any) -> None:
        Client.on_publish.fset(self, function)  # type: ignore[attr-defined]

    @property
    def on_disconnect(self) -> Any:
        """Called with paho's lock of callbacks held, which a handler may hold that waits for the publisher."""
        return super().on_disconnect if threading.get_ident() == self._maker else None

    @on_disconnect.setter
    def on_disconnect(self, function: Any) -> None:
        Client.on_disconnect.fset(self, function)  # type: ignore[attr-defined]


class AliasProperties(Properties):
    """The properties of a PUBLISH with a topic alias, made once, as paho takes longer for that than for the rest."""

    def __init__(self, alias: int) -> None:
        super().__init__(PacketTypes.PUBLISH)  # type: ignore[no-untyped-call]
        self.TopicAlias = alias
        object.__setattr__(self, "_packed", super().pack())  # type: ignore[no-untyped-call]

    def pack(self) -> bytes:
        """Their bytes."""
        packed: bytes = object.__getattribute__(self, "_packed")
        return packed


def _socket(client: Client) -> socket.socket | None:
    sock: Any = client.socket()  # paho says less of it than it is
    return sock if isinstance(sock, socket.socket) else None


def progress(client: Client) -> tuple[int, int] | None:
    """Bytes that the other machine has acknowledged, and bytes handed to the kernel that it has not; None: unknown."""
    sock = _socket(client)
    if sock is None:
        return None
    try:
        import fcntl
        import termios

        info = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
        left = array.array("i", [0])
        fcntl.ioctl(sock.fileno(), termios.TIOCOUTQ, left)
        return struct.unpack_from("=Q", info, TCP_INFO_BYTES_ACKED)[0], left[0]
    except (ImportError, AttributeError, OSError, ValueError, struct.error):  # not Linux, or it has just been closed
        return None


def abort(client: Client) -> None:
    """Close a connection to nobody. What is in the kernel must not come out minutes later, before what is new."""
    sock = _socket(client)
    if sock is not None:
        with contextlib.suppress(OSError, ValueError):
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, ABORT)
        with contextlib.suppress(OSError):
            sock.close()


def _set_up(client: Client, userdata: object, sock: Any) -> None:
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    with contextlib.suppress(OSError):  # not Linux
        sock.setsockopt(socket.IPPROTO_TCP, TCP_NOTSENT_LOWAT, NOTSENT_BYTES)


def _leave_to_us(client: Client, userdata: object, sock: object) -> None:
    pass
