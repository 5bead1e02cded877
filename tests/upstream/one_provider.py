"""One provider on loopback, and our side of it: a pool or a whole upstream with a turned clock."""

from __future__ import annotations

import queue
import socket
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, TypeVar

import pytest
from twisted.internet.defer import Deferred
from twisted.internet.threads import deferToThread
from twisted.web.client import ResponseDone
from twisted.web.iweb import UNKNOWN_LENGTH, IBodyProducer
from zope.interface import implementer

from llmproxy.config import Config, ParentProxy, Timeouts, Url
from llmproxy.config import Provider as ProviderConfig
from llmproxy.dialects.dialect import Dialect
from llmproxy.errors import ProxyError
from llmproxy.http1.grammar import Fields, field_lines
from llmproxy.upstream.client import Upstream
from llmproxy.upstream.pool import OutgoingRequest, ProviderPool
from llmproxy.upstream.resolver import Resolver
from llmproxy.upstream.response import Response
from tests.support.fake_transport import Collector, TurnedReactor, until
from tests.support.sockets import WAIT, Provider, Received, Wire

OFF = Timeouts(connect=None, first_byte=None)

AnyProvider = TypeVar("AnyProvider", bound=Provider)
T = TypeVar("T")


def plain(body: bytes, *fields: bytes, status: bytes = b"200 OK") -> bytes:
    """Return a response with a length."""
    lines = [b"HTTP/1.1 " + status, *fields, b"Content-Length: %d" % len(body)]
    return b"\r\n".join(lines) + b"\r\n\r\n" + body


OK = plain(b"ok")


class RespondingProvider(Provider):
    """A provider that sends the same response to every request.

    Args:
        response: its bytes; None reads whatever comes and sends nothing.

    Attributes:
        wires: each connection, when it begins.
        requests: each request.
        closed: an item for each connection that has ended.
    """

    def __init__(self, response: bytes | None = OK, **kwargs: Any) -> None:
        super().__init__(self._respond, **kwargs)
        self.response = response
        self.wires: queue.Queue[Wire] = queue.Queue()
        self.requests: queue.Queue[Received] = queue.Queue()
        self.closed: queue.Queue[None] = queue.Queue()

    def _respond(self, wire: Wire) -> None:
        self.wires.put(wire)
        try:
            if self.response is None:
                wire.wait_closed()
                return
            while True:
                self.requests.put(wire.read_request())
                wire.send(self.response)
        finally:
            self.closed.put(None)


async def take(notes: queue.Queue[T]) -> T:
    """Wait for the next item that a thread puts into a queue."""
    return await deferToThread(notes.get, True, WAIT)


async def read(response: Response) -> bytes:
    """Return the body of a response, whole or broken."""
    collector = Collector()
    response.deliverBody(collector)
    await collector.ended
    return collector.body


async def failure_of(request: Deferred[Response]) -> ProxyError:
    """Await a request that must fail, and return its error."""
    with pytest.raises(ProxyError) as caught:
        await request
    return caught.value


def has_ended(request: Deferred[Response]) -> bool:
    """Return whether there is a response, or will be none; a new connection alone is neither."""
    return request.called and not request.paused


def url_of(provider: Provider, host: str = "", scheme: str = "") -> Url:
    """Return where a provider is reached, perhaps by another name or in another scheme."""
    own_scheme, _, rest = provider.url.partition("://")
    own_host = rest.rpartition(":")[0]
    return Url(scheme=scheme or own_scheme, host=host or own_host, port=provider.port)


class Lookup:
    """A ``getaddrinfo`` that finds every name on loopback.

    Attributes:
        names: what was looked up, in order.
        error: raised instead, where it is set.
        hangs: tells whether the lookup of a name hangs, until :attr:`over` is set.
    """

    def __init__(self) -> None:
        self.names: list[str] = []
        self.error: Exception | None = None
        self.hangs: Callable[[str], bool] = lambda name: False
        self.over = threading.Event()

    def __call__(self, name: str, *_: object) -> list[Any]:
        self.names.append(name)
        if self.hangs(name):
            self.over.wait(WAIT)
        if self.error is not None:
            raise self.error
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", 0))]


class _Connections:
    """Real sockets, and a clock that the test turns."""

    def __init__(self) -> None:
        self.reactor = TurnedReactor()
        self.clock = self.reactor.clock

    def counts(self) -> dict[Any, int]:
        """Return the connections by their state."""
        raise NotImplementedError

    async def assert_nothing_left(self) -> None:
        """No connection and no timer stays."""
        await until(lambda: not any(self.counts().values()))
        assert not self.reactor.timers()


class OneProviderPool(_Connections):
    """The pool of one provider.

    Args:
        where: the provider, or its URL.
        ca: the authority's file, where the provider is trusted by it.
        resolver: a shared resolver, in the place of one that asks :attr:`lookup`.
        parent: the proxy through which the provider is reached.
        direct: with the transports of ``net/``; else with Twisted's own.
    """

    def __init__(
        self,
        where: Provider | Url,
        *,
        ca: Path | None = None,
        size: int = 10,
        pool_idle: float | None = 60.0,
        resolver: Resolver | None = None,
        parent: ParentProxy | None = None,
        direct: bool = True,
    ) -> None:
        super().__init__()
        self.lookup = Lookup()
        self.resolver = resolver or Resolver(
            self.reactor, self.clock.seconds, getaddrinfo=self.lookup
        )
        self.pool = ProviderPool(
            self.reactor,
            self.clock.seconds,
            ProviderConfig(
                name="p",
                url=url_of(where) if isinstance(where, Provider) else where,
                dialect=Dialect.RAW,
                ca=None if ca is None else str(ca),
                pool=size,
            ),
            resolver=self.resolver,
            pool_idle=pool_idle,
            max_head=4096,
            parent=parent,
            direct=direct,
        )

    def counts(self) -> dict[Any, int]:
        """Return the connections by their state."""
        return self.pool.counts()

    def send(
        self, method: bytes = b"GET", *, credential: bytes = b"", timeouts: Timeouts = OFF
    ) -> Deferred[Response]:
        """Send one request as treq would."""
        outgoing = OutgoingRequest(b"/", [], credential, timeouts)
        response: Any = self.pool.request(method, b"http://else.where/", None, outgoing)
        return response  # type: ignore[no-any-return]  # an IResponse to treq

    async def fetch(self, **kwargs: Any) -> bytes:
        """Send one request and return the body of its response."""
        return await read(await self.send(**kwargs))

    def assert_counts(self, *, idle: int = 0, active: int = 0, connecting: int = 0) -> None:
        """The pool has so many connections."""
        assert self.counts() == {"idle": idle, "active": active, "connecting": connecting}

    async def close(self) -> None:
        """Close what is open; nothing may be left."""
        self.lookup.over.set()
        self.pool.close()
        await self.assert_nothing_left()


class OneProviderUpstream(_Connections):
    """An upstream with one provider, ``p``, which is made anew for each configuration.

    Args:
        where: the provider, or its URL.
        ca: the authority's file, where the provider is trusted by it.
        parent: the proxy through which the provider is reached.
    """

    def __init__(
        self, where: Provider | Url, *, ca: Path | None = None, parent: ParentProxy | None = None
    ) -> None:
        super().__init__()
        url = url_of(where) if isinstance(where, Provider) else where
        self.provider = ProviderConfig(
            name="p",
            url=url,
            dialect=Dialect.RAW,
            ca=None if ca is None else str(ca),
            parent_proxy=None if parent is None else parent.url,
            parent_proxy_credential=None if parent is None else parent.credential,
        )
        self.upstream = Upstream(self.reactor, self.reactor.seconds, config_of(self.provider))

    def follow(self, *providers: ProviderConfig) -> Upstream:
        """Take up another configuration; return the upstream that there was before."""
        before = self.upstream
        config = config_of(*providers)
        self.upstream = Upstream(self.reactor, self.reactor.seconds, config, before=before)
        self.upstream.take_over(before)
        self.provider = config.providers.get("p", self.provider)
        return before

    def send(
        self,
        method: str = "GET",
        target: bytes = b"/",
        fields: Fields | None = None,
        body: bytes | IBodyProducer = b"",
        *,
        timeouts: Timeouts = OFF,
        through: Upstream | None = None,
    ) -> Deferred[Response]:
        """Send one request, perhaps through an upstream that there was before."""
        return (through or self.upstream).send(
            self.provider,
            method,
            target,
            field_lines(fields or []),
            body,
            credential=b"",
            timeouts=timeouts,
        )

    async def fetch(self, *args: Any, **kwargs: Any) -> tuple[Response, bytes]:
        """Send one request and return its response and whole body."""
        response = await self.send(*args, **kwargs)
        collector = Collector()
        response.deliverBody(collector)
        await collector.ended
        assert isinstance(collector.ends[0], ResponseDone)
        return response, collector.body

    def counts(self) -> dict[Any, int]:
        """Return the connections by (provider, state)."""
        return self.upstream.counts()

    def count(self, state: str) -> int:
        """Return how many connections to ``p`` are in this state."""
        return self.counts().get(("p", state), 0)

    async def close(self) -> None:
        """Close what is open; nothing may be left."""
        self.upstream.close()
        await self.assert_nothing_left()


def config_of(*providers: ProviderConfig, **parts: Any) -> Config:
    """Return a configuration of these providers."""
    return Config(providers={one.name: one for one in providers}, **parts)


@asynccontextmanager
async def pool_of(
    provider: AnyProvider, url: Url | None = None, **options: Any
) -> AsyncIterator[tuple[AnyProvider, OneProviderPool]]:
    """Start a provider and make its pool; behind the test nothing of the pool may be left."""
    with provider:
        pool = OneProviderPool(url or provider, **options)
        yield provider, pool
        await pool.close()


@asynccontextmanager
async def upstream_of(
    provider: AnyProvider, url: Url | None = None, **options: Any
) -> AsyncIterator[tuple[AnyProvider, OneProviderUpstream]]:
    """Start a provider and make an upstream; behind the test nothing of it may be left."""
    with provider:
        upstream = OneProviderUpstream(url or provider, **options)
        yield provider, upstream
        await upstream.close()


@implementer(IBodyProducer)
class PlayedBody:
    """A request body that the test produces.

    Attributes:
        consumer: what the test writes to, as soon as there is one.
        calls: ``pause``, ``resume`` and ``stop``, in order.
    """

    def __init__(self, length: Any = UNKNOWN_LENGTH) -> None:
        self.length = length
        self.consumer: Any = None
        self.calls: list[str] = []
        self.done: Deferred[None] = Deferred()

    def startProducing(self, consumer: Any) -> Deferred[None]:
        self.consumer = consumer
        consumer.registerProducer(self, True)
        return self.done

    def end(self) -> None:
        """The body is whole."""
        self.consumer.unregisterProducer()
        self.done.callback(None)

    def pauseProducing(self) -> None:
        self.calls.append("pause")

    def resumeProducing(self) -> None:
        self.calls.append("resume")

    def stopProducing(self) -> None:
        self.calls.append("stop")


class EagerBody(PlayedBody):
    """A request body without end, written as fast as it is taken.

    Attributes:
        written: how many bytes were written.
    """

    MOST = 100_000_000

    def __init__(self) -> None:
        super().__init__()
        self.written = 0

    @property
    def is_paused(self) -> bool:
        """Whether the last call was a pause."""
        return self.calls[-1:] == ["pause"]

    def startProducing(self, consumer: Any) -> Deferred[None]:
        done = super().startProducing(consumer)
        self._write()
        return done

    def resumeProducing(self) -> None:
        super().resumeProducing()
        self._write()

    def _write(self) -> None:
        while not self.is_paused and "stop" not in self.calls:
            assert self.written < self.MOST, "nobody pauses the body"
            self.written += 65536
            self.consumer.write(bytes(65536))
