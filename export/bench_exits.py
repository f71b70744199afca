"""Sums up what exits do: as the cascade runs, each asked about every frame, and how agreement falls with coverage."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import numpy as np
from numpy.typing import NDArray

from export.agreement import clopper_pearson, measure
from export.atlas import Alone, Atlas, CascadeRow, Sweep
from export.exits_judge import ExitRow, judge_seen, see
from export.risk import Flags
from export.task import Outputs, open_judge
from runtime.datatypes import Tensor
from runtime.manifest import Bundle
from runtime.policy import ExitPolicy

STEPS = 40  # of coverage, in a sweep


def judge_exits(bundle: Bundle, made: Atlas, frames: Sequence[Tensor], whole: Outputs) -> Atlas:
    """Add what the exits do on the judged frames, at every agreement they have thresholds for.

    Args:
        bundle: with its exits.
        made: the atlas so far.
        frames: each uint8 (1, height, width, 3).
        whole: the whole float model's outputs (frames, …).
    """
    answers = open_judge(bundle).keys(whole)
    seen = see(bundle, np.concatenate(frames))
    rows = judge_seen(bundle, seen, answers)
    words = seen.words(bundle, answers)
    exits = bundle.manifest.exits[:-1]
    targets = sorted({row.target for row in rows if row.cut in {spec.cut for spec in exits}})
    alone: list[Alone] = []
    for target in targets:
        thresholds = {row.cut: row.threshold for row in rows if row.target == target}
        for place, spec in enumerate(exits):
            threshold = thresholds[spec.cut]
            sure = np.zeros(words.frames, np.bool_) if threshold is None else words.confidence[place] >= threshold
            found = measure(sure & words.within[place], words.agrees[place])
            alone.append(
                Alone(
                    target=target,
                    cut=spec.cut,
                    coverage=found.coverage,
                    agreement=found.agreement,
                    low=found.agreement_low,
                    high=found.agreement_high,
                    answered=found.answered,
                    n=found.n,
                )
            )
    return msgspec.structs.replace(
        made,
        exits=tuple(rows),
        alone=tuple(alone),
        sweeps=tuple(
            sweep(spec.cut, bundle.manifest.cuts[spec.cut].after, words.confidence[place], words.agrees[place])
            for place, spec in enumerate(exits)
        ),
        cascade=tuple(cascade(bundle, [row for row in rows if row.target == target]) for target in targets),
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


def cascade(bundle: Bundle, rows: Sequence[ExitRow]) -> CascadeRow:
    """All exits together, from the rows of one agreement by cut, the model's own exit last."""
    macs = [segment.macs for segment in bundle.manifest.segments]
    policy = ExitPolicy({row.cut: row.threshold for row in rows if row.threshold is not None})
    hits = [round((row.agreement or 0.0) * row.answered) for row in rows]
    count, early = rows[0].n, sum(row.answered for row in rows[:-1])
    spent, asked = 0.0, 0
    for row in rows:
        spec = bundle.exit_at(row.cut)
        assert spec is not None, "rows are of exits"
        asked += spec.macs if policy.may_answer(row.cut) else 0
        spent += row.answered * (sum(macs[: row.cut]) + asked)
    low, high = clopper_pearson(sum(hits[:-1]), early) if early else (None, None)
    all_low, all_high = clopper_pearson(sum(hits), count)
    return CascadeRow(
        target=rows[0].target,
        coverage=round(early / count, 6),
        agreement=round(sum(hits[:-1]) / early, 6) if early else None,
        low=None if low is None else round(low, 6),
        high=None if high is None else round(high, 6),
        answered=early,
        n=count,
        all_agreement=round(sum(hits) / count, 6),
        all_low=round(all_low, 6),
        all_high=round(all_high, 6),
        macs_saved_ratio=round(1 - spent / count / sum(macs), 6),
        answered_ratio={row.cut: round(row.answered / count, 6) for row in rows},
    )
