"""Two casts for one play: our parts, and Twisted's and treq's own as they come.

Every scenario of this folder asks for its parts through the fixtures of ``conftest.py`` and cannot
tell which it got.  The stock parts are what a developer would write who has read the manuals and
none of the sources: a ``treq`` client over an ``Agent`` with a pool, ``twisted.web.server.Site``,
and a Resource that pumps from one to the other.  Where a scenario is about one trap, the stock
parts step around the others, so that what fails is what the scenario is about.
"""

from __future__ import annotations

import time
from io import BytesIO
from pathlib import Path
from typing import Any, Protocol, cast

from treq.client import HTTPClient
from twisted.internet.defer import Deferred, succeed
from twisted.internet.protocol import Protocol as TwistedProtocol
from twisted.internet.protocol import connectionDone
from twisted.internet.ssl import Certificate, trustRootFromCertificates
from twisted.python.failure import Failure
from twisted.web.client import (
    Agent,
    BrowserLikePolicyForHTTPS,
    HTTPConnectionPool,
    ResponseDone,
)
from twisted.web.http import PotentialDataLoss
from twisted.web.http_headers import Headers
from twisted.web.resource import Resource
from twisted.web.server import NOT_DONE_YET

from llmproxy.config import Config, parse
from llmproxy.upstream.client import Upstream
from llmproxy.upstream.response import Response
from tests.support.daemon import UNTUNED

Fields = list[tuple[bytes, bytes]]


class Body(TwistedProtocol):
    """Takes one body.

    Args:
        keep: whether its bytes are kept; they are counted in any case.

    Attributes:
        ended: fires with whether the body was whole.
        flowing: fires with the first piece.
    """

    def __init__(self, *, keep: bool = True) -> None:
        self._keep = keep
        self._pieces: list[bytes] = []
        self.count = 0
        self.ended: Deferred[bool] = Deferred()
        self.flowing: Deferred[None] = Deferred()

    @property
    def data(self) -> bytes:
        """What came so far."""
        return b"".join(self._pieces)

    def dataReceived(self, data: bytes) -> None:
        """Take a piece."""
        self.count += len(data)
        if self._keep:
            self._pieces.append(data)
        if not self.flowing.called:
            self.flowing.callback(None)

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        """The body is over."""
        self.ended.callback(reason.check(ResponseDone) is not None)


class Reply(Protocol):
    """A response whose head is in."""

    @property
    def code(self) -> int:
        """The status."""

    @property
    def fields(self) -> Fields:
        """The header fields, names in lower case."""

    def deliver(self, body: TwistedProtocol) -> None:
        """Ask for the body."""


class Call(Protocol):
    """One request under way."""

    head: Deferred[Any]
    """Fires with the :class:`Reply`."""

    def cancel(self) -> None:
        """Give up by the hold on the request itself, in whatever phase it is."""

    def drop(self) -> None:
        """Give up by the hold on the connection that the body comes from."""


class Sender(Protocol):
    """Sends requests to one provider."""

    def send(
        self,
        method: str,
        target: str,
        fields: Fields,
        *,
        body: bytes = b"",
        tenant: str = "a",
        **treq: Any,
    ) -> Call:
        """Send a request.

        Args:
            body: held in memory.
            tenant: whose credential goes with it.
            treq: what the stock part passes on to ``HTTPClient.request``.
        """

    def close(self) -> Deferred[Any]:
        """Close what is idle."""


# -- ours -----------------------------------------------------------------------------------


class OurReply:
    """Our response."""

    def __init__(self, answer: Response) -> None:
        self.answer = answer
        self.code = answer.code
        self.fields: Fields = answer.fields

    def deliver(self, body: TwistedProtocol) -> None:
        """Ask for the body."""
        self.answer.deliverBody(cast(Any, body))


class OurCall:
    """Our request: before the head its Deferred is the hold, after it the response."""

    def __init__(self, asked: Deferred[Response]) -> None:
        self._asked = asked
        self._reply: OurReply | None = None
        self.head: Deferred[Any] = asked.addCallback(self._came)

    def _came(self, answer: Response) -> OurReply:
        self._reply = OurReply(answer)
        return self._reply

    def cancel(self) -> None:
        """Give up."""
        if self._reply is None:
            self._asked.cancel()
        else:
            self._reply.answer.abort()

    drop = cancel


class OurSender:
    """Our upstream side, with one provider."""

    def __init__(self, reactor: Any, config: Config) -> None:
        self._config = config
        self._upstream = Upstream(reactor, time.monotonic, config)

    def send(
        self,
        method: str,
        target: str,
        fields: Fields,
        *,
        body: bytes = b"",
        tenant: str = "a",
        **treq: Any,
    ) -> OurCall:
        """Send a request."""
        provider = self._config.providers["p"]
        return OurCall(
            self._upstream.send(
                provider,
                method,
                target.encode("latin-1"),
                fields,
                body,
                credential=tenant.encode(),
                timeouts=self._config.timeouts,
            )
        )

    def close(self) -> Deferred[Any]:
        """Close everything."""
        self._upstream.close()
        return succeed(None)


def our_config(
    url: str,
    *,
    ca: Path | None = None,
    listen: str = "tcp:0:interface=127.0.0.1",
    more: str = "",
) -> Config:
    """Return a configuration with the provider ``p`` behind ``/p``, open to whoever comes."""
    trust = "" if ca is None else f'ca = "{ca}"'
    return parse(
        f"""
        [proxy]
        listen = ["{listen}"]
        anonymous = true
        drain_timeout = "10ms"
        {"tuned_loop = false" if UNTUNED else ""}
        [admin]
        listen = "tcp:0:interface=127.0.0.1"
        [providers.p]
        url = "{url}"
        dialect = "openai"
        {trust}
        [[routes]]
        path = "/p"
        providers = ["p"]
        {more}
        """,
        environ={},
    )


# -- stock ----------------------------------------------------------------------------------


class StockReply:
    """treq's response."""

    def __init__(self, response: Any) -> None:
        self.response = response
        self.code: int = response.code
        self.body: TwistedProtocol | None = None

    @property
    def fields(self) -> Fields:
        """The header fields that the response shows."""
        pairs = self.response.headers.getAllRawHeaders()
        return [(name.lower(), value) for name, values in pairs for value in values]

    def deliver(self, body: TwistedProtocol) -> None:
        """Ask for the body."""
        self.body = body
        self.response.original.deliverBody(body)


class StockCall:
    """treq's request: its Deferred, and later the transport that the body's protocol is given."""

    def __init__(self, asked: Deferred[Any]) -> None:
        self._asked = asked
        self._reply: StockReply | None = None
        self.head: Deferred[Any] = asked.addCallback(self._came)

    def _came(self, response: Any) -> StockReply:
        self._reply = StockReply(response)
        return self._reply

    def cancel(self) -> None:
        """Cancel the Deferred."""
        self._asked.cancel()

    def drop(self) -> None:
        """Close the body's transport, as hard as it lets itself be closed."""
        assert self._reply is not None
        assert self._reply.body is not None
        transport: Any = self._reply.body.transport
        getattr(transport, "abortConnection", transport.loseConnection)()


class StockSender:
    """treq over Twisted's agent and pool."""

    def __init__(
        self, reactor: Any, url: str, ca: Path | None, connect: float | None = None
    ) -> None:
        self._url = url
        self._pool = HTTPConnectionPool(reactor)
        self._client = stock_client(reactor, self._pool, ca, connect)

    def send(
        self,
        method: str,
        target: str,
        fields: Fields,
        *,
        body: bytes = b"",
        tenant: str = "a",
        **treq: Any,
    ) -> StockCall:
        """Send a request."""
        headers = Headers()
        for name, value in fields:
            headers.addRawHeader(name, value)
        options = {"unbuffered": True, "data": BytesIO(body) if body else None, **treq}
        url = self._url + target
        return StockCall(cast(Any, self._client.request(method, url, headers=headers, **options)))

    def close(self) -> Deferred[Any]:
        """Close what is idle."""
        return cast("Deferred[Any]", self._pool.closeCachedConnections())


def stock_client(
    reactor: Any, pool: HTTPConnectionPool, ca: Path | None, connect: float | None = None
) -> HTTPClient:
    """Return a treq client that trusts ``ca`` and takes ``connect`` seconds to connect."""
    if ca is None:
        return HTTPClient(Agent(reactor, connectTimeout=connect, pool=pool))
    trust = trustRootFromCertificates([Certificate.loadPEM(ca.read_bytes())])
    policy = BrowserLikePolicyForHTTPS(trust)
    return HTTPClient(Agent(reactor, policy, connectTimeout=connect, pool=pool))


class StockPump(Resource):
    """A proxy of forty lines: what comes in under ``/p`` goes to ``url``, and the response back.

    It lets no redirect be followed, buffers nothing, and lets go of the provider when the client
    leaves, before the head and in the body.
    """

    isLeaf = True
    _KEPT_HERE = (b"connection", b"transfer-encoding", b"keep-alive")

    def __init__(self, reactor: Any, url: str, ca: Path | None, timeout: float | None) -> None:
        super().__init__()
        self._url = url
        self._timeout = timeout
        self.pool = HTTPConnectionPool(reactor)
        self._client = stock_client(reactor, self.pool, ca)

    def render(self, request: Any) -> int:
        """Send the request on."""
        headers = request.requestHeaders.copy()
        headers.removeHeader(b"host")
        headers.removeHeader(b"transfer-encoding")
        content = request.content.read()
        asked = self._client.request(
            request.method.decode("ascii"),
            self._url + request.uri.decode("latin-1").removeprefix("/p"),
            headers=headers,
            data=BytesIO(content) if content else None,
            unbuffered=True,
            allow_redirects=False,
            timeout=self._timeout,
        )
        request.notifyFinish().addErrback(lambda _: asked.cancel())
        asked.addCallback(self._response, request)
        asked.addErrback(self._fail, request)
        return NOT_DONE_YET

    def _response(self, response: Any, request: Any) -> None:
        if response.code >= 500:
            self._fail(None, request)
            return
        request.setResponseCode(response.code)
        for name, values in response.headers.getAllRawHeaders():
            if name.lower() not in self._KEPT_HERE:
                request.responseHeaders.setRawHeaders(name, values)
        request.write(b"")
        body: Any = _StockBody(request)
        request.notifyFinish().addErrback(lambda _: body.transport.stopProducing())
        response.original.deliverBody(body)

    def _fail(self, failure: Failure | None, request: Any) -> None:
        if not request._disconnected:
            request.setResponseCode(502)
            request.write(b"the provider failed")
            request.finish()


class _StockBody(TwistedProtocol):
    def __init__(self, request: Any) -> None:
        self._request = request

    def dataReceived(self, data: bytes) -> None:
        self._request.write(data)

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        if self._request._disconnected:
            return
        if reason.check(ResponseDone, PotentialDataLoss):
            self._request.finish()
        else:
            self._request.channel.transport.abortConnection()
