from __future__ import annotations

import threading

from runtime.counters import Counters


def test_labels_are_written_as_prometheus_does_in_a_fixed_order() -> None:
    counters = Counters()
    counters.add("results_total", tier="device", exit=1)
    counters.add("results_total", exit=1, tier="device")
    assert counters.snapshot() == {'results_total{exit="1",tier="device"}': 2}


def test_amounts_add_up_and_a_snapshot_is_a_sorted_copy() -> None:
    counters = Counters()
    counters.add("b_total", 5)
    counters.add("a_total")
    counters.add("b_total", 0)
    before = counters.snapshot()
    counters.add("b_total")
    assert list(before.items()) == [("a_total", 1), ("b_total", 5)]
    assert counters.snapshot()["b_total"] == 6


def test_a_total_sums_over_labels_of_exactly_this_name() -> None:
    counters = Counters()
    counters.add("frames_total", 2, camera="front")
    counters.add("frames_total", 3, camera="back{")
    counters.add("frames_total", 4)
    counters.add("frames_total_bytes", 100)
    assert counters.total("frames_total") == 9
    assert counters.total("nothing_total") == 0


def test_no_count_is_lost_between_threads() -> None:
    counters = Counters()

    def count() -> None:
        for _ in range(2000):
            counters.add("a_total", camera="front")

    threads = [threading.Thread(target=count) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert counters.total("a_total") == 16_000
