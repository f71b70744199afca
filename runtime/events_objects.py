"""Follows objects over frames by their boxes: births, updates and ends of events. Pure.

Each object moves on at its own steady speed, kept by an alpha-beta filter (Kalata 1984) on its centre, and takes the
box that it overlaps most where it should be now: greedily by overlap, its own label first, then any label at a higher
overlap. An object is told once it was in `confirm_frames` answers with at most two misses between, so that what
flickers is not; it ends when answers that tell have lacked it for `gone_ms`. Only the time between two such answers
counts: a time without answers, or with degraded ones, makes nothing go.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from runtime.boxes import iou
from runtime.events import MOST, Corners, Event, Ids, Seen, Settings, Sighting, Untold

SAME_LABEL_IOU = 0.1  # people are narrow: from one answer to the next they may move by most of their width
OTHER_LABEL_IOU = 0.6
MISSES = 2  # of an object that is not told yet
GAIN = 0.7  # share of a box's surprise that the position takes, alpha
SPEED_GAIN = 2 * (2 - GAIN) - 4 * (1 - GAIN) ** 0.5  # beta, which Kalata's relation gives for it
COAST_S = 1.0  # an object that is not seen is thought to keep its speed for so long
SCORE_GAIN = 0.3
LABEL_DECAY = 0.8  # of the votes for labels, with every box
LEAST_VOTE = 0.01
MOVED_IOU = 0.8  # overlap with the box told last, below which the object has moved


@dataclass(slots=True)
class _Object:
    """One object that is followed."""

    id: str | None  # None: not told yet
    corners: NDArray[np.float64]  # (4,), smoothed
    speed: NDArray[np.float64]  # (2,) of its centre, pixels a second
    votes: dict[str, float]  # by label
    score: float
    top_score: float
    first_ns: int
    last_ns: int  # it was seen
    hits: int = 1
    misses: int = 0
    away_ns: int = 0  # for so long answers have shown that it is not there
    lacked: bool = False  # by the answer before
    told_ns: int = 0
    told_label: str = ""
    told_box: NDArray[np.float64] = field(default_factory=lambda: np.zeros(4))

    @property
    def label(self) -> str:
        """What most of its boxes said; of two with equal votes the first by name."""
        return min(self.votes, key=lambda label: (-self.votes[label], label))

    def expected(self, now_ns: int) -> NDArray[np.float64]:
        """Where it should be: (4,)."""
        return self.corners + np.tile(self.speed, 2) * min((now_ns - self.last_ns) / 1e9, COAST_S)

    def see(self, sighting: Sighting, corners: NDArray[np.float64], now_ns: int) -> None:
        """Take a box for this object's."""
        away_s = (now_ns - self.last_ns) / 1e9
        expected = self.expected(now_ns)
        surprise = corners - expected
        self.corners = expected + GAIN * surprise
        if away_s > 0:
            self.speed = self.speed + SPEED_GAIN * (surprise[:2] + surprise[2:]) / 2 / away_s
        votes = {label: vote * LABEL_DECAY for label, vote in self.votes.items() if vote * LABEL_DECAY > LEAST_VOTE}
        votes[sighting.label] = votes.get(sighting.label, 0.0) + sighting.score
        self.votes = votes
        self.score += SCORE_GAIN * (sighting.score - self.score)
        self.top_score = max(self.top_score, sighting.score)
        self.last_ns = now_ns
        self.hits += 1
        self.away_ns, self.lacked = 0, False

    def miss(self, gap_ns: int) -> None:
        """An answer that tells was given without it, so long after the one before."""
        self.misses += 1
        self.away_ns += gap_ns if self.lacked else 0
        self.lacked = True


class Objects:
    """The objects before one camera. At most MOST are followed; more are counted as `full`."""

    def __init__(self, camera: str, ids: Ids, settings: Settings, untold: Untold) -> None:
        self._camera = camera
        self._ids = ids
        self._settings = settings
        self._untold = untold
        self._objects: list[_Object] = []  # by age
        self._before_ns = 0  # the answer before
        self._frame = 0
        self._telling = 0  # answers

    def follow(self, seen: Seen) -> list[Event]:
        """Take the answer of a later frame than any before. Returns what there is to tell."""
        gap_ns, self._before_ns, self._frame = seen.captured_ns - self._before_ns, seen.captured_ns, seen.frame
        if seen.found is None:
            self._untold("no boxes")
        if not seen.tells:
            self._untold("degraded")
        if seen.found is None or not seen.tells:
            for thing in self._objects:
                thing.lacked = False
        if seen.found is None:
            return []
        self._telling += seen.tells
        boxes = np.array([found.box for found in seen.found], np.float64).reshape(-1, 4)
        pairs = self._pairs(seen, boxes)
        events: list[Event] = []
        for place, thing in enumerate(self._objects):
            if place in pairs:
                thing.see(seen.found[pairs[place]], boxes[pairs[place]], seen.captured_ns)
                events.extend(self._tell(thing, seen.captured_ns))
            elif seen.tells:
                thing.miss(gap_ns)
                if thing.id is not None and thing.away_ns >= self._settings.gone_ms * 1e6:
                    events.append(self._event("end", thing, "gone"))
        kept = [thing for thing in self._objects if not self._over(thing)]
        for _ in range(sum(thing.id is None for thing in self._objects) - sum(thing.id is None for thing in kept)):
            self._untold("unconfirmed")
        self._objects = kept
        taken = set(pairs.values())
        for row, found in enumerate(seen.found):
            if row not in taken:
                events.extend(self._begin(found, boxes[row], seen.captured_ns))
        return events

    def present(self) -> Mapping[str, str] | None:
        """Id → label of all events that have begun and not ended; None while too few answers have told anything."""
        present = {thing.id: thing.told_label for thing in self._objects if thing.id is not None}
        # Before so many answers nothing can have been told, even if it is there.
        return present if present or self._telling >= self._settings.confirm_frames else None

    def stop(self) -> list[Event]:
        """End all events, as nobody will look any more."""
        events = [self._event("end", thing, "stopping") for thing in self._objects if thing.id is not None]
        self._objects = []
        self._telling = 0  # answers
        return events

    def _pairs(self, seen: Seen, boxes: NDArray[np.float64]) -> dict[int, int]:
        """Place of an object → row of its box."""
        found = seen.found or ()
        if not self._objects or not found:
            return {}
        overlaps = iou(np.stack([thing.expected(seen.captured_ns) for thing in self._objects]), boxes)
        same = np.array([[thing.label == one.label for one in found] for thing in self._objects])
        pairs: dict[int, int] = {}
        for allowed in (same & (overlaps >= SAME_LABEL_IOU), ~same & (overlaps >= OTHER_LABEL_IOU)):
            places, rows = np.nonzero(allowed)
            for choice in np.argsort(-overlaps[places, rows], kind="stable"):
                place, row = int(places[choice]), int(rows[choice])
                if place not in pairs and row not in pairs.values():
                    pairs[place] = row
        return pairs

    def _begin(self, found: Sighting, corners: NDArray[np.float64], now_ns: int) -> list[Event]:
        if len(self._objects) >= MOST:
            self._untold("full")
            return []
        votes = {found.label: found.score}
        thing = _Object(None, corners, np.zeros(2), votes, found.score, found.score, now_ns, now_ns)
        self._objects.append(thing)
        return self._tell(thing, now_ns)

    def _over(self, thing: _Object) -> bool:
        if thing.id is None:
            return thing.misses > MISSES
        return thing.away_ns >= self._settings.gone_ms * 1e6

    def _tell(self, thing: _Object, now_ns: int) -> list[Event]:
        """What there is to tell of an object that was just seen."""
        if thing.id is None:
            if thing.hits < self._settings.confirm_frames:
                return []
            thing.id = self._ids.next()
            return [self._event("new", thing)]
        moved = iou(thing.told_box[np.newaxis], thing.corners[np.newaxis])[0, 0] < MOVED_IOU
        due = now_ns - thing.told_ns >= self._settings.update_ms * 1e6
        return [self._event("update", thing)] if thing.label != thing.told_label or (moved and due) else []

    def _event(
        self,
        kind: Literal["new", "update", "end"],
        thing: _Object,
        reason: Literal["gone", "stopping"] | None = None,
    ) -> Event:
        thing.told_ns, thing.told_label, thing.told_box = thing.last_ns, thing.label, thing.corners
        x1, y1, x2, y2 = (round(float(value), 1) for value in thing.corners)
        box: Corners = (x1, y1, x2, y2)
        return Event(
            id=str(thing.id),
            type=kind,
            camera=self._camera,
            frame=self._frame,
            label=thing.label,
            score=round(thing.score, 4),
            top_score=round(thing.top_score, 4),
            box=box,
            duration_ms=round((thing.last_ns - thing.first_ns) / 1e6, 3),
            reason=reason,
        )
