"""The rival that a user would really run: the camera's pictures as H.264, and the whole model where they arrive.

The device's side scales the pictures to the model's input (or to a width that is asked for), encodes them with libx264
(preset veryfast, tune zerolatency, an average of so many kilobits a second that a buffer of half a second holds to, a
key frame every two seconds) and writes them to one TCP connection, each with its length and index. The answering side
decodes them, runs the whole model of the bundle and writes the answer back; the device notes its age. As a careful
user would have it:

- a frame is left out before it is encoded where the socket still has not taken the one before, or where the oldest
  frame without an answer is older than three quarters of the budget; its kernel may hold 32 KB for the socket, not
  megabytes;
- silence for two seconds while frames wait for answers ends the connection, and another is tried every half second,
  with an encoder of its own, so that it begins with a key frame;
- an answer that is older than the budget is flagged, as Kinflow's are. There is no model on the device: a frame that
  gets no answer from above has none.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import select
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import cv2
import msgspec
import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from runtime import cascade, manifest  # noqa: E402
from runtime.camera_replay import ReplayCamera  # noqa: E402
from runtime.cli import stop_without_parent  # noqa: E402
from runtime.config import CameraConfig  # noqa: E402
from runtime.datatypes import Dropped, ExitOutput, Features, Frame, Pixels, Result  # noqa: E402
from runtime.manifest import Bundle  # noqa: E402
from runtime.policy import ExitPolicy  # noqa: E402
from runtime.preprocess import prepare  # noqa: E402
from runtime.processes import end  # noqa: E402
from runtime.scenario import Scenario  # noqa: E402
from runtime.segment import load_segments  # noqa: E402
from runtime.shaper import Shaper  # noqa: E402
from runtime.strikes import Strikes  # noqa: E402
from runtime.task import open_task  # noqa: E402

HEAD = struct.Struct("<II")  # bytes that follow, index of the frame
KEY_S = 2.0
BUFFER_S = 0.5  # of the encoder's rate control
SEND_BYTES = 32 * 1024
PATIENCE = 0.75  # of the budget: one lost segment is waited for, a link that is too slow for the stream is not
SILENCE_S = 2.0
AGAIN_S = 0.5
TURN_S = 0.05
DRAIN_S = 2.0
CAMERA = "cam0"
TIER = "cloud"


@dataclass(frozen=True, slots=True)
class Stream:
    """How the pictures are coded: `h264:KBITS` or `h264:KBITS:WIDTH`."""

    kbits: int
    width: int | None = None  # of the pictures that are sent; None: the model's input, cropped as the model sees it

    @classmethod
    def of(cls, config: str) -> Stream:
        """Read a configuration's name; raises ValueError where it is none."""
        _, *numbers = config.split(":")
        if not 1 <= len(numbers) <= 2 or not all(number.isdigit() and int(number) for number in numbers):
            raise ValueError(f"{config!r} is no stream; write it as h264:KBITS or h264:KBITS:WIDTH")
        return cls(*map(int, numbers))

    def picture(self, pixels: Pixels, bundle: Bundle) -> Pixels:
        """The picture that is encoded, (height, width, 3), both even."""
        if self.width is None:
            seen: Pixels = prepare(pixels, bundle.manifest.preprocess)[0]
            return seen
        height, width = pixels.shape[:2]
        sides = (self.width // 2 * 2, round(height * self.width / width / 2) * 2)
        scaled: Pixels = cv2.resize(pixels, sides, interpolation=cv2.INTER_AREA).astype(np.uint8, copy=False)
        return scaled


class Rival:
    """One run of the rival on a scenario, with the face of runtime.simulation.Simulation."""

    def __init__(
        self, bundle: Bundle, camera: CameraConfig, stream: Stream, scenario: Scenario, budget_ms: int
    ) -> None:
        self._bundle = bundle
        self._stream = stream
        self._camera = msgspec.structs.replace(camera, loop=True, stalls=scenario.stalls)
        self._scenario = scenario
        self._budget_ms = budget_ms
        self.struck: Counter[str] = Counter()
        self.start_s: float | None = None  # time.monotonic() when the first frame was grabbed
        self.link_bytes: list[tuple[int, int]] = []
        self.counters: dict[str, dict[str, int]] = {}
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Rival:
        with contextlib.ExitStack() as stack:
            answering = stack.enter_context(_process("answer", [str(self._bundle.path)]))
            assert answering.stdout is not None
            target = ("127.0.0.1", int(answering.stdout.readline()))
            self._shaper = stack.enter_context(Shaper(target, self._scenario))
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *failure: object) -> None:
        self.link_bytes = self._shaper.bytes_passed()
        self._stack.close()

    def lines(self) -> Iterator[Result | Dropped]:
        """Run the device's side to the scenario's end, and yield what becomes of each frame."""
        told = {
            "bundle": str(self._bundle.path),
            "camera": msgspec.to_builtins(self._camera),
            "stream": [self._stream.kbits, self._stream.width],
            "budget_ms": self._budget_ms,
            "port": self._shaper.address[1],
        }
        with _process("device", [json.dumps(told)]) as device:
            assert device.stdout is not None
            with Strikes((), self._scenario.duration_s, _nothing, device.terminate) as strikes:
                for line in device.stdout:
                    tree = msgspec.json.decode(line)
                    if tree.get("event") == "started":
                        self.start_s = start_s = tree["grabbed_s"]
                        strikes.begin(start_s)
                        self._shaper.begin(start_s)
                        continue
                    if tree.get("event") == "stopped":
                        self.counters["device"] = tree["counters"]
                        continue
                    kind: type[Result | Dropped] = Dropped if "dropped" in tree else Result
                    yield msgspec.convert(tree, kind)


def _nothing(step: object) -> None:
    pass


@contextlib.contextmanager
def _process(side: str, arguments: list[str]) -> Iterator[subprocess.Popen[bytes]]:
    command = [sys.executable, str(Path(__file__).resolve()), side, *arguments]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True)
    try:
        yield process
    finally:
        end(process)


class Encoder:
    """An H.264 stream from its first frame on, which is a key frame."""

    def __init__(self, kbits: int, fps: float, height: int, width: int) -> None:
        import av

        self._frame_of: Callable[..., Any] = av.VideoFrame.from_ndarray
        pace = Fraction(fps).limit_denominator(1001)
        self._codec: Any = av.CodecContext.create("libx264", "w")
        self._codec.width, self._codec.height, self._codec.pix_fmt = width, height, "yuv420p"
        self._codec.time_base, self._codec.framerate = 1 / pace, pace
        self._codec.thread_count = 1
        self._codec.bit_rate = kbits * 1000
        self._codec.gop_size = max(1, round(KEY_S * fps))
        buffer = {"maxrate": f"{kbits}k", "bufsize": f"{max(1, round(kbits * BUFFER_S))}k"}
        self._codec.options = {"preset": "veryfast", "tune": "zerolatency", **buffer}
        self._count = 0

    def encode(self, picture: Pixels) -> bytes:
        """A picture (height, width, 3), RGB, as bytes that a decoder shows without waiting for more."""
        frame = self._frame_of(np.ascontiguousarray(picture), format="rgb24")
        frame.pts = self._count
        self._count += 1
        return b"".join(bytes(packet) for packet in self._codec.encode(frame))


class Sender:
    """The device's side: a connection that is looked after by a thread, and what waits on it for an answer."""

    def __init__(self, address: tuple[str, int], budget_ms: float, on_answer: Callable[[int, bytes], None]) -> None:
        self._address = address
        self._patience_ns = int(budget_ms * 1e6 * PATIENCE)
        self._on_answer = on_answer
        self._lock = threading.Lock()
        self._unwritten = b""
        self._waiting: dict[int, int] = {}  # frame → when it was grabbed
        self._lost: list[int] = []
        self._heard_s = 0.0  # the last word, or the first frame since
        self._closing = threading.Event()
        self.connection = 0  # counts up; 0: there was none yet
        self.connected = False
        self._thread = threading.Thread(target=self._run, name="sender", daemon=True)
        self._thread.start()

    def refuses(self, now_ns: int) -> str | None:
        """Why a frame would better not be encoded now; None: it may."""
        with self._lock:
            if not self.connected:
                return "offline"
            if self._unwritten:
                return "busy"
            oldest_ns = next(iter(self._waiting.values()), now_ns)
            return "behind" if now_ns - oldest_ns > self._patience_ns else None

    def send(self, index: int, grabbed_ns: int, data: bytes, connection: int) -> bool:
        """Hand a frame over that was encoded for a connection; False: that one is gone."""
        with self._lock:
            if not self.connected or connection != self.connection:
                return False
            self._heard_s = time.monotonic() if not self._waiting else self._heard_s
            self._waiting[index] = grabbed_ns
            self._unwritten += HEAD.pack(len(data), index) + data
            self._write()
            return True

    def lost(self) -> list[int]:
        """Frames that will get no answer any more, each told once."""
        with self._lock:
            gone, self._lost = self._lost, []
            return gone

    @property
    def waiting(self) -> int:
        """Frames that wait for an answer."""
        return len(self._waiting)

    def close(self) -> None:
        """End the connection; what waits is lost."""
        self._closing.set()
        self._thread.join()

    def _write(self) -> None:
        try:
            self._unwritten = self._unwritten[self._socket.send(self._unwritten) :]
        except BlockingIOError:
            return
        except OSError:
            self.connected = False  # the thread finds it gone as well

    def _run(self) -> None:
        while not self._closing.is_set():
            with contextlib.suppress(OSError), socket.socket() as self._socket:
                self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BYTES)
                self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                self._socket.settimeout(1.0)
                self._socket.connect(self._address)
                self._socket.setblocking(False)
                self._serve()
            with self._lock:
                self.connected = False
                self._unwritten = b""
                self._lost += self._waiting
                self._waiting.clear()
            self._closing.wait(AGAIN_S)

    def _serve(self) -> None:
        with self._lock:
            self.connected = True
            self.connection += 1
            self._heard_s = time.monotonic()
        came = b""
        while self.connected and not self._closing.is_set():
            wanted = [self._socket] if self._unwritten else []
            readable, writable, _ = select.select([self._socket], wanted, [], TURN_S)
            if writable:
                with self._lock:
                    self._write()
            if self._waiting and time.monotonic() - self._heard_s > SILENCE_S:
                return
            if not readable:
                continue
            data = self._socket.recv(65536)
            if not data:
                return
            self._heard_s = time.monotonic()
            came += data
            while len(came) >= HEAD.size:
                length, index = HEAD.unpack_from(came)
                if len(came) < HEAD.size + length:
                    break
                with self._lock:
                    self._waiting.pop(index, None)
                self._on_answer(index, came[HEAD.size : HEAD.size + length])
                came = came[HEAD.size + length :]


class DeviceSide:
    """Camera, encoder and connection; tells what becomes of each frame as a JSON line on standard output."""

    def __init__(self, told: Any) -> None:
        self._bundle = manifest.load(Path(told["bundle"]))
        self._task = open_task(self._bundle)
        self._stream = Stream(*told["stream"])
        self._budget_ms = float(told["budget_ms"])
        self._config = msgspec.convert(told["camera"], CameraConfig)
        self._camera = ReplayCamera(CAMERA, self._config)
        self._out = threading.Lock()
        self._frames: dict[int, tuple[Frame, int]] = {}  # sent, with the bytes of each
        self._sender = Sender(("127.0.0.1", told["port"]), self._budget_ms, self._answered)
        self._encoder: tuple[int, Encoder] | None = None  # with the connection it is for

    def run(self, stop: threading.Event, fps: float) -> None:
        """Send frames until `stop`."""
        captured = 0
        while not self._sender.connected and not stop.is_set():  # a clip can wait
            time.sleep(TURN_S)
        for frame in self._camera.frames():
            if not captured:
                self._say({"event": "started", "grabbed_s": frame.captured_ns / 1e9})
            captured += 1
            self._take(frame, fps)
            for index in self._sender.lost():
                self._drop(index, "lost")
            if stop.is_set():
                break
        end_s = time.monotonic() + DRAIN_S
        while self._sender.waiting and time.monotonic() < end_s:
            time.sleep(TURN_S)
        self._sender.close()
        for index in self._sender.lost():
            self._drop(index, "stopping")
        self._say({"event": "stopped", "counters": {f'frames_captured_total{{camera="{CAMERA}"}}': captured}})

    def _take(self, frame: Frame, fps: float) -> None:
        reason = self._sender.refuses(time.monotonic_ns())
        if reason is not None:
            self._say(Dropped(CAMERA, frame.index, reason))
            return
        picture = self._stream.picture(frame.pixels, self._bundle)
        connection = self._sender.connection
        if self._encoder is None or self._encoder[0] != connection:
            self._encoder = (connection, Encoder(self._stream.kbits, fps, *picture.shape[:2]))
        data = self._encoder[1].encode(picture)
        self._frames[frame.index] = (frame, HEAD.size + len(data))
        if not self._sender.send(frame.index, frame.captured_ns, data, connection):
            self._drop(frame.index, "offline")

    def _drop(self, index: int, reason: str) -> None:
        if self._frames.pop(index, None) is not None:
            self._say(Dropped(CAMERA, index, reason))

    def _answered(self, index: int, said: bytes) -> None:
        known = self._frames.pop(index, None)
        if known is None:
            return
        frame, size = known
        tree = msgspec.json.decode(said, type=dict[str, msgspec.Raw])
        answer = self._task.decode(tree["answer"])
        age_ms = (time.monotonic_ns() - frame.captured_ns) / 1e6
        result = Result(
            camera=CAMERA,
            frame=index,
            task=self._bundle.manifest.task,
            label=self._task.words(answer),
            confidence=msgspec.json.decode(tree["confidence"]),
            answer=self._task.told(answer, *frame.pixels.shape[:2]),
            tier=TIER,
            exit=msgspec.json.decode(tree["exit"]),
            agreement=None,
            codec="h264",
            cut=0,
            bytes_up=size,
            age_ms=age_ms,
            degraded="deadline" if age_ms > self._budget_ms else None,
        )
        self._say(result)

    def _say(self, line: object) -> None:
        with self._out:
            sys.stdout.buffer.write(msgspec.json.encode(line) + b"\n")
            sys.stdout.buffer.flush()


class AnsweringSide:
    """Takes one connection at a time, the newest, and answers every frame that comes on it."""

    def __init__(self, bundle: Bundle) -> None:
        self._spec = bundle.manifest.preprocess
        self._tier = cascade.Tier(bundle, *load_segments(bundle, 0, len(bundle.manifest.segments) - 1, threads=1))
        self._policy = ExitPolicy.of(bundle, early=False)
        cascade.warm_up(self._tier)

    def run(self, stop: threading.Event, listener: socket.socket) -> None:
        """Serve until `stop`."""
        while not stop.is_set():
            if select.select([listener], [], [], TURN_S)[0]:
                connection, _ = listener.accept()
                with contextlib.suppress(OSError), connection:
                    self._serve(connection, listener, stop)

    def _serve(self, connection: socket.socket, listener: socket.socket, stop: threading.Event) -> None:
        import av
        from av.codec.context import Flags

        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        decoder: Any = av.CodecContext.create("h264", "r")
        decoder.thread_count = 1
        decoder.flags |= Flags.low_delay  # a packet is a frame, and comes out at once
        came = b""
        while not stop.is_set():
            readable, _, _ = select.select([connection, listener], [], [], TURN_S)
            if listener in readable:
                return
            if connection not in readable:
                continue
            data = connection.recv(65536)
            if not data:
                return
            came += data
            while len(came) >= HEAD.size:
                length, index = HEAD.unpack_from(came)
                if len(came) < HEAD.size + length:
                    break
                packet = av.Packet(came[HEAD.size : HEAD.size + length])
                came = came[HEAD.size + length :]
                for frame in decoder.decode(packet):
                    self._say(connection, index, frame.to_ndarray(format="rgb24"))

    def _say(self, connection: socket.socket, index: int, pixels: Pixels) -> None:
        outcome = cascade.run([Features(0, prepare(pixels, self._spec))], self._tier, self._policy)[0]
        said = outcome.answer
        assert isinstance(said, ExitOutput), "the last exit always answers"
        tree = {"answer": said.answer, "confidence": said.confidence, "exit": said.exit}
        data = msgspec.json.encode(tree)
        connection.sendall(HEAD.pack(len(data), index) + data)


def main() -> None:
    """One side of the rival, as a process; `bench_scenario` starts both."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("side", choices=("device", "answer"))
    parser.add_argument("told", help="device: settings as JSON; answer: the bundle's path")
    options = parser.parse_args()
    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    threading.Thread(target=stop_without_parent, args=(stop,), name="parent", daemon=True).start()
    if options.side == "answer":
        side = AnsweringSide(manifest.load(Path(options.told)))
        with socket.create_server(("127.0.0.1", 0)) as listener:
            print(listener.getsockname()[1], flush=True)
            side.run(stop, listener)
    else:
        told = json.loads(options.told)
        DeviceSide(told).run(stop, told["camera"]["max_fps"])


if __name__ == "__main__":
    main()
