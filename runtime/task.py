"""The task seam: what the numbers of an exit mean, and how an answer is told.

A task is one file here, `task_<name>.py`, one in `export`, and a row in the table of each. Segments, codecs, the
cascade and the wire know nothing of it: they move tensors, and answers that only the task can read.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any, Protocol

import msgspec

from runtime.datatypes import Answer, ExitOutput, Tensor
from runtime.errors import BundleError
from runtime.manifest import Bundle, ExitSpec

TASKS = {
    "classify": "runtime.task_classify:Classify",
    "detect": "runtime.task_detect:Detect",
}


class Task(Protocol):
    """What one bundle's exits say. Made of a bundle; raises BundleError where the bundle does not fit the task."""

    def __init__(self, bundle: Bundle) -> None: ...

    def read(self, output: Tensor, spec: ExitSpec) -> ExitOutput:
        """Read what an exit gave for one frame, (…) without the batch: the last segment's output, or its head's.

        Raises:
            BundleError: there is no sense in it: the graph does not work on this machine.
        """
        ...

    def decode(self, data: msgspec.Raw) -> Answer:
        """Read an answer from a reply, as JSON.

        Raises:
            PacketError: it is no answer that a bundle like this one gives.
        """
        ...

    def key(self, answer: Answer) -> int:
        """What early exits are judged by: two answers with one key say the same, as far as an exit can say it."""
        ...

    def compare(self, said: Answer, wanted: Answer) -> tuple[int, int]:
        """How much of two answers is the same: (same, all). Over many frames, sum(same) / sum(all) is agreement."""
        ...

    def words(self, answer: Answer) -> str:
        """The answer in a word or a few."""
        ...

    def told(self, answer: Answer, height: int, width: int) -> dict[str, Any]:
        """The answer as applications see it, for a frame of `height` and `width` pixels."""
        ...


def open_task(bundle: Bundle) -> Task:
    """The task of a bundle.

    Raises:
        BundleError: this Kinflow does not know the task, or the bundle does not fit it.
    """
    where = TASKS.get(bundle.manifest.task)
    if where is None:
        known = ", ".join(TASKS)
        raise BundleError(
            f"the bundle's task is {bundle.manifest.task!r}, this Kinflow knows {known}; update Kinflow on this machine"
        )
    module, name = where.split(":")
    kind: type[Task] = getattr(import_module(module), name)
    return kind(bundle)
