"""What the writer's thread writes to, and how each of them is treated.

An output keeps a batch, loses all or part of it, or is busy; its lane holds what it has not taken,
tries again, and counts what is lost.  Nothing here knows a thread, a file, a database or a network
(ADR-0013).
"""

from __future__ import annotations

from collections.abc import Callable
from math import inf
from typing import Protocol

from msgspec import UNSET
from twisted.logger import Logger

from llmproxy.record.trace import Trace, without_content

_MAINTENANCE_AGAIN_S = 10.0
"""Seconds after which a chore that failed is tried again."""

_log = Logger()


class Dropped(Exception):
    """Some traces of a batch were not kept; the others were.

    Args:
        count: how many were not.
        reason: why, for the log.
    """

    def __init__(self, count: int, reason: str) -> None:
        super().__init__(reason)
        self.count = count


class Retry(Exception):
    """An output took no trace of a batch, but may take all of them in a moment.

    Args:
        reason: why, for the log.
        again_s: after how many seconds it is worth another try.
    """

    def __init__(self, reason: str, *, again_s: float) -> None:
        super().__init__(reason)
        self.again_s = again_s


class Output(Protocol):
    """Something that keeps traces; after it was made, only the writer's thread calls it.

    Attributes:
        name: what the metric calls it.
        patience_s: how long traces wait for it where it is busy, before they are lost.
        keeps_content: whether it is given the text and the tool calls of responses.
    """

    name: str
    patience_s: float
    keeps_content: bool

    def put(self, traces: list[Trace]) -> None:
        """Keep these traces.

        Raises:
            Lost: some were not kept.
            Busy: none was kept, and it is worth another try.
            Exception: none was kept.
        """

    def maintenance(self) -> float:
        """Do one small piece of housekeeping; return the seconds until the next, or ``inf``."""

    def reopen(self) -> None:
        """Open anew whatever goes by a name, because it may have been renamed."""

    def close(self) -> None:
        """Let go of everything."""


class SinkQueue:
    """One output, what it has not taken yet, and what it has cost.

    Args:
        output: takes the traces.
        clock: monotonic seconds.
        batch: most traces that the output gets at once.
        most: most traces that wait for it.

    Attributes:
        lost: how many traces it has not kept.
        held: those that it has not taken yet.
    """

    def __init__(self, output: Output, clock: Callable[[], float], batch: int, most: int) -> None:
        self.output = output
        self.lost = 0
        self.held: list[Trace] = []
        self._clock = clock
        self._batch = batch
        self._most = most
        self._busy_since = inf
        self._again_at = -inf
        self._maintenance_at = -inf
        self._failing = False
        self._given_up = False

    def due(self) -> float:
        """Return when this output wants to be seen again without new traces."""
        return min(self._again_at if self.held else inf, self._maintenance_at)

    def take(self, traces: list[Trace]) -> None:
        """Give the output these traces behind those that it has not taken yet."""
        if not self.output.keeps_content:
            traces = [one if one.text is UNSET else without_content(one) for one in traces]
        room = max(0, self._most - len(self.held))
        self.held += traces[:room]
        if len(traces) > room:
            self._lose(len(traces) - room, "too many wait")
        while self.held and self._clock() >= self._again_at:
            self._put(self.held[: self._batch])
        if self._clock() >= self._maintenance_at:
            self._do_maintenance()

    def reopen(self) -> None:
        """Let the output open its file anew; where that fails it goes on with what it has."""
        try:
            self.output.reopen()
        except Exception as error:
            _log.error(
                "{sink} cannot be opened anew: {reason}", sink=self.output.name, reason=str(error)
            )

    def give_up(self, waiting: int) -> None:
        """The end has come: lose what is held, and ``waiting`` more."""
        count = len(self.held) + waiting
        if count:
            self.lost += count
            _log.error(
                "{sink}: {count} records could not be written before the end",
                sink=self.output.name,
                count=count,
            )
        self._given_up = True

    def close(self) -> None:
        """Let the output go."""
        try:
            self.output.close()
        except Exception as error:
            _log.error("{sink} did not close: {reason}", sink=self.output.name, reason=str(error))

    def _put(self, traces: list[Trace]) -> None:
        began = self._clock()
        try:
            self.output.put(traces)
        except Retry as busy:
            self._busy_since = min(self._busy_since, began)
            now = self._clock()
            self._again_at = now + busy.again_s
            if now - self._busy_since >= self.output.patience_s:
                self._lose(len(self.held), str(busy))
                self.held.clear()
            return
        except Dropped as lost:
            self._lose(lost.count, str(lost))
        except Exception as error:
            self._lose(len(traces), str(error) or type(error).__name__)
        else:
            self._succeeded()
        self._busy_since, self._again_at = inf, -inf
        del self.held[: len(traces)]

    def _do_maintenance(self) -> None:
        try:
            rest_s = self.output.maintenance()
        except Exception:  # whatever it is, the next batch will tell it
            rest_s = _MAINTENANCE_AGAIN_S
        self._maintenance_at = self._clock() + rest_s

    def _lose(self, count: int, reason: str) -> None:
        if self._given_up:
            return
        self.lost += count
        if not self._failing:
            self._failing = True
            _log.error(
                "{sink}: records are being lost: {reason}", sink=self.output.name, reason=reason
            )

    def _succeeded(self) -> None:
        if self._failing:
            self._failing = False
            _log.info(
                "{sink}: records are kept again, {count} were lost so far",
                sink=self.output.name,
                count=self.lost,
            )
