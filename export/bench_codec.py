"""Judges every cut, codec and rate of a bundle: its own segments to the cut, encode, decode, its own segments on.

Frames go through in small groups, so that the features of all cuts are computed once and still take little memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from export.bench_rows import Point, Samples, clock, summarize, wire_bytes
from export.task import Outputs, open_judge
from runtime.codec import CODECS, Codec, Codecs
from runtime.datatypes import Tensor
from runtime.manifest import Bundle
from runtime.segment import Segment, load_segments

GROUP = 16  # frames whose features of all cuts are held at once

Track = Callable[[Sequence[int]], Iterable[int]]


@dataclass(frozen=True, slots=True)
class Judged:
    """What the bundle made of the judged frames."""

    points: list[Point]
    ceiling: Point  # the segments without any codec
    segment_ms: tuple[float, ...]  # medians of single frames


@dataclass(slots=True)
class _Run:
    """The segments at work, with what they took."""

    bundle: Bundle
    segments: Mapping[int, Segment]
    times: list[list[float]]
    clock: Callable[[], float]

    def features(self, frames: Sequence[Tensor]) -> list[list[Tensor]]:
        """The features of every frame at every cut, by cut; the last are logits. Frame by frame, as a device does."""
        features: list[list[Tensor]] = [[] for _ in range(len(self.segments) + 1)]
        for frame in frames:
            tensor = frame
            features[0].append(tensor)
            for index, segment in self.segments.items():
                start = self.clock()
                tensor = segment.run(tensor)
                self.times[index].append((self.clock() - start) * 1e3)
                features[index + 1].append(tensor)
        return features

    def tail(self, tensors: Sequence[Tensor], cut: int) -> Outputs:
        """Run features from `cut` to the end, in batches that were proved to change no answer."""
        for index in range(cut, len(self.segments)):
            size = self.bundle.manifest.segments[index].max_batch_size
            tensors = [
                self.segments[index].run(np.concatenate(tensors[start : start + size]))
                for start in range(0, len(tensors), size)
            ]
            tensors = [batch[row : row + 1] for batch in tensors for row in range(len(batch))]
        return np.concatenate(tensors)


def judge_codecs(
    bundle: Bundle, frames: Sequence[Tensor], whole: Outputs, threads: int, track: Track, *, codecs: bool = True
) -> Judged:
    """Judge every cut, codec and rate.

    Args:
        bundle: to be judged.
        frames: each uint8 (1, height, width, 3); none of them had a say in the bundle.
        whole: the whole float model's outputs (frames, …).
        threads: for the segments.
        track: wraps the starts of groups of frames, to show how far it is.
        codecs: false to leave them out and only run the segments.
    """
    segments, _ = load_segments(bundle, 0, len(bundle.manifest.segments) - 1, threads=threads)
    run = _Run(bundle, segments, [[] for _ in segments], clock(threads))
    made = Codecs(bundle)
    places = [
        (cut, spec.name, rate)
        for cut, cut_spec in enumerate(bundle.manifest.cuts[:-1])
        for spec in cut_spec.codecs
        for rate in range(len(spec.rates))
        if codecs
    ]
    samples = {place: Samples() for place in places}
    ceiling = Samples()
    judge = open_judge(bundle)
    for start in track(range(0, len(frames), GROUP)):
        features = run.features(frames[start : start + GROUP])
        wanted = whole[start : start + GROUP]
        ends = np.concatenate(features[-1])
        ceiling.judge(judge, ends, wanted)
        for tensor in features[-1]:
            ceiling.sent(tensor.nbytes, tensor.nbytes)
        for cut, name, rate in places:
            codec = made.get(cut, CODECS[name], rate)
            decoded = [
                _through(codec, tensor, samples[cut, name, rate], bundle, cut, run.clock) for tensor in features[cut]
            ]
            same = all(map(np.array_equal, decoded, features[cut]))  # lossless: the tail would say the same again
            samples[cut, name, rate].judge(judge, ends if same else run.tail(decoded, cut), wanted)
    return Judged(
        points=[_point(bundle, cut, name, rate, samples[cut, name, rate]) for cut, name, rate in places],
        ceiling=summarize(
            ceiling, way="features", cut=len(segments), after="the last layer", codec="none", rate=0, parameter=0.0
        ),
        segment_ms=tuple(round(float(np.median(times)), 4) for times in run.times),
    )


def _through(
    codec: Codec, tensor: Tensor, samples: Samples, bundle: Bundle, cut: int, clock: Callable[[], float]
) -> Tensor:
    start = clock()
    payload = codec.encode(tensor)
    middle = clock()
    decoded = codec.decode(payload)
    end = clock()
    samples.encode_ms.append((middle - start) * 1e3)
    samples.decode_ms.append((end - middle) * 1e3)
    samples.sent(len(payload), wire_bytes(bundle, cut, len(payload)))
    return decoded


def _point(bundle: Bundle, cut: int, name: str, rate: int, samples: Samples) -> Point:
    spec = bundle.manifest.cuts[cut]
    codec = next(codec for codec in spec.codecs if codec.name == name)
    parameter = codec.rates[rate].parameter
    return summarize(
        samples, way="features", cut=cut, after=spec.after, codec=name, rate=rate, parameter=float(parameter)
    )
