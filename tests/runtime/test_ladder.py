from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime.ladder import RUNGS, Ladder, Limits
from runtime.thermals import Board, Thermals, decode

SECOND = 1_000_000_000
COOL = Board(celsius=50.0)


def ladder() -> Ladder:
    return Ladder(warm_celsius=75, hot_celsius=82)


def step(steps: Ladder, at_s: float, board: Board | None = COOL, lost: str | None = None) -> Limits:
    return steps.step(round(at_s * SECOND), lost=lost, board=board, bytes_now=1000.0)


def test_nothing_wrong_is_the_full_rung_and_leaves_everything() -> None:
    assert step(ladder(), 1) == Limits()


def test_late_frames_step_down_one_rung_after_the_other_and_calm_leads_back() -> None:
    steps = ladder()
    for at in (1.0, 1.1):
        steps.sent(round(at * SECOND), late=True)
    smaller = step(steps, 1.2)
    assert (smaller.rung, smaller.max_bytes, smaller.sends) == ("smaller rate", 500.0, True)
    assert smaller.reason == "2 of the last 2 frames that went up were late"
    assert step(steps, 2).rung == "smaller rate"
    for at in (2.1, 2.2):
        steps.sent(round(at * SECOND), late=True)
    deeper = step(steps, 2.3)
    assert (deeper.rung, deeper.max_bytes, deeper.deepest) == ("deeper local exit", 250.0, True)
    for n in range(10):
        steps.sent(round((3 + n / 10) * SECOND), late=False)
    assert step(steps, 4).rung == "deeper local exit"
    assert step(steps, 8.4).rung == "smaller rate"
    assert step(steps, 9).rung == "smaller rate"
    assert step(steps, 12.5).rung == "full"


def test_what_was_late_under_another_plan_is_no_reason() -> None:
    steps = ladder()
    for at in (1.0, 1.1):
        steps.sent(round(at * SECOND), late=True)
    steps.moved()
    assert step(steps, 1.2) == Limits()
    steps.sent(round(1.3 * SECOND), late=True)
    assert step(steps, 1.4) == Limits()


def test_one_stall_of_a_quick_stream_is_no_reason_and_lasting_lateness_is() -> None:
    steps = ladder()
    for n in range(90):  # 15 a second; those of a third of a second are held up together
        steps.sent(round(n / 15 * SECOND), late=60 <= n < 65)
        assert step(steps, n / 15).rung == "full"
    for n in range(90, 120):
        steps.sent(round(n / 15 * SECOND), late=n % 3 == 0)
        if step(steps, n / 15).rung != "full":
            break
    assert 95 < n < 119


def test_a_lost_link_keeps_everything_here_until_a_word_comes() -> None:
    steps = ladder()
    lost = step(steps, 1, lost="nothing has come back for 2.3 s")
    assert (lost.rung, lost.sends, lost.reason) == ("local variant only", False, "nothing has come back for 2.3 s")
    assert step(steps, 1.1).rung == "full"


@pytest.mark.parametrize(
    ("board", "words"),
    [
        (Board(celsius=90.0), "the board is hot, 90 of 82"),
        (Board(celsius=50.0, undervoltage=True), "supply voltage"),
        (Board(celsius=50.0, throttled=True), "throttles"),
    ],
)
def test_a_board_in_need_leaves_only_the_gate_and_comes_back_slowly(board: Board, words: str) -> None:
    steps = ladder()
    hot = step(steps, 1, board)
    assert (hot.rung, hot.sends, hot.computes) == ("gate only", False, False)
    assert words in hot.reason
    assert step(steps, 2).rung == "gate only"
    assert step(steps, 5.1).rung == "full"


def test_a_hot_board_must_cool_by_some_degrees() -> None:
    steps = ladder()
    assert step(steps, 1, Board(celsius=83.0)).rung == "gate only"
    assert step(steps, 20, Board(celsius=79.0)).rung == "gate only"
    assert step(steps, 21, Board(celsius=76.0)).rung == "gate only"
    cooler = step(steps, 30, Board(celsius=76.0))
    assert (cooler.rung, cooler.fastest, cooler.computes) == ("full", True, True)
    assert "warm" in cooler.reason


def test_a_rung_taken_again_soon_is_kept_for_longer() -> None:
    steps = ladder()
    for start, calm in ((0.0, 4.0), (6.0, 8.0)):
        for at in (start + 0.1, start + 0.2):
            steps.sent(round(at * SECOND), late=True)
        assert step(steps, start + 0.3).rung == "smaller rate"
        for n in range(10):
            steps.sent(round((start + 0.4 + n / 100) * SECOND), late=False)
        assert step(steps, start + 0.2 + calm).rung == "smaller rate"
        assert step(steps, start + 0.4 + calm).rung == "full"


@given(st.lists(st.tuples(st.booleans(), st.booleans(), st.floats(30, 95), st.booleans()), max_size=60))
def test_it_always_stands_on_a_rung_and_never_sends_into_a_lost_link(
    events: list[tuple[bool, bool, float, bool]],
) -> None:
    steps = ladder()
    for place, (late, lost, celsius, low) in enumerate(events):
        steps.sent(place * SECOND, late=late)
        board = Board(celsius=celsius, undervoltage=low)
        limits = step(steps, place, board, "gone" if lost else None)
        assert limits.rung in RUNGS
        assert not (lost and limits.sends)
        assert not (low and limits.computes)
    for later in range(200):
        limits = step(steps, len(events) + later)
    assert limits == Limits()


def test_flags_of_the_firmware() -> None:
    assert decode(0) == Board()
    now = decode(0x50005)
    assert (now.undervoltage, now.throttled, now.capped, now.soft_limit, now.before) == (True, True, False, False, ())
    before = decode(0xE0008)
    assert (before.soft_limit, before.undervoltage) == (True, False)
    assert before.before == ("capped", "throttled")


def put(root: Path, name: str, text: str) -> None:
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_a_board_is_read_from_files(tmp_path: Path) -> None:
    put(tmp_path, "class/thermal/thermal_zone0/temp", "61234\n")
    put(tmp_path, "class/thermal/thermal_zone1/temp", "58000\n")
    put(tmp_path, "devices/platform/soc/soc:firmware/get_throttled", "50005\n")
    board = Thermals(tmp_path, None).read()
    assert board is not None
    assert (board.celsius, board.undervoltage, board.throttled) == (61.234, True, True)
    put(tmp_path, "devices/platform/soc/soc:firmware/get_throttled", "no number\n")
    calm = Thermals(tmp_path, None).read()
    assert calm == Board(celsius=61.234)


def test_an_alarm_of_the_voltage_is_undervoltage(tmp_path: Path) -> None:
    put(tmp_path, "class/hwmon/hwmon0/name", "cpu_thermal\n")
    put(tmp_path, "class/hwmon/hwmon1/name", "rpi_volt\n")
    put(tmp_path, "class/hwmon/hwmon1/in0_lcrit_alarm", "1\n")
    board = Thermals(tmp_path, None).read()
    assert board == Board(undervoltage=True)


def test_a_board_is_read_by_a_command(tmp_path: Path) -> None:
    command = tmp_path / "vcgencmd"
    command.write_text("#!/bin/sh\necho throttled=0x80008\n")
    command.chmod(0o755)
    board = Thermals(tmp_path, (str(command), "get_throttled")).read()
    assert board == Board(soft_limit=True)


def test_a_machine_that_says_nothing_says_nothing(tmp_path: Path) -> None:
    assert Thermals(tmp_path, (str(tmp_path / "missing"),)).read() is None


def test_a_link_twice_as_fast_leads_back_at_once() -> None:
    steps = ladder()

    def known(at_s: float, goodput: float) -> Limits:
        return steps.step(round(at_s * SECOND), lost=None, board=COOL, bytes_now=1000.0, goodput=goodput)

    for at in (1.0, 1.1):
        steps.sent(round(at * SECOND), late=True)
    assert known(1.2, 10e3).rung == "smaller rate"
    assert known(1.5, 19e3).rung == "smaller rate"
    assert known(1.6, 21e3) == Limits()
    # A way back that was too soon makes the next one longer.
    for at in (1.7, 1.8):
        steps.sent(round(at * SECOND), late=True)
    assert known(1.9, 21e3).rung == "smaller rate"
    assert known(6.5, 21e3).rung == "smaller rate"
    assert known(10.5, 21e3).rung == "full"
