"""Reads the true class of each frame, where the user knows it: a file with one picture a line, name and class.

The class is a label as the bundle writes it or its index; fields are parted by a comma, a semicolon, a tab or spaces,
and those after the second are not read. Lines for pictures that are no frames of the export are passed over, so a
header does no harm.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from runtime.errors import BundleError


def read_labels(path: Path, names: Sequence[str], labels: Sequence[str]) -> NDArray[np.int64]:
    """The class index of every frame (frames,).

    Args:
        names: the frames' file names, without folders; empty where a frame comes from a clip.
        labels: of the classes, in order.

    Raises:
        BundleError: the file cannot be read, a frame has no line in it, or a line names no class.
    """
    try:
        lines = path.read_text("utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise BundleError(f"--labels {path} cannot be read as text; give a file of lines NAME,CLASS") from error
    if "" in names:
        raise BundleError("--labels tells pictures by their file names, which frames of a clip lack; leave it out")
    wanted = set(names)
    by_label = {label: index for index, label in reversed(list(enumerate(labels)))}
    known: dict[str, int] = {}
    for number, line in enumerate(lines, start=1):
        name, told = _fields(line)
        if name not in wanted:
            continue
        found = by_label.get(told, int(told) if re.fullmatch(r"[0-9]+", told) else -1)
        if not 0 <= found < len(labels):
            raise BundleError(
                f"--labels {path}, line {number}: {told!r} is no class; write one of the model's labels or an index "
                f"from 0 to {len(labels) - 1}"
            )
        if known.setdefault(name, found) != found:
            raise BundleError(f"--labels {path}, line {number}: {name} has another class above; keep one of the lines")
    missing = [name for name in names if name not in known]
    if missing:
        raise BundleError(
            f"--labels {path} has no line for {missing[0]} and {len(missing) - 1} other frames; "
            "write NAME,CLASS for every picture of --frames"
        )
    return np.array([known[name] for name in names], np.int64)


def _fields(line: str) -> tuple[str, str]:
    """File name and class of a line; a label may hold spaces where commas, semicolons or tabs part the fields."""
    parts = re.split(r"[,;\t]", line) if re.search(r"[,;\t]", line) else line.split(None, 1)
    parts = [part.strip().strip('"') for part in parts]
    return Path(parts[0]).name if parts else "", parts[1] if len(parts) > 1 else ""
