"""Waiting for what must happen, for as long as a machine that is slow or shared may need."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest

PATIENCE_S = 60.0  # only a test that fails waits for so long


def until(holds: Callable[[], object], seconds: float = PATIENCE_S, *, what: str = "it did not happen") -> None:
    """Wait until `holds` is true; the test fails with `what` when that takes longer than `seconds`."""
    __tracebackhide__ = True
    end_s = time.monotonic() + seconds
    while not holds():
        if time.monotonic() > end_s:
            pytest.fail(f"{what} within {seconds:g} s")
        time.sleep(0.005)


def stays(holds: Callable[[], object], seconds: float, *, what: str = "it did not stay so") -> None:
    """Watch that `holds` remains true for `seconds`, where nothing that can be waited for tells that all is over."""
    __tracebackhide__ = True
    end_s = time.monotonic() + seconds
    while time.monotonic() < end_s:
        if not holds():
            pytest.fail(f"{what} for {seconds:g} s")
        time.sleep(0.005)
