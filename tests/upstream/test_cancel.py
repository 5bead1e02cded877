"""Giving a request up, in every phase, plain and by TLS: how soon it ends, and what is left."""

from __future__ import annotations

import os
import select
import socket
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
from pytest_twisted import ensureDeferred
from twisted.internet.defer import CancelledError, Deferred

from llmproxy.config import ParentProxy, Timeouts, Url
from llmproxy.upstream import client
from llmproxy.upstream.resolver import Resolver
from llmproxy.upstream.response import Response
from tests.support.fake_transport import Collector, until
from tests.support.kernel import held
from tests.support.parents import ESTABLISHED
from tests.support.sockets import WAIT, Provider, Wire, chunked
from tests.support.tls import Authority
from tests.upstream.one_provider import Lookup, OneProviderUpstream, upstream_of, url_of

SAMPLES = 20
MOST = 1.0
"""Seconds that the median may take on a machine that is busy; the promise is a tenth of it."""

STREAM = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
ENDS = select.POLLRDHUP | select.POLLHUP | select.POLLERR


class WatchingProvider(Provider):
    """A provider that plays a phase, and notes when its connection ends.

    Args:
        authority: issues its certificate.
        tls: it speaks TLS.
        tunnelled: it is a parent proxy, and the provider behind it.

    Attributes:
        opens: whether it opens the tunnel that it is asked for.
        play: brings a connection into the phase.
        reached: set when it is there.
        over: set at the connection's end, which came at ``ended``, in seconds.
    """

    def __init__(self, authority: Authority, *, tls: bool, tunnelled: bool = False) -> None:
        context = authority.server() if tls else None
        super().__init__(self._watch, tls=None if tunnelled else context, receive_buffer=4096)
        self._inner = context
        self.opens = tunnelled
        self.play: Callable[[Wire], object] = lambda wire: None
        self.reached = threading.Event()
        self.over = threading.Event()
        self.ended = 0.0

    def _watch(self, wire: Wire) -> None:
        if self.opens:
            wire.read_head()
            wire.send(ESTABLISHED)
            if self._inner is not None:
                wire.sock = self._inner.wrap_socket(wire.sock, server_side=True)
        self.play(wire)
        self.reached.set()
        poll = select.poll()
        poll.register(wire.sock.fileno(), ENDS)
        # The end is seen behind whatever lies unread, in the turn in which the kernel has it.
        assert poll.poll(WAIT * 1000)
        self.ended = time.monotonic()
        self.over.set()


def assert_quick(took: list[float], node: Any) -> None:
    """Check the median of what was measured, in seconds, and write it into the test's report."""
    assert len(took) == SAMPLES
    median = statistics.median(took)
    node.user_properties.append(("median_ms", f"{median * 1000:.3f}"))
    assert median < MOST


async def assert_no_socket_left(upstream: OneProviderUpstream, port: int) -> None:
    """No connection, no timed call and no socket to the provider stays."""
    await upstream.assert_nothing_left()
    await until(lambda: not held(peer=port).sockets)


def is_cancelled(asked: Deferred[Response]) -> None:
    """Expect that a request ends with ``CancelledError``."""
    asked.addErrback(lambda failure: failure.trap(CancelledError))


# --- on a connection ------------------------------------------------------------------------------

Giving = Callable[[WatchingProvider, OneProviderUpstream], Any]
"""Brings a request into its phase; returns the call that gives the request up."""


async def sending(provider: WatchingProvider, upstream: OneProviderUpstream) -> Any:
    """Half a body is on its way; the provider takes no more of it."""
    provider.play = Wire.read_head
    return await before_the_head(provider, upstream, "POST", body=bytes(4 << 20))


async def awaiting_the_head(provider: WatchingProvider, upstream: OneProviderUpstream) -> Any:
    """The provider has the request, and sent half a head."""

    def play(wire: Wire) -> None:
        wire.read_request()
        wire.send(b"HTTP/1.1 200 OK\r\nX-Half: ")

    provider.play = play
    return await before_the_head(provider, upstream)


async def awaiting_a_whole_response(
    provider: WatchingProvider, upstream: OneProviderUpstream
) -> Any:
    """The provider has the whole body of a request that asks for no stream, and works on it."""
    provider.play = Wire.read_request
    return await before_the_head(provider, upstream, "POST", body=b'{"stream":false}')


async def tunnel(provider: WatchingProvider, upstream: OneProviderUpstream) -> Any:
    """The parent has the CONNECT, and sent half an answer."""

    def play(wire: Wire) -> None:
        wire.read_head()
        wire.send(b"HTTP/1.1 200 ")

    provider.opens, provider.play = False, play
    return await before_the_head(provider, upstream)


async def handshake(provider: WatchingProvider, upstream: OneProviderUpstream) -> Any:
    """The provider has the ClientHello, and does not respond to it."""
    provider.play = Wire.receive
    return await before_the_head(provider, upstream)


async def before_the_head(
    provider: WatchingProvider, upstream: OneProviderUpstream, method: str = "GET", **parts: Any
) -> Callable[[], None]:
    """Wait for the provider to reach the phase; the Deferred is the hold on the request."""
    asked = upstream.send(method, timeouts=Timeouts(), **parts)
    is_cancelled(asked)
    await until(provider.reached.is_set)
    return asked.cancel


async def unread(provider: WatchingProvider, upstream: OneProviderUpstream) -> Any:
    """The head and some chunks have come, and nobody has asked for the body."""
    return await behind_the_head(provider, upstream, STREAM + chunked(b"data: 1\n\n"), None)


async def first_chunk(provider: WatchingProvider, upstream: OneProviderUpstream) -> Any:
    """The head has come, and nothing of the body."""
    return await behind_the_head(provider, upstream, STREAM, b"")


async def mid_stream(provider: WatchingProvider, upstream: OneProviderUpstream) -> Any:
    """Chunks have come, and the provider has more of them."""
    data = b"data: 1\n\n"
    return await behind_the_head(provider, upstream, STREAM + chunked(data), data)


async def behind_the_head(
    provider: WatchingProvider, upstream: OneProviderUpstream, sent: bytes, content: bytes | None
) -> Callable[[], None]:
    """Read this content, or do not read; the response is the hold on the request."""

    def play(wire: Wire) -> None:
        wire.read_request()
        wire.send(sent)

    provider.play = play
    response = await upstream.send(timeouts=Timeouts())
    body = Collector()
    if content is not None:
        response.deliverBody(body)
    await until(lambda: body.body == (content or b"") and provider.reached.is_set())
    return response.abort


PHASES = [sending, awaiting_the_head, awaiting_a_whole_response, unread, first_chunk, mid_stream]
CELLS = [(phase, tls, far) for phase in PHASES for tls in (False, True) for far in (False, True)]
CELLS += [(handshake, True, False), (handshake, True, True)]
CELLS += [(tunnel, False, True), (tunnel, True, True)]


@pytest.mark.parametrize(
    ("phase", "tls", "tunnelled"),
    CELLS,
    ids=[
        f"{phase.__name__}, {'tls' if tls else 'plain'}{', tunnelled' if far else ''}"
        for phase, tls, far in CELLS
    ],
)
@ensureDeferred
async def test_the_provider_sees_the_end_at_once(
    authority: Authority,
    phase: Giving,
    tls: bool,
    tunnelled: bool,
    request: pytest.FixtureRequest,
) -> None:
    """Twenty requests are given up in the same phase: each ends at once and leaves nothing.

    Behind a parent proxy it is the parent that sees it; what it does then is its own affair.
    """
    shakes = tls and phase is not handshake
    provider = WatchingProvider(authority, tls=shakes, tunnelled=tunnelled)
    url = url_of(provider, host="localhost", scheme="https" if tls else "http")
    parent = ParentProxy(url_of(provider, scheme="http"), None) if tunnelled else None
    took: list[float] = []
    async with upstream_of(provider, url, ca=authority.ca_path, parent=parent) as (_, upstream):
        for _ in range(SAMPLES):
            provider.reached.clear()
            provider.over.clear()
            give_up = await phase(provider, upstream)
            began = time.monotonic()
            give_up()
            await until(provider.over.is_set)
            took.append(provider.ended - began)
            await assert_no_socket_left(upstream, provider.port)
        assert provider.accepted == SAMPLES
    assert_quick(took, request.node)


# --- before there is a connection -----------------------------------------------------------------


@pytest.fixture
def hanging_lookup(monkeypatch: pytest.MonkeyPatch) -> Iterator[Lookup]:
    """Let every name hang in the resolver until the test is over."""
    lookup = Lookup()
    lookup.hangs = lambda name: True
    monkeypatch.setattr(client, "Resolver", partial(Resolver, getaddrinfo=lookup))
    yield lookup
    lookup.over.set()


FIRST_HOPS = pytest.mark.parametrize(
    ("scheme", "tunnelled"),
    [("http", False), ("https", False), ("https", True)],
    ids=["http", "https", "tunnelled"],
)
"""To the provider, or to the parent proxy before it."""


def first_hop(port: int, scheme: str, tunnelled: bool) -> tuple[Url, ParentProxy | None]:
    """Return a provider, and perhaps a parent, of which the first is ``localhost``."""
    if not tunnelled:
        return Url(scheme=scheme, host="localhost", port=port), None
    parent = ParentProxy(Url(scheme="http", host="localhost", port=port), None)
    return Url(scheme=scheme, host="far.test", port=443), parent


@FIRST_HOPS
@ensureDeferred
async def test_a_request_that_waits_for_a_name_is_given_up_at_once(
    authority: Authority,
    scheme: str,
    tunnelled: bool,
    hanging_lookup: Lookup,
    request: pytest.FixtureRequest,
) -> None:
    """The request fails in the same turn, nothing is left, and nothing connects later."""
    provider = WatchingProvider(authority, tls=False)
    url, parent = first_hop(provider.port, scheme, tunnelled)
    took: list[float] = []
    async with upstream_of(provider, url, ca=authority.ca_path, parent=parent) as (_, upstream):
        for _ in range(SAMPLES):
            asked = upstream.send(timeouts=Timeouts())
            await until(lambda: hanging_lookup.names)
            assert upstream.count("connecting") == 1
            is_cancelled(asked)
            began = time.monotonic()
            asked.addCallback(lambda _: took.append(time.monotonic() - began))  # noqa: B023 - used at once
            asked.cancel()
            await assert_no_socket_left(upstream, provider.port)
        assert hanging_lookup.names == ["localhost"]
        assert provider.accepted == 0
    assert_quick(took, request.node)


def descriptors() -> int:
    """Return how many files and sockets the process has open."""
    return len(os.listdir("/proc/self/fd"))


@FIRST_HOPS
@ensureDeferred
async def test_a_connection_that_nobody_accepts_is_given_up_at_once(
    authority: Authority, scheme: str, tunnelled: bool, request: pytest.FixtureRequest
) -> None:
    """The socket whose SYN stays without an ACK is closed as soon as its request is given up."""
    took: list[float] = []
    with socket.socket() as listener, socket.socket() as one, socket.socket() as two:
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        port = listener.getsockname()[1]
        for filler in (one, two):  # the queue is full now: further SYNs stay without an ACK
            filler.setblocking(False)
            filler.connect_ex(("127.0.0.1", port))
        url = Url(scheme=scheme, host="127.0.0.1", port=port)
        parent = ParentProxy(Url(scheme="http", host="127.0.0.1", port=port), None)
        upstream = OneProviderUpstream(
            url, ca=authority.ca_path, parent=parent if tunnelled else None
        )
        before = descriptors()
        for _ in range(SAMPLES):
            asked = upstream.send(timeouts=Timeouts())
            is_cancelled(asked)
            await until(lambda: descriptors() == before + 1)
            assert upstream.count("connecting") == 1
            began = time.monotonic()
            asked.cancel()
            await until(lambda: descriptors() == before)
            took.append(time.monotonic() - began)
            await upstream.assert_nothing_left()
    assert_quick(took, request.node)
