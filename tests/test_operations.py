"""docs/operations.md names counters, exit codes and files that exist."""

from __future__ import annotations

import re
from pathlib import Path

from runtime import errors
from runtime.errors import KinflowError

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "docs" / "operations.md").read_text("utf-8")


def test_counters_exist() -> None:
    source = "\n".join(path.read_text("utf-8") for path in (ROOT / "runtime").glob("*.py"))
    named = set(re.findall(r"`([a-z]+_[a-z_]*total)\b", TEXT))
    assert len(named) > 10
    assert {counter for counter in named if f'"{counter}"' not in source} == set()


def test_every_error_has_its_exit_code() -> None:
    codes = {int(code) for code in re.findall(r"(?m)^\| (\d+) \|", TEXT)}
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, KinflowError)]
    assert {kind.exit_code for kind in kinds} <= codes


def test_files_exist() -> None:
    for path in re.findall(r"firmware_configs/[\w./*-]*", TEXT):
        assert list(ROOT.glob(path.rstrip("/."))), path
