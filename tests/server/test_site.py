"""Client connections: deadlines that bytes do not push back, refusals, and how a site rests."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from typing import Any

import pytest
import pytest_twisted
from twisted.internet import reactor as real_reactor
from twisted.internet.task import Clock
from twisted.internet.threads import deferToThread
from twisted.web.server import NOT_DONE_YET

from llmproxy.config import Limits, Timeouts
from llmproxy.errors import ClientGone, ClientStalled, Cut
from llmproxy.http1.grammar import MAX_FIELDS
from llmproxy.server.connection import ClientConnection, Phase
from llmproxy.server.handler import Handler, Router
from llmproxy.server.request import Request
from llmproxy.server.site import Site
from tests.support.fake_transport import ABORTED, FIN, FakeTransport, TurnedReactor, turn, until
from tests.support.sockets import WAIT, chunked, connect, request

GET = request("GET", "/")
LAST = b"0\r\n\r\n"


class Waits(Handler):
    """Answers 200 to whatever is refused nothing, when the test says so; refusals at once."""

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
    """A client's connection to a site whose clock the test turns."""

    def __init__(self, *, limits: Limits | None = None, **timeouts: float | None) -> None:
        self.clock = Clock()
        self.clock.advance(5000)
        self.resource = Waits()
        self.site = Site(
            Router(self.resource),
            self.clock,
            self.clock.seconds,
            Timeouts(**timeouts),
            limits or Limits(),
            wall=lambda: 0.0,
        )
        self.connect()

    def connect(self) -> None:
        """Open another connection."""
        self.transport = FakeTransport()
        channel = self.site.buildProtocol(None)
        assert isinstance(channel, ClientConnection)
        self.channel = channel
        self.transport.connect(channel)

    def send(self, *reads: bytes) -> None:
        """Let bytes come in, read by read."""
        for data in reads:
            self.channel.dataReceived(data)

    @property
    def request(self) -> Request:
        """The request that came last."""
        return self.resource.requests[-1]

    def response(self) -> None:
        """Answer the last request."""
        self.request.start(200, [(b"content-length", b"2")])
        self.request.flush()
        self.request.write(b"ok")
        self.request.finish()

    def pass_time(self, seconds: float) -> None:
        """Turn the clock in steps as small as a sweep's."""
        steps = int(seconds / 0.25)
        self.clock.pump([0.25] * steps + [seconds - 0.25 * steps])

    @property
    def status(self) -> int:
        """The status of the response that was written since the last time; 0 for none."""
        written = self.transport.take()
        return int(written[9:12]) if written else 0

    def is_open(self) -> bool:
        """Tell whether nobody has begun to close the connection."""
        return not {"half", "lose", "abort"} & set(self.transport.calls)


# --- deadlines ------------------------------------------------------------------------------------


def test_a_silent_connection_is_closed() -> None:
    """A client that sends nothing has ``client_idle``, without a word."""
    caller = Caller(client_idle=10)
    caller.pass_time(9)
    assert caller.is_open()
    caller.pass_time(2)

    assert (caller.transport.count("lose"), caller.status) == (1, 0)


def test_a_kept_alive_connection_is_idle_anew() -> None:
    """Between two requests there is ``client_idle`` again."""
    caller = Caller(client_idle=10)
    caller.pass_time(9)
    caller.send(GET)
    caller.pass_time(100)
    caller.response()
    caller.pass_time(9)
    assert caller.is_open()
    caller.pass_time(2)
    assert not caller.is_open()


def test_bytes_do_not_push_the_heads_deadline_back() -> None:
    """A head that trickles in is cut off after ``request_head``, and told so."""
    caller = Caller(request_head=10, client_idle=1000)
    for byte in GET[:10]:
        caller.send(bytes([byte]))
        caller.pass_time(0.9)
    assert caller.is_open()
    caller.pass_time(2)

    assert not caller.is_open()
    assert caller.status == 408
    caller.send(GET[10:])
    assert not caller.resource.requests


def test_a_body_has_a_second_more_for_each_64_kib() -> None:
    """A body is under ``request_body`` and what it earned, however it trickles."""
    head = request("POST", "/", "Content-Length: 900000")
    slow, fast = Caller(request_body=10), Caller(request_body=10)
    slow.send(head)
    fast.send(head)
    fast.send(bytes(65536 * 4))
    slow.pass_time(9)
    slow.send(b"x")
    slow.pass_time(2)
    fast.pass_time(13)
    assert slow.status == 408
    assert not fast.resource.requests
    fast.pass_time(2)
    assert fast.status == 408

    assert slow.request.refusal is not None
    assert (slow.request.refusal.reason, slow.site.held_bytes) == ("slow_request", 0)


def test_a_response_takes_as_long_as_it_takes() -> None:
    """While a request is served there is no deadline of the client's connection."""
    caller = Caller()
    caller.send(GET)
    caller.pass_time(500)
    caller.response()

    assert caller.status == 200


def test_deadlines_can_be_off() -> None:
    """Whatever is off never closes a connection."""
    caller = Caller(client_idle=None, request_head=None, request_body=None, client_stall=None)
    caller.pass_time(100)
    caller.send(b"GET")
    caller.pass_time(100)
    caller.send(b" / HTTP/1.1\r\nHost: h\r\nContent-Length: 1\r\n\r\n")
    caller.pass_time(100)
    caller.send(b"x")
    caller.transport.hold(10)
    caller.pass_time(100)

    assert caller.is_open()


def test_a_closing_connection_does_not_stay() -> None:
    """Once everything was sent a close has a grace, and is then a reset."""
    caller = Caller()
    caller.send(request("GET", "/", "Connection: close"))
    caller.response()
    assert caller.transport.count("lose") == 1
    caller.pass_time(4)
    assert not caller.transport.count("abort")
    caller.pass_time(2)
    assert caller.transport.count("abort") == 1


# --- clients that do not read ---------------------------------------------------------------------


@pytest.mark.parametrize(("grows", "overhead"), [(True, 0), (True, 22), (False, 0)])
def test_a_client_that_takes_nothing_is_dropped(grows: bool, overhead: int) -> None:
    """Whether more is written meanwhile or not, and whatever TLS adds to it in the queue."""
    caller = Caller(client_stall=10)
    caller.send(GET)
    caller.request.start(200, [])
    caller.request.flush()
    held = len(caller.transport.value())
    caller.transport.hold(held)
    for _ in range(9):
        caller.pass_time(1)
        if grows:
            caller.request.write(b"x")
            held += len(b"1\r\nx\r\n") + overhead
            caller.transport.hold(held)
    assert caller.is_open()
    caller.pass_time(2)

    assert [type(why) for why in caller.resource.gone] == [ClientStalled]
    assert caller.transport.count("abort") == 1


def test_a_slow_client_is_not_a_stalled_one() -> None:
    """Whoever takes a byte now and then is served on."""
    caller = Caller(client_stall=10)
    caller.send(GET)
    caller.request.start(200, [])
    caller.request.flush()
    for held in range(20, 0, -1):
        caller.transport.hold(held)
        caller.pass_time(9)
    caller.transport.hold(0)
    caller.pass_time(100)

    assert caller.is_open()
    assert not caller.resource.gone


def test_the_end_of_a_response_is_under_the_stall_deadline_too() -> None:
    """What a closed answer left in the queue is sent as long as something is taken."""
    caller = Caller(client_stall=10)
    caller.send(request("GET", "/", "Connection: close"))
    caller.response()
    for held in (3, 2, 1):
        caller.transport.hold(held)
        caller.pass_time(9)
        assert not caller.transport.count("abort")
    caller.pass_time(3)
    assert caller.transport.count("abort") == 1


# --- refused uploads ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "status"),
    [
        (request("POST", "/", "Content-Length: 2000000"), 413),
        (request("POST", "/", "Content-Length: 20", "Expect: else"), 417),
        (b"nonsense\r\n" + GET, 400),
    ],
)
def test_a_refusal_can_be_read(data: bytes, status: int) -> None:
    """Our side is closed; for two seconds what still comes is dropped, and then all is over."""
    caller = Caller()
    caller.send(data)
    written = caller.transport.take()
    assert written.startswith(b"HTTP/1.1 %d " % status)
    assert b"\r\nconnection: close\r\n" in written.lower()
    served = len(caller.resource.requests)
    assert caller.transport.calls.count("half") == 1
    for _ in range(6):
        caller.send(GET * 100)
        caller.pass_time(0.25)
        assert not caller.transport.count("lose")
    caller.pass_time(1.5)

    assert caller.transport.count("lose") == 1
    assert (caller.status, len(caller.resource.requests)) == (0, served)
    caller.pass_time(6)
    assert caller.transport.count("abort") == 1


@pytest.mark.parametrize(
    ("fields", "status", "continued"),
    [
        (["Expect: 100-continue"], 0, True),
        (["Expect: 100-Continue"], 0, True),
        (["Expect: 200-ok"], 417, False),
        (["Expect: 100-continue, else"], 417, False),
        (["Expect: 100-continue", "Expect: else"], 417, False),
        ([], 0, False),
    ],
)
def test_expectations(fields: list[str], status: int, continued: bool) -> None:
    """100 Continue is sent where a body is waited for; whatever else is expected is a 417."""
    caller = Caller()
    caller.send(request("POST", "/", "Content-Length: 5", *fields))
    written = caller.transport.take()

    assert (written == b"HTTP/1.1 100 Continue\r\n\r\n") is continued
    if status:
        assert written.startswith(b"HTTP/1.1 %d " % status)
    else:
        caller.send(b"hello")
        assert caller.request.body == b"hello"


@pytest.mark.parametrize(
    "data",
    [
        request("POST", "/", "Content-Length: 5", "Expect: 100-continue", version="1.0"),
        request("POST", "/", "Content-Length: 0", "Expect: 100-continue"),
        request("GET", "/", "Expect: 100-continue"),
    ],
)
def test_nobody_is_asked_for_a_body_that_does_not_wait(data: bytes) -> None:
    """An HTTP/1.0 client knows no 1xx, and without a body there is nothing to ask for."""
    caller = Caller()
    caller.send(data)

    assert not caller.transport.writes


# --- what is not HTTP -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "data",
    [
        b"hello\r\n",
        b"GET / HTTP/1.1\r\nno colon\r\n\r\n",
        b"GET / HTTP/1.1\r\nbad name: x\r\n\r\n",
        b"GET / HTTP/1.1\r\nContent-Length: x\r\n\r\n",
        b"GET / HTTP/1.1\r\nContent-Length: 1\r\nContent-Length: 1\r\n\r\nx",
        b"GET / HTTP/1.1\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        b"GET / HTTP/1.1\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: a\r\nHost: a\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: h\r\n folded\r\n\r\n",
        b"GET / HTTP/1.1\nHost: h\n\n",
        b"GET / HTTP/1.1\r\nHost: h\r\nx: a\0b\r\n\r\n",
        b"GET / HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    ],
)
def test_what_is_not_http_is_a_400_in_words(data: bytes) -> None:
    """The response is JSON, says that it is ours, and the connection is closed."""
    caller = Caller()
    caller.send(data + GET)
    head, _, body = caller.transport.value().partition(b"\r\n\r\n")

    assert head.startswith(b"HTTP/1.1 400 ")
    fields = head.lower().split(b"\r\n")
    assert b"content-type: application/json" in fields
    assert b"x-llmproxy-error: malformed" in fields
    assert b"connection: close" in fields
    assert b"content-length: %d" % len(body) in fields
    assert json.loads(body)["error"]["message"]
    assert not caller.is_open()
    caller.send(GET)
    assert not caller.resource.requests


@pytest.mark.parametrize(
    ("data", "status"),
    [
        (b"GET / HTTP/1.1\r\nHost: h\r\nx: " + b"y" * 600 + b"\r\n\r\n", 431),
        (b"GET / HTTP/1.1\r\nHost: h\r\n" + b"x: yyyyyyyy\r\n" * 60 + b"\r\n", 431),
        (b"GET / HTTP/1.1\r\nHost: h\r\n" + b"a:\r\n" * MAX_FIELDS + b"\r\n", 431),
        (b"GET /" + b"y" * 600 + b" HTTP/1.1\r\nHost: h\r\n\r\n", 414),
        (b"GET /" + b"y" * 600, 414),
        (b"GET / HTTP/1.2\r\nHost: h\r\n\r\n", 505),
        (b"POST / HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: gzip\r\n\r\n", 501),
    ],
)
def test_other_heads_that_are_refused(data: bytes, status: int) -> None:
    """What is too large, or known to nobody here, has a status of its own."""
    caller = Caller(limits=Limits(request_head=512))
    caller.send(data)

    assert caller.status == status
    assert not caller.is_open()
    assert not caller.resource.requests


def test_a_head_of_the_most_bytes_is_served() -> None:
    """The limit itself is allowed, wherever the head is cut."""
    head = b"GET / HTTP/1.1\r\nHost: h\r\nx: ".ljust(512, b"y") + b"\r\n\r\n"
    for at in (1, 511, 512, 513, 514, 515):
        caller = Caller(limits=Limits(request_head=512))
        caller.send(head[:at], head[at:])
        assert len(caller.resource.requests) == 1
        caller = Caller(limits=Limits(request_head=511))
        caller.send(head[:at], head[at:])
        assert caller.status == 431


def test_an_empty_line_before_a_request_is_skipped() -> None:
    """One, as some clients send behind a body, wherever it is cut (RFC 9112, section 2.2)."""
    for at in range(5):
        caller = Caller()
        caller.send(*[part for part in (b"\r\n"[:at], (b"\r\n" + GET)[at:]) if part])
        assert len(caller.resource.requests) == 1


@pytest.mark.parametrize("rest", [b"zz\r\n", b"3\r\nabcd\r\n", b"3\nabc\r\n"])
def test_a_broken_body_is_refused(rest: bytes) -> None:
    """The request is served as refused, once, and nothing of its body is kept."""
    caller = Caller()
    caller.send(request("POST", "/", "Transfer-Encoding: chunked") + chunked(b"hello"))
    assert caller.site.held_bytes == 5
    caller.send(rest, rest, GET)

    assert (caller.status, len(caller.resource.requests)) == (400, 1)
    assert (caller.request.body, caller.site.held_bytes) == (b"", 0)
    assert not caller.is_open()


@pytest.mark.parametrize(
    ("fields", "version", "kept"),
    [
        ([], "1.1", True),
        (["Connection: keep-alive"], "1.1", True),
        (["Connection: Close"], "1.1", False),
        (["Connection: x, close"], "1.1", False),
        (["Connection: x", "Connection: close"], "1.1", False),
        (["Connection: closed"], "1.1", True),
        ([], "1.0", False),
        (["Connection: keep-alive"], "1.0", False),
    ],
)
def test_connection_is_a_list(fields: list[str], version: str, kept: bool) -> None:
    """``close`` in any place ends the connection with the response; HTTP/1.0 always does."""
    caller = Caller()
    caller.send(request("GET", "/", *fields, version=version))
    caller.response()

    assert caller.is_open() is kept
    assert (b"connection: close\r\n" in caller.transport.value()) is not kept


def test_pipelined_requests_are_answered_in_order() -> None:
    """The next request is served when the one before was answered."""
    caller = Caller()
    caller.send(GET + request("POST", "/", body=b"hello") + GET)
    for count in (1, 2, 3):
        assert len(caller.resource.requests) == count
        caller.response()
    assert caller.channel.phase is Phase.IDLE
    assert caller.transport.value().count(b"HTTP/1.1 200 ") == 3


def test_a_client_that_pipelines_behind_a_stream_is_not_lost_sight_of() -> None:
    """However much comes behind a running request is read on, and not served any more."""
    caller = Caller()
    caller.send(GET)
    caller.request.start(200, [])
    caller.request.flush()
    for _ in range(100):
        caller.send(GET * 20)

    assert not caller.transport.is_paused()
    caller.response()
    assert caller.transport.count("half") == 1
    assert len(caller.resource.requests) == 1


# --- the site -------------------------------------------------------------------------------------


def test_only_http_1_1_is_offered() -> None:
    """ALPN names HTTP/1.1 alone."""
    assert Caller().site.acceptableProtocols() == [b"http/1.1"]


def test_one_timer_serves_every_connection() -> None:
    """The sweep is one timer while somebody listens or is connected, and none afterwards."""
    caller = Caller()
    transports = [caller.transport]
    for _ in range(9):
        caller.connect()
        transports.append(caller.transport)
    assert len(caller.clock.getDelayedCalls()) == 1
    caller.site.startFactory()
    for transport in transports:
        transport.end(FIN)
    assert len(caller.clock.getDelayedCalls()) == 1
    caller.site.stopFactory()
    assert not caller.clock.getDelayedCalls()


def test_one_broken_connection_does_not_stop_the_sweep(logged_failures: Any) -> None:
    """A connection that cannot be checked is dropped, and the others are still looked at."""
    caller = Caller(client_idle=10)
    broken, transport = caller.channel, caller.transport

    def fail(now: float) -> None:
        raise ZeroDivisionError

    broken.check = fail  # type: ignore[method-assign]  # a stand-in
    caller.connect()
    caller.clock.advance(11)
    assert transport.count("abort") == 1
    assert caller.transport.count("lose") == 1
    assert logged_failures.flush(ZeroDivisionError)


def test_what_clients_have_not_taken_is_summed_up() -> None:
    """``pending_bytes`` is over all connections."""
    caller = Caller()
    caller.transport.hold(3)
    caller.connect()
    caller.transport.hold(4)

    assert caller.site.pending_bytes() == 7


def test_a_drain_closes_idle_connections_and_lets_responses_end() -> None:
    """Whoever is served is served on and closed afterwards, who is not after a short grace."""
    caller = Caller()
    idle = caller.transport
    caller.connect()
    caller.send(GET)
    caller.request.start(200, [])
    caller.request.flush()
    empty = caller.site.when_empty()
    caller.site.drain()

    assert (idle.count("lose"), caller.is_open()) == (0, True)
    caller.pass_time(3)
    assert (idle.count("lose"), caller.is_open()) == (1, True)
    caller.request.write(b"more")
    caller.request.finish()
    assert caller.transport.value().endswith(LAST)
    idle.end(FIN)
    assert not empty.called
    caller.pass_time(3)
    assert caller.transport.count("lose") == 1
    caller.transport.end(FIN)
    assert empty.called


def test_who_was_not_told_of_a_drain_may_ask_once_more() -> None:
    """A response that began before it says nothing of an end; the next one does."""
    caller = Caller()
    caller.send(GET)
    caller.request.start(200, [(b"content-length", b"0")])
    caller.request.flush()
    caller.site.drain()
    caller.request.finish()
    assert b"connection: close" not in caller.transport.take()
    caller.pass_time(0.5)
    caller.send(GET)
    caller.response()

    assert b"connection: close\r\n" in caller.transport.take()
    assert caller.transport.count("lose") == 1


@pytest.mark.parametrize("sent", [0, 1, 10, len(GET) - 1])
def test_a_request_that_arrives_in_a_drain_is_served(sent: int) -> None:
    """A request under way is answered with ``Connection: close``, wherever it was cut."""
    caller = Caller()
    caller.send(*[GET[:sent]][: bool(sent)])
    caller.site.drain()
    caller.send(GET[sent:])
    caller.response()

    assert caller.transport.value().startswith(b"HTTP/1.1 200 ")
    assert b"connection: close\r\n" in caller.transport.value()
    assert caller.transport.count("lose") == 1


def test_a_body_that_arrives_in_a_drain_is_served() -> None:
    """A drain does not cut an upload short."""
    caller = Caller()
    head = request("POST", "/", "Transfer-Encoding: chunked")
    caller.send(head, chunked(b"hel"))
    caller.site.drain()
    caller.send(chunked(b"lo") + LAST)

    assert caller.request.body == b"hello"


def test_a_cut_drops_everybody_at_once() -> None:
    """Whoever is served is told that we cut it; every connection is aborted."""
    caller = Caller()
    idle = caller.transport
    caller.connect()
    caller.send(GET)
    caller.site.cut()

    assert [type(why) for why in caller.resource.gone] == [Cut]
    assert idle.count("abort") == 1
    assert caller.transport.count("abort") >= 1
    idle.end(ABORTED)
    caller.transport.end(ABORTED)
    assert len(caller.resource.gone) == 1


def test_a_site_without_clients_is_empty() -> None:
    """``when_empty`` fires at once where nobody is connected."""
    caller = Caller()
    caller.transport.end(FIN)

    assert caller.site.when_empty().called


def test_a_site_is_empty_after_its_last_request_heard_of_it() -> None:
    """Whoever waits for the last client finds its request ended."""
    caller = Caller()
    caller.send(GET)
    heard: list[int] = []
    caller.site.when_empty().addCallback(lambda _: heard.append(len(caller.resource.gone)))
    caller.transport.end(FIN)

    assert heard == [1]


# --- on real sockets ------------------------------------------------------------------------------


class Listening:
    """A site on a real port, with a clock that the test turns."""

    def __init__(self, **timeouts: float | None) -> None:
        self.reactor = TurnedReactor()
        self.resource = Waits()
        self.site = Site(
            Router(self.resource),
            self.reactor,
            self.reactor.seconds,
            Timeouts(**timeouts),
            Limits(),
            wall=lambda: 0.0,
        )
        listen: Any = real_reactor.listenTCP  # whose types know no Site
        self.port: Any = listen(0, self.site, interface="127.0.0.1")

    async def run(self, client: Callable[[int], Any], serve: Callable[[Request], None]) -> Any:
        """Let ``client`` talk to the port in a thread, and ``serve`` its first request."""
        talk = deferToThread(client, self.port.getHost().port)
        await until(lambda: self.resource.requests)
        serve(self.resource.requests[0])
        while not talk.called:
            self.reactor.clock.advance(0.05)
            await turn()
        await self.port.stopListening()
        await self.site.when_empty()
        assert not self.reactor.timers()
        return await talk


@pytest_twisted.ensureDeferred
@pytest.mark.parametrize(("version", "end"), [("1.0", "reset"), ("1.1", "fin")])
async def test_a_break_comes_after_all_that_was_written(version: str, end: str) -> None:
    """A client that reads gets every byte of a broken response, and can tell that it is broken."""
    size = 3_000_000

    def client(port: int) -> tuple[int, str]:
        with connect(port, receive_buffer=65536) as wire:
            wire.send(request("GET", "/", version=version))
            wire.read_head()
            how = wire.wait_closed()
            return wire.buffer.count(b"x"), how

    def serve(current: Request) -> None:
        current.start(200, [])
        current.flush()
        current.write(b"x" * size)
        current.break_off()

    assert await Listening(client_stall=None).run(client, serve) == (size, end)


@pytest_twisted.ensureDeferred
@pytest.mark.parametrize("size", [10_000, 20_000_000])
async def test_a_break_does_not_wait_for_ever(size: int) -> None:
    """A client that does not read a broken response is reset after ``client_stall``."""
    gone = threading.Event()
    listening = Listening(client_stall=5)

    def client(port: int) -> str:
        with connect(port, receive_buffer=4096) as wire:
            wire.send(request("GET", "/", version="1.0"))
            assert gone.wait(WAIT)
            return wire.wait_closed()

    def serve(current: Request) -> None:
        current.start(200, [])
        current.flush()
        current.write(b"x" * size)
        current.break_off()
        listening.site.when_empty().addCallback(lambda _: gone.set())

    assert await listening.run(client, serve) == "reset"


@pytest_twisted.ensureDeferred
async def test_a_client_that_does_not_read_pauses_the_producer() -> None:
    """A push producer is paused once the kernel is full, and resumed when the client reads."""
    calls: list[str] = []
    full = threading.Event()

    class Producer:
        def pauseProducing(self) -> None:
            calls.append("pause")

        def resumeProducing(self) -> None:
            calls.append("resume")

        def stopProducing(self) -> None:
            calls.append("stop")

    def client(port: int) -> int:
        with connect(port, receive_buffer=65536) as wire:
            wire.send(request("GET", "/"))
            assert full.wait(WAIT)
            wire.read_head()
            return len(wire.read_chunks())

    def serve(current: Request) -> None:
        current.start(200, [])
        current.flush()
        current.registerProducer(Producer(), True)
        written = 0

        def push() -> None:
            nonlocal written
            if not calls:
                current.write(bytes(65536))
                written += 65536
                assert written < 100_000_000
            if calls == ["pause"]:
                full.set()
            if calls == ["pause", "resume"]:
                sizes.append(written)
                current.unregisterProducer()
                current.finish()
            else:
                real_reactor.callLater(0, push)

        push()

    sizes: list[int] = []
    listening = Listening()
    received = await listening.run(client, serve)
    assert [received] == sizes


@pytest_twisted.ensureDeferred
async def test_a_client_that_leaves_is_noticed_while_it_is_served() -> None:
    """A FIN or a reset, also behind bytes that were pipelined, tells whoever serves the request."""

    def client(port: int) -> None:
        with connect(port) as wire:
            wire.send(request("GET", "/"), GET * 1000)

    listening = Listening()
    await listening.run(client, lambda current: None)
    await until(lambda: listening.resource.gone)
    assert [type(why) for why in listening.resource.gone] == [ClientGone]
