from __future__ import annotations

import gc
import itertools
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from runtime.camera import open_camera
from runtime.camera_apart import ApartCamera
from runtime.capture import Capture
from runtime.config import CameraConfig
from runtime.counters import Counters
from runtime.errors import CameraError, ConfigError
from runtime.shared_frames import PLACES, Failed, Laid, Reader, Writer
from tests.patience import until


def workers() -> list[psutil.Process]:
    """The processes that drive a camera for this one."""
    return [
        child
        for child in psutil.Process().children()
        if child.status() != psutil.STATUS_ZOMBIE and "runtime.camera_worker" in " ".join(child.cmdline())
    ]


@pytest.fixture
def shared() -> Iterator[tuple[Writer, Reader]]:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    memory_fd = os.memfd_create("test", os.MFD_CLOEXEC)
    writer, reader = Writer(theirs, memory_fd), Reader(ours, memory_fd)
    thread = threading.Thread(target=writer.take_back)
    thread.start()
    yield writer, reader
    reader.wake()
    reader.close()
    thread.join(5)
    assert writer.gone.is_set()
    theirs.close()


def lay(writer: Writer, grey: int, height: int = 6, width: int = 10) -> None:
    place = writer.place(height, width)
    place[:] = grey
    writer.tell(1, grey, 0, place)


def test_a_picture_stays_as_it_is_while_somebody_looks_at_it(shared: tuple[Writer, Reader]) -> None:
    writer, reader = shared
    kept = []
    for grey in range(20):
        until(writer.free)
        lay(writer, grey)
        laid = reader.receive(1)
        assert isinstance(laid, Laid)
        kept.append(reader.pixels(laid)[2:4, 1:5])  # a part keeps the whole
    assert [int(part.mean()) for part in kept] == list(range(20))
    assert not kept[0].flags.writeable
    assert sum(part.base is not None and not part.base.flags.owndata for part in kept) == PLACES - 1
    del kept
    gc.collect()
    until(lambda: len(writer._free) == PLACES)


def test_without_room_the_writer_is_told_so(shared: tuple[Writer, Reader]) -> None:
    writer, _ = shared
    for grey in range(PLACES):
        assert writer.free()
        lay(writer, grey)
    assert not writer.free()


def test_a_smaller_picture_fits_and_a_larger_one_is_refused(shared: tuple[Writer, Reader]) -> None:
    writer, reader = shared
    lay(writer, 1, 40, 40)
    lay(writer, 2, 8, 8)
    first, second = reader.receive(1), reader.receive(1)
    assert isinstance(first, Laid)
    assert isinstance(second, Laid)
    assert reader.pixels(first).shape == (40, 40, 3)
    assert np.array_equal(reader.pixels(second), np.full((8, 8, 3), 2))
    with pytest.raises(CameraError, match="grown to 400x300") as caught:
        writer.place(300, 400)
    assert caught.value.reason == "resized"


def test_the_last_word_of_a_writer_that_has_gone_is_heard() -> None:
    """Even if it did not read what was given back to it, for which the kernel resets the connection."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    memory_fd = os.memfd_create("test", os.MFD_CLOEXEC)
    writer, reader = Writer(theirs, memory_fd), Reader(ours, memory_fd)
    lay(writer, 7)
    laid = reader.receive(1)
    assert isinstance(laid, Laid)
    reader.pixels(laid)  # given back at once
    writer.send(Failed("the last word", "broken"))
    theirs.close()
    assert reader.receive(1) == Failed("the last word", "broken")
    assert reader.receive(1) is None
    reader.close()


def test_pictures_outlive_both_sides() -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    memory_fd = os.memfd_create("test", os.MFD_CLOEXEC)
    writer, reader = Writer(theirs, memory_fd), Reader(ours, memory_fd)
    lay(writer, 7)
    laid = reader.receive(1)
    assert isinstance(laid, Laid)
    pixels = reader.pixels(laid)
    theirs.close()
    reader.close()
    del writer, reader
    gc.collect()
    assert int(pixels.mean()) == 7


def test_frames_come_from_another_process_in_order(stream: Any) -> None:
    camera = ApartCamera("cam0", CameraConfig(source=stream.url))
    frames = camera.frames()
    taken = list(itertools.islice(frames, 10))
    assert len(workers()) == 1
    assert [frame.index for frame in taken] == sorted(frame.index for frame in taken)
    greys = [int(frame.pixels.mean()) for frame in taken]
    assert greys == sorted(set(greys))
    now_ns = time.monotonic_ns()
    assert all(0 < now_ns - frame.captured_ns < 5e9 for frame in taken)
    camera.close()
    assert list(frames) == []
    assert workers() == []


def test_a_source_that_can_never_be_opened_starts_no_process() -> None:
    with pytest.raises(ConfigError, match='for files set kind = "replay"'):
        open_camera("cam0", CameraConfig(source="clip.mp4"))
    assert workers() == []


def test_what_the_source_raises_there_is_raised_here(free_port: Any) -> None:
    url = f"http://user:secret@127.0.0.1:{free_port()}/stream"
    with pytest.raises(CameraError, match=r"camera porch: .* cannot be opened") as caught:
        list(ApartCamera("porch", CameraConfig(source=url, open_timeout_s=2)).frames())
    assert caught.value.reason == "open"
    assert "secret" not in str(caught.value)


def test_no_other_program_sees_the_password(stream: Any) -> None:
    url = stream.url.replace("://", "://user:secret@")
    camera = ApartCamera("cam0", CameraConfig(source=url))
    frames = camera.frames()
    next(frames)
    (worker,) = workers()
    assert "secret" not in " ".join([*worker.cmdline(), *worker.environ().values()])
    camera.close()
    assert list(frames) == []


def test_a_process_that_dies_is_named(stream: Any) -> None:
    frames = ApartCamera("cam0", CameraConfig(source=stream.url)).frames()
    next(frames)
    workers()[0].send_signal(signal.SIGSEGV)
    with pytest.raises(CameraError, match="SIGSEGV") as caught:
        list(frames)
    assert caught.value.reason == "broken"


def test_close_ends_a_camera_that_hangs(stream: Any) -> None:
    camera = ApartCamera("cam0", CameraConfig(source=stream.url, read_timeout_s=600))
    frames = camera.frames()
    next(frames)
    workers()[0].suspend()  # as deaf as one in a driver
    threading.Timer(0.3, camera.close).start()
    assert len(list(frames)) < 10
    assert workers() == []


def test_the_process_does_not_outlive_ours(stream: Any) -> None:
    code = (
        "import sys, os, signal\nfrom runtime.camera_apart import ApartCamera\n"
        "from runtime.config import CameraConfig\n"
        "frames = ApartCamera('cam0', CameraConfig(source=sys.argv[1])).frames()\nnext(frames)\n"
        "import subprocess\nprint(*subprocess.check_output(['pgrep', '-P', str(os.getpid()), '-f', 'camera_worker'],"
        " text=True).split(), flush=True)\nos.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, stream.url],
        cwd=Path(__file__).parents[2],
        stdout=subprocess.PIPE,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == -signal.SIGKILL
    worker = int(done.stdout.split()[0])
    until(lambda: not psutil.pid_exists(worker) or psutil.Process(worker).status() == psutil.STATUS_ZOMBIE, 5)


def test_nothing_is_left_of_two_dozen_cameras_that_hung(stream: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four cameras, six times each: neither a thread nor a descriptor nor a process."""
    monkeypatch.setattr("runtime.camera_apart.GRACE_S", 0.1)
    monkeypatch.setattr("runtime.capture.RETRY_FIRST_S", 0.01)
    counters, process = Counters(), psutil.Process()
    config = CameraConfig(source=stream.url, read_timeout_s=0.5)
    captures = [Capture(f"cam{number}", config, counters, threading.Event()) for number in range(4)]
    for capture in captures:
        capture.start()
    held: list[tuple[int, int]] = []
    for _ in range(6):
        until(lambda: all(capture.status == "online" and capture.take() is not None for capture in captures))
        held.append((process.num_threads(), process.num_fds()))
        stuck = workers()
        for worker in stuck:
            worker.suspend()
        until(lambda stuck=stuck: not any(worker.is_running() for worker in stuck))  # type: ignore[misc]
    until(lambda: all(capture.status == "online" and capture.take() is not None for capture in captures))
    assert len(workers()) == 4
    most = [max(column) for column in zip(*held[:3], strict=True)]
    until(lambda: process.num_threads() <= most[0] and process.num_fds() <= most[1])
    assert counters.snapshot()['camera_failures_total{camera="cam3",reason="silent"}'] >= 6
    for capture in captures:
        capture.close()
    assert workers() == []
