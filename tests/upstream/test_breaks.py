"""Where a response breaks: at every offset, in every way, the same reason and nothing left."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from twisted.internet.defer import Deferred
from twisted.internet.testing import MemoryReactorClock
from twisted.python.failure import Failure

from llmproxy.config import Provider as ProviderConfig
from llmproxy.config import Timeouts, Url
from llmproxy.dialects.dialect import Dialect
from llmproxy.errors import EndReason, ProxyError
from llmproxy.stream.relay import Batch, Relay
from llmproxy.upstream.pool import OutgoingRequest, ProviderPool
from llmproxy.upstream.resolver import Resolver
from llmproxy.upstream.response import Response
from tests.support.fake_transport import ABORTED, FIN, RESET, FakeTransport

OK = b"HTTP/1.1 200 OK\r\n"
INTERIM = b"HTTP/1.1 103 Early Hints\r\nlink: </x>\r\n\r\n"


class Shape:
    """A response, and what is in it.

    Attributes:
        wire: all of it.
        head: how many bytes of it are the head.
        body: the content.
        until_close: whether only the connection's end is its end.
    """

    def __init__(self, head: bytes, framed: bytes, body: bytes, *, until_close: bool) -> None:
        self.wire, self.head, self.body = head + framed, len(head), body
        self.until_close = until_close


SHAPES = {
    "length": Shape(OK + b"content-length: 5\r\n\r\n", b"hello", b"hello", until_close=False),
    "chunked": Shape(
        OK + b"transfer-encoding: chunked\r\n\r\n",
        b"2\r\nhe\r\n03;x=y\r\nllo\r\nA\r\n, everyone\r\n0\r\n\r\n",
        b"hello, everyone",
        until_close=False,
    ),
    "trailer": Shape(
        OK + b"transfer-encoding: chunked\r\n\r\n",
        b"5\r\nhello\r\n0\r\nx-sum: 1\r\ny: 2\r\n\r\n",
        b"hello",
        until_close=False,
    ),
    "interim": Shape(
        INTERIM + INTERIM + OK + b"content-length: 2\r\n\r\n", b"hi", b"hi", until_close=False
    ),
    "until close": Shape(OK + b"x: y\r\n\r\n", b"hello", b"hello", until_close=True),
    "1.0": Shape(b"HTTP/1.0 200 OK\r\n\r\n", b"hello", b"hello", until_close=True),
}


class Sink:
    """Takes what the relay forwards."""

    def __init__(self) -> None:
        self.data = b""

    def write(self, data: bytes) -> None:
        """Take a chunk."""
        self.data += data

    write_last = write

    def verbatim(self) -> None:
        """Take no chunks in their coding."""

    def registerProducer(self, producer: Any, streaming: bool) -> None:
        """Pause nobody."""

    def unregisterProducer(self) -> None:
        """Nothing to forget."""

    def when_sent(self, call: Callable[[], object]) -> None:
        """It is sent."""
        call()


class RelayedRequest:
    """One request through a pool and a relay, in memory, with deadlines and a turned clock."""

    def __init__(self) -> None:
        self.clock = MemoryReactorClock()
        url = Url(scheme="http", host="127.0.0.1", port=1)
        self.pool = ProviderPool(
            self.clock,
            self.clock.seconds,
            ProviderConfig(name="p", url=url, dialect=Dialect.RAW),
            resolver=Resolver(self.clock, self.clock.seconds),
            pool_idle=None,
            max_head=4096,
            direct=False,
        )
        self.sink = Sink()
        self.end: EndReason | None = None
        timeouts = Timeouts(connect=1.0, first_byte=30.0)
        outgoing = OutgoingRequest(b"/", [], b"", timeouts)
        asked: Deferred[Any] = self.pool.request(b"GET", b"", None, outgoing)
        asked.addCallback(self._relay).addCallbacks(self._whole, self._broken)
        self.transport = FakeTransport()
        factory: Any = self.clock.tcpClients[0][2]
        self.transport.connect(factory.buildProtocol(None))

    def _relay(self, response: Response) -> Deferred[None]:
        relay = Relay(
            response,
            self.sink,
            self.clock,
            self.clock.seconds,
            idle=5.0,
            batch=Batch(),
            gaps=lambda gap: None,
            delays=lambda delay: None,
        )
        return relay.start()

    def _whole(self, _: None) -> None:
        assert self.end is None
        self.end = EndReason.COMPLETE

    def _broken(self, failure: Failure) -> None:
        assert self.end is None
        assert isinstance(failure.value, ProxyError), failure
        self.end = failure.value.end

    def feed(self, *reads: bytes) -> None:
        """Let bytes come in, read by read."""
        for read in reads:
            self.transport.protocol.dataReceived(read)

    def finish(self, how: str) -> None:
        """Break off by ``fin`` or ``reset``, or ``stall`` for longer than any deadline."""
        if how == "stall":
            self.clock.advance(31)
        elif self.transport.connected:
            self.transport.end(FIN if how == "fin" else RESET)

    def assert_nothing_left(self) -> None:
        """After the transport's end there is no connection and no timer, and one abort at most."""
        assert self.transport.count("abort") <= 1
        if self.transport.connected:
            assert self.transport.count("abort") == 1
            self.transport.end(ABORTED)
        assert not any(self.pool.counts().values())
        assert not self.clock.getDelayedCalls()


def expected(shape: Shape, offset: int, how: str) -> EndReason:
    """Return why a request must end whose response breaks at ``offset``."""
    if offset >= len(shape.wire) and not shape.until_close:
        return EndReason.COMPLETE
    if offset < shape.head:
        return EndReason.UPSTREAM_TIMEOUT if how == "stall" else EndReason.UPSTREAM_BROKEN
    if how == "stall":
        return EndReason.UPSTREAM_IDLE
    if shape.until_close and how == "fin":
        return EndReason.COMPLETE
    return EndReason.UPSTREAM_BROKEN


@pytest.mark.parametrize("bytewise", [False, True], ids=["one read", "byte by byte"])
@pytest.mark.parametrize("how", ["fin", "reset", "stall"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_a_break_at_any_offset_has_its_reason(shape: Shape, how: str, bytewise: bool) -> None:
    """Around the head, in sizes, data, line ends and trailer: one reason for each."""
    for offset in range(len(shape.wire) + 1):
        request = RelayedRequest()
        sent = shape.wire[:offset]
        request.feed(*([bytes([byte]) for byte in sent] if bytewise else [sent] if sent else []))
        request.finish(how)
        assert request.end is expected(shape, offset, how), sent
        assert shape.body.startswith(request.sink.data)
        if request.end is EndReason.COMPLETE:
            assert request.sink.data == (
                shape.body if not shape.until_close else sent[shape.head :]
            )
            if not shape.until_close:
                request.pool.close()
        request.assert_nothing_left()


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_a_response_may_be_split_at_any_two_points(shape: Shape) -> None:
    """However head and framing are split into three reads, body and end are the same."""
    size = len(shape.wire)
    for first in range(size):
        for second in range(first, size, 1 if size < 90 else 7):
            request = RelayedRequest()
            reads = shape.wire[:first], shape.wire[first:second], shape.wire[second:]
            request.feed(*(read for read in reads if read))
            if shape.until_close:
                request.finish("fin")
            assert (request.end, request.sink.data) == (EndReason.COMPLETE, shape.body)


@pytest.mark.parametrize("how", ["fin", "reset"])
def test_the_connections_end_changes_nothing_of_a_whole_response(how: str) -> None:
    """An end behind the last byte is the end of an idle connection, and of no request."""
    request = RelayedRequest()
    request.feed(SHAPES["chunked"].wire)
    assert request.pool.counts()["idle"] == 1
    request.finish(how)
    assert request.end is EndReason.COMPLETE
    request.assert_nothing_left()
