"""The connections to one provider, pooled, with a deadline on every phase of a request.

A :class:`ProviderPool` stands for one provider.  It keeps idle connections apart by the credential
that was sent on them, so that nothing of one caller's connection can reach another caller.  It is
the ``IAgent`` that ``upstream/client.py`` hands to treq.  Each request is an
:class:`OutgoingRequest`, which carries the raw target and the field lines past treq, which would
change both (ADR-0002).  A connection comes from ``upstream/dialer.py``, and is
``upstream/http1.py``'s.

This module knows connections and clocks, and nothing of routes, clients or dialects.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Any

import msgspec
from twisted.internet.defer import Deferred
from twisted.python.failure import Failure
from twisted.web.http_headers import Headers
from twisted.web.iweb import UNKNOWN_LENGTH, IAgent, IBodyProducer
from zope.interface import implementer

from llmproxy.config import ParentProxy, Provider, Timeouts
from llmproxy.errors import upstream_timeout
from llmproxy.net.transport import is_quiet, raw_transport
from llmproxy.upstream.deadline import limit
from llmproxy.upstream.dialer import Dial, Dialer
from llmproxy.upstream.http1 import Connection, State
from llmproxy.upstream.resolver import Resolver
from llmproxy.upstream.response import Response

_HINT_MARGIN = 1.0
"""Seconds by which an idle connection is given up before its provider says that it does."""

_END = b"\r\n"
"""What the lines of a head are joined with, and what ends the last one and the head."""


class OutgoingRequest(msgspec.Struct, frozen=True):
    """One request on its way past treq to a provider's pool; treq takes it for the body.

    Attributes:
        target: path and query as they go on the wire.
        lines: the header fields to send, in order, without framing; as ``Upstream.send`` has them.
        credential: what idle connections are kept apart by.
        timeouts: of these, ``connect`` and ``first_byte`` are enforced here.
        began: called when a byte of the request may leave; a failure before that did no work.
        body: the body, or None.
        upgrades: the request asks for another protocol, with a 101; it has a connection of its own.
    """

    target: bytes
    lines: list[bytes]
    credential: bytes
    timeouts: Timeouts
    began: Callable[[], None] = lambda: None
    body: IBodyProducer | None = None
    upgrades: bool = False


@implementer(IAgent)
class ProviderPool:
    """The connections to one provider.

    Args:
        reactor: connects, resolves and keeps time.
        clock: monotonic seconds.
        provider: where to connect and whom to trust.
        resolver: resolves the provider's name.
        pool_idle: seconds that an idle connection is kept, or None for as long as it lives.
        max_head: most bytes of a response's head.
        direct: with the transports of ``net/``; else with Twisted's own.
        parent: the proxy through which the provider is reached, or None.
        timers: keeps the deadlines of requests; the reactor, where it is not given.
    """

    def __init__(
        self,
        reactor: Any,
        clock: Callable[[], float],
        provider: Provider,
        *,
        resolver: Resolver,
        pool_idle: float | None,
        max_head: int,
        direct: bool = True,
        parent: ParentProxy | None = None,
        timers: Any = None,
    ) -> None:
        self._reactor = reactor
        self._timers = reactor if timers is None else timers
        self._clock = clock
        self._most_idle = provider.pool  # the provider itself holds the credential, and is not kept
        self._pool_idle = pool_idle
        self._idle: dict[bytes, deque[Connection]] = {}
        self._idle_count = 0
        self._live: set[Connection] = set()
        self._last: set[Connection] = set()  # serve their last request
        self._connecting: set[Dial[Connection]] = set()
        self._dialer = Dialer(
            reactor,
            resolver,
            provider,
            max_head=max_head,
            became_idle=self._put,
            closed=self._forget,
            direct=direct,
            parent=parent,
        )
        self._expiry: Any = None
        self._expiry_at = math.inf
        host = provider.url.netloc.encode("ascii")
        self._host_line = b"host: " + host

    def counts(self) -> dict[str, int]:
        """Return how many connections there are by state: ``idle``, ``active``, ``connecting``."""
        active = len(self._live) - self._idle_count
        return {"idle": self._idle_count, "active": active, "connecting": len(self._connecting)}

    def retire(self) -> None:
        """Close idle connections, and from now on those that become idle; the others go on."""
        self._pool_idle = 0.0
        if self._expiry is not None:
            self._expiry.cancel()
            self._expiry, self._expiry_at = None, math.inf
        for connection in [one for idle in self._idle.values() for one in idle]:
            connection.abort()

    def drop(self, credential: bytes) -> None:
        """Close the idle connections of a credential, and its others when they become idle."""
        for connection in [one for one in self._live if one.pool_key == credential]:
            if connection in self._idle.get(credential, ()):
                connection.abort()
            else:
                self._last.add(connection)

    def close(self) -> None:
        """Close every connection, idle or not."""
        self.retire()
        for dial in list(self._connecting):
            dial.connected.cancel()
        for connection in list(self._live):
            connection.abort()

    # -- one request ----------------------------------------------------------------------------

    def request(
        self,
        method: bytes,
        uri: bytes,
        headers: Headers | None = None,
        bodyProducer: Any = None,
    ) -> Any:
        """Take an idle connection or make one, send the request on it, and await the head.

        Args:
            method: of the request.
            uri, headers: treq made them; they say nothing.
            bodyProducer: the :class:`OutgoingRequest`.

        Returns:
            fires with the :class:`Response`.  Cancelling it aborts whatever is under way at once.
            It fails with ``ProxyError``.
        """
        outgoing: OutgoingRequest = bodyProducer
        connection = None if outgoing.upgrades else self._take(outgoing.credential)
        if connection is not None:
            return self._ask(connection, outgoing, method)
        dial = self._dialer.connect(outgoing.credential)
        self._connecting.add(dial)
        connecting: Deferred[Any] = dial.connected
        late = partial(upstream_timeout, may_have_run=False)
        limit(self._timers, outgoing.timeouts.connect, connecting, lambda: dial.phase, late)
        connecting.addBoth(self._dialled, dial, outgoing)
        return connecting.addCallback(self._ask, outgoing, method)

    def _dialled(
        self, result: Connection | Failure, dial: Dial[Connection], outgoing: OutgoingRequest
    ) -> Connection | Failure:
        """The connection is there, or there will be none."""
        self._connecting.discard(dial)
        if not isinstance(result, Failure):
            self._live.add(result)
            if outgoing.upgrades:
                result.upgrades = True
                self._last.add(result)
        return result

    def _ask(
        self, connection: Connection, outgoing: OutgoingRequest, method: bytes
    ) -> Deferred[Response]:
        """Send the request and wait for its head: ``first_byte`` after it was sent.

        While a body is being sent, the clock begins anew as long as the provider takes some of it,
        or waits for more.
        """
        body = outgoing.body
        head = request_head(method, outgoing.target, self._host_line, outgoing.lines, body)
        outgoing.began()
        response = connection.send(method, head, body)
        connection.await_head(self._timers, outgoing.timeouts.first_byte)
        if self._dialer.secure:
            response.addCallback(self._remember, connection)
        return response

    def _remember(self, response: Response, connection: Connection) -> Response:
        self._dialer.remember(connection)
        return response

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
        """Keep a connection whose response is whole; behind a TLS layer from the next turn on.

        Until then the layer may forward what came in the same read: bytes that nobody asked for,
        which would become the next request's response, or the end.
        """
        transport = connection.transport
        if transport is raw_transport(transport):
            self._keep(connection)
        else:
            self._reactor.callLater(0, self._keep, connection)

    def _keep(self, connection: Connection) -> None:
        if connection.aborted or connection.state is not State.IDLE:
            return
        keep = math.inf if self._pool_idle is None else self._pool_idle
        if connection.keep_for is not None:
            keep = min(keep, connection.keep_for - _HINT_MARGIN)
        if self._idle_count >= self._most_idle or keep <= 0 or connection in self._last:
            connection.abort()
            return
        connection.expires_at = at = self._clock() + keep
        idle = self._idle.get(connection.pool_key)
        if idle is None:
            idle = self._idle[connection.pool_key] = deque()
        idle.append(connection)
        self._idle_count += 1
        if at < self._expiry_at:
            self._watch_expiry(at)

    def _forget(self, connection: Connection) -> None:
        self._live.discard(connection)
        self._last.discard(connection)
        idle = self._idle.get(connection.pool_key)
        if idle is None:
            return
        if connection in idle:
            idle.remove(connection)
            self._idle_count -= 1
        if not idle:
            del self._idle[connection.pool_key]

    def _watch_expiry(self, at: float) -> None:
        """Keep one timer, for the connection that expires first, which does at ``at``."""
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
                elif connection.expires_at < self._expiry_at:
                    self._watch_expiry(connection.expires_at)


def request_head(
    method: bytes, target: bytes, host_line: bytes, fields: list[bytes], body: IBodyProducer | None
) -> bytes:
    """Return the head of a request as it goes on the wire, with the framing of its body.

    Args:
        host_line: the field line of ``Host``.
        fields: the other field lines; one piece may hold several.
    """
    lines = [b"%b %b HTTP/1.1" % (method, target), host_line, *fields]
    if body is not None and body.length is UNKNOWN_LENGTH:
        lines.append(b"transfer-encoding: chunked")
    elif body is not None:
        lines.append(b"content-length: %d" % body.length)
    elif method in (b"POST", b"PUT", b"PATCH"):
        lines.append(b"content-length: 0")
    lines.append(_END)
    return _END.join(lines)
