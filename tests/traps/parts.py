"""Our parts, and in their place Twisted's and treq's own, the stock parts.

Every scenario of this folder asks for its parts through the fixtures of ``conftest.py`` and cannot
tell which it got.  The stock parts are what a developer would write who has read the manuals and
none of the sources: a ``treq`` client over an ``Agent`` with a pool, ``twisted.web.server.Site``,
and a Resource that pumps from one to the other.  Where a scenario is about one trap, the stock
parts step around the others, so that what fails is what the scenario is about.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple, cast

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
from llmproxy.http1.grammar import field_lines
from llmproxy.upstream import client
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


class Reply:
    """A response whose head is in.

    Attributes:
        response: what the HTTP client made of it.
        body: what its body is delivered to.
    """

    def __init__(self, response: Any) -> None:
        self.response = response
        self.code: int = response.code
        self.body: TwistedProtocol | None = None

    @property
    def fields(self) -> Fields:
        """The header fields, names in lower case."""
        raise NotImplementedError

    def deliver(self, body: TwistedProtocol) -> None:
        """Ask for the body."""
        self.body = body
        self._deliver(body)

    def _deliver(self, body: TwistedProtocol) -> None:
        raise NotImplementedError


class Call:
    """One request under way.

    Attributes:
        head: fires with the :class:`Reply`.
    """

    def __init__(self, asked: Deferred[Any], reply: type[Reply]) -> None:
        self._asked = asked
        self._make_reply = reply
        self._reply: Reply | None = None
        self.head: Deferred[Any] = asked.addCallback(self._came)

    def _came(self, response: Any) -> Reply:
        self._reply = self._make_reply(response)
        return self._reply

    def cancel(self) -> None:
        """Give up by the hold on the request itself, in whatever phase it is."""
        raise NotImplementedError

    def drop(self) -> None:
        """Give up by the hold on the connection that the body comes from."""
        raise NotImplementedError


class Order(NamedTuple):
    """What is to be sent: the arguments of :meth:`Sender.send`."""

    method: str
    target: str
    fields: Fields
    body: bytes
    tenant: str
    treq: dict[str, Any]


class Sender:
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
        return self._send(Order(method, target, fields, body, tenant, treq))

    def _send(self, order: Order) -> Call:
        raise NotImplementedError

    def close(self) -> Deferred[Any]:
        """Close what is idle."""
        raise NotImplementedError


Upstream = Callable[..., Sender]
"""The fixture that makes senders."""

Ports = Callable[..., int]
"""A fixture that listens and returns the port."""

# -- ours -----------------------------------------------------------------------------------


class OurReply(Reply):
    """Our response."""

    @property
    def fields(self) -> Fields:
        """The header fields."""
        return cast(Fields, self.response.fields)

    def _deliver(self, body: TwistedProtocol) -> None:
        self.response.deliverBody(body)


class OurCall(Call):
    """Our request: before the head its Deferred is the hold, after it the response."""

    def cancel(self) -> None:
        """Give up."""
        if self._reply is None:
            self._asked.cancel()
        else:
            self._reply.response.abort()

    drop = cancel


class OurSender(Sender):
    """Our upstream side, with one provider."""

    def __init__(self, reactor: Any, config: Config) -> None:
        self._config = config
        self._upstream = client.Upstream(reactor, time.monotonic, config)

    def _send(self, order: Order) -> Call:
        asked = self._upstream.send(
            self._config.providers["p"],
            order.method,
            order.target.encode("latin-1"),
            field_lines(order.fields),
            order.body,
            credential=order.tenant.encode(),
            timeouts=self._config.timeouts,
        )
        return OurCall(asked, OurReply)

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
    """Return a configuration with the provider ``p`` behind ``/p``, open to every client."""
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


class StockReply(Reply):
    """treq's response."""

    @property
    def fields(self) -> Fields:
        """The header fields that the response shows."""
        pairs = self.response.headers.getAllRawHeaders()
        return [(name.lower(), value) for name, values in pairs for value in values]

    def _deliver(self, body: TwistedProtocol) -> None:
        self.response.original.deliverBody(body)


class StockCall(Call):
    """treq's request: its Deferred, and later the transport that the body's protocol is given."""

    def cancel(self) -> None:
        """Cancel the Deferred."""
        self._asked.cancel()

    def drop(self) -> None:
        """Close the body's transport, as hard as it lets itself be closed."""
        assert self._reply is not None
        assert self._reply.body is not None
        transport: Any = self._reply.body.transport
        getattr(transport, "abortConnection", transport.loseConnection)()


class StockSender(Sender):
    """treq over Twisted's agent and pool."""

    def __init__(
        self, reactor: Any, url: str, ca: Path | None, connect: float | None = None
    ) -> None:
        self._url = url
        self._pool = HTTPConnectionPool(reactor)
        self._client = stock_client(reactor, self._pool, ca, connect)

    def _send(self, order: Order) -> Call:
        headers = Headers()
        for name, value in order.fields:
            headers.addRawHeader(name, value)
        data = BytesIO(order.body) if order.body else None
        options = {"unbuffered": True, "data": data, **order.treq}
        url = self._url + order.target
        asked: Any = self._client.request(order.method, url, headers=headers, **options)
        return StockCall(asked, StockReply)

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
