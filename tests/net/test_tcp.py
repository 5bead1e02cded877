"""TCP that sends at once: what the peer sees, what waits, and how it ends.

Those tests fail, too, when the private names change on which ``net/tcp.py`` leans.
"""

from __future__ import annotations

import random
import socket
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from select import EPOLLIN, EPOLLOUT
from typing import Any

import pytest
import pytest_twisted
from twisted.internet import tcp
from twisted.internet.abstract import FileDescriptor
from twisted.internet.error import ConnectionAborted, ConnectionDone, ConnectionLost
from twisted.internet.interfaces import IHalfCloseableProtocol
from zope.interface import implementer

from llmproxy.net.tcp import DirectClient, DirectConnector, DirectServer
from tests.support.ends import CountedCalls, End, Pull, Push, TwoEnds, held_client, held_server
from tests.support.fake_transport import turn, until

Open = Callable[..., AbstractAsyncContextManager[TwoEnds]]


def _server(end: End | None = None, *, small: bool = False) -> AbstractAsyncContextManager[TwoEnds]:
    return held_server(DirectServer, end, small=small)


def _client(end: End | None = None, *, small: bool = False) -> AbstractAsyncContextManager[TwoEnds]:
    return held_client(DirectConnector, end, small=small)


@pytest.fixture(params=[_server, _client], ids=["server", "client"])
def open_end(request: Any) -> Open:
    """Our end in either role."""
    made: Open = request.param
    return made


def _fill(held: TwoEnds) -> bytes:
    """Write until something waits; return what was written."""
    written = b""
    while not held.transport._tempDataLen:
        piece = random.Random(len(written)).randbytes(5000)
        held.transport.write(piece)
        written += piece
    return written


@pytest_twisted.ensureDeferred
async def test_tls_is_not_begun_in_the_clear(open_end: Open) -> None:
    """A caller that would begin TLS is refused, and the connection goes on as it was."""
    async with open_end() as held:
        with pytest.raises(RuntimeError, match="startTLS"):
            held.transport.startTLS(None)
        held.transport.write(b"as before")
        assert held.pull() == b"as before"


# -- what is sent ---------------------------------------------------------------------------


@pytest_twisted.ensureDeferred
async def test_each_write_is_at_the_peer_before_the_reactor_turns(open_end: Open) -> None:
    """A write that the kernel takes is one send, and costs no call of the reactor's."""
    async with open_end() as held:
        counted = CountedCalls(held.transport)
        for word in (b"one", b"two", b"three"):
            held.transport.write(word)
            assert held.pull() == word
        held.transport.writeSequence([b"a", b"b", b""])
        assert held.pull() == b"ab"
        held.transport.write(b"")
        held.transport.writeSequence([])
        assert held.pull() == b""
        assert counted.names == []


@pytest_twisted.ensureDeferred
async def test_what_the_kernel_does_not_take_waits_in_order(open_end: Open) -> None:
    """Behind a slow reader everything queues, and each byte comes in its place."""
    async with open_end(small=True) as held:
        counted = CountedCalls(held.transport)
        sent = _fill(held)
        assert counted.count("addWriter") >= 1
        for index in range(300):
            piece = random.Random(index).randbytes(index * 7 % 1999)
            sent += piece
            held.transport.write(piece) if index % 3 else held.transport.writeSequence([piece])
            held.pull(1500)
            if index % 20 == 0:
                await turn()
        assert await held.pull_all(len(sent)) == sent
        await until(lambda: not held.transport.dataBuffer)
        counted.names.clear()
        held.transport.write(b"again at once")
        assert held.pull() == b"again at once"
        assert counted.names == []


@pytest_twisted.ensureDeferred
async def test_what_comes_while_something_waits_is_joined(open_end: Open) -> None:
    """Behind a full kernel writes are not sent one by one."""
    async with open_end(small=True) as held:
        sent = _fill(held)
        sends: list[int] = []
        inner = held.transport.writeSomeData

        def count(data: bytes) -> Any:
            sends.append(len(data))
            return inner(data)

        held.transport.writeSomeData = count
        for _ in range(1000):
            held.transport.write(b"x")
        assert await held.pull_all(len(sent) + 1000) == sent + b"x" * 1000
        assert len(sends) < 100


@pytest_twisted.ensureDeferred
async def test_whoever_asks_is_told_when_the_kernel_has_everything(open_end: Open) -> None:
    """Not before the last queued byte is taken, and once."""
    async with open_end(small=True) as held:
        told: list[bool] = []
        sent = _fill(held)
        held.transport.drained = lambda: told.append(
            bool(held.transport._tempDataLen or held.transport.dataBuffer)
        )
        for _ in range(5):
            await turn()
        assert told == []
        assert await held.pull_all(len(sent)) == sent
        await until(lambda: bool(told))
        held.transport.write(b"more")
        await turn()
        assert told == [False]


@pytest_twisted.ensureDeferred
async def test_a_push_producer_is_paused_while_much_waits(open_end: Open) -> None:
    """Past the buffer's size it is paused, and resumed when everything is with the kernel."""
    async with open_end(small=True) as held:
        producer = Push()
        held.transport.registerProducer(producer, True)
        held.transport.write(b"little")
        assert producer.told == []
        size = 6
        while not producer.told:
            held.transport.write(bytes(10_000))
            size += 10_000
        assert producer.told == ["pause"]
        assert held.transport._tempDataLen > held.transport.bufferSize
        await held.pull_all(size)
        await until(lambda: len(producer.told) > 1)
        assert producer.told == ["pause", "resume"]
        held.transport.unregisterProducer()


@pytest_twisted.ensureDeferred
@pytest.mark.parametrize("small", [False, True], ids=["free", "full"])
async def test_a_pull_producer_is_asked_until_it_has_nothing(small: bool, open_end: Open) -> None:
    """It is asked again after each piece, also when that was sent at once."""
    pieces = [random.Random(index).randbytes(3000) for index in range(50)]
    async with open_end(small=small) as held:
        producer = Pull(held.transport, pieces)
        held.transport.registerProducer(producer, False)
        assert await held.pull_all(150_000) == b"".join(pieces)
        await until(lambda: held.transport.producer is None)
        assert producer.asked == 51


# -- what is received -----------------------------------------------------------------------


@pytest_twisted.ensureDeferred
async def test_what_comes_is_handed_on_and_may_be_paused(open_end: Open) -> None:
    """Everything arrives in order; while reading is paused, nothing does."""
    end = End()
    end.on_data = lambda end: end.transport.pauseProducing() if len(end.pieces) == 1 else None  # type: ignore[union-attr]  # it is connected
    async with open_end(end) as held:
        await held.send(b"first")
        await until(lambda: end.pieces)
        await held.send(b"second")
        await turn()
        assert end.pieces == [b"first"]
        held.transport.resumeProducing()
        await until(lambda: end.received == b"firstsecond")


@pytest_twisted.ensureDeferred
async def test_a_read_that_finds_nothing_changes_nothing(open_end: Open) -> None:
    """An event that was for something else is no end."""
    async with open_end() as held:
        assert held.transport.doRead() is None
        assert held.end.pieces == []


# -- the end --------------------------------------------------------------------------------


@pytest_twisted.ensureDeferred
@pytest.mark.parametrize("small", [False, True], ids=["sent", "waiting"])
async def test_a_closed_connection_ends_when_all_is_sent(small: bool, open_end: Open) -> None:
    """What waits is sent first; the end is a FIN and comes once."""
    async with open_end(small=small) as held:
        sent = _fill(held) if small else b"all"
        if not small:
            held.transport.write(sent)
        held.transport.loseConnection()
        assert await held.wait_over() == "fin"
        assert held.received == sent
        await until(lambda: held.end.lost)
        assert isinstance(held.end.lost[0], ConnectionDone)
        held.transport.write(b"too late")
        held.transport.writeSequence([b"too late"])
        held.transport.loseConnection()
        held.transport.abortConnection()


@pytest_twisted.ensureDeferred
async def test_a_write_behind_a_close_is_sent_before_the_end(open_end: Open) -> None:
    """As with Twisted's own: the connection ends in the next turn, not in the call."""
    async with open_end() as held:
        held.transport.loseConnection()
        held.transport.write(b"last")
        assert await held.wait_over() == "fin"
        assert held.received == b"last"


@pytest_twisted.ensureDeferred
async def test_an_abort_drops_what_waits(open_end: Open) -> None:
    """The peer gets a reset, and nothing that is written afterwards."""
    async with open_end(small=True) as held:
        sent = _fill(held)
        held.transport.abortConnection()
        held.transport.write(b"too late")
        assert held.end.lost == []
        await until(lambda: held.end.lost)
        assert isinstance(held.end.lost[0], ConnectionAborted)
        assert await held.wait_over() == "reset"
        assert len(held.received) < len(sent)
        held.transport.write(b"too late")


@pytest_twisted.ensureDeferred
async def test_an_abort_out_of_a_read_leaves_nothing_to_the_write_of_the_same_event(
    open_end: Open,
) -> None:
    """Epoll may tell of both at once; the descriptor may be another connection's by then."""
    async with open_end(small=True) as held:
        reused: list[socket.socket] = []

        def leave(end: End) -> None:
            held.transport.abortConnection()
            reused.extend(socket.socketpair())

        held.end.on_data = leave
        transport = held.transport
        _fill(held)
        await held.send(b"read")
        both = EPOLLIN | EPOLLOUT
        fd = transport.fileno()
        transport.reactor._doReadOrWrite(transport, fd, both)
        for one in reused:
            one.setblocking(False)
            with pytest.raises(BlockingIOError):
                one.recv(1)
        await until(lambda: held.end.lost)
        assert [type(error) for error in held.end.lost] == [ConnectionAborted]
        for one in reused:
            one.close()


@pytest_twisted.ensureDeferred
async def test_nothing_is_sent_behind_an_abort_while_nothing_waits(open_end: Open) -> None:
    """Between the abort and the end the socket is still open; a write must not use it."""
    async with open_end() as held:
        held.transport.abortConnection()
        held.transport.write(b"too late")
        assert held.pull() == b""
        await until(lambda: held.end.lost)
        assert held.received == b""


@pytest_twisted.ensureDeferred
async def test_a_peers_reset_is_found_in_a_write_and_told_once_later(open_end: Open) -> None:
    """The protocol hears of it from the reactor, never out of its own call."""
    async with open_end() as held:
        held.transport.pauseProducing()
        held.reset()
        await turn()
        for _ in range(5):
            if held.end.lost:
                break
            held.transport.write(b"x" * 1000)
            held.transport.writeSequence([b"x"])
        lost_in_write = list(held.end.lost)
        await until(lambda: held.end.lost)
        assert len(held.end.lost) == 1
        assert isinstance(held.end.lost[0], ConnectionLost)
        assert len(lost_in_write) <= 1


@pytest_twisted.ensureDeferred
async def test_a_broken_send_does_not_end_inside_the_write(open_end: Open) -> None:
    """An error of send is the reactor's to report, in its next turn."""
    async with open_end() as held:
        held.transport.socket.shutdown(socket.SHUT_WR)  # each send is EPIPE from here on
        held.transport.pauseProducing()
        for _ in range(3):
            held.transport.write(b"broken")
            assert held.end.lost == []
        await until(lambda: held.end.lost)
        assert [type(error) for error in held.end.lost] == [ConnectionLost]


@pytest_twisted.ensureDeferred
@pytest.mark.parametrize("how", ["fin", "reset"])
async def test_the_peers_end_comes_behind_its_bytes(how: str, open_end: Open) -> None:
    """A FIN is an end, a reset a loss."""
    async with open_end() as held:
        await held.send(b"last")
        await until(lambda: held.end.received == b"last")
        held.reset() if how == "reset" else held.sock.shutdown(socket.SHUT_WR)
        await until(lambda: held.end.lost)
        expected = ConnectionLost if how == "reset" else ConnectionDone
        assert [type(error) for error in held.end.lost] == [expected]


@implementer(IHalfCloseableProtocol)
class Half(End):
    """Keeps its other half."""

    def __init__(self) -> None:
        super().__init__()
        self.halves: list[str] = []

    def readConnectionLost(self) -> None:
        self.halves.append("read")

    def writeConnectionLost(self) -> None:
        self.halves.append("write")


@pytest_twisted.ensureDeferred
async def test_each_half_closes_alone(open_end: Open) -> None:
    """What is written before our half ends is sent; the other half goes on."""
    end = Half()
    async with open_end(end, small=True) as held:
        sent = _fill(held)
        held.transport.loseWriteConnection()
        assert await held.wait_over() == "fin"
        assert held.received == sent
        held.transport.write(b"too late")
        await held.send(b"still heard")
        await until(lambda: end.received == b"still heard")
        assert end.halves == ["write"]
        held.sock.shutdown(socket.SHUT_WR)
        await until(lambda: "read" in end.halves)
        assert end.lost == []
        held.transport.loseConnection()


@pytest_twisted.ensureDeferred
async def test_a_half_that_ended_is_not_written_to_while_nothing_waits(open_end: Open) -> None:
    """A write behind a half close is dropped without harm."""
    async with open_end(Half()) as held:
        held.transport.loseWriteConnection()
        assert await held.wait_over() == "fin"
        held.transport.write(b"too late")
        await turn()
        assert held.end.lost == []


# -- Twisted's private names ----------------------------------------------------------------


@pytest_twisted.ensureDeferred
async def test_the_queue_is_where_it_is_looked_for(open_end: Open) -> None:
    """Twisted's own write queues in ``_tempDataBuffer``, and its doWrite moves that."""
    async with open_end() as held:
        transport = held.transport
        assert (transport._tempDataBuffer, transport._tempDataLen) == ([], 0)
        assert (transport.dataBuffer, transport.offset) == (b"", 0)
        FileDescriptor.write(transport, b"queued")
        assert (transport._tempDataBuffer, transport._tempDataLen) == ([b"queued"], 6)
        transport.writeSomeData = lambda data: 2
        FileDescriptor.doWrite(transport)
        assert (transport._tempDataLen, transport.dataBuffer, transport.offset) == (0, b"queued", 2)
        del transport.writeSomeData
        assert await held.pull_all(4) == b"eued"
        await until(lambda: transport.dataBuffer == b"")


@pytest_twisted.ensureDeferred
async def test_the_marks_of_an_end_are_where_they_are_looked_for(open_end: Open) -> None:
    """Twisted sets ``_aborting`` in an abort, and ``_writeDisconnected`` after a half close."""
    async with open_end(Half()) as held:
        assert (held.transport._aborting, held.transport._writeDisconnected) == (False, False)
        held.transport.loseWriteConnection()
        assert await held.wait_over() == "fin"
        assert held.transport._writeDisconnected is True
        held.transport.abortConnection()
        assert held.transport._aborting is True


def test_the_transports_are_made_where_twisted_makes_its_own() -> None:
    """The hooks are Twisted's, and so are the transports' bases."""
    assert tcp.Port.transport is tcp.Server
    assert callable(tcp.Connector._makeTransport)
    assert issubclass(DirectServer, tcp.Server)
    assert issubclass(DirectClient, tcp.Client)


@pytest_twisted.ensureDeferred
async def test_each_role_gets_its_transport() -> None:
    """Both hooks have their effect."""
    async with _server() as held:
        assert type(held.transport) is DirectServer
    async with _client() as held:
        assert type(held.transport) is DirectClient
