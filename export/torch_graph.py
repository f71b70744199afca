"""Runs an ONNX graph in torch, so that gradients flow through any model whose operators are known here."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from onnx import ModelProto, NodeProto, helper, numpy_helper
from torch import Tensor
from torch.nn import functional

Op = Callable[..., Any]


class UnknownOperatorError(Exception):
    """The graph has an operator, or a use of one, that is not in the table."""


class TorchGraph:
    """A graph with one input and one output.

    Raises:
        UnknownOperatorError: when made, for an operator that is not in the table.
    """

    def __init__(self, model: ModelProto) -> None:
        unknown = sorted({node.op_type for node in model.graph.node} - set(_OPERATORS))
        if unknown:
            raise UnknownOperatorError(f"no gradients through {', '.join(unknown)}")
        self._nodes = list(model.graph.node)
        self._attributes = [_attributes(node) for node in self._nodes]
        self._constants = {
            tensor.name: torch.from_numpy(numpy_helper.to_array(tensor).copy()) for tensor in model.graph.initializer
        }
        self._input, self._output = model.graph.input[0].name, model.graph.output[0].name

    def trainable(self, names: Sequence[str]) -> dict[str, Tensor]:
        """Constants as tensors that gather gradients, by name."""
        for name in names:
            self._constants[name].requires_grad_()
        return {name: self._constants[name] for name in names}

    def __call__(self, features: Tensor) -> Tensor:
        """The output for `features`, as the graph takes them.

        Raises:
            UnknownOperatorError: an operator is used in a way that is not known here.
        """
        values: dict[str, Any] = {**self._constants, self._input: features}
        for node, attributes in zip(self._nodes, self._attributes, strict=True):
            inputs = [values[name] if name else None for name in node.input]
            try:
                made = _OPERATORS[node.op_type](*inputs, **attributes)
            except (TypeError, RuntimeError, ValueError, KeyError, IndexError) as error:
                raise UnknownOperatorError(f"{node.op_type} {node.name}: {error}") from error
            outputs = made if isinstance(made, (tuple, list)) else [made]
            values.update(zip(node.output, outputs, strict=False))
        result: Tensor = values[self._output]
        return result


def _attributes(node: NodeProto) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for attribute in node.attribute:
        value = helper.get_attribute_value(attribute)
        if attribute.type == attribute.TENSOR:
            value = torch.from_numpy(numpy_helper.to_array(value).copy())
        found[attribute.name] = value.decode() if isinstance(value, bytes) else value
    return found


def _ints(value: Any) -> list[int]:
    return [int(entry) for entry in (value.tolist() if isinstance(value, Tensor) else value)]


def _padded(values: Tensor, pads: Sequence[int], fill: float = 0.0) -> Tensor:
    """Pad the last axes; ONNX lists all starts, then all ends, torch pairs from the last axis on."""
    half = len(pads) // 2
    pairs = [pad for axis in reversed(range(half)) for pad in (pads[axis], pads[half + axis])]
    return functional.pad(values, pairs, value=fill) if any(pads) else values


def _conv(
    values: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    strides: Sequence[int] = (1, 1),
    pads: Sequence[int] = (0, 0, 0, 0),
    dilations: Sequence[int] = (1, 1),
    group: int = 1,
    auto_pad: str = "NOTSET",
    **_: Any,
) -> Tensor:
    if auto_pad not in ("NOTSET", "VALID"):
        raise ValueError(f"auto_pad {auto_pad}")
    kind = {3: functional.conv1d, 4: functional.conv2d}[values.ndim]
    return kind(_padded(values, pads), weight, bias, tuple(strides), 0, tuple(dilations), group)


def _gemm(
    left: Tensor,
    right: Tensor,
    bias: Tensor | None = None,
    *,
    alpha: float = 1.0,
    beta: float = 1.0,
    transA: int = 0,  # noqa: N803  the operator's own names
    transB: int = 0,  # noqa: N803
) -> Tensor:
    product = alpha * (left.T if transA else left) @ (right.T if transB else right)
    return product if bias is None else product + beta * bias


def _pool(kind: str) -> Op:
    def run(
        values: Tensor,
        *,
        kernel_shape: Sequence[int],
        strides: Sequence[int] | None = None,
        pads: Sequence[int] = (0, 0, 0, 0),
        ceil_mode: int = 0,
        count_include_pad: int = 0,
        **_: Any,
    ) -> Tensor:
        steps = tuple(strides or (1,) * len(kernel_shape))
        if kind == "max":
            padded = _padded(values, pads, float("-inf"))
            return functional.max_pool2d(padded, tuple(kernel_shape), steps, ceil_mode=bool(ceil_mode))
        if any(pads) and not count_include_pad:
            raise ValueError("an average that leaves padding out")
        return functional.avg_pool2d(_padded(values, pads), tuple(kernel_shape), steps, ceil_mode=bool(ceil_mode))

    return run


def _clip(values: Tensor, low: Tensor | None = None, high: Tensor | None = None, **_: Any) -> Tensor:
    ends = [None if end is None else float(end) for end in (low, high)]
    return values if ends == [None, None] else torch.clamp(values, *ends)


def _reshape(values: Tensor, shape: Tensor, **_: Any) -> Tensor:
    sizes = _ints(shape)
    return values.reshape([values.shape[axis] if size == 0 else size for axis, size in enumerate(sizes)])


def _reduce_mean(values: Tensor, axes: Any = None, *, keepdims: int = 1, **_: Any) -> Tensor:
    return values.mean(dim=_ints(axes) if axes is not None else list(range(values.ndim)), keepdim=bool(keepdims))


def _slice(values: Tensor, starts: Tensor, ends: Tensor, axes: Tensor | None = None, steps: Any = None) -> Tensor:
    picked = _ints(axes) if axes is not None else list(range(len(starts)))
    strides = _ints(steps) if steps is not None else [1] * len(picked)
    for axis, start, end, step in zip(picked, _ints(starts), _ints(ends), strides, strict=True):
        index = torch.arange(values.shape[axis])[slice(start, end, step)] if step > 0 else None
        if index is None:
            raise ValueError("a slice that runs backwards")
        values = values.index_select(axis, index)
    return values


def _split(values: Tensor, sizes: Any = None, *, axis: int = 0, num_outputs: int = 0, **_: Any) -> Sequence[Tensor]:
    if sizes is None:
        return torch.chunk(values, num_outputs, axis)
    return torch.split(values, _ints(sizes), axis)


def _gather(values: Tensor, places: Tensor, *, axis: int = 0) -> Tensor:
    taken = values.index_select(axis, places.reshape(-1) % values.shape[axis])
    axis %= values.ndim
    return taken.reshape(*values.shape[:axis], *places.shape, *values.shape[axis + 1 :])


def _norm(
    values: Tensor, scale: Tensor, bias: Tensor | None = None, *, axis: int = -1, epsilon: float = 1e-5
) -> Tensor:
    return functional.layer_norm(values, values.shape[axis:], scale, bias, epsilon)


def _batch_norm(
    values: Tensor, scale: Tensor, bias: Tensor, mean: Tensor, variance: Tensor, *, epsilon: float = 1e-5, **_: Any
) -> Tensor:
    return functional.batch_norm(values, mean, variance, scale, bias, eps=epsilon)


def _axes(values: Tensor, axes: Any) -> list[int]:
    return sorted((axis % values.ndim for axis in _ints(axes)), reverse=True)


def _squeeze(values: Tensor, axes: Any = None) -> Tensor:
    for axis in _axes(values, axes if axes is not None else [i for i, size in enumerate(values.shape) if size == 1]):
        values = values.squeeze(axis)
    return values


def _unsqueeze(values: Tensor, axes: Any) -> Tensor:
    for axis in sorted(_ints(axes)):
        values = values.unsqueeze(axis)
    return values


_OPERATORS: dict[str, Op] = {
    "Add": torch.add,
    "Asin": torch.asin,
    "AveragePool": _pool("average"),
    "BatchNormalization": _batch_norm,
    "Cast": lambda values, *, to: values.to(torch.from_numpy(np.zeros(0, helper.tensor_dtype_to_np_dtype(to))).dtype),
    "Clip": _clip,
    "Concat": lambda *parts, axis: torch.cat(parts, axis),
    "Constant": lambda *, value: value,
    "Conv": _conv,
    "Div": torch.div,
    "Erf": torch.erf,
    "Exp": torch.exp,
    "Expand": lambda values, shape: values * torch.ones(_ints(shape)),
    "Flatten": lambda values, *, axis=1: values.reshape(int(np.prod(values.shape[:axis])), -1),
    "Gather": _gather,
    "Gelu": lambda values, *, approximate="none": functional.gelu(values, approximate=approximate),
    "Gemm": _gemm,
    "GlobalAveragePool": lambda values: values.mean(dim=tuple(range(2, values.ndim)), keepdim=True),
    "HardSigmoid": lambda values, *, alpha=0.2, beta=0.5: torch.clamp(alpha * values + beta, 0, 1),
    "HardSwish": functional.hardswish,
    "Identity": lambda values: values,
    "LayerNormalization": _norm,
    "LeakyRelu": lambda values, *, alpha=0.01: functional.leaky_relu(values, alpha),
    "MatMul": torch.matmul,
    "MaxPool": _pool("max"),
    "Mul": torch.mul,
    "Neg": torch.neg,
    "Pad": lambda values, pads, fill=None, *, mode="constant": _padded(values, _ints(pads), float(fill or 0)),
    "Pow": torch.pow,
    "ReduceMean": _reduce_mean,
    "Relu": torch.relu,
    "Reshape": _reshape,
    "Sigmoid": torch.sigmoid,
    "Slice": _slice,
    "Softmax": lambda values, *, axis=-1: torch.softmax(values, axis),
    "Split": _split,
    "Sqrt": torch.sqrt,
    "Squeeze": _squeeze,
    "Sub": torch.sub,
    "Tanh": torch.tanh,
    "Transpose": lambda values, *, perm: values.permute(*perm),
    "Unsqueeze": _unsqueeze,
}
