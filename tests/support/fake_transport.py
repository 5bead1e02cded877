"""Stand-ins for parts of a reactor: a transport in memory, and a real one with a clock to turn.

The transport is Twisted's ``StringTransport`` with what that lacks of a TCP transport: the private
figures of ``FileDescriptor`` that ``net/transport.py`` reads, a half close, a producer that may be
unregistered twice, and an end that comes when the test says so.  Backpressure and kernels are not
pretended; they are tested on real sockets.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import Any

from twisted.internet import reactor as real_reactor
from twisted.internet.defer import Deferred
from twisted.internet.error import ConnectionAborted, ConnectionDone, ConnectionLost
from twisted.internet.interfaces import IProtocol, IPushProducer, ITCPTransport
from twisted.internet.protocol import Protocol, connectionDone
from twisted.internet.task import Clock, deferLater
from twisted.internet.testing import StringTransport, SynchronousResolver
from twisted.python.failure import Failure
from zope.interface import directlyProvides, implementer, providedBy

from tests.support.sockets import WAIT

FIN = ConnectionDone()
RESET = ConnectionLost()
ABORTED = ConnectionAborted()


@implementer(ITCPTransport, IPushProducer)
class FakeTransport(StringTransport):
    """One end of a connection whose other end is the test.

    Attributes:
        calls: what was asked of it, in order: ``pause``, ``resume``, ``nodelay``, ``half`` (a half
            close), ``close`` (of the socket), ``lose`` (a close behind what is queued) and
            ``abort``.
        writes: what was written, one item for each call.
        counts: it has how many bytes that was, as the transports of ``net/`` do.
    """

    producer: Any

    def __init__(self) -> None:
        super().__init__(lenient=True)
        self.calls: list[str] = []
        self.writes: list[bytes] = []
        self.counts = True
        self.dataBuffer = b""
        self.offset = 0
        self._tempDataLen = 0

    @property
    def written(self) -> int:
        """How many bytes were written; Twisted's own transports have no such attribute."""
        if not self.counts:
            raise AttributeError("written")
        return sum(map(len, self.writes))

    def connect(self, protocol: IProtocol) -> None:
        """Be the transport of ``protocol``."""
        self.protocol = protocol
        protocol.makeConnection(self)

    def end(self, reason: Exception) -> None:
        """End the connection as a TCP transport does: the producer is stopped first."""
        producer, self.producer = self.producer, None
        self.connected = False
        self.disconnected = True
        if producer is not None:
            producer.stopProducing()
        self.protocol.connectionLost(Failure(reason))

    def hold(self, size: int) -> None:
        """Hold so many bytes that the kernel does not take."""
        self.dataBuffer = bytes(size)

    def count(self, call: str) -> int:
        """Return how often ``call`` was asked for."""
        return self.calls.count(call)

    def is_paused(self) -> bool:
        """Tell whether reading is paused."""
        return self.producerState == "paused"

    def take(self) -> bytes:
        """Return what was written since the last time, and forget it."""
        written: bytes = self.value()
        self.clear()
        self.writes.clear()
        return written

    # -- what protocols call --------------------------------------------------------------------

    def write(self, data: bytes) -> None:
        if self.connected and not self.count("abort"):
            self.writes.append(data)
            super().write(data)

    def writeSequence(self, data: Iterable[bytes]) -> None:
        self.write(b"".join(data))

    def abortConnection(self) -> None:
        self.calls.append("abort")
        self.disconnecting = True

    def loseConnection(self) -> None:
        self.calls.append("lose")
        self.disconnecting = True

    def connectionLost(self, reason: Failure) -> None:
        """Close the socket, as the transports of Twisted let themselves be closed."""
        self.calls.append("close")

    def loseWriteConnection(self) -> None:
        self.calls.append("half")

    def getTcpNoDelay(self) -> bool:
        return bool(self.count("nodelay"))

    def getTcpKeepAlive(self) -> bool:
        return False

    def setTcpKeepAlive(self, enabled: bool) -> None:
        raise AssertionError("nobody asks for this")

    def setTcpNoDelay(self, enabled: bool) -> None:
        assert enabled
        self.calls.append("nodelay")

    def pauseProducing(self) -> None:
        self.calls.append("pause")
        super().pauseProducing()

    def resumeProducing(self) -> None:
        self.calls.append("resume")
        super().resumeProducing()

    def unregisterProducer(self) -> None:
        self.producer = None
        self.streaming = None


class Collector(Protocol):
    """Keeps a body and how it ended.

    Attributes:
        pieces: what ``dataReceived`` was called with.
        ends: the reasons of ``connectionLost``; more than one is a mistake of the caller's.
        ended: fires with this collector at the first of them.
    """

    def __init__(self) -> None:
        self.pieces: list[bytes] = []
        self.ends: list[Any] = []
        self.ended: Deferred[Collector] = Deferred()

    def dataReceived(self, data: bytes) -> None:
        self.pieces.append(data)

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        self.ends.append(reason.value)
        if len(self.ends) == 1:
            self.ended.callback(self)

    @property
    def body(self) -> bytes:
        """Everything that came."""
        return b"".join(self.pieces)


class TurnedReactor:
    """The real reactor and its sockets, but a clock that the test turns, and names on loopback."""

    def __init__(self) -> None:
        self.clock = Clock()
        self.seconds = self.clock.seconds
        self.nameResolver: Any = SynchronousResolver()
        directlyProvides(self, providedBy(real_reactor))

    def __getattr__(self, name: str) -> Any:
        return getattr(real_reactor, name)

    def callLater(self, delay: float, call: Any, *args: Any, **kwargs: Any) -> Any:
        """Call when the test has turned the clock; what is only for the next turn, in that."""
        later: Any = self.clock.callLater if delay else real_reactor.callLater
        return later(delay, call, *args, **kwargs)

    def timers(self) -> int:
        """Return how many timed calls live."""
        return len(self.clock.getDelayedCalls())


async def turn() -> None:
    """Let the reactor turn once, for at most a millisecond."""
    await deferLater(real_reactor, 0.001)


async def until(condition: Callable[[], Any]) -> None:
    """Let the reactor turn until ``condition`` holds."""
    deadline = time.monotonic() + WAIT
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError("the condition did not come to hold")
        await turn()
