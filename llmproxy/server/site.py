"""The listener's factory: the client connections, and the router that finds their handlers.

One sweep looks at the deadlines of every connection (``server/connection.py``): ten thousand quiet
ones cost one timer.  Nothing here knows providers, routes or dialects; they are a handler's
business (``server/handler.py``).
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from typing import Any

from twisted.internet.defer import Deferred, succeed
from twisted.internet.interfaces import IAddress, IProtocolNegotiationFactory
from twisted.internet.protocol import Factory
from twisted.internet.task import LoopingCall
from twisted.logger import Logger
from zope.interface import implementer

from llmproxy.config import Limits, Timeouts
from llmproxy.errors import ClientGone, ProxyError
from llmproxy.net.transport import host_of, pending_bytes
from llmproxy.server.body_memory import BodyMemory
from llmproxy.server.connection import ClientConnection, Phase
from llmproxy.server.connection_limits import ConnectionLimiter, RejectedConnection
from llmproxy.server.error_response import bare_response
from llmproxy.server.handler import Router
from llmproxy.server.request import Request

_TIMEOUTS, _LIMITS = Timeouts(), Limits()

_TELL_EVERY_S, _MOST_TOLD = 60.0, 1024
"""How often the same address is named, and how many addresses are remembered for that."""

_AT_ONCE = 64
"""Connections that the sweep looks at in one turn, within two tenths of a millisecond."""

_ENDS = 16
"""Connections of clients that have left which are closed in one turn, within a millisecond."""

_log = Logger()


@implementer(IProtocolNegotiationFactory)
class Site(Factory):
    """The listener's factory.

    Args:
        router: finds the handler of each request.
        reactor: keeps time.
        clock: monotonic seconds.
        timeouts: the deadlines towards clients.
        limits: what a request may hold.
        wall: seconds since the epoch.
        abandoned: called with a request that ended before it could be served, and why.
        malformed: from a peer's address and the error where a head was refused to the response; by
            default a bare one.
        limiter: counts the connections, and says which are too many; by default none is.

    Attributes:
        router: finds the handlers of the requests that come from now on.
        connections: the open client connections.
        memory: the request bodies that are held.
        ended: requests that were served to whatever end.
        draining: no connection outlives its present request.
    """

    noisy = False

    def __init__(
        self,
        router: Router,
        reactor: Any,
        clock: Callable[[], float],
        timeouts: Timeouts = _TIMEOUTS,
        limits: Limits = _LIMITS,
        *,
        wall: Callable[[], float],
        abandoned: Callable[[Request, ClientGone], None] = lambda request, why: None,
        malformed: Callable[[str, ProxyError], bytes] | None = None,
        limiter: ConnectionLimiter | None = None,
    ) -> None:
        self.router = router
        self.reactor = reactor
        self.clock = clock
        self.timeouts = timeouts
        self.limits = limits
        self.abandoned = abandoned
        self.malformed = malformed or (lambda peer, error: bare_response(error, now=wall()))
        self.limiter = limiter or ConnectionLimiter(clock=clock, wall=wall)
        self.connections: set[ClientConnection] = set()
        self.memory = BodyMemory(limits.request_memory, clock)
        self.ended = 0
        self.draining = False
        self._waiting: list[Deferred[None]] = []
        self._sweep = LoopingCall(self._check_all)
        self._sweep.clock = reactor
        self._leaving: deque[ClientConnection] = deque()
        self._unchecked: list[ClientConnection] = []  # what is left of a sweep
        self._rest: Any = None  # the turn in which it goes on
        self._listening = False
        self._told_at: dict[str, float] = {}

    def serve(self, router: Router) -> None:
        """Find handlers by another router; a request whose head is in keeps its own handler."""
        self.router = router

    def follow(self, timeouts: Timeouts, limits: Limits) -> None:
        """Keep other deadlines and limits; what a client has begun keeps its own.

        Where the deadline of idle connections is another one, they begin to be idle anew.
        """
        idle_before, self.timeouts, self.limits = self.timeouts.client_idle, timeouts, limits
        self.memory.limit = limits.request_memory
        if timeouts.client_idle != idle_before:
            for connection in self.connections:
                if connection.phase is Phase.IDLE:
                    connection.await_request()
        if self._sweep.running and self._sweep.interval != self._sweep_interval():
            self._sweep.stop()
            self._keep_sweeping()

    def buildProtocol(self, addr: IAddress | None) -> ClientConnection | RejectedConnection:
        """Serve one more connection, in HTTP/1.1 and nothing else, or reject it.

        Args:
            addr: the client's; None where a balancer is yet to say it.
        """
        address = host_of(addr)
        refusal = self.limiter.enter(address)
        if refusal is not None:
            return self.limiter.reject(refusal, self.reactor)
        return ClientConnection(self, address, addr)

    def acceptableProtocols(self) -> list[bytes]:
        """Offer HTTP/1.1 alone: Twisted's HTTP/2 ends broken streams as if they were whole."""
        return [b"http/1.1"]

    def startFactory(self) -> None:
        """Listening begins."""
        self._listening = True
        self._keep_sweeping()

    def stopFactory(self) -> None:
        """Listening ends; running responses go on."""
        self._listening = False
        self._keep_sweeping()

    def joined(self, connection: ClientConnection) -> None:
        """A client has connected."""
        self.connections.add(connection)
        self._keep_sweeping()

    def left(self, connection: ClientConnection) -> None:
        """A client's connection is gone."""
        self.connections.discard(connection)
        self.limiter.leave(connection.address)
        self._keep_sweeping()
        if not self.connections:
            waiting, self._waiting = self._waiting, []
            for deferred in waiting:
                deferred.callback(None)

    def close_soon(self, connection: ClientConnection) -> None:
        """Close the connection of a client that has left, in one of the next turns."""
        if not self._leaving:
            self.reactor.callLater(0, self._close_some)
        self._leaving.append(connection)

    def _close_some(self) -> None:
        """Close some, and the others in the next turns: each costs what an event costs."""
        for _ in range(min(len(self._leaving), _ENDS)):
            connection = self._leaving.popleft()
            if connection in self.connections:
                connection.close_left()
        if self._leaving:
            self.reactor.callLater(0, self._close_some)

    def report_tls(self, peer: str) -> None:
        """Log, once a minute for each address, that a client speaks TLS where none is spoken."""
        now = self.clock()
        if now - self._told_at.get(peer, -math.inf) < _TELL_EVERY_S:
            return
        if len(self._told_at) >= _MOST_TOLD:
            self._told_at.clear()
        self._told_at[peer] = now
        _log.warn(
            "{peer} speaks TLS on a port where none is spoken: it must use http:// and ws:// here, "
            "also in HTTPS_PROXY, or a port of listen_tls (OpenAI's Realtime for npm always speaks "
            "wss://)",
            peer=peer,
        )

    def pending_bytes(self) -> int:
        """Return what was written to clients and not yet taken by the kernel, in bytes."""
        transports = [connection.transport for connection in self.connections]
        return sum(pending_bytes(one) for one in transports if getattr(one, "may_hold", True))

    def drain(self) -> None:
        """Close idle connections after a short grace, the others after their present request.

        If the head of a response has left already, it did not announce the close: its client may
        send one more request within the grace, whose response does.
        """
        self.draining = True
        for connection in list(self.connections):
            connection.drain()

    def when_empty(self) -> Deferred[None]:
        """Fire once no client is connected; at once where none is."""
        if not self.connections:
            return succeed(None)
        waiting: Deferred[None] = Deferred()
        self._waiting.append(waiting)
        return waiting

    def cut(self) -> None:
        """Drop every connection now, but for those whose protocol ends them within a second."""
        for connection in list(self.connections):
            connection.cut()

    def _keep_sweeping(self) -> None:
        wanted = self._listening or bool(self.connections)
        if wanted and not self._sweep.running:
            self._sweep.start(self._sweep_interval(), now=False)
        elif not wanted and self._sweep.running:
            self._sweep.stop()
            self._unchecked.clear()
            if self._rest is not None:
                self._rest.cancel()
                self._rest = None

    def _sweep_interval(self) -> float:
        shortest = min((s for s in _seconds(self.timeouts) if s is not None), default=4.0)
        return min(max(shortest / 4, 0.02), 1.0)

    def _check_all(self) -> None:
        """Look at the deadline of every connection, unless the last sweep is not over yet."""
        if not self._unchecked:
            self._unchecked = list(self.connections)
            self._check_some()

    def _check_some(self) -> None:
        """Look at some, and at the others in the next turns: thousands take some milliseconds."""
        now, self._rest = self.clock(), None
        some = self._unchecked[-_AT_ONCE:]
        del self._unchecked[-_AT_ONCE:]
        for connection in some:
            if connection in self.connections:
                try:
                    connection.check(now)
                except Exception:
                    _log.failure("a connection could not be checked")
                    connection.abort()
        if self._unchecked:
            self._rest = self.reactor.callLater(0, self._check_some)


def _seconds(timeouts: Timeouts) -> tuple[float | None, ...]:
    return (
        timeouts.request_head,
        timeouts.request_body,
        timeouts.client_idle,
        timeouts.client_stall,
    )
