from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from runtime import manifest
from runtime.errors import BundleError
from runtime.manifest import Bundle
from runtime.segment import load_segments
from runtime.segment_onnx import OnnxSegment, session_options

FRAME = np.random.default_rng(0).integers(0, 256, (1, 16, 16, 3), np.uint8)


@pytest.fixture(scope="module")
def bundle(shared_bundle: Path) -> Bundle:
    return manifest.load(shared_bundle)


@pytest.mark.parametrize(
    ("first", "last", "heads"), [(0, 0, {1}), (0, 1, {1, 2}), (0, 2, {1, 2}), (1, 1, {2}), (2, 2, set())]
)
def test_a_tier_loads_its_segments_and_the_heads_behind_them(
    bundle: Bundle, first: int, last: int, heads: set[int]
) -> None:
    segments, loaded = load_segments(bundle, first, last)
    assert set(segments) == set(range(first, last + 1))
    assert set(loaded) == heads


def test_the_segments_in_turn_lead_from_a_frame_to_logits(bundle: Bundle) -> None:
    segments, heads = load_segments(bundle, 0, 2)
    tensor = FRAME
    for cut, spec in enumerate(bundle.manifest.cuts[1:], 1):
        tensor = segments[cut - 1].run(tensor)
        assert tensor.shape == (1, *spec.shape)
        assert tensor.dtype == spec.dtype
        if cut in heads:
            assert heads[cut].run(tensor).shape == (1, 5)


@pytest.mark.parametrize("threads", [1, 2])
def test_a_batch_gives_for_each_frame_what_it_gives_alone(bundle: Bundle, threads: int) -> None:
    segments, _ = load_segments(bundle, 0, 0, threads=threads)
    batch = np.random.default_rng(1).integers(0, 256, (8, 16, 16, 3), np.uint8)
    together = segments[0].run(batch)
    np.testing.assert_array_equal(together, np.concatenate([segments[0].run(frame[np.newaxis]) for frame in batch]))


def test_a_batch_that_is_not_contiguous_is_taken(bundle: Bundle) -> None:
    segment = OnnxSegment(bundle, "segments/0.onnx", threads=1)
    np.testing.assert_array_equal(segment.run(FRAME[:, ::-1]), segment.run(FRAME[:, ::-1].copy()))


def test_threads_do_not_spin_between_frames() -> None:
    options = session_options(2)
    assert options.intra_op_num_threads == 2
    assert options.inter_op_num_threads == 1
    assert options.get_session_config_entry("session.intra_op.allow_spinning") == "0"


@pytest.mark.parametrize(
    "batch",
    [np.zeros((1, 16, 16, 3), np.float32), np.zeros((1, 16, 16), np.uint8), np.zeros((1, 16, 16, 4), np.uint8)],
    ids=["dtype", "rank", "channels"],
)
def test_a_tensor_that_does_not_fit_is_said_in_one_line_with_the_file(bundle: Bundle, batch: np.ndarray) -> None:
    with pytest.raises(BundleError, match=r"^segments/0\.onnx does not run: ") as caught:
        OnnxSegment(bundle, "segments/0.onnx", threads=1).run(batch)
    assert "\n" not in str(caught.value)


def test_a_file_that_changed_since_export_is_not_loaded(tiny_bundle: Path) -> None:
    data = bytearray((tiny_bundle / "segments/1.onnx").read_bytes())
    data[-1] ^= 1
    (tiny_bundle / "segments/1.onnx").write_bytes(data)
    bundle = manifest.load(tiny_bundle)
    load_segments(bundle, 0, 0)
    with pytest.raises(BundleError, match=r"segments/1\.onnx is not the file that was exported"):
        load_segments(bundle, 0, 1)


def test_a_file_that_is_no_onnx_is_said_in_one_line(bundle: Bundle) -> None:
    with pytest.raises(BundleError, match=r"^onnxruntime \S+ cannot load labels\.txt: ") as caught:
        OnnxSegment(bundle, "labels.txt", threads=1)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_not_in_the_manifest_is_not_loaded(bundle: Bundle) -> None:
    with pytest.raises(BundleError, match=r"manifest\.json is not in the manifest's list"):
        OnnxSegment(bundle, "manifest.json", threads=1)
