"""Request bodies on their way to a provider: held in memory, or framed while they come."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from twisted.internet.defer import Deferred, succeed
from twisted.internet.interfaces import IConsumer
from twisted.python.failure import Failure
from twisted.web.iweb import UNKNOWN_LENGTH, IBodyProducer
from zope.interface import implementer

from llmproxy.wire.framing import LAST_CHUNK, chunk
from llmproxy.wire.transport import pending_bytes, unacknowledged_bytes


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
        """Write one piece; an empty one would be the last chunk, and is none."""
        self.written += len(data)
        if self._chunked and data:
            data = b"".join(chunk(data))
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


class Sending:
    """One body that is being sent.

    Args:
        transport: the provider's.
        head: the request's, which leaves with the first piece of the body, or alone where that
            takes longer.
        body: produces it.
        failed: called with the failure where the body will not be whole.

    Attributes:
        active: not all of it was written yet.
    """

    def __init__(
        self,
        transport: Any,
        head: bytes,
        body: IBodyProducer,
        failed: Callable[[Failure], None],
    ) -> None:
        self._transport = transport
        self._body: IBodyProducer | None = None
        self._failed = failed
        self._sink = BodySink(transport, head, chunked=body.length is UNKNOWN_LENGTH)
        if isinstance(body, HeldBody) and body.is_short:
            self.active = False
            self._sink.write(body.data)  # as most are, and nobody has to wait for it
            return
        self._body = body
        self.active = True
        body.startProducing(self._sink).addCallbacks(self._sent, self._broke)
        self._sink.flush()

    def untaken(self) -> int | None:
        """Return how many bytes the provider has taken, where more are on the way; else None."""
        waiting = pending_bytes(self._transport) + unacknowledged_bytes(self._transport)
        return self._sink.written - waiting if waiting else None

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
