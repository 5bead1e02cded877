"""What a client has of what was written to its connection, as far as the kernel knows.

That something is written says little: the kernel takes megabytes for a client that does not read.
The kernel knows what it could not send yet, because the client has no room for it, and what the
client has not acknowledged (ADR-0020).  A connection asks here whether its client has a response,
and whether it has stalled.  Nothing of HTTP is known here.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from llmproxy.net.tcp import DirectTransport
from llmproxy.net.transport import (
    pending_bytes,
    raw_transport,
    unacknowledged_bytes,
    unsent_bytes,
)

_CLOSE_BYTES = 64
"""Most bytes of a FIN and of an alert of TLS, such as close_notify, behind a whole response."""

_FIRST, _LAST = 0.01, 0.5
"""Seconds between two looks at what a client has not taken: doubled from the first to the last."""

_LOOKS = 4
"""Looks at what the kernel alone holds within ``client_stall``; each is a system call."""


class Delivery:
    """What the client of one connection has of what was written to it.

    Args:
        transport: the connection's.
        reactor: keeps the time of looks.
    """

    __slots__ = (
        *("_direct", "_look_at", "_next", "_reactor", "_seconds", "_taken", "_taken_at"),
        *("_transport", "_waiting"),
    )

    def __init__(self, transport: Any, reactor: Any) -> None:
        self._transport = transport
        self._direct = transport if isinstance(transport, DirectTransport) else None
        self._reactor = reactor
        self._next: Any = None
        self._seconds = _FIRST
        self._look_at = 0.0
        self._taken = -math.inf  # how many bytes the client had taken when it last took one, and
        self._taken_at = 0.0  # when that was
        self._waiting = 0  # how many bytes waited at the last look

    def is_sent(self) -> bool:
        """Return whether the kernel has sent everything: the client has room for it."""
        if self._direct is not None:
            return self._direct.is_sent()
        return not pending_bytes(self._transport) and not unsent_bytes(self._transport)

    @property
    def is_acknowledged(self) -> bool:
        """Whether the client has everything."""
        return not pending_bytes(self._transport) and not unacknowledged_bytes(self._transport)

    @property
    def had_room(self) -> bool:
        """Whether the client could take everything until now, or until the connection was lost.

        After a reset, this is all that is known.  Below Twisted's own transports it is not known
        what the kernel still held.
        """
        lost = getattr(raw_transport(self._transport), "unsent", 0)
        left = max(lost, unsent_bytes(self._transport))
        return not pending_bytes(self._transport) and left <= _CLOSE_BYTES

    def watch(self, look: Callable[[], object]) -> None:
        """Call ``look`` in 10 ms, and again, less and less often, until :meth:`stop_watching`."""
        self.stop_watching()
        self._seconds = _FIRST
        self._next = self._reactor.callLater(self._seconds, self._look, look)

    def stop_watching(self) -> None:
        """Look no more."""
        if self._next is not None:
            self._next.cancel()
            self._next = None

    def _look(self, look: Callable[[], object]) -> None:
        self._seconds = min(self._seconds * 2, _LAST)
        self._next = self._reactor.callLater(self._seconds, self._look, look)
        look()

    def is_stalled(self, now: float, limit: float | None, written: int) -> bool:
        """Return whether the client took no byte for ``limit`` although some waited for it.

        The kernel asks for more only when much of its queue is free again.  When the kernel has
        taken everything, the client may be gone already.  So progress is what the client
        acknowledges.

        Args:
            now: monotonic seconds.
            limit: seconds; None for as long as it likes.
            written: how many bytes were written to the transport so far.
        """
        waiting = pending_bytes(self._transport)
        if limit is None or (not waiting and now < self._look_at):
            return False
        waiting += unacknowledged_bytes(self._transport)
        self._look_at = now + limit / _LOOKS
        before, self._waiting = self._waiting, waiting
        taken = written - waiting  # too few by what TLS added to what the kernel took
        if not waiting:
            self._taken = -math.inf  # the time begins with the first look at which something waits
        elif taken > self._taken or waiting < before:  # nothing but the client makes it wait less
            self._taken, self._taken_at = taken, now
        else:
            return now - self._taken_at >= limit
        return False
