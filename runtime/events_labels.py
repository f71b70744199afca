"""Follows the label of a camera's pictures: one event as long as one label holds. Pure.

Scores are smoothed over answers, label by label; an event begins when one label has led for `confirm_frames` answers
in a row, and ends when another has. Degraded answers come from a weaker exit and change nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from runtime.events import MOST, Event, Ids, Seen, Settings, Untold

GAIN = 0.4  # share of the latest answer in a smoothed score
LEAST_SCORE = 1e-3  # smoothed scores below it are forgotten
CHANGED = 0.1  # of the score: worth an update


@dataclass(slots=True)
class _Held:
    """The label that holds."""

    id: str
    label: str
    top_score: float
    first_ns: int
    last_ns: int  # an answer said it
    told_ns: int
    told_score: float


class Labels:
    """The label before one camera."""

    def __init__(self, camera: str, ids: Ids, settings: Settings, untold: Untold) -> None:
        self._camera = camera
        self._ids = ids
        self._settings = settings
        self._untold = untold
        self._scores: dict[str, float] = {}  # smoothed, by label
        self._leader = ""
        self._led = 0  # answers in a row
        self._led_ns = 0  # since
        self._top_score = 0.0  # of the leader, since it leads
        self._held: _Held | None = None
        self._frame = 0

    def follow(self, seen: Seen) -> list[Event]:
        """Take the answer of a later frame than any before. Returns what there is to tell."""
        self._frame = seen.frame
        if not seen.tells or not seen.found:
            self._untold("degraded" if not seen.tells else "no label")
            return []
        given = {one.label: one.score for one in seen.found}
        faded = {label: score * (1 - GAIN) for label, score in self._scores.items()}
        for label, score in given.items():
            faded[label] = faded.get(label, 0.0) + GAIN * score
        ranked = sorted(faded, key=lambda label: (-faded[label], label))
        self._scores = {label: faded[label] for label in ranked[:MOST] if faded[label] > LEAST_SCORE}
        if ranked[0] == self._leader:
            self._led += 1
        else:
            if self._led and (self._held is None or self._held.label != self._leader):
                self._untold("unconfirmed")
            self._leader, self._led, self._led_ns, self._top_score = ranked[0], 1, seen.captured_ns, 0.0
        self._top_score = max(self._top_score, given.get(self._leader, 0.0))
        if self._held is not None and self._held.label in given:
            self._held.last_ns = seen.captured_ns
            self._held.top_score = max(self._held.top_score, given[self._held.label])
        return self._tell(seen.captured_ns)

    def present(self) -> Mapping[str, str] | None:
        """Id → label of the event that has begun and not ended; None while no answer has told anything yet."""
        return None if self._held is None else {self._held.id: self._held.label}

    def stop(self) -> list[Event]:
        """End the event, as nobody will look any more."""
        held, self._held = self._held, None
        return [] if held is None else [self._event("end", held, "stopping")]

    def _tell(self, now_ns: int) -> list[Event]:
        held = self._held
        if held is not None and held.label == self._leader:
            changed = abs(self._scores.get(held.label, 0.0) - held.told_score) >= CHANGED
            due = now_ns - held.told_ns >= self._settings.update_ms * 1e6
            return [self._event("update", held)] if changed and due else []
        if self._led < self._settings.confirm_frames:
            return []
        events = [] if held is None else [self._event("end", held, "replaced")]
        self._held = _Held(self._ids.next(), self._leader, self._top_score, self._led_ns, now_ns, now_ns, 0.0)
        return [*events, self._event("new", self._held)]

    def _event(
        self,
        kind: Literal["new", "update", "end"],
        held: _Held,
        reason: Literal["replaced", "stopping"] | None = None,
    ) -> Event:
        score = self._scores.get(held.label, 0.0)
        if kind != "end":
            held.told_ns, held.told_score = held.last_ns, score
        return Event(
            id=held.id,
            type=kind,
            camera=self._camera,
            frame=self._frame,
            label=held.label,
            score=round(score, 4),
            top_score=round(held.top_score, 4),
            box=None,
            duration_ms=round((held.last_ns - held.first_ns) / 1e6, 3),
            reason=reason,
        )
