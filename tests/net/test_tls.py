"""TLS on the socket: the handshake, content in records, and an orderly end.

What TLS shares with TCP stands in ``test_direct.py``.
"""

from __future__ import annotations

import os
import random
import shutil
import socket
import subprocess
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import pytest_twisted
from OpenSSL import SSL
from twisted.internet.error import ConnectionAborted, ConnectionDone, ConnectionLost
from twisted.internet.interfaces import IHalfCloseableProtocol
from zope.interface import directlyProvides

from llmproxy.net.tls import TlsServer
from tests.net.conftest import OpenTls, fill, reasons
from tests.support.ends import End, Push, listening, reactor
from tests.support.fake_transport import turn, until
from tests.support.tls_peer import Contexts

BULK = random.Random(7).randbytes(3_000_000)


# -- behind a plain connection --------------------------------------------------------------


@pytest_twisted.ensureDeferred
async def test_nobody_is_left_who_writes_in_the_clear(contexts: Contexts) -> None:
    """Whoever held the transport before holds one with TLS: what is written waits for that."""
    tls = OpenTls(contexts, "later")
    async with tls.raw() as held:
        assert tls.plain is held.transport
        tls.plain.write(b"1")
        peer = tls.peer(held)
        await peer.handshake()
        assert await peer.hear(1) == b"1"
        held.sock.send(peer.records(b"2"))
        await until(lambda: held.end.received == b"2")


@pytest_twisted.ensureDeferred
async def test_both_ends_keep_their_addresses_behind_a_plain_connection(contexts: Contexts) -> None:
    """They may be of IPv6."""
    tls, end = OpenTls(contexts, "later"), End()
    with socket.create_server(("::1", 0), family=socket.AF_INET6) as listener:
        port = listener.getsockname()[1]
        tls.later(reactor, lambda: end).connect(socket.AF_INET6, "::1", port)
        await until(lambda: end.transport)
        sock, _ = listener.accept()
        with sock:
            transport: Any = end.transport
            assert (transport.getPeer().host, transport.getPeer().port) == ("::1", port)
            assert transport.getHost().port == sock.getpeername()[1]
        await until(lambda: end.lost)


# -- the handshake --------------------------------------------------------------------------


@pytest_twisted.ensureDeferred
@pytest.mark.parametrize("engine", ["ssl", "pyOpenSSL"])
async def test_a_handshake_is_reported_once(tls: OpenTls, engine: str) -> None:
    """Either library may be the peer, in either role; then content goes both ways."""
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
async def test_what_is_written_before_the_handshake_waits_and_keeps_its_order(tls: OpenTls) -> None:
    """No content is sent before the handshake is done, and then it comes in order."""
    end = End()
    end.on_made = lambda end: [end.transport.write(b"1"), end.transport.writeSequence([b"2", b"3"])]  # type: ignore[union-attr]  # it is connected
    end.on_handshake_done = lambda end: end.transport.write(b"5")  # type: ignore[union-attr]  # it is connected
    async with tls.raw(end) as held:
        held.transport.write(b"4" * 40_000)
        await turn()
        assert held.transport._tempDataLen == 40_003
        peer = tls.peer(held)
        await peer.handshake()
        assert await peer.hear(40_004) == b"123" + b"4" * 40_000 + b"5"
        assert end.handshake_done == 1


@pytest_twisted.ensureDeferred
async def test_a_handshake_that_waits_for_the_peer_does_not_poll(tls: OpenTls) -> None:
    """The socket could always be written; the transport must not wait for that."""
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
        await peer.handshake()
        assert await peer.hear(1000) == b"x" * 1000


@pytest_twisted.ensureDeferred
async def test_a_producer_is_paused_by_what_waits_for_the_handshake(tls: OpenTls) -> None:
    """It pauses past the size of the buffer, and resumes when that is sent."""
    async with tls.raw() as held:
        producer = Push()
        held.transport.registerProducer(producer, True)
        held.transport.write(bytes(70_000))
        assert producer.told == ["pause"]
        peer = tls.peer(held)
        await peer.handshake()
        await peer.hear(70_000)
        await until(lambda: producer.told == ["pause", "resume"])
        held.transport.unregisterProducer()


@pytest_twisted.ensureDeferred
async def test_a_handshake_may_be_split_at_any_point(tls: OpenTls) -> None:
    """The handshake works byte by byte."""
    async with tls.raw() as held:
        peer = tls.peer(held)

        async def trickle() -> bool:
            peer.engine.feed(held.pull())
            done = peer.engine.handshake()
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
async def test_content_right_behind_the_handshake_is_received(tls: OpenTls) -> None:
    """It comes with the peer's last flight, and no further byte follows."""
    async with tls.raw() as held:
        peer = tls.peer(held)

        def handshake_done() -> bool:
            peer.engine.feed(held.pull())
            done = peer.engine.handshake()
            if done:
                peer.engine.say(b"right behind")
                peer.engine.say(b", and more")
            peer.flush()
            return done

        await until(handshake_done)
        await until(lambda: held.end.received == b"right behind, and more")


@pytest_twisted.ensureDeferred
@pytest.mark.parametrize("garbage", [b"GET / HTTP/1.1\r\n\r\n", b"\0" * 100, b"\x16\x03\x01\xff"])
async def test_bytes_that_are_no_handshake_are_an_error(tls: OpenTls, garbage: bytes) -> None:
    """The reason is OpenSSL's; where no record was whole, it is the peer's end."""
    async with tls.raw() as held:
        held.sock.send(garbage)
        held.sock.shutdown(socket.SHUT_WR)
        await until(lambda: held.end.lost)
        assert isinstance(held.end.lost[0], SSL.Error | ConnectionLost | ConnectionDone)
        assert held.end.handshake_done == 0


@pytest_twisted.ensureDeferred
@pytest.mark.parametrize("how", ["fin", "reset"])
async def test_a_peer_that_leaves_in_the_handshake_is_a_loss(tls: OpenTls, how: str) -> None:
    """A connection that never began has no orderly end."""
    async with tls.raw() as held:
        await turn()
        held.transport.write(b"never sent")
        held.pull()
        held.reset() if how == "reset" else held.sock.shutdown(socket.SHUT_WR)
        await until(lambda: held.end.lost)
        assert reasons(held.end) == [ConnectionLost]
        assert held.end.handshake_done == 0


@pytest_twisted.ensureDeferred
async def test_a_peer_that_is_not_trusted_is_an_error_of_tls(contexts: Contexts) -> None:
    """The client's reason is OpenSSL's, and that peer gets no content."""
    ours = OpenTls(contexts, "client")
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
async def test_a_close_before_the_handshake_drops_the_connection(tls: OpenTls) -> None:
    """If no bytes wait, the handshake has no purpose."""
    async with tls.raw() as held:
        await turn()
        held.transport.loseConnection()
        await until(lambda: held.end.lost)
        await held.wait_over()


@pytest_twisted.ensureDeferred
async def test_a_close_behind_bytes_that_wait_for_the_handshake_sends_them(tls: OpenTls) -> None:
    """The handshake is done, then the bytes are sent, then comes an orderly end."""
    async with tls.raw() as held:
        held.transport.write(b"first and last")
        held.transport.loseConnection()
        peer = tls.peer(held)
        await peer.handshake()
        await until(lambda: peer.listen() or peer.got_close_notify)
        assert peer.heard == b"first and last"
        held.sock.send(peer.end_record())
        await until(lambda: held.end.lost)
        assert isinstance(held.end.lost[0], ConnectionDone)


@pytest_twisted.ensureDeferred
async def test_a_half_close_before_the_handshake_is_done_after_it(tls: OpenTls) -> None:
    """The half close waits for the handshake, and our end still reads."""
    async with tls.raw() as held:
        await turn()
        held.transport.loseWriteConnection()
        await turn()
        peer = tls.peer(held)
        await peer.handshake()
        assert await peer.hear_end() == "fin"
        assert peer.got_close_notify
        held.sock.send(peer.records(b"still heard"))
        await until(lambda: held.end.received == b"still heard")


@pytest_twisted.ensureDeferred
@pytest.mark.parametrize("what", ["abortConnection", "loseConnection"])
async def test_the_protocol_may_end_the_connection_when_the_handshake_is_done(
    tls: OpenTls, what: str
) -> None:
    """The protocol may reject the peer at that point."""
    end = End()
    end.on_handshake_done = lambda end: getattr(end.transport, what)()
    async with tls.raw(end) as held:
        peer = tls.peer(held)
        await peer.handshake()
        assert await peer.hear_end() == ("reset" if what == "abortConnection" else "fin")
        assert peer.got_close_notify is (what == "loseConnection")
        if what == "loseConnection":
            held.sock.send(peer.end_record())
        await until(lambda: end.lost)


@pytest_twisted.ensureDeferred
async def test_an_exception_of_the_report_ends_only_that_connection(
    tls: OpenTls, logged_failures: Any
) -> None:
    """It is logged once, as any exception of a protocol."""
    end = End()
    end.on_handshake_done = lambda end: 1 / 0
    async with tls.raw(end) as held:
        peer = tls.peer(held)
        await peer.handshake()
        await until(lambda: end.lost)
        assert isinstance(end.lost[0], ZeroDivisionError)
    assert logged_failures.report().count("ZeroDivisionError") == 1
    logged_failures.flush()


# -- content --------------------------------------------------------------------------------


@pytest_twisted.ensureDeferred
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("small", [False, True], ids=["free", "full"])
async def test_every_byte_comes_both_ways(tls: OpenTls, seed: int, small: bool) -> None:
    """Writes and reads have any size, and records may not fit into the kernel."""
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
@pytest.mark.parametrize("sizes", [[1] * 40, [16384] * 12, [9000] * 9, [1, 16384, 1, 8192, 8191]])
async def test_records_that_share_a_segment_all_come(tls: OpenTls, sizes: list[int]) -> None:
    """No further byte comes that could wake the reactor for bytes that OpenSSL holds."""
    async with tls.handshake_done() as peer:
        content = [bytes([index]) * size for index, size in enumerate(sizes)]
        peer.held.sock.send(peer.records(*content))
        await until(lambda: peer.held.end.received == b"".join(content))


@pytest_twisted.ensureDeferred
async def test_records_wait_while_reading_is_paused(tls: OpenTls) -> None:
    """Records of one segment wait, and come without a further byte when reading resumes."""
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
async def test_the_close_notify_of_the_peer_is_an_end_behind_its_content(
    tls: OpenTls, content: bytes, fin: bool
) -> None:
    """With a FIN or without: first comes the content, then the end; our close_notify follows."""
    async with tls.handshake_done() as peer:
        out = (peer.records(content) if content else b"") + peer.end_record()
        assert peer.held.sock.send(out) == len(out)
        if fin:
            peer.held.sock.shutdown(socket.SHUT_WR)
        await until(lambda: peer.held.end.lost)
        assert peer.held.end.received == content
        assert reasons(peer.held.end) == [ConnectionDone]
        assert await peer.hear_end() == "fin"
        assert peer.got_close_notify


@pytest_twisted.ensureDeferred
async def test_the_close_notify_of_the_peer_drops_what_waits(tls: OpenTls) -> None:
    """A record that is half sent cannot be finished; the connection ends all the same."""
    async with tls.handshake_done(small=True) as peer, tls.handshake_done() as other:
        fill(peer)
        peer.held.sock.send(peer.records(b"last") + peer.end_record())
        await until(lambda: peer.held.end.lost)
        assert peer.held.end.received == b"last"
        assert reasons(peer.held.end) == [ConnectionDone]
        other.held.transport.write(b"untouched")
        assert await other.hear(9) == b"untouched"
        assert other.held.transport.doRead() is None


@pytest_twisted.ensureDeferred
@pytest.mark.parametrize("broken", ["cut", "forged"])
async def test_content_before_a_broken_record_comes_before_the_loss(
    tls: OpenTls, broken: str
) -> None:
    """Whole records of the segment are delivered, and no part of the broken one."""
    async with tls.handshake_done() as peer:
        good, bad = peer.records(bytes(16384)), bytearray(peer.records(b"bad" * 10))
        if broken == "forged":
            bad[-1] ^= 1
        peer.held.sock.send(good + bytes(bad if broken == "forged" else bad[:-1]))
        peer.held.sock.shutdown(socket.SHUT_WR)
        await until(lambda: peer.held.end.lost)
        assert peer.held.end.received == bytes(16384)
        assert reasons(peer.held.end) == [ConnectionLost]


@pytest_twisted.ensureDeferred
@pytest.mark.parametrize("small", [False, True], ids=["sent", "waiting"])
async def test_our_close_notify_comes_last_and_waits_for_the_peers(
    tls: OpenTls, small: bool
) -> None:
    """close_notify and FIN follow the last byte; the connection ends with the peer's."""
    async with tls.handshake_done(small=small) as peer:
        sent = fill(peer) if small else b"last"
        if not small:
            peer.held.transport.write(sent)
        peer.held.transport.loseConnection()
        assert await peer.hear_end() == "fin"
        assert peer.heard == sent
        assert peer.got_close_notify
        assert peer.held.end.lost == []
        peer.held.transport.write(b"too late")
        peer.held.transport.loseConnection()
        for _ in range(5):
            await turn()
        assert peer.held.end.lost == []
        peer.held.sock.send(peer.records(b"not heard any more") + peer.end_record())
        await until(lambda: peer.held.end.lost)
        assert reasons(peer.held.end) == [ConnectionDone]
        assert peer.held.end.received == b""


@pytest_twisted.ensureDeferred
@pytest.mark.parametrize("rest", range(0, 16384, 2042))
async def test_a_close_notify_that_the_kernel_does_not_take_waits(
    contexts: Contexts, rest: int
) -> None:
    """Bytes before it have just filled the kernel; close_notify comes all the same."""
    tls = OpenTls(contexts, "server")
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
        assert peer.got_close_notify


@pytest_twisted.ensureDeferred
@pytest.mark.parametrize("how", ["fin", "reset"])
async def test_a_peer_without_close_notify_ends_our_close(tls: OpenTls, how: str) -> None:
    """Our close_notify was sent, and the connection is over in any case."""
    async with tls.handshake_done() as peer:
        peer.held.transport.loseConnection()
        await peer.hear_end()
        peer.held.reset() if how == "reset" else peer.held.sock.shutdown(socket.SHUT_WR)
        await until(lambda: peer.held.end.lost)
        assert len(peer.held.end.lost) == 1


@pytest_twisted.ensureDeferred
async def test_our_close_notify_waits_until_the_protocol_has_heard_of_the_peers(
    tls: OpenTls,
) -> None:
    """If the protocol aborts then, the peer must not get our close_notify."""
    async with tls.handshake_done() as peer:
        end: Any = peer.held.end
        end.readConnectionLost = peer.held.transport.abortConnection
        end.writeConnectionLost = lambda: None
        directlyProvides(end, IHalfCloseableProtocol)
        peer.held.sock.send(peer.end_record())
        await until(lambda: end.lost)
        assert reasons(end) == [ConnectionAborted]
        assert await peer.hear_end() == "reset"
        assert not peer.got_close_notify


@pytest_twisted.ensureDeferred
async def test_an_error_of_one_connection_is_not_found_by_another(tls: OpenTls) -> None:
    """OpenSSL keeps errors for each thread; each connection must take out its own."""
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
async def test_a_key_update_of_the_peer_works(tmp_path: Path) -> None:
    """OpenSSL's own client asks for one between two lines; both ways go on."""
    program = shutil.which("openssl")
    if program is None:
        pytest.skip("needs the openssl program")
    tls, end = OpenTls(Contexts("1.3", tmp_path), "server"), End()
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
