"""A request of Twisted's that is made lazily has all that an eager one has."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from twisted.internet.address import IPv4Address
from twisted.web import server

from llmproxy.server.lazy import LazyRequest

PEER, HOST = IPv4Address("TCP", "192.0.2.1", 1), IPv4Address("TCP", "192.0.2.2", 2)


def channel() -> Any:
    """Return what both kinds of request ask of a channel."""
    return SimpleNamespace(
        peer=PEER,
        getPeer=lambda: PEER,
        getHost=lambda: HOST,
        transport=object(),
        site=SimpleNamespace(_parsePOSTFormSubmission=False),
    )


def test_it_has_whatever_twisted_sets() -> None:
    """Every attribute of Twisted's own request is there, with the same value."""
    end = channel()
    eager, lazy = server.Request(end), LazyRequest(end)
    assert len(vars(eager)) > 8
    for name, value in vars(eager).items():
        assert getattr(lazy, name) == value, name


def test_its_tables_are_its_own() -> None:
    """What is made when it is asked for stays, and belongs to one request."""
    first, second = LazyRequest(channel()), LazyRequest(channel())
    first.responseHeaders.addRawHeader(b"a", b"1")
    first.cookies.append(b"c")
    assert first.responseHeaders.getRawHeaders(b"a") == [b"1"]
    assert first.cookies == [b"c"]
    assert not second.responseHeaders.hasHeader(b"a")
    assert not second.cookies


def test_it_shows_its_fields_as_twisted_does() -> None:
    """A resource of Twisted's finds the client's fields where it looks for them."""
    request = LazyRequest(channel())
    request.fields = [(b"x-a", b"1"), (b"x-a", b"2"), (b"host", b"h")]
    assert request.requestHeaders.getRawHeaders(b"X-A") == [b"1", b"2"]
    assert request.getHeader(b"host") == b"h"


def test_it_is_adaptable() -> None:
    """Components, such as a session's, can be kept on it."""
    request = LazyRequest(channel())
    marker = object()
    request.setComponent(int, marker)
    assert request.getComponent(int) is marker
