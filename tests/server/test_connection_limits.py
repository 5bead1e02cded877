"""Who may connect: what is counted, what is rejected and how, and that nothing stays behind."""

from __future__ import annotations

import json
import tracemalloc

import pytest
from hypothesis import given
from hypothesis import strategies as st
from twisted.internet.address import IPv4Address, UNIXAddress
from twisted.internet.interfaces import IAddress
from twisted.internet.task import Clock
from twisted.logger import LogLevel, capturedLogs
from twisted.web.server import NOT_DONE_YET

from llmproxy.config import Limits, Timeouts
from llmproxy.errors import ProxyError
from llmproxy.server.connection import ClientConnection
from llmproxy.server.connection_limits import ConnectionLimiter, RejectedConnection
from llmproxy.server.handler import Handler, Router
from llmproxy.server.request import Request
from llmproxy.server.site import Site
from tests.support.fake_transport import FIN, RESET, FakeTransport
from tests.support.served import limits
from tests.support.sockets import request

GET = request("GET", "/")
LIMITS = ["max_connections", "connections_per_address"]
AT_ONCE = 100
"""How many rejected connections get a response at once."""


def refusal(limiter: ConnectionLimiter, address: str | None = "192.0.2.1") -> ProxyError:
    """Ask for one connection more than there may be; return why it is rejected."""
    error = limiter.enter(address)
    assert error is not None
    return error


# --- who is counted -------------------------------------------------------------------------------


def test_without_limits_everybody_comes_in() -> None:
    """Nothing is refused, and nothing says so."""
    limiter = limits()
    assert [limiter.enter("192.0.2.1") for _ in range(1000)] == [None] * 1000
    assert limiter.refused == {"max_connections": 0, "connections_per_address": 0}


def test_one_that_leaves_makes_room_for_one() -> None:
    """Of ``most`` connections each counts, wherever it comes from."""
    limiter = limits(2)
    assert [limiter.enter("192.0.2.1"), limiter.enter(None)] == [None, None]
    assert refusal(limiter).reason == "max_connections"
    assert refusal(limiter, None).reason == "max_connections"
    limiter.leave("192.0.2.1")
    assert limiter.enter("192.0.2.2") is None
    assert refusal(limiter).reason == "max_connections"
    assert limiter.refused == {"max_connections": 3, "connections_per_address": 0}


def test_an_address_is_counted_by_itself() -> None:
    """An address that is full keeps no other out, and has room again when one of its own leaves."""
    limiter = limits(0, 2)
    assert [limiter.enter("192.0.2.1"), limiter.enter("192.0.2.1")] == [None, None]
    assert refusal(limiter, "192.0.2.1").reason == "connections_per_address"
    assert limiter.enter("2001:db8::1") is None
    limiter.leave("2001:db8::1")
    assert refusal(limiter, "192.0.2.1").reason == "connections_per_address"
    limiter.leave("192.0.2.1")
    assert limiter.enter("192.0.2.1") is None
    assert limiter.refused == {"max_connections": 0, "connections_per_address": 2}


def test_what_is_rejected_takes_no_place() -> None:
    """Neither in all nor of its address."""
    limiter = limits(3, 1)
    assert limiter.enter("192.0.2.1") is None
    for _ in range(10):
        refusal(limiter, "192.0.2.1")
    assert [limiter.enter("192.0.2.2"), limiter.enter("192.0.2.3")] == [None, None]
    assert refusal(limiter, "192.0.2.1").reason == "max_connections"  # where both are broken
    limiter.leave("192.0.2.1")
    assert limiter.enter("192.0.2.1") is None


def test_an_address_that_is_known_later() -> None:
    """It counts from then on; one that may not stay was never counted of its address."""
    limiter = limits(0, 1)
    assert [limiter.enter(None), limiter.enter(None)] == [None, None]
    assert limiter.recognise("192.0.2.1") is None
    late = limiter.recognise("192.0.2.1")
    assert late is not None
    assert late.reason == "connections_per_address"
    limiter.leave(None)
    assert refusal(limiter, "192.0.2.1").reason == "connections_per_address"
    limiter.leave("192.0.2.1")
    assert limiter.enter("192.0.2.1") is None


def test_no_address_is_remembered() -> None:
    """What a million callers leave behind is nothing."""
    limiter = limits(0, 1)
    tracemalloc.start()
    try:
        for number in range(20_000):
            limiter.enter(f"2001:db8::{number}")
            limiter.leave(f"2001:db8::{number}")
        kept, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert kept < 100_000


@given(st.lists(st.tuples(st.booleans(), st.sampled_from(["a", "b", "c", None])), max_size=60))
def test_the_counts_are_those_of_who_is_inside(steps: list[tuple[bool, str | None]]) -> None:
    """Whatever comes and goes in whatever order, the limits are kept to the last connection."""
    limiter = limits(5, 2)
    inside: list[str | None] = []
    for comes, address in steps:
        if comes:
            room = len(inside) < 5 and (address is None or inside.count(address) < 2)
            assert (limiter.enter(address) is None) == room
            inside += [address] if room else []
        elif address in inside:
            inside.remove(address)
            limiter.leave(address)
    for address in inside:
        limiter.leave(address)
    assert [limiter.enter(None) is None for _ in range(6)] == [True] * 5 + [False]


# --- what is said of it ---------------------------------------------------------------------------


@pytest.mark.parametrize("limit", LIMITS)
def test_the_refusal_names_the_limit(limit: str) -> None:
    """503, the limit in one word, and when to come again."""
    limiter = limits(1) if limit == "max_connections" else limits(0, 1)
    limiter.enter("192.0.2.1")
    error = refusal(limiter)
    assert (error.status, error.reason) == (503, limit)
    assert error.fields == ((b"retry-after", b"1"),)
    assert not error.may_have_run
    assert limiter.refused[limit] == 1


def test_the_log_tells_each_limit_once_a_minute() -> None:
    """A crowd fills no disk, and a second limit is not hidden by the first."""
    clock = Clock()
    clock.advance(1000)
    limiter = limits(3, 1, clock)
    limiter.enter("192.0.2.1")
    with capturedLogs() as events:
        for _ in range(50):
            refusal(limiter, "192.0.2.1")
        limiter.enter("192.0.2.2")
        limiter.enter("192.0.2.3")
        for _ in range(50):
            refusal(limiter, "192.0.2.4")
        clock.advance(59)
        refusal(limiter, "192.0.2.5")
        clock.advance(2)
        refusal(limiter, "192.0.2.6")
        refusal(limiter, "192.0.2.7")
    assert [event["limit"] for event in events] == [
        "connections_per_address",
        "max_connections",
        "max_connections",
    ]
    assert {event["log_level"] for event in events} == {LogLevel.warn}
    assert [event["address"] for event in events] == ["192.0.2.1", "192.0.2.4", "192.0.2.6"]
    assert [event["connections"] for event in events] == [1, 3, 3]


# --- how connections are rejected ----------------------------------------------------------------


class Entrance:
    """A limiter that is full, with a clock that the test turns."""

    def __init__(self) -> None:
        self.clock = Clock()
        self.limiter = limits(1, 0, self.clock)
        self.limiter.enter(None)

    def build(self) -> RejectedConnection:
        """Return the protocol of a rejected connection."""
        return self.limiter.reject(refusal(self.limiter), self.clock)

    def knock(self) -> FakeTransport:
        """Connect a client that is rejected."""
        transport = FakeTransport()
        transport.connect(self.build())
        return transport


def test_a_rejected_client_gets_a_response() -> None:
    """A whole response in JSON, and our side of the connection ends; theirs may still speak."""
    transport = Entrance().knock()
    head, body = transport.take().split(b"\r\n\r\n")
    first, *fields = head.split(b"\r\n")
    assert first == b"HTTP/1.1 503 Service Unavailable"
    assert {
        b"date: Thu, 01 Jan 1970 00:00:01 GMT",
        b"content-type: application/json",
        b"content-length: %d" % len(body),
        b"x-llmproxy-error: max_connections",
        b"retry-after: 1",
        b"connection: close",
    } == set(fields)
    told = json.loads(body)["error"]
    assert (told["code"], told["type"]) == ("max_connections", "server_error")
    assert transport.calls == ["half"]


def test_what_they_send_is_dropped() -> None:
    """It is read, so that the end of the connection is no reset, and leads to nothing."""
    transport = Entrance().knock()
    transport.take()
    for _ in range(3):
        transport.protocol.dataReceived(GET)
    assert (transport.take(), transport.calls) == (b"", ["half"])


def test_who_does_not_go_is_dropped_after_two_seconds() -> None:
    """A descriptor is not held for longer by somebody who is not even served."""
    entrance = Entrance()
    transport = entrance.knock()
    entrance.clock.advance(1.9)
    assert transport.calls == ["half"]
    entrance.clock.advance(0.2)
    assert transport.calls == ["half", "abort"]
    transport.end(RESET)
    assert not entrance.clock.getDelayedCalls()


@pytest.mark.parametrize("end", [FIN, RESET])
def test_who_goes_leaves_nothing_behind(end: Exception) -> None:
    """Neither the delayed call stays, nor the count of those that have a response."""
    entrance = Entrance()
    for _ in range(3 * AT_ONCE):
        transport = entrance.knock()
        assert transport.take()
        transport.end(end)
    assert not entrance.clock.getDelayedCalls()


def test_of_a_crowd_a_hundred_get_a_response() -> None:
    """Beyond a hundred at once a connection is closed at once, and costs no timer."""
    entrance = Entrance()
    told = [entrance.knock() for _ in range(AT_ONCE)]
    assert all(transport.take() for transport in told)
    for _ in range(3):
        beyond = entrance.knock()
        assert (beyond.take(), beyond.calls) == (b"", ["abort"])
        beyond.end(RESET)
    assert len(entrance.clock.getDelayedCalls()) == AT_ONCE
    told[0].end(FIN)
    assert entrance.knock().take()
    assert entrance.knock().take() == b""


def test_there_is_no_response_below_tls() -> None:
    """One in the clear would be noise in a handshake; its place is given back at once."""
    entrance = Entrance()
    for _ in range(2 * AT_ONCE):
        transport = FakeTransport()
        transport.connect(entrance.build().without_response().without_response())
        assert (transport.take(), transport.calls) == (b"", ["abort"])
        transport.end(RESET)
    assert not entrance.clock.getDelayedCalls()
    assert entrance.knock().take()


# --- a site and its limiter ----------------------------------------------------------------------


class Answering(Handler):
    """Answers at once."""

    def render(self, request: Request) -> int:
        request.start(200, [(b"content-length", b"2")])
        request.write(b"ok")
        request.finish()
        return NOT_DONE_YET


def site_with(limiter: ConnectionLimiter) -> Site:
    """Return a site whose connections are limited."""
    clock = Clock()
    return Site(
        Router(Answering()),
        clock,
        clock.seconds,
        Timeouts(),
        Limits(),
        wall=lambda: 0.0,
        limiter=limiter,
    )


def connect(site: Site, address: IAddress | None, peer: str = "192.0.2.9") -> FakeTransport:
    """Connect a client to a site, as a listener does."""
    transport = FakeTransport()
    transport.peerAddr = IPv4Address("TCP", peer, 1)
    transport.connect(site.buildProtocol(address))
    return transport


def ipv4(host: str) -> IPv4Address:
    """Return a client's address."""
    return IPv4Address("TCP", host, 40000)


@pytest.mark.parametrize("sent", [b"", GET[:5], GET, b"nonsense\r\n\r\n"])
def test_a_connection_gives_its_place_back_once(sent: bytes) -> None:
    """In whatever state it ends."""
    limiter = limits(1, 1)
    site = site_with(limiter)
    for _ in range(3):
        transport = connect(site, ipv4("192.0.2.1"))
        assert isinstance(transport.protocol, ClientConnection)
        transport.protocol.dataReceived(sent)
        assert isinstance(site.buildProtocol(ipv4("192.0.2.1")), RejectedConnection)
        transport.end(FIN)
    assert limiter.enter("192.0.2.1") is None


def test_a_rejected_connection_is_none_of_the_sites() -> None:
    """The site is empty although some are still open."""
    site = site_with(limits(1))
    inside = connect(site, ipv4("192.0.2.1"))
    connect(site, ipv4("192.0.2.2"))
    assert len(site.connections) == 1
    inside.end(FIN)
    assert site.when_empty().called


def test_clients_of_a_unix_socket_have_no_address() -> None:
    """Only all of them together are counted."""
    site = site_with(limits(3, 1))
    address = UNIXAddress("/run/x")
    assert [type(site.buildProtocol(address)) for _ in range(4)] == [ClientConnection] * 3 + [
        RejectedConnection
    ]


def test_a_balancers_client_is_counted_at_its_first_request() -> None:
    """Not before a byte of it came, and for its second request not again."""
    site = site_with(limits(0, 1))
    first, second, third, other = (
        connect(site, None, peer) for peer in ("1.1.1.1", "1.1.1.1", "1.1.1.1", "2.2.2.2")
    )
    first.protocol.dataReceived(GET)
    first.protocol.dataReceived(GET + GET)
    assert first.take().count(b"200 OK") == 3

    second.protocol.dataReceived(GET + GET)
    response = second.take()
    assert response.startswith(b"HTTP/1.1 503 ")
    assert response.count(b"HTTP/1.1 ") == 1
    assert b"\r\nx-llmproxy-error: connections_per_address\r\n" in response
    assert second.calls[-1] == "half"
    other.protocol.dataReceived(GET)
    assert other.take().startswith(b"HTTP/1.1 200 ")

    second.end(FIN)  # it was not counted: the first one still is
    third.protocol.dataReceived(GET)
    assert third.take().startswith(b"HTTP/1.1 503 ")
    for transport in (first, third, other):
        transport.end(FIN)
    for peer in ("1.1.1.1", "2.2.2.2"):
        assert site.limiter.enter(peer) is None
