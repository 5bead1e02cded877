"""Three readers of the same bytes: ours, h11 and llhttp (as httptools gives it), for both sides."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import h11
import httptools
from twisted.internet.task import Clock
from twisted.web.client import ResponseDone
from twisted.web.server import NOT_DONE_YET

from llmproxy.config import Limits, Timeouts
from llmproxy.errors import EndReason, ProxyError
from llmproxy.server.connection import ClientConnection
from llmproxy.server.handler import Handler, Router
from llmproxy.server.request import Request
from llmproxy.server.site import Site
from llmproxy.upstream.http1 import Connection
from llmproxy.upstream.response import Response
from tests.differential.verdict import FRAMING, Ending, Fields, Verdict, plain, refused
from tests.support.fake_transport import FIN, Collector, FakeTransport

ENOUGH = 1 << 20
"""Bytes that no message of these tests has."""


# --- responses ------------------------------------------------------------------------------------


def our_response(
    wire: bytes,
    method: bytes = b"GET",
    *,
    splits: tuple[int, ...] = (),
    max_head: int = ENOUGH,
    watch: Callable[[Connection], None] = lambda _: None,
) -> Verdict:
    """Read a response that a FIN follows, as the upstream side does.

    Args:
        splits: where one read ends and the next begins.
        max_head: most bytes of the head.
        watch: called after each read.
    """
    idle: list[Connection] = []
    connection = Connection(
        max_head=max_head, became_idle=idle.append, closed=lambda _: None, secure=False
    )
    transport, collector, outcome = FakeTransport(), Collector(), list[Any]()
    transport.connect(connection)

    def responded(response: Response) -> None:
        outcome.append(response)
        response.deliverBody(collector)

    waiting = connection.send(method, b"", None)
    waiting.addCallbacks(responded, lambda failure: outcome.append(failure.value))
    for start, end in zip((0, *splits), (*splits, len(wire)), strict=True):
        connection.dataReceived(wire[start:end])
        watch(connection)
    keep = bool(idle) and not transport.count("abort")
    transport.end(FIN)
    (response,) = outcome
    ends = collector.ends if isinstance(response, Response) else [response]
    assert len(ends) == 1
    error = ends[0]
    if isinstance(error, ProxyError):
        if error.end is EndReason.UPSTREAM_PROTOCOL:
            return refused(error.detail)
        if not isinstance(response, Response):
            return Verdict(Ending.SHORT, why=str(error))
    else:
        assert isinstance(error, ResponseDone)
    ending = Ending.SHORT if isinstance(error, ProxyError) else Ending.WHOLE
    return Verdict(
        ending,
        (response.version[2], response.code),
        plain(response.fields),
        collector.body,
        connection._reader.extra,
        keep,
    )


_MAY_GO_ON = (h11.DONE, h11._state.MIGHT_SWITCH_PROTOCOL)


def h11_response(wire: bytes, method: bytes = b"GET") -> Verdict:
    """Read a response that a FIN follows, as h11's client does."""
    peer = h11.Connection(h11.CLIENT, max_incomplete_event_size=ENOUGH)
    peer.send(h11.Request(method=method, target="/", headers=[("host", "h")]))
    peer.send(h11.EndOfMessage())
    return _h11_reads(peer, wire, h11.Response)


def _h11_reads(peer: h11.Connection, wire: bytes, kind: type[Any]) -> Verdict:
    peer.receive_data(wire)
    at_end, body, start, fields = False, b"", tuple[object, ...](), Fields()
    while True:
        try:
            event: Any = peer.next_event()
        except h11.RemoteProtocolError as error:
            return Verdict(Ending.SHORT if at_end else Ending.REFUSED, why=f"h11: {error}")
        if event is h11.NEED_DATA:
            if at_end:
                return Verdict(Ending.SHORT)
            at_end = True
            peer.receive_data(b"")
        elif isinstance(event, h11.ConnectionClosed):
            return Verdict(Ending.SHORT)
        elif event is h11.PAUSED or isinstance(event, h11.EndOfMessage):
            keep = peer.their_state in _MAY_GO_ON
            left = peer.trailing_data[0]
            return Verdict(Ending.WHOLE, start, plain(fields), body, left, keep)
        elif isinstance(event, kind):
            minor = int(event.http_version[-1:])
            response = kind is h11.Response
            start = (minor, event.status_code) if response else (event.method, event.target, minor)
            fields = list(event.headers)
        elif isinstance(event, h11.Data):
            body += bytes(event.data)


_UPGRADE = "llhttp: an upgrade, behind whose head httptools reads nothing"


class _Events:
    """What llhttp reported of one message."""

    def __init__(self, kind: type[Any]) -> None:
        self.parser = kind(self)
        self.keep = False
        self.fields = Fields()
        self.body = b""
        self.target = b""
        self.head_done = self.done = False

    def on_header(self, name: bytes, value: bytes | None) -> None:
        if not self.head_done:
            self.fields.append((name, value or b""))

    def interim(self) -> bool:
        """Tell whether this is a 1xx response."""
        response = isinstance(self.parser, httptools.HttpResponseParser)
        return response and self.parser.get_status_code() < 200

    def on_url(self, url: bytes) -> None:
        self.target += url

    def on_headers_complete(self) -> None:
        self.head_done = True
        self.keep = bool(self.parser.should_keep_alive())

    def on_body(self, data: bytes) -> None:
        self.body += data

    def on_message_complete(self) -> None:
        self.done = True


def llhttp_response(wire: bytes, method: bytes = b"GET") -> Verdict:
    """Read a response that a FIN follows, as llhttp does in its strict mode.

    It does not know of HEAD, nor of the connection's end: the one message without a framing that
    it goes on reading is the one that ends with its connection.
    Every 1xx is ended at its head for it (RFC 9112, section 6.3): behind one that it does not know,
    such as 199, llhttp reads as much as a Content-Length says.
    """
    at, bodiless = 0, method == b"HEAD"
    while True:
        events = _Events(httptools.HttpResponseParser)
        stop = _llhttp_reads(events, wire, at, until_head=bodiless)
        if isinstance(stop, str):
            return refused(stop)
        at, parser = stop, events.parser
        if not events.head_done or parser.get_status_code() >= 200:
            break
    if not events.head_done:
        return Verdict(Ending.SHORT)
    framed = any(name.lower() in FRAMING for name, _ in events.fields)
    return Verdict(
        Ending.WHOLE if events.done or bodiless or not framed else Ending.SHORT,
        (int(parser.get_http_version()[-1:]), parser.get_status_code()),
        plain(events.fields),
        b"" if bodiless else events.body,
        wire[at:],
        events.keep or (bodiless and not framed and _stays(parser, events)),
    )


def _stays(parser: Any, events: _Events) -> bool:
    """Tell whether a connection stays open; llhttp does not know that HEAD needs no framing."""
    options = [value.lower() for name, value in events.fields if name.lower() == b"connection"]
    return bool(parser.get_http_version() == "1.1") and b"close" not in options


def _llhttp_reads(
    events: _Events, wire: bytes, start: int = 0, *, until_head: bool = False
) -> int | str:
    """Feed one message, byte by byte; return where it ended, or why it was refused."""
    for at in range(start, len(wire)):
        try:
            events.parser.feed_data(wire[at : at + 1])
        except httptools.HttpParserUpgrade:
            return _UPGRADE
        except httptools.HttpParserError as error:
            return f"llhttp: {error}"
        if events.done or (events.head_done and (until_head or events.interim())):
            return at + 1
    return len(wire)


# --- requests -------------------------------------------------------------------------------------


class _Keeps(Handler):
    """Keeps each request, and sends no response."""

    def __init__(self) -> None:
        super().__init__()
        self.requests: list[tuple[Request, bytes]] = []

    def body_limit(self, request: Request) -> int:
        return 10**18

    def render(self, request: Request) -> int:
        self.requests.append((request, request.body))
        return NOT_DONE_YET


def our_request(
    wire: bytes,
    *,
    splits: tuple[int, ...] = (),
    max_head: int = ENOUGH,
    watch: Callable[[ClientConnection], None] = lambda _: None,
) -> Verdict:
    """Read a request as the server side does; arguments as above."""
    resource, clock, transport = _Keeps(), Clock(), FakeTransport()
    limits = Limits(request_head=max_head, request_memory=ENOUGH)
    site = Site(Router(resource), clock, clock.seconds, Timeouts(), limits, wall=lambda: 0.0)
    channel = site.buildProtocol(None)
    assert isinstance(channel, ClientConnection)
    transport.connect(channel)
    for start, end in zip((0, *splits), (*splits, len(wire)), strict=True):
        channel.dataReceived(wire[start:end])
        watch(channel)
    left, keep, response = channel._buffer, bool(channel.persistent), transport.value()
    transport.end(FIN)
    assert len(resource.requests) <= 1
    if not resource.requests:
        if not response.startswith(b"HTTP/1.1 4") and not response.startswith(b"HTTP/1.1 5"):
            return Verdict(Ending.SHORT)
        return refused(json.loads(response.partition(b"\r\n\r\n")[2])["error"]["message"])
    ((request, body),) = resource.requests
    if request.refusal is not None:
        return refused(request.refusal.message)
    start_ = (request.method, request.uri, int(request.clientproto[-1:]))
    return Verdict(Ending.WHOLE, start_, plain(request.fields), body, left, keep)


def h11_request(wire: bytes) -> Verdict:
    """Read a request that a FIN follows, as h11's server does."""
    peer = h11.Connection(h11.SERVER, max_incomplete_event_size=ENOUGH)
    return _h11_reads(peer, wire, h11.Request)


def llhttp_request(wire: bytes) -> Verdict:
    """Read a request that a FIN follows, as llhttp does in its strict mode."""
    events = _Events(httptools.HttpRequestParser)
    stop = _llhttp_reads(events, wire)
    if isinstance(stop, str):
        return refused(stop)
    if not events.done:
        return Verdict(Ending.SHORT)
    parser = events.parser
    return Verdict(
        Ending.WHOLE,
        (parser.get_method(), events.target, int(parser.get_http_version()[-1:])),
        plain(events.fields),
        events.body,
        wire[stop:],
        events.keep,
    )
