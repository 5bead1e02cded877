"""Connecting to the first of several addresses that lets one in ("Happy Eyeballs", RFC 8305).

The next address is tried when the one before has failed, or has said nothing for a quarter of a
second.  What is connected first counts; the others are given up.  Nothing is known here of names,
sockets or TLS.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import chain, zip_longest
from typing import Any, Generic, TypeVar

from twisted.internet.defer import Deferred
from twisted.python.failure import Failure

DELAY = 0.25
"""Seconds between two attempts, where the first one says nothing (RFC 8305, section 5)."""

T = TypeVar("T")

Address = tuple[int, str]
"""A family of the socket module's, and an address."""


def interleaved(addresses: Sequence[Address]) -> list[Address]:
    """Return addresses with their families in turn, the first one's first (RFC 8305, section 4)."""
    families = list(dict.fromkeys(family for family, _ in addresses))
    by_family = [[one for one in addresses if one[0] == family] for family in families]
    return [one for one in chain.from_iterable(zip_longest(*by_family)) if one is not None]


def first_connected(
    reactor: Any,
    attempts: Sequence[Callable[[], Deferred[T]]],
    give_up: Callable[[T], object],
) -> Deferred[T]:
    """Return what the first attempt that succeeds has connected.

    Args:
        reactor: keeps time.
        attempts: begin to connect, in this order; at least one.
        give_up: closes what was connected too late.

    Returns:
        fails as the last attempt did, where all fail.  Cancelling it cancels what is under way.
    """
    return attempts[0]() if len(attempts) == 1 else _Race(reactor, attempts, give_up).won


class _Race(Generic[T]):
    """One such race."""

    __slots__ = (
        "_attempts",
        "_begun",
        "_give_up",
        "_is_over",
        "_pending",
        "_reactor",
        "_timer",
        "won",
    )

    def __init__(
        self,
        reactor: Any,
        attempts: Sequence[Callable[[], Deferred[T]]],
        give_up: Callable[[T], object],
    ) -> None:
        self._reactor = reactor
        self._attempts = attempts
        self._give_up = give_up
        self._begun = 0
        self._pending: set[Deferred[T]] = set()
        self._timer: Any = None
        self._is_over = False
        self.won: Deferred[T] = Deferred(lambda _: self._end())
        self._try_next()

    def _try_next(self) -> None:
        self._stop_timer()
        attempt = self._attempts[self._begun]
        self._begun += 1
        connecting = attempt()
        self._pending.add(connecting)
        connecting.addCallbacks(
            self._connected, self._failed, callbackArgs=(connecting,), errbackArgs=(connecting,)
        )
        if not self._is_over and self._begun < len(self._attempts) and self._timer is None:
            self._timer = self._reactor.callLater(DELAY, self._on_time)

    def _on_time(self) -> None:
        self._timer = None
        self._try_next()

    def _connected(self, result: T, connecting: Deferred[T]) -> None:
        self._pending.discard(connecting)
        if self._is_over:
            self._give_up(result)
        else:
            self._end()
            self.won.callback(result)

    def _failed(self, failure: Failure, connecting: Deferred[T]) -> None:
        self._pending.discard(connecting)
        if self._is_over:
            return
        if self._begun < len(self._attempts):
            self._try_next()
        elif not self._pending:
            self._end()
            self.won.errback(failure)

    def _end(self) -> None:
        """Give up whatever is under way."""
        self._is_over = True
        self._stop_timer()
        for connecting in list(self._pending):
            connecting.cancel()

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
