"""Keeps what a sender writes below what a broker takes: a payload that would be over it goes up by a smaller rate."""

from __future__ import annotations

import logging
from dataclasses import dataclass

from runtime.coding import Coded, Encoder
from runtime.counters import Counters
from runtime.datatypes import Tensor
from runtime.manifest import Bundle
from runtime.plan_rates import Way

log = logging.getLogger(__name__)

TRY_AGAIN = 256  # frames after which the rate that was too large is tried again


def smaller(bundle: Bundle, way: Way) -> Way | None:
    """The next smaller rate of the same codec at the same cut; None: it is the smallest."""
    spec = next(spec for spec in bundle.manifest.cuts[way.cut].codecs if spec.name == way.codec)
    # Of every codec that has rates a smaller parameter means fewer bytes; see docs/codec.md.
    below = [index for index, rate in enumerate(spec.rates) if rate.parameter < spec.rates[way.rate].parameter]
    if not below:
        return None
    return Way(way.cut, way.codec, max(below, key=lambda index: spec.rates[index].parameter))


@dataclass(slots=True)
class _Step:
    """What goes up in place of a way whose frames have become too large."""

    way: Way
    left: int = TRY_AGAIN  # frames, until the way itself is tried again


class Fitting:
    """An encoder whose payloads have no more bytes than asked for. Any thread may use it."""

    def __init__(self, bundle: Bundle, encoder: Encoder, counters: Counters) -> None:
        self._bundle, self._encoder, self._counters = bundle, encoder, counters
        self._steps: dict[Way, _Step] = {}
        self._told = False

    def encode(
        self, tensor: Tensor, *, camera: int, origin: str | None, alone: bool, way: Way, most_bytes: int
    ) -> Coded | None:
        """Encode a frame as `Encoder.encode` does, by a smaller rate of `way`'s codec where it has to be.

        Args:
            tensor: the features (1, …).
            camera: index in the list of whoever has the camera.
            origin: who that is, when it is not this sender itself.
            alone: whether the frame must not be coded against another.
            way: cut, codec and rate, prepared.
            most_bytes: that the payload may have.

        Returns:
            The frame, or None where even the smallest rate has more bytes.
        """
        step = self._steps.get(way)
        tried = way
        if step is not None and step.left > 0:
            step.left -= 1
            tried = step.way
        again = step is not None and tried == way
        while True:
            aside = alone or (again and tried == way)
            coded = self._encoder.encode(tensor, camera=camera, origin=origin, alone=aside, way=tried)
            if len(coded.payload) <= most_bytes:
                break
            below = smaller(self._bundle, tried)
            if below is None:
                return None
            if not self._told:
                self._told = True
                log.warning(
                    "a frame of %d bytes is over the %d that fit in one message, so it goes up by a smaller rate; "
                    "raise max_packet_size of the broker, or choose a smaller rate",
                    len(coded.payload),
                    most_bytes,
                )
            self._encoder.prepare(below)
            tried = below
        if tried == way:
            self._steps.pop(way, None)
        else:
            self._counters.add("offload_stepped_down_total", reason="oversize")
            if step is None or again or tried != step.way:
                self._steps[way] = _Step(tried)
        return coded
