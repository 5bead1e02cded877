"""Requests that come again, as programs send them whose streams some hop has cut."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.live_proxy import (
    ONE_ROUTE,
    LiveProxy,
    client_config,
    open_live_proxy,
    post,
    response,
    trace_of,
    until,
)
from tests.support.scripts import SSE
from tests.support.sockets import Wire, chunked

CHAT = "/p/v1/chat/completions"
BODY = b'{"model":"m","stream":true,"messages":[{"role":"user","content":"a long story"}]}'
EVENT = b'data: {"choices":[{"delta":{"content":"a"}}]}\n\n'
SERIES = 'llmproxy_resent_total{client="%s",first="%s"}'


@pytest.fixture
def live(tmp_path: Path) -> Iterator[LiveProxy]:
    """A daemon with two clients, whose provider begins a stream and falls silent."""
    config = ONE_ROUTE + client_config("a", "key-a") + client_config("b", "key-b")
    with open_live_proxy(tmp_path, config, proxy="") as live:
        live.hold(SSE, chunked(EVENT))
        yield live


def begin(live: LiveProxy, client: str = "a", body: bytes = BODY) -> Wire:
    """Begin a stream, and read its first event."""
    wire = live.begin(CHAT, body, f"x-api-key: key-{client}")
    assert wire.read_chunk() == EVENT
    return wire


def records(live: LiveProxy, count: int) -> list[Any]:
    """Return what so many records say of others, in their order."""
    until(lambda: len(live.daemon.traces()) == count, f"{count} records")
    return [one["resent"] for one in sorted(live.daemon.traces(), key=lambda one: one["time"])]


def test_a_stream_that_a_hop_has_cut_comes_again(live: LiveProxy) -> None:
    """The second record says how the first one ended; the metric counts it by its client."""
    begin(live).sock.close()
    trace_of(live.daemon, end_reason="client_gone")
    begin(live).sock.close()
    assert records(live, 2) == [None, "client_gone"]
    assert live.daemon.metrics()[SERIES % ("a", "client_gone")] == 1


def test_a_request_beside_one_like_it(live: LiveProxy) -> None:
    """As where the client gave up, and its connection is still there; others' are none of it."""
    with begin(live), begin(live), begin(live, "b"), begin(live, body=BODY + b" "):
        metrics = live.daemon.metrics()
    assert records(live, 4) == [None, "running", None, None]
    assert metrics[SERIES % ("a", "running")] == 1
    assert SERIES % ("b", "running") not in metrics


def test_a_retry_behind_a_refusal_is_none(live: LiveProxy) -> None:
    """It was asked for; nothing was cut."""
    live.reply(response(429, "connection: close", "retry-after: 1"))
    for _ in range(2):
        assert live.get(post(CHAT, BODY, "x-api-key: key-a")).status == 429
    assert records(live, 2) == [None, None]
