from __future__ import annotations

import hashlib
import json
from pathlib import Path

import msgspec
import numpy as np
import pytest
from click.testing import CliRunner

from runtime.bundle_tool import bundle_group, describe, verify_bundle
from runtime.datatypes import Tensor
from runtime.errors import BundleError
from runtime.gate_spec import GateSpec
from runtime.manifest import FileSpec, Manifest, VariantSpec, load, save
from runtime.segment import load_segments


def rewrite(path: Path, file: str, data: bytes) -> None:
    """Replace a file as an exporter would: its digest in the manifest is right."""
    (path / file).write_bytes(data)
    manifest = load_unchecked(path)
    files = tuple(
        FileSpec(path=file, size_bytes=len(data), sha256=hashlib.sha256(data).hexdigest())
        if spec.path == file
        else spec
        for spec in manifest.files
    )
    save(msgspec.structs.replace(manifest, files=files), path)


def load_unchecked(path: Path) -> Manifest:
    return msgspec.json.decode((path / "manifest.json").read_bytes(), type=Manifest)


def write_golden(path: Path, nudge: float = 0.0, drop: str = "") -> None:
    bundle = load(path)
    frames = np.load(path / bundle.manifest.golden)["frames"]
    segments, _ = load_segments(bundle, 0, len(bundle.manifest.segments) - 1)
    arrays: dict[str, Tensor] = {"frames": frames}
    tensor: Tensor = frames
    for index, segment in segments.items():
        tensor = np.concatenate([segment.run(tensor[row : row + 1]) for row in range(len(frames))])
        arrays[f"cut_{index + 1}"] = tensor
    arrays[f"cut_{len(segments)}"] = tensor + np.float32(nudge)
    arrays.pop(drop, None)
    scratch = path.parent / "golden.npz"
    np.savez(scratch, **arrays)  # type: ignore[arg-type]  # numpy's stubs take its flags for the names of arrays
    rewrite(path, bundle.manifest.golden, scratch.read_bytes())


def add_variant(path: Path, file: str) -> None:
    """Say that a file of the bundle is a variant of its first segment."""
    known = load_unchecked(path)
    first, *rest = known.segments
    variant = VariantSpec(
        file=file,
        macs=1,
        max_batch_size=1,
        cosine=1,
        agreement=1,
        agreement_low=0.9,
        agreement_high=1,
        n=30,
        exits=known.exits,
    )
    segments = (msgspec.structs.replace(first, variants=(variant,)), *rest)
    save(msgspec.structs.replace(known, segments=segments), path)


@pytest.fixture
def sound(tiny_bundle: Path) -> Path:
    write_golden(tiny_bundle)
    return tiny_bundle


def test_variants_are_run_too(sound: Path) -> None:
    add_variant(sound, "segments/0.onnx")
    assert verify_bundle(sound).bit_identical
    add_variant(sound, "segments/1.onnx")
    with pytest.raises(BundleError):
        verify_bundle(sound)


def test_a_sound_bundle_is_bit_identical(sound: Path) -> None:
    found = verify_bundle(sound)
    assert found.bit_identical
    assert found.frames == 2
    result = CliRunner().invoke(bundle_group, ["verify", str(sound)])
    assert "is sound: 2 golden frames, bit for bit as exported" in result.stdout
    assert json.loads(CliRunner().invoke(bundle_group, ["verify", str(sound), "--json"]).stdout)["id"] == load(sound).id


def test_another_processor_may_differ_a_little(sound: Path) -> None:
    write_golden(sound, nudge=1e-6)
    found = verify_bundle(sound)
    assert not found.bit_identical
    assert found.likeness > 0.999
    assert "within tolerance" in CliRunner().invoke(bundle_group, ["verify", str(sound)]).stdout


def test_another_answer_is_refused(sound: Path) -> None:
    bundle = load(sound)
    arrays = dict(np.load(sound / bundle.manifest.golden))
    arrays["cut_3"] = -arrays["cut_3"]
    scratch = sound.parent / "golden.npz"
    np.savez(scratch, **arrays)
    rewrite(sound, bundle.manifest.golden, scratch.read_bytes())
    with pytest.raises(BundleError, match="gives another answer than the exporter did for golden frame 0"):
        verify_bundle(sound)


@pytest.mark.parametrize("drop", ["frames", "cut_1", "cut_3"])
def test_golden_vectors_that_lack_an_array(drop: str, sound: Path) -> None:
    write_golden(sound, drop=drop)
    with pytest.raises(BundleError, match="is damaged"):
        verify_bundle(sound)


def test_golden_vectors_that_are_none(sound: Path) -> None:
    rewrite(sound, load(sound).manifest.golden, b"no zip file")
    with pytest.raises(BundleError, match="is damaged"):
        verify_bundle(sound)


@pytest.mark.parametrize("length", [0, 100])
def test_a_truncated_segment_with_a_right_digest(length: int, sound: Path) -> None:
    file = load(sound).manifest.segments[1].file
    rewrite(sound, file, (sound / file).read_bytes()[:length])
    with pytest.raises(BundleError) as caught:
        verify_bundle(sound)
    assert file in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_damaged_after_export(sound: Path) -> None:
    path = sound / load(sound).manifest.segments[1].file
    data = bytearray(path.read_bytes())
    data[40] ^= 1
    path.write_bytes(data)
    with pytest.raises(BundleError, match="SHA-256 differs"):
        verify_bundle(sound)


def test_show_tells_every_segment_cut_and_exit(sound: Path) -> None:
    bundle = load(sound)
    text = describe(bundle)
    for words in (*(spec.file for spec in bundle.manifest.segments), "cut", "exit", "max batch", bundle.id[:16]):
        assert words in text
    result = CliRunner().invoke(bundle_group, ["show", str(sound), "--json"])
    assert json.loads(result.stdout)["id"] == bundle.id
    assert CliRunner().invoke(bundle_group, ["show", str(sound)]).stdout == text + "\n"


@pytest.mark.parametrize(
    ("gate", "words"),
    [
        (None, None),
        (GateSpec(threshold=None, note="give a clip"), "never repeats an answer: give a clip"),
        (GateSpec(threshold=12.5, repeated=0.25), "up to a change of 12.5, 25% of the fit frames"),
        (
            GateSpec(
                threshold=12.5,
                repeated=0.25,
                judged_on=80,
                judged_repeated=0.5,
                judged_agreement=0.97,
                judged_agreement_low=0.951,
            ),
            "of 80 held-back frames 50%, F1 0.970, at least 0.951",
        ),
    ],
)
def test_show_tells_what_the_gate_does(sound: Path, gate: GateSpec | None, words: str | None) -> None:
    save(msgspec.structs.replace(load(sound).manifest, gate=gate), sound)
    text = describe(load(sound))
    assert ("gate" in text) == (words is not None)
    assert words is None or words in text
