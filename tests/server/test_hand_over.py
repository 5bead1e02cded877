"""A client's socket in another protocol's hands: what reaches it, what is kept, how it ends."""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from pytest_twisted import ensureDeferred
from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IHalfCloseableProtocol, IPushProducer
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
from tests.server.test_site import Caller
from tests.support.fake_transport import ABORTED, FIN, RESET, Collector, until
from tests.support.keypairs import Vault
from tests.support.served import AddressHandler, Served, ask, limits
from tests.support.sockets import Wire, connect, request

CONNECT = request("CONNECT", "host:443")
HEAD = b"HTTP/1.1 200 OK\r\n\r\n"
UPGRADE: Fields = [(b"upgrade", b"x"), (b"connection", b"upgrade")]
DAY = 24 * 3600.0


class Tunnel(Collector):
    """Collects what the client sends; what it does when it is connected is the test's to say."""

    transport: Any

    def __init__(self, made: Callable[[Tunnel], object] = lambda tunnel: None) -> None:
        super().__init__()
        self.made = made

    def connectionMade(self) -> None:
        self.made(self)


@implementer(IHalfCloseableProtocol)
class TwoSided(Tunnel):
    """Hears of the end of each side."""

    def __init__(self) -> None:
        super().__init__()
        self.sides: list[str] = []

    def readConnectionLost(self) -> None:
        self.sides.append("read")

    def writeConnectionLost(self) -> None:
        self.sides.append("write")


def handed_over(tunnel: Tunnel | None = None, **timeouts: float | None) -> tuple[Caller, Tunnel]:
    """Return a client whose socket is the tunnel's, and what was written is taken."""
    caller, tunnel = Caller(limits=None, **timeouts), tunnel or Tunnel()
    caller.send(CONNECT)
    caller.request.hand_over(200, [], tunnel)
    assert caller.transport.take().startswith(HEAD)
    return caller, tunnel


# --- what reaches it ------------------------------------------------------------------------------


@pytest.mark.parametrize("at", range(1, len(CONNECT + b"early")))
def test_what_came_with_the_request_is_delivered_first(at: int) -> None:
    """Wherever the reads are split, and whether the socket is handed over at once or later."""
    wire = CONNECT + b"early"
    for later in (False, True):
        caller, tunnel = Caller(), Tunnel()
        if not later:
            caller.resource.act = partial(Request.hand_over, status=200, fields=[], protocol=tunnel)
        caller.send(wire[:at], wire[at:])
        if later:
            assert not tunnel.pieces
            caller.request.hand_over(200, [], tunnel)
        caller.send(b" and late", b".")
        assert tunnel.body == b"early and late."
        assert tunnel.pieces[-1] == b"."


def test_the_head_goes_out_first_and_has_no_framing() -> None:
    """Whatever the protocol writes when it is connected stands behind it."""
    caller = Caller()
    caller.send(request("GET", "/", "Connection: close"))
    caller.request.hand_over(101, UPGRADE, Tunnel(lambda one: one.transport.write(b"hello")))
    assert caller.transport.writes == [
        b"HTTP/1.1 101 Switching Protocols\r\nupgrade: x\r\nconnection: upgrade\r\n\r\n",
        b"hello",
    ]
    assert caller.channel.written == len(caller.transport.value())
    assert caller.request.status == 101


def test_what_it_writes_reaches_the_client_as_it_is() -> None:
    """Piece by piece, or joined; addresses are those of the connection."""
    caller, tunnel = handed_over()
    tunnel.transport.write(b"one")
    tunnel.transport.writeSequence([b"t", b"wo"])
    assert caller.transport.writes == [b"one", b"two"]
    assert tunnel.transport.getPeer() == caller.transport.getPeer()
    assert tunnel.transport.getHost() == caller.transport.getHost()


def test_nothing_is_delivered_while_it_pauses() -> None:
    """Neither what came early, nor what was read already; then all of it, in order."""
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
    """By what it was given when it went on."""

    class Reluctant(Tunnel):
        def dataReceived(self, data: bytes) -> None:
            super().dataReceived(data)
            self.transport.pauseProducing()

    caller, tunnel = handed_over(Reluctant())
    caller.send(b"1", b"2")
    tunnel.transport.resumeProducing()
    assert (tunnel.pieces, caller.transport.is_paused()) == ([b"1", b"2"], True)


def test_its_producer_is_the_transports() -> None:
    """It is paused and resumed as the client takes bytes, and stopped at the end."""
    told: list[str] = []

    @implementer(IPushProducer)
    class Producer:
        def pauseProducing(self) -> None:
            told.append("pause")

        def resumeProducing(self) -> None:
            told.append("resume")

        def stopProducing(self) -> None:
            told.append("stop")

    caller, tunnel = handed_over()
    tunnel.transport.registerProducer(Producer(), True)
    caller.transport.producer.pauseProducing()
    caller.transport.producer.resumeProducing()
    tunnel.transport.unregisterProducer()
    tunnel.transport.registerProducer(Producer(), True)
    caller.transport.end(RESET)
    assert told == ["pause", "resume", "stop"]


def test_what_waits_below_it_can_be_seen() -> None:
    """A protocol that is a server itself measures its client by the same figures."""
    caller, tunnel = handed_over()
    caller.transport.hold(7)
    assert pending_bytes(tunnel.transport) == 7
    assert raw_transport(tunnel.transport) is caller.transport


# --- what is kept ---------------------------------------------------------------------------------


def test_no_deadline_applies_any_more() -> None:
    """Neither a silent client is closed nor one that takes nothing."""
    caller, tunnel = handed_over(client_idle=1, request_head=1, request_body=1, client_stall=1)
    caller.transport.hold(100)
    caller.clock.pump([1.0] * 100)
    caller.clock.advance(DAY)
    assert caller.is_open()
    assert not tunnel.ends


def test_the_request_has_ended() -> None:
    """Whoever waits for it hears so; that the client leaves later is no business of its."""
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
    assert not caller.resource.gone
    assert caller.site.ended == 1


def test_the_connection_is_counted_until_it_is_gone() -> None:
    """By the site, by its limiter, and by whoever waits for the last one in a drain."""
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
def test_it_hears_of_the_end_once(reason: Exception) -> None:
    """With the transport's reason."""
    caller, tunnel = handed_over()
    caller.transport.end(reason)
    caller.site.cut()
    assert tunnel.ends == [reason]


def test_a_cut_drops_it_and_says_so() -> None:
    """The protocol hears of it at once, as whoever serves a request does."""
    caller, tunnel = handed_over()
    caller.site.cut()
    assert [type(end) for end in tunnel.ends] == [Cut]
    assert caller.transport.count("abort") == 1
    caller.send(b"x")
    caller.transport.end(ABORTED)
    assert (len(tunnel.ends), tunnel.pieces) == (1, [])


def test_an_abort_of_its_own() -> None:
    """The connection is dropped once; nothing is delivered until its end is reported."""
    caller, tunnel = handed_over()
    for _ in range(2):
        tunnel.transport.abortConnection()
    caller.send(b"x")
    assert caller.transport.count("abort") == 1
    caller.transport.end(ABORTED)
    assert (tunnel.ends, tunnel.pieces) == ([ABORTED], [])


@pytest.mark.parametrize("held", [0, 10])
def test_a_close_of_its_own(held: int) -> None:
    """What was written goes out first, for as long as the client takes it."""
    caller, tunnel = handed_over(client_stall=10)
    tunnel.transport.write(b"bye")
    caller.transport.hold(held)
    for _ in range(2):
        tunnel.transport.loseConnection()
    assert (caller.transport.count("lose"), tunnel.transport.disconnecting) == (1, True)
    caller.send(b"x")
    caller.pass_time(4)
    assert not caller.transport.count("abort")
    caller.pass_time(12)
    assert caller.transport.count("abort") == 1
    caller.transport.end(ABORTED)
    assert tunnel.pieces == []
    assert [type(end) for end in tunnel.ends] == [ClientStalled if held else type(ABORTED)]


@pytest.mark.parametrize("closing", ["loseConnection", "abortConnection"])
def test_a_protocol_that_closes_at_once_gets_nothing(closing: str) -> None:
    """What came early is dropped."""
    tunnel = Tunnel(lambda one: getattr(one.transport, closing)())
    caller = Caller()
    caller.send(CONNECT + b"early")
    caller.request.hand_over(200, [], tunnel)
    assert not tunnel.pieces
    assert not caller.is_open()


def test_a_client_that_ends_its_side_is_gone() -> None:
    """For a protocol that knows no sides."""
    caller, tunnel = handed_over()
    ends: list[Any] = []
    transport: Any = caller.transport
    transport.connectionLost = ends.append
    caller.channel.readConnectionLost()
    assert [reason.type for reason in ends] == [type(FIN)]
    assert not tunnel.ends  # it is the transport that reports it


def test_each_side_may_end_by_itself() -> None:
    """For a protocol that knows of sides, as for any transport of Twisted's."""
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
    """It is logged, nothing is written behind the head, and the end is reported."""

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


def test_a_client_that_has_left() -> None:
    """The protocol never hears of it."""
    caller, tunnel = Caller(), Tunnel()
    caller.send(CONNECT)
    caller.transport.end(FIN)
    with pytest.raises(ClientGone):
        caller.request.hand_over(200, [], tunnel)
    assert not tunnel.ends


def test_a_client_that_sends_more_than_is_kept() -> None:
    """The request can still be refused, in words, and is not served without these bytes."""
    caller, tunnel = Caller(), Tunnel()
    caller.send(CONNECT, bytes(1_000_000), b"more")
    with pytest.raises(ProxyError) as caught:
        caller.request.hand_over(200, [], tunnel)
    assert (caught.value.status, caught.value.reason) == (400, "early_data")
    caller.response()
    assert caller.transport.take().startswith(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n")
    assert not caller.is_open()


def test_a_response_that_has_begun() -> None:
    """A head goes out once."""
    caller = Caller()
    caller.send(CONNECT)
    caller.request.start(200, [])
    with pytest.raises(RuntimeError):
        caller.request.hand_over(200, [], Tunnel())


def test_a_body_that_is_not_whole() -> None:
    """Nobody could say where the protocol's bytes begin."""
    caller = Caller()
    caller.resource.holds = False
    caller.send(request("POST", "/", "Content-Length: 5"), b"1")
    with pytest.raises(RuntimeError):
        caller.request.hand_over(101, [], Tunnel())
    caller.send(b"2345xyz")
    tunnel = Tunnel()
    caller.request.hand_over(101, [], tunnel)
    assert tunnel.body == b"xyz"


# --- on real sockets ------------------------------------------------------------------------------


class Mirror(Collector):
    """Sends back what comes, and reads no faster than the client takes it."""

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


class Stage:
    """A listener that hands its clients' sockets over."""

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


@pytest.mark.parametrize("kind", KINDS, ids=IDS)
@ensureDeferred
async def test_bytes_go_both_ways(tmp_path: Path, kind: tuple[bool, bool]) -> None:
    """All of them, in order, the early ones first, and never more than fit on the way."""
    mirror = Mirror()
    stage = Stage(tmp_path, kind, mirror)
    sent = bytes(range(256)) * 20_000

    def client() -> bytes:
        with stage.tunnel(sent[:1000], receive_buffer=4096) as wire:
            sending = threading.Thread(target=wire.send, args=(sent[1000:],))
            sending.start()
            got = wire.read(len(sent))
            sending.join()
            return got

    async with stage.served as served:
        assert await served.run(client) == sent
        await until(lambda: mirror.ends)
    assert mirror.body == sent
    assert len(mirror.ends) == 1


@pytest.mark.parametrize("kind", KINDS, ids=IDS)
@ensureDeferred
async def test_a_client_that_leaves_is_reported_once(
    tmp_path: Path, kind: tuple[bool, bool]
) -> None:
    """Whether it closes or resets."""
    for leave in (Wire.close, Wire.reset):
        tunnel = Tunnel()
        stage = Stage(tmp_path, kind, tunnel)
        async with stage.served as served:
            wire = await served.run(stage.tunnel)
            leave(wire)
            await until(lambda: tunnel.ends)  # noqa: B023 - it is awaited here
            await served.until_connected(0)
        assert len(tunnel.ends) == 1


@pytest.mark.parametrize("kind", KINDS, ids=IDS)
@ensureDeferred
async def test_a_cut_is_seen_by_the_client(tmp_path: Path, kind: tuple[bool, bool]) -> None:
    """The socket is dropped, and the protocol knows why."""
    tunnel = Tunnel()
    stage = Stage(tmp_path, kind, tunnel)
    async with stage.served as served:
        wire = await served.run(stage.tunnel)
        served.site.cut()
        ended = await served.run(wire.wait_closed)
        assert ended == "reset" or (stage.context and ended == "truncated")
        await served.until_connected(0)
        wire.close()
    assert [type(end) for end in tunnel.ends] == [Cut]


@pytest.mark.parametrize("kind", KINDS, ids=IDS)
@ensureDeferred
async def test_a_close_comes_behind_all_that_was_written(
    tmp_path: Path, kind: tuple[bool, bool]
) -> None:
    """The client reads every byte, and then an end."""
    size = 3_000_000

    def say_all(tunnel: Tunnel) -> None:
        tunnel.transport.write(bytes(size))
        tunnel.transport.loseConnection()

    tunnel = Tunnel(say_all)
    stage = Stage(tmp_path, kind, tunnel)

    def client() -> tuple[int, str]:
        with stage.tunnel() as wire:
            got = len(wire.read(size))
            return got, wire.wait_closed()

    async with stage.served as served:
        assert await served.run(client) == (size, "fin")
        await until(lambda: tunnel.ends)
    assert len(tunnel.ends) == 1


@pytest.mark.parametrize("kind", KINDS[:3], ids=IDS[:3])
@ensureDeferred
async def test_our_side_may_end_first(tmp_path: Path, kind: tuple[bool, bool]) -> None:
    """A protocol that knows of sides still hears what the client has to say."""
    tunnel = TwoSided()
    stage = Stage(tmp_path, kind, tunnel)

    def client(wire: Wire) -> None:
        assert wire.wait_closed() == "fin"
        wire.send(b"last words")

    async with stage.served as served:
        wire = await served.run(stage.tunnel)
        tunnel.transport.loseWriteConnection()
        await served.run(client, wire)
        await until(lambda: tunnel.body == b"last words")
        assert tunnel.sides == ["write"]
        tunnel.transport.loseConnection()
        wire.close()
        await until(lambda: tunnel.ends)


@ensureDeferred
async def test_a_server_can_run_in_it(tmp_path: Path) -> None:
    """TLS and a site of ours, as where a tunnel is intercepted; its end reaches the inner site."""
    vault = Vault(tmp_path)
    layer = TLSMemoryBIOFactory(ListenerTls(vault.issue().keypair()), False, served_within())
    inner: Any = layer.wrappedFactory
    protocol: Any = layer.buildProtocol(None)
    stage = Stage(tmp_path, (False, True), protocol)

    def client() -> Wire:
        wire = stage.tunnel()
        secure = Wire(vault.client().wrap_socket(wire.sock, server_hostname="localhost"))
        assert [ask(secure), ask(secure)] == [b"127.0.0.1"] * 2
        return secure

    async with stage.served as served:
        wire = await served.run(client)
        assert len(inner.connections) == 1
        served.site.cut()
        await until(lambda: not inner.connections)
        wire.close()


def served_within() -> Site:
    """Return a site that is reached by no listener."""
    clock = Clock()
    return Site(Router(AddressHandler()), clock, clock.seconds, wall=clock.seconds)
