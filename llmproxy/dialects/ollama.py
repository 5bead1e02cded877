"""Ollama's own chat, generate and embed: one JSON object a line, the last of which is ``done``.

A stream and a response in one piece have the same shape.  ``prompt_eval_count`` is missing where
the prompt was in the cache.  An error is a line of its own, ``{"error": "..."}``.
"""

from __future__ import annotations

from typing import Any

import msgspec

from llmproxy.dialects.accumulated import Accumulated
from llmproxy.dialects.dialect import Dialect
from llmproxy.dialects.endpoint import Count, Endpoint, Part, json_text, read_error


class _Function(Part, gc=False):
    name: str | None = None
    arguments: Any = None


class _Call(Part, gc=False):
    id: str | None = None
    function: _Function | None = None


class _Message(Part, gc=False):
    content: str | None = None
    tool_calls: list[_Call] | None = None


class _Tail(Part, gc=False):
    """A line, as far as usage needs it."""

    done: bool = False
    done_reason: str | None = None
    prompt_eval_count: Count | None = None
    eval_count: Count | None = None
    error: Any = None


class _Whole(_Tail, gc=False):
    model: str | None = None
    response: str | None = None
    message: _Message | None = None


_tail = msgspec.json.Decoder(_Tail).decode
_whole = msgspec.json.Decoder(_Whole).decode


def _read(data: bytes, seen: Accumulated) -> None:
    if seen.wants_all and (seen.keeps or seen.model is None):
        whole = _whole(data)
        seen.name(None, whole.model)
        if seen.keeps:
            _keep(whole, seen)
        line: _Tail = whole
    else:
        line = _tail(data)
    if line.done:
        seen.has_ended = True
        seen.finish(line.done_reason)
    if line.prompt_eval_count is not None or line.eval_count is not None:
        seen.count(input_tokens=line.prompt_eval_count, output_tokens=line.eval_count)
    if line.error is not None:
        read_error(line.error, seen)


def _keep(line: _Whole, seen: Accumulated) -> None:
    message = line.message
    text = line.response if message is None else message.content
    if text:
        seen.add_text(text)
    for call in (message and message.tool_calls) or ():
        key = seen.calls
        function = call.function or _Function()
        seen.open_call(key, call.id, function.name)
        if function.arguments is not None:
            seen.add_arguments(key, json_text(function.arguments))


CHAT = Endpoint(
    "ollama chat",
    Dialect.OLLAMA,
    "chat",
    _read,
    _read,
    end_marker='"done":true',
    streams_by_default=True,
)
GENERATE = CHAT._replace(name="ollama generate", operation="text_completion")
EMBED = Endpoint("ollama embed", Dialect.OLLAMA, "embeddings", _read, _read)
