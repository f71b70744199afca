"""Exit decisions: whether what an exit says may stand as the answer. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from runtime.datatypes import ExitOutput
from runtime.errors import ConfigError
from runtime.manifest import Bundle, ExitSpec, OperatingPoint


@dataclass(frozen=True, slots=True)
class ExitPolicy:
    """What is in force: exit cut → least confidence, and greatest distance. An exit without threshold never answers."""

    thresholds: Mapping[int, float]
    limits: Mapping[int, float] = field(default_factory=dict)  # an exit that is not listed has no guard
    agreements: Mapping[int, float] = field(default_factory=dict)  # what each early exit's threshold was chosen to keep

    @staticmethod
    def of(bundle: Bundle, *, early: bool = True, agreement: float | None = None) -> ExitPolicy:
        """The bundle's thresholds for `agreement`, or for the one it was exported with.

        With `early` false only the model's own exit answers.

        Raises:
            ConfigError: the bundle has no thresholds for `agreement`.
        """
        *exits, last = bundle.manifest.exits
        points = {spec.cut: _point(spec, agreement) for spec in exits}
        listed = {cut: point.threshold for cut, point in points.items() if point.threshold is not None and early}
        limits = {spec.cut: spec.distance_limit for spec in exits if spec.distance_limit is not None}
        return ExitPolicy({**listed, last.cut: 0.0}, limits, {cut: point.agreement for cut, point in points.items()})

    def may_answer(self, exit_cut: int) -> bool:
        """Whether this exit answers at all, given confidence enough."""
        return exit_cut in self.thresholds

    def answers(self, output: ExitOutput) -> bool:
        """Whether this exit is confident enough to answer, on a frame like those it was made for."""
        return self._sure(output) and self._known(output)

    def withholds(self, output: ExitOutput) -> bool:
        """Whether only the guard keeps this exit from answering: sure, on a frame unlike those it was made for."""
        return self._sure(output) and not self._known(output)

    def _sure(self, output: ExitOutput) -> bool:
        threshold = self.thresholds.get(output.exit)
        return threshold is not None and output.confidence >= threshold and not output.partial

    def _known(self, output: ExitOutput) -> bool:
        limit = self.limits.get(output.exit)
        # A distance that is no number is within no limit.
        return limit is None or (output.distance is not None and output.distance <= limit)


def _point(spec: ExitSpec, agreement: float | None) -> OperatingPoint:
    own = OperatingPoint(agreement=spec.agreement, threshold=spec.threshold)
    if agreement is None:
        return own
    table = spec.points or (own,)
    found = next((point for point in table if point.agreement == agreement), None)
    if found is None:
        known = ", ".join(f"{point.agreement:g}" for point in table)
        raise ConfigError(
            f"agreement: the bundle has no thresholds for {agreement:g}; choose one of {known}, "
            f"or export with --agreement {agreement:g}"
        )
    return found
