"""Segments run by onnxruntime on the CPU, with options that suit a small board."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnxruntime as ort

from runtime.datatypes import Tensor
from runtime.errors import BundleError
from runtime.manifest import Bundle


def session_options(threads: int) -> Any:
    """Options for a board: no spinning between frames, one thread unless asked, full optimization."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    # Spinning workers burn half a core at 10 Hz to save microseconds.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return options


class OnnxSegment:
    """One ONNX file with one input and one output."""

    MOST_OUTPUTS = 1

    def __init__(self, bundle: Bundle, file: str, *, threads: int) -> None:
        path = bundle.file(file)
        try:
            self._session = ort.InferenceSession(path, session_options(threads), providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime's own errors share no public base class
            raise BundleError(f"onnxruntime {ort.__version__} cannot load {file}: {_first_line(error)}") from error
        inputs, outputs = self._session.get_inputs(), self._session.get_outputs()
        if len(inputs) != 1 or not 1 <= len(outputs) <= self.MOST_OUTPUTS:
            raise BundleError(
                f"{file} has {len(inputs)} inputs and {len(outputs)} outputs; "
                "a segment has one of each, and an exit head may have a second output"
            )
        self._file = file
        self._input: str = inputs[0].name
        self._outputs: list[str] = [output.name for output in outputs]

    def run(self, batch: Tensor) -> Tensor:
        """Run the graph on (batch, …).

        Raises:
            BundleError: the graph does not take such a tensor.
        """
        return self._all(batch)[0]

    def _all(self, batch: Tensor) -> Sequence[Tensor]:
        try:
            return self._session.run(self._outputs, {self._input: np.ascontiguousarray(batch)})  # type: ignore[no-any-return]
        except Exception as error:  # as above
            raise BundleError(f"{self._file} does not run: {_first_line(error)}") from error


class OnnxHead(OnnxSegment):
    """An exit head: logits, and a distance where the head has a guard."""

    MOST_OUTPUTS = 2

    def ask(self, batch: Tensor) -> tuple[Tensor, Tensor | None]:
        """Logits (batch, classes) and distance (batch,); errors as in `run`."""
        logits, *rest = self._all(batch)
        return logits, rest[0] if rest else None


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
