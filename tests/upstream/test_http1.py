"""One connection to a provider: what is a response, where it ends, and which request is next."""

from __future__ import annotations

from typing import Any

import pytest
from twisted.internet.defer import CancelledError, Deferred
from twisted.python.failure import Failure
from twisted.web.client import ResponseDone
from twisted.web.iweb import UNKNOWN_LENGTH

from llmproxy.errors import EndReason, ProxyError
from llmproxy.http1.grammar import MAX_FIELDS
from llmproxy.upstream.http1 import MAX_INTERIM, Connection, State
from llmproxy.upstream.response import Response
from tests.support.fake_transport import ABORTED, FIN, RESET, Collector, FakeTransport
from tests.upstream.one_provider import PlayedBody

OK = b"HTTP/1.1 200 OK\r\n"
LENGTH = OK + b"Content-Length: 5\r\n\r\n"
CHUNKED = OK + b"Transfer-Encoding: chunked\r\n\r\n"
CLOSE = OK + b"\r\n"


class Sent:
    """A connection on which one request was sent, and what came of it."""

    def __init__(self, method: bytes = b"GET", body: Any = None, max_head: int = 4096) -> None:
        self.idle: list[Connection] = []
        self.closed: list[Connection] = []
        self.transport = FakeTransport()
        self.connection = Connection(
            max_head=max_head,
            became_idle=self.idle.append,
            closed=self.closed.append,
            secure=False,
        )
        self.transport.connect(self.connection)
        self.collector = Collector()
        self.ask(method, body)

    def ask(self, method: bytes = b"GET", body: Any = None) -> Deferred[Response]:
        """Send a request; its outcome is kept in ``outcome``."""
        self.outcome: Any = None
        self.waiting = self.connection.send(method, method + b" / HTTP/1.1\r\n\r\n", body)
        self.waiting.addBoth(self._keep)
        return self.waiting

    def _keep(self, outcome: Any) -> None:
        self.outcome = outcome.value if isinstance(outcome, Failure) else outcome

    def feed(self, *reads: bytes) -> None:
        """Let bytes come in, read by read."""
        for read in reads:
            self.connection.dataReceived(read)

    def response(self, *reads: bytes) -> Response:
        """Let a response come in, and have its body delivered as soon as the head is there."""
        delivered = False
        for read in reads:
            self.feed(read)
            if isinstance(self.outcome, Response) and not delivered:
                delivered = True
                self.outcome.deliverBody(self.collector)
        assert isinstance(self.outcome, Response)
        return self.outcome

    def end(self) -> Any:
        """Return why the body ended, which must have happened once."""
        assert len(self.collector.ends) == 1
        return self.collector.ends[0]

    def assert_whole(self, body: bytes) -> None:
        """The body came as a whole."""
        assert (self.collector.body, type(self.end())) == (body, ResponseDone)

    def assert_broken(self, end: EndReason) -> None:
        """The body broke, for this reason."""
        assert isinstance(self.end(), ProxyError)
        assert self.end().end is end

    def assert_refused(self) -> None:
        """The head was refused, and the connection closed at once."""
        assert isinstance(self.outcome, ProxyError)
        assert self.outcome.end is EndReason.UPSTREAM_PROTOCOL
        assert self.transport.count("abort") == 1
        assert not self.idle


def splits(data: bytes) -> list[tuple[bytes, bytes]]:
    """Return every split of ``data`` into two parts, neither of them empty."""
    return [(data[:at], data[at:]) for at in range(1, len(data))]


# --- the head -------------------------------------------------------------------------------------


def test_the_request_is_written_in_one_piece() -> None:
    """A request without a body is its head and nothing else, without Nagle's delay."""
    sent = Sent()

    assert sent.transport.writes == [b"GET / HTTP/1.1\r\n\r\n"]
    assert sent.transport.count("nodelay") == 1


@pytest.mark.parametrize("head", [LENGTH, CHUNKED, CLOSE, b"HTTP/1.1 100 Go\r\n\r\n" + LENGTH])
def test_a_head_may_be_split_at_any_point(head: bytes) -> None:
    """Status and fields are the same at every split of the head, and the body is paused by then."""
    for first, second in splits(head):
        sent = Sent()
        sent.feed(first)
        assert not sent.waiting.called
        sent.feed(second)
        assert isinstance(sent.outcome, Response)
        assert sent.outcome.code == 200
        assert sent.transport.is_paused()


def test_a_field_line_may_be_as_long_as_the_head() -> None:
    """Only the limit of the whole head bounds a line: policies and cookies may be long."""
    line = b"x-long: " + b"v" * 16_000
    rest = b"\r\ncontent-length: 0\r\n\r\n"
    whole = OK + line + rest
    sent = Sent(max_head=len(whole) - 4)

    assert sent.response(whole).first[b"x-long"] == b"v" * 16_000
    refused = Sent(max_head=len(whole) - 5)
    refused.feed(whole)
    refused.assert_refused()


def test_fields_keep_order_and_values_and_stay_away_from_treq() -> None:
    """The fields are those that came, names in lower case; treq's own view of them is empty."""
    response = Sent().response(OK + b"X-B: 2 \r\nx-a:\t1\r\nX-B: \xff\r\ncontent-length: 0\r\n\r\n")

    expected = [(b"x-b", b"2"), (b"x-a", b"1"), (b"x-b", b"\xff"), (b"content-length", b"0")]
    assert response.fields == expected
    assert response.version == (b"HTTP", 1, 1)
    assert not list(response.headers.getAllRawHeaders())
    assert (response.phrase, response.request, response.previousResponse) == (b"", None, None)
    with pytest.raises(NotImplementedError):
        response.setPreviousResponse(response)


@pytest.mark.parametrize("status", [100, 102, 103, 199])
def test_interim_responses_are_skipped(status: int) -> None:
    """A 1xx response is not the response; a framing in it frames nothing."""
    interim = b"HTTP/1.1 %d X\r\ncontent-length: 7\r\n\r\n" % status
    sent = Sent()
    sent.response(interim + interim + LENGTH + b"hello")

    sent.assert_whole(b"hello")


@pytest.mark.parametrize("together", [True, False])
def test_interim_responses_are_counted(together: bool) -> None:
    """As many 1xx responses as allowed are skipped, and one more is refused."""
    interim = [b"HTTP/1.1 103 Hint\r\n\r\n"] * MAX_INTERIM
    allowed, refused = Sent(), Sent()
    allowed.feed(*([b"".join(interim)] if together else interim))
    assert allowed.outcome is None
    assert not allowed.transport.count("abort")

    refused.feed(*([b"".join(interim) + interim[0]] if together else [*interim, interim[0]]))
    refused.assert_refused()


@pytest.mark.parametrize(
    "head",
    [
        b"HTTP/1.1 101 Switching Protocols\r\nupgrade: x\r\nconnection: upgrade\r\n\r\n",
        b"HTTP/1.1 2_0 OK\r\n\r\n",
        b"HTTP/1.1 -20 OK\r\n\r\n",
        b"HTTP/1.1 600 OK\r\n\r\n",
        b"HTTP/2 200\r\n\r\n",
        b"ICY 200 OK\r\n\r\n",
        b"\r\nHTTP/1.1 200 OK\r\n\r\n",
        b"HTTP/1.1 200 O\rK\r\n\r\n",
        b"HTTP/1.1 200 OK\nx: y\r\n\r\n",
        OK + b" folded: x\r\n\r\n",
        OK + b"a: b\r\n folded\r\n\r\n",
        OK + b"spaced : x\r\n\r\n",
        OK + b"nul: a\0b\r\n\r\n",
        OK + b"no colon\r\n\r\n",
        OK + b"a: b\r\n" * (MAX_FIELDS + 1) + b"\r\n",
        OK + b"content-length: 5\r\ncontent-length: 5\r\n\r\nhello",
        OK + b"content-length: 5, 5\r\n\r\nhello",
        OK + b"content-length: +5\r\n\r\nhello",
        OK + b"content-length: 5\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n",
        OK + b"transfer-encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
        OK + b"transfer-encoding: chunked\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n",
        OK + b"transfer-encoding: identity\r\n\r\n",
        OK + b"transfer-encoding:\r\n\r\n",
        b"HTTP/1.0 200 OK\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n",
    ],
)
def test_what_is_not_a_response_is_refused(head: bytes) -> None:
    """A malformed head, or one that frames its body twice or strangely, is a bad upstream."""
    sent = Sent()
    sent.feed(head)

    sent.assert_refused()
    sent.feed(LENGTH)
    sent.transport.end(ABORTED)
    sent.assert_refused()
    assert sent.closed == [sent.connection]


@pytest.mark.parametrize("whole", [True, False])
def test_a_head_is_bounded(whole: bool) -> None:
    """A head of the most bytes passes and one more is refused, also before its end is in sight."""
    fits = (OK + b"x: ").ljust(100, b"y") + b"\r\n\r\n"
    sent, refused = Sent(max_head=100), Sent(max_head=100)
    sent.feed(fits)
    assert isinstance(sent.outcome, Response)

    over = fits.replace(b"x: ", b"x: y")
    refused.feed(over if whole else over[:104])  # the empty line may be split
    refused.assert_refused()


def test_a_long_body_behind_a_short_head_is_no_long_head() -> None:
    """The bound is on the head alone, whatever came in the same read."""
    sent = Sent(max_head=100)
    sent.response(OK + b"content-length: 9999\r\n\r\n" + bytes(9999))

    sent.assert_whole(bytes(9999))


# --- the body and its framings --------------------------------------------------------------------

BODIES = [
    (LENGTH, b"hello", b"hello"),
    (CHUNKED, b"2\r\nhe\r\n3;x=1\r\nllo\r\n0\r\nt: v\r\n\r\n", b"hello"),
    (OK + b"transfer-encoding: Chunked\r\n\r\n", b"0\r\n\r\n", b""),
    (OK + b"content-length: 0\r\n\r\n", b"", b""),
    (b"HTTP/1.1 204 None\r\n\r\n", b"", b""),
    (b"HTTP/1.1 204 None\r\ntransfer-encoding: chunked\r\n\r\n", b"", b""),
    (b"HTTP/1.1 304 Same\r\ncontent-length: 5\r\n\r\n", b"", b""),
]


@pytest.mark.parametrize(("head", "wire", "body"), BODIES)
def test_a_body_ends_where_its_framing_says(head: bytes, wire: bytes, body: bytes) -> None:
    """At every split of the response the body is the same, and the connection is free again."""
    whole = head + wire
    for reads in [*splits(whole), (whole,), tuple(bytes([byte]) for byte in whole)]:
        sent = Sent()
        sent.response(*reads)
        sent.assert_whole(body)
        assert b"" not in sent.collector.pieces
        assert sent.idle == [sent.connection]
        assert sent.connection.state is State.IDLE
        assert not sent.transport.is_paused()


@pytest.mark.parametrize(
    ("head", "length"),
    [(LENGTH, 5), (CHUNKED, UNKNOWN_LENGTH), (CLOSE, UNKNOWN_LENGTH)],
)
def test_the_announced_length_is_reported(head: bytes, length: object) -> None:
    """The length is what the provider announced, else unknown; so it is for HEAD."""
    for method in (b"GET", b"HEAD"):
        assert Sent(method).response(head).length == length


@pytest.mark.parametrize("head", [LENGTH, CHUNKED, CLOSE])
def test_a_response_to_head_has_no_body(head: bytes) -> None:
    """Whatever its fields announce, a response to HEAD ends with its head."""
    sent = Sent(b"HEAD")
    sent.response(head)

    sent.assert_whole(b"")
    assert sent.idle == [sent.connection]


def test_the_chunks_of_one_read_are_one_piece() -> None:
    """What one read held is forwarded together, without the framing between."""
    sent = Sent()
    sent.response(CHUNKED, b"1\r\na\r\n2\r\nbc\r\n1\r\nd\r\n2", b"\r\nef", b"\r\n0\r\n\r\n")

    assert sent.collector.pieces == [b"abcd", b"ef"]


ENDS = [
    *((CLOSE + b"text", FIN, b"text", True), (CLOSE + b"text", RESET, b"text", False)),
    (CLOSE + b"text", ABORTED, b"text", False),
    *((LENGTH + b"hel", FIN, b"hel", False), (LENGTH + b"hel", RESET, b"hel", False)),
    *((CHUNKED + b"5\r\nhello\r\n", reason, b"hello", False) for reason in (FIN, RESET)),
    *((head + wire, RESET, body, True) for head, wire, body in BODIES),
]


@pytest.mark.parametrize(("wire", "reason", "body", "whole"), ENDS)
@pytest.mark.parametrize("late", [True, False])
def test_a_body_ends_as_its_framing_and_its_connection_say(
    wire: bytes, reason: Exception, body: bytes, whole: bool, late: bool
) -> None:
    """FIN alone ends a close-delimited body; a short one is broken; also where it is read late."""
    sent = Sent()
    sent.feed(wire)
    if not late:
        sent.outcome.deliverBody(sent.collector)
    sent.transport.end(reason)
    if late:
        sent.outcome.deliverBody(sent.collector)

    assert sent.collector.body == body
    if whole:
        sent.assert_whole(body)
    else:
        sent.assert_broken(EndReason.UPSTREAM_BROKEN)
    assert sent.closed == [sent.connection]


def test_a_body_that_we_abort_is_never_whole() -> None:
    """After our own abort not even a FIN makes a close-delimited body whole."""
    sent = Sent()
    response = sent.response(CLOSE + b"text")
    response.abort()
    sent.transport.end(FIN)

    sent.assert_broken(EndReason.UPSTREAM_BROKEN)


@pytest.mark.parametrize(
    ("wire", "good"),
    [(b"zz\r\n", b""), (b"5\r\nhello!", b"hello"), (b"-1\r\n", b""), (b"5\nhello\r\n", b"")],
)
def test_a_faulty_chunk_breaks_the_body(wire: bytes, good: bytes) -> None:
    """What is not the chunked coding closes the connection, after what was good before it."""
    sent = Sent()
    sent.response(CHUNKED + b"2\r\nhi\r\n", wire)

    sent.assert_broken(EndReason.UPSTREAM_PROTOCOL)
    assert sent.collector.body == b"hi" + good
    assert sent.transport.count("abort") == 1
    sent.feed(b"0\r\n\r\n")
    sent.transport.end(ABORTED)
    sent.assert_broken(EndReason.UPSTREAM_PROTOCOL)


# --- a body that is whole when its head is --------------------------------------------------------

WHOLE = {
    "length": LENGTH + b"abcde",
    "chunked": CHUNKED + b"2\r\nab\r\n3;x=y\r\ncde\r\n0\r\n\r\n",
    "a trailer section": CHUNKED + b"5\r\nabcde\r\n0\r\nt: 1\r\n\r\n",
    "an interim response": b"HTTP/1.1 103 Hints\r\n\r\n" + LENGTH + b"abcde",
    "nothing": OK + b"Content-Length: 0\r\n\r\n",
    "a status without a body": b"HTTP/1.1 204 None\r\n\r\n",
    "no use afterwards": OK + b"Connection: close\r\nContent-Length: 5\r\n\r\nabcde",
    "more than asked for": LENGTH + b"abcde!",
    "until the end": CLOSE + b"abcde",
    "content that looks like an end": CHUNKED + b"a\r\nabc0\r\n\r\nde\r\n0\r\n\r\n",
    "an end that looks like another": CHUNKED + b"5\r\n0\r\n\r\n\r\n0\r\n\r\n",
    "a size that is none": CHUNKED + b"2\r\nab\r\nzz\r\n0\r\n\r\n",
    "half": CHUNKED + b"9\r\nabc0\r\n\r\n",
}


class Delivered(Sent):
    """The same, where the body is delivered in the turn of its head."""

    def _keep(self, outcome: Any) -> None:
        super()._keep(outcome)
        if isinstance(self.outcome, Response):
            self.outcome.deliverBody(self.collector)

    def came(self) -> tuple[Any, ...]:
        """Return the body, how it ended, and what became of the connection."""
        ends = [str(getattr(end, "end", type(end).__name__)) for end in self.collector.ends]
        connection = self.connection
        return (
            *(self.collector.body, ends, connection.state, connection.aborted, len(self.idle)),
            *(len(self.closed), self.transport.is_paused(), self.transport.count("abort")),
        )


class Taken(Delivered):
    """The same, where a body that is whole is taken."""

    taken: bytes | None = None

    def _keep(self, outcome: Any) -> None:
        Sent._keep(self, outcome)
        if isinstance(self.outcome, Response):
            self.taken = self.outcome.take_whole()
            if self.taken is None:
                self.outcome.deliverBody(self.collector)
            else:
                if self.taken:
                    self.collector.dataReceived(self.taken)
                self.collector.connectionLost(Failure(ResponseDone()))


@pytest.mark.parametrize("reason", [FIN, RESET])
@pytest.mark.parametrize("name", WHOLE)
def test_a_body_is_the_same_whether_it_is_taken_or_delivered(name: str, reason: Exception) -> None:
    """At every split, and so is what becomes of the connection."""
    for reads in [(WHOLE[name],), *splits(WHOLE[name])]:
        taken, delivered = Taken(), Delivered()
        for sent in (taken, delivered):
            sent.feed(*reads)
        assert taken.came() == delivered.came(), reads
        for sent in (taken, delivered):
            sent.transport.end(reason)
        assert taken.came() == delivered.came(), reads


def test_what_is_whole_is_taken_at_once() -> None:
    """No reading is stopped and none begun, and the connection is idle again."""
    for name in ("length", "chunked", "an interim response"):
        taken = Taken()
        taken.feed(WHOLE[name])
        assert (taken.taken, taken.idle) == (b"abcde", [taken.connection])
        assert taken.transport.count("pause") == 0
        taken.ask()
        taken.feed(WHOLE["nothing"])
        assert taken.taken == b""
    for name in ("until the end", "half", "a size that is none"):
        taken = Taken()
        taken.feed(WHOLE[name])
        assert taken.taken is None


def test_a_turn_later_nothing_is_taken() -> None:
    """Reading has been stopped by then, and is begun by whoever has the body delivered."""
    sent = Sent()
    sent.feed(WHOLE["length"])
    assert isinstance(sent.outcome, Response)
    assert sent.outcome.take_whole() is None
    sent.outcome.deliverBody(sent.collector)
    sent.assert_whole(b"abcde")


# --- whether the connection serves another --------------------------------------------------------


@pytest.mark.parametrize("apart", [True, False])
@pytest.mark.parametrize(
    ("method", "head", "wire"),
    [(b"GET", head, wire) for head, wire, _ in BODIES] + [(b"HEAD", LENGTH, b"")],
)
def test_bytes_behind_a_response_never_meet_another_caller(
    method: bytes, head: bytes, wire: bytes, apart: bool
) -> None:
    """Extra bytes close the connection, in the same read as the end or in another."""
    sent = Sent(method)
    extra = LENGTH + b"trick"
    sent.response(*([head + wire, extra] if apart else [head + wire + extra]))

    assert isinstance(sent.end(), ResponseDone)
    assert sent.transport.count("abort") == 1
    assert bool(sent.idle) is apart  # the pool had it back by then; its bytes come as a surprise


@pytest.mark.parametrize(
    "head",
    [
        OK + b"connection: close\r\ncontent-length: 5\r\n\r\n",
        OK + b"Connection: Close\r\ncontent-length: 5\r\n\r\n",
        OK + b"connection: x, CLOSE ,y\r\ncontent-length: 5\r\n\r\n",
        OK + b"connection: keep-alive\r\nconnection: close\r\ncontent-length: 5\r\n\r\n",
        b"HTTP/1.0 200 OK\r\ncontent-length: 5\r\n\r\n",
        b"HTTP/1.0 200 OK\r\nconnection: keep-alive\r\ncontent-length: 5\r\n\r\n",
    ],
)
def test_a_response_that_closes_its_connection_is_believed(head: bytes) -> None:
    """``close`` anywhere in ``Connection``, and HTTP/1.0, end the connection with the response."""
    sent = Sent()
    sent.response(head, b"hello")

    sent.assert_whole(b"hello")
    assert not sent.idle
    assert sent.transport.count("abort") == 1


def test_a_connection_serves_one_request_after_the_other() -> None:
    """Nothing of the first response is left in the second."""
    sent = Sent(b"HEAD")
    sent.response(LENGTH)
    sent.collector = Collector()
    sent.ask(b"GET")
    second = sent.response(CHUNKED + b"1\r\nx\r\n", b"0\r\n\r\n")

    assert second.length is UNKNOWN_LENGTH
    sent.assert_whole(b"x")
    assert sent.idle == [sent.connection] * 2


@pytest.mark.parametrize("delivered", [True, False])
def test_an_ended_response_has_no_hold_on_the_next(delivered: bool) -> None:
    """Aborting a response that has ended leaves the connection to its next request."""
    sent = Sent()
    first = sent.response(LENGTH + b"hello")
    sent.collector = Collector()
    sent.ask()
    if delivered:
        sent.response(LENGTH + b"wor")
    first.abort()

    assert not sent.transport.count("abort")


def test_stray_bytes_while_idle_close_the_connection() -> None:
    """Bytes that belong to no request end an idle connection."""
    sent = Sent()
    sent.response(LENGTH + b"hello")
    sent.feed(b"H")

    assert sent.transport.count("abort") == 1


# --- reading stops and goes on --------------------------------------------------------------------


def test_bytes_that_come_before_the_body_is_read_are_kept() -> None:
    """What came with the head, and after it in spite of the pause, is delivered in order."""
    sent = Sent()
    sent.feed(CHUNKED + b"2\r\nhe", b"\r\n3\r\nllo\r\n0", b"\r\n\r\n")
    assert not sent.idle
    sent.outcome.deliverBody(sent.collector)

    sent.assert_whole(b"hello")
    assert sent.collector.pieces == [b"hello"]
    assert sent.idle == [sent.connection]


def test_the_consumer_has_the_transport_itself() -> None:
    """Pausing and resuming reach the socket; what was in flight still arrives."""
    sent = Sent()
    sent.response(CLOSE)
    transport: Any = sent.collector.transport
    transport.pauseProducing()
    assert sent.transport.is_paused()
    sent.feed(b"late")
    assert sent.collector.body == b"late"
    transport.resumeProducing()
    assert not sent.transport.is_paused()


class TakesChunks(Collector):
    """A consumer that takes chunks in their coding; it keeps each with where its content starts."""

    def __init__(self) -> None:
        super().__init__()
        self.framed: list[tuple[bytes, int]] = []

    def framedReceived(self, data: bytes, start: int) -> None:
        self.framed.append((data, start))
        self.dataReceived(data[start:-2])


def test_a_read_of_one_chunk_is_forwarded_as_it_is_where_that_is_wanted() -> None:
    """Whole chunks alone, without extensions; a split, joined or odd chunk is decoded."""
    sent = Sent()
    sent.collector = collector = TakesChunks()
    whole = [b"5\r\nhello\r\n", b"1e\r\n" + bytes(30) + b"\r\n"]
    other = [
        *(b"2\r\nab\r\n1\r\nc\r\n", b"3\r\nde", b"f\r\n", b"2;x\r\ngh\r\n"),
        *(b"03\r\nijk\r\n", b"1E\r\n" + bytes(30) + b"\r\n"),
    ]
    sent.response(CHUNKED, whole[0], *other, whole[1], b"0\r\n\r\n")
    sent.assert_whole(b"helloabcdefghijk" + bytes(60))
    assert collector.framed == [(whole[0], 3), (whole[1], 4)]
    assert sent.idle == [sent.connection]


class KnowsTheLast(Collector):
    """Is told which piece is the last, where that is known with it."""

    def __init__(self) -> None:
        super().__init__()
        self.last: list[bytes] = []

    def lastReceived(self, data: bytes) -> None:
        self.last.append(data)
        self.dataReceived(data)


@pytest.mark.parametrize(
    ("reads", "last"),
    [
        ([CHUNKED, b"2\r\nab\r\n", b"1\r\nc\r\n0\r\n\r\n"], [b"c"]),
        ([CHUNKED + b"1\r\nc\r\n0\r\n\r\n"], [b"c"]),
        ([CHUNKED + b"1\r\nc\r\n0\r\n\r\nmore"], [b"c"]),
        ([CHUNKED, b"1\r\nc\r\n0\r\n", b"\r\n"], []),
        ([LENGTH + b"he", b"llo"], [b"llo"]),
        ([CHUNKED, b"1\r\nc\r\nfault\r\n"], []),
    ],
)
def test_the_piece_that_came_with_the_end_is_the_last(
    reads: list[bytes], last: list[bytes]
) -> None:
    """The end of the body is known with it; it is reported behind it all the same."""
    sent = Sent()
    sent.collector = collector = KnowsTheLast()
    sent.response(*reads)
    assert collector.last == last
    assert len(collector.ends) == 1


@pytest.mark.parametrize("head", [CLOSE, OK + b"content-length: 10\r\n\r\n"])
def test_what_only_looks_like_a_chunk_is_content(head: bytes) -> None:
    """A body in another framing may hold what would be a chunk."""
    sent = Sent()
    sent.collector = collector = TakesChunks()
    sent.response(head, b"5\r\nhello\r\n"[:10])
    assert (collector.body, collector.framed) == (b"5\r\nhello\r\n"[:10], [])


class PausesAtOnce(Collector):
    """A consumer that is full with its first piece."""

    def dataReceived(self, data: bytes) -> None:
        super().dataReceived(data)
        transport: Any = self.transport
        transport.pauseProducing()


def test_a_consumer_may_pause_on_the_early_bytes() -> None:
    """A pause that comes while the first bytes are delivered is not undone."""
    sent = Sent()
    sent.collector = PausesAtOnce()
    sent.response(OK + b"content-length: 9\r\n\r\nhello")

    assert sent.transport.is_paused()


def test_an_idle_connection_is_read_whatever_its_last_consumer_did() -> None:
    """A pause does not outlive its response: idle connections are watched."""
    sent = Sent()
    sent.collector = PausesAtOnce()
    sent.response(LENGTH, b"hello")

    assert sent.connection.state is State.IDLE
    assert not sent.transport.is_paused()


# --- aborting -------------------------------------------------------------------------------------


@pytest.mark.parametrize("reads", [(), (b"HTTP/1.1 2",), (b"HTTP/1.1 100 Go\r\n\r\n",)])
def test_cancelling_a_request_closes_its_socket_once(reads: tuple[bytes, ...]) -> None:
    """Before the head is in, cancel aborts the transport exactly once and fails the Deferred."""
    sent = Sent()
    sent.feed(*reads)
    sent.waiting.cancel()
    assert isinstance(sent.outcome, CancelledError)
    sent.feed(LENGTH)
    sent.connection.abort()
    sent.transport.end(ABORTED)
    sent.connection.abort()

    assert sent.transport.count("abort") == 1
    assert sent.closed == [sent.connection]


@pytest.mark.parametrize("delivered", [True, False])
def test_aborting_a_response_closes_its_socket_once(delivered: bool) -> None:
    """However often it is asked for, in whatever phase of the body, the socket is aborted once."""
    sent = Sent()
    sent.feed(LENGTH)
    if delivered:
        sent.outcome.deliverBody(sent.collector)
    for _ in range(3):
        sent.outcome.abort()
    sent.feed(b"hello")
    sent.transport.end(ABORTED)
    sent.outcome.abort()

    assert sent.transport.count("abort") == 1
    assert not sent.collector.pieces
    if delivered:
        sent.assert_broken(EndReason.UPSTREAM_BROKEN)


def test_a_consumer_may_abort_inside_its_last_piece() -> None:
    """A consumer that gives up on the very last byte closes the socket once, and no pool has it."""
    sent = Sent()

    class GivesUp(Collector):
        def dataReceived(self, data: bytes) -> None:
            super().dataReceived(data)
            sent.outcome.abort()

    sent.collector = GivesUp()
    sent.response(LENGTH, b"hello")

    assert sent.transport.count("abort") == 1
    assert not sent.idle
    assert len(sent.collector.ends) == 1


@pytest.mark.parametrize("reason", [FIN, RESET])
def test_the_connections_end_before_a_head_fails_the_request(reason: Exception) -> None:
    """A provider that closes without a response has broken it off, whichever way it closed."""
    sent = Sent()
    sent.feed(b"HTTP/1.1 200")
    sent.transport.end(reason)

    assert isinstance(sent.outcome, ProxyError)
    assert sent.outcome.end is EndReason.UPSTREAM_BROKEN
    assert sent.outcome.may_have_run
    assert sent.closed == [sent.connection]


# --- bodies of requests ---------------------------------------------------------------------------


def test_a_body_follows_its_head() -> None:
    """Piece by piece, until its producer ends it; then the response frees the connection."""
    body = PlayedBody()
    sent = Sent(b"POST", body)
    body.consumer.write(b"hello")
    body.end()
    sent.response(LENGTH + b"world")

    head = b"POST / HTTP/1.1\r\n\r\n"
    assert sent.transport.value() == head + b"5\r\nhello\r\n0\r\n\r\n"
    assert sent.idle == [sent.connection]
    assert "stop" not in body.calls


def test_an_early_response_ends_the_upload() -> None:
    """A response that is whole before the request is one stops the body, and the connection."""
    body = PlayedBody()
    sent = Sent(b"POST", body)
    body.consumer.write(b"hel")
    sent.response(LENGTH + b"world")

    sent.assert_whole(b"world")
    assert not sent.idle
    assert (body.calls.count("stop"), sent.transport.count("abort")) == (1, 1)


def test_a_connection_that_still_holds_a_request_is_not_used_again() -> None:
    """Bytes that the kernel did not take would mix with the next request."""
    sent = Sent()
    sent.transport.hold(1)
    sent.response(LENGTH + b"world")

    sent.assert_whole(b"world")
    assert not sent.idle
    assert sent.transport.count("abort") == 1


@pytest.mark.parametrize("reads", [(), (LENGTH + b"wo",)])
def test_a_body_that_fails_takes_the_connection_along(reads: tuple[bytes, ...]) -> None:
    """The Deferred of the head, or the body, gets the reason; the socket is aborted once."""
    body = PlayedBody()
    sent = Sent(b"POST", body)
    if reads:
        sent.response(*reads)
    error = ProxyError(413, "body_too_large", "Too large.")
    body.done.errback(error)
    sent.transport.end(ABORTED)

    assert (sent.end() if reads else sent.outcome) is error
    assert sent.transport.count("abort") == 1
    assert not sent.idle


def test_the_connections_end_stops_the_body() -> None:
    """The connection stops a producer, also one that its transport knows nothing of."""
    body = PlayedBody()
    sent = Sent(b"POST", body)
    body.consumer.unregisterProducer()
    sent.transport.end(RESET)

    assert body.calls == ["stop"]


# --- getting ready --------------------------------------------------------------------------------


def test_a_secure_connection_is_ready_after_its_handshake() -> None:
    """A request may go out once the peer is known, not when TCP is connected."""
    connection = Connection(max_head=1, became_idle=print, closed=print, secure=True)
    FakeTransport().connect(connection)
    assert not connection.ready.called
    connection.handshakeCompleted()

    assert connection.ready.result is connection


def test_a_connection_that_ends_in_the_handshake_was_never_ready() -> None:
    """The Deferred that waits for the handshake gets the reason for the connection's end."""
    connection = Connection(max_head=1, became_idle=print, closed=lambda _: None, secure=True)
    transport = FakeTransport()
    transport.connect(connection)
    failures: list[Failure] = []
    connection.ready.addErrback(failures.append)
    transport.end(RESET)

    assert [failure.value for failure in failures] == [RESET]


def test_giving_up_the_handshake_closes_the_socket() -> None:
    """Cancelling ``ready`` aborts the transport, once."""
    connection = Connection(max_head=1, became_idle=print, closed=lambda _: None, secure=True)
    transport = FakeTransport()
    transport.connect(connection)
    connection.ready.addErrback(lambda failure: failure.trap(CancelledError))
    connection.ready.cancel()
    transport.end(ABORTED)

    assert transport.count("abort") == 1
