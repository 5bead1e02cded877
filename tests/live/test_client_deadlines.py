"""Deadlines towards clients: slow requests, stalled readers, idle connections (design 4)."""

from __future__ import annotations

import threading
import time
from contextlib import suppress

import pytest

from tests.support.daemon import route_table
from tests.support.live_proxy import (
    ONE_ROUTE,
    LiveProxy,
    assert_settles,
    live_fixture,
    post,
    read_response,
    trace_of,
    until,
)
from tests.support.scripts import LAST, SSE
from tests.support.sockets import Wire, chunked, request

PACE = threading.Event()
"""Never set: a wait for it is a pause."""

TIMEOUTS = """
[timeouts]
client_stall = "600ms"
request_head = "400ms"
request_body = "400ms"
client_idle = "500ms"
"""
IMPATIENT_ROUTE = route_table("/stall", "p", 'timeouts = { client_stall = "500ms" }')

live = live_fixture(ONE_ROUTE + TIMEOUTS)
patient = live_fixture(ONE_ROUTE + IMPATIENT_ROUTE)


def test_a_route_may_be_less_patient(patient: LiveProxy) -> None:
    """The route's own client_stall counts, and not that of the whole proxy."""
    ended = patient.flood()
    with patient.begin("/stall/x", receive_buffer=4096):
        assert ended.read() == "cut"
        patient.assert_ended("/stall/x", "client_stalled")


def test_a_client_that_never_takes_the_rest_of_a_body_is_cut(live: LiveProxy) -> None:
    """The body has ended here, and the bytes that the kernel does not take are dropped."""
    filled = threading.Event()

    def script(wire: Wire) -> None:
        wire.read_request()
        wire.send(SSE)
        while not filled.wait(0.01):
            wire.send(chunked(b"x" * 300_000))
        wire.send(LAST)

    live.script = script
    with live.begin("/p/rest", receive_buffer=4096):
        until(lambda: live.gauge("buffered_bytes") > 20_000, "the kernel takes no more")
        filled.set()
        assert_settles(live.daemon)
    trace_of(live.daemon, path="/p/rest")


@pytest.mark.parametrize("framing", ["Content-Length: 100000", "Transfer-Encoding: chunked"])
def test_a_body_that_comes_byte_by_byte_is_cut(live: LiveProxy, framing: str) -> None:
    """408 as JSON, in the route's shape, and the end of the connection."""
    with live.connect() as client:
        client.send(request("POST", "/p/slow-body", framing))
        began = time.monotonic()
        with suppress(ConnectionError):
            while not client.buffer:
                client.send(b"x" if "Length" in framing else chunked(b"x"))
                client.sock.settimeout(0.03)
                with suppress(TimeoutError):
                    client.receive()
                assert time.monotonic() - began < 10, "the body was waited for"
        client.sock.settimeout(20)
        got = read_response(client)
        assert (got.status, got.error) == (408, "slow_request")
        assert got.json()["error"]["code"] == "slow_request"
        assert live.trace(got)["end_reason"] == "rejected"
        client.wait_closed()
    assert_settles(live.daemon)


def test_a_large_body_is_given_more_time(live: LiveProxy) -> None:
    """Each 64 KiB that came adds one second: a steady upload outlives request_body."""
    live.reply(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
    with live.connect() as client:
        client.send(request("POST", "/p/x", "Content-Length: 300000"))
        for _ in range(10):
            client.send(b"x" * 30_000)
            PACE.wait(0.08)
        assert read_response(client).status == 200


def test_an_idle_connection_is_closed(live: LiveProxy) -> None:
    """The proxy closes it without a word after a response; test_many_connections has new ones."""
    with live.connect() as client:
        client.send(request("GET", "/nowhere"))
        assert read_response(client).status == 404
        began = time.monotonic()
        assert client.wait_closed() == "fin"
        assert client.buffer == b""
        assert 0.3 < time.monotonic() - began < 10


def test_a_long_response_is_no_idle_connection(live: LiveProxy) -> None:
    """No deadline of the client runs while it waits, or while a quiet stream is served."""

    def script(wire: Wire) -> None:
        wire.read_request()
        PACE.wait(1.2)
        wire.send(SSE)
        PACE.wait(1.2)
        wire.send(chunked(b"data: 1\n\n"), LAST)

    live.script = script
    assert live.get(post("/p/x")).body == b"data: 1\n\n"
