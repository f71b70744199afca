"""Tells a person at which stage an export is, on standard error: plain lines, and on a terminal a bar."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from typing import TypeVar

import click

Item = TypeVar("Item")


class Report:
    """Names the stages as they run."""

    def __init__(self, *, silent: bool = False) -> None:
        self._silent = silent
        self._start = time.monotonic()

    def stage(self, words: str) -> None:
        """A stage begins."""
        if not self._silent:
            click.echo(f"{time.monotonic() - self._start:6.1f} s  {words}", err=True)

    def note(self, words: str) -> None:
        """Something that a person should know of the stage that runs."""
        if not self._silent:
            click.echo(f"          {words}", err=True)

    def track(self, items: Sequence[Item], words: str) -> Iterator[Item]:
        """Yield the items, with a bar on a terminal."""
        if self._silent or not sys.stderr.isatty():
            yield from items
            return
        from rich.console import Console
        from rich.progress import track

        yield from track(items, description=f"          {words}", console=Console(stderr=True), transient=True)
