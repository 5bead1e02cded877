"""One request and its response: framing for every kind of client, endings, bounds of bodies."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from twisted.internet.defer import Deferred
from twisted.internet.testing import StringTransport
from twisted.python.failure import Failure

from llmproxy.config import Limits
from llmproxy.errors import ClientGone, ClientStalled
from llmproxy.http1.grammar import Fields
from llmproxy.server.request import Request
from tests.server.caller import GET, LAST_CHUNK, Caller
from tests.support.ends import Push
from tests.support.fake_transport import RESET
from tests.support.sockets import chunked, request

LENGTH = [(b"content-length", b"5")]
GET_1_0 = request("GET", "/", version="1.0")
HEAD = request("HEAD", "/")
CHUNKED_POST = request("POST", "/", "Transfer-Encoding: chunked")


# --- the request ----------------------------------------------------------------------------------


def test_a_requests_head_is_kept_as_it_came() -> None:
    """Names are in lower case; values, their order and the target are those of the client."""
    caller = Caller(b"GET /a%2f?b?c HTTP/1.1\r\nHost: h\r\nX-B: 1\r\nx-a:\t\xff \r\nX-B: 2\r\n\r\n")

    expected = [(b"host", b"h"), (b"x-b", b"1"), (b"x-a", b"\xff"), (b"x-b", b"2")]
    assert caller.request.fields == expected
    assert (caller.request.uri, caller.request.path) == (b"/a%2f?b?c", b"/a%2f")


@pytest.mark.parametrize(
    ("data", "body"),
    [
        (request("POST", "/", body=b"hello world"), b"hello world"),
        (CHUNKED_POST + chunked(b"hello", b" world") + LAST_CHUNK, b"hello world"),
        (request("POST", "/", "Content-Length: 0"), b""),
    ],
)
def test_a_body_is_whole_at_every_split(data: bytes, body: bytes) -> None:
    """However the bytes are split, the request is served once, with its whole body in memory."""
    for at in range(1, len(data)):
        caller = Caller(data[:at])
        assert not caller.handler.requests
        caller.send(data[at:])
        assert [got.body for got in caller.handler.requests] == [body]
        assert caller.request.body_bytes == caller.site.memory.held == len(body)


# --- bounds ---------------------------------------------------------------------------------------


def test_a_body_of_the_most_bytes_is_taken() -> None:
    """The limit itself is allowed, with a length and in chunks."""
    exact = b"x" * 100
    for data in (request("POST", "/", body=exact), CHUNKED_POST + chunked(exact) + LAST_CHUNK):
        assert Caller(data, limit=100).request.refusal is None


def test_a_length_over_the_limit_is_refused_before_the_body() -> None:
    """The head is enough: the response is 413, and no byte of the body is asked for or held."""
    caller = Caller(request("POST", "/", "Content-Length: 101", "Expect: 100-continue"), limit=100)

    assert caller.request.refusal is not None
    assert (caller.request.refusal.status, caller.request.body) == (413, b"")
    assert b"100 Continue" not in caller.transport.value()
    caller.send(b"x" * 101)
    assert caller.site.memory.held == 0
    assert len(caller.handler.requests) == 1


def test_a_chunked_body_is_refused_where_it_grows_too_large() -> None:
    """The chunk that goes over the limit ends the reading, and the held bytes are released."""
    caller = Caller(CHUNKED_POST, chunked(b"x" * 100), limit=100)
    assert (caller.handler.requests, caller.site.memory.held) == ([], 100)
    caller.send(chunked(b"x"))

    assert caller.request.refusal is not None
    assert (caller.request.refusal.status, caller.site.memory.held) == (413, 0)
    caller.send(chunked(b"x" * 50), LAST_CHUNK)
    assert len(caller.handler.requests) == 1


def test_all_bodies_together_are_bounded() -> None:
    """When the process holds as much as it may, the response is 503 and says when to retry."""
    caller = Caller(request("POST", "/", body=b"x" * 80), limits=Limits(request_memory=100))
    first = caller.request
    caller.connect()
    caller.send(request("POST", "/", body=b"x" * 21))

    refusal = caller.request.refusal
    assert refusal is not None
    assert refusal.status == 503
    assert (b"retry-after", b"1") in refusal.fields
    assert caller.site.memory.held == 80
    first.release()
    caller.connect()
    caller.send(request("POST", "/", body=b"x" * 21))
    assert caller.request.refusal is None


ENDINGS: dict[str, Callable[[Caller], object]] = {
    "finished": lambda caller: caller.request.finish(),
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
    assert caller.site.memory.held == 5
    if ending not in ("aborted", "lost"):
        caller.start(fields=LENGTH if ending == "short" else [])
    ENDINGS[ending](caller)
    assert caller.site.memory.held == 0
    caller.transport.end(RESET)
    assert caller.site.memory.held == 0


@pytest.mark.parametrize("rest", [b"", b"zz\r\n", b"5\r\nhello!", b"3\nabc\r\n"])
def test_a_body_that_is_never_whole_is_not_served(rest: bytes) -> None:
    """A broken body gets one 400 and the connection closes; its memory is released."""
    caller = Caller(CHUNKED_POST + chunked(b"hello"))
    assert caller.site.memory.held == 5
    caller.send(rest, rest, GET if rest else b"")

    assert caller.status == (400 if rest else 0)
    assert caller.is_open() is (rest == b"")
    caller.transport.end(RESET)
    assert caller.site.memory.held == 0
    assert len(caller.handler.requests) == bool(rest)
    assert not any(got.refusal is None or got.body for got in caller.handler.requests)


# --- the head of the response ---------------------------------------------------------------------

CHUNKED, CLOSE = b"transfer-encoding: chunked\r\n", b"connection: close\r\n"
FIVE = b"content-length: 5\r\n"


@pytest.mark.parametrize(
    ("data", "status", "fields", "framing"),
    [
        (GET, 200, [], CHUNKED),
        (GET, 200, LENGTH, FIVE),
        (GET_1_0, 200, [], CLOSE),
        (GET_1_0, 200, LENGTH, FIVE + CLOSE),
        (request("GET", "/", "Connection: close"), 200, [], CHUNKED + CLOSE),
        (HEAD, 200, [], b""),
        (HEAD, 200, LENGTH, FIVE),
        (request("HEAD", "/", version="1.0"), 200, LENGTH, FIVE + CLOSE),
        (GET, 204, [], b""),
        (GET, 204, LENGTH, b""),
        (HEAD, 204, [(b"content-length", b"0")], b""),
        (GET, 304, LENGTH, FIVE),
        (GET, 529, [], CHUNKED),
    ],
)
def test_the_head_goes_out_at_once_and_in_one_piece(
    data: bytes, status: int, fields: Fields, framing: bytes
) -> None:
    """It is the status, our fields and the framing that the client knows; Twisted adds nothing."""
    caller = Caller(data)
    caller.start(status, [(b"x-a", b"1"), (b"x-a", b"2"), *fields])
    caller.start(500, LENGTH)  # a head goes out once

    (head,) = caller.transport.writes
    first, _, rest = head.partition(b"\r\n")
    assert first.startswith(b"HTTP/1.1 %d " % status)
    assert rest == b"x-a: 1\r\nx-a: 2\r\n" + framing + b"\r\n"
    assert caller.request.status == status


# --- its body -------------------------------------------------------------------------------------


def test_each_piece_is_one_write() -> None:
    """A piece leaves at once, with its chunk framing around it, and is counted."""
    caller = Caller(GET)
    current = caller.start()
    for data in (b"hello", b"", b"x" * 17):
        current.write(data)
    current.finish()

    expected = [b"5\r\nhello\r\n", b"11\r\n" + b"x" * 17 + b"\r\n", LAST_CHUNK]
    assert caller.transport.writes[1:] == expected
    assert current.sent == 22


@pytest.mark.parametrize("is_first", [True, False], ids=["with the head", "later"])
def test_the_last_piece_and_the_end_are_one_write(is_first: bool) -> None:
    """The head is in it, too, if nothing has left before; the end follows once."""
    caller = Caller(GET)
    current = caller.request
    current.start(200, [])
    if not is_first:
        current.write(b"hello")
    current.write_last(b"x" * 17)
    current.finish()

    last = b"11\r\n" + b"x" * 17 + b"\r\n" + LAST_CHUNK
    assert len(caller.transport.writes) == (1 if is_first else 2)
    assert caller.transport.writes[-1].endswith(CHUNKED + b"\r\n" + last if is_first else last)
    assert is_first or caller.transport.writes[-1] == last
    assert current.sent == (17 if is_first else 22)
    assert not caller.closes()


@pytest.mark.parametrize(
    ("data", "fields", "body"),
    [(GET, LENGTH, b"hello"), (GET_1_0, [], b"hello"), (HEAD, [], b"")],
)
def test_a_last_piece_without_chunks_is_a_piece(data: bytes, fields: Fields, body: bytes) -> None:
    """With a length, for HTTP/1.0, and where no body belongs, nothing stands behind it."""
    caller = Caller(data)
    current = caller.start(fields=fields)
    current.write_last(b"hello")
    current.finish()

    assert b"".join(caller.transport.writes[1:]) == body
    current.write_last(b"too late")
    assert b"".join(caller.transport.writes[1:]) == body


@pytest.mark.parametrize(("data", "fields"), [(GET, LENGTH), (GET_1_0, LENGTH), (GET_1_0, [])])
def test_without_chunks_the_bytes_are_the_body(data: bytes, fields: Fields) -> None:
    """With a length, and for HTTP/1.0, nothing stands between the pieces."""
    caller = Caller(data)
    current = caller.start(fields=fields)
    current.write(b"he")
    current.write(b"llo")
    current.finish()

    assert caller.transport.writes[1:] == [b"he", b"llo"]
    assert caller.closes() == (["half"] if data == GET_1_0 else [])


@pytest.mark.parametrize(
    ("data", "counts", "taken"),
    [(GET, True, True), (GET, False, False), (GET_1_0, True, False), (HEAD, True, False)],
)
def test_chunks_are_forwarded_verbatim_where_both_sides_use_them(
    data: bytes, counts: bool, taken: bool
) -> None:
    """The transport must count bytes, too; forwarding starts behind the response's first piece."""
    caller = Caller(data)
    caller.transport.counts = counts
    current = caller.request
    current.start(200, [])
    before = current.verbatim()
    current.write(b"hello")
    verbatim = current.verbatim()
    if verbatim is not None:
        verbatim(b"1\r\n!\r\n")
    assert (before, verbatim is not None) == (None, taken)
    assert caller.channel.written == len(caller.transport.value())
    assert current.sent == (0 if data == HEAD else 5)
    current.finish()
    assert current.verbatim() is None
    if taken:
        assert caller.transport.writes[1:] == [b"1\r\n!\r\n", LAST_CHUNK]


@pytest.mark.parametrize(("data", "status"), [(HEAD, 200), (GET, 204), (GET, 304)])
def test_where_no_body_belongs_none_is_written(data: bytes, status: int) -> None:
    """The body of a response that has none is dropped, and the connection goes on."""
    caller = Caller(data)
    current = caller.start(status, LENGTH)
    current.write(b"hello")
    current.finish()

    assert len(caller.transport.writes) == 1
    assert current.sent == 0
    caller.send(GET)
    assert len(caller.handler.requests) == 2


def test_a_response_can_be_left_to_twisted() -> None:
    """A resource that only writes gets a head from the response headers that it set."""
    caller = Caller(GET)
    caller.request.setResponseCode(201)
    caller.request.responseHeaders.addRawHeader(b"X-A", b"1")
    caller.request.write(b"x")
    caller.request.finish()

    head, _, body = caller.transport.value().partition(b"\r\n\r\n")
    assert head == b"HTTP/1.1 201 Created\r\nx-a: 1\r\ntransfer-encoding: chunked"
    assert body == b"1\r\nx\r\n" + LAST_CHUNK


# --- the end of the response ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("how", "fields"), [("break_off", LENGTH), ("break_off", []), ("finish", LENGTH)]
)
def test_a_broken_response_never_looks_whole(how: str, fields: Fields) -> None:
    """The connection closes behind all that was written, without its length or its last chunk."""
    caller = Caller(GET)
    current = caller.start(fields=fields)
    current.write(b"hel")
    getattr(current, how)()

    assert caller.transport.value().endswith((b"\r\n\r\nhel", b"3\r\nhel\r\n"))
    assert caller.closes() == ["half"]
    caller.send(GET)
    assert len(caller.handler.requests) == 1


@pytest.mark.parametrize("leaves", [False, True], ids=["reads", "leaves"])
def test_a_broken_response_without_framing_ends_with_a_reset(leaves: bool) -> None:
    """HTTP/1.0: the reset comes when the queue is empty, and nothing is left behind."""
    caller = Caller(GET_1_0)
    current = caller.start()
    caller.transport.hold(10)
    current.break_off()
    if not leaves:
        caller.clock.pump([0.1] * 20)
        assert not caller.closes()
        caller.transport.hold(0)
        caller.clock.advance(0.5)
        assert caller.closes() == ["abort"]
    caller.transport.end(RESET)
    assert not caller.clock.getDelayedCalls()


def test_an_abort_drops_the_client_at_once() -> None:
    """The handler gets the reason once, and the connection is aborted."""
    caller = Caller(GET)
    current, why = caller.start(), ClientStalled()
    for _ in range(2):
        current.abort(why)
    caller.transport.end(RESET)

    assert caller.handler.gone == [why]
    assert caller.closes() == ["abort"]


def do_everything(current: Request) -> None:
    """Call each method that would change a response."""
    current.start(200, [])
    current.flush()
    current.write(b"x")
    current.finish()
    current.break_off()
    current.abort(ClientStalled())
    current.unregisterProducer()


@pytest.mark.parametrize("started", [True, False])
def test_a_client_that_leaves_is_reported_once(started: bool) -> None:
    """The handler gets the reason; later calls of the request's methods have no effect."""
    caller = Caller(GET)
    if started:
        caller.start()
    written = caller.transport.value()
    caller.transport.end(RESET)
    assert [type(why) for why in caller.handler.gone] == [ClientGone]
    do_everything(caller.request)

    assert len(caller.handler.gone) == 1
    assert caller.transport.value() == written
    assert not caller.closes()
    assert caller.request.status == (200 if started else None)


def test_an_ended_response_is_over() -> None:
    """After its end nothing is written or reported; the connection may serve another request."""
    caller = Caller(GET + GET)
    first = caller.start()
    reported: list[ClientGone] = []
    first.gone = reported.append
    first.finish()
    written = caller.transport.value()
    do_everything(first)
    caller.clock.advance(0)

    assert caller.transport.value() == written
    assert not caller.closes()
    caller.transport.end(RESET)
    assert (len(reported), len(caller.handler.gone)) == (0, 1)


@pytest.mark.parametrize("how", ["finish", "break_off"])
def test_the_end_of_a_response_is_reported(how: str) -> None:
    """``notifyFinish`` fires when the response has ended, whole or broken."""
    caller = Caller(GET)
    ended: Deferred[None] = caller.request.notifyFinish()
    getattr(caller.start(), how)()

    assert ended.called


# --- producers ------------------------------------------------------------------------------------


def test_a_producer_is_paused_by_a_full_transport() -> None:
    """The transport's pause and resume reach the producer, and its end stops the producer."""
    caller, producer = Caller(GET), Push()
    caller.request.registerProducer(producer, True)
    caller.transport.producer.pauseProducing()
    caller.transport.producer.resumeProducing()
    caller.transport.end(RESET)

    assert producer.told == ["pause", "resume", "stop"]


def test_a_producer_that_comes_late_is_paused_at_once() -> None:
    """A transport that was full before is full for the new producer, too."""
    caller, producer = Caller(GET), Push()
    caller.transport.producer.pauseProducing()
    caller.request.registerProducer(producer, True)

    assert producer.told == ["pause"]


@pytest.mark.parametrize("how", ["finish", "break_off"])
def test_an_ended_response_forgets_its_producer(how: str) -> None:
    """After the end a full transport does not pause the producer."""
    caller, producer = Caller(GET), Push()
    channel = caller.transport.producer
    current = caller.start()
    current.registerProducer(producer, True)
    getattr(current, how)()
    channel.pauseProducing()
    channel.resumeProducing()

    assert not producer.told


# --- exceptions -----------------------------------------------------------------------------------


@pytest.mark.parametrize("started", [True, False])
def test_an_exception_is_a_bare_500_or_a_break(started: bool, logged_failures: Any) -> None:
    """Twisted's page is not shown, and a stream that has begun does not end as if it were whole."""

    def fail(current: Request) -> None:
        if started:
            current.start(200, [])
            current.flush()
            current.write(b"x")
        raise ZeroDivisionError

    caller = Caller()
    caller.handler.act = fail
    caller.send(GET)

    assert len(logged_failures.flush(ZeroDivisionError)) == 1
    if started:
        assert caller.transport.value().endswith(b"\r\n\r\n1\r\nx\r\n")
        assert caller.closes() == ["half"]
    else:
        assert caller.transport.value().endswith(b"Error\r\ncontent-length: 0\r\n\r\n")


@pytest.mark.parametrize("rest", [LAST_CHUNK, b"x" * 8, LAST_CHUNK + GET])
def test_an_upload_that_breaks_a_response_off_ends_there(rest: bytes) -> None:
    """What comes in the same read as the byte too many begins nothing more on this connection."""
    caller = Caller(limit=100)
    caller.handler.holds = False
    caller.send(request("POST", "/", "Transfer-Encoding: chunked"))
    current = caller.start()
    why: list[object] = []

    def failed(failure: Failure) -> None:
        why.append(failure.value)
        current.break_off()

    assert current.upload is not None
    current.upload.startProducing(StringTransport()).addErrback(failed)
    current.write(b"some")
    caller.send(chunked(bytes(101)) + rest)

    assert [str(error) for error in why] == ["The request body is larger than 100 bytes."]
    assert caller.transport.take().endswith(b"some\r\n")
    assert caller.closes() == ["half"]
    assert len(caller.handler.requests) == 1
    caller.pass_time(10)
    assert caller.closes() == ["half", "close"]  # it is not served for ever
