"""What a response's body takes: memory, time, and a connection that must be let go of."""

from __future__ import annotations

import ssl
import threading
import tracemalloc
from contextlib import suppress

import pytest
from pytest_twisted import ensureDeferred

from tests.support.sockets import Provider, Wire, chunked, connect, request
from tests.support.tls import Authority
from tests.traps.calls import Responding, Step
from tests.traps.parts import Body, Call, Ports, Sender, Upstream
from tests.traps.waits import ended, thread, within

CHUNKED = (
    b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
)


class Endless:
    """A provider's script that streams until its connection is closed on it.

    Args:
        response: the head that it begins with.
        pace: seconds between two pieces, or None for silence behind the first.

    Attributes:
        left: given once the proxy's side has closed.
    """

    def __init__(self, response: bytes = CHUNKED, *, pace: float | None = 0.002) -> None:
        self._response = response
        self._pace = pace
        self._over = threading.Event()
        self.left = Step()

    def __call__(self, wire: Wire) -> None:
        """Serve one connection."""
        wire.read_request()
        wire.send(self._response, chunked(b"data: 1\n\n"))
        with suppress(ConnectionError, ssl.SSLError):
            while self._pace is not None and not self._over.wait(self._pace):
                wire.send(chunked(b"data: more\n\n"))
            while self._pace is None and wire.receive():
                pass
        if not self._over.is_set():
            self.left.give()

    def stop(self) -> None:
        """Let the script end although its connection is open."""
        self._over.set()


async def begun(sender: Sender, seconds: float, *, read: bool = True) -> tuple[Call, Body]:
    """Begin a stream, and wait for its head, or for its first piece where it is read."""
    call, body = sender.send("GET", "/x", []), Body()
    reply = await within(seconds, call.head)
    if read:
        reply.deliver(body)
        await within(seconds, body.flowing)
    return call, body


@pytest.mark.trap("U7")
@ensureDeferred
async def test_nothing_of_a_body_is_kept(upstream: Upstream, patience: float) -> None:
    """Eight megabytes go through the HTTP client's defaults and less than one is left in memory."""
    piece, count = b"x" * 65536, 128

    def script(wire: Wire) -> None:
        wire.read_request()
        wire.send(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % (len(piece) * count))
        for _ in range(count):
            wire.send(piece)

    with Provider(script) as provider:
        # What treq does by default is the row's subject.
        call = upstream(provider.url).send("GET", "/x", [], unbuffered=False)
        reply = await within(patience, call.head)
        body = Body(keep=False)
        tracemalloc.start()
        try:
            reply.deliver(body)
            assert await ended(body.ended, 20)
            kept, _ = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
    assert body.count == len(piece) * count
    assert kept < 1 << 20


@pytest.mark.trap("U8")
@pytest.mark.parametrize("asked_for_body", [True, False], ids=["in the body", "before the body"])
@ensureDeferred
async def test_cancelling_after_the_head_closes_the_connection(
    upstream: Upstream, patience: float, asked_for_body: bool
) -> None:
    """Giving up a request whose head is in ends its stream at the provider."""
    endless = Endless()
    with Provider(endless) as provider:
        call, body = await begun(upstream(provider.url), patience, read=asked_for_body)
        call.cancel()
        assert await endless.left.happens(patience), "the provider streams on"
        endless.stop()
    if asked_for_body:
        assert await ended(body.ended, patience) is False


@pytest.mark.trap("U8")
@ensureDeferred
async def test_a_provider_that_falls_silent_in_its_body_is_given_up(
    proxy: Ports, patience: float
) -> None:
    """The deadline holds behind the head too: both sides are closed, and not as if whole."""
    endless = Endless(pace=None)

    def ask(port: int) -> bytes:
        with connect(port) as wire:
            wire.send(request("GET", "/p/x"))
            wire.read_head()
            first = wire.read_chunk()
            wire.sock.settimeout(patience)
            try:
                wire.read_chunk()
            except EOFError:
                return first
            except TimeoutError:
                return b"silence"
        return b"a whole response"

    with Provider(endless) as provider:
        assert await thread(ask, proxy(provider.url, silence=0.3)) == b"data: 1\n\n"
        assert await endless.left.happens(patience), "the provider's connection is kept"


@pytest.mark.trap("U8")
@ensureDeferred
async def test_a_client_that_leaves_in_the_body_ends_the_stream_of_the_provider(
    proxy: Ports, patience: float
) -> None:
    """The client resets its connection in the middle; the provider's is closed."""
    endless = Endless()

    def leave(port: int) -> None:
        wire = connect(port)
        wire.send(request("GET", "/p/x"))
        wire.read_head()
        wire.read_chunk()
        wire.reset()

    with Provider(endless) as provider:
        await thread(leave, proxy(provider.url))
        assert await endless.left.happens(patience), "the provider streams on"
        endless.stop()


@pytest.mark.trap("U9")
@pytest.mark.parametrize("times", [1, 2])
@ensureDeferred
async def test_dropping_a_tls_stream_stops_the_provider_at_once(
    upstream: Upstream, authority: Authority, patience: float, times: int
) -> None:
    """The provider cannot stream on, and a second drop changes nothing and raises nothing."""
    endless = Endless()
    with Provider(endless, tls=authority.server()) as provider:
        call, body = await begun(upstream(provider.url, authority.ca_path), patience)
        for _ in range(times):
            call.drop()
        assert await endless.left.happens(patience), "the provider streams on"
        assert await ended(body.ended, patience) is False
        call.drop()
        endless.stop()


@pytest.mark.trap("U10")
@ensureDeferred
async def test_a_response_that_is_not_read_lets_go_of_its_connection(
    upstream: Upstream, patience: float
) -> None:
    """A request that is given up with its head in and its body unasked for leaves no socket."""
    endless = Endless(pace=None)
    with Provider(endless) as provider:
        call, _ = await begun(upstream(provider.url), patience, read=False)
        call.cancel()
        assert await endless.left.happens(patience), "the provider's connection is kept"


@pytest.mark.trap("U10")
@ensureDeferred
async def test_refusals_leave_no_connections_behind(proxy: Ports) -> None:
    """Five requests that the provider refuses, one after the other, take one connection in all."""
    # More than comes in with the head: else there would be nothing left to be asked for.
    refusal = b"HTTP/1.1 500 No\r\nContent-Length: 300000\r\n\r\n" + b"x" * 300000

    def ask(port: int) -> set[bytes]:
        firsts = set()
        with connect(port) as wire:
            for _ in range(5):
                wire.send(request("GET", "/p/x"))
                first, fields = wire.read_head()
                wire.read_body(fields)
                firsts.add(first[:10])
        return firsts

    with Provider(Responding(refusal)) as provider:
        firsts = await thread(ask, proxy(provider.url))
        accepted = provider.accepted
    assert firsts == {b"HTTP/1.1 5"}
    assert accepted == 1
