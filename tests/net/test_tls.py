"""TLS on the socket: what both ends hear, and what of the handshake and of the end shows."""

from __future__ import annotations

import os
import random
import shutil
import socket
import subprocess
from contextlib import suppress
from functools import partial
from pathlib import Path
from select import EPOLLIN, EPOLLOUT
from typing import Any

import pytest
import pytest_twisted
from OpenSSL import SSL
from twisted.internet.error import ConnectionAborted, ConnectionDone, ConnectionLost
from twisted.internet.interfaces import IHalfCloseableProtocol
from twisted.internet.protocol import ClientFactory
from zope.interface import directlyProvides

from llmproxy.net.tls import TlsConnector, TlsServer
from tests.net.conftest import Open
from tests.support.ends import CountedCalls, End, Pull, Push, listening, reactor
from tests.support.fake_transport import turn, until
from tests.support.tls_peer import Contexts, TlsPeer

BULK = random.Random(7).randbytes(3_000_000)


def _fill(peer: TlsPeer) -> bytes:
    """Write until something waits; return what was written."""
    written = b""
    while not peer.held.transport._tempDataLen:
        piece = random.Random(len(written)).randbytes(5000)
        peer.held.transport.write(piece)
        written += piece
    return written


@pytest_twisted.ensureDeferred
async def test_tls_is_not_begun_within_tls(tls: Open) -> None:
    """A caller that would begin TLS is refused, and the connection goes on as it was."""
    async with tls.handshake_done() as peer:
        with pytest.raises(RuntimeError, match="startTLS"):
            peer.held.transport.startTLS(None)
        peer.held.transport.write(b"as before")
        assert await peer.hear(9) == b"as before"


# -- the handshake --------------------------------------------------------------------------


@pytest_twisted.ensureDeferred
@pytest.mark.parametrize("engine", ["ssl", "pyOpenSSL"])
async def test_a_handshake_is_reported_once_and_both_ends_hear(tls: Open, engine: str) -> None:
    """With either library at the other end, in either role."""
    async with tls.handshake_done(engine=engine) as peer:
        end = peer.held.end
        assert end.handshake_done == 1
        assert peer.held.transport.handshake_done is True
        peer.held.transport.write(b"to the peer")
        assert await peer.hear(11) == b"to the peer"
        peer.held.sock.send(peer.records(b"to us"))
        await until(lambda: end.received == b"to us")
        assert end.handshake_done == 1


@pytest_twisted.ensureDeferred
async def test_what_is_written_before_the_handshake_waits_and_keeps_its_order(tls: Open) -> None:
    """It goes first, however it was written, and nothing of it goes before the handshake."""
    end = End()
    end.on_made = lambda end: [end.transport.write(b"1"), end.transport.writeSequence([b"2", b"3"])]  # type: ignore[union-attr]  # it is connected
    end.on_shaken = lambda end: end.transport.write(b"5")  # type: ignore[union-attr]  # it is connected
    async with tls.raw(end) as held:
        held.transport.write(b"4" * 40_000)
        await turn()
        assert held.transport._tempDataLen == 40_003
        peer = tls.peer(held)
        await peer.shake()
        assert await peer.hear(40_004) == b"123" + b"4" * 40_000 + b"5"
        assert end.handshake_done == 1


@pytest_twisted.ensureDeferred
async def test_a_waiting_handshake_with_bytes_queued_costs_nothing(tls: Open) -> None:
    """The socket would take bytes all the time; nobody may ask for that."""
    async with tls.raw() as held:
        await turn()
        held.transport.write(b"x" * 1000)
        calls: list[str] = []
        inner = held.transport.doWrite

        def count() -> Any:
            calls.append("doWrite")
            return inner()

        held.transport.doWrite = count
        for _ in range(30):
            await turn()
        assert len(calls) <= 2
        peer = tls.peer(held)
        await peer.shake()
        assert await peer.hear(1000) == b"x" * 1000


@pytest_twisted.ensureDeferred
async def test_a_producer_is_paused_by_what_waits_for_the_handshake(tls: Open) -> None:
    """Past the buffer's size; it is resumed when that is sent."""
    async with tls.raw() as held:
        producer = Push()
        held.transport.registerProducer(producer, True)
        held.transport.write(bytes(70_000))
        assert producer.told == ["pause"]
        peer = tls.peer(held)
        await peer.shake()
        await peer.hear(70_000)
        await until(lambda: producer.told == ["pause", "resume"])
        held.transport.unregisterProducer()


@pytest_twisted.ensureDeferred
async def test_a_handshake_cut_to_single_bytes_is_done(tls: Open) -> None:
    """Where TCP cuts it says nothing."""
    async with tls.raw() as held:
        peer = tls.peer(held)

        async def trickle() -> bool:
            peer.engine.feed(held.pull())
            done = peer.engine.shake()
            out = peer.engine.drain()
            for index in range(len(out)):
                held.sock.send(out[index : index + 1])
                if index % 50 == 0:
                    await turn()
            await turn()
            return done

        while not await trickle():
            pass
        held.transport.write(b"done")
        assert await peer.hear(4) == b"done"


@pytest_twisted.ensureDeferred
async def test_content_right_behind_the_handshake_is_heard(tls: Open) -> None:
    """In the segment of the peer's last flight, without another byte."""
    async with tls.raw() as held:
        peer = tls.peer(held)

        def handshake_done() -> bool:
            peer.engine.feed(held.pull())
            done = peer.engine.shake()
            if done:
                peer.engine.say(b"right behind")
                peer.engine.say(b", and more")
            peer.flush()
            return done

        await until(handshake_done)
        await until(lambda: held.end.received == b"right behind, and more")


@pytest_twisted.ensureDeferred
@pytest.mark.parametrize("garbage", [b"GET / HTTP/1.1\r\n\r\n", b"\0" * 100, b"\x16\x03\x01\xff"])
async def test_garbage_instead_of_a_handshake_is_an_error(tls: Open, garbage: bytes) -> None:
    """The reason says what OpenSSL thinks; or that the peer ended, where no record was whole."""
    async with tls.raw() as held:
        held.sock.send(garbage)
        held.sock.shutdown(socket.SHUT_WR)
        await until(lambda: held.end.lost)
        assert isinstance(held.end.lost[0], SSL.Error | ConnectionLost | ConnectionDone)
        assert held.end.handshake_done == 0


@pytest_twisted.ensureDeferred
@pytest.mark.parametrize("how", ["fin", "reset"])
async def test_a_peer_that_leaves_in_the_handshake_is_a_loss(tls: Open, how: str) -> None:
    """It never began, so it has no orderly end."""
    async with tls.raw() as held:
        await turn()
        held.transport.write(b"never sent")
        held.pull()
        held.reset() if how == "reset" else held.sock.shutdown(socket.SHUT_WR)
        await until(lambda: held.end.lost)
        assert [type(error) for error in held.end.lost] == [ConnectionLost]
        assert held.end.handshake_done == 0


@pytest_twisted.ensureDeferred
async def test_a_peer_that_is_not_trusted_is_an_error_of_tls(contexts: Contexts) -> None:
    """The client's reason is OpenSSL's, and nothing was sent to that peer."""
    ours = Open(contexts, False)
    ours.ours = contexts.openssl(False, trusted=False)
    async with ours.raw() as held:
        held.transport.write(b"secret")
        peer = ours.peer(held, "pyOpenSSL")
        with pytest.raises(SSL.Error, match="unknown ca"):
            await until(lambda: (peer._shaken() and peer.listen()) or held.over)
        await until(lambda: held.end.lost)
        assert isinstance(held.end.lost[0], SSL.Error)
        assert "certificate verify failed" in str(held.end.lost[0])
        assert held.end.handshake_done == 0
        assert peer.heard == b""


@pytest_twisted.ensureDeferred
async def test_a_close_before_the_handshake_drops_the_connection(tls: Open) -> None:
    """Where nothing waits there is nothing to shake hands for."""
    async with tls.raw() as held:
        await turn()
        held.transport.loseConnection()
        await until(lambda: held.end.lost)
        await held.wait_over()


@pytest_twisted.ensureDeferred
async def test_a_close_behind_bytes_that_wait_for_the_handshake_sends_them(tls: Open) -> None:
    """The handshake goes on, then they are sent, then the end comes in order."""
    async with tls.raw() as held:
        held.transport.write(b"first and last")
        held.transport.loseConnection()
        peer = tls.peer(held)
        await peer.shake()
        await until(lambda: peer.listen() or peer.farewell)
        assert peer.heard == b"first and last"
        held.sock.send(peer.end_record())
        await until(lambda: held.end.lost)
        assert isinstance(held.end.lost[0], ConnectionDone)


@pytest_twisted.ensureDeferred
async def test_a_half_close_before_the_handshake_is_done_after_it(tls: Open) -> None:
    """It is kept in mind until it can be said."""
    async with tls.raw() as held:
        await turn()
        held.transport.loseWriteConnection()
        await turn()
        peer = tls.peer(held)
        await peer.shake()
        assert await peer.hear_end() == "fin"
        assert peer.farewell
        held.sock.send(peer.records(b"still heard"))
        await until(lambda: held.end.received == b"still heard")


@pytest_twisted.ensureDeferred
@pytest.mark.parametrize("what", ["abortConnection", "loseConnection"])
async def test_the_handshakes_report_may_end_the_connection(tls: Open, what: str) -> None:
    """Whoever looks at the peer then may not like it."""
    end = End()
    end.on_shaken = lambda end: getattr(end.transport, what)()
    async with tls.raw(end) as held:
        peer = tls.peer(held)
        await peer.shake()
        assert await peer.hear_end() == ("reset" if what == "abortConnection" else "fin")
        assert peer.farewell is (what == "loseConnection")
        if what == "loseConnection":
            held.sock.send(peer.end_record())
        await until(lambda: end.lost)


@pytest_twisted.ensureDeferred
async def test_an_exception_of_the_report_ends_only_that_connection(
    tls: Open, logged_failures: Any
) -> None:
    """As any exception of a protocol's does; it is logged once."""
    end = End()
    end.on_shaken = lambda end: 1 / 0
    async with tls.raw(end) as held:
        peer = tls.peer(held)
        await peer.shake()
        await until(lambda: end.lost)
        assert isinstance(end.lost[0], ZeroDivisionError)
    assert logged_failures.report().count("ZeroDivisionError") == 1
    logged_failures.flush()


# -- content --------------------------------------------------------------------------------


@pytest_twisted.ensureDeferred
async def test_a_write_is_at_the_peer_before_the_reactor_turns(tls: Open) -> None:
    """One record, at once, and no call of the reactor's."""
    async with tls.handshake_done() as peer:
        counted = CountedCalls(peer.held.transport)
        for word in (b"one", b"two"):
            peer.heard = b""
            peer.held.transport.write(word)
            peer.listen()
            assert peer.heard == word
        peer.held.transport.write(b"")
        assert counted.names == []


@pytest_twisted.ensureDeferred
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("small", [False, True], ids=["free", "full"])
async def test_every_byte_comes_both_ways(tls: Open, seed: int, small: bool) -> None:
    """Whatever the sizes of the writes and of the reads, with records that do not fit."""
    chance = random.Random(seed)
    size = 60_000 if small else 3_000_000
    async with tls.handshake_done(small=small, engine=chance.choice(["ssl", "pyOpenSSL"])) as peer:
        end, ours, theirs, waiting = peer.held.end, 0, 0, b""
        full = 0

        def step() -> bool:
            nonlocal ours, theirs, waiting, full
            for _ in range(chance.randrange(8)):
                if ours < size and chance.random() < 0.7:
                    count = chance.choice([1, 100, 5000, 16384, 16385, 50_000])
                    piece = BULK[ours : min(size, ours + count)]
                    peer.held.transport.write(piece)
                    ours += len(piece)
                    full += bool(peer.held.transport._tempDataLen)
                if theirs < size and len(waiting) < 100_000:
                    count = chance.choice([1, 100, 5000, 16384, 40_000])
                    piece = BULK[theirs : min(size, theirs + count)]
                    waiting += peer.records(piece)
                    theirs += len(piece)
                try:
                    sent = peer.held.sock.send(waiting[: chance.choice([7, 1000, 100_000])])
                    waiting = waiting[sent:]
                except BlockingIOError:
                    pass
                if chance.random() < 0.6:
                    peer.listen(chance.choice([10, 3000, 100_000]))
            return len(peer.heard) >= size and len(end.received) >= size

        await until(step)
        assert peer.heard == BULK[:size]
        assert end.received == BULK[:size]
        assert full or not small


@pytest_twisted.ensureDeferred
async def test_one_large_write_comes_whole_behind_a_slow_reader(tls: Open) -> None:
    """More than the limit of one send, with a kernel that takes little at a time."""
    async with tls.handshake_done(small=True) as peer:
        peer.held.transport.write(BULK[:400_000])
        peer.held.transport.write(BULK[400_000:500_000])
        assert await peer.hear(500_000) == BULK[:500_000]
        await until(lambda: not peer.held.transport.dataBuffer)


@pytest_twisted.ensureDeferred
async def test_a_push_producer_is_paused_while_much_waits(tls: Open) -> None:
    """Past the buffer's size it is paused, and resumed when everything is with the kernel."""
    async with tls.handshake_done(small=True) as peer:
        producer, size = Push(), 0
        peer.held.transport.registerProducer(producer, True)
        while not producer.told:
            peer.held.transport.write(BULK[size : size + 10_000])
            size += 10_000
        assert await peer.hear(size) == BULK[:size]
        await until(lambda: producer.told == ["pause", "resume"])
        peer.held.transport.unregisterProducer()


@pytest_twisted.ensureDeferred
async def test_a_pull_producer_is_asked_until_it_has_nothing(tls: Open) -> None:
    """It is asked again after each piece, also when that was sent at once."""
    pieces = [BULK[start : start + 3000] for start in range(0, 90_000, 3000)]
    async with tls.handshake_done() as peer:
        peer.held.transport.registerProducer(Pull(peer.held.transport, pieces), False)
        assert await peer.hear(90_000) == BULK[:90_000]
        await until(lambda: peer.held.transport.producer is None)


@pytest_twisted.ensureDeferred
@pytest.mark.parametrize("sizes", [[1] * 40, [16384] * 12, [9000] * 9, [1, 16384, 1, 8192, 8191]])
async def test_records_that_share_a_segment_all_come(tls: Open, sizes: list[int]) -> None:
    """No further byte comes that could wake the reactor for what OpenSSL might hold."""
    async with tls.handshake_done() as peer:
        content = [bytes([index]) * size for index, size in enumerate(sizes)]
        peer.held.sock.send(peer.records(*content))
        await until(lambda: peer.held.end.received == b"".join(content))


@pytest_twisted.ensureDeferred
async def test_records_without_content_do_not_stop_what_follows(tls: Open) -> None:
    """Tickets and a cut record before the content, then nothing."""
    async with tls.handshake_done() as peer:
        out = peer.records(b"first", b"second")
        for index in range(len(out)):
            peer.held.sock.send(out[index : index + 1])
            await turn()
        await until(lambda: peer.held.end.received == b"firstsecond")


@pytest_twisted.ensureDeferred
async def test_a_paused_end_is_not_told_and_loses_nothing(tls: Open) -> None:
    """Paused out of ``dataReceived``, the rest comes when it is resumed, without a further byte."""
    async with tls.handshake_done() as peer:
        end = peer.held.end
        end.on_data = lambda end: end.transport.pauseProducing()
        peer.held.sock.send(peer.records(*[bytes([n]) * 16384 for n in range(6)]))
        await until(lambda: end.pieces)
        for _ in range(5):
            await turn()
        assert len(end.pieces) == 1
        rounds = 0
        while len(end.received) < 6 * 16384:
            rounds += 1  # a piece has come for each
            assert rounds < 20
            peer.held.transport.resumeProducing()
            await until(partial(lambda seen: len(end.pieces) > seen, rounds))
        assert end.received == b"".join(bytes([n]) * 16384 for n in range(6))


# -- the end --------------------------------------------------------------------------------


@pytest_twisted.ensureDeferred
@pytest.mark.parametrize("fin", [False, True], ids=["alone", "fin"])
@pytest.mark.parametrize("content", [b"", b"last words", bytes(70_000)])
async def test_a_peers_farewell_is_an_end_behind_its_content(
    tls: Open, content: bytes, fin: bool
) -> None:
    """In one segment with content, with or without a FIN: that, then the end; ours follows."""
    async with tls.handshake_done() as peer:
        out = (peer.records(content) if content else b"") + peer.end_record()
        assert peer.held.sock.send(out) == len(out)
        if fin:
            peer.held.sock.shutdown(socket.SHUT_WR)
        await until(lambda: peer.held.end.lost)
        assert peer.held.end.received == content
        assert [type(error) for error in peer.held.end.lost] == [ConnectionDone]
        assert await peer.hear_end() == "fin"
        assert peer.farewell


@pytest_twisted.ensureDeferred
async def test_a_peers_farewell_ends_also_what_waits(tls: Open) -> None:
    """A record that is half sent cannot be followed by ours; the connection ends all the same."""
    async with tls.handshake_done(small=True) as peer, tls.handshake_done() as other:
        _fill(peer)
        peer.held.sock.send(peer.records(b"last") + peer.end_record())
        await until(lambda: peer.held.end.lost)
        assert peer.held.end.received == b"last"
        assert [type(error) for error in peer.held.end.lost] == [ConnectionDone]
        other.held.transport.write(b"untouched")
        assert await other.hear(9) == b"untouched"
        assert other.held.transport.doRead() is None


@pytest_twisted.ensureDeferred
@pytest.mark.parametrize("how", ["fin", "reset"])
async def test_an_end_without_a_farewell_is_a_loss(tls: Open, how: str) -> None:
    """Whoever sits between could have made it; what came before is delivered."""
    async with tls.handshake_done() as peer:
        peer.held.sock.send(peer.records(b"before"))
        await until(lambda: peer.held.end.received == b"before")
        peer.held.reset() if how == "reset" else peer.held.sock.shutdown(socket.SHUT_WR)
        await until(lambda: peer.held.end.lost)
        assert [type(error) for error in peer.held.end.lost] == [ConnectionLost]


@pytest_twisted.ensureDeferred
@pytest.mark.parametrize("broken", ["cut", "forged"])
async def test_content_before_a_broken_record_comes_before_the_loss(tls: Open, broken: str) -> None:
    """Whole records in the same segment are told, then the end, and never a piece of the broken."""
    async with tls.handshake_done() as peer:
        good, bad = peer.records(bytes(16384)), bytearray(peer.records(b"bad" * 10))
        if broken == "forged":
            bad[-1] ^= 1
        peer.held.sock.send(good + bytes(bad if broken == "forged" else bad[:-1]))
        peer.held.sock.shutdown(socket.SHUT_WR)
        await until(lambda: peer.held.end.lost)
        assert peer.held.end.received == bytes(16384)
        assert [type(error) for error in peer.held.end.lost] == [ConnectionLost]


@pytest_twisted.ensureDeferred
@pytest.mark.parametrize("small", [False, True], ids=["sent", "waiting"])
async def test_our_end_sends_what_waits_and_its_farewell_and_awaits_the_peers(
    tls: Open, small: bool
) -> None:
    """close_notify and FIN behind the last byte; the connection ends with the peer's."""
    async with tls.handshake_done(small=small) as peer:
        sent = _fill(peer) if small else b"last"
        if not small:
            peer.held.transport.write(sent)
        peer.held.transport.loseConnection()
        assert await peer.hear_end() == "fin"
        assert peer.heard == sent
        assert peer.farewell
        assert peer.held.end.lost == []
        peer.held.transport.write(b"too late")
        peer.held.transport.loseConnection()
        for _ in range(5):
            await turn()
        assert peer.held.end.lost == []
        peer.held.sock.send(peer.records(b"not heard any more") + peer.end_record())
        await until(lambda: peer.held.end.lost)
        assert [type(error) for error in peer.held.end.lost] == [ConnectionDone]
        assert peer.held.end.received == b""


@pytest_twisted.ensureDeferred
@pytest.mark.parametrize("rest", range(0, 16384, 2042))
async def test_a_farewell_that_the_kernel_does_not_take_waits(
    contexts: Contexts, rest: int
) -> None:
    """Behind bytes that just filled the kernel the farewell comes all the same."""
    tls = Open(contexts, True)
    async with tls.handshake_done(small=True) as peer:
        transport = peer.held.transport
        size = 0
        while not transport._tempDataLen:
            transport.write(BULK[size : size + 1021])
            size += 1021
        transport.write(BULK[size : size + rest])
        size += rest
        transport.loseConnection()

        def little() -> bool:
            peer.listen(700)
            return peer.over is not None

        await until(little)
        assert peer.heard == BULK[:size]
        assert peer.farewell


@pytest_twisted.ensureDeferred
@pytest.mark.parametrize("how", ["fin", "reset"])
async def test_a_peer_without_a_farewell_ends_our_close(tls: Open, how: str) -> None:
    """Our end was said and nothing is lost by it; the connection is over in any case."""
    async with tls.handshake_done() as peer:
        peer.held.transport.loseConnection()
        await peer.hear_end()
        peer.held.reset() if how == "reset" else peer.held.sock.shutdown(socket.SHUT_WR)
        await until(lambda: peer.held.end.lost)
        assert len(peer.held.end.lost) == 1


@pytest_twisted.ensureDeferred
async def test_a_peers_farewell_is_not_answered_before_the_protocol_has_its_say(tls: Open) -> None:
    """Whoever aborts then must not have told the peer that the content was whole."""
    async with tls.handshake_done() as peer:
        end: Any = peer.held.end
        end.readConnectionLost = peer.held.transport.abortConnection
        end.writeConnectionLost = lambda: None
        directlyProvides(end, IHalfCloseableProtocol)
        peer.held.sock.send(peer.end_record())
        await until(lambda: end.lost)
        assert [type(error) for error in end.lost] == [ConnectionAborted]
        assert await peer.hear_end() == "reset"
        assert not peer.farewell


@pytest_twisted.ensureDeferred
async def test_an_abort_sends_neither_farewell_nor_fin(tls: Open) -> None:
    """The peer must know that the content is not whole."""
    async with tls.handshake_done(small=True) as peer:
        _fill(peer)
        peer.held.transport.abortConnection()
        peer.held.transport.write(b"too late")
        await until(lambda: peer.held.end.lost)
        assert [type(error) for error in peer.held.end.lost] == [ConnectionAborted]
        assert await peer.hear_end() == "reset"
        assert not peer.farewell


@pytest_twisted.ensureDeferred
@pytest.mark.parametrize("farewell", [False, True])
async def test_an_abort_out_of_a_read_touches_the_socket_no_more(tls: Open, farewell: bool) -> None:
    """OpenSSL knows the socket by its number, which may be another connection's by then."""
    async with tls.handshake_done(small=True) as peer:
        reused: list[socket.socket] = []

        def leave(end: End) -> None:
            peer.held.transport.abortConnection()
            reused.extend(socket.socketpair())

        peer.held.end.on_data = leave
        transport = peer.held.transport
        _fill(peer)
        out = peer.records(b"read")
        peer.held.sock.send(out + (peer.end_record() if farewell else b""))
        transport.reactor._doReadOrWrite(transport, transport.fileno(), EPOLLIN | EPOLLOUT)
        transport.write(b"too late")
        for one in reused:
            one.setblocking(False)
            with pytest.raises(BlockingIOError):
                one.recv(1)
        await until(lambda: peer.held.end.lost)
        assert [type(error) for error in peer.held.end.lost] == [ConnectionAborted]
        for one in reused:
            one.close()


@pytest_twisted.ensureDeferred
async def test_a_reset_is_never_told_out_of_a_write(tls: Open) -> None:
    """The reactor tells it, once."""
    async with tls.handshake_done() as peer:
        peer.held.transport.pauseProducing()
        peer.held.transport.socket.shutdown(socket.SHUT_WR)  # each send is EPIPE from here on
        for _ in range(3):
            peer.held.transport.write(b"broken")
            assert peer.held.end.lost == []
        await until(lambda: peer.held.end.lost)
        assert [type(error) for error in peer.held.end.lost] == [ConnectionLost]


@pytest_twisted.ensureDeferred
async def test_an_error_of_one_connection_is_not_found_by_another(tls: Open) -> None:
    """OpenSSL keeps its errors by thread; each must be taken out by whom it belongs to."""
    async with tls.handshake_done() as sane, tls.handshake_done() as broken:
        bad = bytearray(broken.records(b"bad"))
        bad[-1] ^= 1
        broken.held.sock.send(bytes(bad))
        await until(lambda: broken.held.end.lost)
        assert sane.held.transport.doRead() is None
        sane.held.transport.write(b"sane")
        assert await sane.hear(4) == b"sane"


# -- after the handshake --------------------------------------------------------------------


@pytest_twisted.ensureDeferred
async def test_a_renegotiation_is_refused(contexts: Contexts) -> None:
    """A client of TLS 1.2 that asks for one does not get it; TLS 1.3 has none."""
    tls = Open(contexts, True)
    async with tls.handshake_done(engine="pyOpenSSL") as peer:
        engine: Any = peer.engine
        if engine.tls.get_protocol_version_name() == "TLSv1.3":
            pytest.skip("TLS 1.3 has no renegotiation")
        assert engine.tls.renegotiate()
        assert engine.shake() is False
        peer.flush()
        done = []

        def refused() -> bool:
            peer.listen()
            done.append(engine.shake())
            return bool(peer.over)

        with suppress(SSL.Error):  # by an alert, or by the end of the connection
            await until(refused)
        assert not any(done)
        assert peer.held.end.handshake_done == 1
        assert peer.held.end.received == b""


@pytest_twisted.ensureDeferred
async def test_a_key_update_of_the_peers_is_answered(tmp_path: Path) -> None:
    """OpenSSL's own client asks for one in the middle of what it says; both ways go on."""
    program = shutil.which("openssl")
    if program is None:
        pytest.skip("needs the openssl program")
    tls, end = Open(Contexts("1.3", tmp_path), True), End()
    end.on_data = lambda end: end.transport.write(b"<" + end.pieces[-1].strip() + b">")  # type: ignore[union-attr]  # it is connected
    async with listening(partial(TlsServer, tls.on_socket), end) as port:
        client = subprocess.Popen(
            [program, "s_client", "-connect", f"127.0.0.1:{port}", "-tls1_3"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        with client:
            assert client.stdin is not None
            assert client.stdout is not None
            os.set_blocking(client.stdout.fileno(), False)
            said = b""

            def has_said(text: bytes) -> bool:
                nonlocal said
                said += client.stdout.read() or b""  # type: ignore[union-attr]  # it is a pipe
                return text in said

            for _ in range(2):
                client.stdin.write(b"before\n")
                client.stdin.flush()
                await until(lambda: has_said(b"<before>"))
                client.stdin.write(b"K\n")  # a line of its own is a command: update both keys
                client.stdin.flush()
                await until(lambda: has_said(b"KEYUPDATE"))
                said = b""
            client.stdin.write(b"behind\n")
            client.stdin.flush()
            await until(lambda: has_said(b"<behind>"))
            client.terminate()
        await until(lambda: end.lost)
    assert end.received == b"before\nbefore\nbehind\n"


@pytest_twisted.ensureDeferred
async def test_both_ends_may_be_ours(contexts: Contexts) -> None:
    """Bulk both ways, and an orderly end of both."""
    left, right = End(), End()
    server, client = Open(contexts, True), Open(contexts, False)
    factory = ClientFactory.forProtocol(lambda: right)
    factory.noisy = False
    async with listening(partial(TlsServer, server.on_socket), left) as port:
        TlsConnector(client.on_socket, "127.0.0.1", port, factory, 20, None, reactor).connect()
        await until(lambda: left.handshake_done and right.handshake_done)
        for one in (left, right):
            for start in range(0, len(BULK), 100_000):
                one.transport.write(BULK[start : start + 100_000])  # type: ignore[union-attr]  # it is connected
        await until(lambda: len(left.received) >= len(BULK) <= len(right.received))
        assert left.received == right.received == BULK
        left.transport.loseConnection()  # type: ignore[union-attr]  # it is connected
        await until(lambda: left.lost and right.lost)
    assert [type(error) for error in left.lost + right.lost] == [ConnectionDone] * 2
