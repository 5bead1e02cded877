"""Request bodies on their way to a provider: held in memory, or framed while they come.

``upstream/http1.py`` sends a request by one of these.  Of a body is known how it is produced; the
transport is the provider's.  Pools, clients and deadlines are not known here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from twisted.internet.defer import Deferred, succeed
from twisted.internet.interfaces import IConsumer
from twisted.python.failure import Failure
from twisted.web.iweb import UNKNOWN_LENGTH, IBodyProducer
from zope.interface import implementer

from llmproxy.http1.framing import LAST_CHUNK, chunk
from llmproxy.net.transport import pending_bytes, unacknowledged_bytes


@implementer(IBodyProducer)
class HeldBody:
    """A request body that is held in memory, written as fast as the provider takes it.

    Up to one slice goes out at once; more is written slice by slice, whenever the transport has
    sent the one before.
    """

    SLICE = 262_144

    def __init__(self, data: bytes) -> None:
        self.data = data
        self._position = 0
        self._consumer: IConsumer | None = None
        self.length = len(data)

    @property
    def is_short(self) -> bool:
        """Whether it goes out at once."""
        return self.length <= self.SLICE

    def startProducing(self, consumer: IConsumer) -> Deferred[None]:
        """Write the body; fires once the last slice was written, at once where it is short."""
        if self.is_short:
            consumer.write(self.data)
            return succeed(None)
        self._consumer = consumer
        self._done: Deferred[None] = Deferred(lambda _: self.stopProducing())
        done = self._done
        consumer.registerProducer(self, False)
        return done

    def resumeProducing(self) -> None:
        """Write the next slice; the transport has sent the one before."""
        if self._consumer is None:
            return
        start = self._position
        self._position = start + self.SLICE
        self._consumer.write(self.data[start : self._position])
        if self._position >= self.length:
            self.stopProducing()
            self._done.callback(None)

    def pauseProducing(self) -> None:
        """Nothing to do: a pull producer writes only when it is asked."""

    def stopProducing(self) -> None:
        """Write no more; the Deferred never fires unless the body was whole."""
        consumer, self._consumer = self._consumer, None
        if consumer is not None:
            consumer.unregisterProducer()


@implementer(IConsumer)
class BodySink:
    """What a request body is written to: a provider's transport, and the framing of the body.

    Args:
        transport: the provider's.
        head: the request's, which leaves with the first piece, or at :meth:`flush`.
        chunked: the body's length is unknown, so it goes in the chunked coding.

    Attributes:
        written: bytes that were written so far.
    """

    def __init__(self, transport: Any, head: bytes, *, chunked: bool) -> None:
        self._transport = transport
        self._head = head
        self._chunked = chunked
        self.written = 0

    def write(self, data: bytes) -> None:
        """Write one piece; an empty one is left out, as it would be the last chunk."""
        self.written += len(data)
        if self._chunked and data:
            data = chunk(data)
        if self._head:
            data, self._head = self._head + data, b""
        self._transport.write(data)

    def flush(self) -> None:
        """Write the head now, where nothing has taken it along."""
        if self._head:
            self.write(b"")

    def finish(self) -> None:
        """The body is whole."""
        self.flush()
        if self._chunked:
            self._transport.write(LAST_CHUNK)

    def registerProducer(self, producer: Any, streaming: bool) -> None:
        """Let the transport pause and resume ``producer``."""
        self._transport.registerProducer(producer, streaming)

    def unregisterProducer(self) -> None:
        """The producer is done."""
        self._transport.unregisterProducer()


class Sent:
    """A short body, which was written at once, as most are: there is nothing to wait for.

    It takes 1.5 µs less of a request than :class:`Sending`.

    Its attributes are those of :class:`Sending`.
    """

    __slots__ = ("_transport", "_written")
    active = False

    def __init__(self, transport: Any, head: bytes, body: HeldBody) -> None:
        self._transport = transport
        self._written = len(head) + body.length
        transport.write(head + body.data)

    def untaken(self) -> int | None:
        """Do as :meth:`Sending.untaken`."""
        return _untaken(self._transport, self._written)

    def stop(self) -> None:
        """There is nothing to stop."""


class Sending:
    """One body that is being sent.

    Args:
        transport: the provider's.
        head: the request's, which leaves with the first piece of the body, or alone where that
            takes longer.
        body: produces it.
        failed: called with the failure where the body will not be whole.

    Attributes:
        active: some of the body is still to be written.
    """

    def __init__(
        self,
        transport: Any,
        head: bytes,
        body: IBodyProducer,
        failed: Callable[[Failure], None],
    ) -> None:
        self._transport = transport
        self._body: IBodyProducer | None = body
        self._failed = failed
        self._sink = BodySink(transport, head, chunked=body.length is UNKNOWN_LENGTH)
        self.active = True
        body.startProducing(self._sink).addCallbacks(self._sent, self._broke)
        self._sink.flush()

    def untaken(self) -> int | None:
        """Return how many bytes the provider has taken, where more are on the way; else None."""
        return _untaken(self._transport, self._sink.written)

    def stop(self) -> None:
        """Send no more."""
        if self.active and self._body is not None:
            self.active = False
            self._body.stopProducing()

    def _sent(self, _: None) -> None:
        self.active = False
        self._body = None  # a stream may last for long after its request
        self._sink.finish()

    def _broke(self, failure: Failure) -> None:
        if self.active:
            self.active = False
            self._failed(failure)


class Phase:
    """Says which part of a request takes so long; called whenever a deadline is over.

    Args:
        sending: the request's body on its way, or None where it has none.
    """

    __slots__ = ("_sending", "_stuck_at", "_was_active")

    def __init__(self, sending: Sending | Sent | None) -> None:
        self._sending = sending
        self._stuck_at: int | None = None
        self._was_active = False

    def __call__(self) -> str | None:
        """Return ``request``, ``first_byte``, or None where the provider takes some of it."""
        sending = self._sending
        before, self._stuck_at = self._stuck_at, None if sending is None else sending.untaken()
        still, self._was_active = self._was_active, sending is not None and sending.active
        if self._stuck_at is not None:
            return "request" if self._stuck_at == before else None
        return None if self._was_active or still else "first_byte"


def _untaken(transport: Any, written: int) -> int | None:
    waiting = pending_bytes(transport) + unacknowledged_bytes(transport)
    return written - waiting if waiting else None
