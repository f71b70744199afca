"""Fits the gate of a detector's bundle on the clips among its calibration frames, and judges it on the held-back ones.

A classifier gets none unless its device's settings give a threshold: where labels are nearly tied, no change of the
picture tells when the label would change. Pictures in a folder are no stretch of time, so they cannot fit a gate.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache, partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from export.bench_frames import clip_fps
from export.frames import CALIBRATING, FrameSet, Role
from export.gate_fit import LEAST_FRAMES, Changes, Course, Loss, Stretch, fit, joined, kept_low, run
from export.report import Report
from export.task import Outputs, open_judge
from runtime.gate_spec import MAX_AGE_MS, GateSpec
from runtime.manifest import Bundle

TASKS = frozenset({"detect"})


def fit_gate(
    bundle: Bundle, clips: Sequence[Path], frames: FrameSet, floating: Outputs, report: Report
) -> GateSpec | None:
    """The gate of a bundle; None where its task has none.

    Args:
        bundle: as far as it is made; only its task is looked at.
        clips: the sources of `frames`, in their order; folders among them are left out.
        frames: all of them, with their roles.
        floating: the whole float model's outputs for them, float32 (frames, …).
        report: told what is done.
    """
    if bundle.manifest.task not in TASKS:
        return None
    report.stage("fit the gate")
    judging = open_judge(bundle)

    @cache
    def loss(one: int, two: int) -> float:
        ((same, total),) = judging.marks(floating[[one]], floating[[two]])
        return 1 - float(same) / float(total)

    def stretches(roles: Sequence[Role]) -> list[Stretch]:
        found = []
        for number, clip in enumerate(clips):
            places = _consecutive(frames, roles, number) if clip.is_file() else np.empty(0, np.int64)
            if len(places) >= LEAST_FRAMES:
                period = float(np.median(np.diff(frames.places[places, 1])))
                pixels = [frames.pixels[place] for place in places]
                own = partial(_from, loss, int(places[0]))
                found.append(Stretch.of(pixels, own, clip_fps(clip) / period, MAX_AGE_MS / 1000))
        return found

    fitted = fit(stretches(CALIBRATING))
    if fitted.threshold is None or fitted.course is None:
        report.note(f"no gate: {fitted.note}")
        return GateSpec(threshold=None, note=fitted.note)
    spec = GateSpec(
        threshold=round(fitted.threshold, 4),
        fitted_on=len(fitted.course.losses),
        repeated=round(fitted.course.share, 6),
        agreement=round(fitted.course.kept, 6),
    )
    judged = [run(Changes(stretch), fitted.threshold) for stretch in stretches(("judge",))]
    if not judged:
        report.note(f"the gate repeats {spec.repeated:.0%} of the fit frames; too few held-back ones to judge it")
        return spec
    return _judged(spec, joined(judged), report)


def _judged(spec: GateSpec, course: Course, report: Report) -> GateSpec:
    low = kept_low(course.losses)
    report.note(
        f"the gate repeats {course.share:.0%} of {len(course.losses)} held-back frames at F1 {course.kept:.3f}, "
        f"at least {low:.3f}; wanted is {spec.kept:.2f}"
    )
    return GateSpec(
        threshold=spec.threshold,
        fitted_on=spec.fitted_on,
        repeated=spec.repeated,
        agreement=spec.agreement,
        judged_on=len(course.losses),
        judged_repeated=round(course.share, 6),
        judged_agreement=round(course.kept, 6),
        judged_agreement_low=round(low, 6),
    )


def _from(loss: Loss, start: int, one: int, two: int) -> float:
    return loss(start + one, start + two)


def _consecutive(frames: FrameSet, roles: Sequence[Role], source: int) -> NDArray[np.int64]:
    """The frames of these roles that come from one source, in the order of time; roles of a clip are contiguous."""
    places: NDArray[np.int64] = np.sort(np.concatenate([frames.roles[role] for role in roles]))
    own: NDArray[np.int64] = places[frames.places[places, 0] == source]
    return own
