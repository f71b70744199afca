from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

from runtime.errors import ConfigError
from runtime.listen import Memory, Printer

TOPIC = "kinflow/v1/home/d/board/cam/porch/event"


@pytest.mark.parametrize("payload", [b"", b"{", b'{"id": "\xff"}', b"[]", b'{"id": 1}', b"\x00\xff"])
def test_what_is_no_event_is_told_and_passed_over(
    payload: bytes, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    caplog.set_level(logging.WARNING)
    Printer(True, None).put(TOPIC, payload)
    assert "no event that this version can read" in caplog.text
    assert capsys.readouterr().out == ""


def told(sequence: int, session: str = "a1") -> bytes:
    event = {"type": "new", "camera": "porch", "label": "lamp", "score": 0.9, "duration_ms": 1.0}
    return json.dumps({"session": session, "sequence": sequence, **event}).encode()


def test_a_gap_makes_it_ask_the_device_and_not_for_every_event() -> None:
    printer = Printer(True, None)
    asked = [printer.put(TOPIC, told(sequence)) for sequence in (3, 4, 6, 8)]
    assert asked == [None, None, "kinflow/v1/home/d/board/again", None]
    assert printer.put(TOPIC.replace("board", "other"), told(1)) is None
    assert printer.put(TOPIC.replace("board", "other"), told(3)) == "kinflow/v1/home/d/other/again"


def test_whoever_was_ever_heard_can_be_asked(tmp_path: Path) -> None:
    path = tmp_path / "seen"
    known = [{"sender": sender, "name": "a", "runs": [[1, 2]], "missing": 0} for sender in ("kinflow/v1/home/d/#", "x")]
    path.write_text(json.dumps(known))
    printer = Printer(True, Memory(path))
    assert printer.all_again() == []
    for session in ("a1", "a2"):
        printer.put(TOPIC, told(1, session))
    assert printer.all_again() == ["kinflow/v1/home/d/board/again"]


@pytest.mark.parametrize("content", [b"{", b'["\xff"]', b"{}", b"\xff"])
def test_a_file_that_is_no_memory_is_refused_in_a_sentence(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "seen"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match="is no file of ours"):
        Memory(path)
    assert path.read_bytes() == content, "and stays as it was"
