"""The ``IAgent`` under treq: connections to one provider, pooled, with a deadline on every phase.

A :class:`ProviderAgent` stands for one provider.  Its idle connections are kept apart by the
credential that went over them, so that nothing of one caller's connection can reach another's.
Each request is an :class:`Order`, an ``IAgent`` of its own that treq is handed: it carries the raw
target and the header fields past treq, which would change both (ADR-0002).

This module knows sockets and clocks, and nothing of routes, clients or dialects.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from typing import Any, TypeVar, cast

from twisted.internet.defer import CancelledError, Deferred
from twisted.internet.endpoints import HostnameEndpoint, wrapClientTLS
from twisted.internet.error import ConnectError, ConnectingCancelledError, DNSLookupError
from twisted.internet.interfaces import IProtocolFactory
from twisted.internet.protocol import Factory
from twisted.web.http_headers import Headers
from twisted.web.iweb import IAgent, IBodyProducer, IResponse
from zope.interface import implementer

from llmproxy.config import Provider, Timeouts
from llmproxy.errors import (
    ProxyError,
    upstream_timeout,
    upstream_tls,
    upstream_unreachable,
)
from llmproxy.upstream.answer import Answer
from llmproxy.upstream.http1 import Connection
from llmproxy.upstream.tls import client_options
from llmproxy.wire.grammar import Fields
from llmproxy.wire.transport import is_quiet

_HINT_MARGIN = 1.0
"""Seconds by which an idle connection is given up before its provider says that it does."""

_Result = TypeVar("_Result")


@implementer(IAgent)
class Order:
    """One request on its way past treq to a provider's agent.

    Args:
        target: path and query as they go on the wire.
        fields: the header fields to send, in order, without framing.
        credential: what idle connections are kept apart by.
        timeouts: ``connect`` and ``first_byte`` are kept here.
    """

    def __init__(
        self,
        agent: ProviderAgent,
        target: bytes,
        fields: Fields,
        credential: bytes,
        timeouts: Timeouts,
    ) -> None:
        self._agent = agent
        self.target = target
        self.fields = fields
        self.credential = credential
        self.timeouts = timeouts
        self.sent = False
        """Whether a byte of the request may have left; a failure before that did no work."""

    def request(
        self,
        method: bytes,
        uri: bytes,
        headers: Headers | None = None,
        bodyProducer: IBodyProducer | None = None,
    ) -> Deferred[IResponse]:
        """Send it; the ``uri`` and ``headers`` that treq made are left aside."""
        return cast("Deferred[IResponse]", self._agent.send(self, method, bodyProducer))


class ProviderAgent:
    """The connections to one provider.

    Args:
        reactor: connects, resolves and keeps time.
        clock: monotonic seconds.
        provider: where to connect and whom to trust.
        pool_idle: seconds that an idle connection is kept, or None for as long as it lives.
        max_head: most bytes of an answer's head.
    """

    def __init__(
        self,
        reactor: Any,
        clock: Callable[[], float],
        provider: Provider,
        *,
        pool_idle: float | None,
        max_head: int,
    ) -> None:
        self._reactor = reactor
        self._clock = clock
        self._provider = provider
        self._pool_idle = pool_idle
        self._max_head = max_head
        self._idle: dict[bytes, deque[Connection]] = {}
        self._idle_count = 0
        self._live: set[Connection] = set()
        self._connecting = 0
        self._tls = client_options(provider)
        self._expiry: Any = None
        self._expiry_at = math.inf
        host = provider.url.netloc.encode("ascii")
        self._host_line = b"host: " + host + b"\r\n"

    def counts(self) -> dict[str, int]:
        """Return how many connections there are by state: ``idle``, ``active``, ``connecting``."""
        active = len(self._live) - self._idle_count
        return {"idle": self._idle_count, "active": active, "connecting": self._connecting}

    def close(self) -> None:
        """Close every connection, idle or not."""
        if self._expiry is not None:
            self._expiry.cancel()
            self._expiry, self._expiry_at = None, math.inf
        for connection in list(self._live):
            connection.abort()

    # -- one request ----------------------------------------------------------------------------

    def send(self, order: Order, method: bytes, body: IBodyProducer | None) -> Deferred[Answer]:
        """Connect or take an idle connection, send ``order`` on it and await its head.

        Returns:
            fires with the :class:`Answer`.  Cancelling it aborts whatever is under way at once.  It
            fails with ``ProxyError``.
        """
        return Deferred.fromCoroutine(self._send(order, method, body))

    async def _send(self, order: Order, method: bytes, body: IBodyProducer | None) -> Answer:
        connection = self._take(order.credential)
        if connection is None:
            connection = await self._within(
                order.timeouts.connect, "connecting", self._connect(order.credential), order
            )
        head = self._head(method, order, body)
        order.sent = True
        return await self._within(
            order.timeouts.first_byte,
            "the answer's head",
            connection.send(method, head, body),
            order,
        )

    async def _within(
        self, seconds: float | None, phase: str, step: Deferred[_Result], order: Order
    ) -> _Result:
        """Await ``step`` for at most so many seconds; whoever gives up cancels it."""
        if seconds is None:
            return await step
        expired = False

        def expire() -> None:
            nonlocal expired
            expired = True
            step.cancel()

        timer = self._reactor.callLater(seconds, expire)
        try:
            return await step
        except Exception:
            if expired:
                raise upstream_timeout(phase, may_have_run=order.sent) from None
            raise
        finally:
            if timer.active():
                timer.cancel()

    def _head(self, method: bytes, order: Order, body: IBodyProducer | None) -> bytes:
        lines = [method, b" ", order.target, b" HTTP/1.1\r\n", self._host_line]
        for name, value in order.fields:
            lines += (name, b": ", value, b"\r\n")
        if body is not None:
            lines.append(b"content-length: %d\r\n" % body.length)
        elif method in (b"POST", b"PUT", b"PATCH"):
            lines.append(b"content-length: 0\r\n")
        lines.append(b"\r\n")
        return b"".join(lines)

    # -- connecting -----------------------------------------------------------------------------

    def _connect(self, credential: bytes) -> Deferred[Connection]:
        return Deferred.fromCoroutine(self._open(credential))

    async def _open(self, credential: bytes) -> Connection:
        url = self._provider.url
        connection = Connection(
            max_head=self._max_head,
            became_idle=self._put,
            closed=self._forget,
            secure=self._tls is not None,
        )
        connection.pool_key = credential
        # The deadline is ours, over the name, TCP and TLS together; the endpoint's own would end
        # at TCP.
        endpoint: Any = HostnameEndpoint(
            self._reactor, url.host, url.port, timeout=cast("float", None)
        )
        if self._tls is not None:
            endpoint = wrapClientTLS(self._tls, endpoint)
        self._connecting += 1
        try:
            factory = Factory.forProtocol(lambda: connection)
            factory.noisy = False
            await endpoint.connect(cast(IProtocolFactory, factory))
            await connection.ready
        except (CancelledError, ConnectingCancelledError):
            raise CancelledError from None
        except Exception as error:
            raise _why_not_connected(error, secure=self._tls is not None) from error
        finally:
            self._connecting -= 1
        self._live.add(connection)
        return connection

    # -- the pool -------------------------------------------------------------------------------

    def _take(self, credential: bytes) -> Connection | None:
        """Return the connection that was used last and on which nothing waits to be read."""
        idle = self._idle.get(credential)
        while idle:
            connection = idle.pop()
            self._idle_count -= 1
            if not connection.aborted and is_quiet(connection.transport):
                return connection
            connection.abort()
        return None

    def _put(self, connection: Connection) -> None:
        keep = math.inf if self._pool_idle is None else self._pool_idle
        if connection.keep_for is not None:
            keep = min(keep, connection.keep_for - _HINT_MARGIN)
        if self._idle_count >= self._provider.pool or keep <= 0:
            connection.abort()
            return
        connection.expires_at = self._clock() + keep
        self._idle.setdefault(connection.pool_key, deque()).append(connection)
        self._idle_count += 1
        self._watch_expiry(connection.expires_at)

    def _forget(self, connection: Connection) -> None:
        self._live.discard(connection)
        idle = self._idle.get(connection.pool_key)
        if idle is None:
            return
        if connection in idle:
            idle.remove(connection)
            self._idle_count -= 1
        if not idle:
            del self._idle[connection.pool_key]

    def _watch_expiry(self, at: float) -> None:
        """Keep one timer, for the connection that expires first."""
        if at >= self._expiry_at:
            return
        if self._expiry is not None:
            self._expiry.cancel()
        self._expiry_at = at
        self._expiry = self._reactor.callLater(max(0.0, at - self._clock()), self._expire)

    def _expire(self) -> None:
        """Close what was idle for too long."""
        self._expiry, self._expiry_at = None, math.inf
        now = self._clock()
        for idle in list(self._idle.values()):
            for connection in list(idle):
                if now >= connection.expires_at:
                    connection.abort()
                else:
                    self._watch_expiry(connection.expires_at)


def _why_not_connected(error: Exception, *, secure: bool) -> ProxyError:
    """Tell apart the ways in which no connection came about."""
    detail = f"{type(error).__name__}: {error}"
    if isinstance(error, (ConnectError, DNSLookupError)) or not secure:
        return upstream_unreachable(detail)
    return upstream_tls(detail)
