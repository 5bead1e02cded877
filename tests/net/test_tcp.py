"""Direct TCP: what it does not share with TLS, and the private names on which ``net/tcp.py`` leans.

The tests of the names fail when Twisted changes them.
"""

from __future__ import annotations

import os
import socket
from typing import Any

import pytest
import pytest_twisted
from twisted.internet import tcp as twisted_tcp
from twisted.internet.abstract import FileDescriptor
from twisted.internet.defer import CancelledError
from twisted.internet.error import (
    ConnectError,
    ConnectionDone,
    ConnectionLost,
    ConnectionRefusedError,
)
from twisted.internet.protocol import Protocol
from twisted.internet.testing import MemoryReactor
from twisted.python.failure import Failure

from llmproxy.net.tcp import DirectClient, DirectServer
from llmproxy.net.transport import has_input
from tests.net.conftest import OpenTcp, fill, reasons
from tests.net.test_direct import HalfCloseable
from tests.support.ends import reactor
from tests.support.fake_transport import turn, until

# -- what is sent ---------------------------------------------------------------------------


@pytest_twisted.ensureDeferred
async def test_writes_behind_a_queue_are_joined(tcp: OpenTcp) -> None:
    """Writes behind a full kernel are sent together."""
    async with tcp.handshake_done(small=True) as peer:
        sent = fill(peer)
        sends: list[int] = []
        inner = peer.held.transport.writeSomeData

        def count(data: bytes) -> Any:
            sends.append(len(data))
            return inner(data)

        peer.held.transport.writeSomeData = count
        for _ in range(1000):
            peer.held.transport.write(b"x")
        assert await peer.hear(len(sent) + 1000) == sent + b"x" * 1000
        assert len(sends) < 100


@pytest_twisted.ensureDeferred
async def test_drained_is_called_when_the_kernel_has_everything(tcp: OpenTcp) -> None:
    """It is called once, and not before the kernel has taken the last queued byte."""
    async with tcp.handshake_done(small=True) as peer:
        transport, waiting = peer.held.transport, list[bool]()
        sent = fill(peer)
        transport.drained = lambda: waiting.append(
            bool(transport._tempDataLen or transport.dataBuffer)
        )
        for _ in range(5):
            await turn()
        assert waiting == []
        assert await peer.hear(len(sent)) == sent
        await until(lambda: waiting)
        sent += fill(peer)
        assert await peer.hear(len(sent)) == sent
        await until(lambda: not transport.dataBuffer)
        assert waiting == [False]


# -- the end --------------------------------------------------------------------------------


@pytest_twisted.ensureDeferred
@pytest.mark.parametrize("small", [False, True], ids=["sent", "waiting"])
async def test_a_closed_connection_ends_when_all_is_sent(small: bool, tcp: OpenTcp) -> None:
    """The queue is sent first; the end is a FIN, and is reported once."""
    async with tcp.handshake_done(small=small) as peer:
        sent = fill(peer) if small else b"all"
        if not small:
            peer.held.transport.write(sent)
        peer.held.transport.loseConnection()
        assert await peer.hear_end() == "fin"
        assert peer.heard == sent
        await until(lambda: peer.held.end.lost)
        assert reasons(peer.held.end) == [ConnectionDone]
        peer.held.transport.write(b"too late")
        peer.held.transport.writeSequence([b"too late"])
        peer.held.transport.loseConnection()
        peer.held.transport.abortConnection()


@pytest_twisted.ensureDeferred
async def test_an_end_behind_which_nothing_waits_leaves_at_once(tcp: OpenTcp) -> None:
    """It is at the peer before the reactor turns, and leaves once."""
    end = HalfCloseable()
    async with tcp.handshake_done(end) as peer:
        peer.held.transport.write(b"all")
        peer.held.transport.loseWriteConnection()
        assert (peer.held.pull(), peer.held.over) == (b"all", "fin")
        peer.held.transport.loseWriteConnection()
        peer.held.transport.write(b"too late")
        for _ in range(3):
            await turn()
        assert (end.halves, end.lost) == (["write"], [])


@pytest_twisted.ensureDeferred
async def test_an_end_waits_for_what_is_pulled(tcp: OpenTcp) -> None:
    """A producer that was not asked yet is asked first, and the end is behind what it has."""
    async with tcp.handshake_done(HalfCloseable()) as peer:
        transport = peer.held.transport

        class Rest:
            def resumeProducing(self) -> None:
                transport.write(b"rest")
                transport.unregisterProducer()

        transport._is_pulled, transport.producer = True, Rest()
        transport.loseWriteConnection()
        assert await peer.hear_end() == "fin"
        assert peer.heard == b"rest"


@pytest_twisted.ensureDeferred
async def test_a_write_behind_a_close_is_sent_before_the_end(tcp: OpenTcp) -> None:
    """As on Twisted's transport, the connection ends in the next turn and not in the call."""
    async with tcp.handshake_done() as peer:
        peer.held.transport.loseConnection()
        peer.held.transport.write(b"last")
        assert await peer.hear_end() == "fin"
        assert peer.heard == b"last"


# -- Twisted's private names ----------------------------------------------------------------


@pytest_twisted.ensureDeferred
async def test_the_queue_has_its_private_names(tcp: OpenTcp) -> None:
    """Twisted's ``write`` queues in ``_tempDataBuffer``, and its ``doWrite`` moves that."""
    async with tcp.handshake_done() as peer:
        transport = peer.held.transport
        assert (transport._tempDataBuffer, transport._tempDataLen) == ([], 0)
        assert (transport.dataBuffer, transport.offset) == (b"", 0)
        FileDescriptor.write(transport, b"queued")
        assert (transport._tempDataBuffer, transport._tempDataLen) == ([b"queued"], 6)
        transport.writeSomeData = lambda data: 2
        FileDescriptor.doWrite(transport)
        assert (transport._tempDataLen, transport.dataBuffer, transport.offset) == (0, b"queued", 2)
        del transport.writeSomeData
        assert await peer.hear(4) == b"eued"
        await until(lambda: transport.dataBuffer == b"")


@pytest_twisted.ensureDeferred
async def test_the_marks_of_an_end_have_their_private_names(tcp: OpenTcp) -> None:
    """Twisted sets ``_aborting`` in an abort, and ``_writeDisconnected`` after a half close."""
    async with tcp.handshake_done(HalfCloseable()) as peer:
        assert (peer.held.transport._aborting, peer.held.transport._writeDisconnected) == (
            False,
            False,
        )
        peer.held.transport.loseWriteConnection()
        assert await peer.hear_end() == "fin"
        assert peer.held.transport._writeDisconnected is True
        peer.held.transport.abortConnection()
        assert peer.held.transport._aborting is True


def test_an_accepted_connection_has_what_twisteds_has() -> None:
    """It begins with every attribute that Twisted sets, but for its texts for logs."""
    for address in ("192.0.2.1", 1), ("2001:db8::1", 1, 0, 0):
        ours, theirs = (_accepted(make, address) for make in (DirectServer, twisted_tcp.Server))
        names = set(vars(theirs)) - {"logstr", "repstr", "hostname"}
        slots = {"socket", "protocol"}
        assert names <= set(vars(ours)) | slots
        for name in names - {"socket", "protocol", "fileno"}:
            assert getattr(ours, name) == getattr(theirs, name), name
        assert ours.getPeer() == theirs.getPeer()


def _accepted(make: Any, address: Any) -> Any:
    with socket.socket() as handle:
        memory = MemoryReactor()
        transport = make(handle, None, address, None, 3, memory)
        assert memory.getReaders() == [transport]
        assert handle.gettimeout() == 0.0
    transport.reactor = None  # each has its own
    return transport


@pytest_twisted.ensureDeferred
@pytest.mark.parametrize("is_server", [True, False], ids=["accepted", "made"])
async def test_a_connection_ends_as_twisteds_does(is_server: bool) -> None:
    """It lets go of socket and protocol, the reactor of it, and it still has a text for logs."""
    async with OpenTcp(is_server).handshake_done() as peer:
        transport, number = peer.held.transport, peer.held.transport.fileno()
        peer.held.sock.close()
        await until(lambda: peer.held.end.lost)
        assert [hasattr(transport, name) for name in ("socket", "protocol")] == [False, False]
        assert (transport.connected, transport.disconnected, transport.fileno()) == (0, 1, -1)
        assert transport not in reactor.getReaders() + reactor.getWriters()
        with pytest.raises(OSError, match="descriptor"):
            os.fstat(number)
        assert isinstance(transport.logPrefix(), str)
        assert transport.logPrefix() in repr(transport) or not is_server
        transport.connectionLost(Failure(ConnectionLost()))
        assert reasons(peer.held.end) == [ConnectionDone]


class CountingReactor:
    """The reactor; keeps how it is told of a transport."""

    def __init__(self) -> None:
        self.told: list[str] = []

    def __getattr__(self, name: str) -> Any:
        if name in ("addReader", "addWriter", "removeReader", "removeWriter"):
            self.told.append(name)
        return getattr(reactor, name)


@pytest_twisted.ensureDeferred
@pytest.mark.parametrize("listens", [True, False], ids=["made", "refused"])
async def test_the_reactor_is_told_of_a_connection_in_few_steps(listens: bool) -> None:
    """It is told when an attempt waits for the kernel, and then of the connection alone."""
    counting, made, lost = CountingReactor(), list[Any](), list[Any]()
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        if listens:
            listener.listen()
        connecting = DirectClient(counting, Protocol).connect(
            socket.AF_INET, *listener.getsockname()
        )
        connecting.addCallbacks(made.append, lambda failure: lost.append(failure.value))
        await until(lambda: made or lost)
    if listens:
        assert counting.told in (["addReader"], ["addWriter", "removeWriter", "addReader"])
        made[0].transport.abortConnection()
        await until(lambda: made[0].transport.disconnected)
    else:
        assert isinstance(lost[0], ConnectionRefusedError)
        assert counting.told in ([], ["addWriter", "removeWriter"])


@pytest_twisted.ensureDeferred
async def test_what_is_looked_at_is_read_in_the_same_turn(tcp: OpenTcp) -> None:
    """The first bytes are shown once, and then read, unless reading was stopped meanwhile."""
    async with tcp.handshake_done() as peer:
        transport, seen = peer.held.transport, list[bytes]()
        transport.peek(seen.append)
        transport.stopReading()
        peer.held.sock.send(b"0123456789")
        while not has_input(transport.socket):
            pass
        transport.doRead()
        assert (seen, peer.held.end.received) == ([b"01234567"], b"")
        transport.startReading()
        transport.peek(seen.append)
        transport.doRead()
        assert (seen, peer.held.end.received) == ([b"01234567"] * 2, b"0123456789")
        transport.peek(lambda _: transport.abortConnection())
        peer.held.sock.send(b"more")
        await until(lambda: peer.held.end.lost)
        assert peer.held.end.received == b"0123456789"


def test_the_transports_are_made_where_twisted_makes_its_own() -> None:
    """The hooks are Twisted's, and so are the transports' bases."""
    assert twisted_tcp.Port.transport is twisted_tcp.Server
    assert issubclass(DirectServer, twisted_tcp.Server)
    assert issubclass(DirectClient, twisted_tcp.Client)


@pytest_twisted.ensureDeferred
async def test_each_role_gets_its_transport() -> None:
    """Both hooks work."""
    async with OpenTcp(True).handshake_done() as peer:
        assert type(peer.held.transport) is DirectServer
    async with OpenTcp(False).handshake_done() as peer:
        assert type(peer.held.transport) is DirectClient


# -- an attempt -----------------------------------------------------------------------------


@pytest_twisted.ensureDeferred
async def test_an_attempt_that_is_given_up_leaves_nothing() -> None:
    """The socket is closed, the reactor knows nothing of it, and no protocol is made."""
    with socket.socket() as full:
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        with socket.create_connection(full.getsockname()):  # there is no room for another one
            attempt = DirectClient(reactor, lambda: pytest.fail("nothing is connected"))
            connecting = attempt.connect(socket.AF_INET, *full.getsockname())
            assert attempt in reactor.getWriters()
            handle = attempt.socket
            connecting.cancel()
            with pytest.raises(CancelledError):
                await connecting
    assert handle.fileno() == -1
    assert attempt not in reactor.getWriters() + reactor.getReaders()
    attempt.connectionLost(Failure(ConnectionLost()))  # as when the reactor ends; nothing is told


@pytest_twisted.ensureDeferred
@pytest.mark.parametrize(
    ("family", "host", "error"),
    [
        (socket.AF_INET, "127.0.0.1", ConnectionRefusedError),
        (socket.AF_INET6, "::1", ConnectionRefusedError),
        (socket.AF_INET6, "127.0.0.1", OSError),
        (socket.AF_INET, "255.255.255.255", ConnectError),
        (12345, "127.0.0.1", OSError),
    ],
)
async def test_an_attempt_that_fails_says_why(
    family: int, host: str, error: type[Exception]
) -> None:
    """Whether the address is none, the kernel knows no way, or nobody listens."""
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
        attempt = DirectClient(reactor, lambda: pytest.fail("nothing is connected"))
        with pytest.raises(error):
            await attempt.connect(family, host, port)
    assert attempt not in reactor.getWriters() + reactor.getReaders()


@pytest_twisted.ensureDeferred
async def test_an_attempt_ends_with_the_reactor() -> None:
    """The reactor drops what it waits for, which is reported."""
    with socket.socket() as full:
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        with socket.create_connection(full.getsockname()):
            attempt = DirectClient(reactor, lambda: pytest.fail("nothing is connected"))
            connecting = attempt.connect(socket.AF_INET, *full.getsockname())
            reactor.removeWriter(attempt)
            attempt.connectionLost(Failure(ConnectionLost()))
            with pytest.raises(ConnectError):
                await connecting
