"""One record for each request, whatever became of it (design 10)."""

from __future__ import annotations

import re

from tests.support.live_proxy import (
    ONE_ROUTE,
    STREAM_BODY,
    LiveProxy,
    assert_settles,
    client_config,
    live_fixture,
    read_stepwise,
    trace_of,
    until,
)
from tests.support.scripts import DONE, event
from tests.support.sockets import request

NAMES = """
time id client_request_id instance peer user_agent client session route provider dialect method
path model served_model stream status end_reason error is_complete attempts bytes_in bytes_out
chunks head_s first_chunk_s duration_s longest_gap_s paused_s input_tokens output_tokens
cache_read_tokens cache_write_tokens reasoning_tokens usage degraded on_disconnect
model_from queued_s counted_tokens tunnel responses events chunks_at_once
last_chunk_s buffered_upstream resent
"""

live = live_fixture(ONE_ROUTE + client_config("team", "team-key"))


def test_a_record_says_all_that_is_known(live: LiveProxy) -> None:
    """Every name of the design in its order, with the values of this request."""
    turn = live.stream(event(0), DONE)
    lines = ("x-api-key: team-key", "User-Agent: t/1", "X-Session-Id: s-1", "X-Request-Id: r-1")
    with live.begin("/p/v1/chat?query", STREAM_BODY, *lines) as client:
        read_stepwise(client, turn, event(0), DONE, b"")
    record = trace_of(live.daemon, client_request_id="r-1")
    assert list(record) == NAMES.split()
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", record.pop("time"))
    assert re.fullmatch(r"[0-9a-f]{24}", record.pop("id"))
    (attempt,) = record.pop("attempts")
    assert (attempt["provider"], attempt["outcome"]) == ("p", "ok")
    head, first = record.pop("head_s"), record.pop("first_chunk_s")
    duration, gap = record.pop("duration_s"), record.pop("longest_gap_s")
    assert 0 < attempt["seconds"] <= head <= first <= duration
    assert 0 < gap <= duration
    assert first < record.pop("last_chunk_s") <= duration
    at_once = int(gap < 0.001)
    assert {name: value for name, value in record.items() if value is not None} == {
        "client_request_id": "r-1",
        "instance": "0",
        "peer": "127.0.0.1",
        "user_agent": "t/1",
        "client": "team",
        "session": "s-1",
        "route": "p",
        "provider": "p",
        "dialect": "openai",
        "method": "POST",
        "path": "/p/v1/chat",
        "model": "m",
        "model_from": "body",
        "queued_s": 0.0,
        "stream": True,
        "status": 200,
        "end_reason": "complete",
        "is_complete": True,
        "bytes_in": len(STREAM_BODY),
        "bytes_out": len(event(0)) + len(DONE),
        "chunks": 2,
        "chunks_at_once": at_once,
        "paused_s": 0.0,
        "degraded": [],
    }


def test_a_rejected_request_has_a_record_too(live: LiveProxy) -> None:
    """The record has what is known of it, and null for the rest."""
    got = live.reject(request("GET", "/nowhere/x"))
    record = live.trace(got)
    assert list(record) == NAMES.split()
    ended = (record["end_reason"], record["error"], record["status"])
    assert ended == ("rejected", "no_route", 404)
    assert (record["route"], record["provider"], record["attempts"]) == (None, None, [])
    assert record["bytes_out"] == len(got.body)


def test_a_client_that_leaves_in_its_own_body_has_a_record(live: LiveProxy) -> None:
    """The head alone makes it a request."""
    with live.connect() as client:
        kind = "Content-Type: application/json"
        client.send(request("POST", "/p/half", kind, "Content-Length: 100"), b"{" * 10)
        held = "llmproxy_request_bytes_held"
        until(lambda: live.daemon.metrics()[held] == 10, "the half body is held")
    record = trace_of(live.daemon, path="/p/half")
    assert (record["end_reason"], record["status"], record["bytes_in"]) == ("client_gone", None, 10)
    assert_settles(live.daemon)
