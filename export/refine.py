"""Refines a fitted transform by distillation: `kinflow export --refine MINUTES`.

The closed-form fit counts errors to second order and takes frequencies of a band for alike. Here the encoder's
matrices, and with them the decoder's, their inverses, are moved by gradient descent so that answers after coding stay
near the whole float model's at fewer bits: noise of one step stands for rounding, the logarithm of each coefficient's
size for its bits (as in Ballé, Laparra, Simoncelli, "End-to-end optimized image compression", ICLR 2017, without their
networks). What comes out is kept only when it needs fewer bits at the same divergence on frames that had no part in it.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from export.codec_tables import bits, level_scales
from export.sensitivity import Tail, torch_threads
from export.torch_graph import TorchGraph
from export.transform import Array, Layout, Transform, cosines, settle, spectrum

BATCH = 8
RATE = 5e-4  # of learning; it falls to nothing
LEAST_GAIN = 0.01  # of the bits, for the refined transform to be kept
JUDGED_STEPS = (0.7, 1.0, 1.4)  # of the given one


@dataclass(frozen=True, slots=True)
class Refined:
    """What refinement came to."""

    transform: Transform  # refined, or the given one
    bits_ratio: float  # refined to given, at the same divergence on the held-back frames
    rounds: int


def refine(
    transform: Transform,
    tail: Tail,
    features: Array,
    logits: NDArray[np.float32],
    held: NDArray[np.bool_],
    *,
    step: float,
    minutes: float,
    seed: int,
    threads: int = 1,
    most_rounds: int | None = None,
) -> Refined:
    """Refine a transform for about `minutes`; how many rounds that are depends on the machine.

    Args:
        transform: as fitted.
        tail: the float model behind the cut.
        features: (frames, positions, channels) of the calibration frames.
        logits: (frames, classes) of the whole float model.
        held: (frames,), those that only judge.
        step: of the rate to refine for.
        minutes: of time.
        seed: of the order of frames and of the noise.
        threads: of torch.
        most_rounds: to stop after, whatever time is left; the outcome then does not depend on the machine.

    Raises:
        UnknownOperatorError: torch cannot run the tail.
    """
    graph = TorchGraph(tail.model)
    with torch_threads(threads):
        moved, rounds = _descend(
            transform, graph, tail, features[~held], logits[~held], step, minutes, seed, most_rounds
        )
    better = settle(transform.layout, *moved, spectrum(features, transform.layout))
    known = [(features[~held], features[held], logits[held])] * 2
    curves = [_curve(each, graph, tail, *frames, step) for each, frames in zip((transform, better), known, strict=True)]
    ratio = bits_ratio(*curves)
    return Refined(better if ratio < 1 - LEAST_GAIN else transform, ratio, rounds)


def bits_ratio(given: NDArray[np.float64], refined: NDArray[np.float64]) -> float:
    """The bits of `refined` to those of `given` at the same divergence, by straight lines through logarithms.

    Infinite where more bits do not lessen the divergence: then it is not rounding that does harm.

    Args:
        given: (points, 2): bits and divergence.
        refined: as `given`.
    """
    lines = [np.polyfit(np.log(curve[:, 1]), np.log(curve[:, 0]), 1) for curve in (given, refined)]
    if lines[1][0] >= 0:
        return float("inf")
    at = np.log(given[:, 1]).mean()
    return float(np.exp(np.polyval(lines[1], at) - np.polyval(lines[0], at)))


def _descend(
    transform: Transform,
    graph: TorchGraph,
    tail: Tail,
    features: Array,
    logits: NDArray[np.float32],
    step: float,
    minutes: float,
    seed: int,
    most_rounds: int | None,
) -> tuple[tuple[Array, Array], int]:
    generator = torch.Generator().manual_seed(seed)
    layout = transform.layout
    turn = _Turn(layout)
    # Moves are made among coefficients, where all directions are worth the same and one rate of learning suits all. The
    # decoder stays the encoder's inverse: what is learnt is where errors go, and nothing is lost but by rounding.
    moves = torch.zeros(transform.forward.shape, requires_grad=True)
    given = [torch.from_numpy(each) for each in (transform.forward, transform.backward)]
    unit = torch.eye(layout.channels)
    optimizer = torch.optim.Adam([moves], lr=RATE)
    spectra = torch.from_numpy(spectrum(features, layout))
    centre = spectra.mean(dim=0)
    likely = torch.log_softmax(torch.from_numpy(logits), 1)
    start_s = time.monotonic()
    exchange = 0.0  # bits that a nat is worth, so that both weigh as they do where the transform starts
    rounds = 0
    done = False
    while not done:
        for rows in torch.split(torch.randperm(len(features), generator=generator), min(BATCH, tail.batch)):
            forward, backward = given[0] @ (unit + moves), torch.linalg.inv(unit + moves) @ given[1]
            coefficients = turn.by_band(spectra[rows] - centre, forward)
            noise = torch.rand(coefficients.shape, generator=generator) - 0.5
            restored = turn.by_band(coefficients + step * noise, backward) + centre
            said = graph(_given(turn.place(restored), tail, layout))
            divergence = functional.kl_div(
                torch.log_softmax(said, 1), likely[rows], log_target=True, reduction="batchmean"
            )
            cost = torch.log2(1 + (coefficients / step) ** 2).sum() / len(rows) / 2
            if not exchange:
                active = float((coefficients.abs() > step / 2).sum()) / len(rows)
                exchange = active / (2 * np.log(2) * max(float(divergence.detach()), 1e-6))
            loss = cost + exchange * divergence
            spent = (time.monotonic() - start_s) / (60 * minutes) if most_rounds is None else rounds / most_rounds
            for group in optimizer.param_groups:
                group["lr"] = RATE * max(0.0, 1 - spent)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            rounds += 1
            done = rounds == most_rounds or time.monotonic() >= start_s + 60 * minutes
            if done:
                break
    with torch.no_grad():
        ahead, back = given[0] @ (unit + moves), torch.linalg.inv(unit + moves) @ given[1]
    return (ahead.numpy(), back.numpy()), rounds


class _Turn:
    """The cosine transform and the bands, in torch."""

    def __init__(self, layout: Layout) -> None:
        self._layout = layout
        self._rows, self._columns = torch.from_numpy(cosines(layout.rows)), torch.from_numpy(cosines(layout.columns))
        self._bands = [torch.from_numpy(np.flatnonzero(layout.bands == band)) for band in range(len(layout.band_sizes))]

    def by_band(self, spectra: Tensor, matrices: Tensor) -> Tensor:
        turned = torch.cat([spectra[:, rows] @ matrix for rows, matrix in zip(self._bands, matrices, strict=True)], 1)
        return turned[:, torch.argsort(torch.cat(self._bands))]

    def place(self, spectra: Tensor) -> Tensor:
        layout = self._layout
        grid = spectra[:, layout.extra :].reshape(-1, layout.rows, layout.columns, layout.channels)
        grid = torch.einsum("uh,nuvc->nhvc", self._rows, grid)
        grid = torch.einsum("vw,nhvc->nhwc", self._columns, grid)
        return torch.cat([spectra[:, : layout.extra], grid.reshape(len(spectra), -1, layout.channels)], 1)


def _given(features: Tensor, tail: Tail, layout: Layout) -> Tensor:
    """(n, positions, channels) as the tail's graph takes it."""
    if tail.maps:
        return features.reshape(-1, layout.rows, layout.columns, layout.channels).permute(0, 3, 1, 2)
    shape = [int(dim.dim_value) for dim in tail.model.graph.input[0].type.tensor_type.shape.dim][1:]
    return features.reshape(-1, *shape)


def _divergence(said: Tensor, likely: Tensor) -> Tensor:
    """From the logarithms of the whole model's probabilities to what logits say, the mean over frames, in nats."""
    return functional.kl_div(torch.log_softmax(said, 1), likely, log_target=True, reduction="batchmean")


def _curve(
    transform: Transform,
    graph: TorchGraph,
    tail: Tail,
    fitted: Array,
    features: Array,
    logits: NDArray[np.float32],
    step: float,
) -> NDArray[np.float64]:
    """Bits and divergence at a few steps on held-back frames: (steps, 2)."""
    known, seen = transform.analyse(fitted), transform.analyse(features)
    likely = torch.log_softmax(torch.from_numpy(logits), 1)
    points = []
    for each in step * np.array(JUDGED_STEPS):
        levels = np.rint(seen / np.float32(each))
        information = bits(levels.astype(np.int64), level_scales(known, float(each))).sum(axis=1).mean()
        restored = torch.from_numpy(transform.synthesize((levels * np.float32(each)).astype(np.float32)))
        with torch.inference_mode():
            parts = [
                graph(_given(part, tail, transform.layout)) for part in torch.split(restored, min(BATCH, tail.batch))
            ]
        said = torch.log_softmax(torch.cat(parts), 1)
        divergence = functional.kl_div(said, likely, log_target=True, reduction="batchmean")
        points.append((float(information), max(float(divergence), 1e-9)))
    return np.array(points)
