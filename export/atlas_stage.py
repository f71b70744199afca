"""The last stage of an export: the atlas of the new bundle, from the frames that judge it anyway."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from onnx import ModelProto

from export import atlas as atlases
from export.atlas_page import to_html
from export.bench_frames import LEAST, Judges, Whole
from export.bench_measure import Wanted, judge
from export.bench_rivals import count_rivals
from export.frames import FrameSet
from export.recipe import Recipe
from export.report import Report
from runtime.datatypes import Tensor
from runtime.manifest import Bundle

LONGEST_S = 60.0  # about so long an atlas may take; with fewer frames where a model is slow
PICTURE_MS = 15.0  # to encode and decode one, near enough for planning


def write_atlas(
    bundle: Bundle, frames: FrameSet, trunk: ModelProto, recipe: Recipe, whole_ms: float, report: Report
) -> None:
    """Judge a staged bundle and write atlas.json and atlas.html into it.

    Args:
        bundle: complete but for its notes.
        frames: its judge frames are used, or some of them, spread evenly.
        trunk: the whole float model.
        recipe: says where the frames come from, and with how many threads to run.
        whole_ms: what all segments take for one frame.
        report: told what is done.
    """
    report.stage("measure the atlas")
    whole = Whole(trunk, recipe.threads)
    mine = frames.of("judge")
    count = _affordable(bundle, whole, mine, whole_ms)
    chosen = [mine[place] for place in np.linspace(0, len(mine) - 1, count).round().astype(int)]
    judges = Judges(tuple(chosen), 0, checked=True, sources=tuple(source.path.name for source in recipe.frames))
    wanted = Wanted(codecs=True, exits=True, variants=True, quick=True)
    made = judge(bundle, judges, whole, wanted, threads=recipe.threads, seed=recipe.seed, report=report)
    if made.verdict is not None:
        report.note(made.verdict.sentence)
    write(bundle.path, made)


def write(directory: Path, made: atlases.Atlas) -> None:
    """Write atlas.json and atlas.html, both or none."""
    page = to_html(made)
    (directory / "atlas.json").write_bytes(atlases.to_json(made))
    (directory / "atlas.html").write_text(page, "utf-8")


def _affordable(bundle: Bundle, whole: Whole, frames: Sequence[Tensor], whole_ms: float) -> int:
    """How many of the frames can be judged in the time, but at least LEAST where there are as many."""
    whole.run(frames[0])
    start = time.perf_counter()
    whole.run(frames[0])
    float_ms: float = (time.perf_counter() - start) * 1e3
    rates: int = sum(len(codec.rates) for cut in bundle.manifest.cuts for codec in cut.codecs)
    frame_ms = (count_rivals(quick=True) + 1) * (float_ms + PICTURE_MS) + (rates + 3) * whole_ms
    return min(len(frames), max(LEAST, round(LONGEST_S * 1e3 / frame_ms)))
