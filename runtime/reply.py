"""What a node says back: the payload of packets of kind RESULT, JSON so that people can read the wire."""

from __future__ import annotations

from typing import Annotated

import msgspec

from runtime.datatypes import ExitOutput
from runtime.errors import PacketError

MAX_DEGRADED = 200
MAX_TIMINGS = 256
Score = Annotated[float, msgspec.Meta(ge=0, le=1)]
Milliseconds = Annotated[float, msgspec.Meta(ge=-1e9, le=1e9)]  # those of a network are a difference


class Reply(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """An answer from above."""

    tier: Annotated[str, msgspec.Meta(pattern="^[A-Za-z0-9_-]{1,64}$")]
    exit: Annotated[int, msgspec.Meta(ge=0, le=255)]
    confidence: Score
    answer: msgspec.Raw  # only the task can read it: runtime.task.Task.decode
    # stage → ms, each with the name of its tier
    timings: Annotated[dict[str, Milliseconds], msgspec.Meta(max_length=MAX_TIMINGS)] = {}
    degraded: Annotated[str, msgspec.Meta(max_length=MAX_DEGRADED)] | None = None


def of(said: ExitOutput, tier: str, timings: dict[str, float], degraded: str | None = None) -> Reply:
    """What an exit of `tier` said, as a reply."""
    answer = msgspec.Raw(msgspec.json.encode(said.answer))
    return Reply(
        tier=tier, exit=said.exit, confidence=said.confidence, answer=answer, timings=timings, degraded=degraded
    )


def encode(reply: Reply) -> bytes:
    """Return the reply as JSON; floats keep every bit."""
    return msgspec.json.encode(reply)


def decode(payload: bytes) -> Reply:
    """Read a reply.

    Raises:
        PacketError: the payload is not what `encode` writes.
    """
    try:
        return msgspec.json.decode(payload, type=Reply)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise PacketError(f"the reply is damaged: {error}") from error
