from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from runtime.errors import PacketError
from runtime.packet import HEADER, MAX_PAYLOAD_BYTES, NONE, Kind, Packet, pack, unpack

GOLDEN = Path(__file__).parent.parent / "golden" / "packet_v1.hex"
# What the lines of the golden file hold, in their order. Both are only ever added to.
GOLDEN_PACKETS = (
    Packet(Kind.FEATURES, b"\x00\x01\x02\x03\x04\x05\x06\x07", session=1, sequence=0, payload=b""),
    Packet(
        Kind.FEATURES,
        bytes.fromhex("deadbeefcafef00d"),
        session=0x01020304,
        sequence=0x05060708,
        payload=b"features",
        codec=1,
        cut=2,
        rate=3,
        variant=4,
        camera=5,
        flags=6,
        reference=0x090A0B0C,
        budget_ms=0x0D0E0F10,
        age_us=0x11121314,
    ),
    Packet(Kind.RESULT, b"\xff" * 8, session=NONE, sequence=NONE, payload=b'{"tier":"cloud"}', cut=255, camera=255),
    Packet(Kind.REFUSAL, b"\x80" * 8, session=7, sequence=8, payload="kein Bündel".encode(), budget_ms=0, age_us=NONE),
    Packet(
        Kind.FEATURES, b"\x0a" * 8, session=9, sequence=10, payload=bytes(range(256)), reference=0, budget_ms=NONE - 1
    ),
)

u8 = st.integers(0, 255)
u32 = st.integers(0, NONE)
packets = st.builds(
    Packet,
    kind=st.sampled_from(Kind),
    bundle=st.binary(min_size=8, max_size=8),
    session=u32,
    sequence=u32,
    payload=st.binary(max_size=300),
    codec=u8,
    cut=u8,
    rate=u8,
    variant=u8,
    camera=u8,
    flags=u8,
    reference=st.none() | st.integers(0, NONE - 1),
    budget_ms=st.none() | st.integers(0, NONE - 1),
    age_us=u32,
)
PLAIN = Packet(Kind.FEATURES, b"12345678", session=1, sequence=2, payload=b"payload")
WHOLE = [pack(packet) for packet in (PLAIN, *GOLDEN_PACKETS)]


def holds_its_own_bytes(data: bytes) -> None:
    """Anything from the wire is refused by PacketError, or is exactly what its packet packs to."""
    try:
        packet = unpack(data)
    except PacketError:
        return
    assert pack(packet) == data


def test_the_header_is_at_most_48_bytes() -> None:
    assert HEADER.size == 44


@settings(max_examples=300)
@given(packets)
def test_every_packet_comes_back_as_it_was(packet: Packet) -> None:
    assert unpack(pack(packet)) == packet
    assert unpack(memoryview(pack(packet))) == packet


@given(st.integers(NONE - 2, 1 << 80), st.integers(NONE - 2, 1 << 80))
def test_age_and_budget_saturate_and_a_budget_never_turns_into_none(age_us: int, budget_ms: int) -> None:
    back = unpack(pack(dataclasses.replace(PLAIN, age_us=age_us, budget_ms=budget_ms)))
    assert back.age_us == min(age_us, NONE)
    assert back.budget_ms == min(budget_ms, NONE - 1)


@pytest.mark.parametrize(
    "field",
    [
        *({name: value} for name in ("codec", "cut", "rate", "variant", "camera", "flags") for value in (-1, 256)),
        *({name: value} for name in ("session", "sequence") for value in (-1, NONE + 1)),
        {"reference": -1},
        {"reference": NONE},
        {"reference": NONE + 1},
        {"budget_ms": -1},
        {"age_us": -1},
        {"bundle": b""},
        {"bundle": b"1234567"},
        {"bundle": b"123456789"},
        {"payload": bytes(MAX_PAYLOAD_BYTES + 1)},
    ],
    ids=lambda field: "=".join(f"{name}={str(value)[:20]}" for name, value in field.items()),
)
def test_what_the_header_cannot_hold_is_refused_and_never_bent(field: dict[str, Any]) -> None:
    with pytest.raises(PacketError):
        pack(dataclasses.replace(PLAIN, **field))


def test_the_largest_payload_passes() -> None:
    packet = dataclasses.replace(PLAIN, payload=bytes(MAX_PAYLOAD_BYTES))
    assert unpack(pack(packet)) == packet


@settings(max_examples=1000)
@given(st.sampled_from([b"", b"KF\x01\x01"]), st.binary(max_size=100))
@example(b"", b"")
@example(b"KF", b"")
def test_random_bytes_are_refused_or_hold_their_packet(start: bytes, rest: bytes) -> None:
    holds_its_own_bytes(start + rest)


@pytest.mark.parametrize("whole", WHOLE, ids=len)
def test_any_byte_of_a_header_that_is_another_is_refused_or_holds_its_packet(whole: bytes) -> None:
    for position in range(HEADER.size):
        for value in range(256):
            holds_its_own_bytes(whole[:position] + bytes([value]) + whole[position + 1 :])


@settings(max_examples=1000)
@given(st.sampled_from(WHOLE), st.binary(min_size=4, max_size=8))
def test_flipped_bytes_are_refused_or_hold_their_packet(whole: bytes, flips: bytes) -> None:
    data = bytearray(whole)
    for position, change in zip(flips[::2], flips[1::2], strict=False):
        data[position % len(data)] ^= change
    holds_its_own_bytes(bytes(data))


@pytest.mark.parametrize("whole", WHOLE, ids=len)
def test_a_packet_cut_short_anywhere_is_refused(whole: bytes) -> None:
    for length in range(len(whole)):
        with pytest.raises(PacketError):
            unpack(whole[:length])


@settings(max_examples=1000)
@given(st.sampled_from(WHOLE), st.binary(min_size=1, max_size=100))
def test_a_packet_with_more_behind_it_is_refused(whole: bytes, more: bytes) -> None:
    with pytest.raises(PacketError):
        unpack(whole + more)


@pytest.mark.parametrize(
    ("position", "value", "sentence"),
    [
        (0, 0, "does not start with KF"),
        (2, 2, "packet version 2 is not 1"),
        (3, 0, "packet kind 0 is unknown"),
        (3, 4, "packet kind 4 is unknown"),
        (10, 1, "reserved bytes"),
        (11, 1, "reserved bytes"),
        (40, 8, "promises 8 payload bytes, 7 came"),
    ],
)
def test_a_wrong_header_is_refused_with_what_is_wrong(position: int, value: int, sentence: str) -> None:
    data = bytearray(pack(PLAIN))
    data[position] = value
    with pytest.raises(PacketError, match=sentence):
        unpack(bytes(data))


def test_a_payload_over_the_limit_is_refused_even_when_its_length_is_true() -> None:
    data = pack(PLAIN)[:40] + (MAX_PAYLOAD_BYTES + 1).to_bytes(4, "little") + bytes(MAX_PAYLOAD_BYTES + 1)
    with pytest.raises(PacketError, match="promises"):
        unpack(data)


def test_the_golden_bytes_are_what_packs_and_unpacks_today() -> None:
    lines = [line for line in GOLDEN.read_text("ascii").splitlines() if line and not line.startswith("#")]
    assert [bytes.fromhex(line) for line in lines] == [pack(packet) for packet in GOLDEN_PACKETS]
    assert tuple(unpack(bytes.fromhex(line)) for line in lines) == GOLDEN_PACKETS
