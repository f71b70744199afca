"""Trains a stand-in, for a short while, to make what the original makes of the same frames; no labels.

An error costs what it costs the answer: it is weighed half by the second moment of the gradient of the log-likelihood
of a label drawn from the model's own answer (its Fisher information), half by its size. What was trained is kept only
when it is nearer on frames that were held back from the training.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import onnxruntime as ort
import torch
from numpy.typing import NDArray
from onnx import ModelProto

from export.graph import Index, constant, copy_of
from export.layers import LAYERS
from export.torch_graph import TorchGraph, UnknownOperatorError
from runtime.datatypes import Tensor
from runtime.segment_onnx import session_options

BATCH = 8
STEPS = 60
LEAST_STEPS = 20  # fewer change nothing
MACS = 2.4e11  # multiply-accumulates that training may cost, about a third of them on the way there
RATE, WARM_UP = 3e-3, 10  # Adam's, and steps until it is reached; then it falls to nothing, step by step
HELD_BACK = 8  # one of so many inputs
ANSWER_RATIO = 0.5  # of the weight of an error that is its cost to the answer


def steps_for(macs: int) -> int:
    """How many steps a stand-in of so many multiply-accumulates is trained; 0 where that would take too long."""
    steps = min(STEPS, int(MACS / (3 * BATCH * max(1, macs))))
    return steps if steps >= LEAST_STEPS else 0


def distil(
    student: ModelProto,
    teacher: ModelProto,
    tail: ModelProto,
    inputs: Sequence[Tensor],
    *,
    steps: int,
    seed: int,
    threads: int = 1,
) -> ModelProto:
    """Train the weights of a stand-in.

    Args:
        student: float; starts near the original.
        teacher: the original, with the same input and output.
        tail: what follows, from their output to logits.
        inputs: each (1, …); frames, which are uint8, are shown mirrored as well.
        steps: of BATCH inputs each.
        seed: of the order of the inputs.
        threads: for torch.

    Returns:
        The stand-in with other weights, or as it was where these are not better.

    Raises:
        UnknownOperatorError: torch cannot run a graph.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        return _train(student, teacher, tail, inputs, steps, seed)
    finally:
        torch.set_num_threads(before)


def _train(
    student: ModelProto, teacher: ModelProto, tail: ModelProto, inputs: Sequence[Tensor], steps: int, seed: int
) -> ModelProto:
    held = list(inputs[::HELD_BACK])
    shown = [value for place, value in enumerate(inputs) if place % HELD_BACK]
    if shown[0].dtype == np.uint8:
        shown += [np.ascontiguousarray(value[:, :, ::-1]) for value in shown]
    wanted, held_wanted = _run(teacher, shown), _run(teacher, held)
    metric = _metric(tail, np.concatenate(wanted[:: max(1, len(wanted) // 128)]), seed)
    graph = TorchGraph(student)
    weights = graph.trainable(_weights(student))
    optimizer = torch.optim.Adam(weights.values(), lr=RATE, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / WARM_UP) * (1 - step / steps)
    )
    for places in _batches(len(shown), steps, seed):
        made = graph(torch.from_numpy(np.concatenate([shown[place] for place in places])))
        error = _rows(made - torch.from_numpy(np.concatenate([wanted[place] for place in places])))
        loss = ((error @ metric) * error).sum(dim=1).mean()
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
    trained = copy_of(student)
    for tensor in trained.graph.initializer:
        if tensor.name in weights:
            tensor.CopyFrom(constant(tensor.name, weights[tensor.name].detach().numpy()))
    losses = [_lost(model, held, held_wanted, metric) for model in (student, trained)]
    return trained if losses[1] < losses[0] else student


def _weights(model: ModelProto) -> list[str]:
    """What training may change: weights and biases of layers, where no other node reads them."""
    index = Index(model)
    found: list[str] = []
    for node in index.nodes:
        if node.op_type in LAYERS:
            found += [name for name in node.input[1:] if name in index.constants]
        elif node.op_type == "Add":
            made = [index.producer.get(name) for name in node.input]
            if any(maker is not None and maker.op_type == "MatMul" for maker in made):
                found += [name for name in node.input if name in index.constants]
    return [name for name in dict.fromkeys(found) if len(index.consumers[name]) == 1]


def _metric(tail: ModelProto, features: NDArray[np.float32], seed: int) -> torch.Tensor:
    """What an error in a channel costs, with each other channel: (channels, channels); all of the features: 1."""
    graph = TorchGraph(tail)
    generator = torch.Generator().manual_seed(seed)
    total: torch.Tensor | float = 0.0
    for start in range(0, len(features), BATCH):
        given = torch.from_numpy(features[start : start + BATCH].copy()).requires_grad_()
        logits = torch.log_softmax(graph(given), dim=1)
        drawn = torch.multinomial(logits.detach().exp(), 1, generator=generator)
        (gradient,) = torch.autograd.grad(logits.gather(1, drawn).sum(), given)
        rows = _rows(gradient)
        total = total + rows.T @ rows
    covariance = torch.cov(_rows(torch.from_numpy(features)).T)
    assert isinstance(total, torch.Tensor), "there are features"
    by_answer = total / torch.clamp(torch.trace(total @ covariance), min=1e-30)
    by_size = torch.eye(len(covariance)) / torch.clamp(torch.trace(covariance), min=1e-30)
    return ANSWER_RATIO * by_answer + (1 - ANSWER_RATIO) * by_size


def _rows(values: torch.Tensor) -> torch.Tensor:
    """Values by place: (places, channels)."""
    last = values.movedim(1, -1) if values.ndim == 4 else values
    return last.reshape(-1, last.shape[-1])


def _batches(count: int, steps: int, seed: int) -> Iterator[list[int]]:
    generator = np.random.default_rng(seed)
    order: list[int] = []
    for _ in range(steps):
        if len(order) < BATCH:
            order += generator.permutation(count).tolist()
        yield order[:BATCH]
        order = order[BATCH:]


def _run(model: ModelProto, inputs: Sequence[Tensor]) -> list[NDArray[np.float32]]:
    session = ort.InferenceSession(model.SerializeToString(), session_options(1))
    name = session.get_inputs()[0].name
    return [session.run(None, {name: value})[0] for value in inputs]


def _lost(
    model: ModelProto, inputs: Sequence[Tensor], wanted: Sequence[NDArray[np.float32]], metric: torch.Tensor
) -> float:
    made = zip(_run(model, inputs), wanted, strict=True)
    error = torch.cat([_rows(torch.from_numpy(left - right)) for left, right in made])
    return float(((error @ metric) * error).sum(dim=1).mean())


__all__ = ["UnknownOperatorError", "distil", "steps_for"]
