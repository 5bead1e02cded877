"""Responses that are read on after their client has left, over real sockets (ADR-0024)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.live.test_disconnects import leave
from tests.support.daemon import Daemon, route_table
from tests.support.live_proxy import (
    ONE_ROUTE,
    Link,
    LiveProxy,
    assert_settles,
    begin,
    live_fixture,
    post,
    trace_of,
    until,
)
from tests.support.scripts import DONE, KEPT, LAST, SSE, Notes, PacedStream, Turn
from tests.support.sockets import WAIT, Script, Wire, chunked, connect
from tests.support.tls_proxy import open_tls_proxy

CHAT = "v1/chat/completions"
FIRST = b'data: {"choices":[{"delta":{"content":"a"}}],"usage":{"prompt_tokens":3}}\n\n'
COUNTS = b'data: {"choices":[],"usage":{"prompt_tokens":3,"completion_tokens":5}}\n\n'
WHOLE = json.dumps(
    {
        "choices": [{"finish_reason": "stop", "message": {"content": "a"}}],
        "usage": {"prompt_tokens": 3, "completion_tokens": 5},
    }
).encode()
READ_ON = 'on_disconnect = "drain"\n'
BRIEF = route_table("/brief", "p", READ_ON, 'drain_for = "400ms"')
COUNTED = ("client_gone", "drain", "reported", 3, 5)
PARTIAL = ("client_gone", "drain", "partial", 3, None)

live = live_fixture(ONE_ROUTE + READ_ON + BRIEF, both_links=True)


def begin_stream(daemon: Daemon, path: str) -> Wire:
    """Begin a stream, and read its first event."""
    client = begin(connect(daemon.port), path)
    assert client.read_chunk() == FIRST
    return client


def detached(daemon: Daemon) -> float:
    """Return how many responses are read on now."""
    return daemon.metrics()["llmproxy_drains"]


def assert_over(daemon: Daemon) -> None:
    """Check that nothing is left of any request."""
    assert_settles(daemon)
    assert detached(daemon) == 0


def outcome(record: dict[str, Any]) -> tuple[Any, ...]:
    """Return how a record says that the client left, and what the response cost."""
    names = ("end_reason", "on_disconnect", "usage", "input_tokens", "output_tokens")
    return tuple(record[name] for name in names)


@pytest.mark.parametrize("how", ["fin", "half", "reset"])
def test_a_stream_is_read_to_its_end(live: LiveProxy, how: str) -> None:
    """The provider sends all of it to nobody; the record has the counts that come last."""
    script = live.script = PacedStream(FIRST, COUNTS + DONE)
    path = f"/p/end/{how}/{CHAT}"
    with begin_stream(live.daemon, path) as client:
        leave(client, how)
        until(lambda: detached(live.daemon) == 1, "it is read on")
        script.turn.give()
        script.ended.read()
    record = trace_of(live.daemon, path=path)
    assert outcome(record) == COUNTED
    assert (record["is_complete"], record["error"]) == (False, None)
    assert record["bytes_out"] == len(FIRST)
    assert_over(live.daemon)


def test_a_stream_that_lasts_too_long_is_cancelled(live: LiveProxy) -> None:
    """After ``drain_for`` the provider's connection is closed, and the record keeps what came."""
    script = live.script = PacedStream(FIRST)
    path = f"/brief/{CHAT}"
    with begin_stream(live.daemon, path):
        pass
    script.ended.read()
    record = trace_of(live.daemon, path=path)
    assert outcome(record) == PARTIAL
    assert record["duration_s"] >= 0.4
    assert_over(live.daemon)


def test_a_whole_response_is_waited_for(live: LiveProxy) -> None:
    """A client leaves before there is a head; the connection to the provider is used again."""
    asked, turn, ended = Turn(), Turn(), Notes()

    def script(wire: Wire) -> None:
        wire.read_request()
        asked.give()
        turn.take()
        head = "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n"
        wire.send(head.format(len(WHOLE)).encode(), WHOLE)
        wire.read_request()
        ended.put("asked again")
        wire.send(KEPT)

    live.script = script
    path = f"/p/whole/{CHAT}"
    with live.connect() as client:
        client.send(post(path, b'{"model":"m"}'))
        asked.take()
    until(lambda: detached(live.daemon) == 1, "it is read on")
    turn.give()
    record = trace_of(live.daemon, path=path)
    assert outcome(record) == COUNTED
    assert (record["status"], record["bytes_out"], record["is_complete"]) == (None, 0, False)
    assert live.get(post("/p/other")).body == b"ok"
    assert ended.read() == "asked again"
    assert_over(live.daemon)


def flood(noted: Notes) -> Script:
    """Return a script that sends more than anybody holds, and then the counts."""

    def script(wire: Wire) -> None:
        wire.read_request()
        wire.send(SSE)
        for _ in range(400):
            wire.send(chunked(b": %b\n\n" % (b"x" * 50_000)))
        wire.send(chunked(COUNTS, DONE), LAST)
        noted.put("sent")
        wire.wait_closed()

    return script


def test_a_slow_client_that_leaves_lets_the_provider_go_on(live: LiveProxy) -> None:
    """A stream that was paused for its client is read again, all of it."""
    noted = Notes()
    live.script = flood(noted)
    path = f"/p/slow/{CHAT}"
    with live.begin(path, receive_buffer=4096):
        live.wait_paused()
    assert noted.read() == "sent"
    record = trace_of(live.daemon, path=path)
    assert outcome(record) == COUNTED
    assert record["paused_s"] > 0
    assert record["bytes_out"] < 20_000_000
    assert_over(live.daemon)


def test_many_at_once_leave_nothing_behind(live: LiveProxy) -> None:
    """A hundred are read on, which is the limit; each of the others is cancelled at once."""
    script = live.script = PacedStream(FIRST, COUNTS + DONE)
    before = len(live.daemon.traces())
    clients = [begin_stream(live.daemon, f"/p/many/{CHAT}") for _ in range(120)]
    for number, client in enumerate(clients, 1):
        client.sock.close()
        if number == 100:
            until(lambda: detached(live.daemon) == 100, "all of these are read on")
    until(lambda: len(live.daemon.traces()) == before + 20, "the others have ended")
    assert detached(live.daemon) == 100
    script.turn.give(120)
    until(lambda: len(live.daemon.traces()) == before + 120, "all have ended")
    records = [outcome(record) for record in live.daemon.traces()[before:]]
    cancelled = ("client_gone", "cancel", "partial", 3, None)
    assert records == [cancelled] * 20 + [COUNTED] * 100
    assert_over(live.daemon)


@pytest.mark.parametrize("signals", [1, 2])
def test_the_end_of_the_process_does_not_wait_for_it(
    tmp_path: Path, link: Link, signals: int
) -> None:
    """No client is connected: the provider's connection is closed, and the record is there."""
    script = PacedStream(FIRST)
    with (
        link.provider(script) as provider,
        Daemon(tmp_path, link.config(provider, route=READ_ON)) as daemon,
    ):
        with begin_stream(daemon, f"/p/{CHAT}"):
            pass
        until(lambda: detached(daemon) == 1, "it is read on")
        for _ in range(signals):
            daemon.terminate()
        script.ended.read()
        assert daemon.process.wait(WAIT) == 0
        (record,) = daemon.traces()
        assert outcome(record) == PARTIAL


@pytest.mark.parametrize("signals", [1, 2])
def test_a_process_that_waits_for_others_reads_on(tmp_path: Path, link: Link, signals: int) -> None:
    """While a client is served, a detached stream goes on to its counts.

    A second signal cuts both.
    """
    turns, ended = {b"left": Turn(), b"stays": Turn()}, Notes()

    def script(wire: Wire) -> None:
        who = wire.read_request().target.split(b"/")[1]
        wire.send(SSE, chunked(FIRST))
        turns[who].take()
        wire.send(chunked(COUNTS, DONE), LAST)
        ended.put(wire.wait_closed())

    with (
        link.provider(script) as provider,
        Daemon(tmp_path, link.config(provider, route=READ_ON)) as daemon,
        begin_stream(daemon, f"/p/stays/{CHAT}") as stays,
    ):
        with begin_stream(daemon, f"/p/left/{CHAT}"):
            pass
        until(lambda: detached(daemon) == 1, "it is read on")
        daemon.terminate()
        daemon.wait_log("draining")
        assert detached(daemon) == 1
        if signals == 1:
            turns[b"left"].give()
            left = trace_of(daemon, path=f"/p/left/{CHAT}")
            assert daemon.process.poll() is None
            turns[b"stays"].give()
            assert stays.read_chunks() == COUNTS + DONE
        else:
            daemon.terminate()
            stays.wait_closed()
            left = trace_of(daemon, path=f"/p/left/{CHAT}")
            for turn in turns.values():
                turn.give()
        assert daemon.process.wait(WAIT) == 0
        stayed = trace_of(daemon, path=f"/p/stays/{CHAT}")
    if signals == 1:
        assert outcome(left) == COUNTED
        assert outcome(stayed) == ("complete", None, "reported", 3, 5)
    else:
        assert outcome(left) == PARTIAL
        assert outcome(stayed) == ("drained", "cancel", "partial", 3, None)


def test_a_client_of_a_tls_listener_leaves(tmp_path: Path) -> None:
    """The same happens behind TLS, where the relay stood still for the client."""
    noted = Notes()
    with open_tls_proxy(tmp_path, more=route_table("/d", "p", READ_ON)) as live:
        live.script = flood(noted)
        with live.begin(f"/d/{CHAT}"):
            live.wait_paused()
        record = trace_of(live.daemon, path=f"/d/{CHAT}")
        assert outcome(record) == COUNTED
        assert_over(live.daemon)
