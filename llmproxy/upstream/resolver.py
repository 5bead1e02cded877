"""From a name to its addresses: one lookup for all who wait for the name.

``getaddrinfo`` blocks a thread for as long as a resolver is silent, and Twisted shares a few
threads among everything.  Here each name has at most one lookup under way, on a thread of its own.
So a name that hangs delays no other name, and there are never more threads than names in the
configuration.  Addresses are kept for a short time, and for longer where the name cannot be looked
up any more: a resolver that is down must not take the providers along (ADR-0006).

The names of tunnels are chosen by callers, who could choose any number of them.  A resolver for
these has bounds: for threads, beyond which lookups wait for their turn, also for those of one
caller, and for remembered names.
"""

from __future__ import annotations

import errno
import math
import os
import socket
import threading
from collections import Counter
from collections.abc import Callable
from typing import Any

from twisted.internet.defer import Deferred

from llmproxy.upstream.race import Address

KEPT = 10.0
"""Seconds for which found addresses are used again; then a provider may have moved."""

STALE = 3600.0
"""Seconds for which they are used where a later lookup fails or hangs."""

PATIENCE = 1.0
"""Seconds for which a lookup is waited for, where there are addresses of before (RFC 8767, 5)."""

NO_MORE = (errno.EMFILE, errno.ENFILE, errno.EBUSY)
"""What the lack of descriptors is called; ``getaddrinfo`` says EBUSY where nsswitch asks mdns."""

_MOST_ADDRESSES = 64
"""How many addresses of a name are kept, and tried at most."""

_FAMILIES = (socket.AF_INET, socket.AF_INET6)

_Lookup = Callable[..., list[Any]]


class _Kept:
    """What was found for one name, when, and until when it is used without asking again."""

    __slots__ = ("addresses", "found_at", "good_until")

    def __init__(self, addresses: list[Address], found_at: float, good_until: float) -> None:
        self.addresses = addresses
        self.found_at = found_at
        self.good_until = good_until


class Resolver:
    """Resolves names for connections to providers, or for tunnels.

    Args:
        reactor: delivers what the threads find.
        clock: monotonic seconds.
        getaddrinfo: looks a name up, and blocks.
        most_lookups: how many lookups may be under way; others wait until one has ended.
        most_of_one: how many of these may be on account of the same caller.
        most_names: how many names are remembered; those that were found longest ago are forgotten.

    Attributes:
        failures: the error of the last lookup by name, where it failed.
        stale: how often addresses were used that a lookup did not confirm.
    """

    def __init__(
        self,
        reactor: Any,
        clock: Callable[[], float],
        *,
        getaddrinfo: _Lookup = socket.getaddrinfo,
        most_lookups: float = math.inf,
        most_of_one: float = math.inf,
        most_names: float = math.inf,
    ) -> None:
        self._reactor = reactor
        self._clock = clock
        self._getaddrinfo = getaddrinfo
        self._most_lookups = most_lookups
        self._most_names = most_names
        self._most_of_one = most_of_one
        self._under_way = Counter[str]()  # lookups, by caller
        self._callers: dict[str, str] = {}  # on whose account each name is looked up
        self._in_line: dict[str, str] = {}  # the same for names that wait for their lookup
        self._kept: dict[str, _Kept] = {}
        self._timers: dict[str, Any] = {}
        self._waiting: dict[str, list[Deferred[list[Address]]]] = {}
        self.failures: dict[str, Exception] = {}
        self.stale = 0

    def addresses(self, name: str, caller: str = "") -> Deferred[list[Address]]:
        """Look a name up, or take what was found a moment ago.

        Args:
            name: of a host.
            caller: who asks, where that counts.

        Returns:
            fires with every address of the name, in the system's order; with none where the lookup
            failed, and nothing was found before.  Cancelling it leaves the lookup to others.
        """
        found: Deferred[list[Address]] = Deferred(lambda cancelled: self._forget(name, cancelled))
        now, kept = self._clock(), self._kept.get(name)
        if kept is not None and now < kept.good_until:
            found.callback(kept.addresses)
            return found
        if kept is not None and now - kept.found_at < STALE and name not in self._timers:
            self._timers[name] = self._reactor.callLater(PATIENCE, self._use_stale, name)
        is_under_way = name in self._callers
        self._waiting.setdefault(name, []).append(found)
        if not is_under_way and self._has_room(caller):
            self._in_line.pop(name, None)  # another caller may have to wait for its turn
            self._look_up(name, caller)
        elif not is_under_way:
            self._in_line.setdefault(name, caller)
        return found

    def _has_room(self, caller: str) -> bool:
        """Return whether another lookup may begin, for this caller."""
        if self._under_way[caller] >= self._most_of_one:
            return False
        return len(self._callers) < self._most_lookups

    def _forget(self, name: str, cancelled: Deferred[list[Address]]) -> None:
        waiting = self._waiting.get(name, [])
        waiting[:] = [one for one in waiting if one is not cancelled]
        if not waiting:
            self._stop_timer(name)
            if name in self._in_line:
                del self._in_line[name], self._waiting[name]

    def _look_up(self, name: str, caller: str) -> None:
        self._callers[name] = caller
        self._under_way[caller] += 1
        # A daemon thread: one that hangs in the resolver must not keep the process from ending.
        asking = threading.Thread(target=self._ask, args=(name,), name="name", daemon=True)
        try:
            asking.start()
        except RuntimeError as error:  # no more threads: this request fails, the next asks again
            self._settle(name, [], error)

    def _ask(self, name: str) -> None:
        """On a thread: look the name up, and give the result to the reactor."""
        rows: list[Any] = []
        error: Exception | None = None
        try:
            rows = self._getaddrinfo(name, 0, socket.AF_UNSPEC, socket.SOCK_STREAM)
        except Exception as problem:
            error = _no_descriptor() or problem
        self._reactor.callFromThread(self._found, name, rows, error)

    def _found(self, name: str, rows: list[Any], error: Exception | None) -> None:
        """A thread has ended its lookup: the next name has its turn."""
        self._settle(name, rows, error)
        for following, caller in list(self._in_line.items()):
            if len(self._callers) >= self._most_lookups:
                break
            if self._has_room(caller):
                del self._in_line[following]
                self._look_up(following, caller)

    def _settle(self, name: str, rows: list[Any], error: Exception | None) -> None:
        caller = self._callers.pop(name)
        self._under_way[caller] -= 1
        if not self._under_way[caller]:
            del self._under_way[caller]
        found = [(row[0], row[4][0]) for row in rows if row[0] in _FAMILIES][:_MOST_ADDRESSES]
        self._stop_timer(name)
        now, kept = self._clock(), self._kept.get(name)
        if error is None:
            self._kept.pop(name, None)
            self._kept[name] = _Kept(found, now, now + KEPT)
            self.failures.pop(name, None)
            self._bound(self._kept)
        else:
            self.failures.pop(name, None)
            self.failures[name] = error
            self._bound(self.failures)
            if kept is not None and now - kept.found_at < STALE:
                self._use_stale(name)
        for waiting in self._waiting.pop(name):
            waiting.callback(found)

    def _bound(self, names: dict[str, Any]) -> None:
        """Forget the name that was put there first, if there are too many."""
        if len(names) > self._most_names:
            del names[next(iter(names))]

    def _use_stale(self, name: str) -> None:
        """Give whoever waits the addresses of before, and use them for a while without asking."""
        self._timers.pop(name, None)
        kept = self._kept.get(name)
        if kept is None:
            return  # it was forgotten meanwhile, and the lookup is waited for
        kept.good_until = self._clock() + KEPT
        self.stale += 1
        waiting, self._waiting[name] = self._waiting[name], []
        for one in waiting:
            one.callback(kept.addresses)

    def _stop_timer(self, name: str) -> None:
        if (timer := self._timers.pop(name, None)) is not None:
            timer.cancel()


def _no_descriptor() -> OSError | None:
    """Return why no file can be opened now, where it is for want of descriptors.

    A lookup opens files and sockets.  Where it cannot, C libraries and their modules say that the
    name is not known, that they are busy, or that somebody should try again.
    """
    try:
        os.close(os.open(os.devnull, os.O_RDONLY))
    except OSError as error:
        return error if error.errno in NO_MORE else None
    return None
