"""Names that hang, fail or cannot be looked up at all: who waits, and what is left."""

from __future__ import annotations

import gc
import socket
import threading
import weakref
from typing import Any

import pytest
import pytest_twisted
from twisted.internet import reactor
from twisted.internet.defer import Deferred

from llmproxy.config import Provider as ProviderConfig
from llmproxy.config import Timeouts, Url
from llmproxy.errors import EndReason, ProxyError
from llmproxy.upstream.pool import OutgoingRequest, ProviderPool
from llmproxy.upstream.resolver import Resolver
from tests.support.fake_transport import Collector, until
from tests.support.sockets import WAIT, Provider, Wire

CLOCK: Any = reactor


def agent_for(resolver: Resolver, port: int, host: str = "p.example") -> ProviderPool:
    """Return an agent for a provider that is reached by its name."""
    url = Url(scheme="http", host=host, port=port)
    provider = ProviderConfig(name="p", url=url, dialect="raw")  # type: ignore[arg-type]  # text will do
    return ProviderPool(
        CLOCK, CLOCK.seconds, provider, resolver=resolver, pool_idle=None, max_head=4096
    )


def ask(agent: ProviderPool) -> Deferred[Any]:
    """Send a request."""
    outgoing = OutgoingRequest(agent, b"/", [], b"", Timeouts(connect=2.0, first_byte=5.0))
    return outgoing.request(b"GET", b"", None, None)


def response(wire: Wire) -> None:
    """Answer one request."""
    wire.read_request()
    wire.send(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: close\r\n\r\nok")


class Lookup:
    """A ``getaddrinfo`` that finds everything on loopback, but for what hangs."""

    def __init__(self) -> None:
        self.over = threading.Event()
        self.asked: list[str] = []

    def __call__(self, host: str, *_: Any) -> list[Any]:
        self.asked.append(host)
        if host.startswith("hangs"):
            self.over.wait(WAIT)
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", 0))]


async def fetched(agent: ProviderPool) -> bytes:
    """Send a request, take its body, and close everything."""
    body = Collector()
    (await ask(agent)).deliverBody(body)
    await body.ended
    agent.close()
    await until(lambda: not any(agent.counts().values()))
    return body.body


@pytest_twisted.ensureDeferred
async def test_a_hanging_name_delays_no_other_provider() -> None:
    """Twenty names hang at once; the provider whose name is found is asked meanwhile."""
    lookup = Lookup()
    resolver = Resolver(CLOCK, CLOCK.seconds, getaddrinfo=lookup)
    hanging = [agent_for(resolver, 1, f"hangs{number}.example") for number in range(20)]
    asked = [ask(agent) for agent in hanging]
    with Provider(response) as provider:
        assert await fetched(agent_for(resolver, provider.port)) == b"ok"
    for request, agent in zip(asked, hanging, strict=True):
        assert not request.called
        request.addErrback(lambda failure: None)
        agent.close()
    lookup.over.set()
    await until(lambda: not [one for one in threading.enumerate() if one.name.startswith("name-")])


@pytest_twisted.ensureDeferred
async def test_requests_that_left_are_not_kept_by_a_name_that_hangs() -> None:
    """However long a lookup takes, whoever gave up on it is forgotten before it ends."""
    lookup = Lookup()
    resolver = Resolver(CLOCK, CLOCK.seconds, getaddrinfo=lookup)
    agent = agent_for(resolver, 1, "hangs.example")
    gone: list[weakref.ref[Any]] = []
    for _ in range(5):
        outgoing = OutgoingRequest(agent, b"/", [], b"", Timeouts())
        request: Any = outgoing.request(b"GET", b"", None, None)
        (attempt,) = agent._connecting
        gone.append(weakref.ref(attempt))
        request.addErrback(lambda failure: None)
        request.cancel()
        del outgoing, request, attempt
    gc.collect()
    left = [ref for ref in gone if ref() is not None]
    waiting = sum(len(some) for some in resolver._waiting.values())
    lookup.over.set()
    await until(lambda: not resolver._waiting)
    assert left == []
    assert waiting == 0


@pytest_twisted.ensureDeferred
async def test_a_lookup_that_cannot_begin_fails_its_request_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Where no thread can be started the request fails, and the next one is looked up again."""

    def no_more(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    resolver = Resolver(CLOCK, CLOCK.seconds, getaddrinfo=Lookup())
    with Provider(response) as provider:
        agent = agent_for(resolver, provider.port)
        with monkeypatch.context() as patch:
            patch.setattr(threading.Thread, "start", no_more)
            failed = ask(agent)
        with pytest.raises(ProxyError) as caught:
            await failed
        assert caught.value.end in (EndReason.UPSTREAM_UNREACHABLE, EndReason.REJECTED)
        assert await fetched(agent) == b"ok"
