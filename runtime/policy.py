"""Exit decisions: what an exit's logits mean, and whether that answer may stand. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from runtime.datatypes import ExitOutput, Logits
from runtime.errors import BundleError
from runtime.manifest import Bundle, ExitSpec

TOP = 5


def classify(logits: Logits, spec: ExitSpec) -> ExitOutput:
    """Read one frame's logits (classes,) as probabilities after the exit's temperature.

    Raises:
        BundleError: a logit is not finite: the graph does not work on this machine.
    """
    if not np.isfinite(logits).all():
        raise BundleError(f"exit {spec.cut} gave a logit that is no number; verify the bundle on this machine")
    scaled = logits.astype(np.float32) / np.float32(spec.temperature)
    scores = np.exp(scaled - scaled.max())
    scores /= scores.sum()
    count = min(TOP, scores.size)
    # By logits, as distinct logits may round to one score; ties fall to the lower index.
    least = np.partition(logits, logits.size - count)[logits.size - count]
    among = np.flatnonzero(logits >= least)
    best = among[np.argsort(-logits[among], kind="stable")[:count]]
    topk = tuple((int(index), float(scores[index])) for index in best)
    return ExitOutput(exit=spec.cut, label_index=topk[0][0], confidence=topk[0][1], topk=topk)


@dataclass(frozen=True, slots=True)
class ExitPolicy:
    """The thresholds in force: exit cut → least confidence. An exit that is not listed does not answer."""

    thresholds: Mapping[int, float]

    @staticmethod
    def of(bundle: Bundle, *, early: bool = True) -> ExitPolicy:
        """The bundle's own thresholds; with `early` false only the model's own exit answers."""
        last = bundle.manifest.exits[-1].cut
        listed = {spec.cut: spec.threshold for spec in bundle.manifest.exits if spec.threshold is not None and early}
        return ExitPolicy({**listed, last: 0.0})

    def may_answer(self, exit_cut: int) -> bool:
        """Whether this exit answers at all, given confidence enough."""
        return exit_cut in self.thresholds

    def answers(self, output: ExitOutput) -> bool:
        """Whether this exit is confident enough to answer."""
        threshold = self.thresholds.get(output.exit)
        return threshold is not None and output.confidence >= threshold
