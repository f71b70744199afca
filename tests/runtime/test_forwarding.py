"""Events wait for a broker in memory and on disk, and go when it is there; what cannot wait is counted."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from runtime.config import BrokerConfig, EventsConfig
from runtime.counters import Counters
from runtime.events import Event
from runtime.forwarding import Forwarding
from runtime.link import Link, open_link
from runtime.outbox import Letter
from runtime.spool import Spool, boot_id

TOPIC = "kinflow/v1/home/d/board/cam/porch/event"


def event(number: int) -> Event:
    return Event(f"id-{number}", "new", "porch", number, "lamp", 0.9, 0.9, None, 10.0)


class Run:
    """One run of a device, as far as its events go."""

    def __init__(self, broker: BrokerConfig, session: str, **settings: Any) -> None:
        self.counters = Counters()
        self.link: Link = open_link(broker, client_id=f"device-{session}", counters=self.counters)
        self.woken = 0
        self.forwarding = Forwarding(EventsConfig(**settings), self.link, self.counters, session, self._wake)
        self.link.on_connect(self.forwarding.connected)
        self.told = 0

    def _wake(self) -> None:
        self.woken += 1

    def tell(self, count: int = 1) -> None:
        for _ in range(count):
            self.told += 1
            self.forwarding.send(event(self.told), TOPIC, 0)

    def count(self, name: str) -> int:
        return self.counters.snapshot().get(name, 0)


@pytest.fixture
def run(memory_broker: BrokerConfig) -> Iterator[Callable[..., Run]]:
    runs: list[Run] = []

    def start(session: str = "a", **settings: Any) -> Run:
        runs.append(Run(memory_broker, session, **({"drain_per_second": 10_000.0} | settings)))
        return runs[-1]

    yield start
    for one in runs:
        one.link.close()


@pytest.fixture
def listen(memory_broker: BrokerConfig) -> Iterator[Callable[[], list[dict[str, Any]]]]:
    links: list[Link] = []

    def start() -> list[dict[str, Any]]:
        heard: list[dict[str, Any]] = []
        links.append(open_link(memory_broker, client_id="consumer", counters=Counters()))
        links[-1].subscribe(TOPIC, lambda topic, payload: heard.append(json.loads(payload)))
        links[-1].start()
        return heard

    yield start
    for link in links:
        link.close()


def in_file(path: Path, boot: str = "boot") -> list[int]:
    with closing(Spool(path, boot)) as spool:
        return [letter.number for letter in spool.load(0)]


def numbers(heard: list[dict[str, Any]]) -> list[tuple[str, int]]:
    return [(told["session"], told["sequence"]) for told in heard]


def test_what_was_told_without_a_link_goes_when_there_is_one(
    run: Callable[..., Run], listen: Callable[[], list[dict[str, Any]]]
) -> None:
    heard = listen()
    one = run()
    one.tell(5)
    assert one.count("events_stored") == 5
    one.link.start()
    one.tell(2)
    assert numbers(heard) == [("a", number) for number in range(1, 8)]
    assert [told["frame"] for told in heard] == list(range(1, 8))
    assert all(told["age_ms"] > 0 for told in heard)
    assert one.count("events_stored") == 0
    assert one.count("events_forwarded_late_total") == 5
    assert one.woken > 0


def test_what_nobody_hears_is_kept_until_somebody_listens(
    run: Callable[..., Run], listen: Callable[[], list[dict[str, Any]]]
) -> None:
    one = run()
    one.link.start()
    one.tell(3)
    assert one.count("events_stored") == 3
    heard = listen()
    one.forwarding.tend()
    assert heard == []  # it asks again after a pause
    one.forwarding.close()
    assert numbers(heard) == [("a", 1), ("a", 2), ("a", 3)]
    assert one.count("events_stored") == 0


def test_order_holds_when_many_threads_tell_events(
    run: Callable[..., Run], listen: Callable[[], list[dict[str, Any]]]
) -> None:
    heard = listen()
    one = run()
    one.link.start()
    threads = [threading.Thread(target=one.tell, args=(300,)) for _ in range(4)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        one.forwarding.tend()
    assert numbers(heard) == [("a", number) for number in range(1, 1201)]
    assert one.count("events_stored") == 0


def test_without_a_broker_for_good_the_newest_are_kept_and_the_rest_is_counted(run: Callable[..., Run]) -> None:
    one = run(store_messages=10)
    one.tell(25)
    assert one.count("events_stored") == 10
    assert one.count('events_lost_total{reason="full"}') == 15
    one.forwarding.close()
    assert one.count('events_lost_total{reason="stopping"}') == 10
    assert one.count("events_stored") == 0


def test_events_grow_too_old_without_a_connection_too(run: Callable[..., Run]) -> None:
    one = run(store_s=0.05)
    one.tell(3)
    time.sleep(0.1)
    one.tell(1)
    one.forwarding.tend()
    assert one.count('events_lost_total{reason="old"}') == 3
    assert one.count("events_stored") == 1


def test_events_on_disk_outlive_the_run_and_go_first(
    run: Callable[..., Run], listen: Callable[[], list[dict[str, Any]]], tmp_path: Path
) -> None:
    heard = listen()
    store = str(tmp_path / "events.db")
    for session in "ab":
        one = run(session, store=store)
        one.tell(3)
        one.forwarding.close()
    assert one.count("events_stored") == 6
    last = run("c", store=store, resend_s=0)
    last.tell(2)
    last.link.start()
    assert numbers(heard) == [*((session, number) for session in "ab" for number in (1, 2, 3)), ("c", 1), ("c", 2)]
    assert all(told["age_ms"] > 0 for told in heard)
    last.forwarding.close()
    assert in_file(tmp_path / "events.db", boot_id()) == []


def test_bounds_hold_on_disk(run: Callable[..., Run], tmp_path: Path) -> None:
    store = tmp_path / "events.db"
    one = run("a", store=str(store), store_messages=50)
    one.tell(1000)
    one.forwarding.close()
    assert in_file(store, boot_id()) == list(range(951, 1001))
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) < 2_500_000  # a log of 1 MiB, and what it grew by
    fewer = run("b", store=str(store), store_messages=20)
    assert fewer.count("events_stored") == 20
    assert fewer.count('events_lost_total{reason="full"}') == 30


def test_ages_are_unknown_after_another_boot_and_grow_from_then_on(tmp_path: Path) -> None:
    path = tmp_path / "events.db"
    before = Spool(path, "first boot")
    for number in (1, 2):
        before.keep(Letter(number, TOPIC, b"{}", put_ns=10**15, born_ns=10**15))
    before.close()
    after = Spool(path, "second boot")
    assert after.load(700) == [Letter(number, TOPIC, b"{}", 700, None) for number in (1, 2)]
    after.keep(Letter(3, TOPIC, b"{}", 800, 750))
    after.drop([1])
    after.close()
    again = Spool(path, "second boot")
    assert again.load(900) == [Letter(2, TOPIC, b"{}", 700, None), Letter(3, TOPIC, b"{}", 800, 750)]
    again.close()


def damaged(path: Path) -> str:
    spool = Spool(path, "boot")
    for number in range(1, 300):
        spool.keep(Letter(number, TOPIC, bytes(200), 0, 0))
    spool.close()
    data = bytearray(path.read_bytes())
    for page in range(2, len(data) // 4096):
        data[page * 4096 : page * 4096 + 64] = b"\xff" * 64
    path.write_bytes(data)
    return str(path)


def no_database(path: Path) -> str:
    path.write_bytes(b"These are not the events you are looking for. " * 200)
    return str(path)


def a_folder(path: Path) -> str:
    path.mkdir()
    return str(path)


def read_only(path: Path) -> str:
    return "/proc/kinflow.db"


@pytest.mark.parametrize("spoil", [damaged, no_database, a_folder, read_only])
def test_a_file_that_cannot_be_used_costs_a_sentence_and_no_event(
    run: Callable[..., Run],
    listen: Callable[[], list[dict[str, Any]]],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    spoil: Callable[[Path], str],
) -> None:
    heard = listen()
    store = spoil(tmp_path / "events.db")
    one = run(store=store)
    one.tell(3)
    one.link.start()
    assert numbers(heard) == [("a", 1), ("a", 2), ("a", 3)]
    assert one.count("events_store_failures_total") == 1
    warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert len(warnings) == 1
    assert warnings[0].startswith(f"events cannot be kept in {store}: ")
    one.forwarding.close()


def test_two_devices_cannot_share_a_file(run: Callable[..., Run], tmp_path: Path) -> None:
    store = str(tmp_path / "events.db")
    one = run("a", store=store)
    one.tell()
    other = run("b", store=store)
    assert (one.count("events_store_failures_total"), other.count("events_store_failures_total")) == (0, 1)


@pytest.mark.parametrize(
    ("is_there", "comes"),
    [
        (b'"label":"lamp"', b'"label"?"lamp"'),
        (b'"label":"lamp"', b'"label":"l\xffmp"'),
        (b"kinflow/v1/home/d/board/cam/porch/event{", b"kinflow/v1/home/d/board/cam/+orch/event{"),
    ],
    ids=["no JSON", "no text", "no topic"],
)
def test_a_damaged_row_is_counted_and_forgotten_and_the_others_go(
    run: Callable[..., Run],
    listen: Callable[[], list[dict[str, Any]]],
    tmp_path: Path,
    is_there: bytes,
    comes: bytes,
) -> None:
    heard = listen()
    path = tmp_path / "events.db"
    one = run("a", store=str(path))
    one.tell(3)
    one.forwarding.close()
    data = path.read_bytes()
    assert data.count(is_there) == 3
    path.write_bytes(data.replace(is_there, comes, 1))
    other = run("b", store=str(path), resend_s=0)
    other.tell()
    other.link.start()
    other.forwarding.tend()
    assert len(heard) == 3
    assert other.count('events_lost_total{reason="damaged"}') == 1
    assert other.count("events_stored") == 0
    other.forwarding.close()
    assert in_file(path, boot_id()) == []


FULL = """
import resource, sys
from pathlib import Path
from runtime.spool import Spool
from runtime.outbox import Letter
resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
spool = Spool(Path(sys.argv[1]), "boot")
for number in range(1, 10_000):
    try:
        spool.keep(Letter(number, "topic", bytes(400), 0, 0))
    except OSError as error:
        print(number - 1)
        break
"""


def test_a_disk_that_fills_up_says_so_and_keeps_what_it_took(tmp_path: Path) -> None:
    path = tmp_path / "events.db"
    done = subprocess.run([sys.executable, "-c", FULL, str(path)], capture_output=True, text=True, check=True)
    kept = int(done.stdout)
    assert 20 < kept < 1000
    assert in_file(path) == list(range(1, kept + 1))


def test_a_disk_that_fails_while_running_costs_a_sentence_and_no_event(
    run: Callable[..., Run], listen: Callable[[], list[dict[str, Any]]], tmp_path: Path
) -> None:
    heard = listen()
    path = tmp_path / "events.db"
    one = run(store=str(path))
    one.tell(2)
    # Somebody empties the file while it is used.
    path.write_bytes(b"")
    (tmp_path / "events.db-wal").write_bytes(b"")
    one.tell(2)
    one.link.start()
    assert numbers(heard) == [("a", number) for number in (1, 2, 3, 4)]
    one.forwarding.close()


KILLED = """
import os, signal, sys
from pathlib import Path
from runtime.spool import Spool
from runtime.outbox import Letter
spool = Spool(Path(sys.argv[1]), "boot")
for number in range(1, 40):
    spool.keep(Letter(number, "topic", bytes(400), 0, 0))
spool.drop([1, 2])
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_what_was_kept_survives_sigkill(tmp_path: Path) -> None:
    path = tmp_path / "events.db"
    done = subprocess.run([sys.executable, "-c", KILLED, str(path)], check=False)
    assert done.returncode == -9
    assert in_file(path) == list(range(3, 40))
