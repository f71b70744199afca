"""Writes a bundle: into a directory beside the wanted one, which takes its place when everything is proved."""

from __future__ import annotations

import contextlib
import hashlib
import io
import shutil
import tempfile
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from runtime.datatypes import Tensor
from runtime.errors import BundleError
from runtime.manifest import MANIFEST, NOTES, FileSpec

LABELS = "labels.txt"
CALIBRATION = "calibration.txt"
GOLDEN = "golden/golden.npz"
EPOCH = (1980, 1, 1, 0, 0, 0)  # the earliest date a zip file can hold


@contextlib.contextmanager
def staging(out: Path, *, force: bool) -> Iterator[Path]:
    """A directory to write into that becomes `out` at the end, or vanishes when anything fails.

    Raises:
        BundleError: `out` exists and is not to be replaced, or cannot be written.
    """
    check_out(out, force=force)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    except OSError as error:
        raise BundleError(f"{out} cannot be written ({error.strerror}); give another --out") from error
    try:
        yield scratch
        scratch.chmod(0o755)
        if out.exists():
            shutil.rmtree(out)
        scratch.rename(out)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def check_out(out: Path, *, force: bool) -> None:
    """Refuse what must not be overwritten, before any work is done.

    Raises:
        BundleError: `out` exists, and is no bundle or is not to be replaced.
    """
    if not out.exists():
        return
    if not force:
        raise BundleError(f"{out} exists; give another --out, or --force to replace it")
    if not (out / MANIFEST).is_file() and (not out.is_dir() or any(out.iterdir())):
        raise BundleError(f"{out} exists and is no bundle; give another --out, nothing but a bundle is replaced")


def list_files(directory: Path) -> tuple[FileSpec, ...]:
    """Every file of the bundle but the manifest and the notes beside it, by name."""
    specs = []
    for path in sorted(path for path in directory.rglob("*") if path.is_file()):
        relative = path.relative_to(directory).as_posix()
        if relative != MANIFEST and relative not in NOTES:
            data = path.read_bytes()
            specs.append(FileSpec(path=relative, size_bytes=len(data), sha256=hashlib.sha256(data).hexdigest()))
    return tuple(specs)


def write_arrays(path: Path, arrays: Mapping[str, Tensor]) -> None:
    """Write an .npz whose bytes depend on nothing but the arrays; stored, as compressors differ between machines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name, array in arrays.items():
            buffer = io.BytesIO()
            np.lib.format.write_array(buffer, np.ascontiguousarray(array), allow_pickle=False)
            entry = zipfile.ZipInfo(f"{name}.npy", date_time=EPOCH)
            entry.compress_type = zipfile.ZIP_STORED
            entry.external_attr = 0o644 << 16
            archive.writestr(entry, buffer.getvalue())
