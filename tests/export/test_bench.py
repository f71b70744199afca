from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import cv2
import msgspec
import numpy as np
import pytest
from click.testing import CliRunner, Result

from export.atlas import Atlas, EqualRow, cut_times, judge
from export.bench import bench_group
from export.bench_exits import cascade, sweep
from export.bench_frames import calibration, read_clip, read_judges
from export.bench_rows import rival_bytes, wire_bytes
from export.bundle import list_files
from export.exits_judge import ExitRow
from export.frames import fingerprint
from export.pipeline import Exported
from export.task_classify import kl
from runtime.codec import RawCodec
from runtime.errors import BundleError, KinflowError
from runtime.manifest import NOTES, Bundle, verify_files

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
Made = tuple[Path, dict[str, Any]]
ROW = {"cut", "after", "codec", "rate", "bytes_p50", "bytes_p95", "agreement", "low", "high", "n"}


@pytest.fixture(scope="module")
def others(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of `photos`, every picture upside down: 60 that no bundle has seen."""
    folder = tmp_path_factory.mktemp("others")
    for path in sorted(photos.iterdir()):
        picture = cv2.imread(str(path))
        assert picture is not None
        cv2.imwrite(str(folder / path.name), np.flipud(picture))
    return folder


@pytest.fixture(scope="module")
def bundle(exported: Exported, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the shared bundle that may be written to."""
    copy = tmp_path_factory.mktemp("bundles") / "plain"
    shutil.copytree(exported.bundle.path, copy)
    return copy


@pytest.fixture(scope="module")
def made(bundle: Path, net: str, others: Path, clip: Path) -> Made:
    """A bundle with its atlas, and what was printed."""
    arguments = ["--frames", others, "--clip", clip, "--clip-frames", 20, "--max-frames", 24]
    result = run("atlas", bundle, *arguments, "--model", f"{net}:plain", "--json")
    assert result.exit_code == 0, result.exception
    return bundle, json.loads(result.stdout)


def run(*arguments: object) -> Result:
    return CliRunner().invoke(bench_group, [str(argument) for argument in arguments])


def sentence(*arguments: object) -> tuple[int, str]:
    """The exit code and the one sentence that `kinflow` would leave with."""
    result = run(*arguments)
    assert isinstance(result.exception, KinflowError), result.output
    assert "\n" not in str(result.exception)
    return result.exception.exit_code, str(result.exception)


def test_every_cut_codec_and_rate_has_a_row_beside_every_rival(made: Made) -> None:
    bundle, atlas = made
    rows = atlas["rows"]
    assert all(set(row) >= ROW for row in rows)
    manifest = json.loads((bundle / "manifest.json").read_text())
    wanted = {
        (cut, codec["name"], rate)
        for cut, spec in enumerate(manifest["cuts"])
        for codec in spec["codecs"]
        for rate in range(len(codec["rates"]))
    }
    assert {(row["cut"], row["codec"], row["rate"]) for row in rows if row["way"] == "features"} == wanted
    assert {row["codec"] for row in rows if row["way"] == "picture"} == {"JPEG", "WebP", "AVIF"}
    assert {row["codec"] for row in rows if row["way"] == "video"} == {"H.264", "H.265"}
    assert {(row["cut"], row["codec"]) for row in rows if row["way"] == "stream"} == {
        (cut, codec) for cut, codec, _ in wanted if codec == "transform"
    }
    assert {row["side_px"] for row in rows if row["way"] == "picture"} == {None, 23, 18}
    assert all(row["n"] == (20 if row["way"] in ("video", "stream") else 24) for row in rows)
    assert all(row["low"] <= row["agreement"] <= row["high"] for row in rows)
    assert all(row["bytes_p50"] <= row["bytes_p95"] for row in rows)


def test_a_lossless_codec_is_as_good_as_no_codec(made: Made) -> None:
    _, atlas = made
    raw = [row for row in atlas["rows"] if row["codec"] == "raw"]
    assert len(raw) == 3
    assert {row["agreement"] for row in raw} == {atlas["ceiling"]["agreement"]}
    assert {row["kl_mean"] for row in raw} == {atlas["ceiling"]["kl_mean"]}


def test_better_pictures_cost_more(made: Made) -> None:
    _, atlas = made
    for codec in ("JPEG", "WebP", "AVIF"):
        rows = [row for row in atlas["rows"] if row["codec"] == codec and row.get("side_px") is None]
        rows.sort(key=lambda row: row["bytes_mean"])
        assert rows[-1]["kl_mean"] < rows[0]["kl_mean"]
        assert [row["parameter"] for row in rows] == sorted(row["parameter"] for row in rows)


def test_coarser_video_costs_less(made: Made) -> None:
    _, atlas = made
    for codec in ("H.264", "H.265"):
        rows = [row for row in atlas["rows"] if row["codec"] == codec]
        assert rows[0]["parameter"] < rows[-1]["parameter"]
        assert rows[0]["bytes_mean"] > rows[-1]["bytes_mean"]


def test_exits_are_judged_at_every_target(made: Made) -> None:
    _, atlas = made
    targets = {row["target"] for row in atlas["cascade"]}
    assert {(row["target"], row["cut"]) for row in atlas["exits"]} == {(t, cut) for t in targets for cut in (1, 2, 3)}
    for row in atlas["cascade"]:
        steps = [step for step in atlas["exits"] if step["target"] == row["target"]]
        assert row["answered"] == sum(step["answered"] for step in steps if step["cut"] < 3)
        assert sum(row["answered_ratio"].values()) == pytest.approx(1, abs=1e-5)
        assert row["macs_saved_ratio"] < 1
    assert {(row["target"], row["cut"]) for row in atlas["alone"]} == {(t, cut) for t in targets for cut in (1, 2)}
    # What the first exit says alone is what it says in the cascade.
    firsts = [[row["answered"] for row in atlas[kind] if row["cut"] == 1] for kind in ("alone", "exits")]
    assert firsts[0] == firsts[1]


def test_the_cascade_pays_for_segments_and_for_the_heads_it_asks(exported: Exported) -> None:
    bundle = exported.bundle
    macs = [segment.macs for segment in bundle.manifest.segments]

    def row(cut: int, answered: int, threshold: float | None) -> ExitRow:
        nothing = (None, None, None)
        counts = (10, 10, answered, 0, answered / 10)
        return ExitRow(0.9, cut, "", threshold, *counts, 0.75 if answered == 4 else 1.0, 0.5, 1.0, *nothing, ())

    summed = cascade(bundle, [row(1, 4, 0.5), row(2, 0, None), row(3, 6, 0.0)])
    head = bundle.manifest.exits[0].macs
    spent = 4 * (macs[0] + head) + 6 * (sum(macs) + head)
    assert summed.macs_saved_ratio == pytest.approx(1 - spent / 10 / sum(macs), abs=1e-6)
    assert (summed.answered, summed.agreement, summed.all_agreement) == (4, 0.75, 0.9)
    assert summed.answered_ratio == {1: 0.4, 2: 0.0, 3: 0.6}


def test_the_atlas_is_a_note_and_its_json_is_read_back(made: Made, exported: Exported) -> None:
    bundle, atlas = made
    verify_files(Bundle(bundle, exported.bundle.manifest, exported.bundle.id, ()))
    assert {"atlas.json", "atlas.html"} <= set(NOTES)
    read = msgspec.json.decode((bundle / "atlas.json").read_bytes(), type=Atlas)
    assert json.loads(msgspec.json.encode(read)) == atlas
    assert read.bundle == exported.bundle.id
    assert read.verdict is not None


def test_export_leaves_an_atlas_of_its_judge_frames(exported: Exported) -> None:
    read = msgspec.json.decode((exported.bundle.path / "atlas.json").read_bytes(), type=Atlas)
    assert (read.bundle, read.frames.n) == (exported.bundle.id, 12)
    assert read.frames.checked
    assert {row.way for row in read.rows} == {"features", "picture"}
    assert "<svg" in (exported.bundle.path / "atlas.html").read_text()


def test_the_page_stands_alone(made: Made) -> None:
    bundle, atlas = made
    page = (bundle / "atlas.html").read_text()
    assert not re.findall(r"https?:|//[a-z]|<script|<link|<img|@import|@font-face|url\((?!#)", page)
    assert atlas["verdict"]["sentence"].split(":")[0] in page
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'(?:url\(|href=")#([^")]+)', page)) <= set(ids)
    colours = set(re.findall(r"var\((--\w+)\)", page))
    assert all(f"{colour}:" in page for colour in colours)
    assert not re.findall(r"#0[12]000\d", page)


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")
@pytest.mark.parametrize("width", [500, 1200])
def test_a_browser_draws_the_page(made: Made, width: int, tmp_path: Path) -> None:
    bundle, _ = made
    shot = tmp_path / "page.png"
    options = ["--headless", "--no-sandbox", "--disable-gpu", f"--window-size={width},1400", f"--screenshot={shot}"]
    command = [str(CHROMIUM), *options, f"--user-data-dir={tmp_path}", (bundle / "atlas.html").as_uri()]
    subprocess.run(command, check=True, capture_output=True, timeout=150)
    picture = cv2.imread(str(shot))
    assert picture is not None
    assert picture.shape[1] == width
    # The first cut's line in its own colour, light or dark.
    blues = [np.abs(picture.astype(int) - colour).max(axis=2) < 6 for colour in ((168, 96, 0), (240, 176, 91))]
    assert max(int(blue.sum()) for blue in blues) > 50


def test_frames_that_had_a_say_are_left_out(exported: Exported, photos: Path, others: Path) -> None:
    bundle = exported.bundle
    listed = calibration(bundle)
    assert listed is not None
    assert len(listed) == 48
    with pytest.raises(BundleError, match="only 12 frames are left to judge with, 48 had a say in the bundle"):
        read_judges(bundle, [photos], 100)
    judges = read_judges(bundle, [photos, others], 200)
    assert (len(judges.frames), judges.left_out, judges.checked) == (72, 48, True)
    assert not listed & {fingerprint(frame) for frame in judges.frames}


def test_a_bundle_that_does_not_tell_is_said_so(exported: Exported, net: str, others: Path, tmp_path: Path) -> None:
    old = tmp_path / "old"
    shutil.copytree(exported.bundle.path, old)
    manifest = json.loads((old / "manifest.json").read_text())
    manifest["files"] = [spec for spec in manifest["files"] if spec["path"] != "calibration.txt"]
    (old / "manifest.json").write_text(json.dumps(manifest))
    result = run("exits", old, "--frames", others, "--model", f"{net}:plain")
    assert result.exit_code == 0, result.exception
    assert "does not tell which frames had a say" in result.stderr
    assert "answered early" in result.stdout


def test_a_clip_counts_from_behind_the_last_frame_that_had_a_say(
    exported: Exported, clip: Path, tmp_path: Path
) -> None:
    fresh = read_clip(exported.bundle, clip, 30)
    assert (len(fresh.frames), fresh.left_out) == (30, 20)
    bundle = tmp_path / "fitted"
    shutil.copytree(exported.bundle.path, bundle)
    (bundle / "calibration.txt").write_text(fingerprint(fresh.frames[9]) + "\n" + fingerprint(fresh.frames[4]) + "\n")
    fitted = with_files_as_they_are(exported, bundle)
    later = read_clip(fitted, clip, 30)
    assert (len(later.frames), later.left_out) == (30, 20)
    assert np.array_equal(later.frames[0], fresh.frames[10])
    spread = read_judges(fitted, [clip], 100)
    assert (len(spread.frames), spread.left_out) == (40, 10)


def with_files_as_they_are(exported: Exported, directory: Path) -> Bundle:
    manifest = msgspec.structs.replace(exported.bundle.manifest, files=list_files(directory))
    return Bundle(directory, manifest, exported.bundle.id, exported.bundle.labels)


def test_the_bytes_are_those_of_the_whole_message(exported: Exported) -> None:
    bundle = exported.bundle
    payload = RawCodec(bundle.manifest.cuts[1]).encode(np.zeros((1, *bundle.manifest.cuts[1].shape), np.uint8))
    topic = f"kinflow/v1/home/d/device/req/{bundle.key8}/1"
    assert wire_bytes(bundle, 1, len(payload)) == 2 + 2 + len(topic) + 1 + 44 + len(payload)
    assert rival_bytes(bundle, 1000) == wire_bytes(bundle, 0, 1000 - 44)


def test_the_model_must_be_the_one_the_bundle_was_made_from(bundle: Path, net: str, others: Path) -> None:
    assert sentence("codec", bundle, "--frames", others)[0] == 65
    assert "give that model with --model" in sentence("codec", bundle, "--frames", others)[1]
    assert (
        "but the bundle was made from" in sentence("exits", bundle, "--frames", others, "--model", f"{net}:softmax")[1]
    )
    wrong = sentence("exits", bundle, "--frames", others, "--model", f"{net}:plain", "--mean", 5)
    assert "answers the bundle's golden frames otherwise" in wrong[1]


def test_what_is_not_there_is_said_in_one_sentence(bundle: Path, net: str, others: Path, tmp_path: Path) -> None:
    assert sentence("codec", bundle, "--frames", tmp_path / "no")[0] == 66
    assert sentence("codec", bundle, "--frames", others, "--clip", tmp_path / "no")[0] == 66
    assert sentence("codec", tmp_path, "--frames", others)[0] == 65
    assert sentence("atlas", bundle, "--frames", others, "--out", tmp_path / "no")[0] == 65
    assert run("codec", bundle).exit_code == 2


def test_divergence_is_zero_for_the_same_and_grows_with_distance() -> None:
    logits = np.random.default_rng(0).normal(0, 3, (5, 7)).astype(np.float32)
    assert kl(logits, logits) == pytest.approx(np.zeros(5))
    assert kl(logits, logits + 4) == pytest.approx(np.zeros(5), abs=1e-6)
    near, far = kl(logits, logits * 0.9), kl(logits, logits * 0.5)
    assert (near > 0).all()
    assert (far > near).all()


def test_a_sweep_ends_with_all_frames() -> None:
    confidence, agrees = np.array([0.9, 0.1, 0.8, 0.3]), np.array([True, False, True, False])
    line = sweep(1, "block", confidence, agrees)
    assert line.coverage == (0.25, 0.5, 0.75, 1.0)
    assert line.agreement == pytest.approx((1.0, 1.0, 0.6667, 0.5))


def equal_row(cut: int, wanted: float, size: float | None, rival: float | None) -> EqualRow:
    ratio = None if size is None or rival is None else rival / size
    return EqualRow(
        way="features",
        cut=cut,
        after=f"block {cut}",
        codec="raw",
        quality="agreement",
        wanted=wanted,
        bytes_mean=size,
        bytes_low=size,
        bytes_high=size,
        at_most=False,
        rival=None if rival is None else "AVIF",
        rival_bytes_mean=rival,
        rival_bytes_low=rival,
        rival_bytes_high=rival,
        rival_at_most=False,
        ratio=ratio,
        ratio_low=None if ratio is None else ratio * 0.9,
        ratio_high=None if ratio is None else ratio * 1.1,
        encode_ms=0.4,
        n=100,
    )


@pytest.mark.parametrize(
    ("sizes", "rival", "split", "words"),
    [
        ((4000, 1000, 900), 9000, 2, "Splitting pays: after block 2, 1,000 bytes a frame hold an agreement of 0.95"),
        ((4000, 1000, 900), None, 2, "no picture codec reaches it"),
        ((20000, 12000, 9500), 9000, None, "Do not split: at an agreement of 0.95 the smallest features"),
        (
            (20000, 12000, 1000),
            9000,
            None,
            "when the device has worked 9.9 ms, encoding included; all of the model takes it 10.0 ms",
        ),
        ((None, None, None), 9000, None, "no cut's features reach an agreement of 0.90"),
        ((8900, 12000, 9500), 9000, None, "100 frames are too few to tell them apart"),
    ],
)
def test_the_verdict(
    sizes: tuple[float | None, ...], rival: float | None, split: int | None, words: str, made: Made
) -> None:
    ceiling = msgspec.json.decode((made[0] / "atlas.json").read_bytes(), type=Atlas).ceiling
    assert ceiling is not None
    times = cut_times(["camera", "block 1", "block 2", "block 3", "end"], [3.0, 2.0, 4.5, 0.5], [1, 1, 1, 1])
    equal = [equal_row(cut, 0.95, size, rival) for cut, size in enumerate(sizes, start=1)]
    verdict = judge(equal, times, ceiling, rivals=True)
    assert (verdict.split, verdict.cut) == (split is not None, split)
    assert words in verdict.sentence


def test_where_no_cut_is_good_enough_the_lower_agreement_decides(made: Made) -> None:
    ceiling = msgspec.json.decode((made[0] / "atlas.json").read_bytes(), type=Atlas).ceiling
    assert ceiling is not None
    times = cut_times(["camera", "block 1", "end"], [1.0, 1.0], [1, 1])
    equal = [equal_row(1, 0.95, None, 9000), equal_row(1, 0.9, 500, 8000)]
    unsure = [msgspec.structs.replace(equal_row(1, 0.95, 600, 9000), ratio_low=None), equal[1]]
    assert "an agreement of 0.90, 16.0 times fewer" in judge(unsure, times, ceiling, rivals=True).sentence
    assert "an agreement of 0.90, 16.0 times fewer" in judge(equal, times, ceiling, rivals=True).sentence
    assert judge(equal, times, ceiling, rivals=False).sentence.startswith("Undecided")
