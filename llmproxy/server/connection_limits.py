"""Who may connect: how many clients at once, in all and from one address.

A :class:`ConnectionLimiter` counts connections, and names the limit that another one would break.
Such a connection is rejected: its client gets a short response, is not read, and holds a descriptor
for two seconds at most.  Where many are rejected at once, all but some are closed without a
response (ADR-0008).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

from twisted.internet.protocol import Protocol, connectionDone
from twisted.logger import Logger
from twisted.python.failure import Failure

from llmproxy.errors import ProxyError
from llmproxy.server.error_response import bare_response

_MOST_RESPONSES = 100
"""Rejected connections that may get a response at once; the others cost no descriptor."""

_LINGER = 2.0
"""Seconds for which a rejected connection stays, so that its response can be read."""

_SILENCE = 60.0
"""Seconds between two log lines about the same limit."""

_TEXTS = {
    "max_connections": "The proxy holds as many connections as it may; try again.",
    "connections_per_address": "There are as many connections from your address as there may be.",
}

_log = Logger()


class ConnectionLimiter:
    """Counts the connections of one site.

    Args:
        most: connections in all; 0 for no limit.
        most_of_one: connections from one address; 0 for no limit.
        clock: monotonic seconds.
        wall: seconds since the epoch.

    Attributes:
        refused: how many connections were rejected, by the limit's name.
    """

    def __init__(
        self,
        most: int = 0,
        most_of_one: int = 0,
        *,
        clock: Callable[[], float],
        wall: Callable[[], float],
    ) -> None:
        self._most = most
        self._most_of_one = most_of_one
        self._clock = clock
        self._wall = wall
        self._inside = 0
        self._by_address: Counter[str] = Counter()
        self._responses = 0
        self._silent_until: dict[str, float] = {}
        self.refused: Counter[str] = Counter({"max_connections": 0, "connections_per_address": 0})

    def limit(self, most: int, most_of_one: int) -> None:
        """Let in so many from now on; open connections stay."""
        self._most, self._most_of_one = most, most_of_one

    def enter(self, address: str | None) -> ProxyError | None:
        """Count one more connection, or return why it is rejected (and is not counted).

        Args:
            address: the client's, or None where that is not known, or not yet.
        """
        if 0 < self._most <= self._inside:
            return self._refuse("max_connections", address)
        error = None if address is None else self.recognise(address)
        if error is None:
            self._inside += 1
        return error

    def recognise(self, address: str) -> ProxyError | None:
        """Count a connection's address, or return why it may not stay (and is not counted)."""
        if 0 < self._most_of_one <= self._by_address[address]:
            return self._refuse("connections_per_address", address)
        self._by_address[address] += 1
        return None

    def leave(self, address: str | None) -> None:
        """A connection is gone; ``address`` is what was counted of it."""
        self._inside -= 1
        if address is not None:
            self._by_address[address] -= 1
            if not self._by_address[address]:
                del self._by_address[address]

    def reject(self, error: ProxyError, reactor: Any) -> RejectedConnection:
        """Return the protocol of a connection that was not let in."""
        responds = self._responses < _MOST_RESPONSES
        self._responses += responds
        response = bare_response(error, now=self._wall()) if responds else b""
        return RejectedConnection(response, reactor, self._parted)

    def _parted(self) -> None:
        self._responses -= 1

    def _refuse(self, limit: str, address: str | None) -> ProxyError:
        self.refused[limit] += 1
        now = self._clock()
        if now >= self._silent_until.get(limit, now):
            self._silent_until[limit] = now + _SILENCE
            _log.warn(
                "connections are rejected: {limit}",
                limit=limit,
                address=address,
                connections=self._inside,
            )
        return ProxyError(503, limit, _TEXTS[limit], fields=((b"retry-after", b"1"),))


class RejectedConnection(Protocol):
    """A connection that was not let in; what its client sends is dropped.

    Args:
        response: what the client gets; where it is empty, the connection is closed at once.
        reactor: keeps time.
        parted: called once when a client that got a response is gone.
    """

    def __init__(self, response: bytes, reactor: Any, parted: Callable[[], None]) -> None:
        self._response = response
        self._reactor = reactor
        self._parted = parted
        self._end: Any = None

    def connectionMade(self) -> None:
        """Respond and end our side, or close."""
        transport: Any = self.transport
        if not self._response:
            transport.abortConnection()
            return
        self._end = self._reactor.callLater(_LINGER, transport.abortConnection)
        transport.write(self._response)
        transport.loseWriteConnection()

    def without_response(self) -> RejectedConnection:
        """Close at once instead: where TLS comes first, a response is not worth a handshake."""
        if self._response:
            self._response = b""
            self._parted()
        return self

    def dataReceived(self, data: bytes) -> None:
        """Drop what the client sends: unread bytes would turn the close into a reset."""

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        """The client is gone."""
        if self._response:
            self._parted()
            if self._end.active():
                self._end.cancel()
