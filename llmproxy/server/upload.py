"""A request body on its way up: from the client's connection to the provider's, without being held.

An :class:`Upload` is fed by the request, and writes to the consumer that the upstream side gives
it.  Until there is a consumer, and whenever that is full, the client is not read from: what lies
here is bounded.  Of the client's connection is known that it can be paused, resumed, and asked to
invite the body.
"""

from __future__ import annotations

from typing import Any, Protocol

from twisted.internet.defer import Deferred, fail
from twisted.internet.interfaces import IConsumer, IPushProducer
from twisted.web.iweb import UNKNOWN_LENGTH, IBodyProducer
from zope.interface import implementer

from llmproxy.errors import ProxyError

_AHEAD = 65536
"""Bytes that may lie here before the provider is connected; then the client is not read from."""


class Reading(Protocol):
    """The client's connection, as an upload sees it."""

    def pause_upload(self) -> None:
        """Read no more for now; the body's deadline stands still."""

    def resume_upload(self) -> None:
        """Read on."""

    def invite_upload(self) -> None:
        """Let a client that waits for it send the body (RFC 9110, section 10.1.1)."""


@implementer(IBodyProducer, IPushProducer)
class Upload:
    """One body that streams upwards.

    Args:
        reading: where it comes from.
        length: bytes, or None where only its end shows it.

    Attributes:
        length: bytes, or ``UNKNOWN_LENGTH``; ``announced`` is 0 then.
        complete: the client has sent all of it.
        begun: some of it may have gone to a provider, so that no other one can have it.
    """

    def __init__(self, reading: Reading, length: int | None) -> None:
        self.length: Any = UNKNOWN_LENGTH if length is None else length
        self.announced = length or 0
        self.complete = False
        self.begun = False
        self._reading = reading
        self._consumer: IConsumer | None = None
        self._ahead: list[bytes] = []
        self._ahead_bytes = 0
        self._stopped = False
        self._error: ProxyError | None = None
        self._done: Deferred[None] = Deferred(lambda _: self.stopProducing())

    # -- from the client ------------------------------------------------------------------------

    def feed(self, data: bytes) -> None:
        """Take one piece of the body."""
        if self._stopped:
            return
        if self._consumer is not None:
            self._consumer.write(data)
            return
        self._ahead.append(data)
        self._ahead_bytes += len(data)
        if self._ahead_bytes >= _AHEAD:
            self._reading.pause_upload()

    def end(self) -> None:
        """The body is whole."""
        self.complete = True
        if self._consumer is not None and not self._stopped:
            self._finish()

    def fail(self, error: ProxyError) -> None:
        """The body will not be whole: the request that carries it fails with ``error``."""
        if not self._stopped:
            self._error = error
            if self._stop() is not None:
                self._done.errback(error)

    # -- from the provider's side ---------------------------------------------------------------

    def startProducing(self, consumer: IConsumer) -> Deferred[None]:
        """Write the body to ``consumer`` as it comes.

        Returns:
            fires when the last piece was written.  It fails with ``ProxyError`` where the client's
            body is refused on the way.  Cancelling it stops the upload.
        """
        if self._error is not None:
            return fail(self._error)
        self.begun = True
        self._consumer = consumer
        consumer.registerProducer(self, True)
        ahead, self._ahead = self._ahead, []
        for piece in ahead:
            consumer.write(piece)
        done = self._done
        if self.complete:
            self._finish()
        else:
            self._reading.invite_upload()
            self._reading.resume_upload()
        return done

    def pauseProducing(self) -> None:
        """The provider takes no more for now."""
        if not self._stopped:
            self._reading.pause_upload()

    def resumeProducing(self) -> None:
        """The provider takes bytes again."""
        if not self._stopped:
            self._reading.resume_upload()

    def stopProducing(self) -> None:
        """The provider wants no more; what still comes is dropped."""
        if not self._stopped:
            self._stop()

    def _finish(self) -> None:
        self._stop()
        self._done.callback(None)

    def _stop(self) -> IConsumer | None:
        self._stopped = True
        self._ahead = []
        consumer, self._consumer = self._consumer, None
        if consumer is not None:
            consumer.unregisterProducer()
        self._reading.resume_upload()
        return consumer
