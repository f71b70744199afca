from __future__ import annotations

from pathlib import Path

import pytest

from export.labels import read_labels
from runtime.errors import BundleError

LABELS = ("tench", "great white shark", "7")
NAMES = ("a.png", "b.png", "c.png")


@pytest.mark.parametrize(
    "text",
    [
        "file,class,more\na.png,0,x\nb.png,great white shark,y\nc.png,7\nother.png,nonsense\n",
        "folder/c.png\t2\nb.png\tgreat white shark\na.png\ttench\n\n",
        "a.png tench\nb.png great white shark\nc.png 7\n",
        '\ufeff"a.png";"tench"\n"b.png";"1"\n"c.png";"7"\n',
    ],
)
def test_every_frame_gets_its_class(text: str, tmp_path: Path) -> None:
    path = tmp_path / "labels.csv"
    path.write_text(text, "utf-8")
    assert list(read_labels(path, NAMES, LABELS)) == [0, 1, 2]


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("a.png,0\n", r"has no line for b\.png and 1 other frames; write NAME,CLASS for every picture"),
        ("a.png,0\nb.png,shark\n", r"line 2: 'shark' is no class; write one of the model's labels or an index from 0"),
        ("a.png,3\n", "line 1: '3' is no class"),
        ("a.png\n", "line 1: '' is no class"),
        ("a.png,0\na.png,1\n", r"line 2: a\.png has another class above"),
    ],
)
def test_what_is_wrong_is_said_in_one_sentence(text: str, sentence: str, tmp_path: Path) -> None:
    path = tmp_path / "labels.csv"
    path.write_text(text)
    with pytest.raises(BundleError, match=sentence):
        read_labels(path, NAMES, LABELS)


def test_a_clip_has_no_labels_and_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="cannot be read as text"):
        read_labels(tmp_path / "none.csv", NAMES, LABELS)
    (tmp_path / "labels.csv").write_text("a.png,0\n")
    with pytest.raises(BundleError, match="which frames of a clip lack"):
        read_labels(tmp_path / "labels.csv", ("a.png", ""), LABELS)
