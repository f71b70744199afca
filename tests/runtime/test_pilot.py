from __future__ import annotations

import itertools

import pytest

from runtime.objective import Objective
from runtime.pilot import Pilot
from runtime.plan_rates import Way
from runtime.plan_tables import Tables
from runtime.thermals import Board
from tests.planner_bundle import planned

MS = 1_000_000
STAGES = {"preprocess": 2.0, "segment0": 20.0, "segment0.v1": 14.0, "segment1": 20.0, "exit1": 0.5, "exit2": 0.5}
NODE = {"edge.decode": 4.0, "edge.segment2": 18.0}
WAY = Way(2, "transform", 3)


def pilot(**limits: float) -> Pilot:
    tables = Tables(planned(exits=False), overhead_bytes=60, deepest=1, above=2, rows=())
    return Pilot(tables, Objective(**({"latency_p95_ms": 400.0} | limits)), budget_ms=2000, stage_ms=STAGES)  # type: ignore[arg-type]


def talk(flown: Pilot, start_ms: int, frames: int, *, goodput: float = 1e6, size: int = 1000, gap_ms: int = 100) -> int:
    """Send frames one after the other and answer each. Returns when the last answer came, in ms."""
    at = start_ms
    for number in range(frames):
        sent = (start_ms + number * gap_ms) * MS
        took = size + 300 * (number % 4)
        back = sent + round((took / goodput * 1000 + 100 + 22) * MS)
        flown.taken(sent)
        flown.sent(sent, took, WAY, encode_ms=3.0)
        flown.replied(sent, back, NODE)
        flown.step(back)
        at = back // MS
    return at


def test_a_frame_that_would_be_late_is_told_before_it_goes_up() -> None:
    flown = pilot()
    now = talk(flown, 1000, 12)
    assert not flown.too_late(now * MS, (now - 30) * MS)
    assert flown.too_late(now * MS, (now - 300) * MS)
    # What is still in the pipe has to pass first.
    assert flown.arrival_ms(now * MS, now * MS) < 200
    flown.sent((now + 1) * MS, 400_000, WAY, encode_ms=3.0)
    assert flown.too_late((now + 2) * MS, (now + 2) * MS)
    flown.withdrawn()
    assert not flown.too_late((now + 2) * MS, (now + 2) * MS)


def test_silence_loses_the_link_and_probes_go_out_at_growing_distances_until_a_word_comes() -> None:
    flown = pilot()
    now = talk(flown, 1000, 5)
    for extra in (1, 2):
        flown.sent((now + extra) * MS, 1000, WAY, encode_ms=3.0)
        flown.missed((now + extra) * MS, (now + 420 + extra) * MS)
    assert flown.step((now + 500) * MS)
    assert flown.decision.candidate.way is None
    assert "nothing has come back for 0.5 s" in flown.decision.why
    times = []
    for at in range(now + 500, now + 15_000, 10):
        found = flown.probing(at * MS)
        if found is not None:
            assert found.copy
            assert found.candidate.parameter == 60
            times.append(at)
            assert found.candidate.way is not None
            flown.sent(at * MS, 300, found.candidate.way, encode_ms=3.0, probe=True)
            flown.missed(at * MS, at * MS)
    gaps = [after - before for before, after in itertools.pairwise(times)]
    assert gaps == sorted(gaps)
    assert gaps[0] <= 600
    assert gaps[-1] == 2000
    assert flown.probing((now + 20_000) * MS, connected=False) is None
    flown.replied(times[-1] * MS, (now + 15_100) * MS, None, late=True)
    flown.step((now + 15_101) * MS)
    assert flown.limits.sends
    talk(flown, now + 15_200, 20)
    assert flown.decision.candidate.way is not None


def test_probes_keep_to_their_share_of_the_bytes() -> None:
    flown = pilot(bytes_per_second=1000.0)
    flown.step(1, connected=True)
    flown.missed(1, 2)
    flown.missed(2, 3)
    flown.step(4)
    times = [at for at in range(0, 60_000, 50) if flown.probing(at * MS + 5) is not None]
    size = (flown.tables.size(Way(2, "transform", 0)) or (0.0, 0.0))[0]
    assert size * (len(times) - 4) / 60 <= 0.05 * 1000  # beside the first few


def test_a_board_in_need_computes_hardly_anything() -> None:
    flown = pilot()
    flown.step(1, board=Board(celsius=50.0, undervoltage=True))
    assert not flown.limits.computes
    assert flown.decision.candidate.way is None
    assert flown.probing(10**10) is None


def test_what_a_local_exit_says_counts_once_it_was_compared() -> None:
    flown = pilot()
    for number in range(40):
        flown.compared(2, same=number % 4 != 0)
    flown.step(1)
    assert flown.known.local_agreement == {2: pytest.approx(0.75)}


def test_what_can_only_come_too_late_is_given_up_before_its_budget_ends() -> None:
    flown = pilot()
    now = talk(flown, 1000, 8)
    for extra in (1, 70):
        flown.sent((now + extra) * MS, 1000, WAY, encode_ms=3.0)
    flown.step((now + 390) * MS)
    assert flown.limits.sends
    flown.step((now + 480) * MS)
    assert flown.limits.rung == "local variant only"
    assert flown.decision.candidate.way is None
    # The first word was held up by the outage: it brings the link back, and says nothing of how fast it is.
    before = flown.known.link
    flown.replied((now + 1) * MS, (now + 3000) * MS, NODE, late=True)
    assert flown.step((now + 3000) * MS)
    assert flown.limits.sends
    assert flown.decision.candidate.way is not None
    assert flown.known.link.rtt_ms == pytest.approx(before.rtt_ms, abs=10)
    assert flown.known.link.goodput == pytest.approx(before.goodput, rel=0.1)
    assert flown.known.link.jitter_ms < 50


def test_frames_that_later_ones_overtook_step_nothing_down() -> None:
    flown = pilot()
    now = talk(flown, 1000, 8)
    for number in range(40):
        sent = (now + 100 * number) * MS
        flown.sent(sent, 1000, WAY, encode_ms=3.0)
        if number % 4:
            flown.replied(sent, sent + 130 * MS, NODE)
        flown.step(sent + 140 * MS)
    assert flown.limits.rung == "full"
    assert flown.known.link.loss_ratio > 0.1
    assert flown.decision.reason in ("start", "better")


def test_nothing_new_is_not_thought_about_again_for_a_while() -> None:
    flown = pilot()
    now = talk(flown, 1000, 8)
    flown.step((now + 500) * MS)
    known = flown.known
    flown.step((now + 890) * MS)
    assert flown.known is known
    flown.step((now + 901) * MS)
    assert flown.known is not known


def test_where_the_device_alone_is_best_nothing_goes_up_to_learn() -> None:
    tables = Tables(planned(exits=False), overhead_bytes=60, deepest=2, above=2, rows=())
    objective = Objective(optimize="bytes", min_agreement=0.9)
    flown = Pilot(tables, objective, budget_ms=2000, stage_ms={**STAGES, "segment2": 20.0})
    assert flown.decision.candidate.way is None
    for at in range(1, 20):
        flown.step(at * 1000 * MS)
        assert flown.probing(at * 1000 * MS) is None


def test_what_goes_up_beside_frames_is_known_by_its_rate() -> None:
    flown = pilot(bytes_per_second=20_000.0)
    for second in range(30):
        flown.beside(second * 1000 * MS, second * 8000)
        flown.beside((second * 1000 + 10) * MS, second * 8000)
    flown.step(30_000 * MS)
    assert flown.known.other_bytes == pytest.approx(8000)
    assert flown.decision.frame_bytes * 10 <= 20_000 - 8000


def test_no_more_is_on_its_way_than_drains_within_the_limit() -> None:
    flown = pilot()
    now = talk(flown, 1000, 12)
    flown.step((now + 300) * MS)
    allowed = 0
    while not flown.full((now + 301 + allowed) * MS):
        flown.sent((now + 301 + allowed) * MS, 25_000, WAY, encode_ms=3.0)
        allowed += 1
    assert flown.known.link.goodput is not None
    assert 2 <= allowed <= flown.limit_ms / 1000 * flown.known.link.goodput / 25_000 + 1


def test_what_drains_soon_may_wait_through_a_stall_but_not_through_a_long_silence() -> None:
    flown = pilot()
    now = talk(flown, 1000, 12)
    flown.step((now + 300) * MS)
    assert flown.known.frames_per_second == pytest.approx(10)
    allowed = 0
    while not flown.full((now + 301 + allowed) * MS):
        flown.sent((now + 301 + allowed) * MS, 10, WAY, encode_ms=3.0)
        allowed += 1
    assert allowed == 10 * flown.limit_ms / 1000 + 1
    assert not flown.too_late((now + 302 + allowed) * MS, (now + 301 + allowed) * MS)
    last = now + 301 + allowed - 1
    flown.replied(last * MS, (now + 500) * MS, NODE)
    assert not flown.full((now + 501) * MS), "what a later one overtook is on no way any more"
    for extra in (510, 520):
        flown.sent((now + extra) * MS, 10, WAY, encode_ms=3.0)
    assert not flown.full((now + 900) * MS)
    assert flown.full((now + 1150) * MS)
    flown.replied((now + 520) * MS, (now + 1160) * MS, NODE, late=True)
    assert not flown.full((now + 1161) * MS)


def test_a_lost_link_is_never_full_and_what_went_up_long_ago_is_forgotten() -> None:
    """Else a source that waits would give no frame that could ask whether the link is back."""
    flown = pilot()
    now = talk(flown, 1000, 12)
    for extra in (1, 2):
        flown.sent((now + extra) * MS, 1000, WAY, encode_ms=3.0)
    assert flown.full((now + 900) * MS)
    for extra in (1, 2):
        flown.missed((now + extra) * MS, (now + 900 + extra) * MS)
    assert flown.known.link.lost or flown.step((now + 910) * MS)
    assert not flown.full((now + 920) * MS)
    asked = [at for at in range(now + 920, now + 6000, 20) if flown.probing(at * MS) is not None]
    assert asked
    flown.replied(0, (now + 12_000) * MS, None)  # a word that tells nothing but that somebody is there
    flown.step((now + 12_000) * MS)
    assert not flown.full((now + 12_001) * MS)


def test_answers_that_took_longer_than_frames_are_followed_still_tell_of_the_link() -> None:
    flown = pilot()
    for number in range(3):
        sent = (1000 + 100 * number) * MS
        flown.sent(sent, 1000, WAY, encode_ms=3.0)
    flown.step(13_000 * MS)
    for number in range(3):
        flown.replied((1000 + 100 * number) * MS, (13_000 + 100 * number) * MS, NODE, late=True)
    flown.step(13_300 * MS)
    assert flown.known.link.goodput is not None
    assert flown.known.node_ms["segment2"] == pytest.approx(18)


def test_a_node_that_was_slow_once_is_asked_again() -> None:
    flown = pilot()
    now = talk(flown, 1000, 12)
    for number in range(40):
        sent = (now + 100 * number) * MS
        flown.sent(sent, 1000, WAY, encode_ms=3.0)
        flown.replied(sent, sent + 2000 * MS, {"edge.decode": 4.0, "edge.segment2": 1800.0}, late=True)
        flown.step(sent + 2000 * MS)
    now += 6000
    flown.step(now * MS)
    assert flown.decision.candidate.way is None, "such a node is of no use"
    assert any(flown.probing((now + at) * MS) is not None for at in range(0, 5000, 100))


def test_where_frames_are_rare_a_healthy_link_is_not_asked_again_and_again() -> None:
    flown = pilot()
    now = talk(flown, 1000, 12)
    copies = 0
    for number in range(30):
        at = now + 1000 * (number + 1)
        flown.taken(at * MS)
        flown.step(at * MS)
        found = flown.probing(at * MS)
        copies += found is not None and found.copy
        flown.sent(at * MS, 1000, WAY, encode_ms=3.0)
        flown.replied(at * MS, (at + 122) * MS, NODE)
    assert copies == 0


def test_a_frame_with_nothing_before_it_may_use_the_limit_but_for_a_little() -> None:
    flown = pilot()
    now = talk(flown, 1000, 12)
    alone_ms = flown.arrival_ms(now * MS, now * MS)
    captured = now - round(0.92 * flown.limit_ms - alone_ms)
    assert not flown.too_late(now * MS, captured * MS)
    flown.sent(now * MS, 10, WAY, encode_ms=3.0)
    assert flown.too_late(now * MS, captured * MS)


def test_what_waits_behind_an_earlier_plans_frames_speaks_against_no_plan() -> None:
    flown = pilot()
    now = talk(flown, 1000, 12)
    flown.sent(now * MS, 200_000, WAY, encode_ms=3.0, probe=True)
    before = flown.decision.candidate
    most = int(flown.tables.predict(flown.known).large_bytes[flown.decision.index]) - 1
    assert flown.step((now + 1) * MS, max_packet_bytes=most)
    assert flown.decision.candidate != before
    way = flown.decision.candidate.way
    assert way is not None
    for extra in (10, 20, 30):
        flown.sent((now + extra) * MS, 500, way, encode_ms=3.0)
    for extra in (10, 20, 30):
        flown.replied((now + extra) * MS, (now + 900 + extra) * MS, NODE, late=True)
    flown.step((now + 940) * MS, max_packet_bytes=most)
    assert flown.limits.rung == "full"


def test_what_frames_cost_before_another_connection_says_nothing_of_those_after_it() -> None:
    flown = pilot()
    now = talk(flown, 1000, 12, size=100)
    flown.step((now + 500) * MS)
    assert flown.known.bytes_ratio["transform"][0] < 0.8
    flown.reconnected()
    flown.step((now + 600) * MS)
    assert not flown.known.bytes_ratio


def test_what_has_gone_with_its_connection_cannot_be_withdrawn() -> None:
    flown = pilot()
    now = talk(flown, 1000, 12)
    flown.sent(now * MS, 10, WAY, encode_ms=3.0)
    flown.reconnected()
    flown.withdrawn()
    assert not flown.full((now + 1) * MS)


def test_nothing_goes_up_behind_what_is_late() -> None:
    flown = pilot()
    now = talk(flown, 1000, 12)
    for extra in (1, 2, 3):
        flown.sent((now + extra) * MS, 10, WAY, encode_ms=3.0)
    flown.replied((now + 1) * MS, (now + 400) * MS, NODE)
    assert not flown.full((now + 401) * MS)
    flown.missed((now + 2) * MS, (now + 402) * MS)
    assert flown.full((now + 403) * MS)
    flown.replied((now + 3) * MS, (now + 410) * MS, NODE)
    assert not flown.full((now + 411) * MS)


@pytest.mark.parametrize("cameras", [1, 2, 3])
def test_the_rate_of_frames_is_that_of_all_cameras_together(cameras: int) -> None:
    """Ten frames a second each, in step, and some work between two of them."""
    flown = pilot()
    for start in range(1000, 5000, 100):
        for camera in range(cameras):
            flown.taken((start + 15 * camera) * MS, f"cam{camera}")
    flown.step(5000 * MS)
    assert flown.known.frames_per_second == pytest.approx(10 * cameras, rel=0.01)


def test_bytes_that_never_left_are_no_room_for_frames() -> None:
    """What was counted as handed over is taken back where it is dropped before it was written."""
    flown = pilot(bytes_per_second=20_000.0)
    flown.beside(0, 8000)
    flown.beside(1000 * MS, 0)
    flown.step(1100 * MS)
    assert flown.known.other_bytes == 0.0
