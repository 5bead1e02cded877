"""Client connections: deadlines that bytes do not extend, refusals, and how a site shuts down."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from typing import Any

import pytest
import pytest_twisted
from twisted.internet import reactor as real_reactor
from twisted.internet.testing import StringTransport

from llmproxy.config import Limits, Timeouts
from llmproxy.errors import ClientGone, ClientStalled, Cut
from llmproxy.http1.grammar import MAX_FIELDS
from llmproxy.server import connection
from llmproxy.server.connection import Phase
from llmproxy.server.handler import Router
from llmproxy.server.request import Request
from tests.server.caller import GET, LAST_CHUNK, Caller, WaitingHandler
from tests.support.ends import Push
from tests.support.fake_transport import ABORTED, FIN, RESET, until
from tests.support.served import Served
from tests.support.sockets import WAIT, Wire, chunked, connect, request

# --- deadlines ------------------------------------------------------------------------------------


def test_a_silent_connection_is_closed() -> None:
    """A client that sends nothing is closed after ``client_idle``, without a response."""
    caller = Caller(client_idle=10)
    caller.pass_time(9)
    assert caller.is_open()
    caller.pass_time(2)

    assert (caller.transport.count("half"), caller.status) == (1, 0)


def test_a_kept_alive_connection_is_idle_anew() -> None:
    """Between two requests ``client_idle`` starts again."""
    caller = Caller(client_idle=10)
    caller.pass_time(9)
    caller.send(GET)
    caller.pass_time(100)
    caller.respond()
    caller.pass_time(9)
    assert caller.is_open()
    caller.pass_time(2)
    assert not caller.is_open()


def test_bytes_do_not_extend_the_deadline_of_a_head() -> None:
    """A head that comes byte by byte gets a 408 after ``request_head``."""
    caller = Caller(request_head=10, client_idle=1000)
    for byte in GET[:10]:
        caller.send(bytes([byte]))
        caller.pass_time(0.9)
    assert caller.is_open()
    caller.pass_time(2)

    assert not caller.is_open()
    assert caller.status == 408
    caller.send(GET[10:])
    assert not caller.handler.requests


def test_a_body_has_a_second_more_for_each_64_kib() -> None:
    """The deadline of a body is ``request_body`` and what its bytes have earned."""
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
    assert not fast.handler.requests
    fast.pass_time(2)
    assert fast.status == 408

    assert slow.request.refusal is not None
    assert (slow.request.refusal.reason, slow.site.memory.held) == ("slow_request", 0)


def test_a_response_has_no_deadline() -> None:
    """While a request is served, its client has no deadline."""
    caller = Caller(GET)
    caller.pass_time(500)
    caller.respond()

    assert caller.status == 200


@pytest.mark.parametrize("is_connected", [False, True])
def test_a_response_to_an_upload_has_no_deadline(
    is_connected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The upload's own ends with it, also if its last piece has to wait for the provider."""
    monkeypatch.setattr(connection, "has_peer_left", lambda transport: False)  # it has no socket
    caller = Caller(request_body=10)
    caller.handler.holds = False
    body = bytes(70_000)
    caller.send(request("POST", "/", f"Content-Length: {len(body)}"), body[:1])
    upload = caller.request.upload
    assert upload is not None
    provider = StringTransport()
    if is_connected:
        upload.startProducing(provider)
        monkeypatch.setattr(provider, "write", lambda data: upload.pauseProducing())  # it is full
    caller.send(body[1:])
    if not is_connected:
        assert caller.transport.is_paused()
        upload.startProducing(provider)
    assert caller.transport.count("pause") == 1
    assert not caller.transport.is_paused()
    caller.pass_time(500)
    caller.respond()

    assert caller.status == 200
    assert caller.is_open()


def test_an_upload_that_nobody_took_stops_no_further_request(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It was whole before a provider was connected, and none was: the next request is read."""
    monkeypatch.setattr(connection, "has_peer_left", lambda transport: False)  # it has no socket
    caller = Caller()
    caller.handler.holds = False
    caller.send(request("POST", "/", body=bytes(70_000)))
    assert caller.transport.is_paused()
    caller.respond()

    assert caller.status == 200
    assert not caller.transport.is_paused()
    caller.send(GET)
    assert len(caller.handler.requests) == 2
    caller.respond()
    caller.transport.end(FIN)
    assert [call.getTime() for call in caller.clock.getDelayedCalls()] == []


def test_deadlines_can_be_off() -> None:
    """A deadline that is off never closes a connection."""
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
    """A client that does not close, too, keeps no connection of ours once it has everything."""
    caller = Caller(request("GET", "/", "Connection: close"))
    caller.respond()
    assert caller.closes() == ["half"]
    caller.pass_time(0.25)
    assert caller.closes() == ["half", "close"]


# --- clients that do not read ---------------------------------------------------------------------


@pytest.mark.parametrize(("grows", "overhead"), [(True, 0), (True, 22), (False, 0)])
def test_a_client_that_takes_nothing_is_dropped(grows: bool, overhead: int) -> None:
    """It does not matter whether more is written meanwhile, nor what TLS adds to the queue."""
    caller = Caller(client_stall=10)
    caller.send(GET)
    caller.start()
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

    assert [type(why) for why in caller.handler.gone] == [ClientStalled]
    assert caller.transport.count("abort") == 1


def test_a_slow_client_is_not_a_stalled_one() -> None:
    """A client that takes a byte now and then is still served."""
    caller = Caller(client_stall=10)
    caller.send(GET)
    caller.start()
    for held in range(20, 0, -1):
        caller.transport.hold(held)
        caller.pass_time(9)
    caller.transport.hold(0)
    caller.pass_time(100)

    assert caller.is_open()
    assert not caller.handler.gone


@pytest.mark.parametrize("options", [[], ["Connection: close"]], ids=["kept", "closed"])
@pytest.mark.parametrize("stalls", [True, False])
def test_the_rest_of_a_response_is_sent_while_the_client_takes_some(
    options: list[str], stalls: bool
) -> None:
    """Neither a close nor ``client_idle`` cuts it; it is over when the client has it."""
    caller = Caller(request("GET", "/", *options), client_stall=10, client_idle=5)
    current = caller.request
    ends: list[Any] = []
    for held in (4, 3, 2, 1):
        caller.transport.hold(held)
        if held == 4:
            caller.respond()
            waiting = current.when_delivered()
            assert waiting is not None
            waiting.addBoth(ends.append)
        caller.pass_time(9)
        assert (ends, current.is_over, caller.site.ended) == ([], False, 0)
        assert "close" not in caller.closes()
    if stalls:
        caller.pass_time(3)
        assert caller.closes()[-1] == "abort"
        assert isinstance(ends.pop().value, ClientStalled)
    else:
        caller.transport.hold(0)
        caller.pass_time(1)
        assert caller.closes() == (["half", "close"] if options else [])
        assert ends == [None]
    assert (current.is_over, caller.site.ended) == (True, 1)


def test_a_response_is_not_followed_by_the_next_before_it_is_taken() -> None:
    """However much is asked for, one response waits, and what is read beside it is bounded."""
    caller = Caller(GET * 3, limits=Limits(request_head=200))
    caller.transport.hold(1)
    caller.respond()
    assert (len(caller.handler.requests), caller.transport.is_paused()) == (1, False)
    caller.send(GET * 100)
    assert (len(caller.handler.requests), caller.transport.is_paused()) == (1, True)
    caller.transport.hold(0)
    caller.pass_time(1)
    assert (len(caller.handler.requests), caller.is_open()) == (2, True)


@pytest.mark.parametrize("cut", [True, False])
def test_a_request_that_is_never_begun_has_a_record(cut: bool) -> None:
    """It came behind another one, and its client left, or was dropped, before its turn."""
    caller = Caller()
    abandoned: list[tuple[bytes, type]] = []
    caller.site.abandoned = lambda request, why: abandoned.append((request.uri, type(why)))
    caller.send(GET + request("GET", "/next") + b"nonsense")
    if cut:
        caller.site.cut()
    caller.transport.end(ABORTED if cut else FIN)
    assert abandoned == [(b"/next", Cut if cut else ClientGone)]


def test_requests_that_come_together_are_served_in_turns() -> None:
    """Each has a turn of the reactor of its own, and nothing more is read before the last one."""
    caller = Caller()
    order: list[str] = []

    def act(current: Request) -> None:
        order.append("this")
        caller.clock.callLater(0, order.append, "another")
        current.finish()

    caller.handler.act = act
    caller.channel.dataReceived(GET * 4 + GET[:10])
    assert (order, caller.transport.is_paused()) == (["this"], True)
    caller.clock.advance(0)
    assert (order, caller.transport.is_paused()) == (["this", "another"] * 4, False)
    caller.send(GET[10:])
    assert order.count("this") == 5


@pytest.mark.parametrize("end", [FIN, RESET, None])
@pytest.mark.parametrize("held", [0, 10])
def test_a_client_that_leaves_has_a_response_or_not(end: Exception | None, held: int) -> None:
    """What it had acknowledged when it left decides, and whether it had room for the rest."""
    caller = Caller(GET)
    current = caller.request
    caller.transport.hold(10)
    caller.respond()
    waiting = current.when_delivered()
    assert waiting is not None
    ends: list[Any] = []
    waiting.addBoth(ends.append)
    caller.transport.hold(held)
    if end is None:
        caller.site.cut()
    caller.transport.end(end or ABORTED)
    if held and end is None:
        assert ends[0].type is Cut
    elif held:
        assert (ends[0].type, ends[0].value.had_room) == (ClientGone, False)
    else:
        assert ends == [None]
    assert not caller.clock.getDelayedCalls(), caller.site.connections


@pytest.mark.parametrize("version", ["1.0", "1.1"])
@pytest.mark.parametrize("is_whole", [True, False])
def test_a_response_that_ends_behind_a_reset_is_not_delivered(is_whole: bool, version: str) -> None:
    """The transport reports a reset in the next turn; what is ended before that reaches nobody."""
    caller = Caller(request("GET", "/", version=version))
    current = caller.start()
    current.write(b"a part")
    if version == "1.0":
        caller.channel.readConnectionLost()  # no other end shows that a part is not the whole
    else:
        caller.channel.abort()
    assert caller.closes() == ["abort"]
    if is_whole:
        current.finish()
    else:
        current.break_off()
    waiting = current.when_delivered()
    assert waiting is not None
    ends: list[Any] = []
    waiting.addBoth(ends.append)
    assert ends == []
    caller.transport.end(ABORTED)
    assert [end.type for end in ends] == [ClientGone]
    assert caller.closes() == ["abort"]
    assert not caller.clock.getDelayedCalls()


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
    """Our side ends; for two seconds the client's bytes are dropped, then the connection closes."""
    caller = Caller(data)
    written = caller.transport.take()
    assert written.startswith(b"HTTP/1.1 %d " % status)
    assert b"\r\nconnection: close\r\n" in written.lower()
    served = len(caller.handler.requests)
    assert caller.transport.calls.count("half") == 1
    for _ in range(6):
        caller.send(GET * 100)
        caller.pass_time(0.25)
        assert not caller.transport.count("close")
    caller.pass_time(1.5)

    assert caller.closes() == ["half", "close"]
    assert (caller.status, len(caller.handler.requests)) == (0, served)


@pytest.mark.parametrize(
    ("data", "status"),
    [
        (request("POST", "/", "Content-Length: 5", "Expect: 100-Continue"), 100),
        (request("POST", "/", "Content-Length: 5", "Expect: 100-continue, 100-continue"), 100),
        (request("POST", "/", "Content-Length: 5", *2 * ["Expect: 100-continue"]), 100),
        (request("POST", "/", "Content-Length: 5", "Expect: 100-continue, else"), 417),
        (request("POST", "/", "Content-Length: 5", "Expect: 100-continue", "Expect: else"), 417),
        (request("POST", "/", "Content-Length: 5"), 0),
        (request("POST", "/", "Content-Length: 5", "Expect: 100-continue", version="1.0"), 0),
        (request("POST", "/", "Content-Length: 0", "Expect: 100-continue"), 0),
        (request("GET", "/", "Expect: 100-continue"), 0),
    ],
)
def test_expectations(data: bytes, status: int) -> None:
    """100 Continue is sent if HTTP/1.1 waits with a body; any other expectation is a 417."""
    caller = Caller(data)
    assert caller.status == status
    if status != 417:
        caller.send(b"hello"[: 5 * (b"Length: 5" in data)])
        assert caller.request.refusal is None


# --- what is not HTTP -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "data",
    [
        b"hello\r\n",
        b"GET / HTTP/1.1\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        b"GET / HTTP/1.1\r\n\r\n",
        b"GET / HTTP/1.1\nHost: h\n\n",
        b"GET / HTTP/1.1\r\nHost: h\r\nx: a\0b\r\n\r\n",
    ],
)
def test_what_is_not_http_is_a_400_in_words(data: bytes) -> None:
    """The response is JSON, says that it is ours, and the connection closes."""
    caller = Caller(data + GET)
    head, _, body = caller.transport.value().partition(b"\r\n\r\n")

    assert head.startswith(b"HTTP/1.1 400 ")
    assert {
        b"content-type: application/json",
        b"x-llmproxy-error: malformed",
        b"connection: close",
        b"content-length: %d" % len(body),
    } <= set(head.lower().split(b"\r\n"))
    assert json.loads(body)["error"]["message"]
    assert not caller.is_open()
    caller.send(GET)
    assert not caller.handler.requests


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
    """A head that is too large or not supported has a status of its own."""
    caller = Caller(data, limits=Limits(request_head=512))

    assert caller.status == status
    assert not caller.is_open()
    assert not caller.handler.requests


def test_a_head_of_the_most_bytes_is_served() -> None:
    """The limit itself is allowed, wherever the head is split."""
    head = b"GET / HTTP/1.1\r\nHost: h\r\nx: ".ljust(512, b"y") + b"\r\n\r\n"
    for at in (1, 511, 512, 513, 514, 515):
        caller = Caller(head[:at], head[at:], limits=Limits(request_head=512))
        assert len(caller.handler.requests) == 1
        assert Caller(head[:at], head[at:], limits=Limits(request_head=511)).status == 431


def test_an_empty_line_before_a_request_is_skipped() -> None:
    """Some clients send one behind a body, split at any point (RFC 9112, section 2.2)."""
    for at in range(5):
        caller = Caller((b"\r\n" + GET)[:at], (b"\r\n" + GET)[at:])
        assert len(caller.handler.requests) == 1


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
    caller = Caller(request("GET", "/", *fields, version=version))
    caller.respond()

    assert caller.is_open() is kept
    assert (b"connection: close\r\n" in caller.transport.value()) is not kept


def test_pipelined_requests_are_served_in_order() -> None:
    """The next request is served when the response before it has ended."""
    caller = Caller(GET + request("POST", "/", body=b"hello") + GET)
    for count in (1, 2, 3):
        assert [got.method for got in caller.handler.requests] == [b"GET", b"POST", b"GET"][:count]
        caller.respond()
    assert caller.channel.phase is Phase.IDLE
    assert caller.is_open()
    assert caller.transport.value().count(b"HTTP/1.1 200 ") == 3


def test_a_client_that_pipelines_behind_a_stream_is_still_read() -> None:
    """Bytes behind a running request are read on, and no longer served."""
    caller = Caller(GET)
    caller.start()
    for _ in range(100):
        caller.send(GET * 20)

    assert not caller.transport.is_paused()
    caller.respond()
    assert caller.transport.count("half") == 1
    assert len(caller.handler.requests) == 1


# --- the site -------------------------------------------------------------------------------------


def test_only_http_1_1_is_offered() -> None:
    """ALPN names HTTP/1.1 alone."""
    assert Caller().site.acceptableProtocols() == [b"http/1.1"]


def test_one_timer_serves_every_connection() -> None:
    """The sweep is one timer while the site listens or has clients, and none afterwards."""
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


def test_a_sweep_over_many_connections_takes_several_turns(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Thousands are not looked at in one turn; each is looked at once."""
    caller = Caller(client_idle=40)
    transports = [caller.transport]
    for _ in range(149):
        caller.connect()
        transports.append(caller.transport)
    closed: list[int] = []
    later = caller.clock.callLater

    def note(delay: float, call: Any, *args: Any, **named: Any) -> Any:
        if delay == 0:
            closed.append(sum(one.count("half") for one in transports))
        return later(delay, call, *args, **named)

    monkeypatch.setattr(caller.clock, "callLater", note)
    caller.clock.advance(40)
    assert closed == [64, 128]
    assert [one.count("half") for one in transports] == [1] * 150


def test_who_leaves_within_a_sweep_is_not_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    """When all have left, nothing of the sweep is left to be called."""
    caller = Caller(client_idle=40)
    transports = [caller.transport]
    for _ in range(99):
        caller.connect()
        transports.append(caller.transport)
    late: list[int] = []
    later = caller.clock.callLater

    def all_leave() -> None:
        for transport in transports:
            transport.end(FIN)

    def leave(delay: float, call: Any, *args: Any, **named: Any) -> Any:
        if delay == 0:
            late.append(sum(not one.count("half") for one in transports))
            later(0, all_leave)
        return later(delay, call, *args, **named)

    monkeypatch.setattr(caller.clock, "callLater", leave)
    caller.site.stopFactory()
    caller.clock.advance(40)
    assert late == [36]
    assert sum(one.count("half") for one in transports) == 64
    assert not caller.clock.getDelayedCalls()


def test_who_leaves_together_is_reported_before_any_connection_is_closed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """So providers hear first; then the connections are closed in several turns."""
    caller = Caller(GET)
    channels, transports = [caller.channel], [caller.transport]
    for _ in range(39):
        caller.connect()
        caller.send(GET)
        channels.append(caller.channel)
        transports.append(caller.transport)
    closed: list[int] = []
    later = caller.clock.callLater

    def note(delay: float, call: Any, *args: Any, **named: Any) -> Any:
        if delay == 0:
            closed.append(sum(one.count("close") for one in transports))
        return later(delay, call, *args, **named)

    monkeypatch.setattr(caller.clock, "callLater", note)
    for channel in channels:
        channel.readConnectionLost()
    assert [type(why) for why in caller.handler.gone] == [ClientGone] * 40
    caller.clock.advance(0)
    assert closed == [0, 16, 32]
    assert [one.count("close") for one in transports] == [1] * 40


def test_who_is_dropped_meanwhile_is_not_closed_again() -> None:
    """The connection is gone when its turn comes."""
    caller = Caller(GET)
    caller.channel.readConnectionLost()
    caller.site.cut()
    caller.transport.end(ABORTED)
    caller.clock.advance(0)
    assert caller.closes() == ["abort"]
    assert len(caller.handler.gone) == 1


def test_what_is_still_written_ends_with_its_client_at_once() -> None:
    """A response that is read on without a client is not written to it any more."""
    caller = Caller(GET)
    push = Push()
    caller.start().registerProducer(push, True)
    caller.channel.readConnectionLost()
    assert caller.closes() == ["close"]


def test_one_broken_connection_does_not_stop_the_sweep(logged_failures: Any) -> None:
    """A connection that cannot be checked is dropped, and the others are still checked."""
    caller = Caller(client_idle=10)
    broken, transport = caller.channel, caller.transport

    def fail(now: float) -> None:
        raise ZeroDivisionError

    broken.check = fail  # type: ignore[method-assign]  # a stand-in
    caller.connect()
    caller.clock.advance(11)
    assert transport.count("abort") == 1
    assert caller.transport.count("half") == 1
    assert logged_failures.flush(ZeroDivisionError)


def test_what_clients_have_not_taken_is_summed_up() -> None:
    """``pending_bytes`` is the sum over all connections."""
    caller = Caller()
    caller.transport.hold(3)
    caller.connect()
    caller.transport.hold(4)

    assert caller.site.pending_bytes() == 7


def test_a_drain_closes_idle_connections_and_lets_responses_end() -> None:
    """A running response ends before its connection closes; an idle one closes after a grace."""
    caller = Caller()
    idle = caller.transport
    caller.connect()
    caller.send(GET)
    caller.start()
    empty = caller.site.when_empty()
    caller.site.drain()

    assert (idle.count("half"), caller.is_open()) == (0, True)
    caller.pass_time(6)
    assert (idle.count("half"), caller.is_open()) == (1, True)
    caller.request.write(b"more")
    caller.request.finish()
    assert caller.transport.value().endswith(LAST_CHUNK)
    idle.end(FIN)
    assert not empty.called
    caller.pass_time(3)
    assert caller.transport.count("half") == 1
    caller.transport.end(FIN)
    assert empty.called


def test_a_client_that_heard_of_no_drain_may_send_one_more_request() -> None:
    """A response that began before the drain announces no end; the next response does."""
    caller = Caller(GET)
    caller.start(fields=[(b"content-length", b"0")])
    caller.site.drain()
    caller.request.finish()
    assert b"connection: close" not in caller.transport.take()
    caller.pass_time(0.5)
    caller.send(GET)
    caller.respond()

    assert b"connection: close\r\n" in caller.transport.take()
    assert caller.transport.count("half") == 1


@pytest.mark.parametrize("served", [False, True])
def test_a_first_request_may_take_longer_in_a_drain(served: bool) -> None:
    """Whoever has just connected sends one; a connection that is kept is closed after a second."""
    caller = Caller()
    if served:
        caller.send(GET)
        caller.respond()
    caller.site.drain()
    caller.pass_time(4)
    caller.transport.take()
    caller.send(GET)
    assert caller.transport.count("half") == served
    if not served:
        caller.respond()
        assert b"connection: close\r\n" in caller.transport.take()


@pytest.mark.parametrize("sent", [0, 1, 10, len(GET) - 1])
def test_a_request_that_arrives_in_a_drain_is_served(sent: int) -> None:
    """Split at any point, the request gets a response with ``Connection: close``."""
    caller = Caller(GET[:sent])
    caller.site.drain()
    caller.send(GET[sent:])
    caller.respond()

    assert caller.transport.value().startswith(b"HTTP/1.1 200 ")
    assert b"connection: close\r\n" in caller.transport.value()
    assert caller.transport.count("half") == 1


def test_a_body_that_arrives_in_a_drain_is_served() -> None:
    """A drain does not interrupt an upload."""
    caller = Caller()
    head = request("POST", "/", "Transfer-Encoding: chunked")
    caller.send(head, chunked(b"hel"))
    caller.site.drain()
    caller.send(chunked(b"lo") + LAST_CHUNK)

    assert caller.request.body == b"hello"


def test_a_cut_drops_every_client_at_once() -> None:
    """The handler learns that the proxy itself cut the request; every connection is aborted."""
    caller = Caller()
    idle = caller.transport
    caller.connect()
    caller.send(GET)
    caller.site.cut()

    assert [type(why) for why in caller.handler.gone] == [Cut]
    assert idle.count("abort") == 1
    assert caller.transport.count("abort") >= 1
    idle.end(ABORTED)
    caller.transport.end(ABORTED)
    assert len(caller.handler.gone) == 1


def test_a_site_without_clients_is_empty() -> None:
    """``when_empty`` fires at once if no client is connected."""
    caller = Caller()
    caller.transport.end(FIN)

    assert caller.site.when_empty().called


def test_a_site_is_empty_after_its_last_request_has_ended() -> None:
    """When ``when_empty`` fires, the last request knows that its client left."""
    caller = Caller(GET)
    heard: list[int] = []
    caller.site.when_empty().addCallback(lambda _: heard.append(len(caller.handler.gone)))
    caller.transport.end(FIN)

    assert heard == [1]


# --- on real sockets ------------------------------------------------------------------------------


async def serve(
    client: Callable[[Served], Any],
    act: Callable[[Request], None],
    *,
    direct: bool = True,
    **timeouts: float | None,
) -> Any:
    """Let a client talk to a site in a thread.

    Args:
        client: what the client does; its result is returned.
        act: what the site does with the request.
        direct: on our transport; else on Twisted's.
        timeouts: those of the site.
    """
    handler = WaitingHandler()
    handler.act = act
    async with Served(timeouts=Timeouts(**timeouts), direct=direct) as served:
        served.site.serve(Router(handler))
        result = await served.run_turning(client, served)
        await served.until_connected(0)
    return result


@pytest_twisted.ensureDeferred
@pytest.mark.parametrize("direct", [True, False], ids=["direct", "twisted"])
@pytest.mark.parametrize(("version", "end"), [("1.0", "reset"), ("1.1", "fin")])
async def test_a_break_comes_after_all_that_was_written(
    version: str, end: str, direct: bool
) -> None:
    """A client that reads gets every byte of a broken response, and can tell that it is broken."""
    size = 3_000_000

    def client(served: Served) -> tuple[int, str]:
        with connect(served.port, receive_buffer=65536) as wire:
            wire.send(request("GET", "/", version=version))
            wire.read_head()
            how = wire.wait_closed()
            return wire.buffer.count(b"x"), how

    def act(current: Request) -> None:
        current.start(200, [])
        current.flush()
        current.write(b"x" * size)
        current.break_off()

    assert await serve(client, act, direct=direct, client_stall=None) == (size, end)


@pytest_twisted.ensureDeferred
@pytest.mark.parametrize("size", [10_000, 20_000_000])
async def test_a_break_does_not_wait_for_ever(size: int) -> None:
    """A client that does not read a broken response is reset after ``client_stall``."""
    gone = threading.Event()

    def client(served: Served) -> str:
        with connect(served.port, receive_buffer=4096) as wire:
            wire.send(request("GET", "/", version="1.0"))
            assert gone.wait(WAIT)
            return wire.wait_closed()

    def act(current: Request) -> None:
        current.start(200, [])
        current.flush()
        current.write(b"x" * size)
        current.channel.site.when_empty().addCallback(lambda _: gone.set())
        current.break_off()

    assert await serve(client, act, client_stall=5) == "reset"


@pytest_twisted.ensureDeferred
async def test_a_client_that_does_not_read_pauses_the_producer() -> None:
    """A push producer is paused once the kernel is full, and resumed when the client reads."""
    producer, full = Push(), threading.Event()
    sizes: list[int] = []

    def client(served: Served) -> int:
        with connect(served.port, receive_buffer=65536) as wire:
            wire.send(GET)
            assert full.wait(WAIT)
            wire.read_head()
            return len(wire.read_chunks())

    def act(current: Request) -> None:
        current.start(200, [])
        current.flush()
        current.registerProducer(producer, True)
        written = 0

        def push() -> None:
            nonlocal written
            if not producer.told:
                current.write(bytes(65536))
                written += 65536
                assert written < 100_000_000
            if producer.told == ["pause"]:
                full.set()
            if producer.told == ["pause", "resume"]:
                sizes.append(written)
                current.unregisterProducer()
                current.finish()
            else:
                real_reactor.callLater(0, push)

        push()

    assert [await serve(client, act)] == sizes


@pytest_twisted.ensureDeferred
@pytest.mark.parametrize("leave", [Wire.close, Wire.reset])
async def test_a_client_that_leaves_is_noticed_while_it_is_served(
    leave: Callable[[Wire], None],
) -> None:
    """The handler learns of a FIN or a reset, also behind requests that were pipelined."""
    handler = WaitingHandler()
    async with Served() as served:
        served.site.serve(Router(handler))
        wire = connect(served.port)
        wire.send(GET * 1000)
        await until(lambda: handler.requests)
        leave(wire)
        await until(lambda: handler.gone)
        assert [type(why) for why in handler.gone] == [ClientGone]
