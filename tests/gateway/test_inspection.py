"""Inspection: the record has what a response said, and a fault of the tap hurts nobody."""

from __future__ import annotations

import gzip
from typing import Any

import pytest
from msgspec import UNSET

from llmproxy.config import parse
from llmproxy.dialects.accumulated import Accumulated, ToolCall
from llmproxy.gateway import inspection
from llmproxy.gateway.inspection import named_models
from llmproxy.record.trace import CONTENT, Trace
from llmproxy.stream.events import ServerSentEvents
from llmproxy.stream.tap import StreamAccumulator
from tests.conftest import LoggedFailures
from tests.gateway.played import LAST, SSE, PlayedGateway
from tests.support.sockets import chunked

CHAT = "/p/v1/chat/completions"
KEPT = 'capture = "content"'
CHUNKS = [
    b'data: {"id":"r","model":"m-1","choices":[{"delta":{"content":"hid"}}]}\n\n',
    b'data: {"choices":[{"delta":{"content":"den"}}]}\n\n',
    b'data: {"choices":[{"delta":{"tool_calls":[{"index":0,"id":"c","function":'
    b'{"name":"f","arguments":"{}"}}]}}]}\n\n',
    b'data: {"choices":[{"delta":{},"finish_reason":"stop"}]}\n\n',
    b'data: {"choices":[],"usage":{"prompt_tokens":3,"completion_tokens":5,'
    b'"prompt_tokens_details":{"cached_tokens":0}}}\n\n',
    b"data: [DONE]\n\n",
]
ERROR = b'data: {"error":{"message":"no"}}\n\n'


def relay(
    played: PlayedGateway, chunks: list[bytes], *fields: tuple[bytes, bytes], **call: Any
) -> None:
    """Let a request come in, and a response of these chunks."""
    response = played.begun(*fields, **{"target": CHAT, **call})
    response.push(*chunks)
    response.end()


def relayed(
    chunks: list[bytes], *fields: tuple[bytes, bytes], route: str = "", target: str = CHAT
) -> PlayedGateway:
    """Relay a stream to its end; the client must get every byte of it."""
    played = PlayedGateway(route=route)
    relay(played, chunks, *(fields or (SSE,)), target=target)
    _, _, body = played.got()
    assert body == chunked(*chunks) + LAST
    return played


def content(trace: Trace) -> list[Any]:
    """Return the fields with content."""
    return [getattr(trace, name) for name in CONTENT]


def test_usage_is_recorded_without_content() -> None:
    """The record has the provider's numbers, even a zero, and the model that served."""
    trace = relayed(CHUNKS).trace()

    assert (trace.usage, trace.served_model, trace.is_complete) == ("reported", "m-1", True)
    assert (trace.input_tokens, trace.output_tokens, trace.cache_read_tokens) == (3, 5, 0)
    assert (trace.cache_write_tokens, trace.reasoning_tokens) == (None, None)
    assert content(trace) == [UNSET] * 4
    assert "hid" not in repr(trace)


def test_content_is_recorded_if_the_route_captures_it() -> None:
    """The record has text, tool calls, finish reason and id beside the numbers."""
    trace = relayed(CHUNKS, route=KEPT).trace()

    assert content(trace) == ["stop", "r", "hidden", (ToolCall("c", "f", "{}"),)]
    assert (trace.usage, trace.input_tokens, trace.output_tokens) == ("reported", 3, 5)


def test_long_content_is_cut() -> None:
    """The record has ``limits.accumulate`` bytes of the text, and says that it is cut."""
    text = b'data: {"choices":[{"delta":{"content":"%b"}}]}\n\n' % (b"x" * 700)
    played = PlayedGateway(route=KEPT, more='[limits]\naccumulate = "1KiB"')
    relay(played, [text, text, CHUNKS[-1]], SSE)

    trace = played.trace()
    assert (trace.text, trace.degraded, trace.end_reason) == ("x" * 1024, ["cut"], "complete")


@pytest.mark.parametrize(
    ("chunks", "end", "usage"),
    [
        (CHUNKS, "complete", "reported"),
        (CHUNKS[:2], "unfinished", "none"),
        (CHUNKS[:-1], "unfinished", "reported"),
        ([], "unfinished", "none"),
        ([*CHUNKS[:2], ERROR], "upstream_failed", "none"),
        ([*CHUNKS[:2], ERROR, CHUNKS[-1]], "upstream_failed", "none"),
        ([b"data: {\n\n"], "unfinished", "none"),
    ],
)
@pytest.mark.parametrize("route", ["", KEPT])
def test_marker_and_error_decide_how_a_whole_stream_ended(
    chunks: list[bytes], end: str, usage: str, route: str
) -> None:
    """Capture changes nothing, and neither does an event that cannot have been the marker."""
    played = relayed(chunks, route=route)
    trace = played.trace()

    assert (trace.end_reason, trace.is_complete) == (end, end == "complete")
    assert (trace.usage, trace.status, trace.error) == (usage, 200, None)
    if chunks == [b"data: {\n\n"]:
        assert trace.degraded == ["unreadable"]
        assert played.value("tap_degraded_total", reason="unreadable") == 1


@pytest.mark.parametrize(
    ("target", "fields", "usage"),
    [
        ("/p/v1/unknown", [SSE], None),
        ("/p/v1/embeddings", [SSE], "none"),
        (CHAT, [SSE, (b"content-encoding", b"x-unheard-of")], "none"),
    ],
)
def test_a_stream_without_a_known_marker_is_never_unfinished(
    target: str, fields: list[tuple[bytes, bytes]], usage: str | None
) -> None:
    """It ends as its framing says; an unread response has no word on usage."""
    trace = relayed(CHUNKS[:2], *fields, target=target).trace()

    assert (trace.end_reason, trace.is_complete, trace.usage) == ("complete", True, usage)
    assert trace.degraded == (["encoding"] if len(fields) == 2 else [])


def test_a_coding_is_decompressed_for_the_record_only() -> None:
    """The client gets the compressed bytes; the record gets the numbers in them."""
    data = gzip.compress(b"".join(CHUNKS))
    pieces = [data[:1], data[1:20], data[20:]]
    trace = relayed(pieces, SSE, (b"content-encoding", b"gzip"), route=KEPT).trace()

    assert (trace.text, trace.output_tokens, trace.end_reason) == ("hidden", 5, "complete")


@pytest.mark.parametrize(
    ("status", "end"),
    [(204, "complete"), (304, "complete"), (307, "complete"), (429, "upstream_refused")],
)
@pytest.mark.parametrize("kind", [b"application/json", b"text/event-stream"])
def test_only_a_success_is_read(status: int, end: str, kind: bytes) -> None:
    """A refusal or a redirect has no usage and lacks no marker, whatever its body says."""
    played = PlayedGateway()
    played.call(target=CHAT)
    response = played.response(status, (b"content-type", kind))
    if status not in (204, 304):
        response.push(b'{"usage":{"prompt_tokens":3}}')
    response.end()

    trace = played.trace()
    assert (trace.end_reason, trace.usage, trace.input_tokens) == (end, "none", None)
    assert trace.degraded == []


# --- faults ---------------------------------------------------------------------------------------


class Mistake(Exception):
    """A fault of ours."""


def fail(*_: Any, **__: Any) -> Any:
    """Raise it."""
    raise Mistake


FAULTS: dict[str, tuple[object, str]] = {
    "opening": (inspection, "StreamAccumulator"),
    "reading": (ServerSentEvents, "feed"),
    "the end": (ServerSentEvents, "flush"),
    "the usage": (Accumulated, "usage"),
    "the text": (Accumulated, "text"),
    "the result": (StreamAccumulator, "finish"),
}


@pytest.mark.parametrize("where", FAULTS)
def test_a_fault_of_the_tap_hurts_nobody(
    where: str, monkeypatch: pytest.MonkeyPatch, logged_failures: LoggedFailures
) -> None:
    """Every byte arrives, and the record has a word for the fault; it is logged once."""
    owner, name = FAULTS[where]
    monkeypatch.setattr(owner, name, property(fail) if name == "text" else fail)
    played = relayed(CHUNKS, route=KEPT)

    trace = played.trace()
    assert (trace.end_reason, trace.degraded) == ("complete", ["internal"])
    assert played.value("tap_degraded_total", reason="internal") == 1
    assert len(logged_failures.flush(Mistake)) == 1


def test_a_counter_that_fails_costs_no_record(
    monkeypatch: pytest.MonkeyPatch, logged_failures: LoggedFailures
) -> None:
    """If the tokens cannot be counted, the request still ends with its record."""
    played = PlayedGateway()
    monkeypatch.setattr(played.metrics, "used", fail)
    relay(played, CHUNKS, SSE)

    trace = played.trace()
    assert (trace.end_reason, trace.output_tokens) == ("complete", 5)
    assert len(logged_failures.flush(Mistake)) == 1


# --- labels ---------------------------------------------------------------------------------------


def test_configured_models_are_labels() -> None:
    """Routes, clients and overrides name them; patterns and ``-`` are no labels."""
    config = parse(
        """
        [providers.p]
        url = "https://p.example"
        dialect = "openai"
        [[routes]]
        path = "/a"
        providers = ["p"]
        models = ["one", "tw*", "-"]
        [routes.override]
        p = { model = "prod" }
        [clients.c]
        keys = ["sha256:0000000000000000000000000000000000000000000000000000000000000000"]
        models = ["three", "*"]
        """,
        environ={},
    )
    assert set(named_models(config)) == {"one", "prod", "three"}


@pytest.mark.parametrize(
    ("body", "label"),
    [(b'{"model":"m"}', "m"), (b'{"model":"made up"}', "other"), (b"{}", "other")],
)
def test_a_caller_cannot_make_up_labels(body: bytes, label: str) -> None:
    """A model that is not configured is counted as ``other``."""
    played = PlayedGateway(client='models = ["m", "*", "-"]')
    relay(played, CHUNKS, SSE, body=body)

    labels = {"client": "c", "provider": "p", "model": label}
    assert played.value("tokens_total", **labels, type="output") == 5
    assert played.value("tokens_total", **labels, type="cache_read") is None
    assert played.trace().output_tokens == 5


@pytest.mark.parametrize("count", [10**12 + 1, -1])
def test_an_impossible_count_is_counted_nowhere(count: int) -> None:
    """Counter and ledger leave it out, so their sums stay equal."""
    odd = b'data: {"choices":[],"usage":{"prompt_tokens":%d,"completion_tokens":5}}\n\n' % count
    played = relayed([odd, CHUNKS[-1]])

    labels = {"client": "c", "provider": "p", "model": "other"}
    assert played.value("tokens_total", **labels, type="input") is None
    trace = played.trace()
    assert (trace.input_tokens, trace.degraded) == (None, ["unreadable"])


@pytest.mark.parametrize("held", [True, False])
def test_a_stream_that_was_held_back_is_told_of(held: bool) -> None:
    """In its record, and in a metric of its provider; one that came event by event is not."""
    played = PlayedGateway()
    events = [b'data: {"n":%d}\n\n' % n for n in range(40)]
    response = played.begun(SSE, target=CHAT)
    if held:
        played.clock.advance(2)
        response.push(b"".join(events))
    else:
        for event in events:
            played.clock.advance(0.05)
            response.push(event)
    response.end()
    trace = played.trace()
    assert (trace.events, trace.buffered_upstream) == (40, held)
    assert played.value("buffered_upstream_total", provider="p") == (1.0 if held else None)
