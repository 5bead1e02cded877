"""How an error is reported to a client: the JSON that the SDK of each dialect understands.

A :class:`~llmproxy.errors.ProxyError` holds a status, a reason and a sentence.  Here they become
the body of a response, or one event of a stream that has already begun (design 8).  Nothing here
knows header fields, sockets or routes.
"""

from __future__ import annotations

import re

import msgspec

from llmproxy.dialects.dialect import Dialect
from llmproxy.dialects.endpoint import Endpoint
from llmproxy.dialects.openai_responses import RESPONSES
from llmproxy.errors import ProxyError

_OPENAI_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
}

_ANTHROPIC_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}

_GEMINI_STATUSES = {
    401: "UNAUTHENTICATED",
    403: "PERMISSION_DENIED",
    404: "NOT_FOUND",
    429: "RESOURCE_EXHAUSTED",
    501: "UNIMPLEMENTED",
    502: "UNAVAILABLE",
    503: "UNAVAILABLE",
    504: "DEADLINE_EXCEEDED",
}

_looks_like_gemini = re.compile(
    rb"/v1(?:alpha|beta)/(?!openai/)"
    rb"|/v1/.*:(?:(?:streamG|g)enerateContent|countTokens|embedContent|batchEmbedContents)\Z"
).match
"""Below ``/v1beta/openai`` Google speaks OpenAI's API."""


def dialect_of_path(path: bytes) -> Dialect:
    """Return the dialect of errors at a path to which no route leads.

    The path alone says which SDK has probably sent the request.

    Args:
        path: raw, without the query.
    """
    if path.startswith(b"/v1/messages"):
        return Dialect.ANTHROPIC
    if _looks_like_gemini(path):
        return Dialect.GEMINI
    return Dialect.OLLAMA if path.startswith(b"/api/") else Dialect.OPENAI


def error_body(error: ProxyError, dialect: Dialect, request_id: str) -> bytes:
    """Return the JSON body that reports ``error`` to an SDK of ``dialect`` (design 8)."""
    return msgspec.json.encode(_error_object(error, dialect, request_id))


def error_event(
    error: ProxyError,
    dialect: Dialect,
    request_id: str,
    *,
    ndjson: bool,
    row: Endpoint | None = None,
    number: int = 0,
) -> bytes:
    """Return one event that reports ``error`` inside a stream that has already begun.

    Args:
        ndjson: the stream is NDJSON, so that the event is a line; else it is SSE.
        row: the endpoint of the stream, or None where it is not known.
        number: how many events came before this one.
    """
    if ndjson:
        return error_body(error, dialect, request_id) + b"\n"
    if row is RESPONSES:
        return _event_of_responses(error, request_id, number)
    name = b"event: error\n" if dialect is Dialect.ANTHROPIC else b""
    return name + b"data: " + error_body(error, dialect, request_id) + b"\n\n"


def _event_of_responses(error: ProxyError, request_id: str, number: int) -> bytes:
    """Return an event with the members of that API's own, which the AI SDK insists on.

    OpenAI's SDKs raise an exception for the ``error`` member; without it, they hand the event on.
    """
    event = {
        "type": "error",
        "sequence_number": number,
        "code": error.reason,
        "message": error.message,
        "param": None,
        **_error_object(error, Dialect.OPENAI, request_id),
    }
    return b"event: error\ndata: " + msgspec.json.encode(event) + b"\n\n"


def _error_object(error: ProxyError, dialect: Dialect, request_id: str) -> dict[str, object]:
    if dialect is Dialect.ANTHROPIC:
        kind = _ANTHROPIC_TYPES.get(error.status, _fallback_type(error.status, "api_error"))
        return {
            "type": "error",
            "error": {"type": kind, "message": error.message},
            "request_id": request_id,
        }
    if dialect is Dialect.OLLAMA:
        return {"error": error.message}
    if dialect is Dialect.GEMINI:
        other = "INVALID_ARGUMENT" if error.status < 500 else "INTERNAL"
        word = _GEMINI_STATUSES.get(error.status, other)
        return {"error": {"code": error.status, "message": error.message, "status": word}}
    kind = _OPENAI_TYPES.get(error.status, _fallback_type(error.status, "server_error"))
    return {"error": {"message": error.message, "type": kind, "code": error.reason, "param": None}}


def _fallback_type(status: int, server: str) -> str:
    return "invalid_request_error" if status < 500 else server
