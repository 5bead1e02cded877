"""One connection on loopback: our transport at one end, a socket that the test holds at the other.

The test's socket never blocks; what it does, it does between two turns of the reactor, so that the
order of events is the test's own.
"""

from __future__ import annotations

import contextlib
import socket
import struct
from collections.abc import AsyncIterator, Callable
from typing import Any

from twisted.internet import reactor as real_reactor
from twisted.internet.defer import maybeDeferred
from twisted.internet.interfaces import IHandshakeListener
from twisted.internet.protocol import Factory, Protocol, connectionDone
from twisted.python.failure import Failure
from zope.interface import implementer

from tests.support.fake_transport import until

reactor: Any = real_reactor

SMALL = 4096
"""Bytes of a kernel buffer that is soon full; the kernel doubles it, and has a least of its own."""


@implementer(IHandshakeListener)
class End(Protocol):
    """Our end's protocol: keeps what it is called with, and calls the test.

    Attributes:
        pieces: what ``dataReceived`` was called with.
        lost: the reasons of ``connectionLost``; more than one is a mistake of the transport's.
        shaken: how often the handshake was reported.
        on_made: called with this protocol when the connection is made; the same for the others.
    """

    def __init__(self) -> None:
        self.pieces: list[bytes] = []
        self.lost: list[Exception] = []
        self.handshake_done = 0
        self.on_made: Callable[[End], Any] = _nothing
        self.on_data: Callable[[End], Any] = _nothing
        self.on_handshake_done: Callable[[End], Any] = _nothing
        self.on_lost: Callable[[End], Any] = _nothing

    @property
    def received(self) -> bytes:
        """Everything that came."""
        return b"".join(self.pieces)

    def connectionMade(self) -> None:
        self.on_made(self)

    def handshakeCompleted(self) -> None:
        self.handshake_done += 1
        self.on_handshake_done(self)

    def dataReceived(self, data: bytes) -> None:
        self.pieces.append(data)
        self.on_data(self)

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        self.lost.append(reason.value)  # type: ignore[arg-type]  # a transport's reason is an Exception
        self.on_lost(self)


def _nothing(end: End) -> None:
    pass


class TwoEnds:
    """Both ends of one connection.

    Attributes:
        end: our end's protocol; its ``transport`` is what is tested.
        sock: the other end.
        calls: how often the transport asked for events of the reactor, by the reactor's method.
    """

    def __init__(self, end: End, sock: socket.socket) -> None:
        self.end = end
        self.sock = sock
        sock.setblocking(False)
        self.received = b""
        self.over: str | None = None

    @property
    def transport(self) -> Any:
        """What is tested."""
        return self.end.transport

    def pull(self, limit: int = 1 << 20) -> bytes:
        """Take what is there now; note in ``over`` how the connection ended."""
        taken = b""
        while self.over is None and len(taken) < limit:
            try:
                data = self.sock.recv(min(65536, limit - len(taken)))
            except BlockingIOError:
                break
            except ConnectionError:
                self.over = "reset"
                break
            if not data:
                self.over = "fin"
            taken += data
        self.received += taken
        return taken

    async def pull_all(self, size: int) -> bytes:
        """Take until ``size`` bytes have come; return everything."""
        await until(lambda: self.pull() is None or len(self.received) >= size or self.over)
        return self.received

    async def wait_over(self) -> str:
        """Take until the end; return ``"fin"`` or ``"reset"``."""
        await until(lambda: self.pull() is None or self.over)
        assert self.over is not None
        return self.over

    async def send(self, data: bytes) -> None:
        """Send everything, while the reactor turns."""
        view = memoryview(data)
        while view:
            with contextlib.suppress(BlockingIOError):
                view = view[self.sock.send(view) :]
                continue
            await until(lambda: True)

    def reset(self) -> None:
        """Close with a RST."""
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.sock.close()


@contextlib.asynccontextmanager
async def listening(make: Any, end: End) -> AsyncIterator[int]:
    """Listen for connections by ``make``, the class of a server's transport; yield the port."""
    factory = Factory.forProtocol(lambda: end)
    factory.noisy = False
    port = reactor.listenTCP(0, factory, interface="127.0.0.1")
    port.transport = make
    try:
        yield port.getHost().port
    finally:
        await maybeDeferred(port.stopListening)


@contextlib.asynccontextmanager
async def held_server(
    make: Any, end: End | None = None, *, small: bool = False
) -> AsyncIterator[TwoEnds]:
    """Accept one connection by ``make``, the class of a server's transport."""
    ours = end or End()
    async with listening(make, ours) as port:
        sock = _small(socket.socket(), small)
        sock.connect(("127.0.0.1", port))
        await until(lambda: ours.transport)
        if small:
            _small(ours.transport.socket, small)  # type: ignore[union-attr]  # just made
        ours.transport.setTcpNoDelay(True)  # type: ignore[union-attr]  # just made
        async with _until_lost(TwoEnds(ours, sock)) as held:
            yield held


@contextlib.asynccontextmanager
async def held_client(
    make: Any, end: End | None = None, *, small: bool = False
) -> AsyncIterator[TwoEnds]:
    """Connect by ``make``, the class of a transport that connects."""
    ours = end or End()
    with _small(socket.socket(), small) as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        address = listener.getsockname()
        make(reactor, lambda: ours).connect(socket.AF_INET, *address)
        await until(lambda: ours.transport)
        sock, _ = listener.accept()
        if small:
            _small(ours.transport.socket, small)  # type: ignore[union-attr]  # just made
        ours.transport.setTcpNoDelay(True)  # type: ignore[union-attr]  # just made
        async with _until_lost(TwoEnds(ours, sock)) as held:
            yield held


def _small(sock: socket.socket, small: bool) -> socket.socket:
    if small:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SMALL)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, SMALL)
    return sock


@contextlib.asynccontextmanager
async def _until_lost(held: TwoEnds) -> AsyncIterator[TwoEnds]:
    try:
        yield held
    finally:
        if not held.end.lost:
            held.transport.abortConnection()
        await until(lambda: held.end.lost)
        held.sock.close()
    assert len(held.end.lost) == 1


class CountedCalls:
    """The reactor's methods by which a transport asks for events, counted.

    Args:
        transport: whose calls are counted.
    """

    def __init__(self, transport: Any) -> None:
        self.names: list[str] = []
        self._reactor = transport.reactor
        transport.reactor = self

    def __getattr__(self, name: str) -> Any:
        self.names.append(name)
        return getattr(self._reactor, name)

    def count(self, name: str) -> int:
        """Return how often that method was asked for."""
        return self.names.count(name)


class Push:
    """A push producer that notes its calls."""

    def __init__(self) -> None:
        self.told: list[str] = []

    def pauseProducing(self) -> None:
        self.told.append("pause")

    def resumeProducing(self) -> None:
        self.told.append("resume")

    def stopProducing(self) -> None:
        self.told.append("stop")


class Pull:
    """A pull producer that writes its pieces, one each time that it is asked."""

    def __init__(self, transport: Any, pieces: list[bytes]) -> None:
        self.transport = transport
        self.pieces = list(pieces)
        self.asked = 0

    def resumeProducing(self) -> None:
        self.asked += 1
        if self.pieces:
            self.transport.write(self.pieces.pop(0))
        else:
            self.transport.unregisterProducer()

    def stopProducing(self) -> None:
        self.pieces = []
