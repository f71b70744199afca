"""Judges exits: each on its own, how its agreement falls as it answers more, and all of them as a cascade."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import msgspec
import numpy as np
from numpy.typing import NDArray

from export.agreement import clopper_pearson, measure
from export.atlas import Atlas, CascadeRow, ExitRow, Sweep
from export.bench_codec import Judged
from export.bench_rows import Logits
from runtime.datatypes import ExitOutput
from runtime.manifest import Bundle
from runtime.policy import ExitPolicy, classify

STEPS = 40  # of coverage, in a sweep

Flags = NDArray[np.bool_]


def judge_exits(bundle: Bundle, made: Atlas, judged: Judged, whole: Logits) -> Atlas:
    """Add what the exits did on the judged frames, at every target they have thresholds for.

    Args:
        bundle: with its exits.
        made: the atlas so far, with its times.
        judged: the logits and distances of every exit.
        whole: the whole float model's logits (frames, classes).
    """
    answers = whole.argmax(axis=1)
    said = {spec.cut: _outputs(bundle, judged, spec.cut) for spec in bundle.manifest.exits}
    agrees = {cut: np.array([output.label_index for output in outputs]) == answers for cut, outputs in said.items()}
    confidence = {cut: np.array([output.confidence for output in outputs]) for cut, outputs in said.items()}
    own = bundle.manifest.exits[0].agreement
    targets = sorted({own, *(point.agreement for spec in bundle.manifest.exits[:-1] for point in spec.points)})
    policies = {target: ExitPolicy.of(bundle, agreement=None if target == own else target) for target in targets}
    if len(said) == 1:
        policies = {}
    afters = [cut.after for cut in bundle.manifest.cuts]
    return msgspec.structs.replace(
        made,
        exits=tuple(
            row
            for target, policy in policies.items()
            for row in _rows(made, policy, target, {cut: said[cut] for cut in list(said)[:-1]}, agrees)
        ),
        sweeps=tuple(sweep(cut, afters[cut], confidence[cut], agrees[cut]) for cut in list(said)[:-1]),
        cascade=tuple(_cascade(bundle, policy, target, said, agrees) for target, policy in policies.items()),
    )


def sweep(cut: int, after: str, confidence: NDArray[np.float64], agrees: Flags) -> Sweep:
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


def _outputs(bundle: Bundle, judged: Judged, cut: int) -> list[ExitOutput]:
    spec = bundle.exit_at(cut)
    assert spec is not None, "asked for exits only"
    logits = judged.exit_logits.get(cut, judged.logits)
    distances: Sequence[float | None] = (
        [float(value) for value in judged.distances[cut]] if cut in judged.distances else [None] * len(logits)
    )
    return [classify(row, spec, distance) for row, distance in zip(logits, distances, strict=True)]


def _rows(
    made: Atlas,
    policy: ExitPolicy,
    target: float,
    said: Mapping[int, Sequence[ExitOutput]],
    agrees: Mapping[int, Flags],
) -> list[ExitRow]:
    rows = []
    for cut, outputs in said.items():
        found = measure(np.array([policy.answers(output) for output in outputs]), agrees[cut])
        time = made.times[cut - 1]
        rows.append(
            ExitRow(
                cut=cut,
                after=time.after,
                target=target,
                threshold=policy.thresholds.get(cut),
                coverage=found.coverage,
                agreement=found.agreement,
                low=found.agreement_low,
                high=found.agreement_high,
                answered=found.answered,
                n=found.n,
                withheld=sum(policy.withholds(output) for output in outputs),
                macs_ratio=time.macs_ratio,
            )
        )
    return rows


def _cascade(
    bundle: Bundle,
    policy: ExitPolicy,
    target: float,
    said: Mapping[int, Sequence[ExitOutput]],
    agrees: Mapping[int, Flags],
) -> CascadeRow:
    """Every frame is answered by the first exit that dares; the last always does."""
    macs = [segment.macs for segment in bundle.manifest.segments]
    count = len(agrees[len(macs)])
    waiting, right, spent, asked = np.ones(count, np.bool_), np.zeros(count, np.bool_), 0.0, 0
    answered: dict[int, float] = {}
    for cut, outputs in said.items():
        spec = bundle.exit_at(cut)
        assert spec is not None, "asked for exits only"
        asked += spec.macs if policy.may_answer(cut) else 0
        here = waiting & (np.array([policy.answers(output) for output in outputs]) | (spec.file is None))
        waiting &= ~here
        right |= here & agrees[cut]
        spent += float(here.sum()) * (sum(macs[:cut]) + asked)
        answered[cut] = round(float(here.mean()), 6)
        if cut != len(macs):
            early, hits = count - int(waiting.sum()), int(right.sum())
    low, high = clopper_pearson(hits, early) if early else (None, None)
    all_low, all_high = clopper_pearson(int(right.sum()), count)
    return CascadeRow(
        target=target,
        coverage=round(early / count, 6),
        agreement=round(hits / early, 6) if early else None,
        low=None if low is None else round(low, 6),
        high=None if high is None else round(high, 6),
        answered=early,
        n=count,
        all_agreement=round(float(right.mean()), 6),
        all_low=round(all_low, 6),
        all_high=round(all_high, 6),
        macs_saved_ratio=round(1 - spent / count / sum(macs), 6),
        answered_ratio=answered,
    )
