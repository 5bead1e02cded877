"""How the body of a request goes out: held or streamed, paused, stopped, failed or overtaken."""

from __future__ import annotations

import queue
from typing import Any

import pytest
from pytest_twisted import ensureDeferred
from twisted.internet.defer import CancelledError
from twisted.web.iweb import UNKNOWN_LENGTH

from llmproxy.config import Timeouts
from llmproxy.errors import EndReason, ProxyError
from llmproxy.upstream.request_body import HeldBody
from tests.support.fake_transport import FakeTransport, until
from tests.support.kernel import held
from tests.support.sockets import WAIT, Provider, Wire
from tests.upstream.one_provider import (
    EagerBody,
    PlayedBody,
    RespondingProvider,
    failure_of,
    has_ended,
    plain,
    read,
    take,
    upstream_of,
)


@ensureDeferred
@pytest.mark.parametrize("size", [1, HeldBody.SLICE, HeldBody.SLICE + 1, 5_000_000])
async def test_a_body_arrives_as_it_is(size: int) -> None:
    """With its length, whole and once, whether it goes out at once or slice by slice."""
    body = (bytes(range(251)) * (size // 251 + 1))[:size]
    async with upstream_of(RespondingProvider()) as (provider, upstream):
        for _ in range(2):
            _, response = await upstream.fetch("POST", b"/", [], body)
            got = await take(provider.requests)
            assert (response, got.body) == (b"ok", body)
            assert got.values(b"content-length") == [b"%d" % size]
        assert provider.accepted == 1


@ensureDeferred
@pytest.mark.parametrize(
    ("method", "length"),
    [("GET", []), ("DELETE", []), ("HEAD", []), ("POST", [b"0"]), ("PUT", [b"0"])],
)
async def test_an_empty_body_is_announced_where_a_body_is_expected(
    method: str, length: list[bytes]
) -> None:
    """POST, PUT and PATCH without a body carry a length of zero, other methods none (RFC 9110)."""
    async with upstream_of(RespondingProvider(b"HTTP/1.1 204 No\r\n\r\n")) as (provider, upstream):
        await upstream.fetch(method, b"/", [], b"")
        got = await take(provider.requests)
        assert got.values(b"content-length") == length


@ensureDeferred
@pytest.mark.parametrize("length", [UNKNOWN_LENGTH, 5])
async def test_a_body_may_stream(length: Any) -> None:
    """With its length, or in chunks where that is not known; an empty piece ends nothing."""
    async with upstream_of(RespondingProvider()) as (provider, upstream):
        for _ in range(2):
            body = PlayedBody(length)
            request = upstream.send("POST", b"/", [], body)
            await until(lambda body=body: body.consumer)  # type: ignore[misc]  # the lambda's default
            for piece in (b"he", b"", b"llo"):
                body.consumer.write(piece)
            body.end()
            got = await take(provider.requests)
            assert got.body == b"hello"
            chunked = length is UNKNOWN_LENGTH
            assert got.values(b"transfer-encoding") == ([b"chunked"] if chunked else [])
            assert got.values(b"content-length") == ([] if chunked else [b"5"])
            assert await read(await request) == b"ok"
        assert provider.accepted == 1


@ensureDeferred
async def test_a_body_that_fails_on_the_way_fails_the_request() -> None:
    """The connection is aborted, so that the provider cannot take the body for whole."""
    seen: queue.Queue[str] = queue.Queue()

    def script(wire: Wire) -> None:
        wire.read_until(b"2\r\nhe\r\n")
        seen.put("half of the body")
        seen.put(wire.wait_closed())

    async with upstream_of(Provider(script)) as (_, upstream):
        body = PlayedBody()
        request = upstream.send("POST", b"/", [], body)
        await until(lambda: body.consumer)
        body.consumer.write(b"he")
        assert await take(seen) == "half of the body"
        error = ProxyError(413, "body_too_large", "Too large.")
        body.done.errback(error)
        assert await failure_of(request) is error
        assert await take(seen) in ("fin", "reset")


# --- a provider that takes nothing ----------------------------------------------------------------


@ensureDeferred
async def test_a_provider_that_does_not_read_pauses_the_body() -> None:
    """Backpressure reaches the producer of the body, and a cancelled request stops it."""
    go_on = queue.Queue[None]()

    def script(wire: Wire) -> None:
        go_on.get(timeout=WAIT)

    async with upstream_of(Provider(script, receive_buffer=65536)) as (provider, upstream):
        body = EagerBody()
        request = upstream.send("POST", b"/", [], body)
        await until(lambda: body.is_paused)
        assert body.written - held(peer=provider.port).written <= 2 * 65536
        request.cancel()
        with pytest.raises(CancelledError):
            await request
        await until(lambda: "stop" in body.calls)
        go_on.put(None)


@ensureDeferred
async def test_a_provider_that_takes_no_more_of_a_body_is_given_up() -> None:
    """A body that stands still is under the deadline of the first byte; one that moves is not."""
    more: queue.Queue[int] = queue.Queue()

    def script(wire: Wire) -> None:
        wire.read_head()
        while size := more.get(timeout=WAIT):
            wire.read(size)

    async with upstream_of(Provider(script, receive_buffer=4096)) as (provider, upstream):
        body = EagerBody()
        request = upstream.send("POST", b"/", [], body, timeouts=Timeouts(first_byte=10.0))
        await until(lambda: body.is_paused)

        def taken() -> int:
            ours = held(peer=provider.port)
            return ours.written - ours.unsent

        def is_late() -> bool:
            upstream.clock.advance(10.1)
            return has_ended(request)

        assert not is_late()
        before = taken()
        more.put(500_000)
        await until(lambda: taken() > before)
        assert not is_late()
        await until(is_late)
        error = await failure_of(request)
        await until(lambda: "stop" in body.calls)
        more.put(0)
    assert (error.end, error.cause) == (EndReason.UPSTREAM_TIMEOUT, "request")
    assert error.may_have_run


@ensureDeferred
async def test_an_upload_that_makes_progress_is_not_late() -> None:
    """``first_byte`` begins after the last byte of the body, however slowly the client sends it."""
    async with upstream_of(RespondingProvider()) as (provider, upstream):
        body = PlayedBody()
        request = upstream.send("POST", b"/", [], body, timeouts=Timeouts(first_byte=10.0))
        await until(lambda: body.consumer)
        for count in range(1, 6):
            body.consumer.write(b"x" * 100)
            await until(lambda count=count: held(local=provider.port).received > 100 * count)  # type: ignore[misc]  # the lambda's default
            upstream.clock.advance(9)
            assert not has_ended(request)
        upstream.clock.pump([10, 10])  # the provider waits for the client: that is not its fault
        assert not has_ended(request)
        body.end()
        assert await read(await request) == b"ok"


# --- a provider that is done before the body is ---------------------------------------------------


@ensureDeferred
async def test_an_early_response_is_delivered_and_ends_the_upload() -> None:
    """A response that comes before the end of the body is delivered, and no more is sent."""
    size = 30_000_000
    received: queue.Queue[int] = queue.Queue()

    def refuse(wire: Wire) -> None:
        wire.read_until(b"\r\n\r\n")
        wire.send(plain(b"too large", status=b"413 Too Large"))
        count = len(wire.buffer)
        try:
            while data := wire.sock.recv(65536):
                count += len(data)
        finally:
            received.put(count)

    async with upstream_of(Provider(refuse, receive_buffer=65536)) as (_, upstream):
        response, body = await upstream.fetch("POST", b"/", [], bytes(size))
        assert (response.code, body) == (413, b"too large")
        assert await take(received) < size


@pytest.mark.parametrize("how", ["fin", "reset"])
@ensureDeferred
async def test_a_provider_that_leaves_stops_the_producer(how: str) -> None:
    """The end of the connection inside the request's body is reported to both sides."""

    def script(wire: Wire) -> None:
        wire.read(200_000)
        if how == "reset":
            wire.reset()

    async with upstream_of(Provider(script)) as (_, upstream):
        body = EagerBody()
        error = await failure_of(upstream.send("POST", b"/", [], body))
        await until(lambda: "stop" in body.calls)
    assert error.end is EndReason.UPSTREAM_BROKEN


# --- a body in memory -----------------------------------------------------------------------------


def test_a_short_body_is_written_at_once() -> None:
    """Up to one slice there is nothing to wait for."""
    transport = FakeTransport()
    done = HeldBody(b"abc").startProducing(transport)

    assert done.called
    assert transport.writes == [b"abc"]
    assert transport.producer is None


def test_a_long_body_is_a_pull_producer() -> None:
    """Each slice is written when the one before is sent; the last one ends the body."""
    transport = FakeTransport()
    body = HeldBody(b"x" * (HeldBody.SLICE + 1))
    done = body.startProducing(transport)
    whole: list[None] = []
    done.addCallback(whole.append)
    assert transport.streaming is False
    body.resumeProducing()
    body.pauseProducing()
    assert not whole
    body.resumeProducing()

    assert whole == [None]
    assert [len(piece) for piece in transport.writes] == [HeldBody.SLICE, 1]
    assert transport.producer is None


@pytest.mark.parametrize("how", ["stop", "cancel"])
def test_a_long_body_can_be_stopped(how: str) -> None:
    """A stopped body writes no more, lets go of the transport and never says that it was whole."""
    transport = FakeTransport()
    body = HeldBody(b"x" * (HeldBody.SLICE * 3))
    done = body.startProducing(transport)
    whole: list[Any] = []
    done.addCallbacks(whole.append, lambda failure: failure.trap(CancelledError))
    body.resumeProducing()
    body.stopProducing() if how == "stop" else done.cancel()
    body.resumeProducing()
    body.stopProducing()

    assert not whole
    assert len(transport.writes) == 1
    assert transport.producer is None
