"""Runs one coroutine that awaits Deferreds, for a request's whole life.

``Deferred.fromCoroutine`` does the same, with a copy of the context variables, a Deferred of its
own and some bookkeeping for a coroutine that awaits that.  Nothing awaits a request, and these
three cost a twentieth of one (docs/performance.rst).  What the coroutine is for is not known here.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Any

from twisted.internet.defer import Deferred
from twisted.python.failure import Failure


class Task:
    """One coroutine that is being run; it runs up to its first wait at once.

    Args:
        coroutine: may await Deferreds and nothing else.
        failed: called with the failure where the coroutine itself fails.
    """

    __slots__ = ("_awaited", "_coroutine", "_failed")

    def __init__(
        self, coroutine: Coroutine[Deferred[Any], Any, None], failed: Callable[[Failure], object]
    ) -> None:
        self._coroutine = coroutine
        self._failed = failed
        self._awaited: Deferred[Any] | None = None
        self._go(None)

    def cancel(self) -> None:
        """Cancel what is awaited, if anything is; in the coroutine the wait fails."""
        if self._awaited is not None:
            self._awaited.cancel()

    def _go(self, result: object) -> None:
        """Run on with the result of the last wait, up to the next wait or the end."""
        self._awaited = None
        try:
            if isinstance(result, Failure):
                awaited = result.throwExceptionIntoGenerator(self._coroutine)
            else:
                awaited = self._coroutine.send(None)
        except StopIteration:
            return
        except Exception:
            self._failed(Failure())
            return
        self._awaited = awaited
        awaited.addBoth(self._go)
