"""Finds every cut: a tensor that alone separates the frame from the answer. Pure; works on any ONNX graph.

The default rule: with T tiers, the t-th cut is the smallest tensor among the cuts with a share of the
multiply-accumulates before them within 1/(2T) of t/T; equal sizes go to the share nearest t/T. It looks at no
times, so the same model always gives the same cuts.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from onnx import ModelProto, NodeProto

from export.graph import EPILOGUE, LAYOUT_OPS, PROLOGUE, Index, Shape, macs
from runtime.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Cut:
    """One place where the model can be cut."""

    index: int  # 1-based in the listing; cut 0 is the frame
    tensor: str
    aliases: tuple[str, ...]  # tensors that separate at the same place: before the activation, before a reshape
    after: str
    shape: Shape  # without the batch
    macs: int  # before the cut, for one frame
    macs_ratio: float

    @property
    def elements(self) -> int:
        """How many numbers the features hold."""
        return math.prod(self.shape)


def separators(model: ModelProto) -> list[str]:
    """Every tensor, in order, that alone separates the input from the last output.

    A sweep in topological order keeps the set of tensors that were made and are still to be read. A tensor separates
    exactly when it is alone in that set: whatever comes before it in the order is its ancestor.
    """
    index = Index(model)
    (source,) = [info.name for info in model.graph.input if info.name not in index.constants]
    target = index.outputs[-1]
    moving = _moving(index, source)
    active = [node for node in index.ancestors([target]) if any(name in moving for name in node.input)]
    left: dict[str, int] = {}
    for node in active:
        for name in set(node.input):
            if name in moving:
                left[name] = left.get(name, 0) + 1
    live = {source}
    found: list[str] = []
    for node in active:
        for name in set(node.input) & live:
            left[name] -= 1
            if left[name] == 0:
                live.discard(name)
        live.update(name for name in node.output if left.get(name, 0) > 0)
        if len(live) == 1 and target not in node.output:
            (only,) = live
            if only != source and (not found or found[-1] != only):
                found.append(only)
    return found


def list_cuts(model: ModelProto, shapes: Mapping[str, Shape]) -> list[Cut]:
    """Every place where the model can be cut, each once, with what it costs to get there."""
    index = Index(model)
    costs = {id(node): macs(node, shapes) for node in index.nodes}
    total = max(1, sum(costs[id(node)] for node in index.ancestors([index.outputs[-1]])))
    names = [
        name
        for name in separators(model)
        if name in shapes and len(shapes[name]) > 1 and not index.producer[name].name.startswith((PROLOGUE, EPILOGUE))
    ]
    before = {name: sum(costs[id(node)] for node in index.ancestors([name])) for name in names}
    first = _first_read(index)
    places = _places([name for name in names if before[name] < total and name != first], before, shapes)
    titles = _titles([[index.producer[name] for name in place] for place in places])
    cuts: list[Cut] = []
    for place, title in zip(places, titles, strict=True):
        chosen = next((name for name in reversed(place) if index.producer[name].op_type not in LAYOUT_OPS), place[-1])
        cuts.append(
            Cut(
                index=len(cuts) + 1,
                tensor=chosen,
                aliases=tuple(place),
                after=title,
                shape=shapes[chosen][1:],
                macs=before[chosen],
                macs_ratio=before[chosen] / total,
            )
        )
    return cuts


def default_cuts(cuts: Sequence[Cut], tiers: int) -> list[Cut]:
    """Choose `tiers` - 1 cuts by the rule in this module's docstring; fewer where a model has no place for them."""
    chosen: list[Cut] = []
    for tier in range(1, tiers):
        wanted = tier / tiers
        near = [
            cut
            for cut in cuts
            if abs(cut.macs_ratio - wanted) <= 1 / (2 * tiers) and (not chosen or cut.index > chosen[-1].index)
        ]
        if near:
            chosen.append(min(near, key=lambda cut: (cut.elements, abs(cut.macs_ratio - wanted), cut.index)))
    return chosen


def named_cuts(cuts: Sequence[Cut], wanted: Iterable[str]) -> list[Cut]:
    """Find cuts by index, tensor name or what they come after.

    Raises:
        ConfigError: names the first that does not exist.
    """
    found: dict[int, Cut] = {}
    for text in wanted:
        cut = next((cut for cut in cuts if text in {str(cut.index), cut.after, *cut.aliases}), None)
        if cut is None:
            raise ConfigError(f"there is no cut {text!r}; --list-cuts shows the {len(cuts)} that exist")
        found[cut.index] = cut
    return [found[index] for index in sorted(found)]


def _moving(index: Index, source: str) -> set[str]:
    """The tensors that depend on the input."""
    moving = {source}
    for node in index.nodes:
        if any(name in moving for name in node.input):
            moving.update(filter(None, node.output))
    return moving


def _first_read(index: Index) -> str | None:
    """The prologue's output: cutting there would send the frame itself, as cut 0 does, but larger."""
    last = next((node for node in reversed(index.nodes) if node.name.startswith(PROLOGUE)), None)
    return None if last is None else last.output[0]


def _places(names: Sequence[str], before: Mapping[str, int], shapes: Mapping[str, Shape]) -> list[list[str]]:
    """Group tensors between which nothing is multiplied and nothing shrinks: one place, told several times."""
    places: list[list[str]] = []
    for name in names:
        last = places[-1][-1] if places else None
        if last is not None and before[last] == before[name] and math.prod(shapes[last]) == math.prod(shapes[name]):
            places[-1].append(name)
        else:
            places.append([name])
    return places


def _titles(places: Sequence[Sequence[NodeProto]]) -> list[str]:
    """What people call each place: the outermost numbered block that ends there, else the layer itself."""
    scopes = [_scope(place[0]) for place in places]
    titles: list[str] = []
    for position, scope in enumerate(scopes):
        following = scopes[position + 1] if position + 1 < len(scopes) else []
        depth = next(
            (
                length
                for length in range(1, len(scope) + 1)
                if re.search(r"\.\d+$", scope[length - 1]) and following[:length] != scope[:length]
            ),
            len(scope),
        )
        words = [part for part in scope[:depth] if re.search(r"\.\d+$", part)] if depth < len(scope) else []
        title = " ".join(map(_word, words or _numbered(scope))) or places[position][0].output[0]
        titles.append(title)
    # Of several places with one name the last is the end of the block; the others lie inside it.
    return [
        f"{title} part {titles[: position + 1].count(title)}" if title in titles[position + 1 :] else title
        for position, title in enumerate(titles)
    ]


def _scope(node: NodeProto) -> list[str]:
    parts = [part for part in node.name.split("/") if part]
    # The tracer names a node by its scope and, last, its operator or its output.
    return parts[:-1] if len(parts) > 1 and "/" in node.name else parts


def _numbered(scope: Sequence[str]) -> list[str]:
    """A layer inside a block keeps its block's number; what lies outside keeps its own words."""
    first = next((place for place, part in enumerate(scope) if re.search(r"\.\d+$", part)), None)
    return list(scope[first:] if first is not None else scope[-1:])


def _word(part: str) -> str:
    match = re.fullmatch(r"_*(.+?)\.(\d+)", part)
    if match is None:
        return part.strip("_").replace("_", " ")
    stem = match[1].strip("_").replace("_", " ")
    singular = stem[:-1] if stem.endswith("s") and not stem.endswith("ss") else stem
    return f"{singular} {match[2]}"
