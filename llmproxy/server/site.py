"""The listener's factory: one resource, and the client connections to it.

``Site`` is Twisted's, without its access log, its HTTP/2 and its timers.  One sweep looks at the
deadlines of every connection (``server/connection.py``): ten thousand quiet ones cost one timer.
Nothing here knows providers, routes or dialects; whatever must be asked of them is passed in.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from twisted.internet.defer import Deferred, succeed
from twisted.internet.interfaces import IAddress
from twisted.internet.task import LoopingCall
from twisted.logger import Logger
from twisted.web import http, server
from twisted.web.resource import IResource

from llmproxy.config import Limits, Timeouts
from llmproxy.errors import ClientGone, Cut, ProxyError
from llmproxy.net.transport import pending_bytes
from llmproxy.server.connection import ClientConnection, Phase
from llmproxy.server.connection_limits import ConnectionLimiter, RejectedConnection
from llmproxy.server.error_response import bare_response
from llmproxy.server.request import Request

_TIMEOUTS, _LIMITS = Timeouts(), Limits()

_log = Logger()


class Site(server.Site):
    """The listener's factory: one resource, and the connections to it.

    Args:
        resource: serves every request.
        reactor: keeps time.
        clock: monotonic seconds.
        timeouts: the deadlines towards clients.
        limits: what a request may hold.
        body_limit: from a raw target to the most bytes of its body; by default it has none.
        holds_body: from a request to whether its body is held before it is served, rather than
            streamed; by default it always is.
        early_refusal: from a request whose body is still to come to why it is refused, if it is.
        abandoned: called with a request that ended before it could be served, and why.
        malformed: from a peer's address and the error where a head was refused to the response.
        limiter: counts the connections, and says which are too many; by default none is.

    Attributes:
        channels: the open client connections.
        held_bytes: request bodies held in memory now, in bytes.
        ended: requests that were served to whatever end.
        draining: no connection outlives its present request.
    """

    displayTracebacks = False  # noqa: N815 - Twisted's name
    noisy = False

    def __init__(
        self,
        resource: IResource,
        reactor: Any,
        clock: Callable[[], float],
        timeouts: Timeouts = _TIMEOUTS,
        limits: Limits = _LIMITS,
        *,
        body_limit: Callable[[bytes], int] = lambda target: 0,
        holds_body: Callable[[Request], bool] = lambda request: True,
        early_refusal: Callable[[Request], ProxyError | None] = lambda request: None,
        abandoned: Callable[[Request, ClientGone], None] = lambda request, why: None,
        malformed: Callable[[str, ProxyError], bytes] = lambda peer, error: bare_response(error),
        limiter: ConnectionLimiter | None = None,
    ) -> None:
        super().__init__(resource, reactor=reactor)
        self.clock = clock
        self.timeouts = timeouts
        self.limits = limits
        self.body_limit = body_limit
        self.holds_body = holds_body
        self.early_refusal = early_refusal
        self.abandoned = abandoned
        self.malformed = malformed
        self.limiter = ConnectionLimiter() if limiter is None else limiter
        self.connections: set[ClientConnection] = set()
        self.held_bytes = 0
        self.ended = 0
        self.draining = False
        self._waiting: list[Deferred[None]] = []
        self._sweep = LoopingCall(self._check_all)
        self._sweep.clock = reactor
        self._listening = False

    def serve(
        self,
        resource: IResource,
        *,
        body_limit: Callable[[bytes], int],
        holds_body: Callable[[Request], bool],
        early_refusal: Callable[[Request], ProxyError | None],
    ) -> None:
        """Let requests be served by another resource; those whose head is in keep their own."""
        self.resource = resource
        self.body_limit = body_limit
        self.holds_body = holds_body
        self.early_refusal = early_refusal

    def follow(self, timeouts: Timeouts, limits: Limits) -> None:
        """Keep other deadlines and limits; what a client has begun keeps its own.

        Whoever is idle begins to be idle anew where that deadline is another one.
        """
        idle_before, self.timeouts, self.limits = self.timeouts.client_idle, timeouts, limits
        if timeouts.client_idle != idle_before:
            for channel in self.connections:
                if channel.phase is Phase.IDLE:
                    channel.await_request()
        if self._sweep.running and self._sweep.interval != self._sweep_interval():
            self._sweep.stop()
            self._keep_sweeping()

    def buildProtocol(  # type: ignore[override]  # Twisted's own wrapper is there for HTTP/2
        self, addr: IAddress | None
    ) -> ClientConnection | RejectedConnection:
        """Serve one more connection, in HTTP/1.1 and nothing else, or turn it away.

        Args:
            addr: the client's; None where a balancer is yet to say it.
        """
        address = getattr(addr, "host", None)  # a Unix socket has none
        refusal = self.limiter.enter(address)
        if refusal is not None:
            return self.limiter.turn_away(refusal, self.reactor)
        return ClientConnection(self, address)

    def acceptableProtocols(self) -> list[bytes]:
        """Offer HTTP/1.1 alone: Twisted's HTTP/2 ends broken streams as if they were whole."""
        return [b"http/1.1"]

    def startFactory(self) -> None:
        """Listening begins; Twisted's access log stays out of it."""
        self._listening = True
        self._keep_sweeping()

    def stopFactory(self) -> None:
        """Listening ends; running responses go on."""
        self._listening = False
        self._keep_sweeping()

    def log(self, request: http.Request) -> None:
        """Write no access line: the gateway does, without keys and queries."""

    def joined(self, channel: ClientConnection) -> None:
        """A client has connected."""
        self.connections.add(channel)
        self._keep_sweeping()

    def left(self, channel: ClientConnection) -> None:
        """A client's connection is gone."""
        self.connections.discard(channel)
        self.limiter.leave(channel.address)
        if not self.connections:
            waiting, self._waiting = self._waiting, []
            for deferred in waiting:
                deferred.callback(None)
        self._keep_sweeping()

    def pending_bytes(self) -> int:
        """Return what was written to clients and not yet taken by the kernel, in bytes."""
        return sum(pending_bytes(channel.transport) for channel in self.connections)

    def drain(self) -> None:
        """Close idle connections after a short grace, the others after their present request.

        Where the head of a response has left already, its client was not told: it may send one more
        request within the grace, and is told then.
        """
        self.draining = True
        for channel in list(self.connections):
            if channel.phase is Phase.IDLE:
                channel.await_request()

    def when_empty(self) -> Deferred[None]:
        """Fire once no client is connected; at once where none is."""
        if not self.connections:
            return succeed(None)
        waiting: Deferred[None] = Deferred()
        self._waiting.append(waiting)
        return waiting

    def cut(self) -> None:
        """Drop every connection now."""
        for channel in list(self.connections):
            for request in list(channel.requests):
                request.abort(Cut())
            channel.abort()

    def _keep_sweeping(self) -> None:
        wanted = self._listening or bool(self.connections)
        if wanted and not self._sweep.running:
            self._sweep.start(self._sweep_interval(), now=False)
        elif not wanted and self._sweep.running:
            self._sweep.stop()

    def _sweep_interval(self) -> float:
        shortest = min((s for s in _seconds(self.timeouts) if s is not None), default=4.0)
        return min(max(shortest / 4, 0.02), 1.0)

    def _check_all(self) -> None:
        now = self.clock()
        for channel in list(self.connections):
            try:
                channel.check(now)
            except Exception:
                _log.failure("a connection could not be checked")
                channel.abort()


def _seconds(timeouts: Timeouts) -> tuple[float | None, ...]:
    return (
        timeouts.request_head,
        timeouts.request_body,
        timeouts.client_idle,
        timeouts.client_stall,
    )
