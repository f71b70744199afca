"""A clip at another pace: the same packets, none coded again, with other times."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import cv2


def clip_fps(path: Path) -> float:
    """Frames a second that a clip says of itself; 0 of what is no clip."""
    clip = cv2.VideoCapture(str(path), cv2.CAP_FFMPEG)
    fps = float(clip.get(cv2.CAP_PROP_FPS)) if clip.isOpened() else 0.0
    clip.release()
    return fps


def retimed(path: Path, fps: float, folder: Path) -> Path:
    """A copy of a clip in `folder` that plays at `fps`, every frame of it; the clip itself where it does already.

    Raises:
        ValueError: its frames are not stored in the order of time, so their times cannot be told anew.
    """
    if clip_fps(path) == fps:
        return path
    import av

    copy = folder / "retimed.mkv"
    pace = Fraction(fps).limit_denominator(1001)
    with av.open(str(path)) as source, av.open(str(copy), "w", format="matroska") as sink:
        stream = source.streams.video[0]
        if stream.codec_context.has_b_frames:
            raise ValueError(
                f"{path} has frames out of order; give --fps {clip_fps(path):g}, a clip without, or images"
            )
        written = sink.add_stream_from_template(stream)
        packets = (packet for packet in source.demux(stream) if packet.size)
        for number, packet in enumerate(packets):
            packet.time_base, packet.pts, packet.dts, packet.duration = 1 / pace, number, number, 1
            packet.stream = written
            sink.mux(packet)
    if clip_fps(copy) != fps:
        raise ValueError(f"{path} cannot be played at {fps:g} frames a second; give --fps {clip_fps(path):g}")
    return copy
