"""A client's socket in the hands of another protocol, as behind CONNECT and a 101.

A request hands it over (``Request.hand_over``).  From then on no HTTP is read or written on the
connection: bytes go both ways between the socket and the protocol, which sees a
:class:`ClientSocket` as its transport.  The connection still belongs to its site, which counts it
and may drop it.  What the protocol does with the bytes is not known here.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Protocol, runtime_checkable

from twisted.internet.interfaces import (
    IConsumer,
    IHalfCloseableProtocol,
    IProtocol,
    IPushProducer,
    ITCPTransport,
)
from twisted.python.failure import Failure
from zope.interface import implementer

from llmproxy.net.transport import raw_transport


@runtime_checkable
class Drainable(Protocol):
    """A protocol that can end in an orderly way when the process shuts down; others are dropped."""

    def end_soon(self) -> None:
        """End as soon as nothing runs that is worth waiting for."""

    def end_now(self) -> bool:
        """End now, within about a second; return False where that is under way already."""


@implementer(ITCPTransport, IConsumer, IPushProducer)
class ClientSocket:
    """The transport of a protocol that was given a client's socket.

    Bytes that came before the socket was handed over are delivered first.  While the protocol
    pauses, nothing is delivered.  There is no deadline, neither for silence nor for a client that
    takes nothing; a protocol that wants some keeps them itself.  Only a connection that is closed
    must be through with it in the time that any other has.

    Args:
        connection: the client's connection.
        protocol: gets what the client sends, and the end of the connection once.
        early: what the client has sent so far.

    Attributes:
        transport: what is below (``net/transport.py`` looks there for what waits).
        disconnecting: the protocol has closed or aborted it.
        has_ended_writing: the protocol has ended our side.
    """

    __slots__ = (
        *("_connection", "_early", "_is_paused", "_protocol", "disconnecting"),
        *("has_ended_writing", "transport"),
    )

    def __init__(self, connection: Any, protocol: IProtocol, early: bytes) -> None:
        self._connection = connection
        self._protocol: IProtocol | None = protocol
        self._early = early
        self._is_paused = False
        self.transport = connection.transport
        self.disconnecting = self.has_ended_writing = False

    # -- from the connection ----------------------------------------------------------------------

    def begin(self) -> None:
        """Connect the protocol, and deliver what came before."""
        if self._protocol is not None:
            self._protocol.makeConnection(self)
        self._deliver()

    def feed(self, data: bytes) -> None:
        """Take what the client sends, split at any point."""
        if self._protocol is None or self.disconnecting:
            return
        if self._is_paused:
            self._early += data  # of a read that was under way: below, nothing is read any more
        else:
            self._protocol.dataReceived(data)

    def end(self, reason: Failure) -> None:
        """The connection is over: report that to the protocol, once."""
        protocol, self._protocol = self._protocol, None
        self._early = b""
        self.disconnecting = True
        if protocol is not None:
            protocol.connectionLost(reason)

    def drain(self) -> None:
        """The process shuts down."""
        protocol: Any = self._protocol
        if isinstance(protocol, Drainable):
            protocol.end_soon()

    def cut(self) -> bool:
        """The time for that is over; return whether the protocol ends by itself."""
        protocol: Any = self._protocol
        return isinstance(protocol, Drainable) and protocol.end_now()

    def end_reading(self) -> bool:
        """The client sends no more; return whether the protocol goes on with one side."""
        half_closeable: Any = IHalfCloseableProtocol(self._protocol, None)
        if half_closeable is not None:
            half_closeable.readConnectionLost()
        return half_closeable is not None

    def end_writing(self) -> None:
        """Our side is ended."""
        half_closeable: Any = IHalfCloseableProtocol(self._protocol, None)
        if half_closeable is not None:
            half_closeable.writeConnectionLost()

    def _deliver(self) -> None:
        if self._early and not self._is_paused:
            early, self._early = self._early, b""
            self.feed(early)

    # -- out --------------------------------------------------------------------------------------

    def write(self, data: bytes) -> None:
        """Send bytes to the client."""
        self._connection.write(data)

    def writeSequence(self, data: Iterable[bytes]) -> None:
        """Send pieces together."""
        self._connection.writeSequence(data)

    def registerProducer(self, producer: Any, streaming: bool) -> None:
        """Pause and resume ``producer`` as the client takes bytes, and stop it at the end."""
        self.transport.registerProducer(producer, streaming)

    def unregisterProducer(self) -> None:
        """The producer is done."""
        self.transport.unregisterProducer()

    # -- in ---------------------------------------------------------------------------------------

    def pauseProducing(self) -> None:
        """Read no more for now."""
        self._is_paused = True
        if not self.disconnecting:
            self.transport.pauseProducing()

    def resumeProducing(self) -> None:
        """Read on."""
        self._is_paused = False
        self._deliver()
        if not self._is_paused and not self.disconnecting:
            self.transport.resumeProducing()

    def stopProducing(self) -> None:
        """Read no more for ever: close the connection."""
        self.loseConnection()

    # -- the end ----------------------------------------------------------------------------------

    def loseConnection(self) -> None:
        """Send what was written, then close; a client that takes nothing is dropped.

        A producer that is still registered is let go of.
        """
        if not self.disconnecting:
            self.disconnecting = True
            self._connection.loseConnection()

    def loseWriteConnection(self) -> None:
        """End our side after what was written; where that cannot be, as in Twisted's TLS, close."""
        if self.transport is raw_transport(self.transport):
            self.has_ended_writing = True
            self.transport.loseWriteConnection()
        else:
            self.loseConnection()

    def abortConnection(self) -> None:
        """Drop the connection at once, with all that it still holds."""
        self.disconnecting = True
        self._connection.abort()

    # -- the socket -------------------------------------------------------------------------------

    def getPeer(self) -> Any:
        """Return the client's address; behind a balancer, what that said."""
        return self._connection.peer

    def getHost(self) -> Any:
        """Return ours, as the client reached it."""
        return self.transport.getHost()

    def getTcpNoDelay(self) -> bool:
        """Return whether small writes leave at once."""
        return bool(self.transport.getTcpNoDelay())

    def setTcpNoDelay(self, enabled: bool) -> None:
        """Let small writes leave at once, or wait."""
        self.transport.setTcpNoDelay(enabled)

    def getTcpKeepAlive(self) -> bool:
        """Return whether the kernel probes a silent connection."""
        return bool(self.transport.getTcpKeepAlive())

    def setTcpKeepAlive(self, enabled: bool) -> None:
        """Let the kernel probe a silent connection, or not."""
        self.transport.setTcpKeepAlive(enabled)
