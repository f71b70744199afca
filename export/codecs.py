"""The codec stage of an export: fits the transform codec of every cut, and measures all codecs on held-back frames.

Steps, the rates, are chosen on the calibration frames: the finest are tried and ever coarser ones, and where a smooth
curve through the shares of changed answers crosses a wanted agreement lies its step.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import msgspec
import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray
from onnx import ModelProto

from export import transform_model
from export.agreement import Share, pooled
from export.codec_tables import centroids_of, make_tables
from export.cuts import Cut
from export.frames import COPIES, FrameSet, copies
from export.graph import LOGITS, Shape, extract, tensor_info, write
from export.recipe import Opened, Recipe
from export.refine import refine
from export.report import Report
from export.sensitivity import Tail, sensitivity
from export.slicing import on_wire
from export.task import Judge, Outputs, open_judge
from export.torch_graph import UnknownOperatorError
from export.transform import Array, Transform, fit, layout_of
from export.wires import Wire
from runtime.codec import CODECS, Codecs
from runtime.codec_transform import MAX_LEVEL, values_of
from runtime.datatypes import Tensor
from runtime.manifest import Bundle, CodecSpec, CutSpec, RateSpec
from runtime.segment import Segment, load_segments
from runtime.segment_onnx import session_options

AGREEMENTS = (0.60, 0.80, 0.90, 0.95, 0.98, 0.99)  # that rates are chosen for; in percent, their parameters
JPEG_QUALITIES = (50, 75, 90)
# Multiples of the step at which noise of a twelfth of its square in every coefficient costs TRIED_NATS.
TRIED = tuple(2.0 ** (power / 2) for power in range(-3, 6))
TRIED_NATS = 0.05
MOST_TRIED = 18  # with the coarser ones that follow while the answers hardly change
MAX_VALUES = 1 << 27  # of features held at once; frames are thinned out beyond
# Where the segments alone already miss an agreement, the codec may add this share of what it allows to be wrong.
ADDED_RATIO = 0.25
MAX_COPIES_BATCH = 8
SAMPLES_PER_CHANNEL = 4
MOST_FRAMES = 300  # of each role; more would only take longer


@dataclass(frozen=True, slots=True)
class _Place:
    """A cut, with what its codec is fitted on."""

    cut: Cut
    wire: Wire | None
    shape: Shape  # on the wire
    segments: Sequence[Segment]  # behind it
    features: Sequence[Tensor]  # of the calibration frames, as they travel
    looks: Sequence[Tensor]  # of other looks at the fit frames
    outputs: Outputs  # of the whole float model for the frames
    judge: Judge
    held: NDArray[np.bool_]  # (frames,): those that refinement is judged on

    def kept(self, said: Sequence[Tensor], every: int = 1) -> float:
        """The agreement of what the segments said of every so many frames."""
        return pooled(self.judge.marks(np.concatenate(said), self.outputs[::every])).share

    @property
    def thinned(self) -> int:
        """Every how many frames' features can be held at once."""
        return max(1, -(-(len(self.features) + len(self.looks)) * int(np.prod(self.shape)) // MAX_VALUES))


def fit_codecs(
    opened: Opened,
    chosen: Sequence[Cut],
    wires: Sequence[Wire | None],
    bundle: Bundle,
    frames: FrameSet,
    floating: Outputs,
    recipe: Recipe,
    report: Report,
) -> tuple[CutSpec, ...]:
    """Fit the transform codec of every cut and write its files into the bundle; every cut with what it can use."""
    rows = np.concatenate([_spread(frames.roles[role]) for role in ("fit", "threshold")])
    held = np.isin(rows, frames.roles["threshold"])
    judge = open_judge(bundle)
    segments, _ = load_segments(bundle, 0, len(chosen))
    tensors: list[Tensor] = [frames.pixels[row : row + 1] for row in rows]
    looks = _looks(frames, max(on_wire(cut.shape)[-1] for cut in chosen), recipe.seed) if chosen else []
    specs = [_plain(bundle.manifest.cuts[0], first=True)]
    for number, (cut, wire) in enumerate(zip(chosen, wires, strict=True), start=1):
        tensors, looks = ([segments[number - 1].run(tensor) for tensor in each] for each in (tensors, looks))
        behind = [segments[index] for index in range(number, len(chosen) + 1)]
        spec = _plain(bundle.manifest.cuts[number], first=False)
        place = _Place(cut, wire, spec.shape, behind, tensors, looks, floating[rows], judge, held)
        made = _fit_one(place, opened, bundle, number, recipe, report)
        specs.append(msgspec.structs.replace(spec, codecs=(*spec.codecs, made)))
    return (*specs, bundle.manifest.cuts[-1])


def _spread(rows: NDArray[np.int64]) -> NDArray[np.int64]:
    """At most MOST_FRAMES of the rows, evenly spread."""
    spread: NDArray[np.int64] = rows[np.linspace(0, rows.size - 1, min(rows.size, MOST_FRAMES)).round().astype(int)]
    return spread


def _looks(frames: FrameSet, channels: int, seed: int) -> list[Tensor]:
    """Other looks at the fit frames, as many as the matrices of the narrowest band, one vector a frame, ask for."""
    generator = np.random.default_rng(seed)
    fit_frames = [frames.pixels[row : row + 1] for row in _spread(frames.roles["fit"])]
    wanted = min(COPIES, -(-SAMPLES_PER_CHANNEL * channels // len(fit_frames)))
    return [look for frame in fit_frames for look in list(copies(frame, generator))[::-1][: wanted - 1]]


def tail_of(opened: Opened, cut: Cut) -> Tail:
    """The whole float model behind a cut."""
    maps, start = len(cut.shape) == 3, [tensor_info(cut.tensor, "float32", cut.shape)]
    batch = MAX_COPIES_BATCH if opened.simplified.batchable else 1
    if opened.evidence is not None:
        made = extract(opened.evidence, start, list(opened.evidence.graph.output), "tail")
        return Tail(made, opened.macs - cut.macs, batch, maps, evidence=True)
    trunk, shapes = opened.simplified.trunk(), opened.simplified.shapes
    end = [tensor_info(LOGITS, "float32", shapes[LOGITS][1:])]
    return Tail(extract(trunk, start, end, "tail"), opened.macs - cut.macs, batch, maps)


def floats(features: Sequence[Tensor], wire: Wire | None) -> Array:
    """Features as they travel (1, …), as numbers of the source model: (frames, positions, channels)."""
    values = np.concatenate(features).astype(np.float32)
    if wire is not None:
        values = (values - wire.zero_point.astype(np.float32)) * wire.scale
    return values.reshape(len(values), -1, values.shape[-1])


def _fit_one(
    place: _Place,
    opened: Opened,
    bundle: Bundle,
    number: int,
    recipe: Recipe,
    report: Report,
) -> CodecSpec:
    layout = layout_of(place.shape)
    report.stage(f"fit the codec of cut {number}, after {place.cut.after}")
    features = floats(place.features[:: place.thinned], place.wire)
    tail = tail_of(opened, place.cut)
    wide = features
    if place.looks:
        wide = np.concatenate([features, floats(place.looks[:: place.thinned], place.wire)])
    found, method = sensitivity(tail, wide, layout, recipe.seed, recipe.sensitivity, recipe.threads)
    transform = fit(wide, found, layout)
    del wide
    if recipe.refine_minutes:
        transform = _refined(transform, tail, features, place, recipe, report)
    files = {name: f"cuts/{number}/{name}" for name in ("encoder.onnx", "decoder.onnx", "tables.npz")}
    encoder = transform_model.encoder(transform, place.wire, place.shape)
    decoder = transform_model.decoder(transform, place.wire, place.shape)
    write(encoder, bundle.path / files["encoder.onnx"])
    write(decoder, bundle.path / files["decoder.onnx"])
    coefficients = transform.analyse(features)
    steps = _choose_steps(place, coefficients, decoder, report)
    report.note(f"sensitivity by {method}; steps " + ", ".join(f"{step:.3g}" for step in steps))
    tables = make_tables(coefficients, steps, recipe.seed)
    (bundle.path / files["tables.npz"]).write_bytes(tables.dump())
    return CodecSpec(
        name="transform",
        rates=tuple(RateSpec(parameter=round(100 * wanted)) for wanted in AGREEMENTS),
        encoder=files["encoder.onnx"],
        decoder=files["decoder.onnx"],
        tables=files["tables.npz"],
    )


def _refined(
    transform: Transform, tail: Tail, features: Array, place: _Place, recipe: Recipe, report: Report
) -> Transform:
    """The transform after as many minutes of distillation as the recipe gives, if that made it better."""
    logits, held = place.outputs[:: place.thinned], place.held[:: place.thinned]
    step = _unit(transform.analyse(features[:1]))
    try:
        made = refine(
            transform,
            tail,
            features,
            logits,
            held,
            step=step,
            minutes=recipe.refine_minutes,
            seed=recipe.seed,
            threads=recipe.threads,
        )
    except UnknownOperatorError as error:
        report.note(f"not refined: {error}")
        return transform
    verdict = "not kept" if made.transform is transform else "kept"
    report.note(
        f"{made.rounds} rounds of refinement: {made.bits_ratio:.3f} of the bits on {int(held.sum())} held-back frames, "
        f"{verdict}"
    )
    return made.transform


def _unit(coefficients: Array) -> float:
    """The step whose rounding errors in all coefficients (frames, n) cost TRIED_NATS together."""
    return float(np.sqrt(12 * 2 * TRIED_NATS / coefficients.shape[1]))


def _choose_steps(
    place: _Place,
    coefficients: Array,
    decoder: ModelProto,
    report: Report,
) -> NDArray[np.float64]:
    """The step of every rate, coarsest first: (rates,)."""
    session = ort.InferenceSession(decoder.SerializeToString(), session_options(1))
    ceiling = place.kept([_output(place.segments, features) for features in place.features])

    def kept_at(step: float) -> float:
        levels = np.clip(np.rint(coefficients / np.float32(step)), -MAX_LEVEL, MAX_LEVEL)
        restored = values_of(levels, step, centroids_of(coefficients, step))
        said = [
            _output(place.segments, session.run(None, {transform_model.COEFFICIENTS: row[np.newaxis]})[0])
            for row in restored
        ]
        return place.kept(said, place.thinned)

    tried = list(_unit(coefficients) * np.array(TRIED))
    kept = [kept_at(float(step)) for step in report.track(tried, "rates")]
    while kept[-1] > AGREEMENTS[0] and len(tried) < MOST_TRIED:
        tried.append(tried[-1] * np.sqrt(2))
        kept.append(kept_at(float(tried[-1])))
    return crossings(np.array(tried), np.array(kept), float(ceiling), len(coefficients), AGREEMENTS)


def crossings(
    steps: NDArray[np.float64], kept: NDArray[np.float64], ceiling: float, n: int, wanted: Sequence[float]
) -> NDArray[np.float64]:
    """Where agreement, as a function of the step, falls to each wanted value: (wanted,).

    The share of answers that a step changes is taken as a normal distribution function of its logarithm, fitted by
    likelihood, on top of the share that is wrong without any coding.

    Args:
        steps: tried, rising: (steps,).
        kept: the agreement at each: (steps,).
        ceiling: the agreement without coding.
        n: frames behind each share.
        wanted: agreements. One that the ceiling hardly allows is read as: the codec may add little.
    """
    normal = NormalDist()
    wrong = 1 - np.minimum(kept, ceiling)
    floor = 1 - ceiling
    logs = np.log(steps)
    best, place = -np.inf, (float(logs.mean()), 1.0)
    for centre in np.linspace(logs[0] - 1, logs[-1] + 3, 97):
        for width in np.geomspace(0.15, 3.0, 25):
            share = np.array([normal.cdf((log - centre) / width) for log in logs])
            chance = np.clip(floor + (1 - floor) * share, 1e-6, 1 - 1e-6)
            likelihood = float((n * (wrong * np.log(chance) + (1 - wrong) * np.log(1 - chance))).sum())
            if likelihood > best:
                best, place = likelihood, (float(centre), float(width))
    found = []
    for value in wanted:
        allowed = max((1 - value - floor) / (1 - floor), ADDED_RATIO * (1 - value))
        found.append(np.exp(place[0] + place[1] * normal.inv_cdf(allowed)))
    chosen: NDArray[np.float64] = np.clip(np.array(found), steps[0] / 2, steps[-1])
    return chosen


def measure_codecs(
    bundle: Bundle, features: Sequence[Sequence[Tensor]], floating: Outputs, report: Report
) -> tuple[CutSpec, ...]:
    """Every cut with the bytes of its codecs, and the agreement of the lossy ones, on the judge frames.

    Args:
        bundle: with its codecs fitted.
        features: by cut, from the frame to the logits, each (1, …), of the judge frames.
        floating: the whole float model's outputs of the same frames.
    """
    codecs = Codecs(bundle)
    segments, _ = load_segments(bundle, 0, len(bundle.manifest.segments) - 1)
    judge = open_judge(bundle)
    cuts: list[CutSpec] = []
    for number, cut in enumerate(bundle.manifest.cuts):
        behind = [segments[index] for index in range(number, len(segments))]
        measured = []
        for spec in cut.codecs:
            rates = []
            for rate in report.track(range(len(spec.rates)), f"{spec.name} at cut {number}"):
                codec = codecs.get(number, CODECS[spec.name], rate)
                payloads = [codec.encode(tensor) for tensor in features[number]]
                known = _sizes(spec.rates[rate], payloads)
                if spec.name != "raw":
                    said = [_output(behind, codec.decode(payload)) for payload in payloads]
                    known = _agreeing(known, pooled(judge.marks(np.concatenate(said), floating)))
                rates.append(known)
            measured.append(msgspec.structs.replace(spec, rates=tuple(rates)))
        cuts.append(msgspec.structs.replace(cut, codecs=tuple(measured)))
    return tuple(cuts)


def _plain(cut: CutSpec, *, first: bool) -> CutSpec:
    """A cut with the codecs that need no fitting."""
    codecs = [CodecSpec(name="raw", rates=(RateSpec(parameter=0),))]
    if first:
        codecs.append(CodecSpec(name="jpeg", rates=tuple(RateSpec(parameter=value) for value in JPEG_QUALITIES)))
    return msgspec.structs.replace(cut, codecs=tuple(codecs))


def _output(segments: Iterable[Segment], tensor: Tensor) -> Tensor:
    for segment in segments:
        tensor = segment.run(tensor)
    return tensor


def _sizes(rate: RateSpec, payloads: Sequence[bytes]) -> RateSpec:
    sizes = [len(payload) for payload in payloads]
    at: Mapping[str, int] = {f"bytes_p{share}": int(np.percentile(sizes, share, method="higher")) for share in (50, 95)}
    return msgspec.structs.replace(rate, **at)


def _agreeing(rate: RateSpec, found: Share) -> RateSpec:
    return msgspec.structs.replace(
        rate,
        agreement=round(found.share, 6),
        agreement_low=round(found.low, 6),
        agreement_high=round(found.high, 6),
        n=found.n,
    )
