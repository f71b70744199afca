from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from runtime.errors import BundleError
from runtime.manifest import FORMAT, MANIFEST, NOTES, load, save, verify_files
from runtime.task import open_task

Change = Callable[[dict[str, Any]], None]


def change(bundle: Path, how: Change) -> None:
    path = bundle / MANIFEST
    tree = json.loads(path.read_text())
    how(tree)
    path.write_text(json.dumps(tree))


def refusal(bundle: Path) -> str:
    def use() -> None:
        verify_files(load(bundle))
        open_task(load(bundle))

    with pytest.raises(BundleError) as caught:
        use()
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 65
    return str(caught.value)


def test_what_is_saved_is_loaded(shared_bundle: Path, tmp_path: Path) -> None:
    bundle = load(shared_bundle)
    assert save(bundle.manifest, tmp_path) == save(bundle.manifest, tmp_path)
    assert json.loads((tmp_path / MANIFEST).read_text()) == json.loads((shared_bundle / MANIFEST).read_text())
    assert bundle.key == bytes.fromhex(bundle.id)[:8]
    assert bundle.key8 == bundle.id[:8]
    assert bundle.exit_at(len(bundle.manifest.segments)) == bundle.manifest.exits[-1]
    assert bundle.exit_at(0) is None
    verify_files(bundle)


def test_the_id_stands_for_every_field(tiny_bundle: Path) -> None:
    before = load(tiny_bundle).id
    change(tiny_bundle, lambda tree: tree["exits"][0].update(temperature=2.5))
    assert load(tiny_bundle).id != before


def test_a_manifest_of_format_1_knows_no_tables_and_no_guards(tiny_bundle: Path) -> None:
    def age(tree: dict[str, Any]) -> None:
        tree["format"] = 1
        for spec in tree["exits"]:
            for field in ("points", "distance_limit", "kind", "macs", "note"):
                del spec[field]

    change(tiny_bundle, age)
    spec = load(tiny_bundle).manifest.exits[0]
    assert (spec.points, spec.distance_limit) == ((), None)


@pytest.mark.parametrize(
    "tables",
    [
        ([{"agreement": 0.9, "threshold": 0.6}], []),
        ([{"agreement": 0.9, "threshold": 0.7}], [{"agreement": 0.9, "threshold": 0.6}]),
        ([{"agreement": 0.8, "threshold": 0.6}], [{"agreement": 0.8, "threshold": 0.6}]),
    ],
    ids=["one exit has none", "another threshold", "without the exit's own"],
)
def test_tables_that_do_not_fit_are_refused(tables: tuple[list[Any], list[Any]], tiny_bundle: Path) -> None:
    def put(tree: dict[str, Any]) -> None:
        for spec, table in zip(tree["exits"], tables, strict=False):
            spec["points"] = table

    change(tiny_bundle, put)
    assert "tables of agreements differ or lack the exit's own" in refusal(tiny_bundle)


def test_no_manifest(tmp_path: Path) -> None:
    assert "is not a bundle" in refusal(tmp_path)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"format": "one"}', '{"format": 1}'])
def test_a_manifest_that_is_none(text: str, tiny_bundle: Path) -> None:
    (tiny_bundle / MANIFEST).write_text(text)
    assert "manifest.json is damaged" in refusal(tiny_bundle)


def test_a_newer_format_is_refused_whatever_else_it_holds(tiny_bundle: Path) -> None:
    change(tiny_bundle, lambda tree: tree.update(format=FORMAT + 1, invented=True))
    assert f"has format {FORMAT + 1}" in refusal(tiny_bundle)


STRUCTURE: dict[str, tuple[Change, str]] = {
    "unknown field": (lambda tree: tree.update(invented=1), "unknown field `invented`"),
    "unknown field inside": (lambda tree: tree["cuts"][0].update(invented=1), "invented"),
    "missing field": (lambda tree: tree.pop("labels"), "missing required field `labels`"),
    "wrong type": (lambda tree: tree["segments"][0].update(macs="many"), "macs"),
    "no segments": (lambda tree: tree.update(segments=[]), "0 segments need 1 cuts"),
    "a cut too few": (lambda tree: tree["cuts"].pop(), "segments need"),
    "exits out of order": (lambda tree: tree["exits"].reverse(), "exits must be in order"),
    "no last exit": (lambda tree: tree["exits"].pop(), "exits must be in order"),
    "an exit without file": (lambda tree: tree["exits"][0].update(file=None), "needs a file"),
    "tiers that leave a segment": (lambda tree: tree["tiers"].pop(), "tiers must take all"),
    "an unlisted file": (lambda tree: tree["segments"][0].update(file="segments/9.onnx"), "not in the list"),
}


@pytest.mark.parametrize("damage", STRUCTURE)
def test_damaged_structure_gives_one_sentence(damage: str, tiny_bundle: Path) -> None:
    how, words = STRUCTURE[damage]
    change(tiny_bundle, how)
    assert words in refusal(tiny_bundle)


@pytest.mark.parametrize("path", ["../outside.txt", "/etc/hostname", "segments/../../outside.txt"])
def test_a_path_outside_is_refused_before_it_is_read(path: str, tiny_bundle: Path) -> None:
    (tiny_bundle.parent / "outside.txt").write_text("secret")
    change(tiny_bundle, lambda tree: tree["files"].append({"path": path, "size_bytes": 6, "sha256": "0" * 64}))
    assert "points outside the bundle" in refusal(tiny_bundle)


def test_a_link_outside_is_refused(tiny_bundle: Path) -> None:
    (tiny_bundle.parent / "outside.txt").write_text("secret")
    (tiny_bundle / "inside.txt").symlink_to(tiny_bundle.parent / "outside.txt")
    change(tiny_bundle, lambda tree: tree["files"].append({"path": "inside.txt", "size_bytes": 6, "sha256": "0" * 64}))
    assert "points outside the bundle" in refusal(tiny_bundle)


def first_segment(bundle: Path) -> Path:
    return bundle / load(bundle).manifest.segments[0].file


def test_a_missing_file(tiny_bundle: Path) -> None:
    first_segment(tiny_bundle).unlink()
    assert "is missing from the bundle" in refusal(tiny_bundle)


def test_a_file_of_another_size(tiny_bundle: Path) -> None:
    path = first_segment(tiny_bundle)
    path.write_bytes(path.read_bytes()[:-1])
    assert "bytes, the manifest says" in refusal(tiny_bundle)


def test_a_file_of_the_same_size(tiny_bundle: Path) -> None:
    path = first_segment(tiny_bundle)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    assert "its SHA-256 differs" in refusal(tiny_bundle)


def test_a_file_that_nobody_listed(tiny_bundle: Path) -> None:
    (tiny_bundle / "extra.bin").write_bytes(b"x")
    assert "lies in the bundle but not in its manifest" in refusal(tiny_bundle)


def test_notes_may_lie_beside_the_contract(tiny_bundle: Path) -> None:
    for name in NOTES:
        (tiny_bundle / name).write_text("measured here")
    verify_files(load(tiny_bundle))


def test_a_file_that_is_not_listed_is_not_opened(shared_bundle: Path) -> None:
    with pytest.raises(BundleError, match="not in the manifest's list"):
        load(shared_bundle).file("manifest.json")


def test_a_manifest_that_is_no_text(tiny_bundle: Path) -> None:
    path = tiny_bundle / MANIFEST
    path.write_bytes(path.read_bytes().replace(b'"tiny"', b'"\xff\xfe"'))
    assert "manifest.json is damaged" in refusal(tiny_bundle)


def test_a_temperature_must_be_positive(tiny_bundle: Path) -> None:
    change(tiny_bundle, lambda tree: tree["exits"][0].update(temperature=-1.0))
    assert "manifest.json is damaged" in refusal(tiny_bundle)


@pytest.mark.parametrize(
    "how",
    [
        lambda tree: tree["preprocess"].update(height=0),
        lambda tree: tree["preprocess"].update(height=17),
        lambda tree: tree["segments"][0].update(max_batch_size=0),
        lambda tree: tree["cuts"][1].update(shape=[-1, 8, 8]),
        lambda tree: tree["cuts"][1].update(shape=[60000, 60000, 8]),
        lambda tree: tree["cuts"][0].update(dtype="float32"),
        lambda tree: tree.update(format=0),
    ],
)
def test_numbers_that_no_export_writes(tiny_bundle: Path, how: Change) -> None:
    change(tiny_bundle, how)
    assert "manifest.json is damaged" in refusal(tiny_bundle)


@pytest.mark.parametrize(("labels", "words"), [(b"one\ntwo", "has 2 labels for 5 classes"), (b"\xff" * 5, "no UTF-8")])
def test_labels_that_do_not_fit(tiny_bundle: Path, labels: bytes, words: str) -> None:
    (tiny_bundle / "labels.txt").write_bytes(labels)
    digest = hashlib.sha256(labels).hexdigest()

    def relist(tree: dict[str, Any]) -> None:
        spec = next(spec for spec in tree["files"] if spec["path"] == "labels.txt")
        spec.update(size_bytes=len(labels), sha256=digest)

    change(tiny_bundle, relist)
    assert words in refusal(tiny_bundle)


def test_a_task_that_is_not_known(tiny_bundle: Path) -> None:
    change(tiny_bundle, lambda tree: tree.update(task="caption"))
    assert "the bundle's task is 'caption', this Kinflow knows classify, detect" in refusal(tiny_bundle)
