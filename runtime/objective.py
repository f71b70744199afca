"""What the operator wants: limits on two of age, bytes and agreement, and one of the three to make the best of."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

DAY_S = 86_400
Amount = Annotated[float, msgspec.Meta(gt=0, le=1e15)]


class Objective(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The table `[objective]` of a device's settings; given, the device plans (docs/planner.md)."""

    optimize: Literal["agreement", "bytes", "latency"] = "agreement"
    latency_p95_ms: Amount | None = None  # grab to answer; never more than budget_ms
    bytes_per_second: Amount | None = None  # that go up for answers, all of MQTT counted
    bytes_per_day: Amount | None = None
    min_agreement: Annotated[float, msgspec.Meta(gt=0, le=1)] | None = None  # with the whole float model, predicted
    deepest_segment: Annotated[int, msgspec.Meta(ge=0)] | None = None  # that may run on the device; default: the last
    warm_celsius: Annotated[float, msgspec.Meta(gt=0, le=150)] = 75.0  # from here on less is computed
    hot_celsius: Annotated[float, msgspec.Meta(gt=0, le=150)] = 82.0  # from here on hardly anything

    @property
    def max_bytes_per_second(self) -> float | None:
        """The limit on bytes, whichever way it was said; None: there is none."""
        return self.bytes_per_second if self.bytes_per_day is None else self.bytes_per_day / DAY_S


def problem(objective: Objective) -> str | None:
    """What is wrong with an objective, as path and sentence; None: nothing."""
    limits = {
        "latency": objective.latency_p95_ms,
        "bytes": objective.max_bytes_per_second,
        "agreement": objective.min_agreement,
    }
    if objective.bytes_per_second is not None and objective.bytes_per_day is not None:
        return "objective.bytes_per_day: bytes_per_second says it already; leave one of them out"
    if limits[objective.optimize] is not None:
        return f"objective.optimize: {objective.optimize} has a limit already; optimize one that has none"
    if objective.hot_celsius < objective.warm_celsius:
        return "objective.hot_celsius: it is below warm_celsius; give it the higher of the two"
    return None
