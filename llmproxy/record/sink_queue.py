"""What the writer's thread writes to, and the queue that stands before each output.

An output keeps a batch of traces, drops all or part of it, or asks for another try.  Its queue
holds the traces that the output has not taken yet, tries again, and counts what is lost.  Between
``record/writer.py`` and the outputs, nothing here knows a thread, a file, a database or a network
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
"""Seconds after which maintenance that failed is tried again."""

_LEAVING_S = 30.0
"""Seconds for which traces wait at most for an output that no later trace will come to."""

_log = Logger()


class Dropped(Exception):
    """Some traces of a batch were not kept; the others were.

    Args:
        count: how many were not kept.
        reason: why, for the log.
    """

    def __init__(self, count: int, reason: str) -> None:
        super().__init__(reason)
        self.count = count


class Retry(Exception):
    """An output took no trace of a batch, but may take all of them soon.

    Args:
        reason: why, for the log.
        again_s: after how many seconds to try again.
    """

    def __init__(self, reason: str, *, again_s: float) -> None:
        super().__init__(reason)
        self.again_s = again_s


class Output(Protocol):
    """Something that keeps traces.  Once it is made, only the writer's thread calls it.

    Attributes:
        name: its name in the metric.
        patience_s: how long traces wait for an output that asks for another try, before they are
            lost.
        keeps_content: whether it gets the text and the tool calls of responses.
    """

    name: str
    patience_s: float
    keeps_content: bool

    def put(self, traces: list[Trace]) -> None:
        """Keep these traces.

        Raises:
            Dropped: some were not kept.
            Retry: none was kept, and another try may help.
            Exception: none was kept.
        """

    def maintenance(self) -> float:
        """Do one small step of maintenance; return the seconds until the next, or ``inf``."""

    def reopen(self) -> None:
        """Open every file by its name again, because it may have been renamed."""

    def close(self) -> None:
        """Let go of everything."""


class SinkQueue:
    """One output, the traces that it has not taken yet, and the count of those that it lost.

    Args:
        output: takes the traces.
        clock: monotonic seconds.
        batch: most traces that the output gets at once.
        most: most traces that wait for the output.

    Attributes:
        lost: how many traces the output has not kept.
        held: the traces that the output has not taken yet.
        leaving: no later trace will come.
    """

    def __init__(self, output: Output, clock: Callable[[], float], batch: int, most: int) -> None:
        self.output = output
        self.lost = 0
        self.held: list[Trace] = []
        self.leaving = False
        self._clock = clock
        self._batch = batch
        self._most = most
        self._refused_since = inf
        self._again_at = -inf
        self._maintenance_at = -inf
        self._failing = False
        self._given_up = False

    def due(self) -> float:
        """Return the clock's time at which :meth:`take` is due even if no trace comes."""
        return min(self._again_at if self.held else inf, self._maintenance_at)

    def take(self, traces: list[Trace]) -> None:
        """Give the output these traces, behind those that it has not taken yet."""
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
        """Let the output open its file again; if that fails, it goes on with the open one."""
        try:
            self.output.reopen()
        except Exception as error:
            _log.error(
                "{sink} cannot be opened anew: {reason}", sink=self.output.name, reason=str(error)
            )

    def give_up(self, waiting: int) -> None:
        """The process ends: count what is held, and ``waiting`` more traces, as lost."""
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
        """Close the output."""
        try:
            self.output.close()
        except Exception as error:
            _log.error("{sink} did not close: {reason}", sink=self.output.name, reason=str(error))

    def _put(self, traces: list[Trace]) -> None:
        began = self._clock()
        try:
            self.output.put(traces)
        except Retry as retry:
            self._refused_since = min(self._refused_since, began)
            now = self._clock()
            self._again_at = now + retry.again_s
            patience = min(self.output.patience_s, _LEAVING_S if self.leaving else inf)
            if now - self._refused_since >= patience:
                self._lose(len(self.held), str(retry))
                self.held.clear()
            return
        except Dropped as dropped:
            self._lose(dropped.count, str(dropped))
        except Exception as error:
            self._lose(len(traces), str(error) or type(error).__name__)
        else:
            self._succeeded()
        self._refused_since, self._again_at = inf, -inf
        del self.held[: len(traces)]

    def _do_maintenance(self) -> None:
        try:
            rest_s = self.output.maintenance()
        except Exception:  # whatever it is, the next batch reports it
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
