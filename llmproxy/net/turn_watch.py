"""How long the turns of the reactor are, and what makes them long; for a process that is asked.

A turn lasts from the return of one poll to the next poll.  Until it ends, nothing else is
forwarded.  :class:`TurnWatch` times each turn, and each call in it: every ``doRead`` and
``doWrite``, every timer, every call of another thread, every look of the garbage collector, and the
parts of the program that somebody has named.  Of each call counts its own time, without that of the
calls inside of it that are timed, too; so a collection within a read is not the read's.

Nothing of this is there unless it is asked for: the loop then calls what it is given here instead
of its sockets (``net/loop.py``), and named parts are replaced in their classes.  It makes a process
slower, by some microseconds for each event.
"""

from __future__ import annotations

import gc
import threading
from bisect import insort
from collections.abc import Callable
from functools import wraps
from typing import Any

SLOW_S = 0.001
"""Seconds of its own from which on a call is counted as slow."""

_LONGEST = 32
"""Turns that are kept, with what was slowest in them."""

_TOLD = 4
"""Calls of such a turn that are named."""

_NAMES = 500
"""Most names; all that come later are one."""

_OTHERS = "others"


class Calls:
    """What is known of the calls of one name.

    Attributes:
        count: how many there were.
        own_s: their own seconds.
        slow: how many took longer than :data:`SLOW_S`.
        longest_s: the longest one's own seconds.
        waited_s: of slow ones, the seconds in which this thread did not run: it waited for the
            interpreter's lock, for a processor, or for the kernel.
    """

    __slots__ = ("count", "longest_s", "own_s", "slow", "waited_s")

    def __init__(self) -> None:
        self.count = self.slow = 0
        self.own_s = self.longest_s = self.waited_s = 0.0

    def add(self, own_s: float, ran_s: float) -> None:
        """Count one call, which took ``own_s`` and ran on a processor for ``ran_s``."""
        self.count += 1
        self.own_s += own_s
        if own_s >= SLOW_S:
            self.slow += 1
            self.longest_s = max(self.longest_s, own_s)
            self.waited_s += max(0.0, own_s - ran_s)


class TurnWatch:
    """Times the turns of one reactor, which runs in the thread that makes this.

    Args:
        clock: monotonic seconds.
        ran: seconds for which this thread has run on a processor.
        observe: called with the seconds of each turn.
    """

    def __init__(
        self,
        clock: Callable[[], float],
        ran: Callable[[], float],
        observe: Callable[[float], None],
    ) -> None:
        self._clock = clock
        self._ran = ran
        self._observe = observe
        self._thread = threading.get_ident()
        self._calls: dict[str, Calls] = {}
        self._inside = [0.0, 0.0]  # seconds of the calls within the present one: all, and run
        self._began: float | None = None
        self._events = 0
        self._turn: list[tuple[float, str]] = []  # the slowest calls of this turn
        self._longest: list[tuple[float, int, list[tuple[float, str]]]] = []
        self._collected = 0
        self._collection: tuple[float, float, list[float]] | None = None
        self._undo: list[Callable[[], None]] = []

    # -- turns ----------------------------------------------------------------------------------

    def poll(self, wait: Callable[..., Any], timeout: float, most: int) -> Any:
        """Poll in the loop's stead: one turn ends, and the next begins."""
        self.turn_ended()
        ready = wait(timeout, most)
        self._began, self._events = self._clock(), len(ready)
        return ready

    def turn_ended(self) -> None:
        """Note the turn that ends, if one has begun."""
        if self._began is None:
            return
        seconds, self._began = self._clock() - self._began, None
        self._observe(seconds)
        turn, self._turn = self._turn, []
        if seconds >= SLOW_S and (len(self._longest) < _LONGEST or seconds > self._longest[0][0]):
            insort(self._longest, (seconds, self._events, turn[::-1]))
            del self._longest[:-_LONGEST]

    def call(self, name: Callable[[], str], call: Callable[..., Any], *args: Any) -> Any:
        """Make a call, and time it.

        Args:
            name: returns what it is called, once it is over.
        """
        outer, inside = self._inside, [0.0, 0.0]
        self._inside = inside
        ran, began = self._ran(), self._clock()
        try:
            return call(*args)
        finally:
            seconds, ran = self._clock() - began, self._ran() - ran
            outer[0] += seconds
            outer[1] += ran
            self._inside = outer
            self._note(name(), seconds - inside[0], ran - inside[1])

    def _note(self, name: str, own_s: float, ran_s: float) -> None:
        calls = self._calls.get(name)
        if calls is None:
            if len(self._calls) >= _NAMES:
                name = _OTHERS
            calls = self._calls.setdefault(name, Calls())
        calls.add(own_s, ran_s)
        turn = self._turn
        if len(turn) < _TOLD or own_s > turn[0][0]:
            insort(turn, (own_s, name))
            del turn[:-_TOLD]

    # -- what is timed --------------------------------------------------------------------------

    def selectable(self, found: Any) -> Any:
        """Return what stands for a socket in the loop."""
        return None if found is None else _Timed(self, found)

    def disconnect(self, call: Callable[..., Any], timed: Any, *args: Any) -> None:
        """Report the end of a socket, in the loop's stead."""
        self.call(lambda: f"{timed.name} is lost", call, timed.found, *args)

    def other(self, call: Callable[..., Any], timed: Any, *args: Any) -> None:
        """Let Twisted see to an event that is neither of one read nor of one write."""
        self.call(lambda: f"{timed.name} doReadOrWrite", call, timed.found, *args)

    def until_current(self, reactor: Any, call: Callable[[], None]) -> None:
        """Make the calls of timers and threads that are due, each with its name."""
        waiting = reactor.threadCallQueue
        for place, (function, args, named) in enumerate(waiting):
            if not isinstance(function, _Named):
                waiting[place] = (_Named(self, function, "thread "), args, named)
        if self._began is None:
            self._began, self._events = self._clock(), 0
        self.call(lambda: "timers", call)

    def insert_new(self, reactor: Any, insert: Callable[[], None]) -> None:
        """Let the reactor take in its new timers, each with its name."""
        for timer in reactor._newTimedCalls:
            if timer.func is not None and not isinstance(timer.func, _Named):
                timer.func = _Named(self, timer.func, "timer ")
        insert()

    def part(self, owner: type, attribute: str, name: str) -> None:
        """Time all calls of a method of one of our classes, until :meth:`stop`."""
        method = getattr(owner, attribute)

        @wraps(method)
        def timed(*args: Any, **named: Any) -> Any:
            if threading.get_ident() != self._thread:
                return method(*args, **named)
            return self.call(lambda: name, lambda: method(*args, **named))

        self._replace(owner, attribute, timed)

    def later(self, owner: type, attribute: str) -> None:
        """Time what is given to a ``callLater`` of one of our classes, until :meth:`stop`."""
        method = getattr(owner, attribute)

        def named(one: Any, delay: float, call: Callable[[], object]) -> Any:
            return method(one, delay, _Named(self, call, "timer "))

        self._replace(owner, attribute, named)

    def _replace(self, owner: type, attribute: str, by: Any) -> None:
        is_own, before = attribute in vars(owner), getattr(owner, attribute)
        setattr(owner, attribute, by)
        self._undo.append(
            lambda: setattr(owner, attribute, before) if is_own else delattr(owner, attribute)
        )

    def start(self) -> None:
        """Begin to time the garbage collector."""
        gc.callbacks.append(self._collects)

    def stop(self) -> None:
        """Time nothing more; named parts are what they were."""
        if self._collects in gc.callbacks:
            gc.callbacks.remove(self._collects)
        while self._undo:
            self._undo.pop()()

    def _collects(self, phase: str, info: dict[str, int]) -> None:
        if phase == "stop":
            self._collected += info["collected"]
        if threading.get_ident() != self._thread:
            return  # the reactor meets it as time in which it waited for the lock
        if phase == "start":
            self._collection = (self._clock(), self._ran(), self._inside)
            self._inside = [0.0, 0.0]
        elif self._collection is not None:
            began, ran, outer = self._collection
            seconds, ran = self._clock() - began, self._ran() - ran
            outer[0] += seconds
            outer[1] += ran
            self._inside, self._collection = outer, None
            self._note(f"garbage collector, generation {info['generation']}", seconds, ran)

    # -- what was found -------------------------------------------------------------------------

    def rows(self) -> dict[str, Any]:
        """Return what was found so far.

        ``calls`` has a row for each name, the one with the most slow seconds first; ``longest`` the
        longest turns, each with its slowest calls.  Times are milliseconds.  ``collected`` is how
        many objects the garbage collector has freed.
        """
        by_cost = sorted(self._calls.items(), key=lambda one: (-one[1].slow, -one[1].own_s))
        return {
            "calls": [
                {
                    "name": name,
                    "count": calls.count,
                    "ms": _ms(calls.own_s),
                    "slow": calls.slow,
                    "longest_ms": _ms(calls.longest_s),
                    "waited_ms": _ms(calls.waited_s),
                }
                for name, calls in by_cost
            ],
            "collected": self._collected,
            "longest": [
                {
                    "ms": _ms(seconds),
                    "sockets": events,
                    "calls": [{"name": name, "ms": _ms(own_s)} for own_s, name in turn],
                }
                for seconds, events, turn in reversed(self._longest)
            ],
        }


class _Timed:
    """A socket, as the loop sees it."""

    __slots__ = ("_watch", "found", "name")

    def __init__(self, watch: TurnWatch, found: Any) -> None:
        self._watch = watch
        self.found = found
        # Now: it may have lost its protocol when the call is over.
        protocol = getattr(found, "protocol", None)
        self.name = type(found if protocol is None else protocol).__name__

    def logPrefix(self) -> str:  # noqa: N802 - Twisted's name
        """Return what stands before a log line that is about the socket."""
        return str(self.found.logPrefix())

    def doRead(self) -> Any:
        """Read, and time it."""
        return self._watch.call(lambda: f"{self.name} doRead", self.found.doRead)

    def doWrite(self) -> Any:
        """Write, and time it."""
        return self._watch.call(lambda: f"{self.name} doWrite", self.found.doWrite)


class _Named:
    """What a timer or another thread calls."""

    __slots__ = ("_call", "_kind", "_watch")

    def __init__(self, watch: TurnWatch, call: Callable[..., Any], kind: str) -> None:
        self._watch = watch
        self._call = call
        self._kind = kind

    def __call__(self, *args: Any, **named: Any) -> Any:
        call = self._call
        return self._watch.call(self._name, lambda: call(*args, **named))

    def _name(self) -> str:
        call: Any = self._call
        call = getattr(call, "f", call)  # of a LoopingCall
        call = getattr(call, "func", call)  # of a partial
        return self._kind + str(getattr(call, "__qualname__", type(call).__name__))


def _ms(seconds: float) -> float:
    return round(seconds * 1000, 3)
