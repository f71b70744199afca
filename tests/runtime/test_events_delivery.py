"""From a camera to `kinflow events` through a real broker that is killed: each event exactly once, in order."""

from __future__ import annotations

import json
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from tests.lamp_bundle import as_lamp, pictures
from tests.patience import until

TIMEOUT_S = 60


class Program:
    """`kinflow …` as a process, and the JSON lines that it has printed."""

    def __init__(self, *arguments: str) -> None:
        self.lines: list[dict[str, Any]] = []
        self.words: list[str] = []
        self._process = subprocess.Popen(
            [sys.executable, "-m", "runtime.cli", *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert self._process.stdout is not None
        assert self._process.stderr is not None
        self._readers = [
            threading.Thread(target=self._read, args=(self._process.stdout, self._line)),
            threading.Thread(target=self._read, args=(self._process.stderr, self.words.append)),
        ]
        for reader in self._readers:
            reader.start()

    def end(self, how: signal.Signals = signal.SIGTERM) -> int:
        self._process.send_signal(how)
        return self.wait()

    def wait(self) -> int:
        code = self._process.wait(TIMEOUT_S)
        for reader in self._readers:
            reader.join()
        for pipe in (self._process.stdout, self._process.stderr):
            assert pipe is not None
            pipe.close()
        return code

    def close(self) -> None:
        if self._process.poll() is None:
            self.end(signal.SIGKILL)

    def says(self, words: str) -> bool:
        return any(words in line for line in self.words)

    def numbers(self) -> list[tuple[str, int]]:
        return [(line["session"], line["sequence"]) for line in self.lines]

    def _line(self, line: str) -> None:
        self.lines.append(json.loads(line))

    def _read(self, pipe: Any, put: Callable[[str], None]) -> None:
        for line in pipe:
            put(line)


def more(program: Program, lines: int) -> None:
    """Wait until it has printed so many more."""
    wanted = len(program.lines) + lines
    until(lambda: len(program.lines) >= wanted)


@pytest.fixture
def kinflow() -> Iterator[Callable[..., Program]]:
    programs: list[Program] = []

    def start(*arguments: str) -> Program:
        programs.append(Program(*arguments))
        return programs[-1]

    yield start
    for program in programs:
        program.close()


@pytest.fixture
def device(kinflow: Callable[..., Program], tiny_bundle: Path, tmp_path: Path) -> Callable[..., Program]:
    """Starts a device before whose camera a lamp goes on and off twice a second: four events."""
    source = pictures(tmp_path / "lamp", [200] * 12 + [10] * 13)
    bundle = as_lamp(tiny_bundle)

    def start(port: int, **events: Any) -> Program:
        settings = {"confirm_frames": 1, "gone_ms": 60} | events
        path = tmp_path / "device.toml"
        path.write_text(
            f'bundle = "{bundle}"\nid = "board"\n[broker]\nhost = "127.0.0.1"\nport = {port}\n'
            f'[camera.porch]\nkind = "replay"\nsource = "{source}"\nmax_fps = 50\nloop = true\n[events]\n'
            + "".join(f"{key} = {json.dumps(value)}\n" for key, value in settings.items())
        )
        return kinflow("device", "--config", str(path), "--json")

    return start


@pytest.fixture
def consumer(kinflow: Callable[..., Program]) -> Callable[..., Program]:
    """Starts `kinflow events`; returns when it listens."""

    def start(port: int, *options: str) -> Program:
        program = kinflow("events", "--broker", f"127.0.0.1:{port}", "--id", "consumer", "--json", *options)
        until(lambda: program.says("listening for"))
        return program

    return start


def made(device: Program) -> int:
    """How many events a device that has ended told."""
    counters = device.lines[-1]["counters"]
    return sum(count for name, count in counters.items() if name.startswith("events_total"))


def test_a_broker_that_is_killed_again_and_again_loses_and_doubles_nothing(
    mosquitto: Any, device: Callable[..., Program], consumer: Callable[..., Program]
) -> None:
    listening = consumer(mosquitto.port)
    board = device(mosquitto.port, drain_per_second=200)
    for down_s in (0.2, 1.5, 2.5):
        more(listening, 5)
        mosquitto.kill()
        time.sleep(down_s)
        mosquitto.restart()
    more(listening, 10)
    assert board.end() == 0
    told = made(board)
    until(lambda: len(listening.lines) >= told)
    assert listening.end() == 0
    sessions = {session for session, _ in listening.numbers()}
    assert len(sessions) == 1
    assert [number for _, number in listening.numbers()] == list(range(1, told + 1))
    assert listening.says(f"{told} events printed, 0 missing")
    counters = board.lines[-1]["counters"]
    assert counters["events_stored"] == 0
    assert counters["events_forwarded_late_total"] >= 6
    assert not [name for name in counters if name.startswith("events_lost_total")]
    assert [line["type"] for line in listening.lines] == [("new", "end")[index % 2] for index in range(told)]
    assert {(line["site"], line["device"], line["camera"]) for line in listening.lines} == {("home", "board", "porch")}


def test_events_on_disk_survive_the_death_of_the_device(
    mosquitto: Any, device: Callable[..., Program], consumer: Callable[..., Program], tmp_path: Path
) -> None:
    listening = consumer(mosquitto.port)
    store = {"store": "events.db", "drain_per_second": 200}  # from the folder of the settings
    first = device(mosquitto.port, **store)
    until(lambda: len(listening.lines) > 4)
    mosquitto.kill()
    until(lambda: (tmp_path / "events.db").exists() and len(first.lines) > 0)
    more(first, 75)  # a second and a half of frames: three times the lamp goes on and off
    assert first.end(signal.SIGKILL) == -signal.SIGKILL
    with closing(sqlite3.connect(tmp_path / "events.db")) as rows:
        kept = [json.loads(payload)["sequence"] for (payload,) in rows.execute("SELECT payload FROM letters")]
    assert len(kept) > 2
    mosquitto.restart()
    second = device(mosquitto.port, **store)
    (session,) = {line["session"] for line in listening.lines}
    until(lambda: listening.numbers()[-1][0] != session)
    assert second.end() == 0
    until(lambda: len(listening.lines) >= max(kept) + made(second))
    assert listening.end() == 0
    before = [number for of, number in listening.numbers() if of == session]
    after = [number for of, number in listening.numbers() if of != session]
    assert before == list(range(1, max(kept) + 1))
    assert after == list(range(1, made(second) + 1))
    assert listening.numbers()[: len(before)] == [(session, number) for number in before]
    assert listening.says("0 missing")
    assert all(line["age_ms"] is not None for line in listening.lines)  # the same boot
    assert max(line["age_ms"] for line in listening.lines) > 1000


def test_what_comes_while_the_consumer_is_away_is_there_when_it_is_back(
    mosquitto: Any, device: Callable[..., Program], consumer: Callable[..., Program]
) -> None:
    first = consumer(mosquitto.port)
    board = device(mosquitto.port)
    until(lambda: len(first.lines) > 2)
    assert first.end() == 0
    time.sleep(1)
    assert board.end() == 0
    second = consumer(mosquitto.port)
    until(lambda: len(first.lines) + len(second.lines) >= made(board))
    second.end()
    assert [number for _, number in first.numbers() + second.numbers()] == list(range(1, made(board) + 1))


def test_a_device_keeps_what_nobody_listens_for(
    mosquitto: Any, device: Callable[..., Program], consumer: Callable[..., Program]
) -> None:
    """Mosquitto says so in MQTT 5."""
    board = device(mosquitto.port, drain_per_second=200)
    until(lambda: board.says("nobody listens for events"))
    time.sleep(1)
    listening = consumer(mosquitto.port, "--keep", "0")
    until(lambda: len(listening.lines) > 6)
    assert board.end() == 0
    until(lambda: len(listening.lines) >= made(board))
    assert listening.end() == 0
    assert [number for _, number in listening.numbers()] == list(range(1, made(board) + 1))


def test_without_a_broker_for_good_a_device_stays_within_its_bounds(
    device: Callable[..., Program], free_port: Callable[[], int]
) -> None:
    board = device(free_port(), store_messages=5)
    until(lambda: sum("label" in line for line in board.lines) > 150)
    assert board.end() == 0
    counters = board.lines[-1]["counters"]
    assert made(board) > 8
    assert counters['events_lost_total{reason="full"}'] == made(board) - 5
    assert counters['events_lost_total{reason="stopping"}'] == 5


def test_a_gap_is_told_and_people_read_lines(mosquitto: Any, kinflow: Callable[..., Program]) -> None:
    text = subprocess.Popen(
        [sys.executable, "-m", "runtime.cli", "events", "--broker", f"127.0.0.1:{mosquitto.port}"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert text.stderr is not None
    assert "listening for" in text.stderr.readline()
    publish(mosquitto, [1, 2, 2, 5, 4])
    assert text.stdout is not None
    lines = [text.stdout.readline() for _ in range(4)]
    text.terminate()
    _, words = text.communicate(timeout=TIMEOUT_S)
    assert text.returncode == 0
    assert "board: 2 events missing before number 5 of session a1" in words
    assert words.endswith("4 events printed, 1 missing, 1 came again and were left out\n")
    assert [line.split("  ", 1)[1] for line in lines[:1]] == ["board/porch  new     lamp\\x1b  0.91  2.5 s\n"]
    assert lines[0].startswith("--:--:--.-  ")


def test_a_consumer_that_remembers_prints_nothing_again_and_notices_what_it_has_slept_through(
    mosquitto: Any, consumer: Callable[..., Program], tmp_path: Path
) -> None:
    remembers = ("--seen", str(tmp_path / "seen.json"), "--keep", "0")
    first = consumer(mosquitto.port, *remembers)
    publish(mosquitto, [1, 2, 3])
    until(lambda: len(first.lines) == 3)
    # What is printed and not yet written down would be printed again.
    until(lambda: b"[[1,3]]" in (tmp_path / "seen.json").read_bytes())
    first.end(signal.SIGKILL)
    second = consumer(mosquitto.port, *remembers)
    publish(mosquitto, [2, 3, 6])
    until(lambda: len(second.lines) == 1)
    second.end()
    assert second.numbers() == [("a1", 6)]
    assert second.says("2 events missing before number 6")
    assert second.says("1 event printed, 2 missing, 2 came again")


def test_a_memory_that_is_none_is_refused(kinflow: Callable[..., Program], tmp_path: Path) -> None:
    (tmp_path / "other.json").write_text('{"not": "ours"}')
    for name, words in (("other.json", "is no file of ours"), ("none/seen.json", "cannot be used: No such file")):
        program = kinflow("events", "--broker", "127.0.0.1:1", "--seen", str(tmp_path / name))
        assert program.wait() == 78
        assert program.says(words)


def publish(broker: Any, sequences: list[int]) -> None:
    from paho.mqtt.publish import multiple

    told = {"type": "new", "camera": "porch", "label": "lamp\x1b", "score": 0.91, "duration_ms": 2500.0}
    topic = "kinflow/v1/home/d/board/cam/porch/event"
    payloads = [json.dumps({"session": "a1", "sequence": number, "age_ms": None, **told}) for number in sequences]
    strange = json.dumps({"session": "a" * 65, "sequence": 1, **told})
    multiple([(topic, payload, 1, False) for payload in ["no JSON", strange, *payloads]], "127.0.0.1", broker.port)


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        ((), 78, "name either a broker"),
        (("--broker", "nowhere"), 78, "HOST:PORT"),
        (("--broker", "127.0.0.1:1", "--device", "a/b"), 78, "--device"),
        (("--bogus",), 64, "No such option"),
    ],
)
def test_wrong_usage_is_told(kinflow: Callable[..., Program], options: tuple[str, ...], code: int, words: str) -> None:
    program = kinflow("events", *options)
    assert program.wait() == code
    assert program.says(words)


def test_two_consumers_of_one_name_are_told_to_differ(mosquitto: Any, consumer: Callable[..., Program]) -> None:
    both = [consumer(mosquitto.port), consumer(mosquitto.port)]
    until(lambda: any(one.says("does another client use this name? give one of them another by --id") for one in both))


def test_a_broker_that_refuses_ends_it(start_mosquitto: Callable[..., Any], kinflow: Callable[..., Program]) -> None:
    broker = start_mosquitto("allow_anonymous false\n")
    program = kinflow("events", "--broker", f"127.0.0.1:{broker.port}")
    assert program.wait() == 69
    assert program.says("refuses us: Not authorized")


def test_it_waits_for_a_broker_and_speaks_3_1_1(free_port: Callable[[], int], kinflow: Callable[..., Program]) -> None:
    port = free_port()
    program = kinflow("events", "--broker", f"127.0.0.1:{port}")
    until(lambda: program.says("cannot reach the broker"))
    with subprocess.Popen([sys.executable, "-m", "runtime.broker", str(port)], stdin=subprocess.PIPE) as broker:
        until(lambda: program.says("listening for"))
        assert program.end() == 0
        broker.terminate()
    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.1", port)) != 0
