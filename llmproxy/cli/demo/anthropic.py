"""The demo provider's Anthropic dialect: messages, their named events and counts, models, errors.

It knows the published shapes of that API and what ``dialect.py`` offers; no HTTP, no reactor.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from llmproxy.cli.demo.dialect import (
    RELEASED,
    REQUESTS_PER_MINUTE,
    Clock,
    Dialect,
    Document,
    Endpoint,
    Event,
    Fields,
    Streamed,
    json_bytes,
    new_id,
    rfc3339,
    sse,
)
from llmproxy.cli.demo.reading import (
    limit,
    messages_of,
    model_named,
    object_or_empty,
    objects,
    said_by_user,
    text_of,
    tools_named,
)
from llmproxy.cli.demo.response import MODELS, Asked, BadAsk, Response, Tool

_THINKING = 8  # tokens, where the request lets the model think
_ERRORS = {
    404: "not_found_error",
    429: "rate_limit_error",
    500: "api_error",
    503: "overloaded_error",
}


class Anthropic(Dialect):
    """Errors that say their type, models in pages."""

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


ANTHROPIC = Anthropic()


class Messages(Streamed):
    """``POST /v1/messages``: named events around one content block, usage at both ends."""

    dialect = ANTHROPIC
    stream_type = b"text/event-stream; charset=utf-8"

    def ask(self, body: dict[str, Any]) -> Asked:
        """Read a messages request; ``max_tokens`` may be left out here."""
        messages = messages_of(body)
        said, user_last = said_by_user(messages)
        choice = object_or_empty(body.get("tool_choice"))
        named = choice.get("name") if choice.get("type") == "tool" else None
        return Asked(
            model=model_named(body),
            stream=body.get("stream") is True,
            prompt=(text_of(body.get("system")), *(text_of(m.get("content")) for m in messages)),
            said=said,
            user_last=user_last,
            tools=() if choice.get("type") == "none" else tools_named(_tools(body), named),
            forced=choice.get("type") in ("any", "tool"),
            max_tokens=limit(body, "max_tokens"),
            reasoning=_THINKING if _thinks(body) else 0,
            caches=_parts_to_cache(body),
        )

    def events(self, response: Response, ask: Asked, clock: Clock) -> Iterator[Event]:
        """From ``message_start`` to ``message_stop``; ``message_delta`` counts in totals."""
        usage = {**_prompt_usage(response), "output_tokens": 1, "service_tier": "standard"}
        begun = {**_message(response), "usage": usage}
        yield _event("message_start", message=begun)
        yield _event("content_block_start", index=0, content_block=_block(response, "", {}))
        yield _event("ping")
        if response.tool is not None:
            yield _event("content_block_delta", index=0, delta=_delta(response, ""))
        for token, tokens in response.timed():
            delta = _delta(response, token)
            yield _event("content_block_delta", index=0, delta=delta)._replace(tokens=tokens)
        if response.failure is not None:
            yield _event("error", error={"type": "api_error", "message": response.failure})
            return
        yield _event("content_block_stop", index=0)
        ending = {"stop_reason": _stop_reason(response), "stop_sequence": None}
        yield _event("message_delta", delta=ending, usage=_usage(response))
        yield _event("message_stop")

    def document(self, response: Response, ask: Asked, clock: Clock) -> Document:
        """One message."""
        arguments = None if response.tool is None else response.arguments
        return {
            **_message(response),
            "content": [_block(response, response.text, arguments)],
            "stop_reason": _stop_reason(response),
            "usage": {**_usage(response), "service_tier": "standard"},
        }


class CountTokens(Endpoint):
    """``POST /v1/messages/count_tokens``: the words of the prompt, cached or not, at once."""

    dialect = ANTHROPIC

    def ask(self, body: dict[str, Any]) -> Asked:
        """Read what a messages request has, too; it is never streamed."""
        return replace(Messages().ask(body), stream=False, caches=0)

    def document(self, response: Response, ask: Asked, clock: Clock) -> Document:
        """``{"input_tokens": N}``."""
        return {"input_tokens": response.prompt_tokens}

    def work(self, response: Response, ask: Asked) -> int:
        """Nothing is made."""
        return 0


def _tools(body: dict[str, Any]) -> list[Tool]:
    return [
        Tool(tool["name"], object_or_empty(tool.get("input_schema")))
        for tool in objects(body, "tools")
        if isinstance(tool.get("name"), str)
    ]


def _thinks(body: dict[str, Any]) -> bool:
    return object_or_empty(body.get("thinking")).get("type") in ("enabled", "adaptive")


def _parts_to_cache(body: dict[str, Any]) -> int:
    """How many parts of the prompt are to be kept: up to the last one with a marked block.

    A mark at the request itself means all of them.  Tools have no words here; a mark at one of them
    counts for the system text, which comes next.
    """
    contents = [body.get("system"), *(message.get("content") for message in messages_of(body))]
    if _is_marked(body):
        return len(contents)
    parts = [content if isinstance(content, list) else [] for content in contents]
    parts[0] = [*objects(body, "tools"), *parts[0]]
    return max(
        (at for at, blocks in enumerate(parts, 1) if any(map(_is_marked, blocks))), default=0
    )


def _is_marked(block: object) -> bool:
    return object_or_empty(block).get("cache_control") is not None


def _event(kind: str, **members: object) -> Event:
    data = sse(json_bytes({"type": kind, **members}))
    return Event(b"event: %s\n%s" % (kind.encode(), data))


def _message(response: Response) -> Document:
    return {
        "id": new_id("msg_"),
        "type": "message",
        "role": "assistant",
        "model": response.model,
        "content": [],
        "stop_reason": None,
        "stop_sequence": None,
    }


def _block(response: Response, text: str, arguments: object) -> Document:
    if response.tool is None:
        return {"type": "text", "text": text}
    return {"type": "tool_use", "id": new_id("toolu_"), "name": response.tool, "input": arguments}


def _delta(response: Response, piece: str) -> Document:
    if response.tool is None:
        return {"type": "text_delta", "text": piece}
    return {"type": "input_json_delta", "partial_json": piece}


def _stop_reason(response: Response) -> str:
    if response.tool is not None:
        return "tool_use"
    return "max_tokens" if response.cut else "end_turn"


def _usage(response: Response) -> Document:
    """The counts in the end; thinking is part of ``output_tokens``."""
    usage = {**_prompt_usage(response), "output_tokens": response.made}
    if response.reasoning_tokens:
        usage["output_tokens_details"] = {"thinking_tokens": response.reasoning_tokens}
    return usage


def _prompt_usage(response: Response) -> Document:
    """The counts of the prompt; what was cached is not in ``input_tokens``."""
    return {
        "input_tokens": response.prompt_tokens - response.read_tokens - response.written_tokens,
        "cache_creation_input_tokens": response.written_tokens,
        "cache_read_input_tokens": response.read_tokens,
    }
