"""Measures how long the part of a model before and after each cut takes on this machine, on one thread."""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import onnxruntime as ort
from onnx import ModelProto

from export.graph import extract, tensor_info
from export.slicing import Chain, in_graph
from runtime.datatypes import Tensor
from runtime.segment_onnx import session_options

REPEATS = 9
WARM_UP = 2


@dataclass(frozen=True, slots=True)
class Timed:
    """Milliseconds for one frame, median of several."""

    before_ms: float
    after_ms: float


def run_ms(*pairs: tuple[ModelProto, Tensor]) -> tuple[float, ...]:
    """The median time of one run of each model on its input; they take turns, so a busy moment strikes all alike."""
    sessions = [ort.InferenceSession(model.SerializeToString(), session_options(1)) for model, _ in pairs]
    feeds = [{session.get_inputs()[0].name: batch} for session, (_, batch) in zip(sessions, pairs, strict=True)]
    elapsed: list[list[float]] = [[] for _ in pairs]
    for turn in range(WARM_UP + REPEATS):
        for session, feed, times in zip(sessions, feeds, elapsed, strict=True):
            start = time.perf_counter()
            session.run(None, feed)
            if turn >= WARM_UP:
                times.append((time.perf_counter() - start) * 1e3)
    return tuple(round(statistics.median(times), 3) for times in elapsed)


def time_cuts(chain: Chain, wanted: Iterable[int], frame: Tensor) -> list[Timed]:
    """Time the whole model up to each wanted wire, and take what is left for the rest."""
    timed: list[Timed] = []
    for wire in wanted:
        output = tensor_info(chain.wires[wire], chain.dtypes[wire], in_graph(chain.shapes[wire]))
        prefix = extract(chain.whole, list(chain.whole.graph.input), [output], "prefix")
        before_ms, whole_ms = run_ms((prefix, frame), (chain.whole, frame))
        timed.append(Timed(before_ms, round(max(0.0, whole_ms - before_ms), 3)))
    return timed


def time_chain(chain: Chain, frame: Tensor) -> tuple[float, tuple[float, ...]]:
    """The whole model's time, and that of each segment, fed with what the one before it made."""
    pairs = [(chain.whole, frame)]
    batch = frame
    for model in chain.segments:
        pairs.append((model, batch))
        session = ort.InferenceSession(model.SerializeToString(), session_options(1))
        (batch,) = session.run(None, {session.get_inputs()[0].name: batch})
    whole_ms, *segment_ms = run_ms(*pairs)
    return whole_ms, tuple(segment_ms)


def machine() -> dict[str, str]:
    """What the times were measured on."""
    return {"processor": _processor(), "system": platform.system(), "onnxruntime": ort.__version__}


def noise(shape: Sequence[int], seed: int) -> Tensor:
    """A frame for timing only: what a network computes hardly changes how long it takes."""
    return np.random.default_rng(seed).integers(0, 256, (1, *shape), dtype=np.uint8)


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:  # noqa: PTH123
            for line in lines:
                if line.startswith(("model name", "Model")):
                    return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
