"""The table that `sim` and `demo` draw on a terminal while frames are answered."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Sequence
from types import TracebackType

from rich.console import Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from runtime.datatypes import Dropped, Result
from runtime.summary import Move

ROWS = 12
COLOURS = {"device": "green", "edge": "yellow", "cloud": "cyan"}
BAR_CELLS = 20


class LiveTable:
    """The latest frames, and the share of all that each tier has answered so far."""

    def __init__(self, tiers: Sequence[str]) -> None:
        self._tiers = tiers
        self._rows: deque[Result | Dropped] = deque(maxlen=ROWS)
        self._counts: Counter[str] = Counter()
        self._bytes = 0
        self._plan = ""
        self._live = Live(get_renderable=self._draw, refresh_per_second=10)

    def __enter__(self) -> Callable[[Result | Dropped], None]:
        self._live.start()
        return self._add

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._live.stop()

    def moved(self, move: Move) -> None:
        """The device has taken another plan."""
        self._plan = f"{move.rung}: {move.why}"

    def _add(self, line: Result | Dropped) -> None:
        self._rows.append(line)
        self._counts[line.tier if isinstance(line, Result) else "dropped"] += 1
        self._bytes += line.bytes_up if isinstance(line, Result) else 0

    def _draw(self) -> Group:
        if not self._rows:
            return Group(Text("starting …", "dim"))
        table = Table(box=None, header_style="dim", pad_edge=False)
        table.add_column("frame", justify="right")
        table.add_column("answer", min_width=32, max_width=32, no_wrap=True)
        for heading in ("sure", "tier", "exit", "bytes up", "age"):
            table.add_column(heading, justify="left" if heading == "tier" else "right")
        table.add_column("", no_wrap=True, overflow="ellipsis", max_width=40)
        for line in self._rows:
            if isinstance(line, Dropped):
                table.add_row(str(line.frame), "-", "-", "-", "-", "-", "-", Text(f"dropped: {line.dropped}", "red"))
                continue
            table.add_row(
                str(line.frame),
                Text(line.label),
                f"{line.confidence:.2f}",
                Text(line.tier, COLOURS.get(line.tier, "")),
                str(line.exit),
                f"{line.bytes_up:,}",
                f"{line.age_ms:.0f} ms",
                Text("" if line.degraded is None else line.degraded, "red"),
            )
        return Group(table, Text(), self._bar(), Text(self._plan, "dim"))

    def _bar(self) -> Text:
        frames = max(1, sum(self._counts.values()))
        bar = Text(no_wrap=True, overflow="crop")
        for tier in self._tiers:
            bar.append("█" * round(BAR_CELLS * self._counts[tier] / frames), COLOURS.get(tier, ""))
        shares = "  ".join(f"{tier} {self._counts[tier] / frames:.0%}" for tier in self._tiers)
        return bar.append(f"  {shares}   {self._bytes / frames:,.0f} B up per frame")
