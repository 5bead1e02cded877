"""Server-sent events, NDJSON and JSON pass through as they come (design 1, S3)."""

from __future__ import annotations

import pytest

from tests.support.live_proxy import (
    LiveProxy,
    chunked_response,
    live_fixture,
    post,
    read_stepwise,
    response,
)
from tests.support.scripts import SSE
from tests.support.sockets import request

PIECES = {
    "text/event-stream; charset=utf-8": [b"event: a\ndata: {}\n\n", b": ping\r\n\r\n", b"data: 2"],
    "application/x-ndjson": [b'{"response":"a"}\n', b'{"response":"b"}\n{"done"', b":true}\n"],
    "application/json": [b'{"choices":', b"[", b"]}"],
}
TYPES = list(PIECES)

live = live_fixture(both_links=True)


@pytest.mark.parametrize("kind", TYPES)
def test_head_and_each_piece_arrive_before_the_next_is_sent(live: LiveProxy, kind: str) -> None:
    """The proxy forwards each piece at once and unchanged, whatever the type."""
    turn = live.stream(*PIECES[kind], head=SSE.replace(b"text/event-stream", kind.encode()))
    with live.connect() as client:
        client.send(post("/p/x"))
        _, fields = client.read_head()
        assert dict(fields)[b"content-type"] == kind.encode()
        read_stepwise(client, turn, *PIECES[kind], b"")


@pytest.mark.parametrize("kind", TYPES[:2])
def test_a_stream_tells_every_hop_not_to_buffer(live: LiveProxy, kind: str) -> None:
    """Both headers are there once, whether the provider sent none or others."""
    for fields in ("", "X-Accel-Buffering: yes\r\nCache-Control: private\r\ncache-control: x\r\n"):
        raw = chunked_response(b"data: 1\n\n", kind=kind).replace(
            b"Connection:", fields.encode() + b"Connection:"
        )
        _, got = live.ask(post("/p/x"), raw)
        assert got.values(b"x-accel-buffering") == [b"no"]
        assert got.values(b"cache-control") == [b"no-cache, no-transform"]


def test_a_response_that_is_no_stream_keeps_the_providers_own_caching(live: LiveProxy) -> None:
    """JSON gets no anti-buffering header, and loses none of its own."""
    _, got = live.ask(post("/p/x"), response(200, "Content-Type: application/json", body=b"{}"))
    assert got.values(b"x-accel-buffering") == []
    assert got.values(b"cache-control") == []
    fields = ("Content-Type: application/json", "Cache-Control: max-age=3", "X-Accel-Buffering: q")
    _, got = live.ask(post("/p/x"), response(200, *fields, body=b"{}"))
    assert got.values(b"x-accel-buffering") == [b"q"]
    assert got.values(b"cache-control") == [b"max-age=3"]


def test_a_length_is_kept_where_the_provider_gave_one(live: LiveProxy) -> None:
    """A counted body stays counted, a chunked one chunked."""
    _, got = live.ask(request("GET", "/p/x"), response(200, body=b"12345"))
    assert got.values(b"content-length") == [b"5"]
    assert got.values(b"transfer-encoding") == []
    _, got = live.ask(request("GET", "/p/x"), chunked_response(b"123", b"45"))
    assert got.values(b"content-length") == []
    assert got.values(b"transfer-encoding") == [b"chunked"]
    assert got.body == b"12345"
