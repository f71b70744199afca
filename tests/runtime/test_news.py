from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime.datatypes import Result
from runtime.news import SILENT_NS, Choice, News

STEPS = st.lists(
    st.tuples(st.sampled_from(["a", "b"]), st.sampled_from([None, "offline", "deadline"]), st.integers(0, SILENT_NS)),
    max_size=60,
)


def a_result(label: str, degraded: str | None, camera: str = "cam0") -> Result:
    return Result(
        camera=camera,
        frame=0,
        task="classify",
        label=label,
        confidence=0.5,
        answer={},
        tier="device",
        exit=1,
        agreement=None,
        codec=None,
        cut=None,
        bytes_up=0,
        age_ms=1.0,
        degraded=degraded,
    )


@given(STEPS)
def test_changes_tells_all_that_changes_and_is_never_silent_for_long(
    steps: list[tuple[str, str | None, int]],
) -> None:
    news, now_ns = News("changes"), 0
    told: list[tuple[int, str, bool]] = []
    for label, degraded, later_ns in steps:
        now_ns += later_ns
        said = (label, degraded is not None)
        takes = news.takes(a_result(label, degraded), now_ns)
        assert takes or (told and told[-1][1:] == said), "who heard all that was told knows what is"
        assert takes or now_ns - told[-1][0] < SILENT_NS
        if takes:
            told.append((now_ns, *said))
    for early, late in itertools.pairwise(told):
        assert early[1:] != late[1:] or late[0] - early[0] >= SILENT_NS, "nothing is told again soon"


@pytest.mark.parametrize(("choice", "takes"), [("all", True), ("none", False)])
def test_all_and_none_are_just_that(choice: Choice, takes: bool) -> None:
    news = News(choice)
    assert [news.takes(a_result("a", None), now_ns) for now_ns in range(5)] == [takes] * 5


def test_cameras_do_not_hide_one_another() -> None:
    news = News("changes")
    assert news.takes(a_result("a", None, "cam0"), 0)
    assert news.takes(a_result("a", None, "cam1"), 0)
    assert not news.takes(a_result("a", None, "cam1"), 1)
