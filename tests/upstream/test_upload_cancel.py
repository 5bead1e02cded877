"""A streamed body whose request is given up, or is answered early: its producer stops."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import pytest_twisted
from twisted.internet import reactor
from twisted.internet.defer import CancelledError, Deferred
from twisted.web.iweb import UNKNOWN_LENGTH, IBodyProducer
from zope.interface import implementer

from llmproxy.config import Provider as ProviderConfig
from llmproxy.config import Timeouts, Url
from llmproxy.errors import EndReason, ProxyError
from llmproxy.upstream.pool import OutgoingRequest, ProviderPool
from llmproxy.upstream.resolver import Resolver
from tests.support.fake_transport import Collector, until
from tests.support.sockets import Provider, Wire

CLOCK: Any = reactor


@implementer(IBodyProducer)
class Endless:
    """A request body without end, as fast as it is taken.

    Attributes:
        written: how many bytes were handed over.
        stopped: whether it was told to stop; Twisted's transports tell it, too.
    """

    length = UNKNOWN_LENGTH

    def __init__(self) -> None:
        self.written = 0
        self.stopped = False
        self.paused = False
        self._consumer: Any = None
        self._done: Deferred[None] = Deferred()

    def startProducing(self, consumer: Any) -> Deferred[None]:
        self._consumer = consumer
        consumer.registerProducer(self, True)
        self.resumeProducing()
        return self._done

    def resumeProducing(self) -> None:
        self.paused = False
        while not self.paused and not self.stopped:
            self.written += 65536
            self._consumer.write(bytes(65536))

    def pauseProducing(self) -> None:
        self.paused = True

    def stopProducing(self) -> None:
        if not self.stopped:
            self.stopped = True
            self._consumer.unregisterProducer()


def asked(provider: Provider, body: Endless) -> tuple[ProviderPool, Deferred[Any]]:
    """Send ``body`` to the provider."""
    url = Url(scheme="http", host="127.0.0.1", port=provider.port)
    agent = ProviderPool(
        CLOCK,
        CLOCK.seconds,
        ProviderConfig(name="p", url=url, dialect="raw"),  # type: ignore[arg-type]  # text will do
        resolver=Resolver(CLOCK, CLOCK.seconds),
        pool_idle=None,
        max_head=4096,
    )
    outgoing = OutgoingRequest(agent, b"/", [], b"", Timeouts(connect=5.0, first_byte=0.2))
    return agent, outgoing.request(b"POST", b"", None, body)


async def assert_stopped(agent: ProviderPool, body: Endless) -> None:
    """Nothing is left, the producer was told to stop, and it is not asked for more."""
    await until(lambda: not any(agent.counts().values()))
    assert body.stopped
    written = body.written
    body.resumeProducing()
    assert body.written == written


def reads_nothing(wire: Wire) -> None:
    """Take the head and no more, until the end."""
    wire.read_head()
    wire.wait_closed()


@pytest_twisted.ensureDeferred
async def test_a_cancelled_upload_stops_its_producer() -> None:
    """Whoever gives the request up need not know that it has a body."""
    body = Endless()
    with Provider(reads_nothing, receive_buffer=4096) as provider:
        agent, request = asked(provider, body)
        await until(lambda: body.paused)
        request.cancel()
        with pytest.raises(CancelledError):
            await request
        await assert_stopped(agent, body)


@pytest_twisted.ensureDeferred
async def test_a_provider_that_takes_no_more_of_a_body_is_given_up() -> None:
    """A body that stands still is under the deadline; one that moves is not."""

    def script(wire: Wire) -> None:
        wire.read_head()
        stalled.wait(10)

    stalled = threading.Event()
    body = Endless()
    with Provider(script, receive_buffer=4096) as provider:
        agent, request = asked(provider, body)
        with pytest.raises(ProxyError) as caught:
            await request
        stalled.set()
        await assert_stopped(agent, body)
    assert (caught.value.end, caught.value.cause) == (EndReason.UPSTREAM_TIMEOUT, "request")
    assert caught.value.may_have_run


@pytest_twisted.ensureDeferred
async def test_an_early_response_stops_the_producer() -> None:
    """The response is whole, the rest of the body is not sent, and its producer knows."""
    body = Endless()

    def script(wire: Wire) -> None:
        wire.read_head()
        wire.send(b"HTTP/1.1 413 Large\r\nContent-Length: 9\r\n\r\ntoo large")
        wire.wait_closed()

    with Provider(script, receive_buffer=4096) as provider:
        agent, request = asked(provider, body)
        collector = Collector()
        (await request).deliverBody(collector)
        await collector.ended
        assert collector.body == b"too large"
        await assert_stopped(agent, body)


@pytest.mark.parametrize("how", ["fin", "reset"])
@pytest_twisted.ensureDeferred
async def test_a_provider_that_leaves_stops_the_producer(how: str) -> None:
    """The connection's end inside the request's body is told to both sides."""
    body = Endless()

    def script(wire: Wire) -> None:
        wire.read(200_000)
        if how == "reset":
            wire.reset()

    with Provider(script) as provider:
        agent, request = asked(provider, body)
        with pytest.raises(ProxyError) as caught:
            await request
        await assert_stopped(agent, body)
    assert caught.value.end is EndReason.UPSTREAM_BROKEN
