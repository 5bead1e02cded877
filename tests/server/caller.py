"""A client of a site in memory: the test sends bytes, sends responses, and turns the clock."""

from __future__ import annotations

from collections.abc import Callable

from twisted.internet.task import Clock
from twisted.web.server import NOT_DONE_YET

from llmproxy.config import Limits, Timeouts
from llmproxy.errors import ClientGone
from llmproxy.http1.grammar import Fields
from llmproxy.server.connection import ClientConnection
from llmproxy.server.handler import Handler, Router
from llmproxy.server.request import Request
from llmproxy.server.site import Site
from tests.support.fake_transport import FakeTransport
from tests.support.sockets import request

GET = request("GET", "/")
LAST_CHUNK = b"0\r\n\r\n"


class WaitingHandler(Handler):
    """Keeps each request until the test responds to it; a refused request gets a response at once.

    Args:
        limit: the most bytes of a body.
        holds: bodies are held; else they stream.

    Attributes:
        requests: every request, in order.
        gone: why clients left while their requests were served.
        act: called with each request that is not refused.
    """

    def __init__(self, *, limit: int = 1_000_000, holds: bool = True) -> None:
        super().__init__()
        self.limit, self.holds = limit, holds
        self.requests: list[Request] = []
        self.gone: list[ClientGone] = []
        self.act: Callable[[Request], None] = lambda request: None

    def body_limit(self, request: Request) -> int:
        return self.limit

    def holds_body(self, request: Request) -> bool:
        return self.holds

    def render(self, request: Request) -> int:
        self.requests.append(request)
        request.gone = self.gone.append
        if request.refusal is not None:
            request.start(request.refusal.status, [(b"content-length", b"0")])
            request.finish()
        else:
            self.act(request)
        return NOT_DONE_YET


class Caller:
    """A client's connection to a site.

    Args:
        reads: what the client sends, read by read.
        limit: the most bytes of a body.
        limits: those of the site.
        timeouts: those of the site.
    """

    def __init__(
        self,
        *reads: bytes,
        limit: int = 1_000_000,
        limits: Limits | None = None,
        **timeouts: float | None,
    ) -> None:
        self.clock = Clock()
        self.clock.advance(5000)
        self.handler = WaitingHandler(limit=limit)
        self.site = Site(
            Router(self.handler),
            self.clock,
            self.clock.seconds,
            Timeouts(**timeouts),
            limits or Limits(),
            wall=lambda: 0.0,
        )
        self.connect()
        self.send(*reads)

    def connect(self) -> None:
        """Open another connection."""
        self.transport = FakeTransport()
        channel = self.site.buildProtocol(None)
        assert isinstance(channel, ClientConnection)
        self.channel = channel
        self.transport.connect(channel)

    def send(self, *reads: bytes) -> None:
        """Let bytes come in, read by read; an empty read is none."""
        for data in filter(None, reads):
            self.channel.dataReceived(data)
        self.clock.advance(0)

    @property
    def request(self) -> Request:
        """The last request."""
        return self.handler.requests[-1]

    def start(self, status: int = 200, fields: Fields | None = None) -> Request:
        """Send the head of a response to the last request; return the request."""
        current = self.request
        current.start(status, fields or [])
        current.flush()
        return current

    def respond(self) -> None:
        """Send a whole response to the last request."""
        current = self.start(fields=[(b"content-length", b"2")])
        current.write(b"ok")
        current.finish()
        self.clock.advance(0)

    def pass_time(self, seconds: float) -> None:
        """Turn the clock in steps as small as a sweep's."""
        steps = int(seconds / 0.25)
        self.clock.pump([0.25] * steps + [seconds - 0.25 * steps])

    @property
    def status(self) -> int:
        """The status of the response that was written since the last time; 0 for none."""
        written = self.transport.take()
        return int(written[9:12]) if written else 0

    def closes(self) -> list[str]:
        """Return how our side ended the connection: ``half``, ``close``, ``abort``."""
        return [call for call in self.transport.calls if call in ("half", "close", "abort")]

    def is_open(self) -> bool:
        """Tell whether our side has not begun to close the connection."""
        return not self.closes()
