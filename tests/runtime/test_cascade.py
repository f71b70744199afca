from __future__ import annotations

import dataclasses
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import runtime
from runtime import cascade, manifest
from runtime.cascade import Tier
from runtime.datatypes import ExitOutput, Features, Tensor
from runtime.errors import BundleError
from runtime.policy import ExitPolicy
from runtime.segment import Head, Segment, load_segments

CUTS = ((16, 16, 3), (4, 8, 8), (6, 4, 4))
DEPTH = 3


def tier(path: Path, last: int = DEPTH - 1, first: int = 0) -> Tier:
    bundle = manifest.load(path)
    return Tier(bundle, *load_segments(bundle, first, last))


@pytest.fixture(scope="module")
def whole(shared_bundle: Path) -> Tier:
    return tier(shared_bundle)


@pytest.fixture(scope="module")
def short(shared_bundle: Path) -> Tier:
    return tier(shared_bundle, last=1)


def some(cut: int, seed: int) -> Features:
    """Features as they come: a picture of a seed, or a dark or bright one, so that exits differ in confidence."""
    rng = np.random.default_rng(seed)
    high = int(rng.integers(2, 257))
    return Features(cut, rng.integers(0, high, (1, *CUTS[cut]), np.uint8))


frames = st.builds(some, st.integers(0, 2), st.integers(0, 10_000))
thresholds = st.floats(0, 1)
policies = st.builds(lambda one, two: ExitPolicy({1: one, 2: two, 3: 0.0}), thresholds, thresholds)


def depth(outcome: cascade.Outcome) -> int:
    return DEPTH + 1 if outcome.answer is None else outcome.answer.exit


@settings(max_examples=100, deadline=None)
@given(batch=st.lists(frames, min_size=1, max_size=8), policy=policies, deep=st.booleans())
def test_a_batch_at_mixed_cuts_says_what_each_frame_alone_says(
    whole: Tier, short: Tier, batch: list[Features], policy: ExitPolicy, deep: bool
) -> None:
    ran = whole if deep else short
    together = cascade.run(batch, ran, policy)
    assert len(together) == len(batch)
    for features, outcome in zip(batch, together, strict=True):
        (alone,) = cascade.run([features], ran, policy)
        assert outcome.answer == alone.answer
        assert outcome.best == alone.best
        assert outcome.timings.keys() == alone.timings.keys()
        assert (outcome.features is None) == (alone.features is None) == (outcome.answer is not None)
        if outcome.features is not None and alone.features is not None:
            assert outcome.features.cut == alone.features.cut == max(features.cut, ran.last + 1)
            np.testing.assert_array_equal(outcome.features.tensor, alone.features.tensor)


@settings(max_examples=100, deadline=None)
@given(features=frames, low=thresholds, high=thresholds)
def test_a_higher_threshold_never_answers_at_a_shallower_exit(
    whole: Tier, features: Features, low: float, high: float
) -> None:
    low, high = sorted((low, high))
    depths = [
        depth(cascade.run([features], whole, ExitPolicy({1: threshold, 2: threshold, 3: 0.0}))[0])
        for threshold in (low, high)
    ]
    assert depths == sorted(depths)


@settings(max_examples=100, deadline=None)
@given(features=frames, policy=policies)
def test_the_last_word_is_that_of_the_deepest_exit_that_was_reached(
    short: Tier, features: Features, policy: ExitPolicy
) -> None:
    (outcome,) = cascade.run([features], short, policy)
    seen = said_by_hand(features, short, policy)
    assert cascade.last_word(outcome, short) == (seen[-1] if seen else None)
    assert outcome.answer == (seen[-1] if seen and policy.answers(seen[-1]) else None)
    assert all(not policy.answers(output) for output in seen[:-1])


def said_by_hand(features: Features, ran: Tier, policy: ExitPolicy) -> list[ExitOutput]:
    """What each exit says in turn, up to the first that answers."""
    tensor, seen = features.tensor, []
    for index in range(features.cut, ran.last + 1):
        tensor = ran.segments[index].run(tensor)
        spec = ran.bundle.exit_at(index + 1)
        assert spec is not None
        logits = ran.heads[index + 1].run(tensor) if index + 1 in ran.heads else tensor
        seen.append(ran.task.read(logits[0], spec))
        if policy.answers(seen[-1]):
            break
    return seen


def test_frames_leave_at_different_exits_and_keep_their_places(whole: Tier) -> None:
    batch = [some(0, seed) for seed in range(40)]
    outcomes = cascade.run(batch, whole, ExitPolicy({1: 0.6, 2: 0.4, 3: 0.0}))
    assert {depth(outcome) for outcome in outcomes} == {1, 2, 3}
    for outcome in outcomes:
        stages = [stage for index in range(depth(outcome)) for stage in (f"segment{index}", f"exit{index + 1}")]
        assert list(outcome.timings) == stages
        assert all(took_ms > 0 for took_ms in outcome.timings.values())


def test_an_exit_that_may_not_answer_is_asked_only_for_the_last_word(short: Tier) -> None:
    (outcome,) = cascade.run([some(0, 0)], short, ExitPolicy({}))
    assert set(outcome.timings) == {f"segment{index}" for index in short.segments}
    assert outcome.best is None
    said = cascade.last_word(outcome, short)
    assert said is not None
    assert said.exit == short.last + 1
    assert f"exit{said.exit}" in outcome.timings
    assert cascade.last_word(outcome, short) is said


def test_frames_past_the_tier_come_back_as_they_were(short: Tier) -> None:
    features = some(2, 0)
    (outcome,) = cascade.run([features], short, ExitPolicy({}))
    assert outcome.features is features
    assert (outcome.answer, outcome.best, outcome.timings) == (None, None, {})


def test_a_tier_in_the_middle_gives_the_features_that_the_whole_chain_has(shared_bundle: Path, whole: Tier) -> None:
    never = ExitPolicy({})
    middle = tier(shared_bundle, first=1, last=1)
    assert (middle.first, middle.last) == (1, 1)
    frame = some(0, 3)
    (first,) = cascade.run([frame], tier(shared_bundle, last=0), never)
    assert first.features is not None
    (second,) = cascade.run([first.features], middle, never)
    assert second.features is not None
    (last,) = cascade.run([second.features], whole, ExitPolicy({3: 0.0}))
    (at_once,) = cascade.run([frame], whole, ExitPolicy({3: 0.0}))
    assert last.answer == at_once.answer is not None


def test_a_bundle_without_early_exits_runs_to_the_end(make_bundle: Callable[..., Path], tmp_path: Path) -> None:
    ran = tier(make_bundle(tmp_path / "headless", heads=False))
    (outcome,) = cascade.run([some(0, 1)], ran, ExitPolicy.of(ran.bundle))
    assert outcome.answer is not None
    assert outcome.answer.exit == 3
    assert list(outcome.timings) == ["segment0", "segment1", "segment2", "exit3"]


@pytest.mark.parametrize(("first", "last"), [(0, 0), (0, 2), (1, 2), (2, 2)])
def test_every_tier_warms_up(shared_bundle: Path, first: int, last: int) -> None:
    cascade.warm_up(tier(shared_bundle, first=first, last=last))


class Counted:
    """A segment that notes the sizes of its batches."""

    def __init__(self, segment: Segment) -> None:
        self._segment = segment
        self.sizes: list[int] = []

    def run(self, batch: Tensor) -> Tensor:
        self.sizes.append(len(batch))
        return self._segment.run(batch)


def test_every_size_of_batch_is_warmed_up_behind_its_cut_the_largest_first(whole: Tier) -> None:
    counted = {index: Counted(segment) for index, segment in whole.segments.items()}
    cascade.warm_up(dataclasses.replace(whole, segments=counted), 1, 4)
    assert [segment.sizes for segment in counted.values()] == [[1], [1, 4, 4, 3, 3, 2, 2], [1, 4, 4, 3, 3, 2, 2]]


def test_a_slow_model_is_not_warmed_up_for_long(whole: Tier, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cascade, "WARM_UP_S", 0.0)
    counted = {index: Counted(segment) for index, segment in whole.segments.items()}
    cascade.warm_up(dataclasses.replace(whole, segments=counted), 1, 4)
    assert [segment.sizes for segment in counted.values()] == [[1], [1], [1]]


GROWTH = """
import sys
from pathlib import Path
import numpy as np
from runtime import cascade, manifest
from runtime.segment import load_segments

def anonymous_mb():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("RssAnon"))

bundle = manifest.load(Path(sys.argv[1]))
tier = cascade.Tier(bundle, *load_segments(bundle, 0, 2))
cut = bundle.manifest.cuts[1]
batches = [np.zeros((size, *cut.shape), cut.dtype) for size in (2, 8, 5, 3, 4, 7, 6, 1)]
cascade.warm_up(tier, 1, 8)
before_mb = anonymous_mb()
for batch in batches * 2:
    tier.segments[2].run(tier.segments[1].run(batch))
print(anonymous_mb() - before_mb)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="only Linux tells so cheaply what a process takes")
def test_batches_take_their_memory_at_the_start() -> None:
    lite0 = Path(runtime.__file__).parent / "reference" / "lite0"
    ran = subprocess.run([sys.executable, "-c", GROWTH, lite0], capture_output=True, text=True, timeout=60, check=True)
    assert float(ran.stdout) < 2.0  # without the larger batches, 7


class Doubtful:
    """A head whose guard knows only frames at even places."""

    def __init__(self, head: Head) -> None:
        self._head = head

    def run(self, batch: Tensor) -> Tensor:
        return self._head.run(batch)

    def ask(self, batch: Tensor) -> tuple[Tensor, Tensor | None]:
        return self.run(batch), np.arange(len(batch), dtype=np.float32) % 2 * 10


def test_a_frame_beyond_the_guards_limit_goes_on_and_the_outcome_says_so(whole: Tier) -> None:
    guarded = dataclasses.replace(whole, heads={**whole.heads, 1: Doubtful(whole.heads[1])})
    batch = [some(0, seed) for seed in range(6)]
    outcomes = cascade.run(batch, guarded, ExitPolicy({1: 0.0, 2: 0.0, 3: 0.0}, {1: 5.0}))
    assert [depth(outcome) for outcome in outcomes] == [1, 2] * 3
    assert [outcome.withheld for outcome in outcomes] == [(), (1,)] * 3


def test_a_limit_without_a_distance_is_found_at_the_start(whole: Tier) -> None:
    first, *rest = whole.bundle.manifest.exits
    exits = (msgspec.structs.replace(first, distance_limit=1.0), *rest)
    bundle = dataclasses.replace(whole.bundle, manifest=msgspec.structs.replace(whole.bundle.manifest, exits=exits))
    with pytest.raises(BundleError, match=r"exits/1\.onnx gives no distance"):
        cascade.warm_up(dataclasses.replace(whole, bundle=bundle))


class Shorter:
    """A segment whose output lacks a row."""

    def run(self, batch: Tensor) -> Tensor:
        return np.zeros((len(batch), 4, 7, 8), np.uint8)


def test_a_segment_that_does_not_fit_its_cut_is_found_at_the_start(short: Tier) -> None:
    wrong = dataclasses.replace(short, segments={**short.segments, 0: Shorter()})
    with pytest.raises(BundleError, match=r"segment 0 gives \(4, 7, 8\) uint8, the manifest says \(4, 8, 8\)"):
        cascade.warm_up(wrong)
