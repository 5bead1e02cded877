"""A response of the demo provider on its way out: one event a write, at a pace, to a chosen end.

The head leaves at once and every event in a reactor turn of its own, so that nothing here joins two
of them.  The flow stands still while the client is slow, and leaves no timer behind when the client
leaves.  How it ends is an argument: properly, or in one of the ways in which providers fail.

This module knows Twisted's request and time, and no dialect.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, BinaryIO, Protocol

from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IPushProducer
from zope.interface import implementer

from llmproxy.cli.demo.dialect import Event

_CHUNKS_BEFORE_FAILURE = 3


class Timer(Protocol):
    """A call that waits for its time."""

    def cancel(self) -> None:
        """Forget it."""


class Time(Protocol):
    """What is used of a reactor."""

    def seconds(self) -> float:
        """Now, in seconds since 1970."""

    def callLater(self, delay: float, callable: Callable[[], object], /) -> Timer:
        """Call after so many seconds."""


class Reply(Protocol):
    """What is used of :class:`twisted.web.server.Request`, most of which has no types."""

    method: bytes
    path: bytes
    uri: bytes
    content: BinaryIO
    transport: Any

    def getHeader(self, name: bytes, /) -> bytes | None:
        """A field of the request."""

    def setResponseCode(self, code: int, /) -> None:
        """The status to answer with."""

    def setHeader(self, name: bytes, value: bytes, /) -> None:
        """A field of the response."""

    def registerProducer(self, producer: Flow, streaming: bool, /) -> None:
        """Who is to pause and resume."""

    def unregisterProducer(self) -> None:
        """Nobody any more."""

    def notifyFinish(self) -> Deferred[None]:
        """Fires when the response has ended, fails when the client has left."""

    def write(self, data: bytes, /) -> None:
        """Send; the first call sends the head too."""

    def finish(self) -> None:
        """End the response properly."""


Ending = Callable[[Reply], None]
"""What happens after the last event."""


@implementer(IPushProducer)
class Flow:
    """Writes events to a response, each after the time that its tokens take.

    Args:
        reply: its head is set, nothing is written yet.
        time: for the pace.
        events: taken one at a time, when they are due.
        pace: tokens per second; None: no pause.
        ending: called once, in a turn after the last event's, unless the client has left.
    """

    def __init__(
        self,
        reply: Reply,
        time: Time,
        events: Iterator[Event],
        pace: float | None,
        ending: Ending,
    ) -> None:
        self._reply = reply
        self._time = time
        self._events = events
        self._pace = pace
        self._ending = ending
        self._next: Event | None = None
        self._timer: Timer | None = None
        self._paused = False
        self._over = False

    def start(self) -> None:
        """Send the head, and begin."""
        self._reply.notifyFinish().addErrback(lambda _: self.stopProducing())
        self._reply.write(b"")
        self._next = next(self._events, None)
        self._reply.registerProducer(self, True)
        self._arm()

    def pauseProducing(self) -> None:
        """Stand still: the client is slow."""
        self._paused = True
        self._disarm()

    def resumeProducing(self) -> None:
        """Go on with the event that was due; its time begins anew."""
        self._paused = False
        self._arm()

    def stopProducing(self) -> None:
        """Give up: the client has left."""
        self._over = True
        self._disarm()

    def _arm(self) -> None:
        if self._timer is None and not self._paused and not self._over:
            tokens = 0 if self._next is None else self._next.tokens
            self._timer = self._time.callLater(
                tokens / self._pace if self._pace else 0.0, self._step
            )

    def _disarm(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _step(self) -> None:
        self._timer = None
        if self._next is None:
            self._over = True
            self._ending(self._reply)
            return
        data, self._next = self._next.data, next(self._events, None)
        self._reply.write(data)
        self._arm()


def end_properly(reply: Reply) -> None:
    """The response is whole; the connection may be used again."""
    reply.unregisterProducer()
    reply.finish()


def end_broken(reply: Reply) -> None:
    """The connection is reset; what was written before has left with an earlier turn."""
    reply.transport.abortConnection()


def end_closed(reply: Reply) -> None:
    """The connection is closed in order, and the response is not whole."""
    reply.transport.loseConnection()


def end_silent(reply: Reply) -> None:
    """Nothing more, for ever: the response stays open until the client gives up."""


def end_malformed(reply: Reply) -> None:
    """A chunk whose size is no number, and the end of the connection."""
    reply.transport.write(b"not-a-size\r\n")
    reply.transport.loseConnection()


def end_without_head(reply: Reply) -> None:
    """Something that is no head, where one was to come, and the end of the connection."""
    reply.transport.write(b"not-a-head\r\n\r\n")
    reply.transport.loseConnection()


def cut_short(events: Iterator[Event]) -> Iterator[Event]:
    """A stream up to its third token, and in any case without what follows its last one."""
    made = 0
    for event in events:
        if made == _CHUNKS_BEFORE_FAILURE or (made and not event.tokens):
            return
        yield event
        made += bool(event.tokens)
