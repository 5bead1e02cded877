"""A client's socket that was handed over to another protocol: its bytes, its limits, its end."""

from __future__ import annotations

import contextlib
import socket
import ssl
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from pytest_twisted import ensureDeferred
from twisted.internet import reactor as real_reactor
from twisted.internet.defer import Deferred
from twisted.internet.error import ConnectionDone
from twisted.internet.interfaces import IHalfCloseableProtocol
from twisted.internet.protocol import Protocol
from twisted.internet.task import Clock
from twisted.protocols.tls import TLSMemoryBIOFactory
from twisted.web.server import NOT_DONE_YET
from zope.interface import implementer

from llmproxy.errors import ClientGone, ClientStalled, Cut, ProxyError
from llmproxy.http1.grammar import Fields
from llmproxy.net.transport import pending_bytes, raw_transport
from llmproxy.server.handler import Handler, Router
from llmproxy.server.request import Request
from llmproxy.server.site import Site
from llmproxy.server.tls import ListenerTls
from tests.server.caller import Caller
from tests.support.ends import Push
from tests.support.fake_transport import ABORTED, FIN, RESET, Collector, until
from tests.support.keypairs import Vault
from tests.support.served import AddressHandler, Served, ask, limits
from tests.support.sockets import WAIT, Wire, connect, request

CONNECT = request("CONNECT", "host:443")
HEAD = b"HTTP/1.1 200 OK\r\n\r\n"
UPGRADE: Fields = [(b"upgrade", b"x"), (b"connection", b"upgrade")]
DAY = 24 * 3600.0


class Tunnel(Collector):
    """Collects what the client sends; the test says what it does when it is connected."""

    transport: Any

    def __init__(self, made: Callable[[Tunnel], object] = lambda tunnel: None) -> None:
        super().__init__()
        self.made = made

    def connectionMade(self) -> None:
        self.made(self)


@implementer(IHalfCloseableProtocol)
class TwoSided(Tunnel):
    """Keeps which sides have ended."""

    def __init__(self) -> None:
        super().__init__()
        self.sides: list[str] = []

    def readConnectionLost(self) -> None:
        self.sides.append("read")

    def writeConnectionLost(self) -> None:
        self.sides.append("write")


def handed_over(
    tunnel: Tunnel | None = None, client_stall: float | None = None
) -> tuple[Caller, Tunnel]:
    """Return a client whose socket was handed over to the tunnel; the head was read."""
    caller = Caller(
        CONNECT, client_idle=1, request_head=1, request_body=1, client_stall=client_stall
    )
    tunnel = tunnel or Tunnel()
    caller.request.hand_over(200, [], tunnel)
    assert caller.transport.take().startswith(HEAD)
    return caller, tunnel


# --- what reaches it ------------------------------------------------------------------------------


@pytest.mark.parametrize("at", range(1, len(CONNECT + b"early")))
def test_what_came_with_the_request_is_delivered_first(at: int) -> None:
    """The reads may be split at any point, and the socket may be handed over at once or later."""
    wire = CONNECT + b"early"
    for later in (False, True):
        caller, tunnel = Caller(), Tunnel()
        if not later:
            caller.handler.act = partial(Request.hand_over, status=200, fields=[], protocol=tunnel)
        caller.send(wire[:at], wire[at:])
        if later:
            assert not tunnel.pieces
            caller.request.hand_over(200, [], tunnel)
        caller.send(b" and late", b".")
        assert tunnel.body == b"early and late."
        assert tunnel.pieces[-1] == b"."


def test_the_head_goes_out_first_and_has_no_framing() -> None:
    """What the protocol writes when it is connected comes behind the head."""
    caller = Caller(request("GET", "/", "Connection: close"))
    caller.request.hand_over(101, UPGRADE, Tunnel(lambda one: one.transport.write(b"hello")))
    assert caller.transport.writes == [
        b"HTTP/1.1 101 Switching Protocols\r\nupgrade: x\r\nconnection: upgrade\r\n\r\n",
        b"hello",
    ]
    assert caller.channel.written == len(caller.transport.value())
    assert caller.request.status == 101


def test_bytes_of_the_protocol_may_leave_with_the_head() -> None:
    """In one write."""
    caller = Caller(CONNECT)
    caller.request.hand_over(200, [], Tunnel(), behind=b"hello")
    assert caller.transport.writes == [HEAD + b"hello"]


def test_what_the_protocol_writes_reaches_the_client() -> None:
    """Bytes are not changed, and the addresses are those of the connection."""
    caller, tunnel = handed_over()
    tunnel.transport.write(b"one")
    tunnel.transport.writeSequence([b"t", b"wo"])
    assert caller.transport.writes == [b"one", b"two"]
    assert tunnel.transport.getPeer() == caller.transport.getPeer()
    assert tunnel.transport.getHost() == caller.transport.getHost()


def test_nothing_is_delivered_while_the_protocol_pauses() -> None:
    """Early bytes and bytes of the same read wait; then all of them come, in order."""
    caller = Caller()
    tunnel = Tunnel(lambda one: one.transport.pauseProducing())
    caller.send(CONNECT + b"early ")
    caller.request.hand_over(200, [], tunnel)
    assert caller.transport.is_paused()
    caller.send(b"of the same read ")
    assert not tunnel.pieces
    tunnel.transport.resumeProducing()
    assert not caller.transport.is_paused()
    caller.send(b"next")
    assert tunnel.pieces == [b"early of the same read ", b"next"]


def test_a_protocol_that_pauses_again_stays_paused() -> None:
    """It pauses in the ``dataReceived`` that its resumption caused."""

    class Reluctant(Tunnel):
        def dataReceived(self, data: bytes) -> None:
            super().dataReceived(data)
            self.transport.pauseProducing()

    caller, tunnel = handed_over(Reluctant())
    caller.send(b"1", b"2")
    tunnel.transport.resumeProducing()
    assert (tunnel.pieces, caller.transport.is_paused()) == ([b"1", b"2"], True)


def test_a_producer_of_the_protocol_is_paused_by_the_client() -> None:
    """The producer is paused and resumed as the client takes bytes, and stopped at the end."""
    producer = Push()
    caller, tunnel = handed_over()
    tunnel.transport.registerProducer(producer, True)
    caller.transport.producer.pauseProducing()
    caller.transport.producer.resumeProducing()
    tunnel.transport.unregisterProducer()
    tunnel.transport.registerProducer(producer, True)
    caller.transport.end(RESET)
    assert producer.told == ["pause", "resume", "stop"]


def test_pending_bytes_of_the_connection_can_be_read() -> None:
    """A protocol that is a server itself measures its client by the same figures."""
    caller, tunnel = handed_over()
    caller.transport.hold(7)
    assert pending_bytes(tunnel.transport) == 7
    assert raw_transport(tunnel.transport) is caller.transport


# --- what is kept ---------------------------------------------------------------------------------


def test_no_deadline_applies_any_more() -> None:
    """Neither a silent client is closed nor one that takes nothing."""
    caller, tunnel = handed_over(client_stall=1)
    caller.transport.hold(100)
    caller.clock.pump([1.0] * 100)
    caller.clock.advance(DAY)
    assert caller.is_open()
    assert not tunnel.ends


def test_the_request_has_ended() -> None:
    """``notifyFinish`` fires, and the handler does not hear when the client leaves later."""
    caller, tunnel = Caller(), Tunnel()
    caller.send(CONNECT)
    ended: Deferred[None] = caller.request.notifyFinish()
    caller.request.hand_over(200, [], tunnel)
    assert ended.called
    assert caller.site.ended == 1
    for late in (caller.request.finish, caller.request.break_off, caller.request.flush):
        late()
    caller.request.write(b"x")
    caller.request.abort(ClientStalled())
    assert caller.is_open()
    caller.transport.end(FIN)
    assert not caller.handler.gone
    assert caller.site.ended == 1


def test_the_connection_is_counted_until_it_is_gone() -> None:
    """The site, its limiter and a drain count it."""
    caller, tunnel = handed_over()
    caller.site.limiter = limits(1)
    assert caller.site.limiter.enter(None) is None  # as this one was
    caller.site.drain()
    empty = caller.site.when_empty()
    caller.pass_time(60)
    assert len(caller.site.connections) == 1
    assert caller.site.limiter.enter(None) is not None
    assert not empty.called
    heard: list[int] = []
    empty.addCallback(lambda _: heard.append(len(tunnel.ends)))
    caller.transport.end(FIN)
    assert heard == [1]
    assert not caller.site.connections
    assert caller.site.limiter.enter(None) is None


# --- how it ends ----------------------------------------------------------------------------------


@pytest.mark.parametrize("reason", [FIN, RESET])
def test_the_end_is_reported_once(reason: Exception) -> None:
    """The protocol gets the transport's reason."""
    caller, tunnel = handed_over()
    caller.transport.end(reason)
    caller.site.cut()
    assert tunnel.ends == [reason]


def test_a_cut_drops_the_connection_and_is_reported() -> None:
    """The end is reported to the protocol at once, as it is to a handler."""
    caller, tunnel = handed_over()
    caller.site.cut()
    assert [type(end) for end in tunnel.ends] == [Cut]
    assert caller.transport.count("abort") == 1
    caller.send(b"x")
    caller.transport.end(ABORTED)
    assert (len(tunnel.ends), tunnel.pieces) == (1, [])


class Ending(Tunnel):
    """Ends by itself when the process shuts down."""

    def __init__(self) -> None:
        super().__init__()
        self.told: list[str] = []

    def end_soon(self) -> None:
        self.told.append("soon")

    def end_now(self) -> bool:
        self.told.append("now")
        return self.told.count("now") == 1


def test_a_protocol_may_end_by_itself_when_the_process_shuts_down() -> None:
    """It is told of the drain; at the deadline it is left alone, and at a second cut dropped."""
    caller, tunnel = handed_over(ending := Ending())
    caller.site.drain()
    assert (ending.told, caller.is_open()) == (["soon"], True)
    caller.site.cut()
    assert (ending.told, caller.is_open()) == (["soon", "now"], True)
    caller.site.cut()
    assert [type(end) for end in tunnel.ends] == [Cut]
    assert not caller.is_open()


def test_the_protocol_may_abort() -> None:
    """The connection is dropped once; nothing is delivered until its end is reported."""
    caller, tunnel = handed_over()
    for _ in range(2):
        tunnel.transport.abortConnection()
    caller.send(b"x")
    assert caller.transport.count("abort") == 1
    caller.transport.end(ABORTED)
    assert (tunnel.ends, tunnel.pieces) == ([ABORTED], [])


@pytest.mark.parametrize("held", [0, 10])
def test_the_protocol_may_close(held: int) -> None:
    """What was written goes out first, for as long as the client takes it."""
    caller, tunnel = handed_over(client_stall=10)
    tunnel.transport.write(b"bye")
    caller.transport.hold(held)
    for _ in range(2):
        tunnel.transport.loseConnection()
    assert (caller.closes(), tunnel.transport.disconnecting) == (["half"], True)
    caller.send(b"x")
    caller.pass_time(1)
    assert caller.closes() == ["half"], "what the client still sends is read"
    caller.pass_time(12)
    assert caller.closes() == ["half", "abort" if held else "close"]
    caller.transport.end(ABORTED if held else FIN)
    assert tunnel.pieces == []
    assert [type(end) for end in tunnel.ends] == [ClientStalled if held else type(FIN)]


@pytest.mark.parametrize("closing", ["loseConnection", "abortConnection"])
def test_a_protocol_that_closes_at_once_gets_nothing(closing: str) -> None:
    """Bytes that came early are dropped."""
    tunnel = Tunnel(lambda one: getattr(one.transport, closing)())
    caller = Caller(CONNECT + b"early")
    caller.request.hand_over(200, [], tunnel)
    assert not tunnel.pieces
    assert not caller.is_open()


def test_a_client_that_ends_its_side_is_gone() -> None:
    """A protocol that does not know half closes gets the end of the connection."""
    caller, tunnel = handed_over()
    ends: list[Any] = []
    transport: Any = caller.transport
    transport.connectionLost = ends.append
    caller.channel.readConnectionLost()
    assert [reason.type for reason in ends] == [type(FIN)]
    assert not tunnel.ends  # the transport reports it


def test_each_side_may_end_by_itself() -> None:
    """A protocol that knows half closes gets each, as on any transport of Twisted's."""
    caller, tunnel = handed_over(two_sided := TwoSided())
    caller.channel.readConnectionLost()
    tunnel.transport.write(b"still")
    tunnel.transport.loseWriteConnection()
    caller.channel.writeConnectionLost()
    assert two_sided.sides == ["read", "write"]
    assert caller.transport.take() == b"still"
    assert caller.transport.calls[-1] == "half"
    assert not tunnel.ends


@pytest.mark.parametrize("where", ["connectionMade", "dataReceived"])
def test_a_protocol_that_fails_ends_the_connection(where: str, logged_failures: Any) -> None:
    """The exception is logged, nothing comes behind the head, and the end is reported."""

    class Failing(Tunnel):
        pass

    def fail(*_: object) -> None:
        raise ZeroDivisionError

    setattr(Failing, where, fail)
    caller, tunnel = Caller(), Failing()
    caller.send(CONNECT + b"early")
    caller.request.hand_over(200, [], tunnel)
    assert logged_failures.flush(ZeroDivisionError)
    assert (caller.transport.value(), caller.transport.count("abort")) == (HEAD, 1)
    caller.transport.end(ABORTED)
    assert tunnel.ends == [ABORTED]


# --- what cannot be handed over -------------------------------------------------------------------


def test_a_client_that_has_left_is_not_handed_over() -> None:
    """``hand_over`` raises, and the protocol is never connected."""
    caller, tunnel = Caller(), Tunnel()
    caller.send(CONNECT)
    caller.transport.end(FIN)
    with pytest.raises(ClientGone):
        caller.request.hand_over(200, [], tunnel)
    assert not tunnel.ends


def test_a_client_that_sends_too_much_early_is_not_handed_over() -> None:
    """``hand_over`` raises a 400; then the request gets a response and the end."""
    caller, tunnel = Caller(), Tunnel()
    caller.send(CONNECT, bytes(1_000_000), b"more")
    with pytest.raises(ProxyError) as caught:
        caller.request.hand_over(200, [], tunnel)
    assert (caught.value.status, caught.value.reason) == (400, "early_data")
    caller.respond()
    assert caller.transport.take().startswith(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n")
    assert not caller.is_open()


def test_a_response_that_has_begun_is_not_handed_over() -> None:
    """A head goes out once."""
    caller = Caller(CONNECT)
    caller.request.start(200, [])
    with pytest.raises(RuntimeError):
        caller.request.hand_over(200, [], Tunnel())


def test_a_body_that_is_not_whole_is_not_handed_over() -> None:
    """The first byte of the protocol would not be known."""
    caller = Caller()
    caller.handler.holds = False
    caller.send(request("POST", "/", "Content-Length: 5"), b"1")
    with pytest.raises(RuntimeError):
        caller.request.hand_over(101, [], Tunnel())
    caller.send(b"2345xyz")
    tunnel = Tunnel()
    caller.request.hand_over(101, [], tunnel)
    assert tunnel.body == b"xyz"


# --- on real sockets ------------------------------------------------------------------------------


class Mirror(Collector):
    """Sends back each byte, and reads no faster than the client takes them."""

    transport: Any

    def connectionMade(self) -> None:
        self.transport.registerProducer(self, True)

    def dataReceived(self, data: bytes) -> None:
        super().dataReceived(data)
        self.transport.write(data)

    def pauseProducing(self) -> None:
        self.transport.pauseProducing()

    def resumeProducing(self) -> None:
        self.transport.resumeProducing()

    def stopProducing(self) -> None:
        """Its transport reports the end, too."""


class Handing(Handler):
    """Gives each client's socket to a protocol."""

    def __init__(self, protocol: Protocol) -> None:
        super().__init__()
        self.protocol = protocol

    def render(self, request: Request) -> int:
        request.hand_over(200, [], self.protocol)
        return NOT_DONE_YET


KINDS = [(False, True), (True, True), (False, False), (True, False)]
IDS = ["plain", "tls", "twisted's plain", "twisted's tls"]


class HandOverListener:
    """A listener that hands the sockets of its clients over to a protocol."""

    def __init__(self, tmp_path: Path, kind: tuple[bool, bool], protocol: Protocol) -> None:
        secure, direct = kind
        vault = Vault(tmp_path) if secure else None
        tls = ListenerTls(vault.issue().keypair()) if vault else None
        self.served = Served(tls=tls, direct=direct)
        self.served.site.serve(Router(Handing(protocol)))
        self.context = vault.client() if vault else None

    def tunnel(self, early: bytes = b"", receive_buffer: int = 0) -> Wire:
        """Connect, and ask for the socket to be handed over."""
        wire = connect(self.served.port, receive_buffer=receive_buffer, tls=self.context)
        wire.send(CONNECT + early)
        assert wire.read_until(b"\r\n\r\n") == HEAD
        return wire


HandOver = Callable[[Protocol], HandOverListener]


@pytest.fixture(params=KINDS, ids=IDS)
def hand_over(request: Any, tmp_path: Path) -> HandOver:
    """Listen, and hand each client's socket over to a protocol."""
    return partial(HandOverListener, tmp_path, request.param)


def exchange(wire: Wire, data: bytes) -> bytes:
    """Send bytes and read as many, in one thread: a socket of ``ssl`` is not safe in two."""
    wire.sock.setblocking(False)
    sent, deadline = 0, time.monotonic() + WAIT
    while len(wire.buffer) < len(data):
        assert time.monotonic() < deadline
        with contextlib.suppress(BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError):
            sent += wire.sock.send(data[sent : sent + 16384])
        with contextlib.suppress(BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError):
            assert wire.receive()
    return wire.buffer


@ensureDeferred
async def test_bytes_go_both_ways(hand_over: HandOver) -> None:
    """Every byte arrives in order, the early ones first, although few fit on the way."""
    mirror = Mirror()
    listener = hand_over(mirror)
    early, late = bytes(range(256)) * 4, bytes(range(255, -1, -1)) * 20_000

    def client() -> None:
        with listener.tunnel(early, receive_buffer=4096) as wire:
            assert wire.read(len(early)) == early
            assert exchange(wire, late) == late

    async with listener.served as served:
        await served.run(client)
        await until(lambda: mirror.ends)
    assert mirror.body == early + late
    assert len(mirror.ends) == 1


@pytest.mark.parametrize("leave", [Wire.close, Wire.reset])
@ensureDeferred
async def test_a_client_that_leaves_is_reported_once(
    hand_over: HandOver, leave: Callable[[Wire], None]
) -> None:
    """The client may close or reset."""
    tunnel = Tunnel()
    listener = hand_over(tunnel)
    async with listener.served as served:
        leave(await served.run(listener.tunnel))
        await until(lambda: tunnel.ends)
        await served.until_connected(0)
    assert len(tunnel.ends) == 1


@ensureDeferred
async def test_a_cut_is_seen_by_the_client(hand_over: HandOver) -> None:
    """The socket is dropped, and the protocol gets the reason."""
    tunnel = Tunnel()
    listener = hand_over(tunnel)
    async with listener.served as served:
        wire = await served.run(listener.tunnel)
        served.site.cut()
        ended = await served.run(wire.wait_closed)
        assert ended == "reset" or (listener.context and ended == "truncated")
        await served.until_connected(0)
        wire.close()
    assert [type(end) for end in tunnel.ends] == [Cut]


@ensureDeferred
async def test_a_close_comes_behind_all_that_was_written(hand_over: HandOver) -> None:
    """The client reads every byte, and then an end."""
    size = 3_000_000

    def say_all(tunnel: Tunnel) -> None:
        tunnel.transport.write(bytes(size))
        tunnel.transport.loseConnection()

    tunnel = Tunnel(say_all)
    listener = hand_over(tunnel)

    def client() -> tuple[int, str]:
        with listener.tunnel() as wire:
            got = len(wire.read(size))
            return got, wire.wait_closed()

    async with listener.served as served:
        assert await served.run(client) == (size, "fin")
        await until(lambda: tunnel.ends)
    assert len(tunnel.ends) == 1


@pytest.mark.parametrize("hand_over", KINDS[:3], ids=IDS[:3], indirect=True)
@ensureDeferred
async def test_our_side_may_end_first(hand_over: HandOver) -> None:
    """A protocol that knows half closes still gets what the client sends."""
    tunnel = TwoSided()
    listener = hand_over(tunnel)

    def client(wire: Wire) -> None:
        assert wire.wait_closed() == "fin"
        wire.send(b"last words")

    async with listener.served as served:
        wire = await served.run(listener.tunnel)
        tunnel.transport.loseWriteConnection()
        await served.run(client, wire)
        await until(lambda: tunnel.body == b"last words")
        assert tunnel.sides == ["write"]
        tunnel.transport.loseConnection()
        wire.close()
        await until(lambda: tunnel.ends)


@pytest.mark.parametrize("hand_over", [KINDS[0], KINDS[2]], ids=[IDS[0], IDS[2]], indirect=True)
@ensureDeferred
async def test_a_close_behind_both_ends_is_an_orderly_one(hand_over: HandOver) -> None:
    """It waits for what the client has not taken; epoll must not take it for a break."""
    tunnel, size = TwoSided(), 60_000
    listener = hand_over(tunnel)
    async with listener.served as served:
        wire = await served.run(listener.tunnel, receive_buffer=4096)
        tunnel.transport.write(bytes(size))
        tunnel.transport.loseWriteConnection()
        wire.sock.shutdown(socket.SHUT_WR)
        await until(lambda: sorted(tunnel.sides) == ["read", "write"])
        tunnel.transport.loseConnection()
        await served.pass_time(1)
        assert not tunnel.ends
        assert len(await served.run(wire.read, size)) == size
        assert await served.run(wire.wait_closed) == "fin"
        await served.pass_time(1)
        await until(lambda: tunnel.ends)
        wire.close()
    assert [type(end) for end in tunnel.ends] == [ConnectionDone]


@ensureDeferred
async def test_a_server_can_run_in_a_socket_that_was_handed_over(tmp_path: Path) -> None:
    """TLS and a site of ours run there, as in an intercepted tunnel, and get its end."""
    vault, clock = Vault(tmp_path), Clock()
    inner = Site(Router(AddressHandler()), real_reactor, clock.seconds, wall=clock.seconds)
    layer = TLSMemoryBIOFactory(ListenerTls(vault.issue().keypair()), False, inner)
    protocol: Any = layer.buildProtocol(None)
    listener = HandOverListener(tmp_path, (False, True), protocol)

    def client() -> Wire:
        wire = listener.tunnel()
        secure = Wire(vault.client().wrap_socket(wire.sock, server_hostname="localhost"))
        assert [ask(secure), ask(secure)] == [b"127.0.0.1"] * 2
        return secure

    async with listener.served as served:
        wire = await served.run(client)
        assert len(inner.connections) == 1
        served.site.cut()
        await until(lambda: not inner.connections)
        wire.close()
