"""The tables of `scripts/bench_scenario`, of the JSON lines that it writes. Pure."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

Told = Mapping[str, Any]
WIDE = 18
SETTLED_S = 3


def phase_table(told: Told) -> str:
    """A run by phase: a line of figures, and one of who answered and why not."""
    head = f"  {'phase':<{WIDE}}{'frames':>7}{'in time':>9}{'undegraded':>11}{'agreement in time':>22}"
    head += f"{'undegraded':>22}{'p50':>7}{'p95':>7}{'undeg.':>7}{'bytes up':>12}{'down':>11}{'settled':>9}"
    lines = [told["config"], head]
    for phase in told["phases"]:
        ages = "".join(_cell(phase[key], "{:.0f}", 7) for key in ("age_p50_ms", "age_p95_ms", "undegraded_age_p95_ms"))
        settled = _cell(phase["settled_s"], "{:.1f} s", 9) if phase["link"] else " " * 9
        lines.append(
            f"  {phase['name'][: WIDE - 1]:<{WIDE}}{phase['frames']:>7,}{phase['in_time']:>9,}"
            f"{phase['undegraded']:>11,}"
            f"{agreement(phase['agreement']):>22}{agreement(phase['undegraded_agreement']):>22}"
            f"{ages}{phase['bytes_up']:>12,}{phase['bytes_down']:>11,}{settled}"
        )
        kinds = ((phase["by"], ""), (phase["degraded"], "degraded "), (phase["dropped"], "dropped "))
        parts = [_counts(counts, before) for counts, before in kinds]
        lines.append(f"    {'; '.join(part for part in parts if part)}")
    lines.append(f"  older than the budget and told as fresh: {told['all']['unflagged']:,}")
    if told["events"] is not None:
        events = told["events"]
        lines.append(
            f"  events: {events['made']:,} made, {events['delivered']:,} came, {events['lost']:,} lost, "
            f"{events['gaps']:,} gaps; {events['twice']:,} came twice, {events['twice_after_inbox']:,} after the inbox"
        )
    if told.get("plans"):
        lines.append(f"  {len(told['moves']):,} plans, and for how long each held:")
        lines += [f"    {seconds:>7.1f} s  {plan}" for plan, seconds in told["plans"].items()]
    return "\n".join(lines)


def device_table(told: Told) -> str:
    """Whether every frame is accounted for, what befell the system, and what its processes grew by."""
    frames = told["frames"]
    lines = [
        f"  {frames['captured']:,} frames captured = {frames['answered']:,} answered + "
        f"{sum(frames['dropped'].values()):,} dropped ({_counts(frames['dropped'], '') or 'none'}) + "
        f"{frames['unaccounted']:,} unaccounted; {frames['told_twice']:,} told twice"
    ]
    if told["struck"] or told["stalls"]:
        stalls = [f"camera stalled {told['stalls']:,} times"] * bool(told["stalls"])
        kills = [f"{what} killed {count:,} times" for what, count in told["struck"].items() if what != "mid-packet"]
        kills += [f"{told['struck'].get('mid-packet', 0):,} in the midst of a packet"] if kills else []
        lines.append(f"  {', '.join([*kills, *stalls])}")
    head = f"  {'first last most':<{WIDE}}{'lives':>6}{'seconds':>9}{'RSS, MB':>22}{'MB an hour [95 %]':>26}"
    lines += [f"{head}{'descriptors':>16}{'threads':>14}"] if told["tiers"] else []
    for tier, sizes in told["tiers"].items():
        slope = sizes["rss_mb_per_hour"]
        words = "-" if slope is None else f"{slope['per_hour']:.2f} [{slope['low']:.2f}, {slope['high']:.2f}]"
        rss, descriptors, threads = (
            " ".join(f"{sizes[name][when]:.{places}f}" for when in ("first", "last", "most"))
            for name, places in (("rss_mb", 1), ("descriptors", 0), ("threads", 0))
        )
        lines.append(
            f"  {tier:<{WIDE}}{sizes['lives']:>6}{sizes['seconds']:>9}{rss:>22}{words:>26}"
            f"{descriptors:>16}{threads:>14}"
        )
    return "\n".join(lines)


def beside(found: Mapping[str, Told]) -> str:
    """All runs beside each other, and the first one that plans against each of the others."""
    phases = next(iter(found.values()))["phases"]
    names = [f"{phase['name'][:12]:>13}" for phase in phases]
    width = max(24, *(len(config) + 1 for config in found))
    lines = [
        "frames in time and undegraded, by phase; their agreement; all frames in time; bytes both ways",
        f"  {'':<{width}}{''.join(names)}{'all':>9}{'agreement':>22}{'in time':>9}{'agreement':>22}{'bytes':>13}",
    ]
    for config, told in found.items():
        every = told["all"]
        by_phase = "".join(f"{phase['undegraded']:>13,}" for phase in told["phases"])
        lines.append(
            f"  {config:<{width}}{by_phase}"
            f"{every['undegraded']:>9,}{agreement(every['undegraded_agreement']):>22}"
            f"{every['in_time']:>9,}{agreement(every['agreement']):>22}{every['bytes_up'] + every['bytes_down']:>13,}"
        )
    planned = next((config for config in found if config.startswith("objective:")), None)
    if planned is None:
        return "\n".join(lines)
    lines += [
        "",
        f"{planned} against each other one",
        f"  {'':<{width}}{'undegraded':>12}{'agreement':>11}{'in time':>9}{'agreement':>11}{'fewer bytes':>13}",
    ]
    ours = found[planned]["all"]
    for config, told in found.items():
        theirs = told["all"]
        if config == planned:
            continue
        more, every = (_ratio(ours[name], theirs[name]) for name in ("undegraded", "in_time"))
        fewer = _ratio(theirs["bytes_up"] + theirs["bytes_down"], ours["bytes_up"] + ours["bytes_down"])
        apart, all_apart = (_apart(ours[name], theirs[name]) for name in ("undegraded_agreement", "agreement"))
        lines.append(f"  {config:<{width}}{more:>12}{apart:>11}{every:>9}{all_apart:>11}{fewer:>13}")
    return "\n".join(lines)


def verdicts(told: Told) -> str:
    """Whether a run kept what it was to keep; a limit on the age is read off the configuration's name."""
    linked = [phase for phase in told["phases"] if phase["link"]]
    kept: dict[str, bool] = {}
    limit = re.search(r"latency_p95_ms=([0-9.]+)", told["config"])
    if limit is not None:
        ages = [phase["age_p95_ms"] for phase in linked]
        said = ", ".join("-" if age is None else f"{age:.0f}" for age in ages)
        kept[f"p95 of age within {limit[1]} ms in each phase with a link: {said}"] = all(
            age is not None and age <= float(limit[1]) for age in ages
        )
        times = [phase["settled_s"] for phase in linked]
        said = ", ".join("never" if after_s is None else f"{after_s:.1f}" for after_s in times)
        kept[f"settled within {SETTLED_S} s in each phase with a link: {said}"] = all(
            after_s is not None and after_s <= SETTLED_S for after_s in times
        )
    kept[f"answers older than the budget and told as fresh: {told['all']['unflagged']:,}"] = not told["all"][
        "unflagged"
    ]
    frames, events = told["frames"], told["events"]
    wrong = frames["unaccounted"], frames["told_twice"]
    kept[f"frames unaccounted: {wrong[0]:,}, told twice: {wrong[1]:,}"] = not any(wrong)
    if events is not None:
        wrong = events["lost"], events["twice_after_inbox"]
        given_up = _counts({why: count for why, count in told["events_given_up"].items() if count}, "")
        said = f" (the device says: {given_up})" if given_up else ""
        kept[f"events lost: {wrong[0]:,}{said}, come twice behind the inbox: {wrong[1]:,}"] = not any(wrong)
    return "\n".join(f"  {'kept  ' if held else 'MISSED'}  {words}" for words, held in kept.items())


def agreement(told: Told | None) -> str:
    """Agreement with its interval."""
    return "-" if told is None else f"{told['share']:.3f} [{told['low']:.3f}, {told['high']:.3f}]"


def _ratio(left: float, right: float) -> str:
    return f"{left / right:.2f}" if right else "-"


def _apart(left: Told | None, right: Told | None) -> str:
    return "-" if left is None or right is None else f"{left['share'] - right['share']:+.3f}"


def _cell(value: float | None, form: str, width: int) -> str:
    return f"{'-' if value is None else form.format(value):>{width}}"


def _counts(counts: Mapping[str, int], before: str) -> str:
    said = sorted(counts.items(), key=lambda pair: -pair[1])
    return ", ".join(f"{count:,} {before}{name}" for name, count in said)
