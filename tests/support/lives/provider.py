"""The provider of all lives: it reads and checks each request, and plays the drawn part."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

from twisted.internet.interfaces import IAddress, IProtocolNegotiationFactory, IReactorTime
from twisted.internet.protocol import Factory, Protocol, connectionDone
from twisted.python.failure import Failure
from zope.interface import implementer

from llmproxy.net.transport import raw_transport
from tests.support.lives.messages import Act, Step, body, steps
from tests.support.lives.plan import Kind, Part, RequestFacts

Name = tuple[int, int]
"""A request: the number of its life, and which one it is there."""


class LivesProvider:
    """The state that the connections of the provider share.

    Args:
        reactor: keeps time.
        ask_of: returns the facts that were drawn for a request's name.

    Attributes:
        heard: how often each request came.
        complaints: the faults of requests, by name.
        connections: the open connections.
    """

    def __init__(self, reactor: IReactorTime, ask_of: Callable[[Name], RequestFacts]) -> None:
        self.reactor = reactor
        self.ask_of = ask_of
        self.heard: Counter[Name] = Counter()
        self.complaints: list[tuple[Name, str]] = []
        self.connections: set[ProviderConnection] = set()


@implementer(IProtocolNegotiationFactory)
class ProviderFactory(Factory):
    """Makes a :class:`ProviderConnection` of each connection, over TLS or not."""

    noisy = False

    def __init__(self, provider: LivesProvider) -> None:
        self._provider = provider

    def buildProtocol(self, addr: IAddress | None) -> ProviderConnection:
        """Return another connection."""
        return ProviderConnection(self._provider)

    def acceptableProtocols(self) -> list[bytes]:
        """Return the proxy's protocol: without a common one, Twisted's TLS ends the handshake."""
        return [b"http/1.1"]


class ProviderConnection(Protocol):
    """One connection to the provider."""

    transport: Any

    def __init__(self, provider: LivesProvider) -> None:
        self._provider = provider
        self._buffer = b""
        self._name: Name | None = None
        self._wanted: int | None = 0
        self._has_all = False
        self._has_responded = False
        self._spoiled = False
        self._steps: list[Step] = []
        self._timer: Any = None

    def connectionMade(self) -> None:
        """Join the open connections."""
        self._provider.connections.add(self)

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        """Stop playing."""
        self._provider.connections.discard(self)
        self.transport = None
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def dataReceived(self, data: bytes) -> None:
        """Take a part of a request."""
        self._buffer += data
        if self._name is None and self._buffer:
            self._read_head()
        elif self._name is not None and self._has_all:
            self._complain(f"the provider was sent more: {data[:80]!r}")
        if self._name is not None and not self._has_all:
            self._read_body(self._name)

    def _read_head(self) -> None:
        head, end, rest = self._buffer.partition(b"\r\n\r\n")
        if not end:
            return
        self._buffer = rest
        first, *lines = head.lower().split(b"\r\n")
        _, life, number, *_ = first.split(b" ")[1].split(b"/")
        self._name = name = (int(life), int(number))
        self._provider.heard[name] += 1
        if self._spoiled:
            self._complain("it came on a connection that had brought too much")
        fields = dict(line.split(b": ", 1) for line in lines)
        chunked = fields.get(b"transfer-encoding") == b"chunked"
        self._wanted = None if chunked else int(fields.get(b"content-length", b"0"))
        if self._part(name).kind is Kind.EARLY:
            self._play(name)

    def _read_body(self, name: Name) -> None:
        if self._wanted is None:
            found = _unchunked(self._buffer)
        elif len(self._buffer) >= self._wanted:
            found = self._buffer[: self._wanted], self._buffer[self._wanted :]
        else:
            found = None
        if found is None:
            return
        got, self._buffer = found
        self._has_all = True
        if self._buffer and not self._has_responded:
            self._complain(f"the provider was sent more: {self._buffer!r}")
        ask = self._provider.ask_of(name)
        if got != body(ask, *name):
            self._complain(f"the provider was sent another body: {got!r}")
        if ask.part.kind is Kind.EARLY:
            self._look_for_the_next()
        else:
            self._play(name)

    def _complain(self, text: str) -> None:
        if self._name is not None:
            self._provider.complaints.append((self._name, text))

    def _part(self, name: Name) -> Part:
        return self._provider.ask_of(name).part

    # -- the response -----------------------------------------------------------------------------

    def _play(self, name: Name) -> None:
        self._steps = steps(self._provider.ask_of(name), *name)
        self._wait()

    def _wait(self) -> None:
        while self._steps:
            if self._steps[0].after:
                self._timer = self._provider.reactor.callLater(self._steps[0].after, self._step)
                return
            self._do(self._steps.pop(0))

    def _step(self) -> None:
        self._timer = None
        self._do(self._steps.pop(0))
        self._wait()

    def _do(self, step: Step) -> None:
        if step.data:
            self.transport.write(step.data)
        if step.act is Act.FIN and self._has_all:
            self.transport.loseConnection()
        elif step.act is Act.FIN:
            self.transport.loseWriteConnection()  # a whole close would reset, with bytes unread
        elif step.act is Act.RESET:
            raw_transport(self.transport).abortConnection()
        elif step.act is Act.NEXT:
            self._has_responded = True
            self._spoiled = self._name is not None and self._part(self._name).kind is Kind.EXTRA
            self._look_for_the_next()

    def _look_for_the_next(self) -> None:
        """Be ready for another request once this one is whole and has its response."""
        if self._has_all and self._has_responded:
            self._has_all = self._has_responded = False
            self._name = None
            if self._buffer:  # the next one came in the same read
                self.dataReceived(b"")


class Mute(Protocol):
    """Takes a connection and its bytes, and sends nothing."""


def _unchunked(data: bytes) -> tuple[bytes, bytes] | None:
    """Return the content of a chunked body and the bytes after it; None if it is not whole."""
    content = b""
    while True:
        line, end, data = data.partition(b"\r\n")
        if not end:
            return None
        size = int(line, 16)
        if not size:
            return (content, data[2:]) if data.startswith(b"\r\n") else None
        if len(data) < size + 2:
            return None
        content, data = content + data[:size], data[size + 2 :]
