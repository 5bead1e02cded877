"""A deadline on one step: whoever gives up cancels it, and says which phase took so long."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from twisted.internet.defer import Deferred

_Result = TypeVar("_Result")


class Late(Exception):
    """The step took too long; the text is the phase in which it was."""


async def within(
    reactor: Any,
    seconds: float | None,
    step: Deferred[_Result],
    phase: Callable[[], str | None],
) -> _Result:
    """Await ``step`` for at most so many seconds.

    Args:
        seconds: None waits for ever.
        phase: what took so long, asked when the time is over; None lets the time begin anew.

    Raises:
        Late: the time was over; ``step`` is cancelled.
    """
    if seconds is None:
        return await step
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

    timer = reactor.callLater(seconds, ring)
    try:
        return await step
    except Exception:
        if late is not None:
            raise Late(late) from None
        raise
    finally:
        if timer.active():
            timer.cancel()
