from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime import reply
from runtime.datatypes import ExitOutput
from runtime.errors import PacketError
from runtime.reply import Reply
from runtime.task_classify import Classification

replies = st.builds(
    Reply,
    tier=st.from_regex(r"[A-Za-z0-9_-]{1,64}", fullmatch=True),
    exit=st.integers(0, 255),
    confidence=st.floats(0, 1),
    answer=st.dictionaries(st.text(max_size=9), st.floats(0, 1), max_size=5).map(msgspec.json.encode).map(msgspec.Raw),
    timings=st.dictionaries(st.text(max_size=20), st.floats(-1e9, 1e9), max_size=5),
    degraded=st.none() | st.text(max_size=200),
)
GOOD: dict[str, Any] = {"tier": "cloud", "exit": 3, "confidence": 0.75, "answer": {"topk": [[1, 0.75], [0, 0.25]]}}


@given(replies)
def test_a_reply_comes_back_as_it_was_to_the_last_bit(said: Reply) -> None:
    assert reply.decode(reply.encode(said)) == said


def test_a_reply_is_json_that_a_person_can_read() -> None:
    said = reply.of(ExitOutput(3, 0.75, Classification(topk=((1, 0.75),))), "cloud", {"cloud.segment2": 1.5})
    assert json.loads(reply.encode(said)) == {
        "tier": "cloud",
        "exit": 3,
        "confidence": 0.75,
        "answer": {"topk": [[1, 0.75]]},
        "timings": {"cloud.segment2": 1.5},
        "degraded": None,
    }


@pytest.mark.parametrize(
    "change",
    [
        {"tier": None},
        {"tier": "x" * 65},
        {"tier": 'a"b'},
        {"exit": -1},
        {"exit": 1.5},
        {"confidence": 1.5},
        {"confidence": None},
        {"timings": {"segment0": "fast"}},
        {"timings": {"segment0": 1e308}},
        {"timings": {"network": -1e308}},
        {"degraded": "x" * 201},
        {"more": 1},
    ],
    ids=str,
)
def test_a_field_that_is_not_as_promised_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(PacketError, match="the reply is damaged"):
        reply.decode(json.dumps({**GOOD, **change}).encode())


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"null",
        b"[]",
        b"{}",
        b'{"tier":"\xff","exit":1,"confidence":0.5,"answer":{}}',
        b'{"\xff":1}',
        b"[" * 100_000,
    ],
    ids=lambda payload: str(payload[:16]),
)
def test_what_is_no_reply_is_refused(payload: bytes) -> None:
    with pytest.raises(PacketError, match="the reply is damaged"):
        reply.decode(payload)


@settings(max_examples=1000)
@given(st.binary(min_size=2, max_size=6), st.binary(max_size=4))
def test_a_mutated_reply_is_refused_or_is_a_reply(flips: bytes, more: bytes) -> None:
    data = bytearray(json.dumps(GOOD).encode() + more)
    for position, change in zip(flips[::2], flips[1::2], strict=False):
        data[position % len(data)] ^= change
    try:
        said = reply.decode(bytes(data))
    except PacketError:
        return
    assert 0 <= said.confidence <= 1
