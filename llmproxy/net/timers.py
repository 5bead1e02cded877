"""Timers of a few lengths that are nearly always cancelled, such as deadlines.

A reactor keeps its timers in a heap, and looks at new ones between any two polls; two for each
request are a thirtieth of what a request costs (docs/performance.rst).  Here all timers of one
length are a queue, in the order in which they ring, with one timer of the reactor's for the first
of them.  If the first is cancelled, the reactor's timer stays; when it rings, it finds which is
first by then.

:meth:`Timers.callLater` is that of ``IReactorTime``, so that a caller need not know which of the
two it was given.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from twisted.logger import Logger

_log = Logger()

_AT_ONCE = 16
"""Timers that ring in a row; sockets have their turn before the next ones."""


def _nothing() -> None:
    """Do nothing."""


class Timer:
    """One timer; of ``IDelayedCall`` it has what is used here."""

    __slots__ = ("_queue", "at", "call")

    def __init__(self, queue: dict[Timer, None], at: float, call: Callable[[], object]) -> None:
        self._queue = queue
        self.at = at
        self.call = call
        queue[self] = None

    def active(self) -> bool:
        """Return whether it is still to ring."""
        return self in self._queue

    def cancel(self) -> None:
        """Do not ring.

        Raises:
            KeyError: it has rung, or was cancelled.
        """
        del self._queue[self]
        self.call = _nothing  # which mostly keeps the owner of this timer


class Timers:
    """All such timers of one process.

    Args:
        reactor: keeps one timer for each length.
    """

    def __init__(self, reactor: Any) -> None:
        self._reactor = reactor
        self._seconds: Callable[[], float] = reactor.seconds
        self._queues: dict[float, dict[Timer, None]] = {}
        self._bells: dict[float, Any] = {}

    def callLater(self, delay: float, call: Callable[[], object]) -> Timer:
        """Call ``call`` in so many seconds, unless the timer that is returned is cancelled."""
        queue = self._queues.get(delay)
        if queue is None:
            queue = self._queues[delay] = {}
            self._bells[delay] = self._reactor.callLater(delay, self._ring, delay, queue)
        return Timer(queue, self._seconds() + delay, call)

    def close(self) -> None:
        """Forget every timer."""
        for bell in self._bells.values():
            bell.cancel()
        self._bells.clear()
        self._queues.clear()

    def _ring(self, delay: float, queue: dict[Timer, None]) -> None:
        """Call the timers that are due, and ask the reactor to ring for the next one."""
        now = self._seconds()
        due: list[Timer] = []
        for timer in queue:
            if timer.at > now or len(due) == _AT_ONCE:
                break
            due.append(timer)
        for timer in due:
            if timer.active():
                call = timer.call
                timer.cancel()
                try:
                    call()
                except Exception:
                    _log.failure("a timer's call failed")
        first = next(iter(queue), None)
        if first is None:
            del self._queues[delay], self._bells[delay]
        else:
            self._bells[delay] = self._reactor.callLater(
                max(0.0, first.at - self._seconds()), self._ring, delay, queue
            )
