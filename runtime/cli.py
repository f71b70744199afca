"""The command `kinflow`. A subcommand's module is imported only when it is called, so that the device stays light."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
import threading
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from types import FrameType
from typing import Any

import click
import msgspec

from runtime.errors import ConfigError, KinflowError

COMMANDS = {
    "export": ("export.cli:export_command", "Turn a model and unlabelled frames into a bundle."),
    "bundle": ("runtime.bundle_tool:bundle_group", "Show or verify a bundle."),
    "bench": ("export.bench:bench_group", "Measure what a bundle's codecs, exits and variants cost and give."),
    "device": ("runtime.cli:device_command", "Answer camera frames on this board."),
    "node": ("runtime.cli:node_command", "Serve deeper segments to devices or to other nodes."),
    "events": ("runtime.listen:events_command", "Print what devices tell comes and goes, each event once."),
    "ui": ("runtime.ui:ui_command", "Serve a web page of what cameras see and who answers."),
    "sim": ("runtime.sim:sim_command", "Run device, edge and cloud on this machine."),
    "demo": ("runtime.demo:demo_command", "Show it all on a real clip, with the bundle that ships."),
}
EXTRAS = {"export": "export", "bench": "export", "sim": "demo", "demo": "demo"}


log = logging.getLogger(__name__)


class _Lazy(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in COMMANDS:
            return None
        module, attribute = COMMANDS[name][0].split(":")
        try:
            command: click.Command = getattr(import_module(module), attribute)
        except ModuleNotFoundError as error:
            if name not in EXTRAS or (error.name or "").split(".")[0] in ("runtime",):
                raise
            raise click.ClickException(
                f"{error.name} is not installed; run: pip install 'kinflow[{EXTRAS[name]}]'"
            ) from error
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        # click's own would import every subcommand to ask for its help.
        with formatter.section("Commands"):
            formatter.write_dl([(name, sentence) for name, (_, sentence) in COMMANDS.items()])


@click.group(cls=_Lazy, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="kinflow", message="kinflow %(version)s")
@click.option("-v", "--verbose", is_flag=True, help="Log every refusal and retry, and show tracebacks.")
@click.option("-q", "--quiet", is_flag=True, help="Log warnings and errors only.")
def cli(verbose: bool, quiet: bool) -> None:
    """One neural network across a camera board, a box nearby and the cloud.

    Start with `kinflow demo`. With a model and frames of your own: `kinflow export`, then `kinflow sim`, then
    `kinflow device` on the board and `kinflow node` on the box.
    """
    logging.basicConfig(
        stream=sys.stderr,
        level=logging.DEBUG if verbose else logging.WARNING if quiet else logging.INFO,
        format="%(asctime)s %(levelname).1s %(name)s: %(message)s",
        datefmt="%H:%M:%S",
    )


@click.command()
@click.option(
    "--config", "path", type=click.Path(path_type=Path), required=True, help="TOML; the least is a broker and a bundle."
)
@click.option("--json", "as_json", is_flag=True, help="Print every result and plan as a JSON line on stdout.")
@click.option("--with-parent", is_flag=True, hidden=True)
def device_command(path: Path, as_json: bool, with_parent: bool) -> None:
    """Capture frames, run the early segments, answer when an exit is confident, send features up when not."""
    from runtime import config
    from runtime.device import Device

    lock = threading.Lock()

    def show(result: object) -> None:
        with lock:
            sys.stdout.buffer.write(msgspec.json.encode(result) + b"\n")
            sys.stdout.buffer.flush()

    def moved(told: Mapping[str, Any]) -> None:
        show({"event": "plan", **told})

    device = Device(
        config.load(path, config.DeviceConfig), show if as_json else None, on_plan=moved if as_json else None
    )
    _serve(device, "device", as_json, with_parent)


@click.command()
@click.option(
    "--config", "path", type=click.Path(path_type=Path), required=True, help="TOML; the least is a broker and a bundle."
)
@click.option(
    "--ui", is_flag=True, help="Serve the page of `kinflow ui` as well; so does a table [ui] in the settings."
)
@click.option("--json", "as_json", is_flag=True, help="Print the counters as a JSON line on stdout at the end.")
@click.option("--with-parent", is_flag=True, hidden=True)
def node_command(path: Path, ui: bool, as_json: bool, with_parent: bool) -> None:
    """Take features in, batch them across devices, run deeper segments, answer or escalate to the next node."""
    from runtime import config
    from runtime.node import Node

    settings = config.load(path, config.NodeConfig)
    node = Node(settings)
    with contextlib.ExitStack() as stack:
        if ui or settings.ui is not None:
            from runtime.ui import Page, require

            require()
            where = settings.ui or config.UiConfig()
            try:
                page = stack.enter_context(Page(path, where.host, where.port))
                log.info("the page will be at %s", page.address)
            except ConfigError as error:  # who serves does not stop because nobody can look on
                log.warning("%s; going on without the page", error)
        _serve(node, node.tier_name, as_json, with_parent)


def _serve(tier: Any, name: str, as_json: bool, with_parent: bool) -> None:
    """Run a device or a node until it ends by itself or a signal comes; then print its counters."""
    stop = threading.Event()
    if with_parent:
        threading.Thread(target=stop_without_parent, args=(stop,), name="kinflow-parent", daemon=True).start()

    def ask_to_stop(number: int, frame: FrameType | None) -> None:
        stop.set()  # and no more: a handler that takes a lock its own thread holds would hang

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, ask_to_stop)
    tier.run(stop)
    if as_json:
        line = {"event": "stopped", "tier": name, "counters": tier.counters.snapshot()}
        sys.stdout.buffer.write(msgspec.json.encode(line) + b"\n")
        sys.stdout.buffer.flush()


def stop_without_parent(stop: threading.Event) -> None:
    """Standard input is a pipe that nobody writes to: it ends when the process that started us does."""
    while os.read(0, 4096):  # not by sys.stdin, whose lock this thread would hold when the interpreter ends
        pass
    stop.set()


def main() -> None:
    """Run the command line and leave with an exit code of sysexits(3)."""
    sys.exit(run(sys.argv[1:]))


def run(arguments: list[str], command: click.Command = cli) -> int:
    """Run the command line `arguments` and return the exit code."""
    try:
        command.main(arguments, prog_name="kinflow", standalone_mode=False)
    except KinflowError as error:
        if logging.getLogger().isEnabledFor(logging.DEBUG):
            logging.exception("traceback, since --verbose was given")
        click.echo(f"error: {error}", err=True)
        return error.exit_code
    except click.UsageError as error:
        error.show()
        return os.EX_USAGE
    except click.ClickException as error:
        error.show()
        return os.EX_UNAVAILABLE
    except (click.Abort, KeyboardInterrupt):
        return 130
    except (BrokenPipeError, SystemExit):
        # Of a pipe that is closed, click makes the only SystemExit that comes this way. Whoever read our lines has
        # enough; what is buffered must not fail at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        if logging.getLogger().isEnabledFor(logging.DEBUG):
            logging.exception("traceback, since --verbose was given")
        click.echo(f"error: a fault of Kinflow's own: {type(error).__name__}: {error}; see kinflow --verbose", err=True)
        return os.EX_SOFTWARE
    return 0


if __name__ == "__main__":
    main()
