"""``/pace`` on the admin site, by a turned clock: the page, and the site's own stream."""

from __future__ import annotations

from functools import partial

import pytest
from twisted.internet.address import IPv4Address
from twisted.internet.task import Clock

from llmproxy.admin.pace import MOST_STREAMS, pace_pages
from llmproxy.admin.page import is_ours
from llmproxy.admin.site import AdminRouter
from llmproxy.gateway.pace_page import admin_files
from llmproxy.server.site import Site
from tests.support.fake_transport import FIN, FakeTransport
from tests.support.sockets import request

STREAM = "/pace/stream?n=2"


class Admin:
    """An admin site, and connections to it."""

    def __init__(self) -> None:
        self.clock = Clock()
        wall = lambda: 1_700_000_000.0  # noqa: E731 - a clock that stands still
        ours = partial(is_ours, hosts=())
        pages = pace_pages(self.clock, self.clock.seconds, wall, ours)
        self.site = Site(AdminRouter(pages, {}), self.clock, self.clock.seconds, wall=lambda: 1.0)

    def get(self, target: str, *fields: str, method: str = "GET") -> FakeTransport:
        """Send a request on a connection of its own; return the connection."""
        transport = FakeTransport()
        transport.peerAddr = IPv4Address("TCP", "127.0.0.1", 40000)
        transport.connect(self.site.buildProtocol(None))
        transport.protocol.dataReceived(request(method, target, *fields))
        self.clock.advance(0)
        return transport

    def status(self, target: str, *fields: str, method: str = "GET") -> int:
        """Return the status of the response to a request."""
        return int(self.get(target, *fields, method=method).take().split()[1])

    def assert_nothing_left(self) -> None:
        """No stream runs, and no timer of one."""
        for connection in list(self.site.connections):
            connection.abort()
            connection.transport.end(FIN)
        assert not self.clock.getDelayedCalls()


def test_a_stream_needs_no_key() -> None:
    """It is as the one of the proxy port."""
    admin = Admin()
    wire = admin.get(STREAM)
    assert wire.writes[0].endswith(b"\r\n\r\n")  # the head leaves by itself
    head, _, body = wire.take().partition(b"\r\n\r\n")
    assert b"content-type: text/event-stream" in head
    assert b"x-accel-buffering: no" in head
    assert body.startswith(b'c8\r\ndata: {"n":1,"sent":1700000000.000000,"ms":0.000,')
    admin.clock.advance(0.25)
    data = wire.take()
    assert b'"n":2' in data
    assert data.endswith(b"\r\n0\r\n\r\n")
    admin.assert_nothing_left()


def test_it_breaks_off_where_that_is_asked_for() -> None:
    """Without an end."""
    wire = Admin().get("/pace/stream?n=2&break_after=1")
    assert b"0\r\n\r\n" not in wire.take().partition(b"\r\n\r\n")[2]
    assert wire.count("half") == 1


def test_some_streams_at_once_are_enough() -> None:
    """One that ends makes room, whether its client waits for that or leaves."""
    admin = Admin()
    wires = [admin.get("/pace/stream") for _ in range(MOST_STREAMS)]
    assert admin.status("/pace/stream") == 503
    wires[0].end(FIN)
    admin.clock.advance(0)
    assert admin.status("/pace/stream?n=1") == 200
    assert admin.status("/pace/stream") == 200
    assert admin.status("/pace/stream") == 503
    admin.clock.pump([0.25] * 20)
    assert admin.status("/pace/stream?n=1") == 200
    admin.assert_nothing_left()


def test_a_cut_ends_it() -> None:
    """As at the end of the process, or for a client that takes nothing."""
    admin = Admin()
    wire = admin.get("/pace/stream")
    admin.site.cut()
    admin.clock.advance(1)
    assert wire.count("abort") == 1
    assert not [call for call in admin.clock.getDelayedCalls() if call.getTime() < 2]


def test_a_full_wire_holds_it_up() -> None:
    """No event is made until the client takes bytes again."""
    admin = Admin()
    wire = admin.get(STREAM)
    wire.take()
    wire.producer.pauseProducing()
    admin.clock.advance(10)
    assert wire.take() == b""
    wire.producer.resumeProducing()
    admin.clock.advance(0)
    assert b'"n":2' in wire.take()
    admin.assert_nothing_left()


@pytest.mark.parametrize(
    ("target", "method", "fields", "status"),
    [
        (STREAM, "POST", (), 405),
        (STREAM, "HEAD", (), 200),
        ("/pace", "POST", (), 405),
        ("/pace", "HEAD", (), 200),
        ("/pace/stream?n=0", "GET", (), 400),
        ("/pace/stream?mark=a", "GET", (), 400),
        ("/pace/other", "GET", (), 404),
        ("/pace/", "GET", (), 404),
        (STREAM, "GET", ("Origin: https://evil.example",), 403),
        (STREAM, "GET", ("Sec-Fetch-Site: cross-site",), 403),
        (STREAM, "GET", ("Sec-Fetch-Site: same-site",), 403),
        (STREAM, "GET", ("Sec-Fetch-Site: same-origin",), 200),
    ],
)
def test_what_is_refused(target: str, method: str, fields: tuple[str, ...], status: int) -> None:
    """And what is not; no page of others' makes the site work."""
    admin = Admin()
    assert admin.status(target, *fields, method=method) == status


@pytest.mark.parametrize("target", [STREAM, "/pace", "/pace/page.mjs"])
def test_the_page_of_somebody_elses_name_gets_nothing(target: str) -> None:
    """A name can point here for a moment (DNS rebinding)."""
    admin, sent = Admin(), f"GET {target} HTTP/1.1\r\nHost: rebound.example\r\n\r\n"
    transport = FakeTransport()
    transport.peerAddr = IPv4Address("TCP", "127.0.0.1", 40000)
    transport.connect(admin.site.buildProtocol(None))
    transport.protocol.dataReceived(sent.encode())
    assert transport.take().startswith(b"HTTP/1.1 421 ")


@pytest.mark.parametrize("name", sorted(admin_files()))
def test_the_page_loads_nothing_from_elsewhere(name: bytes) -> None:
    """A policy sees to it."""
    admin = Admin()
    head, _, body = admin.get(f"/pace{name.decode()}").take().partition(b"\r\n\r\n")
    assert b"content-security-policy: default-src 'none'; " in head
    assert body == admin_files()[name].body


def test_the_page_knows_where_it_is() -> None:
    """Its files and its stream are below it, and it asks for no key."""
    page = admin_files()[b""].body
    assert b'data-site="admin" data-stream="./pace/stream"' in page
    assert page.count(b'="./pace/') == 3
