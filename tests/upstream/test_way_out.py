"""The way out for tunnels: which address is connected to, and what a parent is told.

Every target is on loopback, so a test lets loopback pass: with ``allow_private``, or with a guard
of its own.  127.0.0.2 is another host here.
"""

from __future__ import annotations

import contextlib
import errno
import socket
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, cast

import pytest
from pytest_twisted import ensureDeferred
from twisted.internet.defer import CancelledError, Deferred
from twisted.internet.task import Clock

from llmproxy.config import Config, Limits, ParentProxy, Proxy, Secret, Timeouts, Url
from llmproxy.errors import EndReason, ProxyError
from llmproxy.net.addresses import AddressGuard, Forbidden, Kind
from llmproxy.upstream.resolver import KEPT, Resolver
from llmproxy.upstream.way_out import OpenWay, WayOut, tunnel_resolver
from tests.net.test_addresses import NO_ADDRESS, SPELLINGS
from tests.support.fake_transport import Collector, TurnedReactor, until
from tests.support.kernel import held
from tests.support.parents import ESTABLISHED, PlayedParent
from tests.support.sockets import WAIT, Provider, Wire
from tests.upstream.one_provider import take

TRANSPORTS = pytest.mark.parametrize("direct", [True, False], ids=["direct", "twisted"])
Rows = list[str] | Exception


class Names:
    """A ``getaddrinfo`` that returns what the test says, one result after another.

    Attributes:
        asked: the names, in order.
    """

    def __init__(self, *results: Rows) -> None:
        self.asked: list[str] = []
        self._results = list(results) or [["127.0.0.1"]]

    def __call__(self, name: str, *_: object) -> list[Any]:
        self.asked.append(name)
        result = self._results.pop(0) if len(self._results) > 1 else self._results[0]
        if isinstance(result, Exception):
            raise result
        families = [socket.AF_INET6 if ":" in one else socket.AF_INET for one in result]
        rows = zip(families, result, strict=True)
        return [(family, socket.SOCK_STREAM, 6, "", (one, 0)) for family, one in rows]


class OneAddress(AddressGuard):
    """A guard that lets one address pass, and refuses all others as private.

    Attributes:
        judged: every address and port that it was asked about.
    """

    def __init__(self, address: str = "127.0.0.1") -> None:
        super().__init__(tuple)
        self._address = address
        self.judged: list[tuple[str, int]] = []

    def forbids(self, address: str, port: int) -> Forbidden | None:
        self.judged.append((address, port))
        return None if address == self._address else Forbidden(Kind.PRIVATE, "It is private.")


class Ways:
    """A way out with names of the test's, and a clock that the test turns."""

    def __init__(
        self,
        names: Names | None = None,
        *,
        guard: AddressGuard | None = None,
        direct: bool = True,
        parent: ParentProxy | None = None,
        past: tuple[str, ...] = (),
        connect: float | None = 10.0,
    ) -> None:
        self.names = names or Names()
        self.reactor = TurnedReactor()
        self.clock = self.reactor.clock
        self.resolver = Resolver(self.reactor, self.clock.seconds, getaddrinfo=self.names)
        self.guard = guard or AddressGuard(tuple, allow_private=True)
        proxy = Proxy(
            tuned_loop=direct,
            parent_proxy=None if parent is None else parent.url,
            parent_proxy_credential=None if parent is None else parent.credential,
            no_parent_proxy=past,
        )
        config = Config(
            proxy=proxy, timeouts=Timeouts(connect=connect), limits=Limits(response_head=4096)
        )
        self.out = WayOut(self.reactor, self.resolver, config, self.guard)

    async def open(self, host: str, port: int) -> tuple[OpenWay, Collector]:
        """Open a way, and collect what comes on it."""
        way = await self.out.open(host, port)
        collector = Collector()
        way.begin(collector)
        return way, collector

    async def refusal(self, host: str, port: int = 443) -> ProxyError:
        """Return why a way cannot be opened; no timer is left."""
        with pytest.raises(ProxyError) as caught:
            await self.out.open(host, port)
        assert not self.reactor.timers()
        return caught.value


@asynccontextmanager
async def echo(address: str = "127.0.0.1") -> AsyncIterator[int]:
    """Listen on an address of loopback; what accepts there sends back what it gets."""

    def script(wire: Wire) -> None:
        while data := wire.sock.recv(65536):
            wire.send(data)

    with Provider(script) as provider:
        if address == "127.0.0.1":
            yield provider.port
            return
        with socket.socket() as other:
            other.bind((address, provider.port))
            other.listen()
            other.setblocking(False)
            yield provider.port
            with contextlib.suppress(BlockingIOError):
                other.accept()
                raise AssertionError(f"{address} was connected to")


def at(parent: Provider, credential: str | None = None) -> ParentProxy:
    """Return how a parent is configured."""
    url = Url(scheme="http", host="127.0.0.1", port=parent.port)
    return ParentProxy(url, None if credential is None else Secret(credential))


# --- directly -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "host", ["a.example", "A.Example.", "127.0.0.1", "127.1", "[::ffff:7f00:1]"]
)
@TRANSPORTS
@ensureDeferred
async def test_bytes_go_both_ways(host: str, direct: bool) -> None:
    """By name or address; only a name is looked up, without its dot and in lower case."""
    async with echo() as port:
        ways = Ways(direct=direct)
        way, collector = await ways.open(host, port)
        way.transport.write(b"hello")
        await until(lambda: collector.body == b"hello")
        assert ways.names.asked == (["a.example"] if "xample" in host else [])
        way.abort()
        await collector.ended
    assert not ways.reactor.timers()


@TRANSPORTS
@ensureDeferred
async def test_a_second_lookup_cannot_lead_elsewhere(direct: bool) -> None:
    """The address that was checked is the one that is connected to, whatever the name says next."""
    names = Names(["127.0.0.1"], ["127.0.0.2"])
    async with echo("127.0.0.2") as port:
        ways = Ways(names, guard=(guard := OneAddress()), direct=direct)
        way, collector = await ways.open("rebinds.example", port)
        assert names.asked == ["rebinds.example"]
        assert guard.judged == [("127.0.0.1", port)]
        assert way.transport.getPeer().host == "127.0.0.1"
        way.abort()
        await collector.ended
        ways.clock.advance(KEPT)
        error = await ways.refusal("rebinds.example", port)
        assert (error.reason, error.cause) == ("address_forbidden", "private")
        assert names.asked == ["rebinds.example"] * 2


@ensureDeferred
async def test_what_is_remembered_is_checked_anew() -> None:
    """Another configuration may refuse what this one let pass."""
    async with echo() as port:
        ways = Ways()
        way, collector = await ways.open("a.example", port)
        way.abort()
        await collector.ended
        strict = WayOut(ways.reactor, ways.resolver, Config(), AddressGuard(tuple))
        with pytest.raises(ProxyError) as caught:
            await strict.open("a.example", port)
        assert caught.value.cause == "loopback"
        assert ways.names.asked == ["a.example"]


@ensureDeferred
async def test_the_deadline_stands_with_the_others_of_its_length() -> None:
    """So a way costs the reactor no timer of its own; when it rings, nothing is left."""
    ways, timers = Ways(), Clock()
    out = WayOut(ways.reactor, ways.resolver, Config(), ways.guard, timers)
    opening = out.open("192.0.2.1", 443)
    (deadline,) = timers.getDelayedCalls()
    timers.advance(deadline.getTime())
    with pytest.raises(ProxyError) as caught:
        await opening
    assert (caught.value.reason, timers.getDelayedCalls()) == ("upstream_timeout", [])
    assert not ways.reactor.timers()


@TRANSPORTS
@ensureDeferred
async def test_of_several_addresses_only_those_that_pass_are_connected_to(direct: bool) -> None:
    """One that is refused stands first; it is never tried."""
    names = Names(["127.0.0.2", "::1", "127.0.0.1"])
    async with echo("127.0.0.2") as port:
        ways = Ways(names, guard=OneAddress(), direct=direct)
        way, collector = await ways.open("mixed.example", port)
        assert way.transport.getPeer().host == "127.0.0.1"
        way.abort()
        await collector.ended


@pytest.mark.parametrize(
    ("address", "kind"),
    [
        ("127.0.0.1", "loopback"),
        ("::1", "loopback"),
        ("169.254.169.254", "metadata"),
        ("10.0.0.1", "private"),
        ("100.64.0.1", "shared"),
        ("fe80::1%lo", "link_local"),
        ("::ffff:127.0.0.1", "loopback"),
        ("64:ff9b::a00:1", "private"),
        ("0.0.0.0", "unspecified"),
    ],
)
@ensureDeferred
async def test_a_name_without_an_address_that_may_be_reached_is_refused(
    address: str, kind: str
) -> None:
    """The operator reads which address it was; the caller reads which kind."""
    error = await Ways(Names([address]), guard=AddressGuard(tuple)).refusal("evil.example")
    assert (error.status, error.reason, error.cause) == (403, "address_forbidden", kind)
    assert error.end is EndReason.REJECTED
    assert address in error.detail
    assert "evil.example" in error.detail
    assert address not in error.message


@pytest.mark.parametrize("host", [spelling for spelling, _ in SPELLINGS])
@ensureDeferred
async def test_no_spelling_of_an_address_reaches_a_lookup(host: str) -> None:
    """It is judged as the address that it is."""
    ways = Ways(guard=AddressGuard(tuple))
    assert (await ways.refusal(host)).reason == "address_forbidden"
    assert not ways.names.asked


@pytest.mark.parametrize("host", ["localhost", "localhost.", "LOCALHOST"])
@ensureDeferred
async def test_localhost_is_refused_by_its_address(host: str) -> None:
    """As every name of anybody's that leads there."""
    ways = Ways(Names(["::1", "127.0.0.1"]), guard=AddressGuard(tuple))
    assert (await ways.refusal(host)).cause == "loopback"


@ensureDeferred
async def test_the_own_listeners_are_not_reached_by_any_name() -> None:
    """Neither by the address that is bound nor by another one of this machine."""
    async with echo() as port:
        for bound in ("127.0.0.1", "0.0.0.0", "::"):
            guard = AddressGuard(lambda host=bound: [(host, port)], allow_private=True)  # type: ignore[misc]
            ways = Ways(guard=guard)
            for host in ("me.example", "127.0.0.1", "[::ffff:127.0.0.1]", "2130706433"):
                assert (await ways.refusal(host, port)).cause == "own_listener"


@pytest.mark.parametrize(
    "host",
    [
        *NO_ADDRESS,
        "",
        ".",
        "a..example",
        "a b",
        "a/b",
        "a@b",
        "a%00b",
        "%6c%6f",
        "b\u00fccher.x\u0000",
        "a" * 64,
        ".".join(["a" * 60] * 5),
        "-a.example",
        "exa_mple..",
    ],
)
@ensureDeferred
async def test_what_can_be_no_host_is_refused_before_anything_else(host: str) -> None:
    """No resolver and no parent gets to see it."""
    with PlayedParent() as parent:
        for ways in (Ways(), Ways(parent=at(parent))):
            error = await ways.refusal(host)
            assert (error.status, error.reason) == (400, "bad_authority")
            assert not ways.names.asked
        assert parent.accepted == 0


@ensureDeferred
async def test_a_host_that_cannot_be_reached_says_so() -> None:
    """Its name has no address, or nobody listens there; the words are of a host."""
    ways = Ways(Names(socket.gaierror(socket.EAI_NONAME, "who is that?")))
    unknown = await ways.refusal("a.example")
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        refused = await Ways().refusal("a.example", nobody.getsockname()[1])
    for error, word in ((unknown, "who is that?"), (refused, "ConnectionRefusedError")):
        assert (error.status, error.end) == (502, EndReason.UPSTREAM_UNREACHABLE)
        assert word in error.detail
        assert error.message == "The host cannot be reached."
    lacking = await Ways(Names(OSError(errno.EMFILE, "no more"))).refusal("a.example")
    assert (lacking.status, lacking.reason) == (503, "no_descriptors")


@TRANSPORTS
@ensureDeferred
async def test_nothing_is_read_before_somebody_takes_the_connection(direct: bool) -> None:
    """A host that speaks first waits, as far as the kernel does; then every byte is there."""
    banner = bytes(range(256)) * 4000
    with Provider(lambda wire: wire.send(banner)) as provider:
        ways = Ways(direct=direct)
        way = await ways.out.open("a.example", provider.port)
        await until(lambda: held(peer=provider.port).unread > 0)
        assert way.transport not in cast(Any, ways.reactor).getReaders()
        collector = Collector()
        way.begin(collector)
        await collector.ended
        assert collector.body == banner


# --- how it is given up ---------------------------------------------------------------------------


@ensureDeferred
async def test_a_deadline_covers_name_and_connection() -> None:
    """The phase is the cause."""
    hangs: Deferred[Any] = Deferred()
    ways = Ways()
    ways.resolver.addresses = lambda name, caller="": hangs  # type: ignore[method-assign]
    waits = ways.out.open("a.example", 443)
    ways.clock.advance(9.9)
    assert not waits.called
    ways.clock.advance(0.2)
    with pytest.raises(ProxyError) as caught:
        await waits
    assert (caught.value.status, caught.value.cause) == (504, "connect")
    assert caught.value.message == "The host did not answer in time."
    assert not ways.reactor.timers()


@asynccontextmanager
async def full_listener() -> AsyncIterator[int]:
    """Listen where the kernel takes no further connection: a connect there stays under way."""
    with socket.socket() as listener, contextlib.ExitStack() as stack:
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        port = listener.getsockname()[1]
        for _ in range(2):
            sock = stack.enter_context(socket.socket())
            sock.setblocking(False)
            sock.connect_ex(("127.0.0.1", port))
        yield port


@TRANSPORTS
@ensureDeferred
async def test_a_way_that_is_connecting_can_be_cancelled(direct: bool) -> None:
    """The socket is closed at once, and it stays a cancel."""
    async with full_listener() as port:
        ways = Ways(direct=direct)
        waits = ways.out.open("127.0.0.1", port)
        assert not waits.called
        waits.cancel()
        with pytest.raises(CancelledError):
            await waits
        await until(lambda: held(peer=port).sockets <= 2)
        assert not ways.reactor.timers()


@ensureDeferred
async def test_a_way_that_waits_for_a_name_can_be_cancelled() -> None:
    """The lookup is left to others."""
    names = Names()
    ways = Ways(names)
    waits = ways.out.open("a.example", 443)
    assert not waits.called
    waits.cancel()
    with pytest.raises(CancelledError):
        await waits
    assert not ways.reactor.timers()
    await until(lambda: not ways.resolver._waiting)


@TRANSPORTS
@ensureDeferred
async def test_a_way_that_waits_for_the_parent_can_be_cancelled(direct: bool) -> None:
    """The parent sees the connection reset."""
    with PlayedParent(b"HTTP/1.1 1") as parent:
        ways = Ways(parent=at(parent), direct=direct)
        waits = ways.out.open("a.example", 443)
        await take(parent.heads)
        waits.cancel()
        with pytest.raises(CancelledError):
            await waits
        await until(lambda: held(peer=parent.port).sockets == 0)
        assert not ways.reactor.timers()


# --- through a parent proxy -----------------------------------------------------------------------


@TRANSPORTS
@ensureDeferred
async def test_the_parent_gets_the_name(direct: bool) -> None:
    """Nothing is looked up here; the parent is told who we are."""
    with PlayedParent() as parent:
        async with echo() as port:
            ways = Ways(parent=at(parent, "team:s3cret"), direct=direct)
            way, collector = await ways.open("A.Example.", port)
            way.transport.write(b"hello")
            await until(lambda: collector.body == b"hello")
            line, fields = await take(parent.heads)
            assert line == b"CONNECT a.example:%d HTTP/1.1" % port
            assert fields[b"host"] == b"a.example:%d" % port
            assert b"proxy-authorization" in fields
            assert not ways.names.asked
            way.abort()
            await collector.ended


@TRANSPORTS
@pytest.mark.parametrize("at_once", [True, False])
@ensureDeferred
async def test_a_host_behind_a_parent_may_speak_first(direct: bool, at_once: bool) -> None:
    """What comes in one piece with the parent's response, or behind it, is not lost."""
    banner = b"SSH-2.0-x\r\n"
    is_open = threading.Event()

    class Banner(PlayedParent):
        def pump(self, line: bytes, wire: Wire) -> None:
            if not at_once:
                assert is_open.wait(WAIT)
                wire.send(banner)
            wire.wait_closed()

    with Banner(ESTABLISHED + banner if at_once else ESTABLISHED) as parent:
        ways = Ways(parent=at(parent), direct=direct)
        way = await ways.out.open("git.example", 22)
        is_open.set()
        if not at_once:
            await until(lambda: held(peer=parent.port).unread == len(banner))
        collector = Collector()
        way.begin(collector)
        await until(lambda: collector.body == banner)
        way.abort()
        await collector.ended


@pytest.mark.parametrize("host", [*(one for one, _ in SPELLINGS), "localhost", "a.localhost."])
@ensureDeferred
async def test_the_parent_never_hears_of_an_address_that_is_refused(host: str) -> None:
    """The names that it would take for itself count as one."""
    with PlayedParent() as parent:
        ways = Ways(parent=at(parent), guard=AddressGuard(tuple))
        assert (await ways.refusal(host)).reason == "address_forbidden"
        assert parent.accepted == 0
        assert not ways.names.asked


@ensureDeferred
async def test_an_address_that_may_be_reached_goes_to_the_parent_in_its_usual_spelling() -> None:
    """So the parent cannot read another one out of it."""
    with PlayedParent(b"HTTP/1.1 403 No\r\n\r\n") as parent:
        for host, line in (("0x01010101", b"1.1.1.1"), ("[2606:4700:0::1]", b"[2606:4700::1]")):
            ways = Ways(parent=at(parent), guard=AddressGuard(tuple))
            error = await ways.refusal(host)
            assert (error.status, error.cause) == (502, "parent_proxy_refused")
            assert error.message == "The host cannot be reached."
            assert (await take(parent.heads))[0] == b"CONNECT %b:443 HTTP/1.1" % line


@pytest.mark.parametrize("host", ["llm.internal", "127.0.0.1"])
@ensureDeferred
async def test_hosts_past_the_parent_are_reached_and_checked_here(host: str) -> None:
    """``no_parent_proxy`` counts for tunnels, too."""
    with PlayedParent() as parent:
        async with echo() as port:
            past = ("*.internal", "127.0.0.0/8")
            ways = Ways(parent=at(parent), past=past)
            way, collector = await ways.open(host, port)
            way.abort()
            await collector.ended
            strict = Ways(parent=at(parent), past=past, guard=AddressGuard(tuple))
            assert (await strict.refusal(host, port)).cause == "loopback"
        assert parent.accepted == 0


@ensureDeferred
async def test_a_parent_that_cannot_be_reached_is_named_for_the_operator() -> None:
    """And not for the caller."""
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        url = Url(scheme="http", host="127.0.0.1", port=nobody.getsockname()[1])
        error = await Ways(parent=ParentProxy(url, None)).refusal("a.example")
    assert error.cause == "parent_proxy_unreachable"
    assert error.detail.startswith("parent proxy: ")
    assert error.message == "The host cannot be reached."


def test_names_of_callers_have_a_resolver_with_bounds() -> None:
    """Its threads and its memory are a number, not a caller's choice."""
    reactor = TurnedReactor()
    resolver = tunnel_resolver(reactor, reactor.seconds)
    bounds = (resolver._most_lookups, resolver._most_of_one, resolver._most_names)
    assert bounds == (32, 8, 1024)
