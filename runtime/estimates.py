"""What a sender knows of its link, from each frame and reply. Pure.

How fast it is, `goodput` tells from the times of answers. Whether it is there at all, and how many frames get lost,
silence tells. Nothing here reads a clock: times come as nanoseconds of one monotonic clock.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from dataclasses import dataclass

from runtime.goodput import GoodputFilter

START_GOODPUT = 125_000.0  # bytes a second, before anything is known
NEWS_RATIO = 1.3  # by which goodput has to differ from what was told last to be news
OUTCOMES = 50
SILENT_NS, SILENT_RTTS = 300_000_000, 4.0  # without any word, before frames that are overdue mean an outage
MISSES_LOST = 2  # frames in a row without a word from above after which the link counts as lost


@dataclass(frozen=True, slots=True)
class LinkEstimate:
    """What is known of a link now."""

    goodput: float | None  # bytes a second, rather too low than too high; None: no answer has ever come
    rtt_ms: float | None  # of a message of no bytes, the node's own time not counted
    jitter_ms: float  # by which the slowest tenth of recent frames were later than these two say
    loss_ratio: float  # of frames without an answer, while later ones had theirs
    lost: bool  # nothing has come back for so many frames, or so long, that nothing is to be expected
    age_ms: float  # since the last word from above; infinite: there was none
    hope: float | None = None  # bytes a second: that it carries more than this is unlikely; None: who knows


UNKNOWN = LinkEstimate(None, None, 0.0, 0.0, lost=False, age_ms=math.inf)


class LinkEstimator:
    """Learns a link from what went up and what came back. The caller keeps its calls in one thread at a time."""

    def __init__(self) -> None:
        self._goodput = GoodputFilter()
        self._outcomes: OrderedDict[int, bool] = OrderedDict()  # by when it went up: whether an answer came
        self._told: float | None = None
        self._heard_ns: int | None = None
        self._answered_sent_ns = -1  # when the frame went up that was sent last among those with a word
        self._rtt_ms = 0.0
        self._misses = 0

    def sent(self, sent_ns: int, size: int) -> None:
        """A frame of `size` bytes went up."""
        self._goodput.sent(sent_ns / 1e6, size)

    def beside(self, now_ns: int, size: int) -> None:
        """So many bytes went up beside frames."""
        self._goodput.beside(now_ns / 1e6, size)

    def withdrawn(self) -> None:
        """What was said to go up last did not."""
        self._goodput.withdrawn()

    def reconnected(self) -> None:
        """What was on its way is gone."""
        self._goodput.reconnected()

    def replied(self, sent_ns: int, replied_ns: int, node_ms: float) -> bool:
        """An answer came, in time or late, for the frame that went up at `sent_ns`.

        Returns:
            Whether it has changed a good deal of what was known.
        """
        self._hear(sent_ns, replied_ns)
        self._goodput.passed(sent_ns / 1e6, replied_ns / 1e6 - max(0.0, node_ms))
        goodput = self._goodput.estimate()[0]
        return self._told is None or not 1 / NEWS_RATIO < goodput / self._told < NEWS_RATIO

    def heard(self, sent_ns: int, now_ns: int) -> None:
        """A word came that tells no time, as a refusal does."""
        self._hear(sent_ns, now_ns)

    @property
    def lost(self) -> bool:
        """Whether the link counts as lost."""
        return self._misses >= MISSES_LOST

    def missed(self, sent_ns: int, now_ns: int) -> None:
        """No answer came in time for the frame that went up at `sent_ns`."""
        self._record(sent_ns, answered=False)
        # Where later ones were answered this one was lost; where one was just now, the pipe is full, and alive.
        patience_ns = max(SILENT_NS, SILENT_RTTS * self._rtt_ms * 1e6)
        silent = self._heard_ns is None or now_ns - self._heard_ns > patience_ns
        if silent and sent_ns > self._answered_sent_ns:
            self._misses += 1

    def estimate(self, now_ns: int) -> LinkEstimate:
        """What is known now."""
        age_ms = math.inf if self._heard_ns is None else (now_ns - self._heard_ns) / 1e6
        loss = sum(not answered for answered in self._outcomes.values()) / max(len(self._outcomes), 10)
        if not self._goodput.known:
            return LinkEstimate(None, None, 0.0, loss, lost=self.lost, age_ms=age_ms)
        self._told, hope, self._rtt_ms = self._goodput.estimate()
        return LinkEstimate(
            goodput=self._told,
            rtt_ms=self._rtt_ms,
            jitter_ms=self._goodput.jitter_ms,
            loss_ratio=loss,
            lost=self.lost,
            age_ms=age_ms,
            hope=hope,
        )

    def passes_ms(self, now_ns: int, size: float, goodput: float) -> float:
        """How long it takes at this goodput until a frame that went up now would have passed, all before it too."""
        return self._goodput.passes_ms(now_ns / 1e6, size, goodput)

    def _hear(self, sent_ns: int, now_ns: int) -> None:
        if self.lost:  # that was an outage; it says nothing of how many frames get lost else
            self._outcomes.clear()
        self._record(sent_ns, answered=True)
        self._answered_sent_ns = max(self._answered_sent_ns, sent_ns)
        self._heard_ns = now_ns if self._heard_ns is None else max(self._heard_ns, now_ns)
        self._misses = 0

    def _record(self, sent_ns: int, *, answered: bool) -> None:
        self._outcomes[sent_ns] = answered
        while len(self._outcomes) > OUTCOMES:
            self._outcomes.popitem(last=False)
