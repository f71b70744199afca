"""The files of a bundle: they lie inside it, have the size they should have, and are the ones that were exported."""

from __future__ import annotations

import hashlib
from pathlib import Path, PurePosixPath

from runtime.errors import BundleError


def present(root: Path, relative: str, size_bytes: int) -> Path:
    """The path of a file of the bundle at `root`.

    Raises:
        BundleError: it lies outside, is missing, or has another size.
    """
    path = _contained(root, relative)
    if not path.is_file():
        raise BundleError(f"{relative} is missing from the bundle; copy the bundle again")
    size = path.stat().st_size
    if size != size_bytes:
        raise BundleError(f"{relative} has {size} bytes, the manifest says {size_bytes}; copy the bundle again")
    return path


def verified(root: Path, relative: str, size_bytes: int, sha256: str) -> Path:
    """As `present`, after checking the file's SHA-256."""
    path = present(root, relative, size_bytes)
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    if digest.hexdigest() != sha256:
        raise BundleError(f"{relative} is not the file that was exported: its SHA-256 differs; copy the bundle again")
    return path


def _contained(root: Path, relative: str) -> Path:
    pure = PurePosixPath(relative)
    path = root / relative
    if pure.is_absolute() or ".." in pure.parts or not path.resolve().is_relative_to(root.resolve()):
        raise BundleError(f"{relative} points outside the bundle; do not use this bundle")
    return path
