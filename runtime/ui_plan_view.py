"""How the page tells plans: one line for each device that plans, and the moves as they happen. Pure."""

from __future__ import annotations

from runtime.ui_state import Site
from runtime.ui_view import duration, harmless, size, state

MOST_SHOWN = 12  # moves, over all devices


def plans(site: Site, now_s: float) -> str:
    """A table of the plans in force, each predicted and measured, and the last moves; empty where nobody plans."""
    rows, moves = [], []
    for machine in site.machines.values():
        planning = machine.planning
        plan = planning.plan
        if plan is None:
            continue
        found = planning.measured(now_s)
        ages = [plan.latency_p95_ms, None if found is None else found.age_p95_ms]
        amounts = [plan.bytes_a_frame, None if found is None else found.bytes_a_frame]
        rows.append(
            f"<tr><td>{harmless(machine.name)}</td><td>{harmless(plan.plan)}</td>"
            f"<td>{state(plan.rung or 'not told', None if not plan.rung else plan.rung == 'full')}</td>"
            f"<td>{' / '.join('–' if ms is None else duration(ms) for ms in ages)}</td>"
            f"<td>{' / '.join('–' if count is None else size(count) for count in amounts)}</td></tr>"
            f'<tr class="kf-why"><td></td><td colspan="4">{harmless(plan.why)}</td></tr>'
        )
        moves += [(at_s, machine.name, move) for at_s, move in planning.moves]
    if not rows:
        return '<p class="kf-empty">No device here plans: none has a table [objective] in its settings.</p>'
    heads = "<tr><th>device</th><th>plan</th><th>rung</th><th>p95 predicted / measured</th><th>bytes a frame</th></tr>"
    told = "".join(
        f"<tr><td>{duration((now_s - at_s) * 1000)} ago</td><td>{harmless(name)}</td><td>{harmless(move.why)}</td></tr>"
        for at_s, name, move in sorted(moves, key=lambda item: -item[0])[:MOST_SHOWN]
    )
    moved = f'<h3 class="kf-sub">moves</h3><table class="kf-wide kf-moves">{told}</table>' if told else ""
    return f'<table class="kf-wide kf-plans">{heads}{"".join(rows)}</table>{moved}'
