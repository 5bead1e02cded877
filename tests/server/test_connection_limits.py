"""Limits of connections: what is counted, how a connection is rejected, and what it leaves."""

from __future__ import annotations

import json
import tracemalloc

import pytest
from hypothesis import given
from hypothesis import strategies as st
from twisted.internet.address import IPv4Address
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
    """Enter one connection more than the limit; return why it is rejected."""
    error = limiter.enter(address)
    assert error is not None
    return error


# --- what is counted ------------------------------------------------------------------------------


def test_without_limits_no_connection_is_rejected() -> None:
    """A thousand connections of one address enter, and none is counted as rejected."""
    limiter = limits()
    assert [limiter.enter("192.0.2.1") for _ in range(1000)] == [None] * 1000
    assert limiter.refused == {"max_connections": 0, "connections_per_address": 0}


def test_a_connection_that_leaves_makes_room_for_one() -> None:
    """Every connection counts towards ``most``, with an address or without."""
    limiter = limits(2)
    assert [limiter.enter("192.0.2.1"), limiter.enter(None)] == [None, None]
    assert refusal(limiter).reason == "max_connections"
    assert refusal(limiter, None).reason == "max_connections"
    limiter.leave("192.0.2.1")
    assert limiter.enter("192.0.2.2") is None
    assert refusal(limiter).reason == "max_connections"
    assert limiter.refused == {"max_connections": 3, "connections_per_address": 0}


def test_an_address_may_be_known_later() -> None:
    """It counts from then on; a connection that is rejected then was never counted."""
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
    """Addresses whose connections have left take no memory."""
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
def test_only_open_connections_count(steps: list[tuple[bool, str | None]]) -> None:
    """In any order of entering and leaving, the limits are exact, and rejections are counted."""
    limiter = limits(5, 2)
    inside: list[str | None] = []
    rejected = {"max_connections": 0, "connections_per_address": 0}
    for enters, address in steps:
        if enters:
            limit = None
            if len(inside) == 5:
                limit = "max_connections"
            elif address is not None and inside.count(address) == 2:
                limit = "connections_per_address"
            error = limiter.enter(address)
            assert (None if error is None else error.reason) == limit
            if limit is None:
                inside.append(address)
            else:
                rejected[limit] += 1
        elif address in inside:
            inside.remove(address)
            limiter.leave(address)
    assert limiter.refused == rejected
    for address in inside:
        limiter.leave(address)
    assert [limiter.enter(None) is None for _ in range(6)] == [True] * 5 + [False]


# --- how it is reported ---------------------------------------------------------------------------


@pytest.mark.parametrize("limit", LIMITS)
def test_the_refusal_names_the_limit(limit: str) -> None:
    """The response would be 503, with the limit in one word and the time to retry."""
    limiter = limits(1) if limit == "max_connections" else limits(0, 1)
    limiter.enter("192.0.2.1")
    error = refusal(limiter)
    assert (error.status, error.reason) == (503, limit)
    assert error.fields == ((b"retry-after", b"1"),)
    assert not error.may_have_run
    assert limiter.refused[limit] == 1


def test_each_limit_is_logged_once_a_minute() -> None:
    """Many rejected connections fill no disk, and one limit does not hide the other."""
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


# --- how connections are rejected -----------------------------------------------------------------


class FullLimiter:
    """A limiter that is full, with a clock that the test turns."""

    def __init__(self) -> None:
        self.clock = Clock()
        self.limiter = limits(1, 0, self.clock)
        self.limiter.enter(None)

    def build(self) -> RejectedConnection:
        """Return the protocol of a rejected connection."""
        return self.limiter.reject(refusal(self.limiter), self.clock)

    def connect_rejected(self) -> FakeTransport:
        """Connect a client that is rejected."""
        transport = FakeTransport()
        transport.connect(self.build())
        return transport


def test_a_rejected_client_gets_a_response() -> None:
    """It is a whole response in JSON; our side ends, and the client may still send."""
    transport = FullLimiter().connect_rejected()
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
    error = json.loads(body)["error"]
    assert (error["code"], error["type"]) == ("max_connections", "server_error")
    assert transport.calls == ["half"]


def test_bytes_of_a_rejected_client_are_dropped() -> None:
    """The bytes are read, so that the end is no reset, and have no effect."""
    transport = FullLimiter().connect_rejected()
    transport.take()
    for _ in range(3):
        transport.protocol.dataReceived(GET)
    assert (transport.take(), transport.calls) == (b"", ["half"])


def test_a_rejected_client_that_stays_is_dropped_after_two_seconds() -> None:
    """A client that is not served may not hold a descriptor for longer."""
    full = FullLimiter()
    transport = full.connect_rejected()
    full.clock.advance(1.9)
    assert transport.calls == ["half"]
    full.clock.advance(0.2)
    assert transport.calls == ["half", "abort"]
    transport.end(RESET)
    assert not full.clock.getDelayedCalls()


@pytest.mark.parametrize("end", [FIN, RESET])
def test_a_rejected_client_that_leaves_is_forgotten(end: Exception) -> None:
    """Neither its delayed call stays nor its count."""
    full = FullLimiter()
    for _ in range(3 * AT_ONCE):
        transport = full.connect_rejected()
        assert transport.take()
        transport.end(end)
    assert not full.clock.getDelayedCalls()


def test_a_hundred_rejected_clients_at_once_get_a_response() -> None:
    """Beyond a hundred at once a connection is aborted, and needs no timer."""
    full = FullLimiter()
    responded = [full.connect_rejected() for _ in range(AT_ONCE)]
    assert all(transport.take() for transport in responded)
    for _ in range(3):
        beyond = full.connect_rejected()
        assert (beyond.take(), beyond.calls) == (b"", ["abort"])
        beyond.end(RESET)
    assert len(full.clock.getDelayedCalls()) == AT_ONCE
    responded[0].end(FIN)
    assert full.connect_rejected().take()
    assert full.connect_rejected().take() == b""


def test_there_is_no_response_below_tls() -> None:
    """Plain text would break the handshake; the place of such a connection is free at once."""
    full = FullLimiter()
    for _ in range(2 * AT_ONCE):
        transport = FakeTransport()
        transport.connect(full.build().without_response().without_response())
        assert (transport.take(), transport.calls) == (b"", ["abort"])
        transport.end(RESET)
    assert not full.clock.getDelayedCalls()
    assert full.connect_rejected().take()


# --- a site and its limiter -----------------------------------------------------------------------


class RespondingHandler(Handler):
    """Responds at once."""

    def render(self, request: Request) -> int:
        request.start(200, [(b"content-length", b"2")])
        request.write(b"ok")
        request.finish()
        return NOT_DONE_YET


def site_with(limiter: ConnectionLimiter) -> Site:
    """Return a site whose connections are limited."""
    clock = Clock()
    return Site(
        Router(RespondingHandler()),
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
    """It may end in any state."""
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
    """The site is empty although a rejected connection is still open."""
    site = site_with(limits(1))
    inside = connect(site, ipv4("192.0.2.1"))
    connect(site, ipv4("192.0.2.2"))
    assert len(site.connections) == 1
    inside.end(FIN)
    assert site.when_empty().called


def test_a_client_behind_a_balancer_is_counted_at_its_first_request() -> None:
    """It is not counted before its first byte, and its second request does not count again."""
    site = site_with(limits(0, 1))
    first, second, third, other = (
        connect(site, None, peer) for peer in ("1.1.1.1", "1.1.1.1", "1.1.1.1", "2.2.2.2")
    )
    first.protocol.dataReceived(GET)
    first.protocol.dataReceived(GET)
    first.protocol.dataReceived(GET)
    assert first.take().count(b"200 OK") == 3

    second.protocol.dataReceived(GET + GET)
    response = second.take()
    assert response.startswith(b"HTTP/1.1 503 ")
    assert response.count(b"HTTP/1.1 ") == 1
    assert b"\r\nx-llmproxy-error: connections_per_address\r\n" in response
    assert second.calls[-1] == "half"
    other.protocol.dataReceived(GET)
    assert other.take().startswith(b"HTTP/1.1 200 ")

    second.end(FIN)  # the second was not counted; the first still is
    third.protocol.dataReceived(GET)
    assert third.take().startswith(b"HTTP/1.1 503 ")
    for transport in (first, third, other):
        transport.end(FIN)
    for peer in ("1.1.1.1", "2.2.2.2"):
        assert site.limiter.enter(peer) is None
