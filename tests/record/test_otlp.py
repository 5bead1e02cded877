"""Spans for a collector: what they say, and what happens when the collector fails."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llmproxy.config import Url
from llmproxy.record.ledger_steps import TOKENS
from llmproxy.record.otlp import Otlp
from llmproxy.record.sink_queue import Dropped, Retry
from llmproxy.record.spans import export_request
from llmproxy.record.trace import CONTENT, NAMES, Attempt, Trace
from tests.support.collector import OtlpCollector
from tests.support.records import trace
from tests.support.sockets import WAIT
from tests.support.tls import Authority

RESOURCE = {"service.name": "llmproxy", "service.instance.id": "0"}
ID = "0123456789abcdef01234567"


def spans_of(traces: list[Trace]) -> list[dict[str, Any]]:
    """Return the spans of these traces."""
    body, _ = export_request(traces, RESOURCE)
    (of_resource,) = json.loads(body)["resourceSpans"]
    (of_scope,) = of_resource["scopeSpans"]
    spans: list[dict[str, Any]] = of_scope["spans"]
    return spans


def attributes_of(span: dict[str, Any]) -> dict[str, Any]:
    """Return the attributes of a span; each must be there once."""
    found = {one["key"]: one["value"] for one in span["attributes"]}
    assert len(found) == len(span["attributes"])
    return found


# --- what a span says -----------------------------------------------------------------------------


def test_a_trace_is_a_span_of_the_conventions() -> None:
    """Ids, times and the GenAI attributes, in protobuf's JSON: 64 bits are text."""
    (span,) = spans_of(
        [
            trace(
                id=ID,
                time="2026-11-01T00:00:00.125Z",
                duration_s=1.5,
                method="POST",
                path="/openai/v1/chat/completions",
                dialect="openai",
                provider="azure",
                client="c",
                model="gpt-4o",
                served_model="gpt-4o-1",
                session="s",
                stream=True,
                status=200,
                end_reason="complete",
                is_complete=True,
                attempts=[Attempt("azure", "ok", 0.25)],
                head_s=0.5,
                input_tokens=0,
                output_tokens=2**53 + 1,
                cache_read_tokens=3,
                cache_write_tokens=4,
                reasoning_tokens=5,
                usage="reported",
                response_id="r",
                finish_reason="stop",
                degraded=["event"],
            )
        ]
    )
    assert (span["traceId"], span["spanId"]) == ("00000000" + ID, ID[-16:])
    assert (span["name"], span["kind"], span["status"]) == ("chat gpt-4o", 3, {})
    assert span["startTimeUnixNano"] == "1793491200125000000"
    assert span["endTimeUnixNano"] == "1793491201625000000"
    found = attributes_of(span)
    assert {
        "gen_ai.operation.name": {"stringValue": "chat"},
        "gen_ai.provider.name": {"stringValue": "openai"},
        "gen_ai.request.model": {"stringValue": "gpt-4o"},
        "gen_ai.response.model": {"stringValue": "gpt-4o-1"},
        "gen_ai.response.id": {"stringValue": "r"},
        "gen_ai.response.finish_reasons": {"arrayValue": {"values": [{"stringValue": "stop"}]}},
        "gen_ai.conversation.id": {"stringValue": "s"},
        "gen_ai.usage.input_tokens": {"intValue": "0"},
        "gen_ai.usage.output_tokens": {"intValue": "9007199254740993"},
        "gen_ai.usage.cache_read.input_tokens": {"intValue": "3"},
        "gen_ai.usage.cache_creation.input_tokens": {"intValue": "4"},
        "gen_ai.usage.reasoning.output_tokens": {"intValue": "5"},
        "http.response.status_code": {"intValue": "200"},
        "llmproxy.provider": {"stringValue": "azure"},
        "llmproxy.stream": {"boolValue": True},
        "llmproxy.head_s": {"doubleValue": 0.5},
        "llmproxy.attempts": {"arrayValue": {"values": [{"stringValue": "azure ok 0.250"}]}},
        "llmproxy.degraded": {"arrayValue": {"values": [{"stringValue": "event"}]}},
    }.items() <= found.items()
    assert "error.type" not in found


def test_an_unknown_field_is_left_out() -> None:
    """Neither null nor zero stands in its place."""
    (span,) = spans_of([trace(id=ID, path="/v1/models", end_reason="rejected", error="no_key")])
    found = attributes_of(span)
    assert not [key for key in found if key.startswith("gen_ai.")]
    assert (span["name"], span["status"]) == ("GET", {"code": 2, "message": "rejected"})
    assert found["error.type"] == {"stringValue": "no_key"}
    assert "null" not in json.dumps(span)


FILLED: dict[str, Any] = {
    "stream": True,
    "is_complete": True,
    "attempts": [Attempt("azure", "ok", 0.25)],
    "degraded": ["unreadable"],
    "time": "2026-11-01T00:00:01.000Z",
    "id": "f" * 24,
    "method": "PUT",
    "path": "/other",
    "finish_reason": "stop",
    "response_id": "r",
    **dict.fromkeys(
        ("head_s", "first_chunk_s", "duration_s", "longest_gap_s", "paused_s", "queued_s"), 1.5
    ),
    **dict.fromkeys(("status", "bytes_in", "bytes_out", "chunks", *TOKENS), 7),
}
"""Values of fields that are no text."""


@pytest.mark.parametrize(
    "name", [one for one in (*NAMES, *CONTENT) if one not in ("instance", "text", "tool_calls")]
)
def test_every_field_is_in_a_span(name: str) -> None:
    """A span changes with each field of the record; the resource has the instance."""
    plain: dict[str, Any] = {"id": ID, "error": None, "end_reason": "rejected"}
    (before,) = spans_of([trace(**plain)])
    (after,) = spans_of([trace(**plain | {name: FILLED.get(name, "needle")})])
    assert before != after
    assert name in FILLED or "needle" in json.dumps(after)


@pytest.mark.parametrize(
    ("status", "end", "is_error"),
    [
        (200, "complete", False),
        (200, "upstream_broken", True),
        (200, "upstream_failed", True),
        (200, "unfinished", True),
        (200, "client_gone", True),
        (404, "upstream_refused", True),
        (None, "client_gone", True),
        (201, "complete", False),
    ],
)
def test_the_end_and_not_the_status_makes_an_error(
    status: int | None, end: str, is_error: bool
) -> None:
    """A stream that broke after its 200 is an error, with the reason of its end."""
    (span,) = spans_of([trace(id=ID, status=status, end_reason=end, is_complete=end == "complete")])
    found = attributes_of(span)
    if is_error:
        assert span["status"] == {"code": 2, "message": end}
        assert found["error.type"] == {"stringValue": end}
    else:
        assert span["status"] == {}
        assert "error.type" not in found


@pytest.mark.parametrize(
    ("path", "dialect", "counts", "whole"),
    [
        ("/a/v1/messages", "anthropic", (3, 50_000, 200), 50_203),
        ("/a/v1/messages", "ollama", (3, 50_000, 200), 50_203),
        ("/a/v1/messages", "anthropic", (3, None, None), 3),
        ("/a/v1/messages", "anthropic", (0, 0, 7), 7),
        ("/a/v1/messages", "anthropic", (None, 5, 5), None),
        ("/a/v1/chat/completions", "anthropic", (9, 5, 1), 9),
        ("/o/v1/chat/completions", "openai", (9, 5, None), 9),
        ("/o/v1/responses", "openai", (9, 5, None), 9),
        ("/o/api/chat", "ollama", (9, None, None), 9),
        ("/unknown", "anthropic", (9, 5, 1), 9),
    ],
)
def test_the_input_of_a_span_includes_cached_tokens(
    path: str, dialect: str, counts: tuple[int | None, ...], whole: int | None
) -> None:
    """The conventions want it so; of the APIs, only Anthropic's leaves them out."""
    fields: dict[str, Any] = dict(
        zip(("input_tokens", "cache_read_tokens", "cache_write_tokens"), counts, strict=True)
    )
    found = attributes_of(spans_of([trace(id=ID, path=path, dialect=dialect, **fields)])[0])
    expected = None if whole is None else {"intValue": str(whole)}
    assert found.get("gen_ai.usage.input_tokens") == expected


def test_no_content_is_in_a_span() -> None:
    """A span never has the text that a route captures."""
    body, _ = export_request([trace(id=ID, text="needle")], RESOURCE)
    assert b"needle" not in body


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("/openai/v1/embeddings", "embeddings m"),
        ("/ollama/api/embed", "embeddings m"),
        ("/v1/completions", "text_completion m"),
        ("/ollama/api/generate", "text_completion m"),
        ("/anthropic/v1/messages", "chat m"),
        ("/v1/responses", "chat m"),
        ("/ollama/api/chat", "chat m"),
        ("/v1/audio/speech", "GET m"),
    ],
)
def test_a_span_is_named_after_operation_and_model(path: str, name: str) -> None:
    """The operation comes from the path; an unknown path leaves the method."""
    assert spans_of([trace(id=ID, path=path, model="m")])[0]["name"] == name


def test_all_spans_have_one_resource() -> None:
    """The attributes of the process stand once, before all its spans."""
    body, refused = export_request([trace(id=ID) for _ in range(40)], RESOURCE)
    (of_resource,) = json.loads(body)["resourceSpans"]
    assert refused == 0
    assert {
        one["key"]: one["value"]["stringValue"] for one in of_resource["resource"]["attributes"]
    } == RESOURCE
    assert len(of_resource["scopeSpans"][0]["spans"]) == 40


# --- the collector --------------------------------------------------------------------------------


def test_a_batch_is_one_request(collector: OtlpCollector) -> None:
    """The request goes to the protocol's path below the collector's own."""
    otlp = Otlp(
        Url(scheme="http", host="localhost", port=collector.url.port, path="/base"), RESOURCE
    )
    otlp.put([trace(id=ID), trace(id=ID)])
    ((path, fields, body),) = collector.requests
    assert (path, fields["Content-Type"]) == ("/base/v1/traces", "application/json")
    assert len(body["resourceSpans"][0]["scopeSpans"][0]["spans"]) == 2


@pytest.mark.parametrize("status", [200, 202])
@pytest.mark.parametrize("body", [b"", b"{}", b"\x0a\x00", b'{"partialSuccess":{}}', b"[1]"])
def test_a_status_of_success_is_enough(collector: OtlpCollector, status: int, body: bytes) -> None:
    """The body may be empty, JSON, or something else."""
    collector.status, collector.body = status, body
    Otlp(collector.url, RESOURCE).put([trace(id=ID)])
    assert len(collector.requests) == 1


@pytest.mark.parametrize("count", [b"2", b'"2"'])
def test_refused_spans_are_dropped(collector: OtlpCollector, count: bytes) -> None:
    """The collector reports their count as a number or as text."""
    collector.body = b'{"partialSuccess":{"rejectedSpans":%b,"errorMessage":"full"}}' % count
    with pytest.raises(Dropped, match="refused spans: full") as caught:
        Otlp(collector.url, RESOURCE).put([trace(id=ID) for _ in range(5)])
    assert caught.value.count == 2


def test_a_trace_that_cannot_be_a_span_is_dropped_alone(collector: OtlpCollector) -> None:
    """The other traces of the batch are sent."""
    with pytest.raises(Dropped) as caught:
        Otlp(collector.url, RESOURCE).put([trace(id=ID), trace(id=ID, model="\ud800")])
    assert caught.value.count == 1
    assert len(collector.requests) == 1


@pytest.mark.parametrize("status", [301, 400, 404, 413, 500, 429, 502, 503, 504])
def test_only_a_busy_collector_gets_another_try(collector: OtlpCollector, status: int) -> None:
    """The protocol forbids a retry after any other refusal."""
    collector.status = status
    is_busy = status in (429, 502, 503, 504)
    expected = Retry if is_busy else OSError
    with pytest.raises(expected, match=f"answered {status}") as caught:
        Otlp(collector.url, RESOURCE).put([trace(id=ID)])
    assert getattr(caught.value, "again_s", 0) >= is_busy


def test_a_collector_that_is_not_there_is_tried_again() -> None:
    """A refused connection is a reason for a retry."""
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    with pytest.raises(Retry, match="refused"):
        Otlp(Url(scheme="http", host="127.0.0.1", port=port), RESOURCE).put([trace(id=ID)])


def hang(conn: socket.socket, over: threading.Event) -> None:
    """Send nothing."""
    over.wait(WAIT)


def drip(conn: socket.socket, over: threading.Event) -> None:
    """Send a byte at a time, so that no single wait is long."""
    while not over.wait(0.01):
        try:
            conn.sendall(b"H")
        except OSError:
            return


def babble(conn: socket.socket, over: threading.Event) -> None:
    """Send a response that is not HTTP."""
    conn.recv(65536)
    conn.sendall(b"SSH-2.0-x\r\n")


def leave(conn: socket.socket, over: threading.Event) -> None:
    """Close the connection."""
    conn.recv(65536)


@pytest.mark.parametrize("play", [hang, drip, babble, leave])
def test_a_collector_that_misbehaves_is_tried_again(
    play: Callable[[socket.socket, threading.Event], None],
) -> None:
    """The deadline ends every kind of misbehaviour."""
    over = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            conn, _ = server.accept()
            with conn:
                play(conn, over)

        thread = threading.Thread(target=serve)
        thread.start()
        url = Url(scheme="http", host="127.0.0.1", port=server.getsockname()[1])
        with pytest.raises(Retry):
            Otlp(url, RESOURCE, deadline_s=0.2).put([trace(id=ID)])
        over.set()
        thread.join(WAIT)


def test_a_collector_s_certificate_is_verified(
    authority: Authority, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The system's trust decides; without trust nothing is sent."""
    collector = OtlpCollector(authority.server())
    try:
        with pytest.raises(Retry, match="certificate verify failed"):
            Otlp(collector.url, RESOURCE).put([trace(id=ID)])
        assert collector.requests == []
        monkeypatch.setenv("SSL_CERT_FILE", str(authority.ca_path))
        Otlp(collector.url, RESOURCE).put([trace(id=ID)])
        assert len(collector.requests) == 1
    finally:
        collector.close()


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    """An authority that the system does not trust."""
    return Authority(tmp_path)
