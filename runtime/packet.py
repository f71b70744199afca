"""The wire format: a fixed little-endian header and a payload. Pure: bytes in, values out (docs/wire.md).

Shapes, scales and dictionaries are not sent: the bundle that both ends hold knows them by cut, codec and rate.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from enum import IntEnum

from runtime.errors import PacketError

MAGIC = b"KF"
VERSION = 1
HEADER = struct.Struct("<2sBBBBBBBB2x8sIIIIII")
BUNDLE_BYTES = 8
MAX_PAYLOAD_BYTES = 8 * 1024 * 1024
NONE = 0xFFFF_FFFF  # "no reference", "no budget"


KEEP = 1  # flag of FEATURES: later frames may be coded against this one
REFERENCE_MISSING = 2  # flag of REFUSAL: the node lacks what the frame is coded against; send it standing alone


class Kind(IntEnum):
    """What the payload is."""

    FEATURES = 1  # a codec's bytes; travels up
    RESULT = 2  # JSON of a node's answer; travels down
    REFUSAL = 3  # a sentence in UTF-8: why the node will not answer; travels down


@dataclass(frozen=True, slots=True)
class Packet:
    """One message between tiers. Durations only: boards have no clock that another tier could trust."""

    kind: Kind
    bundle: bytes  # first 8 bytes of the bundle id
    session: int  # u32, drawn at each start of the sender, so that a restart is never mistaken for old frames
    sequence: int  # u32, counts the sender's packets; a reply carries the request's
    payload: bytes
    codec: int = 0  # codec id
    cut: int = 0
    rate: int = 0  # index into the codec's rates in the manifest
    variant: int = 0
    camera: int = 0  # index in the sender's list of cameras
    flags: int = 0  # KEEP, REFERENCE_MISSING
    reference: int | None = None  # sequence number of the frame this one is coded against
    budget_ms: int | None = None  # time still left for an answer when this packet left; None: no limit
    age_us: int = 0  # time since the grab when this packet left; saturates


def pack(packet: Packet) -> bytes:
    """Return the packet as bytes: a header of `HEADER.size` bytes, then the payload.

    Raises:
        PacketError: the payload is larger than `MAX_PAYLOAD_BYTES` or a field is out of its range.
    """
    if len(packet.payload) > MAX_PAYLOAD_BYTES:
        raise PacketError(f"a payload of {len(packet.payload)} bytes is over the limit of {MAX_PAYLOAD_BYTES}")
    if len(packet.bundle) != BUNDLE_BYTES or packet.reference == NONE:
        raise PacketError(f"bundle {packet.bundle.hex()} or reference {packet.reference} does not fit the header")
    try:
        header = HEADER.pack(
            MAGIC,
            VERSION,
            packet.kind,
            packet.codec,
            packet.cut,
            packet.rate,
            packet.variant,
            packet.camera,
            packet.flags,
            packet.bundle,
            packet.session,
            packet.sequence,
            NONE if packet.reference is None else packet.reference,
            NONE if packet.budget_ms is None else min(packet.budget_ms, NONE - 1),
            min(packet.age_us, NONE),
            len(packet.payload),
        )
    except struct.error as error:
        raise PacketError(f"a packet field is out of range: {error}") from error
    return header + packet.payload


def unpack(data: bytes | memoryview) -> Packet:
    """Return the packet that `data` holds, the whole of it.

    Raises:
        PacketError: anything that `pack` would not have written.
    """
    if len(data) < HEADER.size:
        raise PacketError(f"{len(data)} bytes are too few for a packet header of {HEADER.size}")
    (magic, version, kind, codec, cut, rate, variant, camera, flags, bundle,
     session, sequence, reference, budget_ms, age_us, length) = HEADER.unpack_from(data)  # fmt: skip
    if magic != MAGIC:
        raise PacketError("this is not a Kinflow packet: it does not start with KF")
    if version != VERSION:
        raise PacketError(f"packet version {version} is not {VERSION}; run the same Kinflow on every tier")
    if length > MAX_PAYLOAD_BYTES or length != len(data) - HEADER.size:
        raise PacketError(f"the header promises {length} payload bytes, {len(data) - HEADER.size} came")
    if data[10] or data[11]:
        raise PacketError("the reserved bytes of the header are not zero")
    try:
        known = Kind(kind)
    except ValueError:
        raise PacketError(f"packet kind {kind} is unknown") from None
    return Packet(
        kind=known,
        bundle=bundle,
        session=session,
        sequence=sequence,
        payload=bytes(data[HEADER.size :]),
        codec=codec,
        cut=cut,
        rate=rate,
        variant=variant,
        camera=camera,
        flags=flags,
        reference=None if reference == NONE else reference,
        budget_ms=None if budget_ms == NONE else budget_ms,
        age_us=age_us,
    )
