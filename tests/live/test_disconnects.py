"""A client that leaves, in whatever phase, ends the provider's work at once (design 6)."""

from __future__ import annotations

import socket
import threading
from contextlib import suppress
from pathlib import Path

import pytest

from tests.support.daemon import Daemon, provider_config
from tests.support.live_proxy import (
    LiveProxy,
    assert_settles,
    is_silent,
    live_fixture,
    post,
    trace_of,
    until,
)
from tests.support.scripts import SSE, Notes, Turn, event
from tests.support.sockets import WAIT, Provider, Wire, chunked, connect, request

MANY = 200

live = live_fixture(both_links=True)


def leave(client: Wire, how: str) -> None:
    """Leave by a FIN, by a half close, or by a reset."""
    if how == "reset":
        client.reset()
    elif how == "half":
        client.sock.shutdown(socket.SHUT_WR)
    else:
        client.sock.close()


@pytest.mark.parametrize("how", ["fin", "half", "reset"])
def test_a_client_leaves_while_the_head_is_waited_for(live: LiveProxy, how: str) -> None:
    """The provider sees the end before it has sent a byte."""
    asked, ended = Turn(), Notes()

    def script(wire: Wire) -> None:
        wire.read_request()
        asked.give()
        ended.put(wire.wait_closed())

    live.script = script
    with live.connect() as client:
        client.send(post(f"/p/head/{how}"))
        asked.take()
        leave(client, how)
        ended.read()
    live.assert_ended(f"/p/head/{how}", "client_gone", None)


@pytest.mark.parametrize("how", ["fin", "half", "reset"])
def test_a_client_leaves_in_the_middle_of_a_stream(live: LiveProxy, how: str) -> None:
    """The provider sees the end while it is silent; a half-closed client counts as gone."""
    ended = live.hold(SSE, chunked(event(0)))
    with live.begin(f"/p/stream/{how}") as client:
        assert client.read_chunk() == event(0)
        leave(client, how)
        ended.read()
    live.assert_ended(f"/p/stream/{how}", "client_gone")


@pytest.mark.parametrize("body", ["held", "streamed"])
def test_a_client_leaves_while_the_provider_does_not_take_its_body(
    live: LiveProxy, body: str
) -> None:
    """The connection to the provider ends, wherever the body waits.

    A held body is whole in the proxy. A streamed body is not read any more while the provider is
    full, but its sender is still watched; it leaves by a reset, as a FIN stands behind the bytes
    that nobody takes.
    """
    asked, ended, gone = Turn(), Notes(), threading.Event()

    def script(wire: Wire) -> None:
        wire.read_until(b"\r\n\r\n")
        asked.give()
        gone.wait(2 * WAIT)
        ended.put(wire.wait_closed())

    live.script = script
    path = f"/p/body/{body}"
    with live.connect() as client:
        if body == "held":
            client.send(post(path, b'"' + b"x" * 20_000_000 + b'"'))
            asked.take()
            leave(client, "fin")
        else:
            kind = "Content-Type: application/octet-stream"
            client.send(request("POST", path, kind, "Content-Length: 30000000"))
            asked.take()
            client.sock.settimeout(0.5)
            with suppress(TimeoutError):
                client.send(bytes(29_000_000))
            leave(client, "reset")
    try:
        trace_of(live.daemon, path=path)
    finally:
        gone.set()
    ended.read()
    live.assert_ended(path, "client_gone", None)


def test_a_client_that_pipelines_a_lot_is_still_seen_to_leave(live: LiveProxy) -> None:
    """Bytes behind a running request do not hide the end that follows them."""
    ended = live.hold(SSE, chunked(event(0)))
    with live.begin("/p/pipelined") as client:
        assert client.read_chunk() == event(0)
        client.send(request("POST", "/p/next", body=b"x" * 60_000))
        client.sock.close()
        ended.read()
    record = trace_of(live.daemon, path="/p/pipelined")
    assert record["end_reason"] in ("client_gone", "rejected")
    assert_settles(live.daemon)


def test_a_client_leaves_while_the_handshake_hangs(tmp_path: Path) -> None:
    """The connection that is just being made is closed."""
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


def test_two_hundred_clients_vanish_in_the_middle_of_their_streams(live: LiveProxy) -> None:
    """Every connection to the provider ends within a moment, and every gauge is zero again."""
    ended = live.hold(SSE, chunked(event(0)))
    before = live.daemon.metrics()
    clients = [live.connect() for _ in range(MANY)]
    for client in clients:
        client.send(post("/p/many"))
    for client in clients:
        client.read_head()
        assert client.read_chunk() == event(0)
    busy = live.daemon.metrics()
    assert busy["llmproxy_active_streams"] == MANY
    assert busy["llmproxy_client_connections"] == MANY
    assert busy['llmproxy_upstream_connections{provider="p",state="active"}'] == MANY
    assert all(is_silent(client) for client in clients)
    for client in clients:
        client.sock.close()
    until(lambda: ended.qsize() == MANY, "every provider saw the end", seconds=5)
    assert_settles(live.daemon, seconds=5)
    after = live.daemon.metrics()
    gone = 'llmproxy_ended_total{reason="client_gone"}'
    assert after[gone] - before.get(gone, 0) == MANY
    assert after['llmproxy_upstream_connections{provider="p",state="idle"}'] == 0
