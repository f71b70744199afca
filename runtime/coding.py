"""Features ↔ payloads on both ends of a link: alone, or against an earlier frame where the codec can do that.

Codecs know nothing of packets, references nothing of codecs; here the two meet.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass

import numpy as np

from runtime import packet
from runtime.codec import CODECS, Codecs, ReferenceCodec, find_rate
from runtime.datatypes import Tensor
from runtime.errors import PacketError
from runtime.manifest import Bundle
from runtime.packet import Packet
from runtime.references import RECEIVER_BYTES, HeldReferences, SentReferences, Source, StreamNumbers


class ReferenceMissingError(PacketError):
    """A frame is coded against one that is not held here; it has to come again, standing alone."""


@dataclass(frozen=True, slots=True)
class Coded:
    """One frame's payload, and what the header has to say of it."""

    sequence: int
    payload: bytes
    camera: int
    flags: int = 0
    reference: int | None = None


class Encoder:
    """The sender's end at one cut with one codec and rate. Any thread may use it; encoding is one at a time.

    Raises:
        ConfigError: the bundle has no such codec or rate at this cut.
        BundleError: the codec cannot be used on this machine.
    """

    def __init__(self, bundle: Bundle, *, codec: str, cut: int, between_frames: bool = True) -> None:
        self.codec, self.rate = find_rate(bundle, cut, codec)
        self._codec = Codecs(bundle).get(cut, CODECS[self.codec], self.rate)
        # What is damaged shows now, and the first frame does not wait for graphs to load.
        self._codec.encode(np.zeros((1, *bundle.manifest.cuts[cut].shape), bundle.manifest.cuts[cut].dtype))
        # Asked once: what `isinstance` takes with a protocol is a tenth of a frame's encoding.
        self._against = self._codec if between_frames and isinstance(self._codec, ReferenceCodec) else None
        self._numbers = StreamNumbers()
        self._references: SentReferences[int] = SentReferences()  # by number of the camera
        self._alone_bytes: dict[int, int] = {}  # by number of the camera: its last frame that was coded standing alone
        self._sequence = 0
        self._lock = threading.Lock()

    def encode(self, tensor: Tensor, *, camera: int, origin: str | None = None, alone: bool = False) -> Coded:
        """Encode the features (1, …) of one frame and give it the next sequence number.

        Args:
            tensor: the features.
            camera: index in the list of whoever has the camera.
            origin: who that is, when it is not this sender itself.
            alone: whether the frame must not be coded against another.
        """
        with self._lock:
            sequence, self._sequence = self._sequence, (self._sequence + 1) % packet.NONE
            if origin is not None:
                camera, taken = self._numbers.number(origin, camera)
                if taken:
                    self._references.forget(camera)
            codec = self._against
            if codec is None or self._references.pausing(camera):
                return Coded(sequence, self._codec.encode(tensor), camera)
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
            return Coded(sequence, payload, camera, packet.KEEP, None if reference is None else reference.sequence)

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
