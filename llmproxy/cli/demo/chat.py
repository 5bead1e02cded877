"""The demo provider's OpenAI chat completions, whole and in chunks.

It knows the published shapes of that endpoint and what ``dialect.py`` offers; no HTTP, no reactor.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from llmproxy.cli.demo.answer import Answer, Ask
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


class ChatCompletions(Streamed):
    """``POST /v1/chat/completions``: SSE data lines, ended by ``[DONE]``."""

    dialect = OPENAI
    stream_type = STREAM_TYPE

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
            reasoning=reasoning_at(body.get("reasoning_effort")),
            caches=True,
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
        for token, tokens in answer.timed():
            yield chunk(_delta(answer, token), tokens)
        if answer.failure is not None:
            yield failure_event(answer.failure)
            return
        yield chunk({}, finish=_finish_reason(answer))
        if ask.include_usage:
            yield Event(sse(json_bytes({**shell, "choices": [], "usage": usage_of(answer)})))
        yield DONE

    def document(self, answer: Answer, ask: Ask, clock: Clock) -> Document:
        """One chat completion."""
        message: Document = {"role": "assistant", "content": None, "refusal": None}
        if answer.tool is None:
            message["content"] = answer.text
        else:
            message["tool_calls"] = [_call(answer.tool, answer.text)]
        finish = _finish_reason(answer)
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": finish}
        shell = _shell("chat.completion", answer, clock)
        return {**shell, "choices": [choice], "usage": usage_of(answer)}


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
