"""Failures that no ``error`` member tells of."""

from __future__ import annotations

import json
from typing import Any

import pytest

from llmproxy.dialects.accumulated import Accumulated, ProviderError
from llmproxy.dialects.dialect import Dialect
from llmproxy.dialects.endpoint import Endpoint
from llmproxy.dialects.endpoints import TABLE, endpoint
from llmproxy.dialects.failures import read_error_event

CHAT = endpoint(Dialect.OPENAI, b"/v1/chat/completions")
RESPONSES = endpoint(Dialect.OPENAI, b"/v1/responses")
MESSAGES = endpoint(Dialect.ANTHROPIC, b"/v1/messages")
OLLAMA = endpoint(Dialect.OLLAMA, b"/api/chat")
ROWS = pytest.mark.parametrize(
    "row", [CHAT, RESPONSES, MESSAGES, OLLAMA], ids=["chat", "responses", "messages", "ollama"]
)


def read(row: Endpoint | None, event: Any, *, keeps: bool = False) -> Accumulated:
    """Return what an event says."""
    assert row is not None
    seen = Accumulated(keeps=keeps, budget=1000)
    row.event(json.dumps(event).encode(), seen)
    return seen


@pytest.mark.parametrize(
    ("event", "error"),
    [
        ({"message": "m", "code": 500}, ProviderError("500", "m")),
        ({"object": "error", "message": "m", "code": 400}, ProviderError("400", "m")),
        ({"type": "error", "message": "m"}, ProviderError(None, "m")),
        ({"type": "error", "errorText": "m"}, ProviderError(None, "m")),
        ({"error_code": 18, "error_msg": "m"}, ProviderError("18", "m")),
        ({"success": False, "msg": "m", "code": 1234}, ProviderError("1234", "m")),
        ({"success": False, "result": None}, ProviderError(None, None)),
        ({"status": "error", "message": "m"}, ProviderError(None, "m")),
        ({"detail": "Internal Server Error"}, ProviderError(None, "Internal Server Error")),
        ({"detail": [{"loc": ["body"], "msg": "x"}]}, ProviderError(None, None)),
        ({"errors": [{"message": "m"}]}, ProviderError(None, None)),
        (
            {"base_resp": {"status_code": 1008, "status_msg": "insufficient balance"}},
            ProviderError("1008", "insufficient balance"),
        ),
        ({"error": {"message": "m"}, "x": 1}, ProviderError(None, "m")),
        ({"error": [{"code": 400, "message": "m"}]}, ProviderError("400", "m")),
        ({"error": {"message": {"text": "m"}, "code": 5}}, ProviderError("5", None)),
    ],
)
@pytest.mark.parametrize("keeps", [True, False])
@ROWS
def test_errors_without_an_error(
    row: Endpoint, event: Any, error: ProviderError, keeps: bool
) -> None:
    """SDKs and servers send the object of an error as it is, or in words of their own."""
    assert read(row, event, keeps=keeps).error == error


@pytest.mark.parametrize("row", [CHAT, OLLAMA], ids=["chat", "ollama"])
def test_the_body_of_an_error_as_sdks_hold_it(row: Endpoint) -> None:
    """Where a type does not name the event, it names the error."""
    event = {"message": "m", "type": "t", "param": None, "code": None}
    assert read(row, event).error == ProviderError("t", "m")


@pytest.mark.parametrize(
    "event",
    [
        {},
        {"id": "x"},
        {"code": 0, "message": "success"},
        {"code": "200", "msg": "ok"},
        {"success": True, "errors": [], "message": ""},
        {"base_resp": {"status_code": 0, "status_msg": "success"}},
        {"message": {"content": "hello"}, "done": False},
        {"status": "queued", "message": "waiting"},
        {"type": "status", "message": "Searching the web"},
        {"type": "progress", "message": "half"},
        {"event": "x", "detail": "thinking"},
        {"status": "success", "detail": "warming up"},
        {"code": 1, "message": "queued"},
        {"code": "1", "message": "queued"},
    ],
)
@ROWS
def test_what_is_no_error(row: Endpoint, event: Any) -> None:
    """A sentence alone, and a code that stands for success, are none."""
    assert read(row, event).error is None


@pytest.mark.parametrize(
    ("choice", "error"),
    [
        ({"finish_reason": "error"}, ProviderError("error", None)),
        ({"finish_reason": "network_error"}, ProviderError("network_error", None)),
        (
            {"finish_reason": "error", "error": {"code": 502, "message": "m"}},
            ProviderError("502", "m"),
        ),
        ({"finish_reason": "stop", "error": None}, None),
        ({"finish_reason": "length"}, None),
    ],
)
@pytest.mark.parametrize("keeps", [True, False])
def test_a_choice_may_fail(choice: Any, error: ProviderError | None, keeps: bool) -> None:
    """OpenRouter puts the error into the choice, others only a finish reason."""
    event = {"choices": [{"index": 0, "delta": {}, **choice}]}
    assert read(CHAT, event, keeps=keeps).error == error


@pytest.mark.parametrize("row", TABLE.values(), ids=lambda row: row.name)
def test_a_document_may_be_an_error(row: Endpoint) -> None:
    """This holds for a response in one piece at every endpoint."""
    seen = Accumulated(keeps=False, budget=0)
    row.document(b'{"object":"error","message":"m","code":400}', seen)
    assert seen.error == ProviderError("400", "m")


@pytest.mark.parametrize(
    ("data", "error"),
    [
        (b"Internal Network Failure", ProviderError(None, "Internal Network Failure")),
        (b'"sentence"', ProviderError(None, "sentence")),
        (b'{"message":"m","code":7}', ProviderError("7", "m")),
        (b'{"error":{"message":"m","type":"t"}}', ProviderError("t", "m")),
        (b"", ProviderError(None, None)),
        (b"[1]", ProviderError(None, "[1]")),
        (b"\xff", ProviderError(None, "\ufffd")),
    ],
)
def test_an_error_event_of_any_form(data: bytes, error: ProviderError) -> None:
    """The name of the event is enough."""
    seen = Accumulated(keeps=False, budget=0)
    read_error_event(data, seen)
    assert seen.error == error


def test_an_envelope_within_an_envelope_is_not_read() -> None:
    """So no nesting takes long."""
    inner = {"usage": {"prompt_tokens": 1, "completion_tokens": 1}}
    assert read(CHAT, {"data": inner}).has_counts
    assert not read(CHAT, {"data": {"data": inner}}).has_counts
