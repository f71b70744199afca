"""Measures what an atlas holds: frames in, everything that was asked for out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np

from export import atlas as atlases
from export import timing
from export.atlas import Atlas, Frames
from export.bench_clip import judge_stream, judge_videos
from export.bench_codec import Judged, judge_codecs
from export.bench_exits import judge_exits
from export.bench_frames import Judges, Whole, clip_fps, open_whole, read_clip, read_judges
from export.bench_rivals import judge_rivals, missing
from export.bench_rows import Point
from export.report import Report
from export.source import InputOptions
from export.task import Outputs, open_judge
from runtime.datatypes import Tensor
from runtime.manifest import Bundle

FORMAT = 1


@dataclass(frozen=True, slots=True)
class Wanted:
    """What is to be measured."""

    codecs: bool = False
    exits: bool = False
    variants: bool = False
    rivals: bool = True
    quick: bool = False  # fewer settings of the rivals
    clip: Path | None = None
    clip_frames: int = 120


def measure(
    bundle: Bundle,
    sources: Sequence[Path],
    wanted: Wanted,
    *,
    model: str | None,
    options: InputOptions,
    max_frames: int,
    threads: int,
    seed: int,
    report: Report,
) -> Atlas:
    """Open what is needed, judge, and sum up.

    Args:
        bundle: to be measured.
        sources: folders of images and clips.
        wanted: what to measure.
        model: what the bundle was made from; None: what it says itself.
        options: how pixels become the model's input, as for export.
        max_frames: judge with at most so many.
        threads: for every model.
        seed: of the bootstrap.
        report: told what is done.

    Raises:
        KinflowError: one sentence.
    """
    whole = open_whole(bundle, model, options, threads, report)
    report.stage("read frames")
    judges = read_judges(bundle, sources, max_frames)
    _tell(judges, report)
    clip = None
    if wanted.clip is not None:
        clip = read_clip(bundle, wanted.clip, wanted.clip_frames)
        _tell(clip, report)
    made = judge(bundle, judges, whole, wanted, threads=threads, seed=seed, report=report)
    if clip is None or wanted.clip is None:
        return made
    report.stage(f"send {len(clip.frames)} frames of {wanted.clip.name} in order")
    return _with_clip(bundle, made, clip, whole, clip_fps(wanted.clip), threads, seed, report)


def judge(
    bundle: Bundle, judges: Judges, whole: Whole, wanted: Wanted, *, threads: int, seed: int, report: Report
) -> Atlas:
    """Judge a bundle with frames that are read already; for the arguments see `measure`."""
    manifest = bundle.manifest
    report.stage(f"run the whole float model on {len(judges.frames)} frames")
    frames = judges.frames
    logits = run_whole(whole, frames, _track(report, "float"))
    report.stage("judge every cut, codec and rate" if wanted.codecs else "run the segments")
    judged = judge_codecs(bundle, frames, logits, threads, _track(report, "segments"), codecs=wanted.codecs)
    made = Atlas(
        format=FORMAT,
        name=manifest.name,
        bundle=bundle.id,
        source=manifest.provenance.source,
        target=manifest.provenance.target,
        quantization=manifest.provenance.quantization,
        machine=timing.machine(),
        threads=threads,
        frames=_frames(judges),
        agreement_is=open_judge(bundle).agreement,
        distance_is=open_judge(bundle).distance,
        ceiling=judged.ceiling.row,
        times=atlases.cut_times(
            [cut.after for cut in manifest.cuts], judged.segment_ms, [segment.macs for segment in manifest.segments]
        ),
    )
    if wanted.codecs:
        points = list(judged.points)
        if wanted.rivals:
            report.stage("send the same pixels as JPEG, WebP and AVIF")
            for rival in missing():
                report.note(f"this OpenCV cannot write {rival}, so it is left out")
            points += judge_rivals(bundle, frames, logits, whole, _track(report, "pictures"), quick=wanted.quick)
        made = _with_codecs(made, points, judged, seed=seed, rivals=wanted.rivals)
    if wanted.exits:
        report.stage("judge the exits")
        made = judge_exits(bundle, made, frames, logits)
    if wanted.variants and manifest.segments[0].variants:
        from export.variants import rows  # which needs torch

        report.stage("judge the variants")
        made = msgspec.structs.replace(made, variants=tuple(rows(bundle, frames, logits)))
    return made


def run_whole(whole: Whole, frames: Sequence[Tensor], track: Callable[[Sequence[int]], Iterable[int]]) -> Outputs:
    """The whole float model's logits, (frames, classes)."""
    return np.concatenate([whole.run(frames[number]) for number in track(range(len(frames)))])


def _with_codecs(made: Atlas, points: list[Point], judged: Judged, *, seed: int, rivals: bool) -> Atlas:
    equal = atlases.equal_quality(points, ("features",), ("picture",), atlases.AGREEMENTS, seed=seed)
    return msgspec.structs.replace(
        made,
        rows=tuple(point.row for point in points),
        equal=equal,
        verdict=atlases.judge(equal, made.times, judged.ceiling.row, rivals=rivals),
    )


def _with_clip(
    bundle: Bundle, made: Atlas, clip: Judges, whole: Whole, fps: float, threads: int, seed: int, report: Report
) -> Atlas:
    logits = run_whole(whole, clip.frames, _track(report, "float"))
    points = judge_stream(bundle, clip.frames, logits, threads, _track(report, "between frames"))
    points += judge_videos(bundle, clip.frames, logits, whole, fps, _track(report, "video codecs"))
    equal = atlases.equal_quality(points, ("stream",), ("video",), atlases.DIVERGENCES, by_kl=True, seed=seed)
    equal += atlases.equal_quality(points, ("stream",), ("video",), atlases.AGREEMENTS, seed=seed)
    return msgspec.structs.replace(
        made,
        clip=_frames(clip),
        rows=(*made.rows, *(point.row for point in points)),
        equal=(*made.equal, *equal),
    )


def _frames(judges: Judges) -> Frames:
    return Frames(n=len(judges.frames), left_out=judges.left_out, checked=judges.checked, sources=judges.sources)


def _tell(judges: Judges, report: Report) -> None:
    words = f"{len(judges.frames)} to judge with"
    if judges.checked:
        words += f"; {judges.left_out} left out, as they had a say in the bundle"
    report.note(words)
    if not judges.checked:
        report.note(
            "this bundle does not tell which frames had a say in it: give frames that kinflow export has not seen, "
            "or export it again"
        )


def _track(report: Report, words: str) -> Callable[[Sequence[int]], Iterable[int]]:
    return lambda items: report.track(items, words)
