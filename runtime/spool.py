"""An outbox's letters in a file, so that they outlive the process: SQLite, one table, a write-ahead log.

What `keep` has returned from is on the disk, as surely as SQLite and the disk can tell (`synchronous` is FULL), and
comes back from `load` after a crash or a power cut. A monotonic clock means something only until the next boot, so
every row names its boot: a letter of an earlier one has an unknown age, and grows old from now on.
"""

from __future__ import annotations

import contextlib
import sqlite3
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path

from runtime.outbox import Letter

BOOT = Path("/proc/sys/kernel/random/boot_id")
LOCK_S = 1.0
LOG_PAGES = 256  # of 4 KiB; then the write-ahead log begins anew
SCHEMA = """
CREATE TABLE IF NOT EXISTS letters (
    number INTEGER PRIMARY KEY, topic TEXT NOT NULL, payload BLOB NOT NULL,
    put_ns INTEGER NOT NULL, born_ns INTEGER, boot TEXT NOT NULL)
"""


def boot_id() -> str:
    """What names this boot of the machine; where nothing does, a name that no other process has."""
    try:
        return BOOT.read_text("ascii").strip()
    except OSError:
        return uuid.uuid4().hex


class Spool:
    """The letters of one device in the file `path`, which no other process may use meanwhile.

    Raises:
        OSError: by every method, when the disk or the file will not do; its text says why.
    """

    def __init__(self, path: Path, boot: str) -> None:
        self._boot = boot
        with _as_os_error():
            self._rows = sqlite3.connect(path, timeout=LOCK_S, isolation_level=None, check_same_thread=False)
        try:
            self._prepare()
        except BaseException:
            self._rows.close()
            raise

    def load(self, now_ns: int) -> list[Letter]:
        """All letters, in order. Those of an earlier boot count as put now."""
        boot = self._boot
        with _as_os_error():
            self._rows.execute(
                "UPDATE letters SET put_ns = ?, born_ns = NULL, boot = ? WHERE boot != ?", (now_ns, boot, boot)
            )
            found = self._rows.execute("SELECT number, topic, payload, put_ns, born_ns FROM letters ORDER BY number")
            return [Letter(*row) for row in found]

    def keep(self, letter: Letter) -> None:
        """Write a letter down."""
        row = (letter.number, letter.topic, letter.payload, letter.put_ns, letter.born_ns, self._boot)
        with _as_os_error():
            self._rows.execute("INSERT INTO letters VALUES (?, ?, ?, ?, ?, ?)", row)

    def drop(self, numbers: Iterable[int]) -> None:
        """Forget letters, all at once or none."""
        with _as_os_error():
            self._rows.execute("BEGIN")
            try:
                self._rows.executemany("DELETE FROM letters WHERE number = ?", [(number,) for number in numbers])
                self._rows.execute("COMMIT")
            finally:
                if self._rows.in_transaction:
                    self._rows.execute("ROLLBACK")

    def close(self) -> None:
        """Let go of the file; what is in it stays."""
        with _as_os_error():
            self._rows.close()

    def _prepare(self) -> None:
        with _as_os_error():
            self._rows.execute("PRAGMA locking_mode = EXCLUSIVE")
            self._rows.execute("PRAGMA journal_mode = WAL")
            self._rows.execute("PRAGMA synchronous = FULL")
            self._rows.execute(f"PRAGMA wal_autocheckpoint = {LOG_PAGES}")
            self._rows.execute(SCHEMA)
            found = self._rows.execute("PRAGMA quick_check(1)").fetchone()[0]
        if found != "ok":
            raise OSError(f"it is damaged ({found})")


@contextlib.contextmanager
def _as_os_error() -> Iterator[None]:
    try:
        yield
    except sqlite3.Error as error:
        raise OSError(str(error)) from error
