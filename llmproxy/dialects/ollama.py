"""Ollama's own chat, generate and embed: one JSON object a line; the last one is ``done``.

A stream and a response in one piece have the same shape.  ``prompt_eval_count`` is missing if the
prompt was in the cache.  An error is a line of its own, ``{"error": "..."}``.  A body that does not
mention ``stream`` asks for a stream.
"""

from __future__ import annotations

import re

import msgspec

from llmproxy.dialects.accumulated import Accumulated
from llmproxy.dialects.dialect import Dialect
from llmproxy.dialects.endpoint import Count, Endpoint, ErrorMember, Part, read_error
from llmproxy.dialects.failures import read_unknown
from llmproxy.dialects.lenient import decoder, raw_text
from llmproxy.dialects.openai_others import DECISIONS

_CALLS = 1024
"""Most tool calls that are looked at in one line."""


class _Function(Part, gc=False):
    name: str | None = None
    arguments: msgspec.Raw = msgspec.Raw()


class _Call(Part, gc=False):
    id: str | None = None
    function: _Function | None = None


class _Message(Part, gc=False):
    content: str | None = None
    tool_calls: list[_Call] | None = None


class _Tail(Part, gc=False):
    """A line, as far as usage needs it."""

    done: bool | None = None
    done_reason: str | None = None
    prompt_eval_count: Count | None = None
    eval_count: Count | None = None
    error: ErrorMember = None


class _Named(_Tail, gc=False):
    model: str | None = None


class _Whole(_Named, gc=False):
    response: str | None = None
    message: _Message | None = None


_tail = decoder(_Tail)
_named = decoder(_Named)
_whole = decoder(_Whole)


def _read(data: bytes, seen: Accumulated) -> None:
    line: _Tail
    named: _Named
    if seen.keeps:
        line = named = whole = _whole(data, seen)
        seen.name(None, named.model)
        _keep(whole, seen)
    elif seen.wants_all and seen.model is None:
        line = named = _named(data, seen)
        seen.name(None, named.model)
    else:
        line = _tail(data, seen)
    if line.done:
        seen.has_ended = True
        seen.finish(line.done_reason)
    if line.prompt_eval_count is not None or line.eval_count is not None:
        seen.count(
            input_tokens=line.prompt_eval_count,
            output_tokens=line.eval_count,
            is_opening=line.done is False,
        )
    if line.error is not None:
        read_error(line.error, seen)
    elif line.done is None:
        read_unknown(data, seen)


def _keep(line: _Whole, seen: Accumulated) -> None:
    message = line.message
    text = line.response if message is None else message.content
    if text:
        seen.add_text(text)
    for call in ((message and message.tool_calls) or ())[:_CALLS]:
        key = seen.calls
        function = call.function or _Function()
        seen.open_call(key, call.id, function.name)
        if arguments := raw_text(function.arguments):
            seen.add_arguments(key, arguments)


def _read_embeddings(data: bytes, seen: Accumulated) -> None:
    response = _named(data, seen)
    seen.name(None, response.model)
    seen.count(input_tokens=response.prompt_eval_count, output_tokens=response.eval_count)
    if response.error is not None:
        read_error(response.error, seen)
    elif response.model is None:
        read_unknown(data, seen)


CHAT = Endpoint(
    "ollama chat",
    Dialect.OLLAMA,
    "chat",
    _read,
    _read,
    end_marker='"done":true',
    may_end=re.compile(rb'"done"\s*:\s*true'),
    has_long_marker=True,
    has_lines=True,
    streams_by_default=True,
)
GENERATE = msgspec.structs.replace(CHAT, name="ollama generate", operation="text_completion")
EMBED = Endpoint("ollama embed", Dialect.OLLAMA, "embeddings", _read_embeddings, _read_embeddings)
SYSTEMONE = msgspec.structs.replace(DECISIONS, name="ollama systemone", dialect=Dialect.OLLAMA)
"""``POST /v1/systemone``: one document, with model and usage as OpenAI's decisions have them."""
