"""The stage of an export that makes exits: fits a head at every cut, chooses the best, its temperature and its guard.

Only fit frames are looked at, and of every frame only what is said of it by a head and a guard that were fitted without
its group. That is the pilot of `risk.choose`, which then tests thresholds on frames that had no part in any of this.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice

import msgspec
import numpy as np
import onnx
import onnxruntime as ort
from numpy.typing import NDArray
from onnx import ModelProto

from export import exits_judge, timing
from export.cuts import Cut
from export.exits import FEATURES, ROW, guarded, head_macs, head_model, statistics_front
from export.exits_candidates import Candidate, candidates_at
from export.exits_candidates import Trunk as Trunk  # who makes exits names it from here
from export.exits_fit import choose_temperature, fit_head
from export.exits_guard import damages, distance_limit, fit_guard
from export.exits_stress import above, floors, see_strange
from export.frames import COPIES, FEW, FrameSet, copies, frames_for
from export.graph import FRAME, LOGITS, write
from export.recipe import Recipe
from export.report import Report
from export.risk import CONFIDENCE, Words, choose, frames_wanted, independent_share, loosest
from export.task import Outputs, open_judge
from runtime.datatypes import Tensor
from runtime.manifest import Bundle, ExitSpec, OperatingPoint
from runtime.segment import load_segments
from runtime.segment_onnx import session_options
from runtime.task import open_task

TABLE = (0.9, 0.95, 0.98, 0.99)  # agreements that every bundle has thresholds for, beside the user's
OBSERVED = 16  # frames at once, where the graphs take them
FEW_COPIES = 2  # of each fit frame, once there are many
DAMAGED = 200  # fit frames that are damaged in each way, for the guard


@dataclass(frozen=True, slots=True)
class Fitted:
    """An exit without threshold, and what it says of the fit frames when it was fitted without them."""

    spec: ExitSpec
    model: ModelProto
    confidence: NDArray[np.float64]  # (fit frames,)
    agrees: NDArray[np.bool_]
    within: NDArray[np.bool_]
    owed: int | None  # fit frames that its promise is about; None: those that it answers
    floors: Mapping[float, float] = field(default_factory=dict)  # agreement → least threshold for it


def fit_exits(trunk: Trunk, bundle: Bundle, frames: FrameSet, recipe: Recipe, report: Report) -> list[Fitted]:
    """Fit, compare and choose a head for every chosen cut; the model's own where it has one. Files are written."""
    judge = open_judge(bundle)
    candidates = [candidates_at(trunk, place, frames, judge, recipe) for place in range(len(trunk.chosen))]
    statistics = [Candidate("guard", statistics_front(*trunk.at(place))) for place in range(len(trunk.chosen))]
    fronts = [[*heads, guard] for heads, guard in zip(candidates, statistics, strict=True)]
    count, outputs = _observe(trunk, bundle, frames, fronts, recipe, report)
    groups = np.repeat(frames.groups[frames.roles["fit"]], count)
    damaged = _damage(trunk, bundle, frames, [guard.front for guard in statistics], recipe, report)
    fitted = []
    for place, cut in enumerate(trunk.chosen):
        # The frame itself and its mirror image: closer and darker looks would teach the guard to expect anything.
        known = np.arange(len(groups)) % count < FEW_COPIES
        seen = np.concatenate(statistics[place].rows)[known]
        logged = seen.shape[1] // 2 if len(cut.shape) > 1 else 0
        guard, distances = fit_guard(seen, groups[known], damaged[place], logged=logged)
        plain = distances[:: min(count, FEW_COPIES)]
        limit = distance_limit(plain)
        best = max(
            (_fit(candidate, outputs, groups, count, place + 1, bundle, recipe) for candidate in candidates[place]),
            key=lambda made: _value(made, cut, trunk.opened.macs, recipe.agreement),
        )
        model = guarded(best.model, guard, *trunk.at(place))
        write(model, bundle.path / exit_file(place + 1))
        report.note(f"exit {place + 1}: {best.spec.kind}, {best.spec.macs / max(1, trunk.opened.macs):.2%} of the MACs")
        spec = msgspec.structs.replace(best.spec, distance_limit=limit, macs=head_macs(model))
        fitted.append(Fitted(spec, model, best.confidence, best.agrees, plain <= limit, best.owed))
    if not fitted:
        return []
    strange = see_strange([(made.spec, made.model) for made in fitted], trunk, bundle, frames, recipe, report)
    least = {agreement: floors(strange, agreement) for agreement in {*TABLE, recipe.agreement}}
    return [replace(made, floors={key: least[key][place] for key in least}) for place, made in enumerate(fitted)]


def choose_points(
    fitted: Sequence[Fitted], trunk: Trunk, bundle: Bundle, frames: FrameSet, floating: Outputs, recipe: Recipe
) -> tuple[list[ExitSpec], list[str]]:
    """Test thresholds for every agreement of the table on the threshold frames.

    Args:
        bundle: with the fitted heads, so that what is tested is what will run.
        floating: the whole float model's outputs for every frame.

    Returns:
        The exits, and a sentence for each that will never answer at the wanted agreement.
    """
    if not fitted:
        return [], []
    rows = frames.roles["threshold"]
    batch = exits_judge.largest_batch(bundle, frames.pixels[rows][:OBSERVED])
    judge = open_judge(bundle)
    wanted = judge.keys(floating[rows])
    tested = exits_judge.see(bundle, frames.pixels[rows], batch=batch).words(bundle, wanted)
    tested = replace(tested, share=1.0 if recipe.assume_independent else _share(fitted, frames))
    pilot = Words(
        np.array([made.confidence for made in fitted]),
        np.array([made.agrees for made in fitted]),
        np.array([made.within for made in fitted]),
        judge.owed(judge.keys(floating[frames.roles["fit"]])),
    )
    worth = [trunk.opened.macs - cut.macs for cut in trunk.chosen]
    table = sorted({*TABLE, recipe.agreement})
    least = {agreement: [made.floors[agreement] for made in fitted] for agreement in table}
    chosen = {
        agreement: choose(above(pilot, least[agreement]), above(tested, least[agreement]), agreement, worth)
        for agreement in table
    }
    specs, notes = [], []
    for place, made in enumerate(fitted):
        threshold = chosen[recipe.agreement][place]
        known = above(pilot, least[recipe.agreement])
        note = None if threshold is not None else _why_not(known, place, recipe.agreement, tested)
        if note is not None:
            notes.append(f"exit {made.spec.cut} never answers: {note}")
        points = tuple(OperatingPoint(agreement=agreement, threshold=chosen[agreement][place]) for agreement in table)
        specs.append(
            msgspec.structs.replace(
                made.spec, threshold=threshold, agreement=recipe.agreement, points=points, note=note
            )
        )
    return specs, notes


def exits_ms(bundle: Bundle, frame: Tensor) -> dict[str, float]:
    """By cut, how long the head that hangs there takes for one frame, uint8 (1, height, width, 3), guard included."""
    segments, _ = load_segments(bundle, 0, len(bundle.manifest.segments) - 1)
    pairs: list[tuple[ModelProto, Tensor]] = []
    cuts: list[str] = []
    tensor = frame
    for index, segment in segments.items():
        tensor = segment.run(tensor)
        spec = bundle.exit_at(index + 1)
        if spec is not None and spec.file is not None:
            pairs.append((onnx.load(bundle.path / spec.file), tensor))
            cuts.append(str(spec.cut))
    return dict(zip(cuts, timing.run_ms(*pairs), strict=True))


def _share(fitted: Sequence[Fitted], frames: FrameSet) -> float:
    """Independent frames for every threshold frame, by how the fit frames of clips follow each other; 1 for photos."""
    fit, threshold = ([frames.names[row] == "" for row in frames.roles[role]] for role in ("fit", "threshold"))
    if not any(fit):
        return 1.0
    rows = np.array(fit)
    worth = independent_share(
        [
            np.nan_to_num(values[rows].astype(np.float64), neginf=0.0)
            for made in fitted
            for values in (made.confidence, made.agrees)
        ]
    )
    return 1 - float(np.mean(threshold)) * (1 - worth)


def _why_not(pilot: Words, place: int, agreement: float, words: Words) -> str:
    tested = words.frames
    alike = "" if words.share >= 1 else f", worth {words.frames * words.share:.0f} as neighbours in time are alike,"
    said = (
        f"{tested} threshold frames{alike} do not show an agreement of {agreement:g} with {CONFIDENCE:.0%} confidence"
    )
    wanted = frames_wanted(pilot, place, agreement)
    if wanted is None:
        return f"{said}, and it is right too seldom for more frames to help; choose a lower agreement or a deeper cut"
    wanted = frames_for(max(math.ceil(wanted / words.share), tested + 1))
    return f"{said}; about {wanted:,} frames in all would (--frames, --max-frames)"


def _observe(
    trunk: Trunk,
    bundle: Bundle,
    frames: FrameSet,
    fronts: Sequence[Sequence[Candidate]],
    recipe: Recipe,
    report: Report,
) -> tuple[int, NDArray[np.float32]]:
    """Give every front the features of the fit frames and their copies, as the segments make them.

    Returns:
        How many there are of each frame, itself first, and the whole float model's outputs (frames and copies, …).
    """
    generator = np.random.default_rng(recipe.seed)
    fit = frames.of("fit")
    own = all(candidate.own for heads in fronts for candidate in heads[:-1])
    count = FEW_COPIES if own or len(fit) > FEW else COPIES
    batch = exits_judge.largest_batch(bundle, np.concatenate(fit[:OBSERVED]))
    segments, _ = load_segments(bundle, 0, len(fronts) - 1, threads=recipe.threads)
    options = session_options(recipe.threads)
    whole = ort.InferenceSession(trunk.opened.simplified.trunk().SerializeToString(), options)
    sessions = [
        [ort.InferenceSession(candidate.front.SerializeToString(), options) for candidate in heads] for heads in fronts
    ]
    outputs: list[Tensor] = []
    varied = (copy for frame in report.track(fit, "fit") for copy in islice(copies(frame, generator), count))
    while group := list(islice(varied, batch)):
        tensor = np.concatenate(group)
        outputs.append(whole.run([LOGITS], {FRAME: tensor})[0])
        for place, (heads, runs) in enumerate(zip(fronts, sessions, strict=True)):
            tensor = segments[place].run(tensor)
            for candidate, session in zip(heads, runs, strict=True):
                output = None if candidate.own else [ROW]
                candidate.rows.append(session.run(output, {FEATURES: tensor})[0])
    return count, np.concatenate(outputs)


def _damage(
    trunk: Trunk, bundle: Bundle, frames: FrameSet, fronts: Sequence[ModelProto], recipe: Recipe, report: Report
) -> list[list[tuple[NDArray[np.float32], NDArray[np.int64]]]]:
    """By cut and kind of damage: a guard's statistics of damaged fit frames, and the groups of these."""
    rows = frames.roles["fit"]
    rows = rows[np.linspace(0, len(rows) - 1, min(DAMAGED, len(rows))).round().astype(int)]
    segments, _ = load_segments(bundle, 0, len(fronts) - 1, threads=recipe.threads)
    sessions = [ort.InferenceSession(front.SerializeToString(), session_options(recipe.threads)) for front in fronts]
    kinds = list(damages(np.random.default_rng(recipe.seed)).values())
    found: list[list[list[Tensor]]] = [[[] for _ in kinds] for _ in fronts]
    for row in report.track(rows, "damaged"):
        for number, damage in enumerate(kinds):
            tensor = damage(frames.pixels[row : row + 1])
            for place, session in enumerate(sessions):
                tensor = segments[place].run(tensor)
                found[place][number].append(session.run([ROW], {FEATURES: tensor})[0])
    return [[(np.concatenate(seen), frames.groups[rows]) for seen in at] for at in found]


def _fit(
    candidate: Candidate,
    outputs: Outputs,
    groups: NDArray[np.int64],
    count: int,
    cut: int,
    bundle: Bundle,
    recipe: Recipe,
) -> Fitted:
    rows = np.concatenate(candidate.rows)
    judge, task = open_judge(bundle), open_task(bundle)
    if candidate.own:
        said, model = rows[::count], candidate.front
    else:
        head = fit_head(rows, judge.head_logits(outputs), groups)
        said, model = head.held_out[::count], head_model(candidate.front, head, f"exit{cut}")
    answers = judge.keys(outputs[::count])
    spec = ExitSpec(
        cut=cut,
        file=exit_file(cut),
        temperature=choose_temperature(said, answers),
        threshold=None,
        agreement=recipe.agreement,
        kind=candidate.kind,
        macs=head_macs(model),
    )
    words = [task.read(row, spec) for row in said]
    owed = judge.owed(answers)
    return Fitted(
        spec,
        model,
        np.array([exits_judge.sureness(output) for output in words]),
        np.array([task.key(output.answer) for output in words]) == answers,
        np.ones(len(answers), np.bool_),
        None if owed is None else int(owed.sum()),
    )


def _value(made: Fitted, cut: Cut, total: int, agreement: float) -> tuple[float, float]:
    """What a head saves of a frame's multiply-accumulates, its own taken off, over the table; then how often right."""
    saved = 0.0
    for wanted in {*TABLE, agreement}:
        threshold = loosest(made.confidence, made.agrees, 1 - wanted, made.owed)
        coverage = 0.0 if threshold is None else float((made.confidence >= threshold).mean())
        saved += max(0.0, coverage * (total - cut.macs) - made.spec.macs)
    return saved, float(made.agrees.mean())


def exit_file(cut: int) -> str:
    """Where the head at a cut lies in the bundle."""
    return f"exits/{cut}.onnx"
