"""A site behind one listener of ours, on the real reactor; its clients talk from threads."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from typing import Any, ParamSpec, Self, TypeVar

from twisted.internet.defer import maybeDeferred
from twisted.internet.task import Clock
from twisted.internet.threads import deferToThread
from twisted.web.server import NOT_DONE_YET

from llmproxy.config import Limits, Timeouts
from llmproxy.server.connection_limits import ConnectionLimiter
from llmproxy.server.handler import Handler, Router
from llmproxy.server.listen import listen
from llmproxy.server.request import Request
from llmproxy.server.site import Site
from llmproxy.server.tls import ServerTls
from tests.support.fake_transport import TurnedReactor, turn, until
from tests.support.sockets import WAIT, Wire, request

P = ParamSpec("P")
T = TypeVar("T")

TCP = "tcp:0:interface=127.0.0.1"
GET = request("GET", "/")


def limits(most: int = 0, most_of_one: int = 0, clock: Clock | None = None) -> ConnectionLimiter:
    """Return a limiter of connections; without a clock its time stands still."""
    return ConnectionLimiter(most, most_of_one, clock=(clock or Clock()).seconds, wall=lambda: 1.0)


class AddressHandler(Handler):
    """Responds with the address of the client."""

    def render(self, request: Request) -> int:
        """Respond."""
        body = str(getattr(request.getClientAddress(), "host", "unix")).encode()
        request.start(200, [(b"content-length", b"%d" % len(body))])
        request.write(body)
        request.finish()
        return NOT_DONE_YET


class Served:
    """A site that sends each client its address; the test turns its clock.

    Args:
        text: the endpoint.
        tls: ends TLS on it.
        limiter: counts the connections.
        timeouts: the deadlines towards clients.
        reuse_port: others may bind the same address.
        direct: with our transports, where the endpoint has them; else with Twisted's.

    Attributes:
        port: where it listens; 0 where that is no TCP port.
        listening: Twisted's port.
    """

    def __init__(
        self,
        text: str = TCP,
        *,
        tls: ServerTls | None = None,
        limiter: ConnectionLimiter | None = None,
        timeouts: Timeouts | None = None,
        reuse_port: bool = False,
        direct: bool = True,
    ) -> None:
        self.reactor = TurnedReactor()
        self.site = Site(
            Router(AddressHandler()),
            self.reactor,
            self.reactor.seconds,
            timeouts or Timeouts(),
            Limits(),
            wall=lambda: 0.0,
            limiter=limiter,
        )
        self.listening = listen(
            self.reactor, text, self.site, tls=tls, reuse_port=reuse_port, direct=direct
        )
        self.port: int = getattr(self.listening.getHost(), "port", 0)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await maybeDeferred(self.listening.stopListening)
        if self.listening.given is not None:
            os.close(self.listening.given)
        self.site.cut()
        await self.site.when_empty()
        if self.reactor.timers():
            await self.pass_time(3)  # for rejected connections, until they are dropped
        assert not self.reactor.timers()

    async def run(self, client: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Let a client that blocks talk in a thread."""
        talk = deferToThread(client, *args, **kwargs)
        return await talk

    async def run_turning(self, client: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Do the same, while the clock goes on: half a second in each turn of the reactor."""
        talk = deferToThread(client, *args, **kwargs)
        while not talk.called:
            await self.pass_time(0.5)
        return await talk

    async def until_connected(self, count: int) -> None:
        """Wait until there are so many clients."""
        await until(lambda: len(self.site.connections) == count)

    async def pass_time(self, seconds: float) -> None:
        """Turn the clock in steps of half a second, and let the reactor turn between them."""
        for _ in range(int(seconds * 2)):
            self.reactor.clock.advance(0.5)
            await turn()

    def sockets(self) -> list[Any]:
        """Return the accepted sockets of the site's clients."""
        found = []
        for channel in self.site.connections:
            transport: Any = channel.transport
            while (below := getattr(transport, "transport", None)) is not None:
                transport = below
            found.append(transport.socket)
        return found


def knock(port: int) -> tuple[str, bytes]:
    """Connect without a word; return how the connection ended, and what came before.

    A connection that is rejected without a response may end while it is still being made.
    """
    with socket.socket() as sock:
        sock.settimeout(WAIT)
        try:
            sock.connect(("127.0.0.1", port))
        except ConnectionError:
            return "reset", b""
        wire = Wire(sock)
        return wire.wait_closed(), wire.buffer


def ask(wire: Wire) -> bytes:
    """Ask once on a connection that stays; return the response's body."""
    wire.send(GET)
    first, fields = wire.read_head()
    body = wire.read_body(fields)
    assert first == b"HTTP/1.1 200 OK", (first, body)
    return body
