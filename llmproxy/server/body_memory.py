"""How much memory the held request bodies may take, and whose bodies they are.

Bodies that must be looked into are held.  All of them together have a bound, and within it no
client can take what the others need: a client may hold at most four times as much as is free.  So a
client that is alone gets four fifths, two get four ninths each, and something is always left for
another one.  No share has to be configured, and nothing is looked up below four fifths.

If there is no room, bodies that do not go on make some: unfinished ones of the client that holds
most, of which nothing has come for a second, a few of the largest.  A whole body is being served,
and stays.

Who a client is, the handler says (``Request.belongs_to``).  Until then a body counts as nobody's,
and only the bound on all applies to it.  So does a body that comes in one read while less than half
of the memory is held.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import islice, takewhile
from typing import Any

from llmproxy.server.error_response import memory_full

_TIMES_FREE = 4
"""How many times as much as is free one client may hold (dynamic thresholds, Choudhury and Hahne,
IEEE/ACM Transactions on Networking 6, 1998)."""

_IDLE = 1.0
"""Seconds without a byte after which a body may make room for another one."""

_MOST_LOOKED = 2000
"""Idle bodies that are looked at for one piece of another, the oldest ones."""

_MOST_DROPPED = 16
"""Bodies that may make room for one piece of another; each gets a response in the same turn."""


class BodyMemory:
    """The held bodies of one site.

    Args:
        limit: bytes of all bodies together; it may be changed.
        clock: monotonic seconds.

    Attributes:
        held: bytes that are held now.
    """

    def __init__(self, limit: int, clock: Callable[[], float]) -> None:
        self.limit = limit
        self.held = 0
        self._clock = clock
        self._by_owner: dict[str, int] = {}
        self._unfinished: dict[Any, float] = {}  # when the last byte came; the oldest is first

    def hold(self, request: Any, size: int) -> bool:
        """Count ``size`` more bytes of a request's body; return False where there is no room."""
        if request.owner is None and self.held + size <= self.limit:
            self.held += size
            request.held += size
            return True
        if not self._has_room(request.owner, size) and not self._make_room(request, size):
            return False
        self.held += size
        request.held += size
        if (owner := request.owner) is not None:
            self._by_owner[owner] = self._by_owner.get(owner, 0) + size
            self._unfinished.pop(request, None)
            self._unfinished[request] = self._clock()
        return True

    def is_filling(self) -> bool:
        """Return whether it matters whose a whole body is; below a half it does not."""
        return self.held + self.held > self.limit

    def assign(self, request: Any, owner: str) -> bool:
        """Count a request's body as ``owner``'s; return False where that is too much for one."""
        request.owner = owner
        if request.held:
            own = self._by_owner[owner] = self._by_owner.get(owner, 0) + request.held
            free = self.limit - self.held
            return self.held <= _TIMES_FREE * free or own <= _TIMES_FREE * free
        return True

    def complete(self, request: Any) -> None:
        """A request's body is whole, and makes no room any more."""
        self._unfinished.pop(request, None)

    def release(self, request: Any) -> None:
        """A request's body is held no more."""
        held, request.held = request.held, 0
        self.held -= held
        if (owner := request.owner) is not None:
            self._unfinished.pop(request, None)
            left = self._by_owner.get(owner, 0) - held
            if left:
                self._by_owner[owner] = left
            else:
                self._by_owner.pop(owner, None)

    def _has_room(self, owner: str | None, size: int) -> bool:
        free = self.limit - self.held - size
        if owner is None or self.held + size <= _TIMES_FREE * free:
            return free >= 0
        return self._by_owner.get(owner, 0) + size <= _TIMES_FREE * free

    def _make_room(self, request: Any, size: int) -> bool:
        """Drop bodies that do not go on, until there is room; return whether there is."""
        long_ago = self._clock() - _IDLE
        old = takewhile(lambda one: one[1] <= long_ago, self._unfinished.items())
        idle = [one for one, _ in islice(old, _MOST_LOOKED) if one is not request]
        idle.sort(key=lambda one: one.held, reverse=True)  # of two alike the older one is first
        for _ in range(_MOST_DROPPED):
            most = max(self._by_owner.values(), default=0)
            victim = next((one for one in idle if self._by_owner.get(one.owner) == most), None)
            if victim is None:
                return False
            idle.remove(victim)
            victim.refuse(memory_full())
            if self._has_room(request.owner, size):
                return True
        return False
