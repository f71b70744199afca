"""How one frame is treated on a device: what runs, with which thresholds, and what goes up how."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from runtime import cascade
from runtime.cascade import Tier
from runtime.datatypes import Features
from runtime.manifest import Bundle
from runtime.plan_rates import Way
from runtime.policy import ExitPolicy


@dataclass(frozen=True, slots=True)
class Course:
    """How one frame is treated."""

    tier: Tier  # what runs here
    policy: ExitPolicy
    variant: int  # of the first segment, here
    sent_variant: int  # of the features that go up: 0 for the frame itself
    promised: Bundle  # as nodes see what goes up
    agreements: Mapping[int, float]  # what early exits keep, behind `promised`
    way: Way | None = None  # None: as the uplink was made
    local: str | None = None  # why nothing goes up, in a word or a few
    whole: bool = False  # whether the frame itself goes up, before anything has run here
    only: bool = False  # whether `way` holds for this frame alone, to learn something

    @property
    def copy(self) -> bool:
        """Whether it is of a frame that has an answer of its own, and goes up to learn something of the link."""
        return self.only and self.local is not None

    def agreement(self, cut: int) -> float | None:
        """What an exit was fitted to keep; for the model's own what was measured, as nothing was fitted there."""
        spec = self.promised.exit_at(cut)
        if spec is None or spec.file is not None:
            return self.agreements.get(cut)
        return spec.agreement if spec.measured is None else spec.measured.agreement


def tried(tier: Tier, variant: int) -> dict[str, float]:
    """What the stages of a tier take on this machine: each runs, and no exit is sure of anything."""
    spec = tier.bundle.manifest.cuts[0]
    never = ExitPolicy(dict.fromkeys(tier.heads, 2.0))
    frame = Features(0, np.zeros((1, *spec.shape), spec.dtype))
    for _ in range(2):  # the first time still warms caches
        timings = cascade.run([frame], tier, never)[0].timings
    if variant:
        timings[f"segment0.v{variant}"] = timings.pop("segment0")
    return timings
