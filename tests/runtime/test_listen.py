from __future__ import annotations

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


@pytest.mark.parametrize("content", [b"{", b'["\xff"]', b"{}", b"\xff"])
def test_a_file_that_is_no_memory_is_refused_in_a_sentence(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "seen"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match="is no file of ours"):
        Memory(path)
    assert path.read_bytes() == content, "and stays as it was"
