"""How much the answer cares about each direction of the features at a cut, without labels.

The measure is the Fisher information G of the model's own answer: an error d in the features costs d'Gd / 2 nats of
Kullback-Leibler divergence. It is gathered per band of frequencies, as the transform needs it. Two ways: the second
moment of the gradient of the log-likelihood of labels drawn from the model's own answers, where torch can run the
graph; or, for any graph, by probing: each principal channel direction is pushed along one random pattern of the band,
and since all directions share the pattern, the products of the changes of the logits give the whole matrix.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Literal

import numpy as np
import onnxruntime as ort
import torch
from numpy.typing import NDArray
from onnx import ModelProto

from export.torch_graph import TorchGraph, UnknownOperatorError
from export.transform import Array, Layout, place, spectrum
from runtime.segment_onnx import session_options

Method = Literal["gradients", "probes"]

BATCH = 8
PROBE_RATIO = 0.3  # size of a push, in standard deviations of the features
PROBE_MACS = 2.2e12  # what probing one cut may cost
LEAST_PROBED = 4  # frames
MOST_PROBED = 32
MOST_DIRECTIONS = 96
CLOSE = 1e-3  # of the largest logit: how near torch must come to onnxruntime


@dataclass(frozen=True, slots=True)
class Tail:
    """The whole float model behind a cut, and how its input lies."""

    model: ModelProto
    macs: int
    batch: int  # the largest it takes
    maps: bool  # (batch, channels, height, width) in the graph; else as it travels
    # The output is evidence, half of whose squared change is a divergence in nats; else logits of one label.
    evidence: bool = False

    def given(self, features: Array, layout: Layout) -> Array:
        """(n, positions, channels) as the graph takes it."""
        if self.maps:
            grid = features.reshape(len(features), layout.rows, layout.columns, layout.channels)
            return np.ascontiguousarray(grid.transpose(0, 3, 1, 2))
        shape = [int(dim.dim_value) for dim in self.model.graph.input[0].type.tensor_type.shape.dim][1:]
        return features.reshape(len(features), *shape)

    def taken(self, features: Array, layout: Layout) -> Array:
        """The way back from `given`."""
        if self.maps:
            features = features.transpose(0, 2, 3, 1)
        return np.ascontiguousarray(features).reshape(len(features), layout.positions, layout.channels)


def sensitivity(
    tail: Tail, features: Array, layout: Layout, seed: int, method: Method, threads: int = 1
) -> tuple[Array, Method]:
    """The sensitivity (bands, channels, channels) over features (frames, positions, channels), and how it was found.

    `gradients` falls back to `probes` where torch cannot run the graph as onnxruntime does.
    """
    if method == "gradients":
        with suppress(UnknownOperatorError), torch_threads(threads):
            return by_gradients(tail, features, layout, seed), "gradients"
    return by_probes(tail, features, layout, seed, threads), "probes"


@contextmanager
def torch_threads(threads: int) -> Iterator[None]:
    """Let torch use so many threads inside."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def by_gradients(tail: Tail, features: Array, layout: Layout, seed: int) -> Array:
    """One gradient a frame, of a label drawn from the model's own answer.

    Raises:
        UnknownOperatorError: torch cannot run the graph, or gets something else.
    """
    graph = TorchGraph(tail.model)
    generator = torch.Generator().manual_seed(seed)
    session = _session(tail, 1)
    total = np.zeros((len(layout.band_sizes), layout.channels, layout.channels))
    for number, batch in enumerate(_batches(features, tail.batch)):
        given = torch.from_numpy(tail.given(batch, layout)).requires_grad_()
        logits = graph(given)
        if number == 0:
            (expected,) = session.run(None, {session.get_inputs()[0].name: given.detach().numpy()})
            limit = CLOSE * max(1.0, float(np.abs(expected).max()))
            if logits.shape != expected.shape or not np.abs(logits.detach().numpy() - expected).max() <= limit:
                raise UnknownOperatorError("torch and onnxruntime do not agree on this graph")
        (gradient,) = torch.autograd.grad(_likelihood(logits, generator, evidence=tail.evidence), given)
        spectra = spectrum(tail.taken(gradient.numpy(), layout), layout)
        for band in range(len(total)):
            rows = spectra[:, layout.bands == band].reshape(-1, layout.channels).astype(np.float64)
            total[band] += rows.T @ rows
    sizes = np.array(layout.band_sizes)[:, np.newaxis, np.newaxis]
    mean: Array = (total / (len(features) * sizes)).astype(np.float32)
    return mean


def _likelihood(outputs: torch.Tensor, generator: torch.Generator, *, evidence: bool) -> torch.Tensor:
    """The log-likelihood, up to a constant, of an answer drawn from what the model says itself."""
    if evidence:
        return (outputs * torch.randn(outputs.shape, generator=generator)).sum()
    drawn = torch.multinomial(torch.softmax(outputs.detach(), 1), 1, generator=generator)
    return torch.log_softmax(outputs, 1).gather(1, drawn).sum()


def by_probes(tail: Tail, features: Array, layout: Layout, seed: int, threads: int = 1) -> Array:
    """The whole matrix from pushes along the principal directions of the channels, on a few frames."""
    generator = np.random.default_rng(seed)
    session = _session(tail, threads)
    centred = (features - features.mean(axis=(0, 1))).reshape(-1, layout.channels).astype(np.float64)
    size = PROBE_RATIO * float(np.sqrt((centred**2).mean()))
    _, vectors = np.linalg.eigh(centred.T @ centred)
    directions = vectors[:, ::-1][:, :MOST_DIRECTIONS].T.astype(np.float32)
    bands = len(layout.band_sizes)
    wanted = int(PROBE_MACS / max(1, tail.macs) / (bands * len(directions)))
    picked = np.linspace(0, len(features) - 1, min(len(features), max(LEAST_PROBED, min(MOST_PROBED, wanted))))
    total = np.zeros((bands, len(directions), len(directions)))
    for frame in picked.astype(int):
        before = _logits(session, tail, features[frame : frame + 1], layout)[0]
        likely = np.exp(before - before.max())
        likely /= likely.sum()
        if tail.evidence:
            likely = np.ones_like(before)
        for band in range(bands):
            pattern = np.zeros((1, layout.positions, 1), np.float32)
            rows = layout.bands == band
            pattern[0, rows, 0] = generator.choice((-1.0, 1.0), int(rows.sum()))
            pattern = place(pattern, _one_channel(layout))
            strength = size / float(np.sqrt((pattern**2).mean()))
            pushed = features[frame] + strength * pattern[0] * directions[:, np.newaxis, :]
            change = (_logits(session, tail, pushed, layout) - before) / strength
            mean = np.zeros(len(change)) if tail.evidence else change @ likely
            # The pattern holds as many frequencies as the band; each has its share.
            total[band] += ((change * likely) @ change.T - np.outer(mean, mean)) / int(rows.sum())
    total /= len(picked)
    found = directions.T.astype(np.float64) @ total @ directions.astype(np.float64)
    rest = np.eye(layout.channels) - directions.T.astype(np.float64) @ directions
    least = np.array([np.diag(matrix).min() for matrix in total])[:, np.newaxis, np.newaxis]
    return (found + least * rest).astype(np.float32)


def _logits(session: ort.InferenceSession, tail: Tail, features: Array, layout: Layout) -> NDArray[np.float64]:
    name = session.get_inputs()[0].name
    parts: Sequence[Array] = [
        session.run(None, {name: tail.given(batch, layout)})[0] for batch in _batches(features, tail.batch)
    ]
    return np.concatenate(parts).astype(np.float64)


def _session(tail: Tail, threads: int) -> ort.InferenceSession:
    return ort.InferenceSession(tail.model.SerializeToString(), session_options(threads))


def _batches(features: Array, most: int) -> Iterable[Array]:
    size = min(BATCH, most)
    return (features[start : start + size] for start in range(0, len(features), size))


def _one_channel(layout: Layout) -> Layout:
    return Layout(layout.extra, layout.rows, layout.columns, 1, layout.bands)
