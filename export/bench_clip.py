"""A continuous clip, every frame sent: features against what the node holds, beside video codecs. In order.

Video codecs run as a user would run them live: one thread, preset medium, no delay (every frame comes out before the
next goes in), at the model's input size. Features are coded against the levels of the frame before, as when every
frame arrives and is acknowledged in time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
from numpy.typing import NDArray

from export.bench_frames import Whole
from export.bench_rivals import CAMERA
from export.bench_rows import Point, Samples, clock, rival_bytes, summarize, wire_bytes
from export.task import Outputs, open_judge
from runtime.codec import CODECS, Codecs, ReferenceCodec
from runtime.datatypes import Tensor
from runtime.errors import BundleError
from runtime.manifest import Bundle
from runtime.segment import Segment, load_segments

Track = Callable[[Sequence[int]], Iterable[int]]


@dataclass(frozen=True, slots=True)
class Video:
    """A video codec with the rate factors to try, the finest first."""

    name: str
    encoder: str
    decoder: str
    options: dict[str, str]
    crf: tuple[int, ...]


VIDEOS = (
    Video("H.264", "libx264", "h264", {}, (5, 9, 13, 17, 21, 25, 29, 33)),
    Video(
        "H.265",
        "libx265",
        "hevc",
        {"x265-params": "log-level=none:pools=none:frame-threads=1"},
        (5, 9, 13, 17, 21, 25, 29, 33),
    ),
)


def judge_stream(bundle: Bundle, frames: Sequence[Tensor], logits: Outputs, threads: int, track: Track) -> list[Point]:
    """Judge every codec that can code against an earlier frame, at every cut and rate.

    Args:
        bundle: to be judged.
        frames: consecutive, each uint8 (1, height, width, 3).
        logits: the whole float model's (frames, classes).
        threads: for the segments.
        track: wraps the places of the frames, to show how far it is.
    """
    segments, _ = load_segments(bundle, 0, len(bundle.manifest.segments) - 1, threads=threads)
    codecs, now = Codecs(bundle), clock(threads)
    places = [
        (cut, spec.name, rate)
        for cut, cut_spec in enumerate(bundle.manifest.cuts[:-1])
        for spec in cut_spec.codecs
        if isinstance(codecs.get(cut, CODECS[spec.name], 0), ReferenceCodec)
        for rate in range(len(spec.rates))
    ]
    if not places:
        return []
    samples = {place: Samples() for place in places}
    judge = open_judge(bundle)
    held: dict[tuple[int, str, int], NDArray[np.int16] | None] = dict.fromkeys(places)
    for number in track(range(len(frames))):
        features = [frames[number]]
        for segment in segments.values():
            features.append(segment.run(features[-1]))
        for place in places:
            cut, name, rate = place
            codec = codecs.get(cut, CODECS[name], rate)
            assert isinstance(codec, ReferenceCodec), "chosen above"
            start = now()
            payload, sent = codec.encode_against(features[cut], held[place])
            middle = now()
            tensor, levels = codec.decode_against(payload, held[place])
            samples[place].encode_ms.append((middle - start) * 1e3)
            samples[place].decode_ms.append((now() - middle) * 1e3)
            samples[place].sent(len(payload), wire_bytes(bundle, cut, len(payload)))
            assert np.array_equal(sent, levels), "both ends hold the same levels"
            held[place] = levels
            samples[place].judge(judge, _tail(segments, tensor, cut), logits[number : number + 1])
    cuts = bundle.manifest.cuts
    return [
        summarize(
            samples[cut, name, rate],
            way="stream",
            cut=cut,
            after=cuts[cut].after,
            codec=name,
            rate=rate,
            parameter=float(next(spec for spec in cuts[cut].codecs if spec.name == name).rates[rate].parameter),
        )
        for cut, name, rate in places
    ]


def judge_videos(
    bundle: Bundle, frames: Sequence[Tensor], logits: Outputs, whole: Whole, fps: float, track: Track
) -> list[Point]:
    """Judge video codecs on consecutive frames, through the whole float model.

    Raises:
        BundleError: the model's input has odd sides, which video codecs do not take.
    """
    height, width = frames[0].shape[1:3]
    if height % 2 or width % 2:
        raise BundleError(f"video codecs take even sides only, the model's input is {height}x{width}; leave out --clip")
    places = [(video, rate, crf) for video in VIDEOS for rate, crf in enumerate(video.crf)]
    points = []
    for place in track(range(len(places))):
        video, rate, crf = places[place]
        samples = Samples()
        judge = open_judge(bundle)
        for number, pixels in enumerate(_through(video, crf, frames, fps, samples, bundle)):
            samples.judge(judge, whole.run(pixels), logits[number : number + 1])
        points.append(
            summarize(samples, way="video", cut=0, after=CAMERA, codec=video.name, rate=rate, parameter=float(crf))
        )
    return points


def _through(
    video: Video, crf: int, frames: Sequence[Tensor], fps: float, samples: Samples, bundle: Bundle
) -> Iterator[Tensor]:
    """Yield every frame as the receiver sees it."""
    import av

    height, width = frames[0].shape[1:3]
    pace = Fraction(fps).limit_denominator(1001)
    encoder: Any = av.CodecContext.create(video.encoder, "w")
    encoder.width, encoder.height, encoder.pix_fmt = width, height, "yuv420p"
    encoder.time_base, encoder.framerate = 1 / pace, pace
    encoder.thread_count = 1
    encoder.options = {"preset": "medium", "tune": "zerolatency", "crf": str(crf), **video.options}
    decoder: Any = av.CodecContext.create(video.decoder, "r")
    decoder.thread_count = 1
    now = clock(1)
    for number, frame in enumerate(frames):
        start = now()
        picture = av.VideoFrame.from_ndarray(frame[0], format="rgb24").reformat(format="yuv420p")
        picture.pts = number
        packets = encoder.encode(picture)
        middle = now()
        size = sum(packet.size for packet in packets)
        samples.encode_ms.append((middle - start) * 1e3)
        samples.sent(size, rival_bytes(bundle, size))
        for shown in [shown for packet in packets for shown in decoder.decode(packet)]:
            pixels: Tensor = shown.to_ndarray(format="rgb24")[np.newaxis]
            samples.decode_ms.append((now() - middle) * 1e3)
            yield pixels
    for shown in decoder.decode(None):  # a decoder may hold the last frame back, as it cannot know that it is whole
        yield shown.to_ndarray(format="rgb24")[np.newaxis]


def _tail(segments: Mapping[int, Segment], tensor: Tensor, cut: int) -> Outputs:
    for index in range(cut, len(segments)):
        tensor = segments[index].run(tensor)
    return tensor
