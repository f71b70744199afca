"""What a bundle says about the gate before inference: fitted by `export.gate_fit`, kept in the manifest."""

from __future__ import annotations

from typing import Annotated

import msgspec

MAX_AGE_MS = 2000
KEPT = 0.95


class GateSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The change up to which an answer may be repeated, and what that was shown to keep."""

    threshold: Annotated[float, msgspec.Meta(ge=0, le=255)] | None  # None: never; see `note`
    kept: Annotated[float, msgspec.Meta(gt=0, lt=1)] = KEPT  # the promise: mean F1 over all frames, at 95 % confidence
    max_age_ms: Annotated[int, msgspec.Meta(ge=1)] = MAX_AGE_MS  # of a repeated answer, while fitting
    fitted_on: int = 0  # consecutive frames
    repeated: float | None = None  # share of those frames answered by repetition
    agreement: float | None = None  # mean F1 over those frames
    judged_on: int = 0  # held-back consecutive frames
    judged_repeated: float | None = None
    judged_agreement: float | None = None
    judged_agreement_low: float | None = None  # 95 % lower bound
    note: str | None = None  # why it never repeats, where it does not
