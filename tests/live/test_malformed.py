"""Requests that are not HTTP as it is served here are rejected with a reason (design 8)."""

from __future__ import annotations

import pytest

from tests.support.live_proxy import LiveProxy, live_fixture, read_response
from tests.support.sockets import request

LONG = "x" * 40_000

live = live_fixture()


def hosts(*values: str) -> bytes:
    """Return a GET with these Host lines alone."""
    lines = "".join(f"Host: {value}\r\n" for value in values)
    return f"GET /p/x HTTP/1.1\r\n{lines}\r\n".encode()


def post(*fields: str, version: str = "1.1") -> bytes:
    """Return the head of a POST."""
    return request("POST", "/p/x", *fields, version=version)


BROKEN = {
    "nonsense": (400, b"nonsense\r\n\r\n"),
    "spaced-name": (400, request("GET", "/p/x", "Spaced : x")),
    "two-types": (400, post("Content-Type: application/json", "Content-Type: text/plain")),
    "nul": (400, request("GET", "/p/x", "X-A: a\0b")),
    "two-lengths": (400, post("Content-Length: 1", "Content-Length: 2")),
    "length-and-coding": (400, post("Content-Length: 1", "Transfer-Encoding: chunked")),
    "bad-chunk": (400, post("Transfer-Encoding: chunked") + b"zz\r\n"),
    "chunked-in-1.0": (400, post("Transfer-Encoding: chunked", version="1.0")),
    "long-target": (414, request("GET", "/p/" + LONG)),
    "long-field": (431, request("GET", "/p/x", "X-Long: " + LONG)),
    "other-coding": (501, post("Transfer-Encoding: gzip, chunked")),
    "http-2": (505, request("GET", "/p/x", version="2.0")),
}
UNFIT = {
    "no-host": (400, hosts()),
    "two-hosts": (400, hosts("a", "b")),
    "no-path": (400, request("GET", "p/x")),
    "odd-expectation": (417, request("POST", "/p/x", "Expect: the-best", body=b"x")),
}


@pytest.mark.parametrize("case", [*BROKEN, *UNFIT])
def test_what_is_not_http_is_rejected_with_a_reason(live: LiveProxy, case: str) -> None:
    """A JSON error with a reason; where the framing is in doubt, the connection ends after it."""
    before = live.provider.accepted
    status, sent = (BROKEN | UNFIT)[case]
    with live.connect() as client:
        client.sock.settimeout(5)
        client.send(sent)
        got = read_response(client)
        assert got.status == status
        assert got.values(b"content-type") == [b"application/json"]
        assert len(got.values(b"x-llmproxy-error")) == 1
        assert got.json()["error"]["message"]
        if case in BROKEN:
            assert got.values(b"connection") == [b"close"]
            client.wait_closed()
            assert client.buffer == b""
    assert live.provider.accepted == before


def test_no_100_continue_is_sent_before_a_rejection(live: LiveProxy) -> None:
    """A client with an unknown key reads its 401 before it uploads anything."""
    with live.connect() as client:
        client.sock.settimeout(5)
        lines = ("Expect: 100-continue", "Content-Length: 1000", "x-api-key: wrong")
        client.send(request("POST", "/p/x", *lines))
        assert read_response(client).status == 401
