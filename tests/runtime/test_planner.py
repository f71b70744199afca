from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime.estimates import UNKNOWN, LinkEstimate
from runtime.ladder import Limits
from runtime.objective import Objective, problem
from runtime.plan_rates import rising
from runtime.plan_tables import Estimates, Tables
from runtime.planner import Decision, plan, probe
from tests.planner_bundle import planned

SECOND = 1_000_000_000
BUDGET_MS = 2000.0
STAGES = {
    "preprocess": 2.0, "segment0": 20.0, "segment0.v1": 14.0, "segment1": 22.0, "segment2": 18.0, "exit1": 0.5,
    "exit2": 0.5, "encode1.transform": 3.0, "encode2.transform": 3.0, "encode0.jpeg": 4.0,
}  # fmt: skip


def made(*, deepest: int = 1, exits: bool = True) -> Tables:
    return Tables(planned(exits=exits), overhead_bytes=60, deepest=deepest, above=2, rows=(0.98,))


TABLES = made()


def link(goodput: float, rtt_ms: float = 160.0, loss: float = 0.0) -> LinkEstimate:
    return LinkEstimate(goodput, rtt_ms, 5.0, loss, lost=False, age_ms=50.0)


def known(goodput: float, rtt_ms: float = 160.0, fps: float = 10.0) -> Estimates:
    return Estimates(link=link(goodput, rtt_ms), stage_ms=STAGES, node_ms={"rest": 5.0}, frames_per_second=fps)


def fresh(tables: Tables, estimates: Estimates, objective: Objective, limits: Limits | None = None) -> Decision:
    return plan(tables, estimates, objective, 0, None, budget_ms=BUDGET_MS, limits=limits or Limits())


goodputs = st.floats(500, 5e6)
objectives = st.builds(
    Objective,
    optimize=st.just("agreement"),
    latency_p95_ms=st.none() | st.floats(60, 2000),
    bytes_per_second=st.none() | st.floats(500, 1e6),
)


def test_a_wide_link_gets_the_best_agreement() -> None:
    decided = fresh(TABLES, known(1e6), Objective(latency_p95_ms=900))
    assert decided.kept
    assert decided.agreement == pytest.approx(max(TABLES.predict(known(1e6)).agreement))
    assert decided.why.startswith(decided.candidate.words() + ": agreement ")
    assert "of 900 allowed at 8,000 kbit/s" in decided.why


def test_the_picture_itself_is_a_candidate_like_the_others() -> None:
    """Where the device is slow, the link wide, and the split keeps less than the picture."""
    slow = replace(known(4e6), stage_ms={**STAGES, "segment0": 700.0, "segment0.v1": 700.0}, node_ms={"segment0": 20.0})
    decided = fresh(TABLES, slow, Objective(latency_p95_ms=400))
    assert decided.candidate.way is not None
    assert (decided.candidate.way.cut, decided.candidate.way.codec, decided.candidate.parameter) == (0, "jpeg", 90)


def test_not_to_split_is_a_candidate_like_the_others() -> None:
    whole = made(deepest=2)
    decided = fresh(whole, known(1e6), Objective(optimize="bytes", min_agreement=0.97))
    assert (decided.candidate.way, decided.candidate.last_segment, decided.candidate.variant) == (None, 2, 0)
    assert (decided.bytes, decided.kept) == (0.0, True)


def test_a_minimum_of_agreement_takes_the_fewest_bytes_that_keep_it() -> None:
    tables = made(exits=False)
    decided = fresh(tables, known(1e6), Objective(optimize="bytes", latency_p95_ms=900, min_agreement=0.92))
    assert decided.candidate.way is not None
    assert (decided.candidate.way.cut, decided.candidate.parameter) == (2, 90)
    said = tables.predict(known(1e6))
    assert (said.bytes[said.agreement >= 0.92] >= decided.bytes).all()


def test_limits_that_nothing_keeps_give_up_agreement_first() -> None:
    decided = fresh(TABLES, known(200.0), Objective(optimize="bytes", latency_p95_ms=900, min_agreement=0.95))
    assert not decided.kept
    assert decided.latency_ms <= 900


def test_bytes_a_day_are_kept() -> None:
    decided = fresh(TABLES, known(1e6), Objective(bytes_per_day=86_400 * 1500))
    assert 0 < decided.bytes * 10 <= 1500


@given(goodputs, goodputs, st.sampled_from(["agreement", "bytes", "latency"]), st.floats(80, 2000), st.floats(0.5, 0.9))
def test_less_goodput_never_yields_more_bytes_a_frame(
    one: float, other: float, optimize: str, latency_ms: float, agreement: float
) -> None:
    """At one cut: between cuts a slower link may well pay for less work here with more bytes."""
    tables = Tables(planned(exits=False), overhead_bytes=60, deepest=0, above=1, rows=())
    limits = {"latency_p95_ms": latency_ms, "min_agreement": agreement}
    limits = {name: value for name, value in limits.items() if optimize not in name}
    objective = Objective(optimize=optimize, **limits)  # type: ignore[arg-type]
    only = np.array([row.way is None or row.way.cut == 1 for row in tables.candidates])
    one_cut = _Only(tables, only)
    less, more = (fresh(one_cut, known(goodput), objective) for goodput in sorted((one, other)))
    if less.kept and more.kept:
        assert less.bytes <= more.bytes * (1 + 1e-9)


@given(goodputs, goodputs, st.floats(80, 2000), st.floats(0, 20_000))
def test_more_goodput_never_yields_a_later_or_less_agreeing_choice_at_one_cut(
    one: float, other: float, latency_ms: float, beside: float
) -> None:
    """Later: than the limit; within it, time is what agreement is bought with. Not so with a limit on bytes: of a way
    whose frames are too many for the link fewer bytes go up over a narrow one."""
    tables = Tables(planned(exits=False), overhead_bytes=60, deepest=0, above=1, rows=())
    objective = Objective(latency_p95_ms=latency_ms)
    only = np.array([row.way is None or row.way.cut == 1 for row in tables.candidates])
    one_cut = _Only(tables, only)
    less, more = (
        fresh(one_cut, replace(known(goodput), other_bytes=beside), objective) for goodput in sorted((one, other))
    )
    if less.kept:
        assert more.kept
        assert more.agreement >= less.agreement - 1e-9
        assert more.latency_ms <= latency_ms


@given(
    goodputs,
    st.floats(5, 400),
    st.floats(30, 2000),
    st.none() | st.floats(500, 1e6),
    st.floats(0, 30_000),
    st.none() | st.floats(100, 40_000),
)
def test_no_candidate_over_a_hard_limit_is_chosen_while_one_within_exists(
    goodput: float, rtt_ms: float, latency_ms: float, most: float | None, beside: float, packet: float | None
) -> None:
    now = replace(known(goodput, rtt_ms), other_bytes=beside, max_packet_bytes=packet or np.inf)
    objective = Objective(latency_p95_ms=latency_ms, bytes_per_second=most)
    decided, said = fresh(TABLES, now, objective), TABLES.predict(now)
    cheap = said.bytes * now.frames_per_second + beside <= (most or np.inf)
    fits = said.large_bytes <= (packet or np.inf)
    assert fits[decided.index], "what goes nowhere always fits, so one that fits always exists"
    if (cheap & fits).any():
        assert cheap[decided.index]
    if (cheap & fits & (said.latency_ms <= latency_ms)).any():
        assert decided.latency_ms <= latency_ms
        assert decided.kept


def test_results_and_events_take_their_share_of_the_bytes_and_of_the_link() -> None:
    objective = Objective(bytes_per_second=15_000)
    alone = fresh(TABLES, known(1e6), objective)
    beside = fresh(TABLES, replace(known(1e6), other_bytes=10_000.0), objective)
    assert beside.bytes * 10 + 10_000 <= 15_000 < alone.bytes * 10 + 10_000
    after = plan(TABLES, replace(known(1e6), other_bytes=10_000.0), objective, 5, alone, budget_ms=BUDGET_MS)
    assert after.reason == "bytes"
    assert "10,000 of them beside frames, 15,000 allowed" in after.why
    narrow = TABLES.predict(known(12_000.0)).share
    shared = TABLES.predict(replace(known(12_000.0), other_bytes=6000.0)).share
    assert (shared <= narrow).all()
    assert (shared < narrow).any()


def test_what_the_broker_would_not_take_is_not_planned() -> None:
    tables = made(exits=False)
    wide = fresh(tables, known(1e6), Objective())
    most = tables.predict(known(1e6)).large_bytes[wide.index] - 1
    after = plan(
        tables, replace(known(1e6), max_packet_bytes=most), Objective(), 5, wide, budget_ms=BUDGET_MS
    )  # fmt: skip
    assert after.reason == "oversize"
    assert f"the broker takes {most:,.0f}" in after.why
    assert after.candidate.way is not None
    assert tables.predict(known(1e6)).large_bytes[after.index] <= most
    nothing = fresh(tables, replace(known(1e6), max_packet_bytes=50.0), Objective())
    assert nothing.candidate.way is None


class _Only(Tables):
    """Tables of which only some candidates may be chosen."""

    def __init__(self, tables: Tables, rows: np.ndarray) -> None:
        self.__dict__.update(tables.__dict__)
        self._only = rows

    def allowed(self, said: object, limits: Limits) -> np.ndarray:
        """Those given."""
        return self._only


@given(goodputs, st.floats(5, 400), st.floats(30, 2000), st.floats(30, 2000), st.none() | st.floats(500, 1e6))
def test_a_looser_latency_limit_never_lowers_agreement(
    goodput: float, rtt_ms: float, one: float, other: float, most: float | None
) -> None:
    tight, loose = sorted((one, other))
    less, more = (
        fresh(TABLES, known(goodput, rtt_ms), Objective(latency_p95_ms=limit, bytes_per_second=most))
        for limit in (tight, loose)
    )
    assert more.agreement >= less.agreement - 1e-9


@given(objectives, goodputs, goodputs, st.floats(5, 400))
@settings(max_examples=40)
def test_constant_knowledge_never_flaps(objective: Objective, first: float, then: float, rtt_ms: float) -> None:
    decided = fresh(TABLES, known(first, rtt_ms), objective)
    moves = []
    for tick in range(1, 100):
        after = plan(TABLES, known(then, rtt_ms), objective, tick * SECOND // 3, decided, budget_ms=BUDGET_MS)
        if after.since_ns != decided.since_ns:
            moves.append((decided.index, after.index))
        decided = after
    assert len(moves) <= 2
    assert len({there for _, there in moves}) == len(moves)
    assert all(here != there for here, there in moves)


@given(objectives, goodputs)
def test_the_same_knowledge_gives_the_same_decision(objective: Objective, goodput: float) -> None:
    assert fresh(TABLES, known(goodput), objective) == fresh(made(), known(goodput), objective)


def test_a_narrow_link_forces_a_move_at_once_and_says_why() -> None:
    tables = made(exits=False)
    objective = Objective(latency_p95_ms=400)
    decided = fresh(tables, known(1e6), objective)
    after = plan(tables, known(5e3, fps=1), objective, SECOND // 100, decided, budget_ms=BUDGET_MS)
    assert after.index != decided.index
    assert after.reason == "latency"
    assert after.latency_ms <= 400
    assert " instead of " in after.why
    assert "ms at 40 kbit/s, " in after.why
    assert after.why.endswith("400 ms allowed")


def test_what_the_link_carries_too_little_of_is_left_at_once() -> None:
    objective = Objective(latency_p95_ms=900)
    tables = made(exits=False)
    decided = fresh(tables, known(1e6, fps=15), objective)
    wanted = decided.frame_bytes * 15
    held = plan(tables, known(wanted, fps=15), objective, 1000, decided, budget_ms=BUDGET_MS)
    assert held.index == decided.index, "nine tenths are no reason"
    after = plan(tables, known(wanted * 0.7, fps=15), objective, 1000, decided, budget_ms=BUDGET_MS)
    assert after.index != decided.index
    assert after.reason == "goodput"
    assert after.frame_bytes < decided.frame_bytes
    speed = wanted * 8 / 1000
    said = f"{speed:,.0f} kbit/s would go up, 0 beside frames, the link carries {0.7 * speed:,.0f}"
    assert after.why.endswith(said)


def test_stalls_are_no_reason_to_send_nothing() -> None:
    objective = Objective(latency_p95_ms=900)
    stalled = known(1e6)
    stalled = replace(stalled, link=replace(stalled.link, jitter_ms=3000.0))
    decided = fresh(TABLES, stalled, objective)
    assert decided.candidate.way is not None
    assert decided.kept
    assert decided.latency_ms == 900, "the local exit answers at the limit"
    assert fresh(TABLES, stalled, Objective()).latency_ms == BUDGET_MS


def test_a_probe_looks_no_further_than_may_be_hoped() -> None:
    tables = made(exits=False)
    objective = Objective(latency_p95_ms=900)
    narrow = known(20e3, fps=15)
    decided = fresh(tables, narrow, objective)
    for hope, found in ((21e3, False), (1e6, True)):
        now = replace(narrow, link=replace(narrow.link, hope=hope))
        tried = probe(tables, now, objective, decided, budget_ms=BUDGET_MS, limits=Limits())
        assert (tried is not None) == found


def test_a_better_link_is_believed_after_a_while_and_a_regret_makes_it_longer() -> None:
    tables = made(exits=False)
    objective = Objective(latency_p95_ms=400)
    decided = fresh(tables, known(5e3, fps=1), objective)
    low = decided.index

    def later(now_ms: float, goodput: float) -> Decision:
        return plan(tables, known(goodput, fps=1), objective, round(now_ms * 1e6), decided, budget_ms=BUDGET_MS)

    decided = later(1000, 1e6)
    assert (decided.index, decided.wished_ns) == (low, SECOND)
    decided = later(1900, 1e6)
    assert decided.index == low
    decided = later(2000, 1e6)
    assert (decided.reason, decided.index != low) == ("better", True)
    assert "before" in decided.why
    decided = later(2500, 5e3)
    assert (decided.reason, decided.hold_ms) == ("latency", 2000.0)
    decided = later(3000, 1e6)
    assert decided.wished_ns == 3 * SECOND
    decided = later(3200, 5e3)
    assert decided.wished_ns is None  # not better all the time
    decided = later(70_000, 5e3)
    assert decided.hold_ms == 1000.0


def test_a_better_way_that_is_taken_back_for_fewer_bytes_is_regretted_as_well() -> None:
    tables = made(exits=False)
    objective = Objective(latency_p95_ms=900)
    wide, narrow = known(60e3, fps=15), known(16e3, fps=15)
    decided = fresh(tables, narrow, objective)
    for at_ms in (1000, 2500):
        decided = plan(tables, wide, objective, at_ms * 1_000_000, decided, budget_ms=BUDGET_MS)
    assert (decided.reason, decided.hold_ms) == ("better", 1000.0)
    risen = decided
    just = replace(narrow, link=replace(narrow.link, goodput=risen.frame_bytes * 15 * 0.95))
    for at_ms in (3000, 4500):
        decided = plan(tables, just, objective, at_ms * 1_000_000, decided, budget_ms=BUDGET_MS)
    assert decided.frame_bytes < risen.frame_bytes
    assert decided.reason == "better"
    assert decided.hold_ms == 2000.0


def test_the_way_back_from_an_outage_is_taken_at_once_however_much_was_regretted() -> None:
    objective = Objective(latency_p95_ms=900)
    away = fresh(TABLES, known(1e5), objective, Limits(rung="local variant only", sends=False))
    assert away.candidate.way is None
    regretted = replace(away, hold_ms=16_000.0, since_ns=0)
    after = plan(TABLES, known(1e5), objective, SECOND, regretted, budget_ms=BUDGET_MS)
    assert after.candidate.way is not None


def test_a_rung_leaves_less() -> None:
    decided = fresh(TABLES, known(1e6), Objective())
    lost = Limits("local variant only", "nothing has come back for 2.3 s", sends=False)
    after = plan(TABLES, known(1e6), Objective(), 5, decided, budget_ms=BUDGET_MS, limits=lost)
    assert after.candidate.way is None
    assert (after.reason, after.rung) == ("local variant only", "local variant only")
    assert after.why.endswith(": nothing has come back for 2.3 s")
    half = fresh(TABLES, known(1e6), Objective(), Limits(max_bytes=decided.bytes / 2))
    assert 0 < half.bytes <= decided.bytes / 2
    deep = fresh(TABLES, known(1e6), Objective(), Limits(deepest=True))
    assert deep.candidate.last_segment == 1
    quick = fresh(TABLES, known(1e6), Objective(), Limits(fastest=True, sends=False))
    assert (quick.candidate.variant, quick.candidate.last_segment) == (1, 0)


def test_a_burst_of_frames_that_no_exit_answers_has_to_pass_as_well() -> None:
    objective = Objective(latency_p95_ms=900)
    calm = known(17_000, fps=15.0)
    burst = replace(calm, unsure_share=1.0)
    then, now = (fresh(TABLES, estimates, objective) for estimates in (calm, burst))
    assert TABLES.predict(calm).share[then.index] == 1, "on average the link carries it"
    assert TABLES.predict(burst).share[then.index] < 1
    assert TABLES.predict(burst).share[now.index] > TABLES.predict(burst).share[then.index]
    wanted = TABLES.predict(burst).wanted[then.index]
    left = plan(TABLES, burst, objective, 1, then, budget_ms=BUDGET_MS)
    assert left.reason == "goodput"
    assert f": {wanted * 8 / 1000:,.0f} kbit/s would go up" in left.why, "in the burst, not on average"


def test_what_frames_really_cost_counts() -> None:
    """Between frames a codec needs far less than its frames standing alone, which the manifest tells."""
    objective = Objective(bytes_per_second=6000)
    alone = fresh(TABLES, known(1e6), objective)
    against = fresh(TABLES, replace(known(1e6), bytes_ratio={"transform": (0.3, 0.5)}), objective)
    assert against.agreement > alone.agreement


def test_a_probe_is_the_next_better_way_from_the_same_place() -> None:
    tables = made(exits=False)
    objective = Objective(latency_p95_ms=400)
    decided = fresh(tables, known(4e3, fps=2), objective)
    found = probe(tables, known(4e3, fps=2), objective, decided, budget_ms=BUDGET_MS, limits=Limits())
    assert found is not None
    assert found.way != decided.candidate.way
    best = fresh(tables, known(5e6), objective)
    assert probe(tables, known(5e6), objective, best, budget_ms=BUDGET_MS, limits=Limits()) is None
    lost = Limits(sends=False)
    local = fresh(tables, known(5e6), objective, lost)
    cheapest = probe(tables, known(5e6), objective, local, budget_ms=BUDGET_MS, limits=lost)
    assert cheapest is not None
    assert cheapest.way is not None
    assert (cheapest.way.cut, cheapest.parameter) == (2, 60)


def test_nothing_known_is_a_modest_link() -> None:
    decided = fresh(TABLES, Estimates(link=UNKNOWN, stage_ms=STAGES), Objective(latency_p95_ms=300))
    assert decided.candidate.way is not None
    assert "1,000 kbit/s" in decided.why


@given(st.lists(st.floats(0, 1), max_size=12))
def test_pooled_sequences_rise_and_keep_the_sum(values: list[float]) -> None:
    pooled = rising(values)
    assert pooled == sorted(pooled)
    assert sum(pooled) == pytest.approx(sum(values))
    if values == sorted(values):
        assert pooled == values


def test_agreement_of_a_candidate_is_made_of_its_parts() -> None:
    said = TABLES.predict(known(1e6))
    by = {(row.variant, row.last_segment, row.way, row.parameter): n for n, row in enumerate(TABLES.candidates)}
    (at_2,) = [n for (v, last, way, q), n in by.items() if (v, last, q) == (0, 1, 95) and way is not None]
    early = (0.1 + 0.3) * (1.9 - 0.98)
    assert said.agreement[at_2] == pytest.approx(early * 0.98 + (1 - early) * 0.96)
    assert said.bytes[at_2] == pytest.approx((1 - early) * (1100 * 0.8 + 60 + 44))
    local = 2 + 20 + 22 + 0.5 + 0.5 + 3
    large = 1100 + 60 + 44
    assert said.latency_ms[at_2] == pytest.approx(local + large / 1e6 * 1000 + 160 + 5 + 5 + 18)


@pytest.mark.parametrize(
    ("objective", "path"),
    [
        (Objective(bytes_per_day=1, bytes_per_second=1), "objective.bytes_per_day"),
        (Objective(optimize="latency", latency_p95_ms=5), "objective.optimize"),
        (Objective(warm_celsius=80, hot_celsius=70), "objective.hot_celsius"),
    ],
)
def test_an_objective_that_contradicts_itself_is_told(objective: Objective, path: str) -> None:
    assert (problem(objective) or "").startswith(path)
    assert problem(Objective(latency_p95_ms=900, bytes_per_second=1)) is None
