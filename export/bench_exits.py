"""Judges exits: each on its own, how its agreement falls as it answers more, and all of them as a cascade."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import numpy as np
from numpy.typing import NDArray

from export.agreement import clopper_pearson, measure
from export.atlas import Atlas, CascadeRow, ExitRow, Sweep
from export.bench_codec import Judged
from export.bench_rows import Logits
from runtime.manifest import Bundle, ExitSpec
from runtime.policy import classify

STEPS = 40  # of coverage, in a sweep


def judge_exits(bundle: Bundle, made: Atlas, judged: Judged, whole: Logits) -> Atlas:
    """Add what the exits did on the judged frames.

    Args:
        bundle: with its exits and their thresholds.
        made: the atlas so far, with its times.
        judged: the logits of every exit.
        whole: the whole float model's logits (frames, classes).
    """
    manifest = bundle.manifest
    answers = whole.argmax(axis=1)
    shares = [0.0, *(time.macs_ratio for time in made.times)]
    rows: list[ExitRow] = []
    sweeps: list[Sweep] = []
    said: list[tuple[ExitSpec, NDArray[np.bool_], NDArray[np.bool_]]] = []
    for spec in manifest.exits:
        logits = judged.exit_logits.get(spec.cut, judged.logits)
        outputs = [classify(row, spec) for row in logits]
        agrees = np.array([output.label_index for output in outputs]) == answers
        confidence = np.array([output.confidence for output in outputs])
        answered = np.zeros(len(agrees), np.bool_) if spec.threshold is None else confidence >= spec.threshold
        said.append((spec, answered, agrees))
        after = manifest.cuts[spec.cut].after
        found = measure(answered, agrees)
        rows.append(
            ExitRow(
                cut=spec.cut,
                after=after,
                target=spec.agreement,
                threshold=spec.threshold,
                coverage=found.coverage,
                agreement=found.agreement,
                low=found.agreement_low,
                high=found.agreement_high,
                answered=found.answered,
                n=found.n,
                macs_ratio=shares[spec.cut],
            )
        )
        sweeps.append(sweep(spec.cut, after, confidence, agrees))
    return msgspec.structs.replace(made, exits=tuple(rows), sweeps=tuple(sweeps), cascade=(_cascade(said, shares),))


def sweep(cut: int, after: str, confidence: NDArray[np.float64], agrees: NDArray[np.bool_]) -> Sweep:
    """Agreement among the most confident 1/STEPS, 2/STEPS … of the frames: (frames,) each."""
    order = np.argsort(-confidence, kind="stable")
    hits = np.cumsum(agrees[order])
    counts = sorted({max(1, round(len(hits) * step / STEPS)) for step in range(1, STEPS + 1)})
    return Sweep(
        cut=cut,
        after=after,
        coverage=tuple(round(count / len(hits), 4) for count in counts),
        agreement=tuple(round(float(hits[count - 1] / count), 4) for count in counts),
    )


def _cascade(
    said: Sequence[tuple[ExitSpec, NDArray[np.bool_], NDArray[np.bool_]]], shares: Sequence[float]
) -> CascadeRow:
    """Every frame is answered by the first exit that dares; the last always does."""
    count = len(said[0][1])
    open_frames = np.ones(count, np.bool_)
    hits, spent = 0, 0.0
    answered: dict[int, float] = {}
    for spec, dares, agrees in said:
        here = open_frames & (dares if spec.file is not None else True)
        open_frames &= ~here
        hits += int((here & agrees).sum())
        spent += float(here.sum()) * shares[spec.cut]
        answered[spec.cut] = round(float(here.mean()), 6)
    low, high = clopper_pearson(hits, count)
    return CascadeRow(
        target=min((spec.agreement for spec, _, _ in said), default=1.0),
        agreement=round(hits / count, 6),
        low=round(low, 6),
        high=round(high, 6),
        n=count,
        macs_saved_ratio=round(1 - spent / count, 6),
        answered_ratio=answered,
    )
