"""Responses that break, or are not HTTP, are never taken for whole (design 6 and 7)."""

from __future__ import annotations

from contextlib import suppress

import pytest

from tests.support.live_proxy import LiveProxy, assert_settles, live_fixture
from tests.support.scripts import LAST, SSE, Notes, event
from tests.support.sockets import Wire, chunked, request

live = live_fixture(both_links=True)


NOT_HTTP = {
    "nonsense": b"nonsense\r\n\r\n",
    "control": b"HTTP/1.1 200 OK\r\nX-A: a\0b\r\n\r\n",
    "two lengths": b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nxx",
    "both": b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "switch": b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\n\r\n",
    "endless head": b"HTTP/1.1 200 OK\r\n" + b"X-Long: %b\r\n" % (b"x" * 1000) * 100 + b"\r\n",
    "endless interim": b"HTTP/1.1 103 Early Hints\r\n\r\n" * 100,
}


@pytest.mark.parametrize("case", NOT_HTTP)
def test_a_response_that_is_not_http_is_a_502(live: LiveProxy, case: str) -> None:
    """upstream_protocol: the provider may have done the work; its connection is closed."""
    ended = Notes()

    def script(wire: Wire) -> None:
        wire.read_request()
        with suppress(OSError):  # it may be cut off before it has sent everything
            wire.send(NOT_HTTP[case])
        ended.put(wire.wait_closed())

    live.script = script
    got = live.get(request("GET", "/p/x"))
    assert (got.status, got.error) == (502, "upstream_protocol")
    assert got.values(b"x-should-retry") == [b"false"]
    ended.read()
    assert live.trace(got)["end_reason"] == "upstream_protocol"
    assert_settles(live.daemon)


@pytest.mark.parametrize(
    "rest", [b"zz\r\n", b"5\r\nabcdefgh\r\n", b"-1\r\n", b"1;" + b"x" * 5000, b"0\r\nbad\r\n\r\n"]
)
def test_a_body_whose_framing_breaks_has_no_proper_end(live: LiveProxy, rest: bytes) -> None:
    """The content before the fault arrives, and no last chunk."""
    live.hold(SSE, chunked(event(0)), rest)
    path = f"/p/framing/{rest[:12].hex()}"
    with live.begin(path) as client:
        client.wait_closed()
        content = client.buffer
        assert content.startswith(chunked(event(0))[:-2]) or event(0) in content
        assert not content.endswith(LAST)
    live.assert_ended(path, "upstream_protocol")
