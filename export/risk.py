"""Thresholds that keep a promise: of the frames answered at an exit or before it, the wanted share agrees. Pure.

Learn then Test (Angelopoulos, Bates, Candès, Jordan, Lei 2021): the hypothesis "some exit breaks the promise" is tested
for whole vectors of thresholds, in an order fixed beforehand, and the first that cannot be refuted ends the sequence
(fixed-sequence testing). The order comes from other frames, the pilot's, as in Pareto Testing (Laufer-Goldenberg,
Fisch, Barzilay, Jaakkola 2022), so nothing but the tests themselves looks at the tested frames. The p-value of a vector
is the greatest of its exits' exact binomial tails, each over the frames that the cascade answers there or before:
refuted means refuted for every exit at once, and no share of the error is spent on their number. One sequence has all
exits on; the others leave out the first exits, which may never be good enough, for a small share of the error
(Bonferroni). docs/exits.md derives it all.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

CONFIDENCE = 0.95  # with which all promises of one agreement hold together
ALL_ON = 0.8  # share of the allowed error for the sequence with all exits on; the others share the rest
MOST_FRAMES = 100_000  # nobody is told to bring more
STEPS = 40  # of a sequence
STRICTEST = 1 / 16  # nominal risk of its first step, as a share of the allowed; of its last: the allowed
LIKELY = 0.1  # an exit is loosened while the pilot gives it a p-value up to this: what passes by luck is not sought

Thresholds = tuple[float | None, ...]  # by exit; None: it does not answer
Flags = NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Words:
    """What the early exits say of frames, whether or not they would be asked; all arrays are (exits, frames)."""

    confidence: NDArray[np.float64]  # minus infinity where the exit can never answer
    agrees: Flags  # with the whole float model
    within: Flags  # the limit of the exit's guard
    # (frames,): of these, wherever they are answered, the promise allows a share to be wrong; None: of the answered
    owed: Flags | None = None
    share: float = 1.0  # independent frames for every frame: less where neighbours in time resemble each other

    @property
    def exits(self) -> int:
        """How many exits there are."""
        return len(self.confidence)

    @property
    def frames(self) -> int:
        """How many frames they were asked about."""
        return int(self.confidence.shape[1])


def answering(words: Words, thresholds: Thresholds) -> NDArray[np.int64]:
    """For each frame the place of the exit that answers it as the cascade runs, or -1: (frames,)."""
    first = np.full(words.frames, -1, np.int64)
    for place, threshold in enumerate(thresholds):
        if threshold is not None:
            sure = (words.confidence[place] >= threshold) & words.within[place]
            first[(first < 0) & sure] = place
    return first


def p_value(errors: int, count: int, risk: float) -> float:
    """The chance of so few errors or fewer among `count` answers, each wrong with chance `risk`."""
    if errors >= count or risk <= 0:
        return 1.0
    if risk >= 1:
        return 0.0
    log_odds, log_none = math.log(risk) - math.log1p(-risk), count * math.log1p(-risk)
    logs = [
        math.lgamma(count + 1) - math.lgamma(k + 1) - math.lgamma(count - k + 1) + k * log_odds + log_none
        for k in range(errors + 1)
    ]
    return min(1.0, math.fsum(map(math.exp, logs)))


def answers_needed(agreement: float, confidence: float = CONFIDENCE) -> int | None:
    """How many answers without one disagreement promise `agreement`; None when no number does."""
    if agreement >= 1:
        return None
    return math.ceil(math.log(1 - confidence) / math.log(agreement))


def choose(
    pilot: Words, tested: Words, agreement: float, worth: Sequence[float], confidence: float = CONFIDENCE
) -> Thresholds:
    """The thresholds, of all that were shown to keep the promise, that save most on the tested frames.

    With probability `confidence` over the tested frames, drawn independently of the pilot's: for every exit that is
    given a threshold, of the frames that the cascade answers there or at an exit before, at least `agreement` agree.

    Args:
        pilot: words on frames that had no part in fitting the heads (or that were left out in turn).
        worth: by exit, what an answer there saves; any unit.
    """
    count = int(tested.frames * tested.share)
    plans = [plan for first in range(pilot.exits) if (plan := _sequence(pilot, first, agreement, count))]
    best: Thresholds = (None,) * pilot.exits
    most = 0.0
    for plan, share in zip(plans, _shares(len(plans)), strict=True):
        for thresholds in plan:
            if max(_tails(tested, thresholds, agreement)) > (1 - confidence) * share:
                break
            first = answering(tested, thresholds)
            saved = float(sum((first == place).sum() * value for place, value in enumerate(worth)))
            if saved > most:
                best, most = thresholds, saved
    return best


def frames_wanted(pilot: Words, place: int, agreement: float, confidence: float = CONFIDENCE) -> int | None:
    """About how many independent frames would give the exit by itself a threshold, by what the pilot shows, or None.

    Twice the number at which the pilot expects it, as a test at the limit fails half of the time.
    """
    alone = Words(pilot.confidence[[place]], pilot.agrees[[place]], pilot.within[[place]], pilot.owed)
    count = answers_needed(agreement, confidence)
    vectors = [(_loosest_vector(alone, [float(nominal)])) for nominal in _nominal(agreement)]
    while count is not None and count < MOST_FRAMES:
        if any(max(_predicted(alone, vector, agreement, count)) <= 1 - confidence for vector in vectors if vector[0]):
            return 2 * count
        count += max(1, count // 10)
    return None


def independent_share(series: Sequence[NDArray[np.float64]]) -> float:
    """How many independent frames a frame of a clip is worth: one over the time that its values stay alike.

    The integrated autocorrelation time, summed up to the first correlation that is not positive (Geyer 1992), the
    longest of several series (frames,) in the order of time.
    """
    longest = 1.0
    for values in series:
        away = values - values.mean()
        power = float(away @ away)
        if power <= 0:
            continue
        found = 1.0
        for lag in range(1, len(away)):
            correlation = float(away[lag:] @ away[:-lag]) / power
            if correlation <= 0:
                break
            found += 2 * correlation
        longest = max(longest, found)
    return 1 / longest


def _shares(plans: int) -> list[float]:
    return [1.0] if plans == 1 else [ALL_ON, *[(1 - ALL_ON) / (plans - 1)] * (plans - 1)][:plans]


def _nominal(agreement: float) -> NDArray[np.float64]:
    return (1 - agreement) * np.geomspace(STRICTEST, 1.0, STEPS)


def _sequence(pilot: Words, first: int, agreement: float, count: int) -> list[Thresholds]:
    """Vectors of thresholds, from the one that is likeliest to be shown right to ever looser ones.

    At each step all exits from `first` on are loosened to one nominal risk on the pilot's frames, but none farther than
    where the pilot lets one expect the promise to be shown; one that never gets there stays off.
    """
    if agreement >= 1:
        return []
    risks = [0.0] * pilot.exits
    done = [place < first for place in range(pilot.exits)]
    steps: list[tuple[float, Thresholds]] = []
    for nominal in _nominal(agreement):
        for place in range(pilot.exits):
            if done[place]:
                continue
            trial = [*risks[:place], float(nominal), *risks[place + 1 :]]
            thresholds = _loosest_vector(pilot, trial)
            likely = _predicted(pilot, thresholds, agreement, count)[place] <= LIKELY
            if thresholds[place] is not None and likely:
                risks = trial
            else:
                done[place] = risks[place] > 0
        thresholds = _loosest_vector(pilot, risks)
        if any(value is not None for value in thresholds) and (not steps or thresholds != steps[-1][1]):
            steps.append((max(_predicted(pilot, thresholds, agreement, count)), thresholds))
    start = min(range(len(steps)), key=lambda step: steps[step][0], default=0)
    return [thresholds for _, thresholds in steps[start:]]


def _loosest_vector(pilot: Words, risks: Sequence[float]) -> Thresholds:
    """The least thresholds at which each exit has its nominal risk on the pilot's frames it is asked about; 0: off."""
    left = np.ones(pilot.frames, np.bool_)
    thresholds: list[float | None] = []
    for place, risk in enumerate(risks):
        asked = left & pilot.within[place] & (risk > 0)
        owed = None if pilot.owed is None else int(pilot.owed.sum())
        threshold = loosest(pilot.confidence[place][asked], pilot.agrees[place][asked], risk, owed)
        thresholds.append(threshold)
        if threshold is not None:
            left &= ~(asked & (pilot.confidence[place] >= threshold))
    return tuple(thresholds)


def loosest(confidence: NDArray[np.float64], agrees: Flags, risk: float, owed: int | None = None) -> float | None:
    """The least confidence at which the pilot's answers, and one error more, still disagree on at most `risk`.

    With `owed`, of so many frames that the promise is about instead of the answered ones.
    """
    order = np.argsort(-confidence, kind="stable")
    ranked = confidence[order]
    count = np.arange(1, len(ranked) + 1) if owed is None else np.full(len(ranked), owed)
    last_of_ties = np.append(ranked[1:] < ranked[:-1], True)[: len(ranked)]
    few = np.cumsum(~agrees[order]) + 1 <= risk * (count + 1)
    kept = np.flatnonzero(last_of_ties & few & np.isfinite(ranked))
    return float(ranked[kept[-1]]) if len(kept) else None


def _counts(words: Words, thresholds: Thresholds) -> list[tuple[int, int]]:
    """Errors, and answers or owed frames, of each exit together with those before it; none where the exit is off."""
    first = answering(words, thresholds)
    counts: list[tuple[int, int]] = []
    errors = answers = 0
    owed = None if words.owed is None else int(words.owed.sum())
    for place, threshold in enumerate(thresholds):
        mine = first == place
        errors += int((mine & ~words.agrees[place]).sum())
        answers += int(mine.sum())
        counts.append((0, 0) if threshold is None else (errors, answers if owed is None else owed))
    return counts


def _tails(words: Words, thresholds: Thresholds, agreement: float) -> list[float]:
    """By exit the p-value of its promise; 0 where it is off and promises nothing."""
    counts = _counts(words, thresholds)
    return [
        0.0
        if threshold is None
        else p_value(math.ceil(errors * words.share), math.floor(answers * words.share), 1 - agreement)
        for threshold, (errors, answers) in zip(thresholds, counts, strict=True)
    ]


def _predicted(pilot: Words, thresholds: Thresholds, agreement: float, count: int) -> list[float]:
    """What the pilot lets one expect `_tails` to be on `count` frames, one error more than it saw taken for granted."""
    values: list[float] = []
    for threshold, (errors, answers) in zip(thresholds, _counts(pilot, thresholds), strict=True):
        expected = round(answers / pilot.frames * count)
        wrong = round((errors + 1) / (answers + 1) * expected)
        values.append(0.0 if threshold is None else p_value(wrong, expected, 1 - agreement))
    return values
