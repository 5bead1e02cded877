"""A deadline over one step of a request, which says what took so long."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from twisted.internet.defer import Deferred
from twisted.python.failure import Failure

_T = TypeVar("_T")


def limit(
    reactor: Any,
    seconds: float | None,
    step: Deferred[_T],
    phase: Callable[[], str | None],
    error: Callable[[str], Exception],
) -> None:
    """Let ``step`` take so many seconds at most; then cancel it, and let it fail.

    Args:
        seconds: None lets it wait for ever.
        phase: returns what took so long, when the time is over; None lets the time begin anew.
        error: makes what ``step`` fails with from that.
    """
    if seconds is not None:
        _Deadline(reactor, seconds, step, phase, error)


class _Deadline:
    """One such deadline; an object, because functions that refer to each other keep each other."""

    __slots__ = ("_error", "_late", "_phase", "_reactor", "_seconds", "_step", "_timer")

    def __init__(
        self,
        reactor: Any,
        seconds: float,
        step: Deferred[Any],
        phase: Callable[[], str | None],
        error: Callable[[str], Exception],
    ) -> None:
        self._reactor = reactor
        self._seconds = seconds
        self._step: Deferred[Any] | None = step
        self._phase = phase
        self._error = error
        self._late: str | None = None
        self._timer = reactor.callLater(seconds, self._ring)
        step.addBoth(self._settle)

    def _ring(self) -> None:
        """Give up, or begin anew."""
        self._late = self._phase()
        if self._late is None:
            self._timer = self._reactor.callLater(self._seconds, self._ring)
        elif self._step is not None:
            self._step.cancel()

    def _settle(self, result: Any) -> Any:
        """Stop the clock, and say why where it was the clock."""
        self._step = None
        if self._timer.active():
            self._timer.cancel()
        if self._late is not None and isinstance(result, Failure):
            return Failure(self._error(self._late))
        return result
