"""Deadlines towards providers: each phase has its own (design 4)."""

from __future__ import annotations

import threading

import pytest

from tests.support.daemon import provider_table, route_table
from tests.support.live_proxy import (
    ONE_ROUTE,
    LiveProxy,
    assert_settles,
    live_fixture,
    post,
    trace_of,
    until,
)
from tests.support.scripts import LAST, SSE, Notes, event
from tests.support.sockets import Wire, chunked

PACE = threading.Event()
"""Never set: a wait for it is a pause."""

DEADLINES = {
    "first": 'first_byte = "300ms"',
    "idle": 'idle = "300ms"',
    "idle-1s": 'idle = "1s"',
    "total": 'total = "500ms"',
}
SLOW = 'timeouts = { first_byte = "100s", idle = "300ms" }'

live = live_fixture(
    ONE_ROUTE
    + "".join(
        route_table(f"/{name}", "p", f"timeouts = {{ {keys} }}") for name, keys in DEADLINES.items()
    )
    + provider_table("slow", SLOW, "KEYS", dialect="anthropic")
    + route_table("/wins", "slow", 'timeouts = { first_byte = "300ms" }'),
    both_links=True,
)


@pytest.mark.parametrize("route", ["first", "wins"])
@pytest.mark.parametrize("sent", [b"", b"HTTP/1.1 200 OK\r\nX-Half: ", b"HTTP/1.1 102 P\r\n\r\n"])
def test_a_response_that_does_not_begin_is_a_504(live: LiveProxy, sent: bytes, route: str) -> None:
    """first_byte ends with the whole head; the 504 says not to retry, as the work may be done."""
    ended = live.hold(sent)
    got = live.get(post(f"/{route}/x"))
    assert (got.status, got.error) == (504, "upstream_timeout")
    assert got.values(b"x-should-retry") == [b"false"]
    ended.read()
    record = live.trace(got)
    assert record["end_reason"] == "upstream_timeout"
    assert [one["outcome"] for one in record["attempts"]] == ["upstream_timeout"]
    assert_settles(live.daemon)


@pytest.mark.parametrize("body", [b"", chunked(event(0))])
@pytest.mark.parametrize("route", ["idle", "wins"])
def test_silence_inside_a_body_breaks_it(live: LiveProxy, route: str, body: bytes) -> None:
    """upstream_idle: the content arrives, its end does not, and the provider is closed."""
    ended = live.hold(SSE, body)
    path = f"/{route}/silent{len(body)}"
    with live.begin(path) as client:
        client.wait_closed()
        assert client.buffer == body
    ended.read()
    assert live.assert_ended(path, "upstream_idle")["error"] == "upstream_idle"


def test_every_byte_winds_the_idle_clock_up(live: LiveProxy) -> None:
    """A stream lives longer than `idle` as long as something comes, be it a byte."""

    def script(wire: Wire) -> None:
        wire.read_request()
        wire.send(SSE)
        for _ in range(4):
            PACE.wait(0.4)
            wire.send(chunked(b":"))
        wire.send(LAST)

    live.script = script
    got = live.get(post("/idle-1s/x"))
    assert got.body == b"::::"
    assert live.trace(got)["end_reason"] == "complete"


def test_the_idle_clock_stands_still_while_the_client_is_slow(live: LiveProxy) -> None:
    """A client that pauses for longer than `idle` gets its whole body after that."""
    body = bytes(range(256)) * 4 * 6_000

    def script(wire: Wire) -> None:
        wire.read_request()
        wire.send(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\nConnection: close\r\n\r\n" % len(body))
        wire.send(body)

    live.script = script
    with live.begin("/idle/slow-client", receive_buffer=16384) as client:

        def paused() -> bool:
            return live.gauge("pause_seconds_total") > 1.0

        until(paused, "the stream is paused for longer than three times `idle`")
        assert live.gauge("paused_streams") == 1
        assert client.read(len(body)) == body
    record = trace_of(live.daemon, path="/idle/slow-client")
    assert record["end_reason"] == "complete"
    assert record["paused_s"] > 0.9


def test_total_ends_a_request_without_a_response(live: LiveProxy) -> None:
    """The client gets a 504 as long as it has nothing."""
    ended = live.hold()
    got = live.get(post("/total/x"))
    assert (got.status, got.error) == (504, "upstream_timeout")
    ended.read()
    assert live.trace(got)["end_reason"] == "upstream_timeout"


def test_total_ends_a_stream_that_does_not(live: LiveProxy) -> None:
    """The body breaks, however busy the stream is."""
    ended = Notes()

    def script(wire: Wire) -> None:
        wire.read_request()
        wire.send(SSE)
        try:
            for number in range(1000):
                wire.send(chunked(event(number)))
                PACE.wait(0.02)
        except OSError:
            ended.put("cut")
            raise

    live.script = script
    with live.begin("/total/busy") as client:
        client.wait_closed()
        assert client.buffer.startswith(chunked(event(0)))
        assert not client.buffer.endswith(LAST)
    assert ended.read() == "cut"
    record = trace_of(live.daemon, path="/total/busy")
    assert record["end_reason"] == "upstream_timeout"
    assert 0.4 < record["duration_s"] < 5
    assert_settles(live.daemon)
