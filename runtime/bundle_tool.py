"""The command `kinflow bundle`: show what a bundle holds, and verify it on the machine that is to run it."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import click
import msgspec
import numpy as np
import onnxruntime as ort

from runtime import cascade
from runtime.datatypes import Tensor
from runtime.errors import BundleError
from runtime.gate_spec import GateSpec
from runtime.manifest import Bundle, CutSpec, ExitSpec, OperatingPoint, load, verify_files
from runtime.segment import load_segments
from runtime.variant import with_each_variant

COSINE = 0.999  # of the logits, where another processor does not give the very same numbers
SAME = 0.9  # of what two answers can have in common: a label has all or nothing, boxes a share


class Verified(msgspec.Struct, frozen=True):
    """What `verify` found."""

    id: str
    frames: int
    bit_identical: bool  # else: the same answers, within COSINE or SAME
    likeness: float  # the least of any golden frame: the cosine of logits, the F1 of boxes
    onnxruntime: str


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def bundle_group() -> None:
    """Show or verify a bundle."""


@bundle_group.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print the manifest as JSON.")
def show(bundle: Path, as_json: bool) -> None:
    """Show segments, cuts, exits, and what was measured for each when the bundle was made."""
    loaded = load(bundle)
    if as_json:
        data = msgspec.json.encode({"id": loaded.id, "manifest": loaded.manifest})
        click.echo(msgspec.json.format(data, indent=1).decode())
    else:
        click.echo(describe(loaded))


@bundle_group.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print what was found as JSON.")
def verify(bundle: Path, as_json: bool) -> None:
    """Check structure and digests, and run the golden frames through the onnxruntime of this machine."""
    found = verify_bundle(bundle)
    if as_json:
        click.echo(msgspec.json.encode(found).decode())
        return
    how = (
        "bit for bit as exported"
        if found.bit_identical
        else f"within tolerance: the same answers, likeness {found.likeness:.6f} or more"
    )
    click.echo(f"{bundle} is sound: {found.frames} golden frames, {how} (onnxruntime {found.onnxruntime})")


def verify_bundle(path: Path) -> Verified:
    """Check a bundle from its structure to what its segments compute here.

    Raises:
        BundleError: with one sentence that says what is wrong.
    """
    bundle = load(path)
    verify_files(bundle)
    golden = _golden(bundle)
    segments, heads = load_segments(bundle, 0, len(bundle.manifest.segments) - 1)
    tier = cascade.Tier(bundle, segments, heads)
    cascade.warm_up(tier)
    identical, least = True, 1.0
    for seen in with_each_variant(bundle)[1:]:
        made, _ = load_segments(seen, 0, 0)
        cascade.warm_up(cascade.Tier(seen, made, {}))
    for row, frame in enumerate(golden["frames"]):
        tensor: Tensor = frame[np.newaxis]
        for index, segment in segments.items():
            tensor = segment.run(tensor)
            expected = golden[f"cut_{index + 1}"][row : row + 1]
            _check_shape(tensor, expected, index)
            identical = identical and np.array_equal(tensor, expected)
            if index + 1 in heads:
                heads[index + 1].run(tensor)
        wanted = golden[f"cut_{len(segments)}"][row]
        same = _share(tier, tensor[0], wanted)
        least = min(least, _cosine(tensor[0].ravel(), wanted.ravel()) if wanted.ndim == 1 else same)
        if same < SAME or (wanted.ndim == 1 and least < COSINE):
            raise BundleError(
                f"onnxruntime {ort.__version__} on this machine gives another answer than the exporter did for golden "
                f"frame {row} (likeness {least:.4f}); export the bundle with a --target for this machine"
            )
    return Verified(bundle.id, len(golden["frames"]), identical, least, ort.__version__)


def describe(bundle: Bundle) -> str:
    """The bundle in words and tables, for a person."""
    manifest = bundle.manifest
    spec, made = manifest.preprocess, manifest.provenance
    frames = ", ".join(f"{count} {role}" for role, count in made.frames.items())
    tiers = {tier.last_segment: tier.name for tier in manifest.tiers}
    parts = [
        f"{manifest.name} ({bundle.id[:16]}): {_classes(len(bundle.labels))}, {spec.height}x{spec.width} pixels",
        f"source: {made.source}",
        f"quantization: {made.quantization} (target {made.target}, opset {made.opset})",
        f"frames: {frames}" + (f", {made.options['frames']}" if "frames" in made.options else ""),
        "",
        _table(
            ("segment", "file", "bytes", "MACs", "max batch", "tier ends"),
            [
                (
                    str(index),
                    segment.file,
                    f"{_size_bytes(bundle, segment.file):,}",
                    f"{segment.macs:,}",
                    str(segment.max_batch_size),
                    tiers.get(index, ""),
                )
                for index, segment in enumerate(manifest.segments)
            ],
        ),
        *_variants(bundle),
        "",
        _table(("cut", "after", "shape", "dtype", "bytes p50 by codec"), _cut_rows(manifest.cuts)),
        "",
        _table(
            ("exit", "head", "MACs", "target", "threshold", "answers", "agreement [95 %]"), _exit_rows(manifest.exits)
        ),
        *(f"exit {spec.cut} never answers: {spec.note}" for spec in manifest.exits if spec.note is not None),
        *_gate(manifest.gate),
        "",
        "proof: " + ", ".join(f"{key} {value:g}" for key, value in manifest.proof.items()),
    ]
    return "\n".join(parts)


def _gate(spec: GateSpec | None) -> list[str]:
    """What the gate does, where one was fitted."""
    if spec is None:
        return []
    if spec.threshold is None or spec.repeated is None:
        return [f"the gate never repeats an answer: {spec.note}"]
    words = f"gate: repeats answers up to a change of {spec.threshold:.1f}, {spec.repeated:.0%} of the fit frames"
    if spec.judged_repeated is not None and spec.judged_agreement is not None:
        words += f"; of {spec.judged_on} held-back frames {spec.judged_repeated:.0%}, F1 {spec.judged_agreement:.3f}"
        words += f", at least {spec.judged_agreement_low:.3f}"
    return [words]


def _classes(count: int) -> str:
    return "1 class" if count == 1 else f"{count} classes"


def _variants(bundle: Bundle) -> list[str]:
    """A table of the first segment's variants, where it has some."""
    rows = [
        (
            str(number),
            spec.file,
            f"{_size_bytes(bundle, spec.file):,}",
            f"{spec.macs:,}",
            f"{spec.cosine:.4f}",
            f"{spec.agreement:.3f} [{spec.agreement_low:.3f}, {spec.agreement_high:.3f}]",
        )
        for number, spec in enumerate(bundle.manifest.segments[0].variants, start=1)
    ]
    head = ("variant of segment 0", "file", "bytes", "MACs", "cosine", "agreement [95 %]")
    return ["", _table(head, rows)] if rows else []


def _cut_rows(cuts: Sequence[CutSpec]) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = []
    for index, cut in enumerate(cuts):
        codecs = [
            f"{codec.name}{f':{rate.parameter:g}' if len(codec.rates) > 1 else ''} {rate.bytes_p50:,}"
            for codec in cut.codecs
            for rate in codec.rates
            if rate.bytes_p50 is not None
        ]
        rows.append((str(index), cut.after, "x".join(map(str, cut.shape)), cut.dtype, ", ".join(codecs)))
    return rows


def _exit_rows(exits: Sequence[ExitSpec]) -> list[tuple[str, ...]]:
    """A row for every agreement that an exit has a threshold for; the bundle's own has a star."""
    rows: list[tuple[str, ...]] = []
    for spec in exits:
        own = OperatingPoint(agreement=spec.agreement, threshold=spec.threshold, measured=spec.measured)
        for place, point in enumerate(spec.points or (own,)):
            measured = point.measured
            answers = agreement = ""
            if measured is not None:
                answers = f"{measured.coverage:.0%} of {measured.n}"
                if measured.owed:
                    agreement = f"missed {measured.missed} of {measured.owed} with something"
                elif measured.agreement is not None:
                    agreement = (
                        f"{measured.agreement:.3f} [{measured.agreement_low:.3f}, {measured.agreement_high:.3f}]"
                    )
            head = (str(spec.cut), "the model's own" if spec.file is None else spec.kind, f"{spec.macs:,}")
            star = " *" if spec.points and point.agreement == spec.agreement else ""
            threshold = "none: never" if point.threshold is None else f"{point.threshold:.3f}"
            rows.append(
                (*(head if place == 0 else ("", "", "")), f"{point.agreement:g}{star}", threshold, answers, agreement)
            )
    return rows


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[column]) for row in [head, *rows]) for column in range(len(head))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in [head, *rows]]
    return "\n".join(line.rstrip() for line in lines)


def _size_bytes(bundle: Bundle, file: str) -> int:
    return next(spec.size_bytes for spec in bundle.manifest.files if spec.path == file)


def _golden(bundle: Bundle) -> Mapping[str, Tensor]:
    wanted = ["frames", *(f"cut_{cut}" for cut in range(1, len(bundle.manifest.cuts)))]
    path = bundle.file(bundle.manifest.golden)
    try:
        with np.load(path, allow_pickle=False) as arrays:
            golden = {name: arrays[name] for name in wanted}
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise BundleError(f"{bundle.manifest.golden} is damaged: {error}; export the bundle again") from error
    if any(len(array) != len(golden["frames"]) or not len(array) for array in golden.values()):
        raise BundleError(f"{bundle.manifest.golden} is damaged: its arrays differ in length; export the bundle again")
    return golden


def _check_shape(tensor: Tensor, expected: Tensor, index: int) -> None:
    if tensor.shape != expected.shape or tensor.dtype != expected.dtype:
        raise BundleError(
            f"segment {index} gives {tensor.shape} {tensor.dtype}, its golden vector is {expected.shape} "
            f"{expected.dtype}; export the bundle again"
        )


def _share(tier: cascade.Tier, output: Tensor, wanted: Tensor) -> float:
    last = tier.bundle.manifest.exits[-1]
    same, total = tier.task.compare(tier.task.read(output, last).answer, tier.task.read(wanted, last).answer)
    return same / total


def _cosine(left: Tensor, right: Tensor) -> float:
    a, b = left.astype(np.float64), right.astype(np.float64)
    norm = float(np.linalg.norm(a) * np.linalg.norm(b))
    return float(a @ b) / norm if norm > 0 else float(np.array_equal(a, b))
