"""The demo provider's OpenAI responses, whole and as their named events.

It knows the published shapes of that endpoint and what ``dialect.py`` offers; no HTTP, no reactor.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count
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
from llmproxy.cli.demo.openai import OPENAI, STREAM_TYPE, reasoning_at
from llmproxy.cli.demo.reading import (
    limit,
    model_named,
    object_or_empty,
    objects,
    said_by_user,
    text_of,
    tools_named,
)
from llmproxy.cli.demo.response import Asked, Response, Tool

_ECHOED = ("instructions", "max_output_tokens", "metadata", "previous_response_id", "tool_choice")


class Responses(Streamed):
    """``POST /v1/responses``: one output item, a message or a function call; nothing is stored."""

    dialect = OPENAI
    stream_type = STREAM_TYPE

    def ask(self, body: dict[str, Any]) -> Asked:
        """Read a request whose ``input`` is a text or a list of items."""
        model = model_named(body)
        given = body.get("input")
        items = [_said(given)] if isinstance(given, str) else objects(body, "input")
        said, user_last = said_by_user(items)
        choice = body.get("tool_choice")
        named = object_or_empty(choice).get("name")
        instructions = [body["instructions"]] if isinstance(body.get("instructions"), str) else []
        prompt = (*instructions, *(text_of(item.get("content")) for item in items))
        return Asked(
            model=model,
            stream=body.get("stream") is True,
            prompt=prompt,
            said=said,
            user_last=user_last,
            tools=() if choice == "none" else tools_named(_tools(body), named),
            forced=choice == "required" or named is not None,
            max_tokens=limit(body, "max_output_tokens"),
            reasoning=reasoning_at(object_or_empty(body.get("reasoning")).get("effort")),
            caches=len(prompt),
            echo=_echo(body),
        )

    def events(self, response: Response, ask: Asked, clock: Clock) -> Iterator[Event]:
        """From ``response.created`` to what the response came to; each says its number."""
        numbers = count()

        def event(kind: str, tokens: int = 0, **members: object) -> Event:
            document = {"type": kind, "sequence_number": next(numbers), **members}
            return Event(b"event: %s\n%s" % (kind.encode(), sse(json_bytes(document))), tokens)

        shell = _shell(response, ask, clock)
        item = _item(response)
        at = {"item_id": item["id"], "output_index": 0}
        yield event("response.created", response=_begun(shell))
        yield event("response.in_progress", response=_begun(shell))
        yield event("response.output_item.added", output_index=0, item=_opened(item))
        parts = _call_parts if response.tool is not None else _text_parts
        for kind, tokens, members in parts(response):
            yield event(kind, tokens, **at, **members)
        if response.failure is not None:
            yield event("response.failed", response=_failed(shell, response.failure))
            return
        yield event("response.output_item.done", output_index=0, item=item)
        status = "incomplete" if response.cut else "completed"
        yield event(f"response.{status}", response=_ended(shell, item, response, clock))

    def document(self, response: Response, ask: Asked, clock: Clock) -> Document:
        """One response."""
        return _ended(_shell(response, ask, clock), _item(response), response, clock)


Part = tuple[str, int, Document]
"""The type of an event inside an item, the tokens made for it, and its own members."""


def _text_parts(response: Response) -> Iterator[Part]:
    where: Document = {"content_index": 0}
    yield "response.content_part.added", 0, {**where, "part": _text("")}
    for token, tokens in response.timed():
        yield "response.output_text.delta", tokens, {**where, "delta": token, "logprobs": []}
    if response.failure is None:
        yield "response.output_text.done", 0, {**where, "text": response.text, "logprobs": []}
        yield "response.content_part.done", 0, {**where, "part": _text(response.text)}


def _call_parts(response: Response) -> Iterator[Part]:
    for token, tokens in response.timed():
        yield "response.function_call_arguments.delta", tokens, {"delta": token}
    if response.failure is None:
        yield "response.function_call_arguments.done", 0, {"arguments": response.text}


def _said(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def _tools(body: dict[str, Any]) -> list[Tool]:
    return [
        Tool(tool["name"], object_or_empty(tool.get("parameters")))
        for tool in objects(body, "tools")
        if tool.get("type") == "function" and isinstance(tool.get("name"), str)
    ]


def _echo(body: dict[str, Any]) -> Document:
    """What a response repeats of its request, with OpenAI's own defaults."""
    filled: Document = {"description": None, "parameters": None, "strict": True}
    tools = [
        {**filled, **tool} if tool.get("type") == "function" else tool
        for tool in objects(body, "tools")
    ]
    reasoning = object_or_empty(body.get("reasoning"))
    return {
        **{name: body.get(name) for name in _ECHOED},
        "metadata": object_or_empty(body.get("metadata")),
        "parallel_tool_calls": body.get("parallel_tool_calls") is not False,
        "reasoning": {"effort": reasoning.get("effort"), "summary": None},
        "temperature": body.get("temperature", 1.0),
        "tool_choice": body.get("tool_choice") or "auto",
        "tools": tools,
        "top_p": body.get("top_p", 1.0),
    }


def _shell(response: Response, ask: Asked, clock: Clock) -> Document:
    return {
        "id": new_id("resp_"),
        "object": "response",
        "created_at": int(clock()),
        "status": "in_progress",
        "background": False,
        "error": None,
        "incomplete_details": None,
        "model": response.model,
        "output": [],
        "service_tier": "default",
        "text": {"format": {"type": "text"}},
        "truncation": "disabled",
        "usage": None,
        "user": None,
        **ask.echo,
    }


def _begun(shell: Document) -> Document:
    return {**shell, "service_tier": "auto"}


def _failed(shell: Document, failure: str) -> Document:
    error = {"code": "server_error", "message": failure}
    return {**shell, "status": "failed", "error": error}


def _ended(shell: Document, item: Document, response: Response, clock: Clock) -> Document:
    ending: Document = {"status": "completed", "completed_at": int(clock())}
    if response.cut:
        details = {"reason": "max_output_tokens"}
        ending = {"status": "incomplete", "incomplete_details": details}
    return {**shell, **ending, "output": [item], "usage": _usage(response)}


def _item(response: Response) -> Document:
    """The one output item as it is in the end."""
    status = "incomplete" if response.cut else "completed"
    if response.tool is None:
        content = [_text(response.text)]
        shell = {"id": new_id("msg_"), "type": "message", "status": status}
        return {**shell, "role": "assistant", "content": content}
    return {
        "id": new_id("fc_"),
        "type": "function_call",
        "status": status,
        "call_id": new_id("call_"),
        "name": response.tool,
        "arguments": response.text,
    }


def _opened(item: Document) -> Document:
    """The same item before there is anything in it."""
    empty: Document = {"content": []} if item["type"] == "message" else {"arguments": ""}
    return {**item, "status": "in_progress", **empty}


def _text(text: str) -> Document:
    return {"type": "output_text", "annotations": [], "logprobs": [], "text": text}


def _usage(response: Response) -> Document:
    return {
        "input_tokens": response.prompt_tokens,
        "input_tokens_details": {
            "cached_tokens": response.read_tokens,
            "cache_write_tokens": response.written_tokens,
        },
        "output_tokens": response.made,
        "output_tokens_details": {"reasoning_tokens": response.reasoning_tokens},
        "total_tokens": response.prompt_tokens + response.made,
    }
