"""How the page says it: words, numbers, SVG and chart options, made of what `ui_state` knows. Pure.

Labels, names and reasons come from outside; `harmless` stands around every one of them.
"""

from __future__ import annotations

import html
from collections.abc import Iterable

from runtime.ui_messages import Said
from runtime.ui_state import WINDOW_S, Camera, Loss, Machine, Site, TierFigures

COLOURS = {"device": "#0d9488", "edge": "#d08a1d", "cloud": "#5b6ee1"}
OTHER_COLOURS = ("#a855a8", "#4b8f3a", "#c2564b", "#64748b", "#8a6d3b")
GREY = "#8a94a3"  # readable on white and on black
STALE_S = 5.0
EMPTY_SIZE = (640, 480)
MOST_SHOWN = 5  # of the best labels

LOST = {
    "frames_dropped_total": "Frames without an answer",
    "results_degraded_total": "Answered by a weaker exit than was aimed for",
    "requests_dropped_total": "Requests a node dropped",
    "packets_refused_total": "Packets a node refused",
    "replies_dropped_total": "Replies that could not be sent",
}
REASONS = {
    "stale": "a newer frame came first",
    "stopping": "the device was stopping",
    "offline": "no broker",
    "busy": "too many frames on their way",
    "deadline": "no answer in time",
    "above": "the tier above was silent",
    "refused": "a node refused it",
    "no uplink": "no tier above",
}


def harmless(words: str) -> str:
    """Words from outside as HTML and SVG: no markup, and nothing unseen, such as what turns writing around."""
    if not words.isprintable():
        words = "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in words)
    return html.escape(words)


def colour(tier: str, tiers: list[str]) -> str:
    """The colour of a tier, the same wherever it is drawn."""
    if tier in COLOURS:
        return COLOURS[tier]
    others = [name for name in tiers if name not in COLOURS]
    return OTHER_COLOURS[others.index(tier) % len(OTHER_COLOURS)] if tier in others else GREY


def size(count: float) -> str:
    """Bytes for a person: 812 B, 12.3 kB, 4.0 MB."""
    for unit, factor in (("MB", 1e6), ("kB", 1e3)):
        if count >= factor:
            return f"{count / factor:,.1f} {unit}"
    return f"{count:,.0f} B"


def duration(took_ms: float) -> str:
    """Milliseconds for a person: 32 ms, 1.4 s, 12 min."""
    if took_ms < 1000:
        return f"{took_ms:.0f} ms"
    return f"{took_ms / 1000:.1f} s" if took_ms < 90_000 else f"{took_ms / 60_000:,.0f} min"


def drawing(camera: Camera, tiers: list[str]) -> str:
    """What lies over a camera's picture, or stands in its place: the boxes, or the best labels where there are none."""
    said = camera.said
    width, height = camera.size or EMPTY_SIZE
    head = f'<svg viewBox="0 0 {width} {height}" preserveAspectRatio="xMidYMid meet" role="img"'
    if said is None:
        return f'{head} aria-label="no answer yet">{_middle(width, height, "no answer yet")}</svg>'
    parts = [f'{head} aria-label="{harmless(said.label)}">']
    if said.answer.boxes is not None:
        parts += _boxes(said, width, height, colour(said.tier, tiers))
        if not said.answer.boxes and camera.preview is None:
            parts.append(_middle(width, height, "nothing here"))
    elif said.answer.presence is not None:
        parts.append(_middle(width, height, "something is there; where is not known"))
    elif camera.preview is None:
        parts += _bars(said.answer.topk[:MOST_SHOWN] or ((said.label, said.confidence),), width, height)
    return "".join(parts) + "</svg>"


def _middle(width: int, height: int, words: str) -> str:
    return (
        f'<text class="kf-none" x="{width / 2}" y="{height / 2}" font-size="{width / 26:.1f}">{harmless(words)}</text>'
    )


def _boxes(said: Said, width: int, height: int, stroke: str) -> list[str]:
    parts = []
    letter = max(width / 34, height / 26)
    for box in said.answer.boxes or ():
        left, top, right, bottom = box.box
        wide, high = max(0.0, right - left), max(0.0, bottom - top)
        words = f"{box.label} {box.score:.2f}"
        above = top - letter * 1.35 if top > letter * 1.4 else top  # a label that would leave the picture goes inside
        shown = max(0.0, min(left, width - letter * 0.6 * len(words)))
        parts.append(
            f'<rect x="{left:.1f}" y="{top:.1f}" width="{wide:.1f}" height="{high:.1f}" rx="{width / 200:.1f}" '
            f'fill="{stroke}" fill-opacity=".1" stroke="{stroke}" stroke-width="{width / 220:.2f}"/>'
            f'<rect x="{shown:.1f}" y="{above:.1f}" width="{letter * (0.55 * len(words) + 0.6):.1f}" '
            f'height="{letter * 1.35:.1f}" rx="{width / 300:.1f}" fill="{stroke}"/>'
            f'<text x="{shown + letter * 0.3:.1f}" y="{above + letter:.1f}" font-size="{letter:.1f}" fill="#fff">'
            f"{harmless(words)}</text>"
        )
    return parts


def _bars(best: Iterable[tuple[str, float]], width: int, height: int) -> list[str]:
    parts = []
    step, left, letter = height / (MOST_SHOWN + 1), width * 0.06, height / 20
    for row, (label, score) in enumerate(best):
        y = step * (row + 0.75)
        full = width * 0.88
        name = label if len(label) <= 30 else f"{label[:29]}…"
        bar = f'x="{left:.1f}" y="{y + letter * 0.5:.1f}" height="{letter * 0.3:.1f}"'
        parts.append(
            f'<text class="kf-bar" x="{left:.1f}" y="{y:.1f}" font-size="{letter:.1f}">{harmless(name)}</text>'
            f'<text class="kf-bar kf-end" x="{left + full:.1f}" y="{y:.1f}" font-size="{letter:.1f}">{score:.2f}</text>'
            f'<rect class="kf-track" {bar} width="{full:.1f}"/><rect class="kf-fill" {bar} width="{full * score:.1f}"/>'
        )
    return parts


def chip(tier: str, tiers: list[str]) -> str:
    """A tier's name behind a dot of its colour."""
    return f'<span class="kf-chip"><i style="background:{colour(tier, tiers)}"></i>{harmless(tier)}</span>'


def state(words: str, good: bool | None) -> str:
    """A word of state behind a dot: good, bad, or neither."""
    kind = {True: "good", False: "bad", None: "unknown"}[good]
    return f'<span class="kf-state kf-{kind}"><i></i>{harmless(words)}</span>'


def title(camera: Camera, machine: Machine | None) -> str:
    """Name, device and state of a camera."""
    status = camera.status or "not told"
    good = {"online": True, "not told": None, "starting": None}.get(status, False)
    if machine is not None and machine.online is False:
        status, good = "device offline", False
    return (
        f'<span class="kf-name">{harmless(camera.name)}</span><span class="kf-dim">{harmless(camera.device)}</span>'
        f'<span class="kf-space"></span>{state(status, good)}'
    )


def caption(camera: Camera, tiers: list[str]) -> str:
    """The last answer of a camera: label, confidence, tier, exit, age and what it cost."""
    said = camera.said
    if said is None:
        return '<div class="kf-label kf-dim">no answer yet</div><div class="kf-meta">waiting for a frame</div>'
    facts = [
        chip(said.tier, tiers),
        f"exit {said.exit}",
        duration(said.age_ms),
        f"{size(said.bytes_up)} up" if said.bytes_up else "nothing sent",
    ]
    return (
        f'<div class="kf-label"><span>{harmless(said.label)}</span><b>{said.confidence:.2f}</b></div>'
        f'<div class="kf-sure"><i style="width:{said.confidence:.0%};background:{colour(said.tier, tiers)}"></i></div>'
        f'<div class="kf-meta">{"".join(f"<span>{fact}</span>" for fact in facts)}</div>'
    )


def flags(camera: Camera, now_s: float) -> str:
    """What is wrong with the last answer, or less than usual: degraded and why, repeated, or old."""
    said = camera.said
    if said is None:
        return ""
    found = []
    if said.degraded is not None:
        found.append(f'<span class="kf-flag kf-bad">degraded: {harmless(said.degraded)}</span>')
    if said.repeats is not None:
        found.append(f'<span class="kf-flag">repeats frame {said.repeats:,}</span>')
    silent_s = now_s - camera.said_s
    if silent_s > STALE_S:
        found.append(f'<span class="kf-flag kf-bad">last answer {duration(silent_s * 1000)} ago</span>')
    return "".join(found)


def details(camera: Camera) -> str:
    """What is behind the last answer of a camera: all its labels or boxes, where the time went, its last events."""
    said = camera.said
    if said is None:
        return '<p class="kf-empty">This camera has not answered yet.</p>'
    rows: list[tuple[str, str]] = [("frame", f"{said.frame:,}"), ("task", said.task)]
    rows += [("agreement kept", f"{said.agreement:.2f}")] if said.agreement is not None else []
    rows += [("sent with", said.codec)] if said.codec else []
    rows += [("variant", str(said.variant))] if said.variant else []
    parts = [_table("Answer", rows)]
    if said.answer.boxes:
        parts.append(_table("Boxes", [(box.label, f"{box.score:.2f}") for box in said.answer.boxes[:20]]))
    elif said.answer.topk:
        parts.append(_table("Best labels", [(label, f"{score:.3f}") for label, score in said.answer.topk]))
    if said.timings:
        parts.append(
            _table("Where the time went", [(name, f"{took:.1f} ms") for name, took in list(said.timings.items())[:30]])
        )
    if camera.events:
        parts.append(_table("Events", [(event.label, event.type) for event in reversed(camera.events)]))
    return "".join(parts)


def _table(heading: str, rows: list[tuple[str, str]]) -> str:
    body = "".join(f"<tr><td>{harmless(name)}</td><td>{harmless(value)}</td></tr>" for name, value in rows)
    return f'<section class="kf-part"><h3>{harmless(heading)}</h3><table>{body}</table></section>'


def summary(site: Site, figures: list[TierFigures], now_s: float) -> str:
    """Four numbers that say how it goes."""
    rate, up, jpeg = site.per_second(now_s)
    if not site.answers:
        tiles = [
            ("–", "answers a second", "none yet"),
            ("–", "answered on devices", ""),
            ("–", "sent up", ""),
            ("–", "age", ""),
        ]
    else:
        first = figures[0] if figures else None
        own = first.share if first is not None and first.tier == "device" else 0.0
        ages = " · ".join(f"{part.tier} {duration(part.age_p50_ms)}" for part in figures)
        if jpeg is None:
            beside = "JPEG not weighed yet"
        elif up:
            beside = (
                f"{jpeg / up:,.1f} times less than JPEG"
                if jpeg >= up
                else f"{up / jpeg:,.1f} times more than JPEG"
                if jpeg
                else ""
            )
        else:
            beside = f"JPEG would be {size(jpeg)}/s" if jpeg else ""
        tiles = [
            (f"{rate:,.1f}", "answers a second", f"{len(site.cameras)} camera{'s' if len(site.cameras) != 1 else ''}"),
            (
                f"{own:.0%}",
                "answered on devices",
                f"of {sum(part.answers for part in figures):,} in {WINDOW_S:.0f} s"
                + (f", {repeats:,} repeated" if (repeats := sum(part.repeats for part in figures)) else ""),
            ),
            (f"{size(up)}/s", "sent up by devices", beside),
            (duration(site.median_age_ms()) if figures else "–", "median age", ages),
        ]
    return "".join(
        f'<div class="kf-tile"><b>{number}</b><span>{what}</span><small>{harmless(more)}</small></div>'
        for number, what, more in tiles
    )


def ages(figures: list[TierFigures], tiers: list[str]) -> str:
    """Share and age of each tier's answers."""
    if not figures:
        return _empty("No answers in the last minute.")
    rows = "".join(
        f"<tr><td>{chip(part.tier, tiers)}</td><td>{part.answers:,}</td><td>{part.repeats:,}</td>"
        f"<td>{part.share:.1%}</td><td>{duration(part.age_p50_ms)}</td><td>{duration(part.age_p95_ms)}</td></tr>"
        for part in figures
    )
    heads = "<tr><th>tier</th><th>answers</th><th>repeats</th><th>share</th><th>p50</th><th>p95</th></tr>"
    return f'<table class="kf-wide">{heads}{rows}</table>'


def losses(found: list[Loss], machines: Iterable[Machine]) -> str:
    """What was lost, by reason."""
    if not any(machine.stats_s is not None for machine in machines):
        return _empty(
            "No counters have come yet. Devices and nodes tell theirs every stats_interval_s, 60 s by default."
        )
    if not found:
        return _empty("Nothing was lost.")
    rows = []
    for counter, heading in LOST.items():
        of_it = [loss for loss in found if loss.counter == counter]
        if of_it:
            rows.append(f'<tr><th colspan="2">{heading}</th><th>{sum(loss.count for loss in of_it):,}</th></tr>')
        for loss in of_it:
            words = REASONS.get(loss.reason, loss.reason or "no reason told")
            rows.append(f"<tr><td>{harmless(words)}</td><td>{harmless(loss.machine)}</td><td>{loss.count:,}</td></tr>")
    return f'<table class="kf-wide kf-losses">{"".join(rows)}</table>'


def machines(site: Site, now_s: float) -> str:
    """A card for each device and node: state, bundle, link, cameras."""
    if not site.machines:
        return _empty(f"No device and no node of the site “{site.name}” has been heard of yet.")
    odd = site.odd_bundles()
    parts = []
    if odd:
        names = ", ".join(sorted(name for _, name in odd))
        parts.append(
            f'<p class="kf-warning">Not every machine holds the same bundle: {harmless(names)} '
            f"differ{'s' if len(odd) == 1 else ''} from the others. Nodes refuse features of another bundle.</p>"
        )
    for key, machine in sorted(site.machines.items()):
        parts.append(
            _machine(
                machine, key in odd, [camera for camera in site.cameras.values() if key == ("d", camera.device)], now_s
            )
        )
    return "".join(parts)


def _machine(machine: Machine, odd: bool, cameras: list[Camera], now_s: float) -> str:
    words = {True: "online", False: "offline", None: "not told"}[machine.online]
    birth = machine.birth
    kind = "device" if machine.role == "d" else f"{birth.tier} node" if birth is not None and birth.tier else "node"
    rows = []
    if birth is not None:
        mark = ' <span class="kf-flag kf-bad">differs</span>' if odd else ""
        rows.append(("bundle", f"<code>{harmless(birth.bundle[:8]) or '–'}</code>{mark}"))
        rows.append(("segments", f"up to {birth.last_segment}" if birth.last_segment is not None else "–"))
        rows += [("variant", str(birth.variant))] if birth.variant else []
        rows += [("codec", harmless(birth.codec))] if birth.codec else []
        rows.append(("software", harmless(f"Kinflow {birth.kinflow} · {birth.machine}")))
    if machine.stats_s is not None:
        made, broken = machine.total("link_connects_total"), machine.total("link_disconnects_total")
        rows += [("link", f"connected {made}×, broken {broken}×")] if made else []
        rows.append(("counters", f"{duration((now_s - machine.stats_s) * 1000)} ago"))
    for camera in cameras:
        rows.append(
            (
                harmless(camera.name),
                state(camera.status or "not told", {"online": True, None: None}.get(camera.status, False)),
            )
        )
    body = "".join(f"<tr><td>{name}</td><td>{value}</td></tr>" for name, value in rows)
    return (
        f'<section class="kf-card"><header><span class="kf-name">{harmless(machine.name)}</span>'
        f'<span class="kf-dim">{harmless(kind)}</span><span class="kf-space"></span>{state(words, machine.online)}'
        f"</header><table>{body}</table></section>"
    )


def _empty(words: str) -> str:
    return f'<p class="kf-empty">{harmless(words)}</p>'
