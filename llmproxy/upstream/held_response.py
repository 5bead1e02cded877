"""A refusal that is kept while another provider is asked: it may be the last response there is.

Its body is read at once, up to :data:`MOST_HELD` and one read more.  Mostly that is all of it, and
the connection goes back to its pool.  If there is more, the connection stands still, and is closed
with the response that is not wanted any more.
"""

from __future__ import annotations

from typing import Any

from twisted.internet.interfaces import IPushProducer
from twisted.internet.protocol import Protocol, connectionDone
from twisted.python.failure import Failure
from zope.interface import implementer

from llmproxy.upstream.response import Response

MOST_HELD = 64 * 1024


@implementer(IPushProducer)
class HeldResponse(Protocol):
    """A response whose body waits here until somebody asks for it.

    Args:
        response: nobody has asked for its body yet.

    Attributes:
        code, fields, first: as in :class:`Response`.
        held: bytes of the body that wait here.
    """

    def __init__(self, response: Response) -> None:
        self.code, self.fields, self.first = response.code, response.fields, response.first
        self.held = 0
        self._response = response
        self._pieces: list[bytes] = []
        self._consumer: Any = None
        self._reading: Any = None
        self._end: Failure | None = None
        response.deliverBody(self)

    @property
    def is_kept(self) -> bool:
        """As in :class:`Response`."""
        return self._response.is_kept

    def take_whole(self) -> None:
        """Return None: the body is delivered."""

    def abort(self) -> None:
        """Close the connection, where the response has not ended; drop what is held."""
        self._pieces.clear()
        self.held = 0
        self._response.abort()

    def deliverBody(self, protocol: Any) -> None:
        """Do as :meth:`Response.deliverBody`; what is held comes first."""
        self._consumer = protocol
        protocol.makeConnection(self)
        pieces, self._pieces, self.held = self._pieces, [], 0
        for piece in pieces:
            protocol.dataReceived(piece)
        if self._end is not None:
            protocol.connectionLost(self._end)
        else:
            self.resumeProducing()

    # -- from the provider ----------------------------------------------------------------------

    def makeConnection(self, transport: Any) -> None:
        """Read from here."""
        self._reading = transport

    def dataReceived(self, data: bytes) -> None:
        """Keep one piece, or forward it."""
        if self._consumer is not None:
            self._consumer.dataReceived(data)
            return
        self._pieces.append(data)
        self.held += len(data)
        if self.held >= MOST_HELD:
            self.pauseProducing()

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        """The body has ended; the connection may be another request's from here on."""
        self._reading, self._end = None, reason
        if self._consumer is not None:
            self._consumer.connectionLost(reason)

    # -- from the client ------------------------------------------------------------------------

    def pauseProducing(self) -> None:
        """Read no more for now."""
        if self._reading is not None:
            self._reading.pauseProducing()

    def resumeProducing(self) -> None:
        """Read on."""
        if self._reading is not None:
            self._reading.resumeProducing()

    def stopProducing(self) -> None:
        """Nobody wants it."""
        self.abort()
