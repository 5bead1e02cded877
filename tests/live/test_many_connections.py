"""Many clients that say nothing, or half of something: each is ended in time, and nobody waits."""

from __future__ import annotations

import select
import time
from collections.abc import Iterator

import pytest

from tests.support.live_proxy import (
    ONE_ROUTE,
    LiveProxy,
    assert_settles,
    open_live_proxy,
    post,
    read_response,
    until,
)
from tests.support.scripts import OK

COUNT = 500

DEADLINE = 3.0
"""Seconds of both deadlines: longer than it takes to open all connections."""

SLACK = 10.0
"""Seconds beside it: sweeps, and a machine that has other work."""

PATIENCE = 2.0
"""Seconds that a calm client may wait for its response."""

TIMEOUTS = f"""
[timeouts]
request_head = "{DEADLINE:.0f}s"
client_idle = "{DEADLINE:.0f}s"
"""


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveProxy]:
    """Short deadlines, and one route."""
    with open_live_proxy(tmp_path_factory.mktemp("many"), ONE_ROUTE + TIMEOUTS) as live:
        live.reply(OK)
        yield live


def connections(live: LiveProxy) -> float:
    """Return how many clients are connected."""
    return live.gauge("client_connections")


def serve_calm(live: LiveProxy) -> None:
    """Check that a calm client is served as if it were alone."""
    began = time.monotonic()
    assert live.get(post("/p/calm")).body == b"ok"
    assert time.monotonic() - began < PATIENCE


def test_silent_and_half_said_connections_are_ended_in_time(live: LiveProxy) -> None:
    """The silent quietly, those with half a head by 408; calm clients are served meanwhile."""
    began = time.monotonic()
    silent, halves = [], []
    for _ in range(COUNT):
        silent.append(live.connect())
        halves.append(live.connect())
        halves[-1].send(b"POST /p/half HTTP/1.1\r\nHost: proxy\r\nX-Half: ")
    opened = time.monotonic()
    until(lambda: connections(live) == 2 * COUNT, "all are there", seconds=DEADLINE)
    poll = select.poll()
    for wire in (*silent, *halves):
        poll.register(wire.sock, select.POLLIN)
    while not poll.poll(0):
        serve_calm(live)
    # The one that is ended first was not ended before its time, nor the last one long after.
    assert time.monotonic() - began > DEADLINE / 2
    while connections(live):
        assert time.monotonic() - opened < DEADLINE + SLACK, "some are forgotten"
        serve_calm(live)
    for wire in silent:
        with wire:
            assert wire.wait_closed() == "fin"
            assert wire.buffer == b""
    for wire in halves:
        with wire:
            got = read_response(wire)
            assert (got.status, got.values(b"x-llmproxy-error")) == (408, [b"slow_request"])
            assert got.json()["error"]["code"] == "slow_request"
            assert wire.wait_closed() == "fin"
    assert_settles(live.daemon)
    rejected = [one for one in live.daemon.traces() if one["error"] == "slow_request"]
    assert len(rejected) == COUNT
    assert {(one["end_reason"], one["status"]) for one in rejected} == {("rejected", 408)}
