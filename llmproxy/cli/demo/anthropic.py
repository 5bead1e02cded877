"""The demo provider's Anthropic dialect: messages, their named events, models and errors.

It knows the published shapes of that API and what ``demo_dialect`` offers; no HTTP, no reactor.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from llmproxy.cli.demo.answer import MODELS, Answer, Ask, BadAsk, Tool
from llmproxy.cli.demo.dialect import (
    RELEASED,
    REQUESTS_PER_MINUTE,
    Clock,
    Dialect,
    Document,
    Event,
    Fields,
    json_bytes,
    limit,
    messages_of,
    model_named,
    new_id,
    object_or_empty,
    objects,
    rfc3339,
    said_by_user,
    sse,
    text_of,
    tools_named,
)

_ERRORS = {
    404: "not_found_error",
    429: "rate_limit_error",
    500: "api_error",
    503: "overloaded_error",
}


class Anthropic(Dialect):
    """Messages: named SSE events around one content block, usage at both ends."""

    stream_type = b"text/event-stream; charset=utf-8"

    def ask(self, body: dict[str, Any]) -> Ask:
        """Read a messages request; ``max_tokens`` may be left out here."""
        messages = messages_of(body)
        said, user_last = said_by_user(messages)
        choice = object_or_empty(body.get("tool_choice"))
        named = choice.get("name") if choice.get("type") == "tool" else None
        return Ask(
            model=model_named(body),
            stream=body.get("stream") is True,
            prompt=(text_of(body.get("system")), *(text_of(m.get("content")) for m in messages)),
            said=said,
            user_last=user_last,
            tools=() if choice.get("type") == "none" else tools_named(_tools(body), named),
            forced=choice.get("type") in ("any", "tool"),
            max_tokens=limit(body, "max_tokens"),
        )

    def events(self, answer: Answer, ask: Ask, clock: Clock) -> Iterator[Event]:
        """From ``message_start`` to ``message_stop``; ``message_delta`` counts in totals."""
        yield _event("message_start", message={**_message(answer), "usage": _usage(answer, 1)})
        yield _event("content_block_start", index=0, content_block=_block(answer, "", {}))
        yield _event("ping")
        if answer.tool is not None:
            yield _event("content_block_delta", index=0, delta=_delta(answer, ""))
        for token in answer.tokens:
            delta = _delta(answer, token)
            yield _event("content_block_delta", index=0, delta=delta)._replace(tokens=1)
        yield _event("content_block_stop", index=0)
        ending = {"stop_reason": _stop_reason(answer), "stop_sequence": None}
        yield _event("message_delta", delta=ending, usage=_usage(answer, len(answer.tokens)))
        yield _event("message_stop")

    def document(self, answer: Answer, clock: Clock) -> Document:
        """One message."""
        arguments = None if answer.tool is None else answer.arguments
        return {
            **_message(answer),
            "content": [_block(answer, answer.text, arguments)],
            "stop_reason": _stop_reason(answer),
            "usage": _usage(answer, len(answer.tokens)),
        }

    def error(self, status: int, bad: BadAsk, request_id: str) -> Document:
        """``{"type": "error", "error": {"type", "message"}, "request_id"}``."""
        kind = _ERRORS.get(status, "invalid_request_error")
        error = {"type": kind, "message": bad.message}
        return {"type": "error", "error": error, "request_id": request_id}

    def unknown_model(self, name: str) -> BadAsk:
        """Anthropic's words."""
        return BadAsk(f"model: {name}", "model")

    def fields(self, request_id: str, remaining: int, clock: Clock) -> Fields:
        """``request-id`` and ``anthropic-*``."""
        return (
            (b"request-id", request_id.encode()),
            (b"anthropic-organization-id", b"demo"),
            (b"anthropic-ratelimit-requests-limit", b"%d" % REQUESTS_PER_MINUTE),
            (b"anthropic-ratelimit-requests-remaining", b"%d" % remaining),
            (b"anthropic-ratelimit-requests-reset", rfc3339(int(clock()) + 1).encode()),
        )

    def models(self) -> Document:
        """``GET /v1/models``, the one page there is."""
        listed = [self.model(name) for name in MODELS]
        return {"data": listed, "has_more": False, "first_id": MODELS[0], "last_id": MODELS[-1]}

    def model(self, name: str) -> Document:
        """``GET /v1/models/NAME``."""
        return {
            "type": "model",
            "id": name,
            "display_name": name.replace("-", " ").capitalize(),
            "created_at": rfc3339(RELEASED),
            "lifecycle": "active",
        }


def _tools(body: dict[str, Any]) -> list[Tool]:
    return [
        Tool(tool["name"], object_or_empty(tool.get("input_schema")))
        for tool in objects(body, "tools")
        if isinstance(tool.get("name"), str)
    ]


def _event(kind: str, **members: object) -> Event:
    data = sse(json_bytes({"type": kind, **members}))
    return Event(b"event: %s\n%s" % (kind.encode(), data))


def _message(answer: Answer) -> Document:
    return {
        "id": new_id("msg_"),
        "type": "message",
        "role": "assistant",
        "model": answer.model,
        "content": [],
        "stop_reason": None,
        "stop_sequence": None,
    }


def _block(answer: Answer, text: str, arguments: object) -> Document:
    if answer.tool is None:
        return {"type": "text", "text": text}
    return {"type": "tool_use", "id": new_id("toolu_"), "name": answer.tool, "input": arguments}


def _delta(answer: Answer, piece: str) -> Document:
    if answer.tool is None:
        return {"type": "text_delta", "text": piece}
    return {"type": "input_json_delta", "partial_json": piece}


def _stop_reason(answer: Answer) -> str:
    if answer.tool is not None:
        return "tool_use"
    return "max_tokens" if answer.cut else "end_turn"


def _usage(answer: Answer, made: int) -> Document:
    return {
        "input_tokens": answer.prompt_tokens,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": 0,
        "output_tokens": made,
    }
