"""One connection to a provider: what is a response, where it ends, and whom it serves next."""

from __future__ import annotations

from typing import Any

import pytest
from twisted.internet.defer import CancelledError, Deferred
from twisted.python.failure import Failure
from twisted.web.client import ResponseDone
from twisted.web.iweb import UNKNOWN_LENGTH, IBodyProducer
from zope.interface import implementer

from llmproxy.errors import EndReason, ProxyError
from llmproxy.http1.grammar import MAX_FIELDS
from llmproxy.upstream.http1 import MAX_INTERIM, Connection, State
from llmproxy.upstream.response import Response
from tests.support.fake_transport import ABORTED, FIN, RESET, Collector, FakeTransport

OK = b"HTTP/1.1 200 OK\r\n"
LENGTH = OK + b"Content-Length: 5\r\n\r\n"
CHUNKED = OK + b"Transfer-Encoding: chunked\r\n\r\n"
CLOSE = OK + b"\r\n"


class Asked:
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


def cuts(data: bytes) -> list[tuple[bytes, bytes]]:
    """Return every way to cut ``data`` in two, neither of them empty."""
    return [(data[:at], data[at:]) for at in range(1, len(data))]


# --- the head -------------------------------------------------------------------------------------


def test_the_request_is_written_in_one_piece() -> None:
    """A request without a body is its head and nothing else, without Nagle's delay."""
    asked = Asked()

    assert asked.transport.writes == [b"GET / HTTP/1.1\r\n\r\n"]
    assert asked.transport.count("nodelay") == 1


@pytest.mark.parametrize("head", [LENGTH, CHUNKED, CLOSE, b"HTTP/1.1 100 Go\r\n\r\n" + LENGTH])
def test_a_head_may_be_split_at_any_point(head: bytes) -> None:
    """Status and fields are the same at every split of the head, and the body is paused by then."""
    for first, second in cuts(head):
        asked = Asked()
        asked.feed(first)
        assert not asked.waiting.called
        asked.feed(second)
        assert isinstance(asked.outcome, Response)
        assert asked.outcome.code == 200
        assert asked.transport.is_paused()


def test_fields_keep_order_and_values_and_stay_away_from_treq() -> None:
    """The fields are those that came, names in lower case; treq's own view of them is empty."""
    response = Asked().response(
        OK + b"X-B: 2 \r\nx-a:\t1\r\nX-B: \xff\r\ncontent-length: 0\r\n\r\n"
    )

    expected = [(b"x-b", b"2"), (b"x-a", b"1"), (b"x-b", b"\xff"), (b"content-length", b"0")]
    assert response.fields == expected
    assert response.version == (b"HTTP", 1, 1)
    assert not list(response.headers.getAllRawHeaders())
    assert (response.phrase, response.request, response.previousResponse) == (b"", None, None)
    with pytest.raises(NotImplementedError):
        response.setPreviousResponse(response)


@pytest.mark.parametrize("status", [100, 102, 103, 199])
def test_interim_answers_are_skipped(status: int) -> None:
    """A 1xx response is not the response; a framing in it frames nothing."""
    interim = b"HTTP/1.1 %d X\r\ncontent-length: 7\r\n\r\n" % status
    asked = Asked()
    asked.response(interim + interim + LENGTH + b"hello")

    asked.assert_whole(b"hello")


@pytest.mark.parametrize("together", [True, False])
def test_interim_answers_are_counted(together: bool) -> None:
    """As many 1xx responses as allowed are skipped, and one more is refused."""
    interim = [b"HTTP/1.1 103 Hint\r\n\r\n"] * MAX_INTERIM
    allowed, refused = Asked(), Asked()
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
    asked = Asked()
    asked.feed(head)

    asked.assert_refused()
    asked.feed(LENGTH)
    asked.transport.end(ABORTED)
    asked.assert_refused()
    assert asked.closed == [asked.connection]


@pytest.mark.parametrize("whole", [True, False])
def test_a_head_is_bounded(whole: bool) -> None:
    """A head of the most bytes passes and one more is refused, also before its end is in sight."""
    fits = (OK + b"x: ").ljust(100, b"y") + b"\r\n\r\n"
    asked, refused = Asked(max_head=100), Asked(max_head=100)
    asked.feed(fits)
    assert isinstance(asked.outcome, Response)

    over = fits.replace(b"x: ", b"x: y")
    refused.feed(over if whole else over[:104])  # the empty line may be cut
    refused.assert_refused()


def test_a_long_body_behind_a_short_head_is_no_long_head() -> None:
    """The bound is on the head alone, whatever came in the same read."""
    asked = Asked(max_head=100)
    asked.response(OK + b"content-length: 9999\r\n\r\n" + bytes(9999))

    asked.assert_whole(bytes(9999))


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
    for reads in [*cuts(whole), (whole,), tuple(bytes([byte]) for byte in whole)]:
        asked = Asked()
        asked.response(*reads)
        asked.assert_whole(body)
        assert b"" not in asked.collector.pieces
        assert asked.idle == [asked.connection]
        assert asked.connection.state is State.IDLE
        assert not asked.transport.is_paused()


@pytest.mark.parametrize(
    ("head", "length"),
    [(LENGTH, 5), (CHUNKED, UNKNOWN_LENGTH), (CLOSE, UNKNOWN_LENGTH)],
)
def test_the_announced_length_is_told(head: bytes, length: object) -> None:
    """The length is what the provider announced, else unknown; so it is for HEAD."""
    for method in (b"GET", b"HEAD"):
        assert Asked(method).response(head).length == length


@pytest.mark.parametrize("head", [LENGTH, CHUNKED, CLOSE])
def test_a_response_to_head_has_no_body(head: bytes) -> None:
    """Whatever its fields announce, HEAD's answer ends with its head and frees the connection."""
    asked = Asked(b"HEAD")
    asked.response(head)

    asked.assert_whole(b"")
    assert asked.idle == [asked.connection]


def test_the_chunks_of_one_read_are_one_piece() -> None:
    """What one read held is forwarded together, without the framing between."""
    asked = Asked()
    asked.response(CHUNKED, b"1\r\na\r\n2\r\nbc\r\n1\r\nd\r\n2", b"\r\nef", b"\r\n0\r\n\r\n")

    assert asked.collector.pieces == [b"abcd", b"ef"]


@pytest.mark.parametrize(
    ("reason", "complete"),
    [(FIN, True), (RESET, False), (ABORTED, False)],
)
@pytest.mark.parametrize("late", [True, False])
def test_a_body_without_length_ends_with_a_fin_alone(
    reason: Exception, complete: bool, late: bool
) -> None:
    """FIN ends a close-delimited body, a reset breaks it, also where it is delivered afterwards."""
    asked = Asked()
    asked.feed(CLOSE + b"text")
    if not late:
        asked.outcome.deliverBody(asked.collector)
    asked.transport.end(reason)
    if late:
        asked.outcome.deliverBody(asked.collector)

    assert asked.collector.body == b"text"
    if complete:
        asked.assert_whole(b"text")
    else:
        asked.assert_broken(EndReason.UPSTREAM_BROKEN)
    assert not asked.idle
    assert asked.closed == [asked.connection]


def test_a_body_that_we_cut_ourselves_is_never_whole() -> None:
    """After our own abort not even a FIN makes a close-delimited body whole."""
    asked = Asked()
    response = asked.response(CLOSE + b"text")
    response.abort()
    asked.transport.end(FIN)

    asked.assert_broken(EndReason.UPSTREAM_BROKEN)


@pytest.mark.parametrize("late", [True, False])
@pytest.mark.parametrize(("head", "wire"), [(LENGTH, b"hel"), (CHUNKED, b"5\r\nhello\r\n")])
@pytest.mark.parametrize("reason", [FIN, RESET])
def test_a_short_body_is_broken(head: bytes, wire: bytes, reason: Exception, late: bool) -> None:
    """The connection's end inside a framed body breaks it, after everything that came before."""
    asked = Asked()
    asked.feed(head + wire)
    if not late:
        asked.outcome.deliverBody(asked.collector)
    asked.transport.end(reason)
    if late:
        asked.outcome.deliverBody(asked.collector)

    assert asked.collector.body in (b"hel", b"hello")
    asked.assert_broken(EndReason.UPSTREAM_BROKEN)


@pytest.mark.parametrize(("head", "wire", "body"), BODIES)
def test_a_whole_body_is_whole_also_after_the_connection_was_lost(
    head: bytes, wire: bytes, body: bytes
) -> None:
    """Whoever asks for the body late gets all that came, and its end."""
    asked = Asked()
    asked.feed(head + wire)
    asked.transport.end(RESET)
    asked.outcome.deliverBody(asked.collector)

    asked.assert_whole(body)
    assert not asked.idle


@pytest.mark.parametrize(
    ("wire", "good"),
    [(b"zz\r\n", b""), (b"5\r\nhello!", b"hello"), (b"-1\r\n", b""), (b"5\nhello\r\n", b"")],
)
def test_a_faulty_chunk_breaks_the_body(wire: bytes, good: bytes) -> None:
    """What is not the chunked coding closes the connection, after what was good before it."""
    asked = Asked()
    asked.response(CHUNKED + b"2\r\nhi\r\n", wire)

    asked.assert_broken(EndReason.UPSTREAM_PROTOCOL)
    assert asked.collector.body == b"hi" + good
    assert asked.transport.count("abort") == 1
    asked.feed(b"0\r\n\r\n")
    asked.transport.end(ABORTED)
    asked.assert_broken(EndReason.UPSTREAM_PROTOCOL)


# --- whether the connection serves another --------------------------------------------------------


@pytest.mark.parametrize("apart", [True, False])
@pytest.mark.parametrize(
    ("method", "head", "wire"),
    [(b"GET", head, wire) for head, wire, _ in BODIES] + [(b"HEAD", LENGTH, b"")],
)
def test_bytes_behind_a_response_never_meet_another_caller(
    method: bytes, head: bytes, wire: bytes, apart: bool
) -> None:
    """Extra bytes close the connection, in the same read as the end or in one of their own."""
    asked = Asked(method)
    extra = LENGTH + b"trick"
    asked.response(*([head + wire, extra] if apart else [head + wire + extra]))

    assert isinstance(asked.end(), ResponseDone)
    assert asked.transport.count("abort") == 1
    assert bool(asked.idle) is apart  # the pool had it back by then; its bytes come as a surprise


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
    asked = Asked()
    asked.response(head, b"hello")

    asked.assert_whole(b"hello")
    assert not asked.idle
    assert asked.transport.count("abort") == 1


def test_a_connection_serves_one_request_after_the_other() -> None:
    """Nothing of the first response is left in the second."""
    asked = Asked(b"HEAD")
    asked.response(LENGTH)
    asked.collector = Collector()
    asked.ask(b"GET")
    second = asked.response(CHUNKED + b"1\r\nx\r\n", b"0\r\n\r\n")

    assert second.length is UNKNOWN_LENGTH
    asked.assert_whole(b"x")
    assert asked.idle == [asked.connection] * 2


@pytest.mark.parametrize("delivered", [True, False])
def test_an_ended_response_has_no_hold_on_the_next(delivered: bool) -> None:
    """Aborting a response that has ended leaves the connection to whoever has it now."""
    asked = Asked()
    first = asked.response(LENGTH + b"hello")
    asked.collector = Collector()
    asked.ask()
    if delivered:
        asked.response(LENGTH + b"wor")
    first.abort()

    assert not asked.transport.count("abort")


def test_stray_bytes_while_idle_close_the_connection() -> None:
    """Bytes that nobody asked for are the end of an idle connection."""
    asked = Asked()
    asked.response(LENGTH + b"hello")
    asked.feed(b"H")

    assert asked.transport.count("abort") == 1


# --- reading stops and goes on --------------------------------------------------------------------


def test_bytes_before_anyone_asks_for_the_body_are_kept() -> None:
    """What came with the head, and after it in spite of the pause, is delivered in order."""
    asked = Asked()
    asked.feed(CHUNKED + b"2\r\nhe", b"\r\n3\r\nllo\r\n0", b"\r\n\r\n")
    assert not asked.idle
    asked.outcome.deliverBody(asked.collector)

    asked.assert_whole(b"hello")
    assert asked.collector.pieces == [b"hello"]
    assert asked.idle == [asked.connection]


def test_the_consumer_has_the_transport_itself() -> None:
    """Pausing and resuming reach the socket; what was in flight still arrives."""
    asked = Asked()
    asked.response(CLOSE)
    transport: Any = asked.collector.transport
    transport.pauseProducing()
    assert asked.transport.is_paused()
    asked.feed(b"late")
    assert asked.collector.body == b"late"
    transport.resumeProducing()
    assert not asked.transport.is_paused()


class TakesChunks(Collector):
    """A consumer that takes chunks in their coding; it keeps each with where its content starts."""

    def __init__(self) -> None:
        super().__init__()
        self.framed: list[tuple[bytes, int]] = []

    def framedReceived(self, data: bytes, start: int) -> None:
        self.framed.append((data, start))
        self.dataReceived(data[start:-2])


def test_a_read_of_one_chunk_is_handed_on_as_it_is_where_that_is_wanted() -> None:
    """Whole chunks alone, without extensions; what is cut, joined or odd is decoded as ever."""
    asked = Asked()
    asked.collector = collector = TakesChunks()
    whole = [b"5\r\nhello\r\n", b"1e\r\n" + bytes(30) + b"\r\n"]
    other = [
        *(b"2\r\nab\r\n1\r\nc\r\n", b"3\r\nde", b"f\r\n", b"2;x\r\ngh\r\n"),
        *(b"03\r\nijk\r\n", b"1E\r\n" + bytes(30) + b"\r\n"),
    ]
    asked.response(CHUNKED, whole[0], *other, whole[1], b"0\r\n\r\n")
    asked.assert_whole(b"helloabcdefghijk" + bytes(60))
    assert collector.framed == [(whole[0], 3), (whole[1], 4)]
    assert asked.idle == [asked.connection]


@pytest.mark.parametrize("head", [CLOSE, OK + b"content-length: 10\r\n\r\n"])
def test_what_only_looks_like_a_chunk_is_content(head: bytes) -> None:
    """A body in another framing may hold what would be a chunk."""
    asked = Asked()
    asked.collector = collector = TakesChunks()
    asked.response(head, b"5\r\nhello\r\n"[:10])
    assert (collector.body, collector.framed) == (b"5\r\nhello\r\n"[:10], [])


class PausesAtOnce(Collector):
    """A consumer that is full with its first piece."""

    def dataReceived(self, data: bytes) -> None:
        super().dataReceived(data)
        transport: Any = self.transport
        transport.pauseProducing()


def test_a_consumer_may_pause_on_the_early_bytes() -> None:
    """A pause that comes while the first bytes are handed over is not undone."""
    asked = Asked()
    asked.collector = PausesAtOnce()
    asked.response(OK + b"content-length: 9\r\n\r\nhello")

    assert asked.transport.is_paused()


def test_an_idle_connection_is_read_whatever_its_last_consumer_did() -> None:
    """A pause does not outlive its response: idle connections are watched."""
    asked = Asked()
    asked.collector = PausesAtOnce()
    asked.response(LENGTH, b"hello")

    assert asked.connection.state is State.IDLE
    assert not asked.transport.is_paused()


# --- aborting -------------------------------------------------------------------------------------


@pytest.mark.parametrize("reads", [(), (b"HTTP/1.1 2",), (b"HTTP/1.1 100 Go\r\n\r\n",)])
def test_cancelling_a_request_closes_its_socket_once(reads: tuple[bytes, ...]) -> None:
    """Before the head is in, cancel aborts the transport exactly once and fails the Deferred."""
    asked = Asked()
    asked.feed(*reads)
    asked.waiting.cancel()
    assert isinstance(asked.outcome, CancelledError)
    asked.feed(LENGTH)
    asked.connection.abort()
    asked.transport.end(ABORTED)
    asked.connection.abort()

    assert asked.transport.count("abort") == 1
    assert asked.closed == [asked.connection]


@pytest.mark.parametrize("delivered", [True, False])
def test_aborting_a_response_closes_its_socket_once(delivered: bool) -> None:
    """However often it is asked for, in whatever phase of the body, the socket is aborted once."""
    asked = Asked()
    asked.feed(LENGTH)
    if delivered:
        asked.outcome.deliverBody(asked.collector)
    for _ in range(3):
        asked.outcome.abort()
    asked.feed(b"hello")
    asked.transport.end(ABORTED)
    asked.outcome.abort()

    assert asked.transport.count("abort") == 1
    assert not asked.collector.pieces
    if delivered:
        asked.assert_broken(EndReason.UPSTREAM_BROKEN)


def test_a_consumer_may_abort_inside_its_last_piece() -> None:
    """A consumer that gives up on the very last byte closes the socket once, and no pool has it."""
    asked = Asked()

    class GivesUp(Collector):
        def dataReceived(self, data: bytes) -> None:
            super().dataReceived(data)
            asked.outcome.abort()

    asked.collector = GivesUp()
    asked.response(LENGTH, b"hello")

    assert asked.transport.count("abort") == 1
    assert not asked.idle
    assert len(asked.collector.ends) == 1


@pytest.mark.parametrize("reason", [FIN, RESET])
def test_the_connections_end_before_a_head_fails_the_request(reason: Exception) -> None:
    """A provider that closes without a response has broken it off, whichever way it closed."""
    asked = Asked()
    asked.feed(b"HTTP/1.1 200")
    asked.transport.end(reason)

    assert isinstance(asked.outcome, ProxyError)
    assert asked.outcome.end is EndReason.UPSTREAM_BROKEN
    assert asked.outcome.may_have_run
    assert asked.closed == [asked.connection]


# --- bodies of requests ---------------------------------------------------------------------------


@implementer(IBodyProducer)
class Upload:
    """A request body that the test produces."""

    length = UNKNOWN_LENGTH

    def __init__(self) -> None:
        self.done: Deferred[None] = Deferred()
        self.stops = 0

    def startProducing(self, consumer: Any) -> Deferred[None]:
        self.consumer = consumer
        return self.done

    def pauseProducing(self) -> None:
        """The test needs no pause."""

    def resumeProducing(self) -> None:
        """Nor this."""

    def stopProducing(self) -> None:
        self.stops += 1


def test_a_body_follows_its_head() -> None:
    """Piece by piece, until its producer ends it; then the response frees the connection."""
    body = Upload()
    asked = Asked(b"POST", body)
    body.consumer.write(b"hello")
    body.done.callback(None)
    asked.response(LENGTH + b"world")

    head = b"POST / HTTP/1.1\r\n\r\n"
    assert asked.transport.value() == head + b"5\r\nhello\r\n0\r\n\r\n"
    assert asked.idle == [asked.connection]
    assert not body.stops


def test_an_early_response_ends_the_upload() -> None:
    """A response that is whole before the request is one stops the body, and the connection."""
    body = Upload()
    asked = Asked(b"POST", body)
    body.consumer.write(b"hel")
    asked.response(LENGTH + b"world")

    asked.assert_whole(b"world")
    assert not asked.idle
    assert (body.stops, asked.transport.count("abort")) == (1, 1)


def test_a_request_that_the_kernel_did_not_take_is_not_sent() -> None:
    """Whatever still lies in our queue would meet the next request."""
    asked = Asked()
    asked.transport.hold(1)
    asked.response(LENGTH + b"world")

    asked.assert_whole(b"world")
    assert not asked.idle
    assert asked.transport.count("abort") == 1


@pytest.mark.parametrize("reads", [(), (LENGTH + b"wo",)])
def test_a_body_that_fails_takes_the_connection_along(reads: tuple[bytes, ...]) -> None:
    """Whoever waits for the head, or for the body, is told why; the socket is aborted once."""
    body = Upload()
    asked = Asked(b"POST", body)
    if reads:
        asked.response(*reads)
    error = ProxyError(413, "body_too_large", "Too large.")
    body.done.errback(error)
    asked.transport.end(ABORTED)

    assert (asked.end() if reads else asked.outcome) is error
    assert asked.transport.count("abort") == 1
    assert not asked.idle


def test_the_connections_end_stops_the_body() -> None:
    """Nobody produces for a connection that is gone."""
    body = Upload()
    asked = Asked(b"POST", body)
    asked.transport.end(RESET)

    assert body.stops == 1


# --- getting ready --------------------------------------------------------------------------------


def test_a_secure_connection_is_ready_after_its_handshake() -> None:
    """A request may go out once the peer is known, not when TCP is connected."""
    connection = Connection(max_head=1, became_idle=print, closed=print, secure=True)
    FakeTransport().connect(connection)
    assert not connection.ready.called
    connection.handshakeCompleted()

    assert connection.ready.result is connection


def test_a_connection_that_ends_in_the_handshake_was_never_ready() -> None:
    """The reason for which the connection ended is what whoever waits is told."""
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
