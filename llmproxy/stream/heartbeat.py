"""Writes something of our own into a stream of events while its provider is silent.

Some hops between a proxy and its clients end a connection on which nothing has come for a while,
however long the model still thinks.  A heartbeat stands between two events and never within one,
and only while the client takes what it gets.  It is one timer: when it rings, it looks at the time
of the last chunk, which the relay notes anyway; chunks do not touch it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llmproxy.stream.relay import Relay

_ENDS = (b"\n\n", b"\r\r", b"\r\n\r\n")


def is_between_events(tail: bytes) -> bool:
    """Return whether a stream of events stands between two of them.

    Args:
        tail: the last four bytes of it, or nothing where nothing has come.
    """
    return not tail or tail.endswith(_ENDS)


class Heartbeat:
    """The heartbeat of one stream.

    Args:
        relay: forwards the stream; it has started.
        write: puts bytes on the client's wire.
        reactor: runs the timer.
        clock: monotonic seconds, the relay's.
        every: seconds of silence before a beat, and between two.
        beat: what is written.
    """

    __slots__ = (
        "_beat",
        "_beaten_at",
        "_clock",
        "_every",
        "_reactor",
        "_relay",
        "_timer",
        "_write",
    )

    def __init__(
        self,
        relay: Relay,
        write: Callable[[bytes], object],
        reactor: Any,
        clock: Callable[[], float],
        *,
        every: float,
        beat: bytes,
    ) -> None:
        self._relay = relay
        self._write = write
        self._reactor = reactor
        self._clock = clock
        self._every = every
        self._beat = beat
        self._beaten_at = clock()
        self._timer = reactor.callLater(every, self._look)

    def stop(self) -> None:
        """Beat no more."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _look(self) -> None:
        self._timer = None
        relay, now = self._relay, self._clock()
        if relay.is_over:
            return
        statistics = relay.statistics
        left = self._every - (now - max(statistics.last_at, self._beaten_at))
        if left <= 0:
            left, self._beaten_at = self._every, now
            if not relay.is_paused and is_between_events(statistics.tail):
                self._write(self._beat)
        self._timer = self._reactor.callLater(left, self._look)
