"""The atlas as one page of HTML that needs nothing else: figures inside it, light or dark as the reader has it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from html import escape
from importlib.resources import files

from export import atlas_figures as figures
from export.atlas import Atlas
from export.bench_tables import LEFT, tables

Draw = Callable[[str, bool], str]


def to_html(atlas: Atlas) -> str:
    """The page. It loads nothing and runs no script."""
    parts = [_head(atlas)]
    if any(row.way == "features" and row.cut > 0 for row in atlas.rows):
        parts.append(
            _figure(
                "What an answer costs to send",
                "Up is better, left is cheaper. A line is a cut of the network, a point one of its rates; grey is the "
                "same frame sent as a picture to the whole model, thin where shrunk first. Hollow: features as "
                "they are, behind zstd. Whiskers: 95 % intervals.",
                lambda prefix, wide: figures.frontier(atlas, prefix, wide=wide),
            )
        )
    halves = []
    wanted = 0.0 if atlas.verdict is None else atlas.verdict.wanted
    if _reached(atlas, wanted):
        halves.append(
            _figure(
                "Sending or computing",
                f"At {wanted:.0%} agreement: left is less work for the device, down is fewer bytes to send.",
                lambda prefix, wide: figures.trade(atlas, wanted, prefix, wide=wide),
            )
        )
    if atlas.alone:
        halves.append(
            _figure(
                "Exits",
                "The more frames an exit answers, the fewer agree. A dot is where its threshold and guard put it.",
                lambda prefix, wide: figures.exits(atlas, prefix, wide=wide),
            )
        )
    if halves:
        parts.append(f'<div class="halves">{"".join(halves)}</div>')
    if atlas.clip is not None:
        parts.append(
            _figure(
                "A clip, every frame sent",
                f"Up is closer to the whole model, left is cheaper. {atlas.clip.n} consecutive frames of "
                f"{escape(', '.join(atlas.clip.sources))}; features are coded against those of the frame before, video "
                "codecs run without delay.",
                lambda prefix, wide: figures.clip(atlas, prefix, wide=wide),
            )
        )
    parts += [_table(*table) for table in tables(atlas)]
    page = files("export").joinpath("atlas.css").read_text("utf-8")
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>Atlas of {escape(atlas.name)}</title>\n<style>\n{page}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(parts)
        + "\n</main>\n</body>\n</html>\n"
    )


def _head(atlas: Atlas) -> str:
    verdict = ""
    if atlas.verdict is not None:
        verdict = f'<p class="verdict">{escape(atlas.verdict.sentence)}</p>\n'
    frames = f"{atlas.frames.n} frames of {', '.join(atlas.frames.sources)}"
    frames += (
        f", none of which had a say in the bundle ({atlas.frames.left_out} that had were left out)"
        if atlas.frames.checked
        else "; whether any of them had a say in the bundle is not known"
    )
    machine = atlas.machine.get("processor", "an unknown processor")
    facts = (
        ("bundle", f"{atlas.name}, {atlas.bundle[:16]}; {atlas.quantization}, target {atlas.target}"),
        ("model", atlas.source),
        ("judged on", frames),
        ("measured on", f"{machine}, threads: {atlas.threads}, onnxruntime {atlas.machine.get('onnxruntime', '')}"),
    )
    rows = "".join(f"<dt>{escape(name)}</dt><dd>{escape(text)}</dd>" for name, text in facts)
    return (
        f'<header>\n<p class="kicker">Kinflow atlas</p>\n<h1>{escape(atlas.name)}</h1>\n{verdict}'
        f'<p class="quiet">Agreement: {escape(atlas.agreement_is)}. '
        "Bytes: the whole MQTT message.</p>\n"
        f"<dl>{rows}</dl>\n</header>"
    )


def _figure(title: str, words: str, draw: Draw) -> str:
    prefix = "".join(letter for letter in title.lower() if letter.isalpha())
    wide, narrow = draw(f"{prefix}-w", True), draw(f"{prefix}-n", False)
    return (
        f"<figure>\n<h2>{escape(title)}</h2>\n<figcaption>{words}</figcaption>\n"
        f'<div class="wide">{wide}</div>\n<div class="narrow">{narrow}</div>\n</figure>'
    )


def _table(heading: str, titles: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    sides = ["left" if title in LEFT else "right" for title in titles]
    head = "".join(f'<th class="{side}">{escape(title)}</th>' for side, title in zip(sides, titles, strict=True))
    body = "\n".join(
        "<tr>"
        + "".join(f'<td class="{side}">{escape(cell)}</td>' for side, cell in zip(sides, row, strict=True))
        + "</tr>"
        for row in rows
    )
    return (
        f'<section>\n<h3>{escape(heading)}</h3>\n<div class="scroll"><table>\n<thead><tr>{head}</tr></thead>\n'
        f"<tbody>\n{body}\n</tbody>\n</table></div>\n</section>"
    )


def _reached(atlas: Atlas, level: float) -> bool:
    return any(row.wanted == level and row.bytes_mean is not None for row in figures.cheapest(atlas.equal))
