"""A request of ours, which is made lazily, has all attributes of Twisted's own request."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from twisted.internet.address import IPv4Address
from twisted.web import http, server

from llmproxy.config import Timeouts
from llmproxy.http1.grammar import parse_request_head
from llmproxy.server.handler import NOT_DONE_YET, Handler, Router
from llmproxy.server.request import Request

PEER, HOST = IPv4Address("TCP", "192.0.2.1", 1), IPv4Address("TCP", "192.0.2.2", 2)
HEAD = parse_request_head(b"GET /x?y HTTP/1.1\r\nHost: h\r\nX-A: 1\r\nX-A: 2")


def channel() -> Any:
    """Return the attributes of a channel that both kinds of request use."""
    return SimpleNamespace(
        peer=PEER,
        getPeer=lambda: PEER,
        getHost=lambda: HOST,
        transport=object(),
        inside=None,
        site=SimpleNamespace(
            _parsePOSTFormSubmission=False, timeouts=Timeouts(), router=Router(Handler())
        ),
    )


def test_a_request_has_all_that_twisted_sets() -> None:
    """Without fields, each attribute has the same value as in Twisted's request."""
    end = channel()
    eager = http.Request(end, parsePOSTFormSubmission=False)
    lazy = Request(end, parse_request_head(b"GET / HTTP/1.0"))
    assert len(vars(eager)) > 8
    for name, value in vars(eager).items():
        assert getattr(lazy, name) == value, name


def test_the_tables_of_a_request_are_its_own() -> None:
    """A table that is made on first use stays, and belongs to one request."""
    first, second = Request(channel(), HEAD), Request(channel(), HEAD)
    first.responseHeaders.addRawHeader(b"a", b"1")
    first.cookies.append(b"c")
    assert first.responseHeaders.getRawHeaders(b"a") == [b"1"]
    assert first.cookies == [b"c"]
    assert not second.responseHeaders.hasHeader(b"a")
    assert not second.cookies


def test_fields_are_shown_as_twisted_shows_them() -> None:
    """A resource of Twisted's finds the client's fields in the usual places."""
    request = Request(channel(), HEAD)
    assert request.requestHeaders.getRawHeaders(b"X-A") == [b"1", b"2"]
    assert request.getHeader(b"host") == b"h"


def test_a_handler_returns_what_a_resource_of_twisteds_would() -> None:
    """Our constant is that of ``twisted.web.server``."""
    assert NOT_DONE_YET is server.NOT_DONE_YET
