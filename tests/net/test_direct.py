"""What both direct transports promise, TCP and TLS: what is sent, what waits, and how they end."""

from __future__ import annotations

import random
import socket
from select import EPOLLERR, EPOLLIN, EPOLLOUT, poll

import pytest
import pytest_twisted
from twisted.internet.error import ConnectionAborted, ConnectionDone, ConnectionLost
from twisted.internet.interfaces import IHalfCloseableProtocol
from zope.interface import implementer

from tests.net.conftest import OpenTcp, OpenTls, fill, reasons
from tests.support.ends import CountedCalls, End, Pull, Push
from tests.support.fake_transport import turn, until

Open = OpenTcp | OpenTls


@pytest_twisted.ensureDeferred
async def test_start_tls_is_refused(direct: Open) -> None:
    """A caller that would begin TLS gets an error, and the connection goes on as it was."""
    async with direct.handshake_done() as peer:
        with pytest.raises(RuntimeError, match="startTLS"):
            peer.held.transport.startTLS(None)
        peer.held.transport.write(b"as before")
        assert await peer.hear(9) == b"as before"


# -- what is sent ---------------------------------------------------------------------------


@pytest_twisted.ensureDeferred
async def test_each_write_is_at_the_peer_before_the_reactor_turns(direct: Open) -> None:
    """A write that the kernel takes is sent at once, without a call of the reactor."""
    async with direct.handshake_done() as peer:
        counted = CountedCalls(peer.held.transport)
        for pieces in ([b"one"], [b"two"], [b"a", b"b", b""], [b""], []):
            peer.heard = b""
            if len(pieces) == 1:
                peer.held.transport.write(pieces[0])
            else:
                peer.held.transport.writeSequence(pieces)
            peer.listen()
            assert peer.heard == b"".join(pieces)
        assert counted.names == []


@pytest_twisted.ensureDeferred
async def test_what_the_kernel_does_not_take_waits_in_order(direct: Open) -> None:
    """Behind a slow reader bytes queue in order; behind the queue a write is direct again."""
    async with direct.handshake_done(small=True) as peer:
        transport = peer.held.transport
        counted = CountedCalls(transport)
        sent = fill(peer)
        assert counted.count("addWriter") >= 1
        for index in range(300):
            piece = random.Random(index).randbytes(index * 7 % 1999)
            sent += piece
            transport.write(piece) if index % 3 else transport.writeSequence([piece])
            peer.listen(1500)
            if index % 20 == 0:
                await turn()
        assert await peer.hear(len(sent)) == sent
        await until(lambda: not transport.dataBuffer)
        counted.names.clear()
        transport.write(b"again at once")
        peer.listen()
        assert peer.heard == sent + b"again at once"
        assert counted.names == []


@pytest_twisted.ensureDeferred
@pytest.mark.parametrize(("small", "size"), [(False, 12_000_000), (True, 500_000)])
async def test_a_write_that_is_taken_in_part_is_sent_once(
    direct: Open, small: bool, size: int
) -> None:
    """The rest of a large write waits, and no byte of it is sent twice."""
    content = random.Random(size).randbytes(size)
    async with direct.handshake_done(small=small) as peer:
        peer.held.transport.write(content)
        waiting = peer.held.transport._tempDataLen
        assert waiting if small else 0 < waiting < size
        assert await peer.hear(size) == content
        await until(lambda: not peer.held.transport.dataBuffer)
        peer.listen()
        assert len(peer.heard) == size


@pytest_twisted.ensureDeferred
async def test_a_push_producer_is_paused_while_much_waits(direct: Open) -> None:
    """Past the size of the buffer it pauses, and resumes when the kernel has everything."""
    async with direct.handshake_done(small=True) as peer:
        producer, size = Push(), 6
        transport = peer.held.transport
        transport.registerProducer(producer, True)
        transport.write(b"little")
        assert producer.told == []
        while not producer.told:
            transport.write(bytes(10_000))
            size += 10_000
        assert transport._tempDataLen > transport.bufferSize
        await peer.hear(size)
        await until(lambda: len(producer.told) > 1)
        assert producer.told == ["pause", "resume"]
        transport.unregisterProducer()


@pytest_twisted.ensureDeferred
@pytest.mark.parametrize("small", [False, True], ids=["free", "full"])
async def test_a_pull_producer_is_called_until_it_has_nothing(small: bool, direct: Open) -> None:
    """It is called again after each piece, also if the piece was sent at once."""
    pieces = [random.Random(index).randbytes(3000) for index in range(50)]
    async with direct.handshake_done(small=small) as peer:
        producer = Pull(peer.held.transport, pieces)
        peer.held.transport.registerProducer(producer, False)
        assert await peer.hear(150_000) == b"".join(pieces)
        await until(lambda: peer.held.transport.producer is None)
        assert producer.asked == 51


# -- what is received -----------------------------------------------------------------------


@pytest_twisted.ensureDeferred
async def test_bytes_wait_while_reading_is_paused(direct: Open) -> None:
    """Everything arrives in order; while reading is paused, nothing does."""
    async with direct.handshake_done() as peer:
        end = peer.held.end
        end.on_data = lambda end: end.transport.pauseProducing() if len(end.pieces) == 1 else None
        await peer.held.send(peer.records(b"first"))
        await until(lambda: end.pieces)
        await peer.held.send(peer.records(b"second"))
        await turn()
        assert end.pieces == [b"first"]
        peer.held.transport.resumeProducing()
        await until(lambda: end.received == b"firstsecond")


@pytest_twisted.ensureDeferred
async def test_a_read_that_finds_nothing_changes_nothing(direct: Open) -> None:
    """An event without bytes is no end."""
    async with direct.handshake_done() as peer:
        assert peer.held.transport.doRead() is None
        assert peer.held.end.pieces == []


# -- the end --------------------------------------------------------------------------------


@pytest_twisted.ensureDeferred
@pytest.mark.parametrize("full", [False, True], ids=["nothing waits", "much waits"])
async def test_an_abort_sends_nothing_more(direct: Open, full: bool) -> None:
    """The peer gets a reset, without close_notify, so that the content does not look whole."""
    async with direct.handshake_done(small=full) as peer:
        sent = fill(peer) if full else b""
        peer.held.transport.abortConnection()
        peer.held.transport.write(b"too late")
        assert peer.held.end.lost == []
        await until(lambda: peer.held.end.lost)
        assert reasons(peer.held.end) == [ConnectionAborted]
        assert await peer.hear_end() == "reset"
        assert not peer.got_close_notify
        assert len(peer.heard) < len(sent) if full else not peer.heard
        peer.held.transport.write(b"too late")


@pytest_twisted.ensureDeferred
@pytest.mark.parametrize("full", [False, True], ids=["nothing waits", "much waits"])
@pytest.mark.parametrize("closes", [False, True], ids=["content", "close_notify"])
async def test_an_abort_out_of_a_read_touches_the_socket_no_more(
    direct: Open, closes: bool, full: bool
) -> None:
    """By the next write, the descriptor may be that of another connection."""
    async with direct.handshake_done(small=full) as peer:
        reused: list[socket.socket] = []

        def leave(end: End) -> None:
            peer.held.transport.abortConnection()
            reused.extend(socket.socketpair())

        peer.held.end.on_data = leave
        transport = peer.held.transport
        if full:
            fill(peer)
        out = peer.records(b"read")
        peer.held.sock.send(out + (peer.end_record() if closes else b""))
        transport.reactor._doReadOrWrite(transport, transport.fileno(), EPOLLIN | EPOLLOUT)
        transport.write(b"too late")
        for one in reused:
            one.setblocking(False)
            with pytest.raises(BlockingIOError):
                one.recv(1)
        await until(lambda: peer.held.end.lost)
        assert reasons(peer.held.end) == [ConnectionAborted]
        for one in reused:
            one.close()


@pytest_twisted.ensureDeferred
@pytest.mark.parametrize("how", ["shutdown", "reset"])
async def test_a_failed_send_is_not_reported_out_of_the_write(direct: Open, how: str) -> None:
    """The reactor reports the loss in its next turn, once."""
    async with direct.handshake_done() as peer:
        peer.held.transport.pauseProducing()
        if how == "reset":
            peer.held.reset()
        else:
            peer.held.transport.socket.shutdown(socket.SHUT_WR)  # each send is EPIPE from here on
        for _ in range(3):
            peer.held.transport.write(b"broken")
            peer.held.transport.writeSequence([b"broken"])
            assert peer.held.end.lost == []
        await until(lambda: peer.held.end.lost)
        assert reasons(peer.held.end) == [ConnectionLost]


@pytest_twisted.ensureDeferred
@pytest.mark.parametrize("how", ["fin", "reset"])
async def test_the_end_of_the_peer_comes_behind_its_bytes(how: str, direct: Open) -> None:
    """A reset is a loss; a FIN is an end on TCP, and a loss on TLS without close_notify."""
    async with direct.handshake_done() as peer:
        peer.held.sock.send(peer.records(b"last"))
        await until(lambda: peer.held.end.received == b"last")
        peer.held.reset() if how == "reset" else peer.held.sock.shutdown(socket.SHUT_WR)
        await until(lambda: peer.held.end.lost)
        clean = how == "fin" and isinstance(direct, OpenTcp)
        assert reasons(peer.held.end) == [ConnectionDone if clean else ConnectionLost]


@pytest_twisted.ensureDeferred
async def test_a_reset_that_is_reported_without_an_end_is_a_loss(direct: Open) -> None:
    """The kernel notes the error a moment before the end; Twisted takes that for a FIN."""
    for end in (End(), HalfCloseable()):
        async with direct.handshake_done(end) as peer:
            transport = peer.held.transport
            peer.held.reset()
            seen = poll()
            seen.register(transport.fileno(), 0)
            assert seen.poll(5000)
            transport.reactor._doReadOrWrite(transport, transport.fileno(), EPOLLERR)
            assert reasons(end) == [ConnectionLost]
            assert getattr(end, "halves", []) == []


@implementer(IHalfCloseableProtocol)
class HalfCloseable(End):
    """Keeps which halves have ended."""

    def __init__(self) -> None:
        super().__init__()
        self.halves: list[str] = []

    def readConnectionLost(self) -> None:
        self.halves.append("read")

    def writeConnectionLost(self) -> None:
        self.halves.append("write")


@pytest_twisted.ensureDeferred
@pytest.mark.parametrize("full", [False, True], ids=["nothing waits", "much waits"])
async def test_each_half_closes_alone(direct: Open, full: bool) -> None:
    """What is written before the end of our half is sent, and nothing after; the other goes on."""
    end = HalfCloseable()
    async with direct.handshake_done(end, small=full) as peer:
        sent = fill(peer) if full else b""
        peer.held.transport.loseWriteConnection()
        assert await peer.hear_end() == "fin"
        assert peer.heard == sent
        peer.held.transport.write(b"too late")
        await peer.held.send(peer.records(b"still heard"))
        await until(lambda: end.received == b"still heard")
        assert end.halves == ["write"]
        await peer.held.send(peer.end_record())
        peer.held.sock.shutdown(socket.SHUT_WR)
        await until(lambda: "read" in end.halves)
        assert end.lost == []
        peer.held.transport.loseConnection()
