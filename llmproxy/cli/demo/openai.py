"""The demo provider's OpenAI dialect: chat completions, their chunks, models and errors.

It knows the published shapes of that API and what ``demo_dialect`` offers; no HTTP, no reactor.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from llmproxy.cli.demo.answer import MODELS, Answer, Ask, BadAsk
from llmproxy.cli.demo.dialect import (
    RELEASED,
    REQUESTS_PER_MINUTE,
    Clock,
    Dialect,
    Document,
    Event,
    Fields,
    function_tools,
    json_bytes,
    limit,
    messages_of,
    model_named,
    new_id,
    object_or_empty,
    said_by_user,
    sse,
    text_of,
    tools_named,
)

_ERRORS = {
    429: ("requests", "rate_limit_exceeded"),
    500: ("server_error", None),
    503: ("server_error", "service_unavailable"),
}


class OpenAI(Dialect):
    """Chat completions: SSE data lines, ended by ``[DONE]``."""

    stream_type = b"text/event-stream; charset=utf-8"

    def ask(self, body: dict[str, Any]) -> Ask:
        """Read a chat completion request; ``tool_choice`` and ``stream_options`` are honoured."""
        messages = messages_of(body)
        said, user_last = said_by_user(messages)
        choice = body.get("tool_choice")
        named = object_or_empty(object_or_empty(choice).get("function")).get("name")
        options = object_or_empty(body.get("stream_options"))
        return Ask(
            model=model_named(body),
            stream=body.get("stream") is True,
            prompt=tuple(text_of(message.get("content")) for message in messages),
            said=said,
            user_last=user_last,
            tools=() if choice == "none" else tools_named(function_tools(body), named),
            forced=choice == "required" or named is not None,
            max_tokens=limit(body, "max_completion_tokens") or limit(body, "max_tokens"),
            include_usage=options.get("include_usage") is True,
        )

    def events(self, answer: Answer, ask: Ask, clock: Clock) -> Iterator[Event]:
        """Chunks; with ``include_usage`` all say ``"usage":null`` and one more says the counts."""
        shell = _shell("chat.completion.chunk", answer, clock)
        usage: Document = {"usage": None} if ask.include_usage else {}

        def chunk(delta: Document, tokens: int = 0, finish: str | None = None) -> Event:
            choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}
            return Event(sse(json_bytes({**shell, "choices": [choice], **usage})), tokens)

        yield chunk(_first_delta(answer))
        for token in answer.tokens:
            yield chunk(_delta(answer, token), tokens=1)
        yield chunk({}, finish=_finish_reason(answer))
        if ask.include_usage:
            yield Event(sse(json_bytes({**shell, "choices": [], "usage": _usage(answer)})))
        yield Event(sse(b"[DONE]"))

    def document(self, answer: Answer, clock: Clock) -> Document:
        """One chat completion."""
        message: Document = {"role": "assistant", "content": None, "refusal": None}
        if answer.tool is None:
            message["content"] = answer.text
        else:
            message["tool_calls"] = [_call(answer.tool, answer.text)]
        finish = _finish_reason(answer)
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": finish}
        shell = _shell("chat.completion", answer, clock)
        return {**shell, "choices": [choice], "usage": _usage(answer)}

    def error(self, status: int, bad: BadAsk, request_id: str) -> Document:
        """``{"error": {"message", "type", "param", "code"}}``."""
        kind, code = _ERRORS.get(status, ("invalid_request_error", None))
        if status == 404 and bad.param == "model":
            code = "model_not_found"
        error = {"message": bad.message, "type": kind, "param": bad.param, "code": code}
        return {"error": error}

    def unknown_model(self, name: str) -> BadAsk:
        """OpenAI's sentence, and ``model`` as the parameter at fault."""
        return BadAsk(
            f"The model `{name}` does not exist or you do not have access to it.", "model"
        )

    def fields(self, request_id: str, remaining: int, clock: Clock) -> Fields:
        """``x-request-id``, ``openai-*`` and ``x-ratelimit-*``."""
        return (
            (b"x-request-id", request_id.encode()),
            (b"openai-organization", b"demo"),
            (b"openai-processing-ms", b"12"),
            (b"openai-version", b"2020-10-01"),
            (b"x-ratelimit-limit-requests", b"%d" % REQUESTS_PER_MINUTE),
            (b"x-ratelimit-remaining-requests", b"%d" % remaining),
            (b"x-ratelimit-reset-requests", b"1s"),
        )

    def models(self) -> Document:
        """``GET /v1/models``."""
        return {"object": "list", "data": [self.model(name) for name in MODELS]}

    def model(self, name: str) -> Document:
        """``GET /v1/models/NAME``."""
        return {"id": name, "object": "model", "created": RELEASED, "owned_by": "llmproxy-demo"}


def _shell(kind: str, answer: Answer, clock: Clock) -> Document:
    return {
        "id": new_id("chatcmpl-"),
        "object": kind,
        "created": int(clock()),
        "model": answer.model,
        "service_tier": "default",
        "system_fingerprint": "fp_demo",
    }


def _first_delta(answer: Answer) -> Document:
    """The role, and the id and name of a tool call, whose arguments come later."""
    if answer.tool is None:
        return {"role": "assistant", "content": "", "refusal": None}
    call = {"index": 0, **_call(answer.tool, "")}
    return {"role": "assistant", "content": None, "tool_calls": [call], "refusal": None}


def _delta(answer: Answer, token: str) -> Document:
    if answer.tool is None:
        return {"content": token}
    return {"tool_calls": [{"index": 0, "function": {"arguments": token}}]}


def _call(name: str, arguments: str) -> Document:
    function = {"name": name, "arguments": arguments}
    return {"id": new_id("call_"), "type": "function", "function": function}


def _finish_reason(answer: Answer) -> str:
    if answer.tool is not None:
        return "tool_calls"
    return "length" if answer.cut else "stop"


def _usage(answer: Answer) -> Document:
    made = len(answer.tokens)
    return {
        "prompt_tokens": answer.prompt_tokens,
        "completion_tokens": made,
        "total_tokens": answer.prompt_tokens + made,
        "prompt_tokens_details": {"cached_tokens": 0, "audio_tokens": 0},
        "completion_tokens_details": {"reasoning_tokens": 0, "audio_tokens": 0},
    }
