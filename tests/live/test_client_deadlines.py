"""Deadlines towards clients: slow requests, stalled readers, idle connections (design 4)."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import suppress

import pytest

from tests.support.daemon import provider_config
from tests.support.sockets import Wire, chunked, request
from tests.support.stage import (
    LAST,
    SSE,
    Notes,
    Stage,
    assert_settles,
    open_stage,
    post,
    read_got,
    trace_of,
    until,
)

PACE = threading.Event()
"""Never set: a wait for it is a pause."""

TIMEOUTS = """
[timeouts]
client_stall = "600ms"
request_head = "400ms"
request_body = "400ms"
client_idle = "500ms"
"""
PATIENT = """
[[routes]]
path = "/stall"
providers = ["p"]
timeouts = { client_stall = "500ms" }
"""


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    """Short deadlines for every client."""
    folder = tmp_path_factory.mktemp("clients")
    with open_stage(folder, lambda url: provider_config(url) + TIMEOUTS) as stage:
        yield stage


@pytest.fixture(scope="module")
def patient(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    """The default deadlines, and a route with its own."""
    folder = tmp_path_factory.mktemp("patient")
    with open_stage(folder, lambda url: provider_config(url) + PATIENT) as stage:
        yield stage


def endless(stage: Stage) -> Notes:
    """Let the provider send without end; the note comes when it is cut off."""
    ended = Notes()

    def script(wire: Wire) -> None:
        wire.read_request()
        try:
            wire.send(SSE)
            while True:
                wire.send(chunked(b"x" * 300_000))
        except OSError:
            ended.put("cut")
            raise

    stage.script = script
    return ended


def assert_stalled(stage: Stage, path: str) -> None:
    """Check the record of a client that was cut, and that nothing is left of it."""
    record = trace_of(stage.daemon, path=path)
    assert (record["end_reason"], record["is_complete"]) == ("client_stalled", False)
    assert_settles(stage.daemon)


def test_a_client_that_takes_nothing_is_cut(stage: Stage) -> None:
    """client_stalled, and the provider is let go of."""
    ended = endless(stage)
    with stage.connect(receive_buffer=4096) as client:
        client.send(post("/p/stalled"))
        client.read_head()
        assert ended.read() == "cut"
        assert_stalled(stage, "/p/stalled")


def test_a_route_may_be_less_patient(patient: Stage) -> None:
    """Its own client_stall counts, and not that of the whole proxy."""
    ended = endless(patient)
    with patient.connect(receive_buffer=4096) as client:
        client.send(post("/stall/x"))
        client.read_head()
        assert ended.read() == "cut"
        assert_stalled(patient, "/stall/x")


def test_what_a_slow_stream_adds_is_not_what_the_client_took(stage: Stage) -> None:
    """A client that takes nothing is cut, however slowly its queue still grows."""
    ended, filled = Notes(), threading.Event()

    def script(wire: Wire) -> None:
        wire.read_request()
        wire.send(SSE)
        try:
            while not filled.is_set():
                wire.send(chunked(b"x" * 300_000))
                filled.wait(0.01)
            while True:
                wire.send(chunked(b"y"))
                PACE.wait(0.05)
        except OSError:
            ended.put("cut")
            raise

    stage.script = script
    with stage.connect(receive_buffer=4096) as client:
        client.send(post("/p/growing"))
        client.read_head()
        full = "the kernel takes no more"
        until(lambda: stage.daemon.metrics()["llmproxy_buffered_bytes"] > 30_000, full)
        filled.set()
        began = time.monotonic()
        assert ended.read() == "cut"
        assert time.monotonic() - began < 10
        assert_stalled(stage, "/p/growing")


def test_a_client_that_never_takes_the_rest_of_a_body_is_cut(stage: Stage) -> None:
    """The body has ended here, and what the kernel does not take is not kept for ever."""
    filled = threading.Event()

    def script(wire: Wire) -> None:
        wire.read_request()
        wire.send(SSE)
        while not filled.wait(0.01):
            wire.send(chunked(b"x" * 300_000))
        wire.send(LAST)

    stage.script = script
    with stage.connect(receive_buffer=4096) as client:
        client.send(post("/p/rest"))
        client.read_head()
        full = "the kernel takes no more"
        until(lambda: stage.daemon.metrics()["llmproxy_buffered_bytes"] > 20_000, full)
        filled.set()
        assert_settles(stage.daemon)
    trace_of(stage.daemon, path="/p/rest")


def test_an_http_1_0_client_that_takes_nothing_behind_a_break_is_cut(stage: Stage) -> None:
    """The reset waits for what the kernel holds, but not for a client that does not take it."""

    def script(wire: Wire) -> None:
        wire.read_request()
        wire.send(SSE, chunked(b"x" * 100_000))

    stage.script = script
    with stage.connect(receive_buffer=4096) as client:
        client.send(post("/p/broken", version="1.0"))
        client.read_head()
        assert trace_of(stage.daemon, path="/p/broken")["end_reason"] == "upstream_broken"
        assert_settles(stage.daemon)


def test_a_client_that_takes_a_little_is_not_cut(stage: Stage) -> None:
    """Slow is not stalled: who takes bytes all the time gets the whole body."""
    size = 12_000_000

    def script(wire: Wire) -> None:
        wire.read_request()
        wire.send(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\nConnection: close\r\n\r\n" % size)
        wire.send(b"x" * size)

    stage.script = script
    with stage.connect(receive_buffer=65536) as client:
        client.send(post("/p/slow"))
        client.read_head()
        taken = 0
        until(lambda: stage.daemon.metrics()["llmproxy_paused_streams"] == 1, "it is paused")
        deadline = time.monotonic() + 2.5
        while time.monotonic() < deadline:
            taken += len(client.read(16_384))
            PACE.wait(0.05)
        assert len(client.read(size - taken)) == size - taken
    assert trace_of(stage.daemon, path="/p/slow")["end_reason"] == "complete"


def test_a_head_that_comes_byte_by_byte_is_cut(stage: Stage) -> None:
    """The deadline is absolute: 408, and the end of the connection."""
    with stage.connect() as client:
        began = time.monotonic()
        with suppress(ConnectionError):
            for byte in request("GET", "/p/x", "X-Long: " + "x" * 1000):
                client.send(bytes([byte]))
                PACE.wait(0.03)
                if time.monotonic() - began > 10:
                    pytest.fail("the head was waited for")
        got = read_got(client)
        assert got.status == 408
        assert got.values(b"x-llmproxy-error") == [b"slow_request"]
        client.wait_closed()
    assert_settles(stage.daemon)


@pytest.mark.parametrize("framing", ["Content-Length: 100000", "Transfer-Encoding: chunked"])
def test_a_body_that_comes_byte_by_byte_is_cut(stage: Stage, framing: str) -> None:
    """408 as JSON, in the route's shape, and the end of the connection."""
    with stage.connect() as client:
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
        got = read_got(client)
        assert got.status == 408
        assert got.values(b"x-llmproxy-error") == [b"slow_request"]
        assert got.json()["error"]["code"] == "slow_request"
        assert stage.trace(got)["end_reason"] == "rejected"
        client.wait_closed()
    assert_settles(stage.daemon)


def test_a_large_body_is_given_more_time(stage: Stage) -> None:
    """One second for each 64 KiB that came: a steady upload outlives request_body."""

    def script(wire: Wire) -> None:
        assert len(wire.read_request().body) == 300_000
        wire.send(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")

    stage.script = script
    with stage.connect() as client:
        client.send(request("POST", "/p/x", "Content-Length: 300000"))
        for _ in range(10):
            client.send(b"x" * 30_000)
            PACE.wait(0.08)
        assert read_got(client).status == 200


@pytest.mark.parametrize("served", [False, True])
def test_an_idle_connection_is_closed(stage: Stage, served: bool) -> None:
    """Silently, whether it never asked or was answered before."""
    with stage.connect() as client:
        if served:
            client.send(request("GET", "/nowhere"))
            assert read_got(client).status == 404
        began = time.monotonic()
        assert client.wait_closed() == "fin"
        assert client.buffer == b""
        assert 0.3 < time.monotonic() - began < 10


def test_a_long_response_is_no_idle_connection(stage: Stage) -> None:
    """No deadline of the client's runs while it waits, or while a quiet stream is served."""

    def script(wire: Wire) -> None:
        wire.read_request()
        PACE.wait(1.2)
        wire.send(SSE)
        PACE.wait(1.2)
        wire.send(chunked(b"data: 1\n\n"), LAST)

    stage.script = script
    assert stage.get(post("/p/x")).body == b"data: 1\n\n"
