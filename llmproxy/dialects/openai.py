"""OpenAI's chat completions, completions and embeddings, as hundreds of servers speak them.

A stream is chunks of one shape, then ``[DONE]``.  Usage comes in the last chunk where the request
asked for it (``include_usage``), with ``"usage":null`` in all others; some servers send running
counts in each.  Azure's first chunk has neither id nor model.
"""

from __future__ import annotations

import re
from typing import Any

import msgspec

from llmproxy.dialects.accumulated import Accumulated
from llmproxy.dialects.dialect import Dialect
from llmproxy.dialects.endpoint import Count, Endpoint, Part, json_text, read_error


class InputDetails(Part, gc=False):
    """``prompt_tokens_details``; ``input_tokens_details`` of responses."""

    cached_tokens: Count | None = None
    cache_write_tokens: Count | None = None


class OutputDetails(Part, gc=False):
    """``completion_tokens_details``; ``output_tokens_details`` of responses."""

    reasoning_tokens: Count | None = None


class _Usage(Part, gc=False):
    prompt_tokens: Count | None = None
    completion_tokens: Count | None = None
    prompt_tokens_details: InputDetails | None = None
    completion_tokens_details: OutputDetails | None = None


class _Function(Part, gc=False):
    name: str | None = None
    arguments: Any = None


class _Call(Part, gc=False):
    index: int | None = None
    id: str | None = None
    function: _Function | None = None


class _Message(Part, gc=False):
    """A ``message``, or the ``delta`` of one."""

    content: Any = None
    tool_calls: list[_Call] | None = None


class _Ending(Part, gc=False):
    """A choice, as far as usage needs it."""

    finish_reason: str | None = None


class _Choice(_Ending, gc=False):
    index: int = 0
    delta: _Message | None = None
    message: _Message | None = None
    text: str | None = None


class _Tail(Part, gc=False):
    """A chunk or a response, as far as usage needs it."""

    choices: list[_Ending] | None = None
    usage: _Usage | None = None
    error: Any = None


class _Whole(Part, gc=False):
    id: str | None = None
    model: str | None = None
    choices: list[_Choice] | None = None
    usage: _Usage | None = None
    error: Any = None


class _Embeddings(Part, gc=False):
    model: str | None = None
    usage: _Usage | None = None
    error: Any = None


_tail = msgspec.json.Decoder(_Tail).decode
_whole = msgspec.json.Decoder(_Whole).decode
_embeddings = msgspec.json.Decoder(_Embeddings).decode


def _read(data: bytes, seen: Accumulated) -> None:
    chunk: _Tail | _Whole
    if seen.wants_all:
        chunk = whole = _whole(data)
        seen.name(whole.id, whole.model)
        if seen.keeps:
            _keep(whole.choices, seen)
    else:
        chunk = _tail(data)
    if chunk.choices:
        # Several choices end one by one; the usage counts them all.
        for choice in chunk.choices:
            if choice.finish_reason is not None:
                seen.finish(choice.finish_reason)
    if chunk.usage is not None:
        _count(chunk.usage, seen)
    if chunk.error is not None:
        read_error(chunk.error, seen)


def _keep(choices: list[_Choice] | None, seen: Accumulated) -> None:
    """Hold what the first choice says; of the others nothing is held."""
    for choice in choices or ():
        if choice.index == 0:
            message = choice.delta or choice.message
            text = choice.text if message is None else message.content
            if text and isinstance(text, str):
                seen.add_text(text)
            if message is not None and message.tool_calls:
                _keep_calls(message.tool_calls, seen)


def _keep_calls(calls: list[_Call], seen: Accumulated) -> None:
    for place, call in enumerate(calls):
        key = place if call.index is None else call.index
        function = call.function or _Function()
        seen.open_call(key, call.id, function.name)
        if function.arguments is not None:
            seen.add_arguments(key, json_text(function.arguments))


def _count(usage: _Usage, seen: Accumulated) -> None:
    read = usage.prompt_tokens_details or InputDetails()
    made = usage.completion_tokens_details or OutputDetails()
    seen.count(
        input_tokens=usage.prompt_tokens,
        output_tokens=usage.completion_tokens,
        cache_read_tokens=read.cached_tokens,
        cache_write_tokens=read.cache_write_tokens,
        reasoning_tokens=made.reasoning_tokens,
    )


def _read_embeddings(data: bytes, seen: Accumulated) -> None:
    response = _embeddings(data)
    seen.name(None, response.model)
    if response.usage is not None:
        _count(response.usage, seen)
    if response.error is not None:
        read_error(response.error, seen)


CHAT = Endpoint(
    "openai chat",
    Dialect.OPENAI,
    "chat",
    _read,
    _read,
    end_marker="[DONE]",
    usage_option=re.compile(rb"(?:.*/)?chat/completions"),
)
COMPLETIONS = Endpoint(
    "openai completions",
    Dialect.OPENAI,
    "text_completion",
    _read,
    _read,
    end_marker="[DONE]",
    # With or without a version before it, and as Azure's deployments have it.  A mere
    # "/completions" behind another word is somebody's own endpoint, which may refuse members that
    # it does not know.
    usage_option=re.compile(
        rb"(?:.*/)?v[0-9][^/]*/completions|.*/deployments/[^/]+/completions|/completions"
    ),
)
EMBEDDINGS = Endpoint(
    "openai embeddings", Dialect.OPENAI, "embeddings", _read_embeddings, _read_embeddings
)
