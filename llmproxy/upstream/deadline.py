"""A deadline on one step: whoever gives up cancels it, and says which phase took so long."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from twisted.internet.defer import Deferred
from twisted.python.failure import Failure

_Result = TypeVar("_Result")


def limit(
    reactor: Any,
    seconds: float | None,
    step: Deferred[_Result],
    phase: Callable[[], str | None],
    error: Callable[[str], Exception],
) -> None:
    """Let ``step`` take so many seconds at most: then it is cancelled, and fails.

    Args:
        seconds: None lets it wait for ever.
        phase: what took so long, asked when the time is over; None lets the time begin anew.
        error: from that to what ``step`` fails with.
    """
    if seconds is None:
        return
    late: str | None = None
    timer: Any = None

    def ring() -> None:
        """Give up, or begin anew."""
        nonlocal late, timer
        late = phase()
        if late is None:
            timer = reactor.callLater(seconds, ring)
        else:
            step.cancel()

    def settle(result: Any) -> Any:
        """Stop the clock, and say why where it was the clock."""
        if timer.active():
            timer.cancel()
        return Failure(error(late)) if late is not None and isinstance(result, Failure) else result

    timer = reactor.callLater(seconds, ring)
    step.addBoth(settle)
