"""Errors in the shapes that SDKs understand, and what an error gives away."""

from __future__ import annotations

import json
from typing import Any

import pytest

from llmproxy.dialects.dialect import Dialect
from llmproxy.dialects.endpoints import endpoint
from llmproxy.dialects.errors import dialect_of_path, error_body, error_event
from llmproxy.errors import (
    ProxyError,
    upstream_broken,
    upstream_protocol,
    upstream_tls,
    upstream_unreachable,
)


def body_of(status: int, dialect: Dialect) -> Any:
    """Return the body of an error with this status, decoded."""
    return json.loads(error_body(ProxyError(status, "some_word", 'Say "why".'), dialect, "id-1"))


@pytest.mark.parametrize(
    ("status", "openai", "anthropic"),
    [
        (400, "invalid_request_error", "invalid_request_error"),
        (401, "authentication_error", "authentication_error"),
        (403, "permission_error", "permission_error"),
        (404, "not_found_error", "not_found_error"),
        (405, "invalid_request_error", "invalid_request_error"),
        (413, "invalid_request_error", "request_too_large"),
        (417, "invalid_request_error", "invalid_request_error"),
        (431, "invalid_request_error", "invalid_request_error"),
        (429, "rate_limit_error", "rate_limit_error"),
        (500, "server_error", "api_error"),
        (502, "server_error", "api_error"),
        (503, "server_error", "overloaded_error"),
        (504, "server_error", "timeout_error"),
        (505, "server_error", "api_error"),
        (508, "server_error", "api_error"),
    ],
)
def test_an_error_has_the_shape_of_its_dialect(status: int, openai: str, anthropic: str) -> None:
    """SDKs find the members and the type that they know for the status; ``raw`` is OpenAI's."""
    words = 'Say "why".'
    error = {"message": words, "type": openai, "code": "some_word", "param": None}

    assert body_of(status, Dialect.OPENAI) == body_of(status, Dialect.RAW) == {"error": error}
    assert body_of(status, Dialect.ANTHROPIC) == {
        "type": "error",
        "error": {"type": anthropic, "message": words},
        "request_id": "id-1",
    }
    assert body_of(status, Dialect.OLLAMA) == {"error": words}


@pytest.mark.parametrize(
    ("status", "word"),
    [
        (400, "INVALID_ARGUMENT"),
        (401, "UNAUTHENTICATED"),
        (403, "PERMISSION_DENIED"),
        (404, "NOT_FOUND"),
        (413, "INVALID_ARGUMENT"),
        (429, "RESOURCE_EXHAUSTED"),
        (500, "INTERNAL"),
        (501, "UNIMPLEMENTED"),
        (502, "UNAVAILABLE"),
        (503, "UNAVAILABLE"),
        (504, "DEADLINE_EXCEEDED"),
        (508, "INTERNAL"),
    ],
)
def test_an_error_of_gemini_has_googles_word(status: int, word: str) -> None:
    """``code`` is the status of HTTP, and ``status`` is a name of ``google.rpc.Code``."""
    error = {"code": status, "message": 'Say "why".', "status": word}
    assert body_of(status, Dialect.GEMINI) == {"error": error}


@pytest.mark.parametrize(
    ("dialect", "ndjson", "start", "end"),
    [
        (Dialect.OPENAI, False, b"data: {", b"}\n\n"),
        (Dialect.ANTHROPIC, False, b"event: error\ndata: {", b"}\n\n"),
        (Dialect.OLLAMA, True, b"{", b"}\n"),
        (Dialect.GEMINI, False, b"data: {", b"}\n\n"),
        (Dialect.OPENAI, True, b"{", b"}\n"),
    ],
)
def test_an_error_inside_a_stream_is_one_event(
    dialect: Dialect, ndjson: bool, start: bytes, end: bytes
) -> None:
    """SSE or a line, with the dialect's own body, and nothing that could be read as two events."""
    error = ProxyError(502, "word", "two\nlines\r\n\r\n")
    event = error_event(error, dialect, "id-1", ndjson=ndjson)

    assert event.startswith(start)
    assert event.endswith(end)
    payload = event[len(start) - 1 : -len(end) + 1]
    assert b"\n" not in payload
    assert b"\r" not in payload
    assert payload == error_body(error, dialect, "id-1")


@pytest.mark.parametrize("dialect", [Dialect.OPENAI, Dialect.OLLAMA, Dialect.ANTHROPIC])
def test_responses_have_an_error_event_of_their_own(dialect: Dialect) -> None:
    """The path says so, whatever the dialect; a document and a line are as ever."""
    error = ProxyError(502, "word", "two\nlines\r\n\r\n")
    row = endpoint(dialect, b"/v1/responses")
    event = error_event(error, dialect, "id-1", ndjson=False, row=row, number=7)
    assert event.count(b"\n") == 3
    assert event.startswith(b"event: error\ndata: {")
    found = json.loads(event.removeprefix(b"event: error\ndata: "))
    inner = {"message": error.message, "type": "server_error", "code": "word", "param": None}
    own = {"type": "error", "sequence_number": 7, "code": "word", "message": error.message}
    assert found == {**own, "param": None, "error": inner}
    other = endpoint(dialect, b"/v1/chat/completions")
    for ndjson, one in ((True, row), (False, other)):
        plain = error_event(error, dialect, "id-1", ndjson=ndjson)
        assert error_event(error, dialect, "id-1", ndjson=ndjson, row=one, number=7) == plain


@pytest.mark.parametrize("dialect", list(Dialect))
def test_details_are_for_the_operator(dialect: Dialect) -> None:
    """Addresses and names stand in the detail, and never in what the caller reads."""
    for error in (
        upstream_unreachable("10.0.0.1"),
        upstream_tls("expired", "10.0.0.1"),
        upstream_broken("10.0.0.1"),
        upstream_protocol("10.0.0.1"),
    ):
        assert error.detail == "10.0.0.1"
        assert b"10.0.0.1" not in error_body(error, dialect, "id")
        assert b"10.0.0.1" not in error_event(error, dialect, "id", ndjson=False)


@pytest.mark.parametrize(
    ("path", "dialect"),
    [
        (b"/v1/messages", Dialect.ANTHROPIC),
        (b"/v1/messages/count_tokens", Dialect.ANTHROPIC),
        (b"/x/v1/messages", Dialect.OPENAI),
        (b"/api/chat", Dialect.OLLAMA),
        (b"/api/", Dialect.OLLAMA),
        (b"/api", Dialect.OPENAI),
        (b"/v1/chat/completions", Dialect.OPENAI),
        (b"/v1beta/models/gemini-2.5-flash:generateContent", Dialect.GEMINI),
        (b"/v1beta/models/m:countTokens", Dialect.GEMINI),
        (b"/v1beta/models", Dialect.GEMINI),
        (b"/v1alpha/files", Dialect.GEMINI),
        (b"/v1/models/m:streamGenerateContent", Dialect.GEMINI),
        (b"/v1/projects/p/locations/l/publishers/google/models/m:embedContent", Dialect.GEMINI),
        (b"/v1/models/m:batchEmbedContents", Dialect.GEMINI),
        (b"/v1beta/openai/chat/completions", Dialect.OPENAI),
        (b"/v1/models/ft:gpt-4o:org", Dialect.OPENAI),
        (b"/v1/models", Dialect.OPENAI),
        (b"/", Dialect.OPENAI),
        (b"*", Dialect.OPENAI),
    ],
)
def test_the_path_says_whose_sdk_is_refused(path: bytes, dialect: Dialect) -> None:
    """Where no route leads, the beginning of the path names the dialect of the error."""
    assert dialect_of_path(path) is dialect
