"""Small pictures for the page, where they are switched on, and what a picture of each frame would have cost.

A preview leaves the device only where `[preview] enabled = true`. What a frame would cost as a JPEG is found by
encoding one now and then; only its size is kept, in the counters. A frame due for neither costs two lookups in a dict.
"""

from __future__ import annotations

import cv2

from runtime import packet
from runtime.codec import JpegCodec
from runtime.config import PreviewConfig
from runtime.counters import Counters
from runtime.datatypes import Frame, Pixels
from runtime.link import Lane, Link
from runtime.manifest import Bundle
from runtime.preprocess import prepare
from runtime.topics import Subtree, publish_bytes

SAMPLE_S = 10.0  # one frame of a camera in so long is weighed as a JPEG
SAMPLE_QUALITY = 75


class Pace:
    """Says for each camera when the next picture is due; `period_s` apart at least."""

    def __init__(self, period_s: float) -> None:
        self._period_ns = int(period_s * 1e9)
        self._next_ns: dict[str, int] = {}

    def due(self, camera: str, now_ns: int) -> bool:
        """Whether this frame is one to take; the first of a camera always is."""
        if now_ns < self._next_ns.get(camera, now_ns):
            return False
        self._next_ns[camera] = now_ns + self._period_ns
        return True


def small_jpeg(pixels: Pixels, width: int, quality: int) -> bytes:
    """A frame as a JPEG that is `width` pixels wide, or as wide as the frame where that is less.

    Args:
        pixels: uint8 (height, width, 3), RGB.
        width: of the picture, at most; its height keeps the proportions.
        quality: of the JPEG, 1 to 100.
    """
    height, given = pixels.shape[:2]
    if given > width:
        size = (width, max(1, round(height * width / given)))
        pixels = cv2.resize(pixels, size, interpolation=cv2.INTER_AREA).astype("uint8", copy=False)
    done, data = cv2.imencode(".jpg", cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, quality])
    assert done, "OpenCV encodes every picture that has a pixel"
    return data.tobytes()


class Previews:
    """Publishes previews of a device's cameras, if asked to, and weighs frames as JPEGs into `counters`."""

    def __init__(self, config: PreviewConfig, link: Link, topics: Subtree, bundle: Bundle, counters: Counters) -> None:
        self._config = config
        self._link = link
        self._topics = topics
        self._counters = counters
        self._preprocess = bundle.manifest.preprocess
        self._jpeg = JpegCodec(bundle.manifest.cuts[0], SAMPLE_QUALITY)
        self._request = topics.request(bundle.key8, 0)
        self._previews = Pace(1.0 / config.max_fps)
        self._samples = Pace(SAMPLE_S)

    def see(self, frame: Frame) -> None:
        """Take note of a frame that the device is about to answer."""
        if self._config.enabled and self._link.connected and self._previews.due(frame.camera, frame.captured_ns):
            picture = small_jpeg(frame.pixels, self._config.width, self._config.quality)
            sent_bytes = self._link.publish(self._topics.preview(frame.camera), picture, lane=Lane.STATS)
            self._counters.add("preview_bytes_total", sent_bytes, camera=frame.camera)
        if self._samples.due(frame.camera, frame.captured_ns):
            payload = self._jpeg.encode(prepare(frame.pixels, self._preprocess))
            cost = publish_bytes(self._request, packet.HEADER.size + len(payload))
            self._counters.add("jpeg_equivalent_bytes_total", cost)
            self._counters.add("jpeg_equivalent_frames_total")
