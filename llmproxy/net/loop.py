"""The reactor's loop: a quicker one for a process of one program, and how late any of them is.

Twisted calls every ready socket through ``log.callWithLogger``, whose context costs about as much
as sending an event.  It looks at timers, threads and signals between any two polls.  :func:`tune`
lets sockets be called directly, and the next poll follow at once while nothing else can be due
(ADR-0010).  :class:`Lag` measures by how much a reactor misses an appointment that it was given.

Only exactly ``EPollReactor`` is touched, and on it only ``doIteration``.  Whatever else runs in the
process sees the same calls in the same order.  What is leaned on: ``_poller``, ``_selectables``,
``_doReadOrWrite``, ``threadCallQueue``, ``_newTimedCalls``, ``_pendingTimedCalls`` and
``_justStopped``; ``tests/net/test_loop.py`` fails when they change.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from select import EPOLLERR, EPOLLHUP, EPOLLIN, EPOLLOUT, poll
from typing import Any

from twisted.internet.epollreactor import EPollReactor
from twisted.internet.task import LoopingCall
from twisted.python import log

from llmproxy.net.turn_watch import TurnWatch

_ROUNDS = 100
"""Polls in a row, before the reactor's own loop has its turn in any case."""

SWITCH_S = 0.0005
"""Seconds for which another thread keeps the interpreter when the reactor asks for it.

CPython's own are 5 ms.  The reactor gives the interpreter up for each system call, and the threads
that write records and the log take it then.
"""

_BROKEN = EPOLLERR | EPOLLHUP
_BOTH = EPOLLIN | EPOLLOUT

_MOST = 256
"""Most ready sockets that one poll reports; the next poll reports the others."""

_LONGEST = 2_147_483.0
"""Most seconds that epoll can wait; Twisted's own limit."""

_APPOINTMENT = 1.0
"""Seconds between two appointments at which the lag is measured."""


def tune(reactor: Any, watch: TurnWatch | None = None) -> Callable[[], None]:
    """Quicken ``reactor`` where it is exactly an ``EPollReactor``.

    Args:
        watch: times all turns.

    Returns:
        undoes it.
    """
    if type(reactor) is not EPollReactor:
        return watch.stop if watch is not None else lambda: None
    state = vars(reactor)
    if watch is None:
        state["doIteration"] = _iteration(
            reactor,
            reactor._poller.poll,
            reactor._selectables.get,
            reactor._disconnectSelectable,
            reactor._doReadOrWrite,
        )
    else:
        state["doIteration"] = _iteration(
            reactor,
            partial(watch.poll, reactor._poller.poll),
            lambda fd: watch.selectable(reactor._selectables.get(fd)),
            partial(watch.disconnect, reactor._disconnectSelectable),
            partial(watch.other, reactor._doReadOrWrite),
        )
        state["runUntilCurrent"] = partial(watch.until_current, reactor, reactor.runUntilCurrent)
        state["_insertNewDelayedCalls"] = partial(
            watch.insert_new, reactor, reactor._insertNewDelayedCalls
        )
        watch.start()

    def undo() -> None:
        state.pop("doIteration", None)
        if watch is not None:
            state.pop("runUntilCurrent", None)
            state.pop("_insertNewDelayedCalls", None)
            watch.stop()

    return undo


def _iteration(
    reactor: Any,
    wait: Callable[..., Any],
    find: Callable[[int], Any],
    disconnect: Callable[..., Any],
    general: Callable[..., Any],
) -> Callable[[float | None], None]:
    """Return a ``doIteration`` that polls, finds and calls sockets by these functions."""
    seconds = reactor.seconds

    def iterate(timeout: float | None) -> None:
        """Poll, and again as long as only sockets have something to do."""
        for _ in range(1 if timeout == 0 else _ROUNDS):  # without a wait, something else is due
            try:
                ready = wait(-1 if timeout is None else timeout, _MOST)
            except InterruptedError:
                return
            for fd, event in ready:
                selectable = find(fd)
                if selectable is None:
                    continue
                reads = event == EPOLLIN or event & _BOTH == EPOLLIN
                if reads or event == EPOLLOUT:
                    try:
                        why = selectable.doRead() if reads else selectable.doWrite()
                    except BaseException:
                        why = sys.exc_info()[1]
                        log.err()
                    if why:
                        disconnect(selectable, why, reads)
                elif event & EPOLLIN or not event & _BROKEN or _is_broken(fd):
                    log.callWithLogger(selectable, general, selectable, fd, event)
            if reactor.threadCallQueue or reactor._newTimedCalls or reactor._justStopped:
                return
            timed = reactor._pendingTimedCalls
            if timed:
                timeout = timed[0].time - seconds()
                if timeout <= 0:
                    return
                if timeout > _LONGEST:
                    timeout = _LONGEST
            else:
                timeout = None
            if not reactor.running:
                return

    return iterate


def _is_broken(fd: int) -> bool:
    """Return whether the kernel reports an error or a hang-up of a descriptor now.

    What a poll reported may be of a socket that is closed since, and its number another's.
    """
    now = poll()
    now.register(fd, 0)  # errors are always reported, and so are hang-ups
    return bool(now.poll(0))


class Lag:
    """Measures the lag of one reactor.

    Args:
        reactor: keeps, or misses, the appointments.
        clock: monotonic seconds.
        observe: called with each lag, in seconds.
    """

    def __init__(
        self, reactor: Any, clock: Callable[[], float], observe: Callable[[float], None]
    ) -> None:
        self._clock = clock
        self._observe = observe
        self._expected = 0.0
        self._call = LoopingCall(self._measure)
        self._call.clock = reactor

    def start(self) -> None:
        """Begin to measure."""
        self._expected = self._clock() + _APPOINTMENT
        self._call.start(_APPOINTMENT, now=False)

    def stop(self) -> None:
        """Measure no more; harmless where nothing was measured."""
        if self._call.running:
            self._call.stop()

    def _measure(self) -> None:
        now = self._clock()
        self._observe(max(0.0, now - self._expected))
        self._expected = now + _APPOINTMENT
