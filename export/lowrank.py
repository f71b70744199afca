"""Smaller stand-ins for a float graph that make what it makes: nested principal components of its hidden channels.

What is made smaller is always a set of channels that one layer makes and one reads (`export.hidden`). Of channels with
something bent in between, such as the ReLU6 of an inverted residual, the most telling ones are kept, in the order in
which greedy selection finds them. Of channels with nothing in between, and of the outputs of single layers, the
principal components are kept, which is the activation-aware SVD of the weights (docs/variants.md). Either order is
nested: the channels of a smaller stand-in are the first of a larger one's. The layer that reads what is left is fitted
again, by least squares, to what the original makes of the same frames; one layer after the other from the input on, so
that each takes back the errors of those before it. No labels, no gradients.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray
from onnx import ModelProto, TensorProto, helper

from export.components import Matrix, Moments, principal_basis, principal_order
from export.graph import Index, Shape, copy_of, extract
from export.hidden import Hidden, channel_cost, find_hidden, narrow, rewrite, single
from export.layers import (
    VALUE_WEIGHT,
    Layer,
    bias_of,
    cost,
    layer_of,
    patches,
    places_of,
    rows,
    shapes_of,
    split,
    write_bias,
    write_weight,
)
from runtime.datatypes import Tensor
from runtime.segment_onnx import session_options

MULTIPLE = 16  # of channels: onnxruntime's int8 depthwise convolution is up to four times slower on others
RIDGE = 1e-6  # of the mean variance of what is read
ROWS_PER_INPUT = 64  # places that are looked at, over all frames, for each value that a layer reads at one place
LEAST_ROWS = 128  # in one frame
PROBED = 24  # inputs on which it is measured what the answer loses, and as many that it is fitted on
MOST = 4608  # values that a layer reads at one place; one that reads more keeps its weights


@dataclass(frozen=True, slots=True)
class Unit:
    """One set of channels that may be made fewer."""

    hidden: Hidden  # of a single layer: the channels it makes, with itself as maker and reader
    order: NDArray[np.int64] | None  # (width,): what is kept first comes first; None: by `basis`
    basis: Matrix | None  # (width, width): times what the maker makes, gives the principal components, alike in size
    errors: Matrix  # (width + 1,): what is lost with the first w only, as a share of the target's variance
    costs: Matrix  # (width + 1,): as `layers.cost` has it


@dataclass(frozen=True, slots=True)
class Analysis:
    """A float graph, what of it may be made smaller, and what it makes of some inputs."""

    model: ModelProto
    units: tuple[Unit, ...]  # in the order of their readers
    cost: float  # of the whole graph
    inputs: tuple[Tensor, ...]
    targets: Mapping[str, Sequence[NDArray[np.float32]]]  # by reader: a target's rows at the places looked at, by input
    places: Mapping[str, Sequence[NDArray[np.int64]]]


def decompose(
    model: ModelProto,
    inputs: Sequence[Tensor],
    ratio: float,
    *,
    tail: ModelProto | None = None,
    multiple: int = MULTIPLE,
    seed: int = 0,
) -> ModelProto:
    """A stand-in for a float graph with one input and one output, fitted on what the graph makes of some inputs.

    Args:
        model: float; maps channels first; its batch may be open.
        inputs: of the graph, each (1, …).
        ratio: the share of the graph's cost (`layers.cost`) that is to be left, as near as its widths allow.
        tail: what follows, from the graph's output to logits; given, channels are weighed by what the answer loses.
        multiple: widths are multiples of this.
        seed: of the places in a frame that are looked at.

    Returns:
        A graph with the same input and output; the same graph where nothing can be made smaller.
    """
    analysis = analyse(model, inputs, tail=tail, multiple=multiple, seed=seed)
    return stand_in(analysis, widths(analysis, ratio, multiple=multiple))


def analyse(
    model: ModelProto,
    inputs: Sequence[Tensor],
    *,
    tail: ModelProto | None = None,
    multiple: int = MULTIPLE,
    seed: int = 0,
) -> Analysis:
    """Find what may be made smaller, and which of its channels tell most, from what the graph makes of `inputs`."""
    shapes, index = shapes_of(model), Index(model)
    layers = _layers(index)
    found = find_hidden(model, shapes)
    taken = {name for hidden in found for name in (hidden.maker, hidden.reader)}
    found += [single(layer, index, shapes) for name, layer in layers.items() if name not in taken]
    turn = {node.name: position for position, node in enumerate(index.nodes)}
    found.sort(key=lambda hidden: turn[hidden.reader])
    channels = {hidden.reader: Moments() for hidden in found}
    spread = {hidden.reader: Moments() for hidden in found}
    targets: dict[str, list[NDArray[np.float32]]] = {hidden.reader: [] for hidden in found}
    places: dict[str, list[NDArray[np.int64]]] = {hidden.reader: [] for hidden in found}
    watched = [name for hidden in found for name in (hidden.tensor, hidden.target)]
    for number, values in enumerate(_watch(model, watched, inputs)):
        for hidden in found:
            layer = layers[hidden.reader]
            made, read = values[hidden.target], values[hidden.tensor]
            looked = _places(made, layer, len(inputs), [seed, number])
            places[hidden.reader].append(looked)
            targets[hidden.reader].append(rows(made, layer.node, looked))
            spread[hidden.reader].add(targets[hidden.reader][-1])
            looked = _places(read, layer, len(inputs), [seed, number])
            channels[hidden.reader].add(rows(read, layer.node, looked))
    units = []
    for hidden in found:
        layer = layers[hidden.reader]
        variance = max(float(np.trace(spread[hidden.reader].covariance()[1])), 1e-30)
        units.append(_unit(model, hidden, layer, channels[hidden.reader].covariance()[1], variance, shapes))
    total = sum(sum(cost(node, shapes)) for node in index.nodes)
    analysis = Analysis(model, tuple(units), total, tuple(inputs), targets, places)
    return analysis if tail is None else replace(analysis, units=_weighed(analysis, tail, multiple))


def widths(analysis: Analysis, ratio: float, *, multiple: int = MULTIPLE) -> dict[str, int]:
    """How many channels to keep of each unit (by its reader): least is lost for the cost that is saved."""
    steps: list[tuple[float, int, int, float]] = []
    for number, unit in enumerate(analysis.units):
        last = unit.hidden.width
        for width in _hull(unit, multiple):
            saved = float(unit.costs[last] - unit.costs[width])
            steps.append((float(unit.errors[width] - unit.errors[last]) / saved, number, width, saved))
            last = width
    chosen = {unit.hidden.reader: unit.hidden.width for unit in analysis.units}
    left, limit = analysis.cost, ratio * analysis.cost
    taken: list[tuple[str, int, int, float]] = []
    for _, number, width, saved in sorted(steps):
        if left <= limit:
            break
        reader = analysis.units[number].hidden.reader
        taken.append((reader, chosen[reader], width, saved))
        chosen[reader] = width
        left -= saved
    # The last step may have saved more than was asked for: what others lost most for is given back.
    for reader, before, width, saved in reversed(taken):
        if chosen[reader] == width and left + saved <= limit:
            chosen[reader] = before
            left += saved
    return chosen


def stand_in(analysis: Analysis, chosen: Mapping[str, int]) -> ModelProto:
    """The graph with the first channels of each unit only, and every layer behind them fitted again."""
    model = copy_of(analysis.model)
    drifted = False
    for unit in analysis.units:
        width = chosen[unit.hidden.reader]
        drifted = drifted or width < unit.hidden.width
        if drifted:
            _refit(model, _reduce(model, unit, width), analysis)
    return extract(model, list(model.graph.input), list(model.graph.output), model.graph.name)


def _weighed(analysis: Analysis, tail: ModelProto, multiple: int) -> tuple[Unit, ...]:
    """The units with their errors in nats of the answer: each is made smaller alone, and the divergence measured.

    A small error moves the logits in proportion, and the divergence grows with the square of that, as the variance
    that is lost does: one measurement scales the whole curve.
    """
    # What the layers behind take back counts, so all of them are fitted again, and others judge where there are others.
    few = replace(analysis, inputs=analysis.inputs[:PROBED])
    judges = analysis.inputs[PROBED : 2 * PROBED] or few.inputs
    original = _answers(analysis.model, tail, judges)
    whole = {unit.hidden.reader: unit.hidden.width for unit in analysis.units}
    units = []
    for unit in analysis.units:
        hull = _hull(unit, multiple)
        width = min(hull, key=lambda width: abs(width - unit.hidden.width / 2), default=None)
        if width is None or unit.errors[width] <= 0:
            units.append(unit)
            continue
        said = _answers(stand_in(few, {**whole, unit.hidden.reader: width}), tail, judges)
        nats = float((np.exp(original) * (original - said)).sum(axis=1).mean())
        units.append(replace(unit, errors=unit.errors * max(nats, 1e-9) / unit.errors[width]))
    return tuple(units)


def _answers(model: ModelProto, tail: ModelProto, inputs: Sequence[Tensor]) -> Matrix:
    """The log-probabilities that follow from a graph's output: (inputs, classes)."""
    (made,), (read,) = model.graph.output, tail.graph.input
    session = ort.InferenceSession(tail.SerializeToString(), session_options(1))
    logits = np.concatenate(
        [session.run(None, {read.name: values[made.name]})[0] for values in _watch(model, [made.name], inputs)]
    ).astype(np.float64)
    logits -= logits.max(axis=1, keepdims=True)
    said: Matrix = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    return said


def _unit(
    model: ModelProto, hidden: Hidden, layer: Layer, covariance: Matrix, variance: float, shapes: Mapping[str, Shape]
) -> Unit:
    width = hidden.width
    costs = np.arange(width + 1, dtype=np.float64) * channel_cost(model, hidden, shapes)
    if hidden.maker == hidden.reader:
        basis, errors = principal_basis(covariance, np.eye(width))
        grows, stays = cost(layer.node, shapes)
        written = VALUE_WEIGHT * float(np.prod(shapes[layer.node.output[0]]))
        costs = costs + stays + written
        costs[width] = grows + stays
        return Unit(hidden, None, basis, errors / variance, costs)
    # One row for each output and place of the kernel: what a channel adds at another place is another value.
    weight = np.moveaxis(layer.weight.astype(np.float64), 1, -1).reshape(-1, width)
    if hidden.between:
        order, errors = principal_order(covariance, weight)
        return Unit(hidden, order, None, errors / variance, costs)
    basis, errors = principal_basis(covariance, weight)
    return Unit(hidden, None, basis, errors / variance, costs)


def _hull(unit: Unit, multiple: int) -> list[int]:
    """The widths below the whole that no mixture of others beats, from the largest down."""
    whole = unit.hidden.width
    points = [
        width
        for width in range(multiple * ((whole - 1) // multiple), 0, -multiple)
        # Of many channels, only steps that are worth their while.
        if unit.costs[width] < unit.costs[whole] and (width <= 2 * multiple or width // multiple % 2 == 0)
    ]
    hull = [whole]
    for width in points:
        while len(hull) > 1 and _slope(unit, hull[-2], hull[-1]) >= _slope(unit, hull[-1], width):
            hull.pop()
        hull.append(width)
    return hull[1:]


def _slope(unit: Unit, left: int, right: int) -> float:
    return float((unit.errors[right] - unit.errors[left]) / (unit.costs[left] - unit.costs[right]))


def _reduce(model: ModelProto, unit: Unit, width: int) -> Hidden:
    """Keep the first channels of a unit. Returns the channels as they are now."""
    hidden = unit.hidden
    if width == hidden.width:
        whole = next(node for node in model.graph.node if node.name == hidden.reader)
        return replace(hidden, tensor=whole.input[0])
    if unit.order is not None:
        narrow(model, hidden, unit.order[:width])
        return replace(hidden, width=width)
    assert unit.basis is not None, "a unit has an order or a basis"
    index = Index(model)
    layers = _layers(index)
    basis: Matrix = unit.basis[:width]
    back = np.linalg.pinv(unit.basis)[:, :width].astype(np.float64)
    if hidden.maker == hidden.reader:
        front = split(model, layers[hidden.reader], basis, back)
        return replace(hidden, maker=front, tensor=front, width=width)
    maker, reader = layers[hidden.maker], layers[hidden.reader]
    bias = bias_of(maker.node, index)
    weight = (basis @ maker.flat).reshape(width, *maker.weight.shape[1:])
    write_weight(model, maker.node, weight, f"{hidden.maker}/components/weight")
    if bias is not None:
        write_bias(model, maker.node, basis @ bias, f"{hidden.maker}/components/bias")
    read = np.moveaxis(np.moveaxis(reader.weight.astype(np.float64), 1, -1) @ back, -1, 1)
    write_weight(model, reader.node, read, f"{hidden.reader}/components/weight")
    return replace(hidden, width=width)


def _refit(model: ModelProto, hidden: Hidden, analysis: Analysis) -> None:
    """Fit a reader to what the original makes, reading what the stand-in makes so far."""
    layer = _layers(Index(model))[hidden.reader]
    if layer.flat.shape[1] > MOST:
        return
    names = [hidden.tensor] if hidden.residual is None else [hidden.tensor, hidden.residual]
    moments = Moments()
    wanted = analysis.targets[hidden.reader]
    for number, values in enumerate(_watch(model, names, analysis.inputs)):
        target, places = wanted[number], analysis.places[hidden.reader][number]
        if hidden.residual is not None:
            target = target - rows(values[hidden.residual], layer.node, places)
        moments.add(np.concatenate([patches(values[hidden.tensor], layer, places), target], axis=1))
    inputs = layer.flat.shape[1]
    mean, both = moments.covariance()
    own = both[:inputs, :inputs]
    own = own + RIDGE * max(float(np.trace(own)) / inputs, 1e-30) * np.eye(inputs)
    weight = np.linalg.solve(own, both[:inputs, inputs:]).T
    bias = mean[inputs:] - weight @ mean[:inputs]
    rewrite(model, hidden, weight.reshape(layer.weight.shape), bias)


def _watch(model: ModelProto, names: Sequence[str], inputs: Sequence[Tensor]) -> Iterator[dict[str, Tensor]]:
    """What a model makes of each input, at the tensors named."""
    unique = list(dict.fromkeys(names))
    if not unique:
        return
    outputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in unique]
    part = extract(model, list(model.graph.input), outputs, "watched")
    session = ort.InferenceSession(part.SerializeToString(), session_options(1))
    feed = session.get_inputs()[0].name
    for value in inputs:
        yield dict(zip(unique, session.run(unique, {feed: value}), strict=True))


def _layers(index: Index) -> dict[str, Layer]:
    return {node.name: layer for node in index.nodes if (layer := layer_of(node, index)) is not None}


def _places(made: Tensor, layer: Layer, frames: int, seed: Sequence[int]) -> NDArray[np.int64]:
    """Which places of one frame are looked at: the same for the same seed and number of places."""
    count = places_of(made, layer.node)
    wanted = max(LEAST_ROWS, ROWS_PER_INPUT * layer.flat.shape[1] // frames)
    if wanted >= count:
        return np.arange(count)
    return np.sort(np.random.default_rng(seed).choice(count, wanted, replace=False))
