"""A provider that takes one request at a time, and the queue before it."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from tests.support.daemon import provider_config
from tests.support.live_proxy import (
    LiveProxy,
    assert_settles,
    client_config,
    live_fixture,
    post,
    read_response,
    trace_of,
    until,
)
from tests.support.scripts import OK, Notes, Turn
from tests.support.sockets import Wire

live = live_fixture(
    provider_config("URL", provider='max_streams = 1\nqueue = { size = 5, timeout = "30s" }\n')
    + client_config("flood", "key-of-flood")
    + client_config("calm", "key-of-calm"),
    proxy="",
)


class Busy:
    """The provider; it serves one request after the other, each when the test gives a turn."""

    def __init__(self, live: LiveProxy) -> None:
        self.live = live
        self.seen = Notes()
        self.turn = Turn()
        live.script = self._play

    def _play(self, wire: Wire) -> None:
        self.seen.put(wire.read_request().target.decode())
        self.turn.take()
        wire.send(OK)

    def call(self, client: str, path: str) -> Wire:
        """Send one request, on a connection of its own; it is in the queue when this returns."""
        before = self.queued
        wire = self.live.connect()
        wire.send(post(f"/p/{path}", b'{"model":"m"}', f"x-api-key: key-of-{client}"))
        if path != "first":
            until(lambda: self.queued == before + 1, "it waits")
        return wire

    @property
    def queued(self) -> float:
        """How many requests wait."""
        return self.live.daemon.metrics()['llmproxy_queued_requests{provider="p"}']


@pytest.fixture
def busy(live: LiveProxy) -> Iterator[Busy]:
    """A provider whose only place is taken by a client that floods it."""
    busy = Busy(live)
    with busy.call("flood", "first") as first:
        assert busy.seen.read() == "/first"
        yield busy
        assert read_response(first).status == 200
    assert_settles(live.daemon)


def test_clients_take_turns(busy: Busy) -> None:
    """Whoever floods the queue waits himself; the provider sees one request at a time."""
    with ExitStack() as wires:
        waiting = [wires.enter_context(busy.call("flood", f"flood{n}")) for n in range(3)]
        waiting.append(wires.enter_context(busy.call("calm", "calm")))
        busy.turn.give(5)
        order = [busy.seen.read() for _ in range(4)]
        assert order == ["/flood0", "/calm", "/flood1", "/flood2"]
        assert [read_response(wire).status for wire in waiting] == [200] * 4


def test_the_streams_table_shows_who_waits_and_where(busy: Busy) -> None:
    """With how many are ahead; the record says how long it took."""
    with busy.call("calm", "shown-a") as first, busy.call("calm", "shown-b") as second:
        busy.live.daemon.process.send_signal(signal.SIGUSR1)
        line = busy.live.daemon.wait_log("1 ahead of it")
        assert (line["phase"], line["client"], line["provider"]) == ("queued", "calm", "p")
        busy.turn.give(3)
        assert [read_response(wire).status for wire in (first, second)] == [200, 200]
    assert trace_of(busy.live.daemon, path="/p/shown-b")["queued_s"] > 0


def test_a_client_that_leaves_the_queue_is_not_served(busy: Busy) -> None:
    """Its place is free at once, and the provider never hears of it."""
    with busy.call("calm", "gone"):
        pass
    until(lambda: busy.queued == 0, "the queue is empty")
    record = trace_of(busy.live.daemon, path="/p/gone")
    assert (record["end_reason"], record["attempts"]) == ("client_gone", [])
    with busy.call("calm", "after") as after:
        busy.turn.give(2)
        assert busy.seen.read() == "/after"
        assert read_response(after).status == 200


def test_a_full_queue_refuses_who_has_most(busy: Busy) -> None:
    """A client with fewer waiting takes the last place of the one with most."""
    with ExitStack() as wires:
        flood = [wires.enter_context(busy.call("flood", f"full{n}")) for n in range(5)]
        calm = wires.enter_context(busy.live.connect())
        calm.send(post("/p/full-calm", b'{"model":"m"}', "x-api-key: key-of-calm"))
        refused = read_response(flood[-1])
        assert (refused.status, refused.error) == (503, "queue_full")
        assert refused.values(b"retry-after") == [b"1"]
        busy.turn.give(6)
        served = [*flood[:-1], calm]
        assert [read_response(wire).status for wire in served] == [200] * 5
    for _ in range(5):
        busy.seen.read()
