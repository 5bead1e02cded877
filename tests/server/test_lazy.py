"""A request of Twisted's that is made lazily has all that an eager one has."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from twisted.internet.address import IPv4Address
from twisted.web import server

from llmproxy.config import Timeouts
from llmproxy.http1.grammar import parse_request_head
from llmproxy.server.handler import Handler, Router
from llmproxy.server.request import Request

PEER, HOST = IPv4Address("TCP", "192.0.2.1", 1), IPv4Address("TCP", "192.0.2.2", 2)
HEAD = parse_request_head(b"GET /x?y HTTP/1.1\r\nHost: h\r\nX-A: 1\r\nX-A: 2")


def channel() -> Any:
    """Return what both kinds of request ask of a channel."""
    return SimpleNamespace(
        peer=PEER,
        getPeer=lambda: PEER,
        getHost=lambda: HOST,
        transport=object(),
        site=SimpleNamespace(
            _parsePOSTFormSubmission=False, timeouts=Timeouts(), router=Router(Handler())
        ),
    )


def test_it_has_whatever_twisted_sets() -> None:
    """Every attribute of Twisted's own request is there; without fields, with the same value."""
    end = channel()
    eager, lazy = server.Request(end), Request(end, parse_request_head(b"GET / HTTP/1.0"))
    assert len(vars(eager)) > 8
    for name, value in vars(eager).items():
        assert getattr(lazy, name) == value, name


def test_its_tables_are_its_own() -> None:
    """What is made when it is asked for stays, and belongs to one request."""
    first, second = Request(channel(), HEAD), Request(channel(), HEAD)
    first.responseHeaders.addRawHeader(b"a", b"1")
    first.cookies.append(b"c")
    assert first.responseHeaders.getRawHeaders(b"a") == [b"1"]
    assert first.cookies == [b"c"]
    assert not second.responseHeaders.hasHeader(b"a")
    assert not second.cookies


def test_it_shows_its_fields_as_twisted_does() -> None:
    """A resource of Twisted's finds the client's fields where it looks for them."""
    request = Request(channel(), HEAD)
    assert request.requestHeaders.getRawHeaders(b"X-A") == [b"1", b"2"]
    assert request.getHeader(b"host") == b"h"


def test_it_is_adaptable() -> None:
    """Components, such as a session's, can be kept on it."""
    request = Request(channel(), HEAD)
    marker = object()
    request.setComponent(int, marker)
    assert request.getComponent(int) is marker
