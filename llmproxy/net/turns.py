"""Work that would take too long for one turn of the reactor is done in steps, over several turns.

A large request body is read in steps that are short each.  :class:`Turns` does as many steps of a
turn as fit into a budget that all work shares, so that however many bodies are being read, other
connections wait no longer than that for their turn.  Work that is short is done at once, if no
other waits.  What the steps do is not known here.

A thread would not help: the interpreter's lock is held for as long as a pattern or a decoder runs.
Twisted's ``Cooperator`` has turns and a budget, too.  It does nothing at once, goes round all work
step by step, at three times the cost of a step, and loses what a generator returns.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator
from typing import Any, TypeVar

from twisted.internet.defer import Deferred
from twisted.python.failure import Failure

BUDGET_S = 0.005
"""Seconds of a turn that the steps take; the last one may take a millisecond more."""

T = TypeVar("T")


class Turns:
    """All work that is done in steps, one piece of work after the other in a turn.

    Args:
        reactor: calls for the next turn.
        clock: monotonic seconds.
    """

    def __init__(self, reactor: Any, clock: Callable[[], float]) -> None:
        self._reactor = reactor
        self._clock = clock
        self._waiting: deque[tuple[Generator[None, None, Any], Deferred[Any]]] = deque()
        self._call: Any = None
        self._left = BUDGET_S  # of this turn

    def run(self, work: Generator[None, None, T]) -> Deferred[T]:
        """Do all steps of ``work``: now, if no other work waits and time is left, and in turns.

        Returns:
            fires with what the work returns, or fails with what it raises; it may have fired
            already.  Cancelling it ends the work.
        """
        done: Deferred[T] = Deferred(lambda _: self._drop(job))
        job = (work, done)
        self._waiting.append(job)
        if self._call is None:
            self._call = self._reactor.callLater(0, self._turn)
        if len(self._waiting) == 1 and self._left > 0:
            self._do_steps()
        return done

    def _drop(self, job: tuple[Generator[None, None, Any], Deferred[Any]]) -> None:
        job[0].close()
        self._waiting.remove(job)

    def _turn(self) -> None:
        """Begin another turn."""
        self._call, self._left = None, BUDGET_S
        if self._waiting:
            self._call = self._reactor.callLater(0, self._turn)
            self._do_steps()

    def _do_steps(self) -> None:
        """Do this turn's steps of one piece of work, which waits behind all other work then."""
        until = self._clock() + self._left
        work, done = job = self._waiting[0]
        try:
            next(work)
            while self._clock() < until:
                next(work)
        except StopIteration as end:
            self._waiting.popleft()
            result: object = end.value
        except Exception:
            self._waiting.popleft()
            result = Failure()
        else:
            self._waiting.rotate(-1)
            result = job
        self._left = until - self._clock()
        if result is not job:
            done.callback(result)
