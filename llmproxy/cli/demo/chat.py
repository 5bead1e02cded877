"""The demo provider's OpenAI chat completions, whole and in chunks.

It knows the published shapes of that endpoint and what ``dialect.py`` offers; no HTTP, no reactor.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from llmproxy.cli.demo.dialect import (
    Clock,
    Document,
    Event,
    Streamed,
    json_bytes,
    new_id,
    sse,
)
from llmproxy.cli.demo.openai import (
    DONE,
    OPENAI,
    STREAM_TYPE,
    failure_event,
    reasoning_at,
    usage_of,
)
from llmproxy.cli.demo.reading import (
    function_tools,
    limit,
    messages_of,
    model_named,
    object_or_empty,
    said_by_user,
    text_of,
    tools_named,
)
from llmproxy.cli.demo.response import Asked, Response


class ChatCompletions(Streamed):
    """``POST /v1/chat/completions``: SSE data lines, ended by ``[DONE]``."""

    dialect = OPENAI
    stream_type = STREAM_TYPE

    def ask(self, body: dict[str, Any]) -> Asked:
        """Read a chat completion request; ``tool_choice`` and ``stream_options`` are honoured."""
        messages = messages_of(body)
        said, user_last = said_by_user(messages)
        choice = body.get("tool_choice")
        named = object_or_empty(object_or_empty(choice).get("function")).get("name")
        options = object_or_empty(body.get("stream_options"))
        return Asked(
            model=model_named(body),
            stream=body.get("stream") is True,
            prompt=tuple(text_of(message.get("content")) for message in messages),
            said=said,
            user_last=user_last,
            tools=() if choice == "none" else tools_named(function_tools(body), named),
            forced=choice == "required" or named is not None,
            max_tokens=limit(body, "max_completion_tokens") or limit(body, "max_tokens"),
            reasoning=reasoning_at(body.get("reasoning_effort")),
            caches=len(messages),
            include_usage=options.get("include_usage") is True,
        )

    def events(self, response: Response, ask: Asked, clock: Clock) -> Iterator[Event]:
        """Chunks; with ``include_usage`` all say ``"usage":null`` and one more says the counts."""
        shell = _shell("chat.completion.chunk", response, clock)
        usage: Document = {"usage": None} if ask.include_usage else {}

        def chunk(delta: Document, tokens: int = 0, finish: str | None = None) -> Event:
            choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}
            return Event(sse(json_bytes({**shell, "choices": [choice], **usage})), tokens)

        yield chunk(_first_delta(response))
        for token, tokens in response.timed():
            yield chunk(_delta(response, token), tokens)
        if response.failure is not None:
            yield failure_event(response.failure)
            return
        yield chunk({}, finish=_finish_reason(response))
        if ask.include_usage:
            yield Event(sse(json_bytes({**shell, "choices": [], "usage": usage_of(response)})))
        yield DONE

    def document(self, response: Response, ask: Asked, clock: Clock) -> Document:
        """One chat completion."""
        message: Document = {"role": "assistant", "content": None, "refusal": None}
        if response.tool is None:
            message["content"] = response.text
        else:
            message["tool_calls"] = [_call(response.tool, response.text)]
        finish = _finish_reason(response)
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": finish}
        shell = _shell("chat.completion", response, clock)
        return {**shell, "choices": [choice], "usage": usage_of(response)}


def _shell(kind: str, response: Response, clock: Clock) -> Document:
    return {
        "id": new_id("chatcmpl-"),
        "object": kind,
        "created": int(clock()),
        "model": response.model,
        "service_tier": "default",
        "system_fingerprint": "fp_demo",
    }


def _first_delta(response: Response) -> Document:
    """The role, and the id and name of a tool call, whose arguments come later."""
    if response.tool is None:
        return {"role": "assistant", "content": "", "refusal": None}
    call = {"index": 0, **_call(response.tool, "")}
    return {"role": "assistant", "content": None, "tool_calls": [call], "refusal": None}


def _delta(response: Response, token: str) -> Document:
    if response.tool is None:
        return {"content": token}
    return {"tool_calls": [{"index": 0, "function": {"arguments": token}}]}


def _call(name: str, arguments: str) -> Document:
    function = {"name": name, "arguments": arguments}
    return {"id": new_id("call_"), "type": "function", "function": function}


def _finish_reason(response: Response) -> str:
    if response.tool is not None:
        return "tool_calls"
    return "length" if response.cut else "stop"
