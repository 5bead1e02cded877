"""Answers that are read on after their client has left, over real sockets (ADR-0024)."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.live.test_disconnects import leave
from tests.support.daemon import Daemon
from tests.support.sockets import WAIT, Wire, chunked, connect
from tests.support.stage import (
    DONE,
    LAST,
    SSE,
    Link,
    Notes,
    Stage,
    Turn,
    assert_settles,
    open_stage,
    post,
    read_got,
    trace_of,
    until,
)
from tests.support.tls_stand import standing

DRAINS = "llmproxy_drains"
CHAT = "v1/chat/completions"
FIRST = b'data: {"choices":[{"delta":{"content":"a"}}],"usage":{"prompt_tokens":3}}\n\n'
COUNTS = b'data: {"choices":[],"usage":{"prompt_tokens":3,"completion_tokens":5}}\n\n'
WHOLE = json.dumps(
    {
        "choices": [{"finish_reason": "stop", "message": {"content": "a"}}],
        "usage": {"prompt_tokens": 3, "completion_tokens": 5},
    }
).encode()
ROUTES = """
[[routes]]
path = "/brief"
providers = ["p"]
on_disconnect = "drain"
drain_for = "400ms"

[[routes]]
path = "/total"
providers = ["p"]
on_disconnect = "drain"
timeouts = { total = "400ms" }

[[routes]]
path = "/stall"
providers = ["p"]
on_disconnect = "drain"
timeouts = { client_stall = "400ms" }
"""


def config(url: str, link: Link, more: str = "") -> str:
    """Return a configuration of routes that drain."""
    return (
        f'[providers.p]\nurl = "{url}"\ndialect = "openai"\n{link.keys}\n'
        f'[[routes]]\npath = "/p"\nproviders = ["p"]\non_disconnect = "drain"\n{ROUTES}{more}'
    )


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory, link: Link) -> Iterator[Stage]:
    """Routes that drain, for as long as they may and for less."""
    folder = tmp_path_factory.mktemp("drains")
    with open_stage(folder, lambda url: config(url, link), link=link) as stage:
        yield stage


class Counting:
    """A script that begins a stream and ends it, counted, at a turn.

    Attributes:
        turn: lets it end.
        ended: how each connection ended, once the stream was sent or could not be.
    """

    def __init__(self, *, endless: bool = False) -> None:
        self.turn = Turn()
        self.ended = Notes()
        self._endless = endless

    def __call__(self, wire: Wire) -> None:
        """Play."""
        wire.read_request()
        wire.send(SSE, chunked(FIRST))
        if not self._endless:
            self.turn.take()
            wire.send(chunked(COUNTS, DONE), LAST)
        self.ended.put(wire.wait_closed())


def begin(daemon: Daemon, path: str) -> Wire:
    """Begin a stream, and read its first event."""
    client = connect(daemon.port)
    client.send(post(path))
    client.read_head()
    assert client.read_chunk() == FIRST
    return client


def drains(daemon: Daemon) -> float:
    """How many responses are read on now."""
    return daemon.metrics()[DRAINS]


def assert_over(daemon: Daemon) -> None:
    """Nothing is left of any request."""
    assert_settles(daemon)
    assert drains(daemon) == 0


def told(record: dict[str, Any]) -> tuple[Any, ...]:
    """Return what a record says of a client's leaving, and of what its response cost."""
    names = ("end_reason", "on_disconnect", "usage", "input_tokens", "output_tokens")
    return tuple(record[name] for name in names)


@pytest.mark.parametrize("how", ["fin", "half", "reset"])
def test_a_stream_is_read_to_its_end(stage: Stage, how: str) -> None:
    """The provider sends all of it to nobody; the record has the counts that come last."""
    script = stage.script = Counting()
    path = f"/p/end/{how}/{CHAT}"
    with begin(stage.daemon, path) as client:
        leave(client, how)
        until(lambda: drains(stage.daemon) == 1, "it is read on")
        script.turn.give()
        script.ended.read()
    record = trace_of(stage.daemon, path=path)
    assert told(record) == ("client_gone", "drain", "reported", 3, 5)
    assert (record["is_complete"], record["error"], record["bytes_out"]) == (
        False,
        None,
        len(FIRST),
    )
    assert_over(stage.daemon)


def test_what_lasts_longer_is_cancelled_then(stage: Stage) -> None:
    """After ``drain_for`` the provider's connection is closed, and what was said is kept."""
    script = stage.script = Counting(endless=True)
    path = f"/brief/{CHAT}"
    with begin(stage.daemon, path):
        pass
    script.ended.read()
    record = trace_of(stage.daemon, path=path)
    assert told(record) == ("client_gone", "drain", "partial", 3, None)
    assert record["duration_s"] >= 0.4
    assert_over(stage.daemon)


def test_the_total_deadline_ends_it_too(stage: Stage) -> None:
    """The request is over when it would have been over anyway."""
    script = stage.script = Counting(endless=True)
    path = f"/total/{CHAT}"
    with begin(stage.daemon, path):
        pass
    script.ended.read()
    assert told(trace_of(stage.daemon, path=path)) == ("client_gone", "drain", "partial", 3, None)
    assert_over(stage.daemon)


def test_a_whole_response_is_waited_for(stage: Stage) -> None:
    """A client that leaves before there is a head; the provider's connection is of use again."""
    asked, turn, ended = Turn(), Turn(), Notes()

    def script(wire: Wire) -> None:
        wire.read_request()
        asked.give()
        turn.take()
        head = "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n"
        wire.send(head.format(len(WHOLE)).encode(), WHOLE)
        wire.read_request()
        ended.put("asked again")
        wire.send(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: close\r\n\r\nok")

    stage.script = script
    path = f"/p/whole/{CHAT}"
    with stage.connect() as client:
        client.send(post(path, b'{"model":"m"}'))
        asked.take()
    until(lambda: drains(stage.daemon) == 1, "it is read on")
    turn.give()
    record = trace_of(stage.daemon, path=path)
    assert told(record) == ("client_gone", "drain", "reported", 3, 5)
    assert (record["status"], record["bytes_out"], record["is_complete"]) == (None, 0, False)
    with stage.connect() as other:
        other.send(post("/p/other"))
        assert read_got(other).body == b"ok"
    assert ended.read() == "asked again"
    assert_over(stage.daemon)


def flood(noted: Notes) -> Any:
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


def test_a_slow_client_that_leaves_lets_the_provider_go_on(stage: Stage) -> None:
    """What stood still for it is read again, all of it."""
    noted = Notes()
    stage.script = flood(noted)
    path = f"/p/slow/{CHAT}"
    with stage.connect(receive_buffer=4096) as client:
        client.send(post(path))
        client.read_head()
        until(lambda: stage.daemon.metrics()["llmproxy_paused_streams"] == 1, "it is paused")
    assert noted.read() == "sent"
    record = trace_of(stage.daemon, path=path)
    assert told(record) == ("client_gone", "drain", "reported", 3, 5)
    assert record["paused_s"] > 0
    assert record["bytes_out"] < 20_000_000
    assert_over(stage.daemon)


def test_a_stalled_client_is_dropped_and_the_provider_goes_on(stage: Stage) -> None:
    """The connection is reset after ``client_stall``; the reason is the stalling."""
    noted = Notes()
    stage.script = flood(noted)
    path = f"/stall/{CHAT}"
    with stage.connect(receive_buffer=4096) as client:
        client.send(post(path))
        client.read_head()
        assert noted.read() == "sent"
        record = trace_of(stage.daemon, path=path)
        assert client.wait_closed() == "reset"
    assert told(record) == ("client_stalled", "drain", "reported", 3, 5)
    assert_over(stage.daemon)


def test_a_provider_that_breaks_meanwhile_leaves_what_it_said(stage: Stage) -> None:
    """No error is told of, as there is nobody to tell it to."""
    turn = Turn()

    def script(wire: Wire) -> None:
        wire.read_request()
        wire.send(SSE, chunked(FIRST))
        turn.take()
        wire.reset()

    stage.script = script
    path = f"/p/breaks/{CHAT}"
    with begin(stage.daemon, path):
        pass
    until(lambda: drains(stage.daemon) == 1, "it is read on")
    turn.give()
    record = trace_of(stage.daemon, path=path)
    assert told(record) == ("client_gone", "drain", "partial", 3, None)
    assert record["error"] is None
    assert_over(stage.daemon)


def test_many_at_once_leave_nothing_behind(stage: Stage) -> None:
    """A hundred are read on, which is the limit; of the others each is cancelled at once."""
    script = stage.script = Counting()
    before = len(stage.daemon.traces())
    clients = [begin(stage.daemon, f"/p/many/{CHAT}") for _ in range(120)]
    for number, client in enumerate(clients, 1):
        client.sock.close()
        if number == 100:
            until(lambda: drains(stage.daemon) == 100, "all of these are read on")
    until(lambda: len(stage.daemon.traces()) == before + 20, "the others have ended")
    assert drains(stage.daemon) == 100
    script.turn.give(120)
    until(lambda: len(stage.daemon.traces()) == before + 120, "all have ended")
    records = [told(record) for record in stage.daemon.traces()[before:]]
    assert records == (
        [("client_gone", "cancel", "partial", 3, None)] * 20
        + [("client_gone", "drain", "reported", 3, 5)] * 100
    )
    assert_over(stage.daemon)


@pytest.mark.parametrize("signals", [1, 2])
def test_the_end_of_the_process_does_not_wait_for_it(
    tmp_path: Path, link: Link, signals: int
) -> None:
    """Nobody is connected: the provider is let go of, and the record is there."""
    script = Counting(endless=True)
    with (
        link.provider(script) as provider,
        Daemon(tmp_path, config(provider.url, link)) as daemon,
    ):
        with begin(daemon, f"/p/{CHAT}"):
            pass
        until(lambda: drains(daemon) == 1, "it is read on")
        for _ in range(signals):
            daemon.terminate()
        script.ended.read()
        assert daemon.process.wait(WAIT) == 0
        (record,) = daemon.traces()
        assert told(record) == ("client_gone", "drain", "partial", 3, None)


@pytest.mark.parametrize("signals", [1, 2])
def test_a_process_that_waits_for_others_reads_on(tmp_path: Path, link: Link, signals: int) -> None:
    """While a client is served, a drain goes on to its counts; a second signal cuts both."""
    turns, ended = {b"left": Turn(), b"stays": Turn()}, Notes()

    def script(wire: Wire) -> None:
        who = wire.read_request().target.split(b"/")[1]
        wire.send(SSE, chunked(FIRST))
        turns[who].take()
        wire.send(chunked(COUNTS, DONE), LAST)
        ended.put(wire.wait_closed())

    with (
        link.provider(script) as provider,
        Daemon(tmp_path, config(provider.url, link)) as daemon,
        begin(daemon, f"/p/stays/{CHAT}") as stays,
    ):
        with begin(daemon, f"/p/left/{CHAT}"):
            pass
        until(lambda: drains(daemon) == 1, "it is read on")
        daemon.terminate()
        daemon.wait_log("draining")
        assert drains(daemon) == 1
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
        assert told(left) == ("client_gone", "drain", "reported", 3, 5)
        assert told(stayed) == ("complete", None, "reported", 3, 5)
    else:
        assert told(left) == ("client_gone", "drain", "partial", 3, None)
        assert told(stayed) == ("drained", "cancel", "partial", 3, None)


@pytest.mark.parametrize("how", ["reads", "is slow"])
def test_a_client_of_a_tls_listener_leaves(tmp_path: Path, how: str) -> None:
    """The same behind TLS, whether or not the relay stood still for it."""
    noted = Notes()
    more = '[[routes]]\npath = "/d"\nproviders = ["p"]\non_disconnect = "drain"\n'
    with standing(tmp_path, more=more) as stand:
        script = Counting()
        stand.script = script if how == "reads" else flood(noted)
        with stand.connect() as client:
            client.send(post(f"/d/{CHAT}"))
            client.read_head()
            if how == "reads":
                assert client.read_chunk() == FIRST
            else:
                paused = "llmproxy_paused_streams"
                until(lambda: stand.daemon.metrics()[paused] == 1, "it is paused")
        if how == "reads":
            until(lambda: drains(stand.daemon) == 1, "it is read on")
            script.turn.give()
        record = trace_of(stand.daemon, path=f"/d/{CHAT}")
        assert told(record) == ("client_gone", "drain", "reported", 3, 5)
        assert_over(stand.daemon)
