"""What a response said is in its record, and no fault of whoever reads it is felt by anybody."""

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


def answered(
    chunks: list[bytes], *fields: tuple[bytes, bytes], route: str = "", target: str = CHAT
) -> PlayedGateway:
    """A stream that was relayed to its end; the client must have every byte of it."""
    played = PlayedGateway(route=route)
    played.call(target=target)
    response = played.response(200, *(fields or (SSE,)))
    response.push(*chunks)
    response.end()
    _, _, body = played.got()
    assert body == chunked(*chunks) + LAST
    return played


def content(trace: Trace) -> list[Any]:
    """Return the fields that speak of content."""
    return [getattr(trace, name) for name in CONTENT]


def test_usage_is_recorded_and_nothing_of_the_content() -> None:
    """The provider's numbers, a reported zero among them, and the model that served."""
    trace = answered(CHUNKS).trace()

    assert (trace.usage, trace.served_model, trace.is_complete) == ("reported", "m-1", True)
    assert (trace.input_tokens, trace.output_tokens, trace.cache_read_tokens) == (3, 5, 0)
    assert (trace.cache_write_tokens, trace.reasoning_tokens) == (None, None)
    assert content(trace) == [UNSET] * 4
    assert "hid" not in repr(trace)


def test_content_is_recorded_where_the_route_says_so() -> None:
    """Text, tool calls, finish reason and id beside the same numbers."""
    trace = answered(CHUNKS, route=KEPT).trace()

    assert content(trace) == ["stop", "r", "hidden", (ToolCall("c", "f", "{}"),)]
    assert (trace.usage, trace.input_tokens, trace.output_tokens) == ("reported", 3, 5)


def test_content_that_was_cut_says_so() -> None:
    """Beyond ``limits.accumulate`` the record has a part of the text, and a word for that."""
    text = b'data: {"choices":[{"delta":{"content":"%b"}}]}\n\n' % (b"x" * 700)
    played = PlayedGateway(route=KEPT, more='[limits]\naccumulate = "1KiB"')
    played.call(target=CHAT)
    response = played.response(200, SSE)
    response.push(text, text, CHUNKS[-1])
    response.end()

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
        ([b"data: {\n\n"], "complete", "none"),
    ],
)
@pytest.mark.parametrize("route", ["", KEPT])
def test_the_verdict_on_a_stream_that_ended_well(
    chunks: list[bytes], end: str, usage: str, route: str
) -> None:
    """Marker and error decide, whatever is kept; who could not read everything does not judge."""
    played = answered(chunks, route=route)
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
        (CHAT, [(b"content-type", b"text/plain")], "none"),
        (CHAT, [(b"x", b"no type")], "none"),
        (CHAT, [SSE, (b"content-encoding", b"x-unheard-of")], "none"),
    ],
)
def test_what_has_no_known_marker_is_never_unfinished(
    target: str, fields: list[tuple[bytes, bytes]], usage: str | None
) -> None:
    """It ended as its framing says; where nothing was read, nothing is said of usage."""
    trace = answered(CHUNKS[:2], *fields, target=target).trace()

    assert (trace.end_reason, trace.is_complete, trace.usage) == ("complete", True, usage)
    assert trace.degraded == (["encoding"] if len(fields) == 2 else [])


def test_a_coding_is_opened_for_the_record_alone() -> None:
    """The client gets the bytes as they came; the record gets the numbers in them."""
    data = gzip.compress(b"".join(CHUNKS))
    pieces = [data[:1], data[1:20], data[20:]]
    trace = answered(pieces, SSE, (b"content-encoding", b"gzip"), route=KEPT).trace()

    assert (trace.text, trace.output_tokens, trace.end_reason) == ("hidden", 5, "complete")


@pytest.mark.parametrize(
    ("status", "end"),
    [(204, "complete"), (304, "complete"), (307, "complete"), (429, "upstream_refused")],
)
@pytest.mark.parametrize("kind", [b"application/json", b"text/event-stream"])
def test_only_a_response_of_the_endpoints_own_is_read(status: int, end: str, kind: bytes) -> None:
    """Neither a refusal nor a redirect has usage or lacks a marker, whatever stands in its body."""
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
    """One of ours."""


def fail(*_: Any, **__: Any) -> Any:
    """Be the mistake."""
    raise Mistake


FAULTS: dict[str, tuple[object, str]] = {
    "opening": (inspection, "StreamAccumulator"),
    "reading": (StreamAccumulator, "_take"),
    "the end": (StreamAccumulator, "_flush"),
    "the verdict": (StreamAccumulator, "_verdict"),
    "the text": (Accumulated, "text"),
    "the whole": (StreamAccumulator, "finish"),
}


@pytest.mark.parametrize("where", FAULTS)
def test_a_fault_of_the_tap_is_felt_by_nobody(
    where: str, monkeypatch: pytest.MonkeyPatch, logged_failures: LoggedFailures
) -> None:
    """Every byte arrives and the request has its record, with a word for the fault; told once."""
    owner, name = FAULTS[where]
    monkeypatch.setattr(owner, name, property(fail) if name == "text" else fail)
    played = answered(CHUNKS, route=KEPT)

    trace = played.trace()
    assert (trace.end_reason, trace.degraded) == ("complete", ["internal"])
    assert played.value("tap_degraded_total", reason="internal") == 1
    assert len(logged_failures.flush(Mistake)) == 1


def test_a_fault_in_the_middle_leaves_what_was_found(
    monkeypatch: pytest.MonkeyPatch, logged_failures: LoggedFailures
) -> None:
    """The third chunk breaks the tap: what came before it is in the record."""
    take = StreamAccumulator._take

    def take_two(tap: StreamAccumulator, events: Any) -> None:
        (fail if tap.events > 1 else take)(tap, events)

    monkeypatch.setattr(StreamAccumulator, "_take", take_two)
    trace = answered(CHUNKS, route=KEPT).trace()

    assert (trace.text, trace.served_model, trace.usage) == ("hidden", "m-1", "none")
    assert (trace.end_reason, trace.degraded) == ("complete", ["internal"])
    assert len(logged_failures.flush(Mistake)) == 1


def test_a_counter_that_fails_costs_no_record(
    monkeypatch: pytest.MonkeyPatch, logged_failures: LoggedFailures
) -> None:
    """Whatever becomes of a reason's count or of the tokens', the request ends as ever."""
    played = PlayedGateway()
    monkeypatch.setattr(played.metrics, "used", fail)
    played.call(target=CHAT)
    response = played.response(200, SSE)
    response.push(*CHUNKS)
    response.end()

    trace = played.trace()
    assert (trace.end_reason, trace.output_tokens) == ("complete", 5)
    assert len(logged_failures.flush(Mistake)) == 1


# --- labels ---------------------------------------------------------------------------------------


def test_models_that_the_configuration_names_are_labels() -> None:
    """Those of routes, clients and overrides; no pattern, and not the sign for none."""
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
    """A model that no configuration names is counted with all others of its kind."""
    played = PlayedGateway(client='models = ["m", "*", "-"]')
    played.call(target=CHAT, body=body)
    response = played.response(200, SSE)
    response.push(*CHUNKS)
    response.end()

    labels = {"client": "c", "provider": "p", "model": label}
    assert played.value("tokens_total", **labels, type="output") == 5
    assert played.value("tokens_total", **labels, type="cache_read") is None
    assert played.trace().output_tokens == 5


@pytest.mark.parametrize("count", [10**12 + 1, -1])
def test_a_number_that_can_be_none_is_none_anywhere(count: int) -> None:
    """No counter takes what the ledger would not: their sums stay the same."""
    odd = b'data: {"choices":[],"usage":{"prompt_tokens":%d,"completion_tokens":5}}\n\n' % count
    played = answered([odd, CHUNKS[-1]])

    labels = {"client": "c", "provider": "p", "model": "other"}
    assert played.value("tokens_total", **labels, type="input") is None
    trace = played.trace()
    assert (trace.input_tokens, trace.degraded) == (None, ["unreadable"])
