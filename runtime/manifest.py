"""The bundle's manifest: one definition, loaded by every tier and saved by `export` (docs/bundle.md).

The manifest lists every file with its size and SHA-256, and the SHA-256 of the manifest itself is the bundle id, so
one id stands for every byte that decides an answer.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec

from runtime.bundle_files import present, verified
from runtime.errors import BundleError
from runtime.gate_spec import GateSpec

FORMAT = 3  # 3: tasks; 2: codec transform, tables of exit thresholds, variants; both and 1 are read
MANIFEST = "manifest.json"
ID_BYTES = 8  # of the bundle id, in a packet and in a topic
# Files that may lie beside the contract without being part of it: measurements, which differ from machine to machine.
NOTES = ("atlas.json", "atlas.html", "profile.json")


Side = Annotated[int, msgspec.Meta(ge=1, le=1 << 16)]
MAX_ELEMENTS = 1 << 26  # of features at a cut; what a packet can never hold even when compressed well


class _Struct(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    pass


class FileSpec(_Struct, frozen=True):
    """One file of the bundle."""

    path: str  # relative, with forward slashes
    size_bytes: int
    sha256: str


class PreprocessSpec(_Struct, frozen=True):
    """How a frame of any size becomes the model's pixels, uint8 (1, height, width, 3) RGB.

    Scaling to the numbers that the network was trained on is part of segment 0, so cut 0 is plain pixels.
    """

    height: Side
    width: Side
    fit: Literal["crop", "stretch", "letterbox"] = "crop"  # crop: the centre, at the model's aspect ratio
    crop_ratio: Annotated[float, msgspec.Meta(gt=0, le=1)] = 1.0  # share of the largest such crop that is kept


class RateSpec(_Struct, frozen=True):
    """One operating point of a codec, with what it was measured to cost on held-back frames."""

    parameter: float  # the codec's own: JPEG quality, target agreement in percent; 0 where a codec has none
    bytes_p50: int | None = None  # payload without the packet header
    bytes_p95: int | None = None
    agreement: float | None = None  # share of judge frames answered as the whole float model does
    agreement_low: float | None = None  # 95 % Clopper-Pearson interval
    agreement_high: float | None = None
    n: int | None = None  # judge frames


class CodecSpec(_Struct, frozen=True):
    """A codec that a cut can be sent with."""

    name: str  # a key of runtime.codec.CODECS
    rates: tuple[RateSpec, ...]
    encoder: str | None = None  # graph: features → coefficients; codec transform only, as are the next two
    decoder: str | None = None  # graph: coefficients → features
    tables: str | None = None  # .npz, runtime.codec_transform.Tables

    @property
    def files(self) -> tuple[str, ...]:
        """The files it needs."""
        return tuple(name for name in (self.encoder, self.decoder, self.tables) if name is not None)


class CutSpec(_Struct, frozen=True):
    """A place where features may leave a tier. Cut k lies before segment k; the last cut is the model's output."""

    after: str  # the last layer before the cut, in words of the source model
    tensor: str  # the tensor's name in the source graph
    shape: tuple[Side, ...]  # as it travels, without the batch: (height, width, channels), (tokens, channels) or (n,)
    dtype: Literal["uint8", "float32"]
    codecs: tuple[CodecSpec, ...] = ()


class Measured(_Struct, frozen=True):
    """What an exit did on the frames it was judged on, none of which had a part in fitting it.

    Judged as the cascade runs: an exit answers only frames that the exits before it have left.
    """

    coverage: float  # share of all judged frames that it answers
    agreement: float | None  # among the answered; None when there were none
    agreement_low: float | None  # 95 % Clopper-Pearson interval
    agreement_high: float | None
    answered: int
    n: int  # judged frames
    withheld: int = 0  # frames it was sure of, but that lay beyond its distance limit
    accuracy: float | None = None  # among the answered, where labels were given
    accuracy_low: float | None = None  # 95 % Clopper-Pearson interval
    accuracy_high: float | None = None
    # Where the promise is about certain frames, as those with something in a detector's.
    owed: int | None = None  # how many there are
    missed: int | None = None  # of them, answered wrongly at this exit or one before
    missed_high: float | None = None  # upper end of the 95 % Clopper-Pearson interval of their share
    spared: int | None = None  # of the others, answered at this exit or one before


class OperatingPoint(_Struct, frozen=True):
    """One row of an exit's table: the threshold that keeps one agreement, with the same row in force at every exit."""

    agreement: float
    threshold: float | None  # None: it never answers at this agreement
    measured: Measured | None = None


class ExitSpec(_Struct, frozen=True):
    """An exit head. The last exit has no file: its logits are the last segment's output."""

    cut: int
    file: str | None
    temperature: Annotated[float, msgspec.Meta(gt=0)]
    threshold: float | None  # least confidence at which it answers; None: never before the uplink is lost
    agreement: float  # the target the threshold was chosen for; 1.0 for the last exit
    measured: Measured | None = None
    points: tuple[OperatingPoint, ...] = ()  # by rising agreement, the bundle's own included; empty in format 1
    distance_limit: float | None = None  # a frame farther from the fit frames is never answered; None: no guard
    kind: str = "linear"  # what the head is made of, in words
    macs: int = 0  # of the head for one frame
    note: str | None = None  # why it never answers, where it does not


class VariantSpec(_Struct, frozen=True):
    """A smaller stand-in for a segment: same input, same output at the same scale, so every deeper segment takes it."""

    file: str
    macs: int
    max_batch_size: Annotated[int, msgspec.Meta(ge=1)]
    cosine: float  # of the features at its cut with the segment's own, mean over judge frames
    agreement: float  # of all judge frames, through all deeper segments, with the whole float model
    agreement_low: float  # 95 % Clopper-Pearson interval
    agreement_high: float
    n: int  # judge frames
    exits: tuple[ExitSpec, ...]  # in place of the manifest's: thresholds tested, and measured, behind this variant


class SegmentSpec(_Struct, frozen=True):
    """The layers between cut k and cut k + 1: one ONNX file with one input and one output."""

    file: str
    macs: int  # multiply-accumulates for one frame
    max_batch_size: Annotated[int, msgspec.Meta(ge=1)] = (
        1  # the largest batch for which each answer was proved equal to that of a batch of one
    )
    variants: tuple[
        VariantSpec, ...
    ] = ()  # of the first segment only; variant 1 is the most faithful, the last the fastest


class TierSpec(_Struct, frozen=True):
    """The share of the chain a tier takes unless its config says otherwise."""

    name: str
    last_segment: int


class Provenance(_Struct, frozen=True):
    """Where the bundle comes from."""

    source: str
    tools: dict[str, str]  # name → version
    target: str
    quantization: str
    opset: int
    seed: int
    frames: dict[str, int]  # role (fit, threshold, judge) → count
    frames_sha256: str  # over the pixels of all frames, in order
    options: dict[str, str] = {}  # of the export: how the same detector is opened, what promises rest on


class Manifest(_Struct, frozen=True):
    """The contract that all tiers share."""

    format: Annotated[int, msgspec.Meta(ge=1)]
    name: str
    task: str  # a key of runtime.task.TASKS
    labels: str  # file with one label a line
    preprocess: PreprocessSpec
    segments: tuple[SegmentSpec, ...]
    cuts: tuple[CutSpec, ...]  # one more than segments
    exits: tuple[ExitSpec, ...]  # by cut, the model's own last
    tiers: tuple[TierSpec, ...]
    golden: str  # .npz: frames, cut_1 … cut_S: inputs and what every segment made of them
    proof: dict[str, float]  # what export measured before it dared to write this
    provenance: Provenance
    files: tuple[FileSpec, ...]
    settings: dict[str, Any] = {}  # the task's own
    gate: GateSpec | None = None  # None: nothing was fitted


@dataclass(frozen=True, slots=True)
class Bundle:
    """A bundle on disk whose manifest has been read and whose structure has been checked."""

    path: Path
    manifest: Manifest
    id: str  # 64 hexadecimal digits
    labels: tuple[str, ...]

    @property
    def key(self) -> bytes:
        """The part of the id that packets carry."""
        return bytes.fromhex(self.id)[:ID_BYTES]

    @property
    def key8(self) -> str:
        """The part of the id that topics carry: 8 hexadecimal digits."""
        return self.id[:8]

    def exit_at(self, cut: int) -> ExitSpec | None:
        """The exit that hangs at `cut`, if there is one."""
        return next((spec for spec in self.manifest.exits if spec.cut == cut), None)

    def file(self, relative: str) -> Path:
        """The path of a listed file, after checking its SHA-256.

        Raises:
            BundleError: the file is not listed, is missing, or is not the one that was exported.
        """
        spec = next((spec for spec in self.manifest.files if spec.path == relative), None)
        if spec is None:
            raise BundleError(f"{relative} is not in the manifest's list of files; export the bundle again")
        return verified(self.path, spec.path, spec.size_bytes, spec.sha256)


def save(manifest: Manifest, directory: Path) -> str:
    """Write `manifest` into `directory` and return the bundle id."""
    data = msgspec.json.format(msgspec.json.encode(manifest), indent=1)
    (directory / MANIFEST).write_bytes(data)
    return hashlib.sha256(data).hexdigest()


def load(path: Path) -> Bundle:
    """Read the bundle at `path` and check its structure, and that every file is there with its size.

    Digests are checked when a file is used (`Bundle.file`) or by `verify_files`.

    Raises:
        BundleError: with one sentence that says what is wrong.
    """
    try:
        data = (path / MANIFEST).read_bytes()
    except OSError as error:
        raise BundleError(f"{path} is not a bundle: {MANIFEST} cannot be read ({error.strerror})") from error
    manifest = _decode(data)
    _check_structure(manifest)
    for spec in manifest.files:
        present(path, spec.path, spec.size_bytes)
    bundle = Bundle(path=path, manifest=manifest, id=hashlib.sha256(data).hexdigest(), labels=())
    try:
        labels = bundle.file(manifest.labels).read_text("utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise BundleError(f"{manifest.labels} is no UTF-8 text; export the bundle again") from error
    return Bundle(path=path, manifest=manifest, id=bundle.id, labels=tuple(labels))


def verify_files(bundle: Bundle) -> None:
    """Check the SHA-256 of every file, and that nothing lies in the bundle that the manifest does not know.

    Raises:
        BundleError: names the first file that is wrong.
    """
    known = {spec.path for spec in bundle.manifest.files}
    for spec in bundle.manifest.files:
        verified(bundle.path, spec.path, spec.size_bytes, spec.sha256)
    for path in sorted(bundle.path.rglob("*")):
        relative = path.relative_to(bundle.path).as_posix()
        if path.is_file() and relative not in known and relative != MANIFEST and relative not in NOTES:
            raise BundleError(f"{relative} lies in the bundle but not in its manifest; remove it")


def _decode(data: bytes) -> Manifest:
    try:
        number = msgspec.json.decode(data, type=_Format).format
        if number > FORMAT:
            raise BundleError(f"the bundle has format {number}, this Kinflow reads up to {FORMAT}; update Kinflow")
        return msgspec.json.decode(data, type=Manifest)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise BundleError(f"{MANIFEST} is damaged: {error}") from error


class _Format(msgspec.Struct):
    format: int


def _check_structure(manifest: Manifest) -> None:
    segments = len(manifest.segments)
    if segments == 0 or len(manifest.cuts) != segments + 1:
        raise BundleError(
            f"{MANIFEST} is damaged: {segments} segments need {segments + 1} cuts, not {len(manifest.cuts)}"
        )
    pixels = (manifest.preprocess.height, manifest.preprocess.width, 3)
    if manifest.cuts[0].shape != pixels or manifest.cuts[0].dtype != "uint8":
        raise BundleError(f"{MANIFEST} is damaged: cut 0 must be the frame, uint8 {pixels}")
    if any(math.prod(spec.shape) > MAX_ELEMENTS for spec in manifest.cuts):
        raise BundleError(f"{MANIFEST} is damaged: a cut has more than {MAX_ELEMENTS} elements")
    _check_exits(manifest.exits, segments)
    for variant in manifest.segments[0].variants:
        _check_exits(variant.exits, segments)
        if [spec.file for spec in variant.exits] != [spec.file for spec in manifest.exits]:
            raise BundleError(f"{MANIFEST} is damaged: the exits behind {variant.file} are not the bundle's")
    if any(spec.variants for spec in manifest.segments[1:]):
        raise BundleError(f"{MANIFEST} is damaged: only the first segment may have variants")
    lasts = [spec.last_segment for spec in manifest.tiers]
    if lasts != sorted(set(lasts)) or not lasts or lasts[-1] != segments - 1 or lasts[0] < 0:
        raise BundleError(f"{MANIFEST} is damaged: tiers must take all {segments} segments in order, not {lasts}")
    listed = {spec.path for spec in manifest.files}
    used = [manifest.labels, manifest.golden, *(spec.file for spec in manifest.segments)]
    used += [variant.file for variant in manifest.segments[0].variants]
    used += [name for cut in manifest.cuts for codec in cut.codecs for name in codec.files]
    for name in [*used, *(spec.file for spec in manifest.exits if spec.file is not None)]:
        if name not in listed:
            raise BundleError(f"{MANIFEST} is damaged: {name} is used but not in the list of files")


def _check_exits(exits: tuple[ExitSpec, ...], segments: int) -> None:
    cuts = [spec.cut for spec in exits]
    if cuts != sorted(set(cuts)) or not cuts or cuts[-1] != segments or cuts[0] < 1:
        raise BundleError(f"{MANIFEST} is damaged: exits must be in order and end with the model's own, not {cuts}")
    if any(_unlike_table(spec, exits[0]) for spec in exits[:-1]):
        raise BundleError(f"{MANIFEST} is damaged: the exits' tables of agreements differ or lack the exit's own")
    if any((spec.file is None) != (spec.cut == segments) for spec in exits):
        raise BundleError(f"{MANIFEST} is damaged: every exit but the last needs a file")


def _unlike_table(spec: ExitSpec, first: ExitSpec) -> bool:
    table = {point.agreement: point.threshold for point in spec.points}
    if list(table) != [point.agreement for point in first.points]:
        return True
    return bool(table) and table.get(spec.agreement, math.nan) != spec.threshold
