"""Features ↔ payloads on both ends of a link: alone, or against an earlier frame where the codec can do that.

Codecs know nothing of packets, references nothing of codecs; here the two meet.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass

import numpy as np

from runtime import packet
from runtime.codec import CODECS, Codec, Codecs, ReferenceCodec, find_rate
from runtime.datatypes import Tensor
from runtime.errors import PacketError
from runtime.manifest import Bundle
from runtime.packet import Packet
from runtime.plan_rates import Way
from runtime.references import RECEIVER_BYTES, HeldReferences, SentReferences, Source, StreamNumbers


class ReferenceMissingError(PacketError):
    """A frame is coded against one that is not held here; it has to come again, standing alone."""


@dataclass(frozen=True, slots=True)
class Coded:
    """One frame's payload, and what the header has to say of it."""

    sequence: int
    payload: bytes
    camera: int
    way: Way
    flags: int = 0
    reference: int | None = None


class Encoder:
    """The sender's end at one cut with one codec and rate at a time. Any thread may use it; encoding is one at a time.

    Frames may be given another way than the last ones: then all streams' references begin anew, since levels of
    different rates do not compare.

    Raises:
        ConfigError: the bundle has no such codec or rate at this cut.
        BundleError: the codec cannot be used on this machine.
    """

    def __init__(self, bundle: Bundle, *, codec: str, cut: int, between_frames: bool = True) -> None:
        self._bundle, self._between_frames = bundle, between_frames
        self._codecs = Codecs(bundle)
        self._known: dict[Way, tuple[Codec, ReferenceCodec | None]] = {}
        self.way = Way(cut, *find_rate(bundle, cut, codec))
        self.prepare(self.way)
        self._numbers = StreamNumbers()
        self._references: SentReferences[int] = SentReferences()  # by number of the camera
        self._alone_bytes: dict[int, int] = {}  # by number of the camera: its last frame that was coded standing alone
        self._sequence = 0
        self._lock = threading.Lock()

    def prepare(self, way: Way) -> None:
        """Make ready what a way needs, so that what is damaged shows now, and no frame waits for graphs to load.

        Raises:
            BundleError, PacketError: the bundle has no such codec or rate, or it cannot be used on this machine.
        """
        codec = self._codecs.get(way.cut, CODECS[way.codec], way.rate)
        spec = self._bundle.manifest.cuts[way.cut]
        codec.encode(np.zeros((1, *spec.shape), spec.dtype))
        # Asked once: what `isinstance` takes with a protocol is a tenth of a frame's encoding.
        against = codec if self._between_frames and isinstance(codec, ReferenceCodec) else None
        self._known[way] = (codec, against)

    def encode(
        self,
        tensor: Tensor,
        *,
        camera: int,
        origin: str | None = None,
        alone: bool = False,
        way: Way | None = None,
    ) -> Coded:
        """Encode the features (1, …) of one frame and give it the next sequence number.

        Args:
            tensor: the features.
            camera: index in the list of whoever has the camera.
            origin: who that is, when it is not this sender itself.
            alone: whether the frame must not be coded against another.
            way: how from now on, or, with `alone`, for this frame only; it has been prepared. None: as the last ones.
        """
        with self._lock:
            sequence, self._sequence = self._sequence, (self._sequence + 1) % packet.NONE
            if origin is not None:
                camera, taken = self._numbers.number(origin, camera)
                if taken:
                    self._references.forget(camera)
            aside = way is not None and alone and way != self.way
            if way is not None and not aside and way != self.way:
                self.way, self._references, self._alone_bytes = way, SentReferences(), {}
            plain, codec = self._known[way if aside and way is not None else self.way]
            if aside and way is not None:
                return Coded(sequence, plain.encode(tensor), camera, way)
            if codec is None or self._references.pausing(camera):
                return Coded(sequence, plain.encode(tensor), camera, self.way)
            reference = None if alone else self._references.newest(camera, sequence)
            payload, levels = codec.encode_against(tensor, None if reference is None else reference.levels)
            if reference is not None and len(payload) > self._alone_bytes.get(camera, 0):
                # Another scene, perhaps: then the reference does harm.
                by_itself, its_levels = codec.encode_against(tensor, None)
                self._alone_bytes[camera] = len(by_itself)
                if len(by_itself) <= len(payload):
                    payload, levels, reference = by_itself, its_levels, None
            elif reference is None:
                self._alone_bytes[camera] = len(payload)
            self._references.sent(camera, sequence, levels, reference)
            against = None if reference is None else reference.sequence
            return Coded(sequence, payload, camera, self.way, packet.KEEP, against)

    def acknowledge(self, sequence: int) -> None:
        """A reply proves that the frame sent as `sequence` was decoded."""
        with self._lock:
            self._references.acknowledge(sequence)

    def miss(self, sequence: int) -> int:
        """The receiver lacks what the frame `sequence` was coded against. Returns frames that will stand alone."""
        with self._lock:
            return self._references.miss(sequence)


class Decoder:
    """The receiver's end for all cuts, codecs and rates of a bundle, and all clients. Belongs to one thread."""

    def __init__(self, bundle: Bundle, *, max_reference_bytes: int = RECEIVER_BYTES) -> None:
        self._codecs = Codecs(bundle)
        self._against: dict[tuple[int, int, int], ReferenceCodec | None] = {}
        self.references = HeldReferences(max_bytes=max_reference_bytes)

    def decode(self, client: str, message: Packet) -> Tensor:
        """Return the features (1, …) of a packet of kind FEATURES that came from `client`.

        Raises:
            ReferenceMissingError: the frame it is coded against is not held here.
            PacketError: the payload is not what the codec writes.
        """
        key = message.cut, message.codec, message.rate
        alone = self._codecs.get(*key)
        if key not in self._against:  # asked once, as `isinstance` takes long with a protocol
            self._against[key] = alone if isinstance(alone, ReferenceCodec) else None
        codec = self._against[key]
        if codec is None and message.reference is not None:
            raise PacketError(f"codec {message.codec} codes no frame against another")
        if codec is None or (message.reference is None and not message.flags & packet.KEEP):
            return alone.decode(message.payload)
        source = Source(client, message.session, message.camera, *key)
        against = None
        if message.reference is not None:
            against = self.references.find(source, message.reference)
            if against is None:
                raise ReferenceMissingError(f"frame {message.reference}, which this one is coded against, is not here")
        tensor, levels = codec.decode_against(message.payload, against)
        if message.reference is not None:
            self.references.used(source, message.reference)
        if message.flags & packet.KEEP:
            self.references.keep(source, message.sequence, levels)
        return tensor
