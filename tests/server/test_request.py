"""One request and its response: framing for every kind of client, endings, bounds of bodies."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from twisted.internet.defer import Deferred
from twisted.internet.task import Clock
from twisted.web.server import NOT_DONE_YET

from llmproxy.config import Limits, Timeouts
from llmproxy.errors import ClientGone, ClientStalled
from llmproxy.server.connection import ClientConnection
from llmproxy.server.handler import Handler, Router
from llmproxy.server.request import Request
from llmproxy.server.site import Site
from tests.support.fake_transport import RESET, FakeTransport
from tests.support.sockets import chunked, request

LAST = b"0\r\n\r\n"
LENGTH = [(b"content-length", b"5")]


class Waits(Handler):
    """Keeps each request, and what it is told of its client's leaving, for the test to answer."""

    def __init__(self, limit: int) -> None:
        super().__init__()
        self.limit = limit
        self.requests: list[Request] = []
        self.left: list[list[ClientGone]] = []
        self.act: Callable[[Request], None] = lambda request: None

    def body_limit(self, request: Request) -> int:
        return self.limit

    def render(self, request: Request) -> int:
        self.requests.append(request)
        self.left.append([])
        request.gone = self.left[-1].append
        self.act(request)
        return NOT_DONE_YET


class Caller:
    """A client's connection to a site that answers when the test does."""

    def __init__(self, data: bytes = b"", *, limit: int = 100, memory: int = 1000) -> None:
        self.clock = Clock()
        self.resource = Waits(limit)
        self.site = Site(
            Router(self.resource),
            self.clock,
            self.clock.seconds,
            Timeouts(),
            Limits(request_memory=memory),
            wall=lambda: 0.0,
        )
        self.connect()
        self.send(data)

    def connect(self) -> None:
        """Open another connection."""
        self.transport = FakeTransport()
        self.channel = self.site.buildProtocol(None)
        self.transport.connect(self.channel)

    def send(self, *reads: bytes) -> None:
        """Let bytes come in, read by read."""
        for data in reads:
            if data:
                self.channel.dataReceived(data)

    @property
    def request(self) -> Request:
        """The request that came last."""
        return self.resource.requests[-1]

    def left(self) -> list[ClientGone]:
        """Return what the last request was told about its client's leaving."""
        return self.resource.left[-1]

    def closed(self) -> list[str]:
        """Return how the connection was closed, if it was."""
        return [call for call in self.transport.calls if call in ("lose", "abort")]


def get(method: str = "GET", version: str = "1.1", *fields: str) -> bytes:
    """Return a request without a body."""
    return request(method, "/x?y", *fields, version=version)


# --- the request ----------------------------------------------------------------------------------


def test_fields_keep_their_order() -> None:
    """Names in lower case, values as they came, repeated ones in their places."""
    caller = Caller(b"GET / HTTP/1.1\r\nHost: h\r\nX-B: 1\r\nx-a:\t\xff \r\nX-B: 2\r\n\r\n")

    expected = [(b"host", b"h"), (b"x-b", b"1"), (b"x-a", b"\xff"), (b"x-b", b"2")]
    assert caller.request.fields == expected


def test_target_and_path_are_raw() -> None:
    """The target is what came; the path is all before the first question mark."""
    caller = Caller(b"GET /a%2f?b?c HTTP/1.1\r\nHost: h\r\n\r\n")

    assert (caller.request.uri, caller.request.path) == (b"/a%2f?b?c", b"/a%2f")


BODIES = [
    (request("POST", "/", body=b"hello world"), b"hello world"),
    (
        request("POST", "/", "Transfer-Encoding: chunked") + chunked(b"hello", b" world") + LAST,
        b"hello world",
    ),
    (request("POST", "/", "Content-Length: 0"), b""),
]


@pytest.mark.parametrize(("data", "body"), BODIES)
def test_a_body_is_whole_at_every_split(data: bytes, body: bytes) -> None:
    """However the bytes are cut, the request is served once, with its whole body in memory."""
    for at in range(1, len(data)):
        caller = Caller()
        caller.send(data[:at])
        assert not caller.resource.requests
        caller.send(data[at:])
        assert [got.body for got in caller.resource.requests] == [body]
        assert caller.request.body_bytes == caller.site.held_bytes == len(body)


# --- bounds ---------------------------------------------------------------------------------------


def test_a_body_of_the_most_bytes_is_taken() -> None:
    """The limit itself is allowed, with a length and in chunks."""
    exact = b"x" * 100
    for data in (
        request("POST", "/", body=exact),
        request("POST", "/", "Transfer-Encoding: chunked") + chunked(exact) + LAST,
    ):
        assert Caller(data).request.refusal is None


def test_a_length_over_the_limit_is_refused_before_the_body() -> None:
    """The head is enough: 413 without one byte of the body asked for or held."""
    caller = Caller(request("POST", "/", "Content-Length: 101", "Expect: 100-continue"))

    assert caller.request.refusal is not None
    assert (caller.request.refusal.status, caller.request.body) == (413, b"")
    assert not caller.transport.writes
    caller.send(b"x" * 101)
    assert caller.site.held_bytes == 0
    assert len(caller.resource.requests) == 1


def test_a_chunked_body_is_refused_where_it_grows_too_large() -> None:
    """The chunk that goes over the limit ends the reading; what was held is let go of."""
    caller = Caller(request("POST", "/", "Transfer-Encoding: chunked"))
    caller.send(chunked(b"x" * 100))
    assert (caller.resource.requests, caller.site.held_bytes) == ([], 100)
    caller.send(chunked(b"x"))

    assert caller.request.refusal is not None
    assert (caller.request.refusal.status, caller.site.held_bytes) == (413, 0)
    caller.send(chunked(b"x" * 50), LAST)
    assert len(caller.resource.requests) == 1


def test_all_bodies_together_are_bounded() -> None:
    """Where the process holds as much as it may: 503, with a hint when to come again."""
    caller = Caller(request("POST", "/", body=b"x" * 80), memory=100)
    first = caller.request
    caller.connect()
    caller.send(request("POST", "/", body=b"x" * 21))

    refusal = caller.request.refusal
    assert refusal is not None
    assert refusal.status == 503
    assert (b"retry-after", b"1") in refusal.fields
    assert caller.site.held_bytes == 80
    first.release()
    caller.connect()
    caller.send(request("POST", "/", body=b"x" * 21))
    assert caller.request.refusal is None


ENDINGS: dict[str, Callable[[Caller], object]] = {
    "answered": lambda caller: caller.request.finish(),
    "broken off": lambda caller: caller.request.break_off(),
    "short": lambda caller: caller.request.finish(),
    "aborted": lambda caller: caller.request.abort(ClientStalled()),
    "lost": lambda caller: caller.transport.end(RESET),
    "released": lambda caller: caller.request.release(),
    "cut": lambda caller: caller.site.cut(),
}


@pytest.mark.parametrize("ending", ENDINGS)
def test_memory_is_given_back_in_every_ending(ending: str) -> None:
    """However a request ends, its body counts no more, and only once."""
    caller = Caller(request("POST", "/", body=b"hello"))
    assert caller.site.held_bytes == 5
    if ending not in ("aborted", "lost"):
        caller.request.start(200, LENGTH if ending == "short" else [])
        caller.request.flush()
    ENDINGS[ending](caller)
    assert caller.site.held_bytes == 0
    caller.transport.end(RESET)
    assert caller.site.held_bytes == 0


@pytest.mark.parametrize("rest", [b"", b"zz\r\n", b"5\r\nhello!"])
def test_memory_of_an_unfinished_body_is_given_back(rest: bytes) -> None:
    """A body that breaks before it is whole counts no more once its connection is gone."""
    caller = Caller(request("POST", "/", "Transfer-Encoding: chunked") + chunked(b"hello"))
    assert caller.site.held_bytes == 5
    caller.send(rest)
    caller.transport.end(RESET)

    assert caller.site.held_bytes == 0
    assert not any(got.refusal is None for got in caller.resource.requests)


# --- the head of the response
# -----------------------------------------------------------------------

CHUNKED, CLOSE = b"transfer-encoding: chunked\r\n", b"connection: close\r\n"
FIVE = b"content-length: 5\r\n"


@pytest.mark.parametrize(
    ("data", "status", "fields", "framing"),
    [
        (get(), 200, [], CHUNKED),
        (get(), 200, LENGTH, FIVE),
        (get("GET", "1.0"), 200, [], CLOSE),
        (get("GET", "1.0"), 200, LENGTH, FIVE + CLOSE),
        (get("GET", "1.1", "Connection: close"), 200, [], CHUNKED + CLOSE),
        (get("HEAD"), 200, [], b""),
        (get("HEAD"), 200, LENGTH, FIVE),
        (get("HEAD", "1.0"), 200, LENGTH, FIVE + CLOSE),
        (get(), 204, [], b""),
        (get(), 304, LENGTH, FIVE),
        (get(), 404, [], CHUNKED),
    ],
)
def test_the_head_goes_out_at_once_and_in_one_piece(
    data: bytes, status: int, fields: list[tuple[bytes, bytes]], framing: bytes
) -> None:
    """Status, our fields and the framing that the client understands, and nothing of Twisted's."""
    caller = Caller(data)
    caller.request.start(status, [(b"x-a", b"1"), (b"x-a", b"2"), *fields])
    caller.request.flush()

    (head,) = caller.transport.writes
    first, _, rest = head.partition(b"\r\n")
    assert first.startswith(b"HTTP/1.1 %d " % status)
    assert rest == b"x-a: 1\r\nx-a: 2\r\n" + framing + b"\r\n"
    assert caller.request.status == status


def test_a_status_without_a_known_phrase_is_sent() -> None:
    """The code is exact, whatever is known of it."""
    caller = Caller(get())
    caller.request.start(529, LENGTH)
    caller.request.flush()

    assert caller.transport.value().startswith(b"HTTP/1.1 529 \r\n")


def test_a_head_goes_out_once() -> None:
    """A second ``start`` changes nothing."""
    caller = Caller(get())
    caller.request.start(200, [])
    caller.request.flush()
    caller.request.start(500, LENGTH)
    caller.request.flush()

    assert len(caller.transport.writes) == 1
    assert caller.request.status == 200


# --- its body -------------------------------------------------------------------------------------


def test_each_piece_is_one_write() -> None:
    """A piece leaves at once, with its chunk framing around it, and is counted."""
    caller = Caller(get())
    caller.request.start(200, [])
    caller.request.flush()
    for data in (b"hello", b"", b"x" * 17):
        caller.request.write(data)
    caller.request.finish()

    expected = [b"5\r\nhello\r\n", b"11\r\n" + b"x" * 17 + b"\r\n", LAST]
    assert caller.transport.writes[1:] == expected
    assert caller.request.sent == 22


@pytest.mark.parametrize(("version", "fields"), [("1.1", LENGTH), ("1.0", LENGTH), ("1.0", [])])
def test_without_chunks_the_bytes_are_the_body(
    version: str, fields: list[tuple[bytes, bytes]]
) -> None:
    """With a length, and for HTTP/1.0, nothing stands between the pieces."""
    caller = Caller(get("GET", version))
    caller.request.start(200, fields)
    caller.request.flush()
    caller.request.write(b"he")
    caller.request.write(b"llo")
    caller.request.finish()

    assert caller.transport.writes[1:] == [b"he", b"llo"]
    assert caller.closed() == (["lose"] if version == "1.0" else [])


@pytest.mark.parametrize(
    ("lines", "counts", "taken"),
    [
        (get(), True, True),
        (get(), False, False),
        (get("GET", "1.0"), True, False),
        (get("HEAD"), True, False),
    ],
)
def test_chunks_are_taken_as_they_are_where_that_coding_is_spoken_and_bytes_are_counted(
    lines: bytes, counts: bool, taken: bool
) -> None:
    """From the first piece, which takes the head along, up to the response's end."""
    caller = Caller(lines)
    caller.transport.counts = counts
    request = caller.request
    request.start(200, [])
    before = request.verbatim()
    request.write(b"hello")
    verbatim = request.verbatim()
    if verbatim is not None:
        verbatim(b"1\r\n!\r\n")
    assert (before, verbatim is not None) == (None, taken)
    assert isinstance(caller.channel, ClientConnection)
    assert caller.channel.written == len(caller.transport.value())
    assert request.sent == (0 if lines.startswith(b"HEAD") else 5)
    request.finish()
    assert request.verbatim() is None
    if taken:
        assert caller.transport.writes[1:] == [b"1\r\n!\r\n", LAST]


@pytest.mark.parametrize(("method", "status"), [("HEAD", 200), ("GET", 204), ("GET", 304)])
def test_where_no_body_belongs_none_is_written(method: str, status: int) -> None:
    """The body of a response that has none is dropped, and the connection goes on."""
    caller = Caller(get(method))
    caller.request.start(status, LENGTH)
    caller.request.flush()
    caller.request.write(b"hello")
    caller.request.finish()

    assert len(caller.transport.writes) == 1
    assert caller.request.sent == 0
    caller.send(get())
    assert len(caller.resource.requests) == 2


def test_a_response_can_be_left_to_twisted() -> None:
    """A resource that only writes gets a head from the response headers that it set."""
    caller = Caller(get())
    caller.request.setResponseCode(201)
    caller.request.responseHeaders.addRawHeader(b"X-A", b"1")
    caller.request.write(b"x")
    caller.request.finish()

    head, _, body = caller.transport.value().partition(b"\r\n\r\n")
    assert head == b"HTTP/1.1 201 Created\r\nx-a: 1\r\ntransfer-encoding: chunked"
    assert body == b"1\r\nx\r\n" + LAST


# --- the end of the response
# ------------------------------------------------------------------------


def test_a_whole_response_leaves_the_connection_for_the_next() -> None:
    """After ``finish`` the next request is read from the same connection."""
    caller = Caller(get() + get("POST", "1.1", "Content-Length: 0"))
    assert len(caller.resource.requests) == 1
    caller.request.start(200, [])
    caller.request.flush()
    caller.request.finish()
    assert [got.method for got in caller.resource.requests] == [b"GET", b"POST"]
    assert not caller.closed()


@pytest.mark.parametrize(
    ("how", "fields"), [("break_off", LENGTH), ("break_off", []), ("finish", LENGTH)]
)
def test_a_broken_response_never_looks_whole(how: str, fields: list[tuple[bytes, bytes]]) -> None:
    """After all that was written it is closed, short of its length or without its last chunk."""
    caller = Caller(get())
    caller.request.start(200, fields)
    caller.request.flush()
    caller.request.write(b"hel")
    getattr(caller.request, how)()

    assert caller.transport.value().endswith((b"\r\n\r\nhel", b"3\r\nhel\r\n"))
    assert caller.closed() == ["lose"]
    caller.send(get())
    assert len(caller.resource.requests) == 1


def test_without_framing_only_a_reset_tells_of_a_break() -> None:
    """HTTP/1.0: what is queued goes out first, and then the connection is reset, not closed."""
    caller = Caller(get("GET", "1.0"))
    caller.request.start(200, [])
    caller.request.flush()
    caller.transport.hold(10)
    caller.request.break_off()
    caller.clock.pump([0.1] * 20)
    assert not caller.closed()
    caller.transport.hold(0)
    caller.clock.advance(0.1)
    assert caller.closed() == ["abort"]
    caller.transport.end(RESET)
    assert not caller.clock.getDelayedCalls()


def test_a_client_that_goes_while_a_reset_waits_leaves_nothing() -> None:
    """The wait for an empty queue ends with the connection."""
    caller = Caller(get("GET", "1.0"))
    caller.request.start(200, [])
    caller.request.flush()
    caller.transport.hold(10)
    caller.request.break_off()
    caller.transport.end(RESET)

    assert not caller.clock.getDelayedCalls()


def test_an_abort_drops_the_client_at_once() -> None:
    """Whoever serves the request is told why, once, and the connection is aborted."""
    caller = Caller(get())
    caller.request.start(200, [])
    caller.request.flush()
    why = ClientStalled()
    for _ in range(2):
        caller.request.abort(why)
    caller.transport.end(RESET)

    assert caller.left() == [why]
    assert caller.closed() == ["abort"]


@pytest.mark.parametrize("started", [True, False])
def test_a_client_that_leaves_is_told_of_once(started: bool) -> None:
    """The reason is there; what is done to the request afterwards goes nowhere."""
    caller = Caller(get())
    current = caller.request
    if started:
        current.start(200, [])
        current.flush()
    written = caller.transport.value()
    caller.transport.end(RESET)
    assert len(caller.left()) == 1
    assert type(caller.left()[0]) is ClientGone
    current.start(200, [])
    current.flush()
    current.write(b"x")
    current.finish()
    current.break_off()
    current.abort(ClientStalled())
    current.unregisterProducer()

    assert len(caller.left()) == 1
    assert caller.transport.value() == written
    assert not caller.closed()
    assert current.status == (200 if started else None)


def test_an_ended_response_is_over() -> None:
    """After the end nothing is written or told any more; the connection may serve another."""
    caller = Caller(get() + get())
    first = caller.request
    first.start(200, [])
    first.flush()
    first.finish()
    written = caller.transport.value()
    first.write(b"x")
    first.finish()
    first.break_off()
    first.abort(ClientStalled())
    first.unregisterProducer()

    assert caller.transport.value() == written
    assert not caller.closed()
    caller.transport.end(RESET)
    assert [len(told) for told in caller.resource.left] == [0, 1]


@pytest.mark.parametrize("how", ["finish", "break_off"])
def test_whoever_waits_for_the_end_hears_of_it(how: str) -> None:
    """``notifyFinish`` fires when the response has ended, in whichever way."""
    caller = Caller(get())
    ended: Deferred[None] = caller.request.notifyFinish()
    caller.request.start(200, [])
    caller.request.flush()
    getattr(caller.request, how)()

    assert ended.called


# --- producers ------------------------------------------------------------------------------------


class Producer:
    """Notes what it is told."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def pauseProducing(self) -> None:
        self.calls.append("pause")

    def resumeProducing(self) -> None:
        self.calls.append("resume")

    def stopProducing(self) -> None:
        self.calls.append("stop")


def test_a_producer_is_paused_by_a_full_wire() -> None:
    """The transport's pause and resume reach the producer, and its end stops it."""
    caller, producer = Caller(get()), Producer()
    caller.request.registerProducer(producer, True)
    caller.transport.producer.pauseProducing()
    caller.transport.producer.resumeProducing()
    caller.transport.end(RESET)

    assert producer.calls == ["pause", "resume", "stop"]


def test_a_producer_that_comes_late_is_paused_at_once() -> None:
    """A wire that was full before is full for the newcomer, too."""
    caller, producer = Caller(get()), Producer()
    caller.transport.producer.pauseProducing()
    caller.request.registerProducer(producer, True)

    assert producer.calls == ["pause"]


@pytest.mark.parametrize("how", ["finish", "break_off"])
def test_an_ended_response_forgets_its_producer(how: str) -> None:
    """After the end the wire's fullness is no business of the producer's."""
    caller, producer = Caller(get()), Producer()
    channel = caller.transport.producer
    caller.request.start(200, [])
    caller.request.flush()
    caller.request.registerProducer(producer, True)
    getattr(caller.request, how)()
    channel.pauseProducing()
    channel.resumeProducing()

    assert not producer.calls


# --- exceptions -----------------------------------------------------------------------------------


@pytest.mark.parametrize("started", [True, False])
def test_an_exception_is_a_bare_500_or_a_break(started: bool, logged_failures: Any) -> None:
    """No page of Twisted's is shown, and a stream that has begun is not ended as if whole."""

    def fail(current: Request) -> None:
        if started:
            current.start(200, [])
            current.flush()
            current.write(b"x")
        raise ZeroDivisionError

    caller = Caller()
    caller.resource.act = fail
    caller.send(get())

    assert len(logged_failures.flush(ZeroDivisionError)) == 1
    if started:
        assert caller.transport.value().endswith(b"\r\n\r\n1\r\nx\r\n")
        assert caller.closed() == ["lose"]
    else:
        assert caller.transport.value().endswith(b"Error\r\ncontent-length: 0\r\n\r\n")
