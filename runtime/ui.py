"""The command `kinflow ui`: a local web page that shows what the cameras of a site see, who answers and what it costs.

A process of its own, so that it takes no time from what serves; `node --ui`, `sim --ui` and `demo` start one beside
them.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import secrets
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import click

from runtime import config, topics
from runtime.cli import stop_without_parent
from runtime.config import BrokerConfig, NodeConfig, UiConfig
from runtime.counters import Counters
from runtime.errors import ConfigError, KinflowError
from runtime.link import open_link

START_S = 60.0
STOP_S = 5.0
NICENESS = 10  # whoever looks on waits for those who work
TRIES = 20  # ports from the wanted one on, where any will do


@click.command()
@click.option(
    "--config",
    "path",
    type=click.Path(path_type=Path),
    help="A node's TOML: its broker, its site and its table [ui], where it has one.",
)
@click.option("--broker", metavar="HOST:PORT", help="A broker to listen on, in place of --config.")
@click.option("--site", help="Default: that of --config, else home.")
@click.option("--host", help="The address to serve on. Default: 127.0.0.1, which only this machine can reach.")
@click.option("--port", type=click.IntRange(1, 65535), help="Default: 8080.")
@click.option("--with-parent", is_flag=True, hidden=True)
def ui_command(
    path: Path | None, broker: str | None, site: str | None, host: str | None, port: int | None, with_parent: bool
) -> None:
    """Serve a web page of what a site's devices and nodes tell; it listens, and sends nothing.

    There is no login: whoever reaches HOST and PORT sees all answers, and the previews of devices that send them.
    """
    require()
    if (path is None) == (broker is None):
        raise ConfigError(
            "kinflow ui: name either a node's settings by --config FILE or a broker by --broker HOST:PORT"
        )
    wanted = UiConfig()
    if path is not None:
        node = config.load(path, NodeConfig)
        listened, site = node.broker, site or node.site
        wanted = node.ui or wanted
    else:
        listened, site = broker_at(broker or ""), site or "home"
    if not topics.valid_id(site):
        raise ConfigError(f"--site {site!r}: must be 1 to 64 letters, digits, '_' or '-'")
    host, port = host or wanted.host, port or wanted.port
    listener = _listen(host, port)
    from runtime import ui_page  # what it imports takes a second and some 60 MB

    stop = threading.Event()
    if with_parent:
        os.nice(NICENESS)
        threading.Thread(target=stop_without_parent, args=(stop,), name="kinflow-parent", daemon=True).start()
    link = open_link(listened, client_id=f"kinflow-ui-{secrets.token_hex(4)}", counters=Counters())
    board = ui_page.Board(site, link, f"{listened.host}:{listened.port}")
    for wanted_topics in topics.reports(site):
        link.subscribe(wanted_topics, board.put)
    link.start()
    if not with_parent:
        click.echo(f"the page is at {address(host, port)}", err=True)
    try:
        ui_page.serve(board, listener, host, stop)
    finally:
        link.close()


def require() -> None:
    """Check that what the page needs is installed.

    Raises:
        ConfigError: it is not; says what to install.
    """
    if importlib.util.find_spec("nicegui") is None:
        raise ConfigError("the page needs NiceGUI, which is not installed; run: pip install 'kinflow[ui]'")


def address(host: str, port: int) -> str:
    """Where a browser of this machine finds the page."""
    shown = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)
    return f"http://{shown}:{port}"


def free_port(host: str, wanted: int) -> int:
    """The first port from `wanted` on that nobody listens on.

    Raises:
        ConfigError: none of the next ones is free.
    """
    for port in range(wanted, min(wanted + TRIES, 65536)):
        with contextlib.suppress(ConfigError):
            _listen(host, port).close()
            return port
    raise ConfigError(
        f"no port from {wanted} to {wanted + TRIES - 1} is free on {host} for the page; name one by --port"
    )


class Page:
    """The page as a process beside this one, from entering the context to leaving it.

    Args:
        path: a node's settings.
        host: the address to serve on.
        port: the port to serve on.

    Raises:
        ConfigError: what it needs is not installed, or the address cannot be had.
    """

    def __init__(self, path: Path, host: str, port: int) -> None:
        require()
        _listen(host, port).close()
        self.address = address(host, port)
        self._near = ({"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host), port)
        where = ["--host", host, "--port", str(port)]
        self._command = ["--quiet", "ui", "--config", str(path), *where, "--with-parent"]

    def __enter__(self) -> Page:
        # In a session of its own, so that Ctrl-C reaches this process alone; when the pipe ends, the page does.
        self._process = subprocess.Popen(
            [sys.executable, "-m", "runtime.cli", *self._command],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            start_new_session=True,
        )
        return self

    def __exit__(self, *failure: object) -> None:
        self._process.terminate()
        try:
            self._process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        assert self._process.stdin is not None
        self._process.stdin.close()

    def wait(self) -> None:
        """Return when the page is there.

        Raises:
            KinflowError: it ended, or did not come in time.
        """
        end_s = time.monotonic() + START_S
        while time.monotonic() < end_s:
            if self._process.poll() is not None:
                raise KinflowError(f"the page ended with exit code {self._process.returncode}; its message is above")
            with contextlib.suppress(OSError), socket.create_connection(self._near, 1) as knock:
                knock.settimeout(START_S)
                knock.sendall(b"HEAD / HTTP/1.0\r\nHost: localhost\r\n\r\n")
                if knock.recv(1):  # the socket listens before the program behind it is there
                    return
            time.sleep(0.05)
        raise KinflowError(f"the page did not come within {START_S:.0f} s")


def _listen(host: str, port: int) -> socket.socket:
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0][0]
        return socket.create_server((host, port), family=family)
    except OSError as error:
        reason = error.strerror or str(error)
        raise ConfigError(f"the page cannot be served on {host} port {port}: {reason}; choose another one") from error


def broker_at(text: str) -> BrokerConfig:
    """The broker that an option --broker HOST:PORT names.

    Raises:
        ConfigError: it names none.
    """
    host, _, port = text.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 65536:
        raise ConfigError(f"--broker {text!r}: write it as HOST:PORT, such as 127.0.0.1:1883")
    return BrokerConfig(host=host, port=int(port))
