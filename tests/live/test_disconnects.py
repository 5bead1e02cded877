"""A client that leaves, in whatever phase, ends the provider's work at once (design 6)."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from tests.support.daemon import Daemon, provider_config
from tests.support.sockets import WAIT, Provider, Wire, chunked, connect, request
from tests.support.stage import (
    SSE,
    Link,
    Notes,
    Stage,
    Turn,
    assert_settles,
    event,
    is_silent,
    open_stage,
    post,
    trace_of,
    until,
)

MANY = 200


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory, link: Link) -> Iterator[Stage]:
    """One route."""
    folder = tmp_path_factory.mktemp("gone")
    with open_stage(
        folder, lambda url: provider_config(url, provider=link.keys), link=link
    ) as stage:
        yield stage


def leave(client: Wire, how: str) -> None:
    """Leave by a FIN, by a half close, or by a reset."""
    if how == "reset":
        client.reset()
    elif how == "half":
        client.sock.shutdown(socket.SHUT_WR)
    else:
        client.sock.close()


def assert_gone(stage: Stage, path: str, *, status: int | None) -> None:
    """Check the record of a client that left, and that nothing is left of it."""
    record = trace_of(stage.daemon, path=path)
    assert (record["end_reason"], record["is_complete"]) == ("client_gone", False)
    assert record["status"] == status
    assert_settles(stage.daemon)


@pytest.mark.parametrize("how", ["fin", "half", "reset"])
def test_a_client_leaves_while_the_head_is_waited_for(stage: Stage, how: str) -> None:
    """The provider sees the end before it has answered a byte."""
    asked, ended = Turn(), Notes()

    def script(wire: Wire) -> None:
        wire.read_request()
        asked.give()
        ended.put(wire.wait_closed())

    stage.script = script
    with stage.connect() as client:
        client.send(post(f"/p/head/{how}"))
        asked.take()
        leave(client, how)
        ended.read()
    assert_gone(stage, f"/p/head/{how}", status=None)


@pytest.mark.parametrize("how", ["fin", "half", "reset"])
def test_a_client_leaves_in_the_middle_of_a_stream(stage: Stage, how: str) -> None:
    """The provider sees the end while it is silent; a half-closed client counts as gone."""
    ended = Notes()

    def script(wire: Wire) -> None:
        wire.read_request()
        wire.send(SSE, chunked(event(0)))
        ended.put(wire.wait_closed())

    stage.script = script
    with stage.connect() as client:
        client.send(post(f"/p/stream/{how}"))
        client.read_head()
        assert client.read_chunk() == event(0)
        leave(client, how)
        ended.read()
    assert_gone(stage, f"/p/stream/{how}", status=200)


def test_a_client_leaves_while_a_counted_response_is_pending(stage: Stage) -> None:
    """A non-streaming response whose body is not there yet."""
    ended = Notes()

    def script(wire: Wire) -> None:
        wire.read_request()
        wire.send(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 9\r\n\r\n")
        ended.put(wire.wait_closed())

    stage.script = script
    with stage.connect() as client:
        client.send(post("/p/pending", b'{"model":"m"}'))
        client.read_head()
    ended.read()
    assert_gone(stage, "/p/pending", status=200)


def test_a_client_leaves_while_it_holds_the_stream_up(stage: Stage) -> None:
    """A paused provider is let go of as well."""
    ended = Notes()

    def script(wire: Wire) -> None:
        wire.read_request()
        wire.send(SSE)
        try:
            while True:
                wire.send(chunked(b"x" * 50_000))
        except OSError:
            ended.put("cut")
            raise

    stage.script = script
    with stage.connect(receive_buffer=4096) as client:
        client.send(post("/p/paused"))
        client.read_head()
        until(lambda: stage.daemon.metrics()["llmproxy_paused_streams"] == 1, "it is paused")
    assert ended.read() == "cut"
    assert_gone(stage, "/p/paused", status=200)


def test_a_client_leaves_while_its_body_is_sent_upwards(stage: Stage) -> None:
    """The provider does not take the body, which is held here; its connection ends all the same."""
    asked, ended, gone = Turn(), Notes(), threading.Event()

    def script(wire: Wire) -> None:
        wire.read_until(b"\r\n\r\n")
        asked.give()
        gone.wait(2 * WAIT)
        ended.put(wire.wait_closed())

    stage.script = script
    with stage.connect() as client:
        client.send(post("/p/upwards", b'"' + b"x" * 20_000_000 + b'"'))
        asked.take()
    try:
        trace_of(stage.daemon, path="/p/upwards")
    finally:
        gone.set()
    ended.read()
    assert_gone(stage, "/p/upwards", status=None)


def test_a_client_leaves_in_the_middle_of_an_upload_that_nobody_takes(stage: Stage) -> None:
    """A body that streams is not read while the provider is full; its sender is still watched.

    By a reset: a FIN stands behind the bytes that nobody takes, and has not been sent.
    """
    asked, ended, gone = Turn(), Notes(), threading.Event()

    def script(wire: Wire) -> None:
        wire.read_until(b"\r\n\r\n")
        asked.give()
        gone.wait(2 * WAIT)
        ended.put(wire.wait_closed())

    stage.script = script
    path = "/p/upload/reset"
    kind = "Content-Type: application/octet-stream"
    with stage.connect() as client:
        client.send(request("POST", path, kind, "Content-Length: 30000000"))
        asked.take()
        client.sock.settimeout(0.5)
        with suppress(TimeoutError):
            client.send(bytes(29_000_000))
        leave(client, "reset")
        try:
            trace_of(stage.daemon, path=path)
        finally:
            gone.set()
    ended.read()
    assert_gone(stage, path, status=None)


def test_a_client_that_pipelines_a_lot_is_still_seen_to_leave(stage: Stage) -> None:
    """Bytes behind a running request must not hide the end that follows them."""
    ended = Notes()

    def script(wire: Wire) -> None:
        wire.read_request()
        wire.send(SSE, chunked(event(0)))
        ended.put(wire.wait_closed())

    stage.script = script
    with stage.connect() as client:
        client.send(post("/p/pipelined"))
        client.read_head()
        assert client.read_chunk() == event(0)
        client.send(request("POST", "/p/next", body=b"x" * 60_000))
        client.sock.close()
        ended.read()
    record = trace_of(stage.daemon, path="/p/pipelined")
    assert record["end_reason"] in ("client_gone", "rejected")
    assert_settles(stage.daemon)


def test_a_client_leaves_while_the_handshake_hangs(tmp_path: Path) -> None:
    """The connection that is just being made is given up."""
    connected, ended = Turn(), Notes()

    def script(wire: Wire) -> None:
        wire.receive()
        connected.give()
        ended.put(wire.wait_closed())

    with Provider(script) as provider:
        url = f"https://localhost:{provider.port}"
        with Daemon(tmp_path, provider_config(url)) as daemon:
            with connect(daemon.port) as client:
                client.send(post("/p/x"))
                connected.take()
            ended.read()
            record = trace_of(daemon, path="/p/x")
            assert (record["end_reason"], record["status"]) == ("client_gone", None)
            assert_settles(daemon)


def test_two_hundred_clients_vanish_in_the_middle_of_their_streams(stage: Stage) -> None:
    """Every provider connection ends within a moment, none leaks, every gauge is zero again."""
    ended = Notes()

    def script(wire: Wire) -> None:
        wire.read_request()
        wire.send(SSE, chunked(event(0)))
        ended.put(wire.wait_closed())

    stage.script = script
    before = stage.daemon.metrics()
    clients = [stage.connect() for _ in range(MANY)]
    for client in clients:
        client.send(post("/p/many"))
    for client in clients:
        client.read_head()
        assert client.read_chunk() == event(0)
    busy = stage.daemon.metrics()
    assert busy["llmproxy_active_streams"] == MANY
    assert busy["llmproxy_client_connections"] == MANY
    assert busy['llmproxy_upstream_connections{provider="p",state="active"}'] == MANY
    assert all(is_silent(client) for client in clients)
    for client in clients:
        client.sock.close()
    until(lambda: ended.qsize() == MANY, "every provider saw the end", seconds=5)
    assert_settles(stage.daemon, seconds=5)
    after = stage.daemon.metrics()
    gone = 'llmproxy_ended_total{reason="client_gone"}'
    assert after[gone] - before.get(gone, 0) == MANY
    assert after['llmproxy_upstream_connections{provider="p",state="idle"}'] == 0
