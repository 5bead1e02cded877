"""OpenAI's chat completions, completions and embeddings, as hundreds of servers speak them.

A stream is chunks of one shape, then ``[DONE]``.  If the request asked for it (``include_usage``),
the last chunk has the usage, and all others have ``"usage":null``.  Some servers send running
counts in each chunk, and some have their counts in other places.  Azure's first chunk has neither
id nor model.
"""

from __future__ import annotations

import re
from typing import Annotated

import msgspec

from llmproxy.dialects.accumulated import Accumulated
from llmproxy.dialects.dialect import Dialect
from llmproxy.dialects.endpoint import Count, Endpoint, ErrorMember, Part, read_error
from llmproxy.dialects.failures import read_unknown
from llmproxy.dialects.lenient import FAULTS, decoder, raw_text, tolerant

_CHOICES = 128
"""Most choices of a chunk; OpenAI takes as many."""

_PARTS = 1024
"""Most parts, and most tool calls, of a choice that are looked at in one chunk."""


class InputDetails(Part, gc=False):
    """``prompt_tokens_details``; ``input_tokens_details`` of responses."""

    cached_tokens: Count | None = None
    cache_write_tokens: Count | None = None


class OutputDetails(Part, gc=False):
    """``completion_tokens_details``; ``output_tokens_details`` of responses."""

    reasoning_tokens: Count | None = None


_NO_INPUT, _NO_OUTPUT = InputDetails(), OutputDetails()


class _Usage(Part, gc=False):
    """OpenAI's counts, and behind them what other vendors call theirs."""

    prompt_tokens: Count | None = None
    completion_tokens: Count | None = None
    prompt_tokens_details: InputDetails | None = None
    completion_tokens_details: OutputDetails | None = None
    cached_tokens: Count | None = None  # Moonshot
    prompt_cache_hit_tokens: Count | None = None  # DeepSeek
    reasoning_tokens: Count | None = None  # Perplexity
    input_tokens: Count | None = None  # servers that speak Anthropic's API, too
    output_tokens: Count | None = None


class _Groq(Part, gc=False):
    """``x_groq``: the first chunk has an id in it, the last one the usage."""

    usage: _Usage | None = None
    error: ErrorMember = None


class _Timings(Part, gc=False):
    """``timings`` of llama.cpp, which are there without ``include_usage``, too."""

    prompt_n: Count | None = None
    cache_n: Count | None = None
    predicted_n: Count | None = None


class _Function(Part, gc=False):
    name: str | None = None
    arguments: msgspec.Raw = msgspec.Raw()


class _Call(Part, gc=False):
    index: int | None = None
    id: str | None = None
    function: _Function | None = None


class _Text(Part, gc=False):
    """A part of a content that is a list (Mistral); of other types, ``text`` may be missing."""

    text: str | None = None


class _Message(Part, gc=False):
    """A ``message``, or the ``delta`` of one."""

    content: str | list[_Text] | None = None
    tool_calls: list[_Call] | None = None


class _Ending(Part, gc=False):
    """A choice, as far as usage needs it."""

    finish_reason: str | None = None
    usage: _Usage | None = None  # Moonshot
    error: ErrorMember = None  # OpenRouter


class _Choice(_Ending, gc=False):
    index: int = 0
    delta: _Message | None = None
    message: _Message | None = None
    text: str | None = None


class _Tail(Part, gc=False):
    """A chunk or a response, as far as usage needs it."""

    choices: Annotated[list[_Ending], msgspec.Meta(max_length=_CHOICES)] | None = None
    usage: _Usage | None = None
    error: ErrorMember = None
    x_groq: _Groq | None = None
    timings: _Timings | None = None


class _Named(_Tail, gc=False):
    id: str | None = None
    model: str | None = None


class _Whole(_Named, gc=False):
    choices: Annotated[list[_Choice], msgspec.Meta(max_length=_CHOICES)] | None = None  # type: ignore[assignment]  # more members of each


class _Embeddings(Part, gc=False):
    model: str | None = None
    usage: _Usage | None = None
    error: ErrorMember = None


_tail = msgspec.json.Decoder(_Tail).decode
_named = decoder(_Named)
_whole = decoder(_Whole)
_embeddings = decoder(_Embeddings)


def _read(data: bytes, seen: Accumulated, *, may_be_wrapped: bool = True) -> None:
    chunk: _Tail
    if not seen.wants_all:
        try:
            chunk = _tail(data)
        except FAULTS:
            found = tolerant(data, _Tail, seen)
            if found is None:
                raise
            chunk = found
    elif seen.keeps:
        chunk = whole = _whole(data, seen)
        seen.name(whole.id, whole.model)
        _keep(whole.choices, seen)
    else:
        chunk = named = _named(data, seen)
        seen.name(named.id, named.model)
    choices, usage = chunk.choices, chunk.usage
    if choices:
        # Several choices end one by one; the usage counts them all.
        for choice in choices:
            if choice.error is not None:
                read_error(choice.error, seen)
            if choice.finish_reason is not None:
                seen.finish(choice.finish_reason)
            if choice.usage is not None:
                usage = usage or choice.usage
        if usage is None and seen.has_counts and seen.finish_reason is None:
            seen.outdate()  # what is said here is not in them
    if usage is None and chunk.x_groq is not None:
        usage = chunk.x_groq.usage
    if usage is not None:
        _count(usage, seen)
    elif chunk.timings is not None:
        _count_timings(chunk.timings, seen)
    if chunk.error is not None:
        read_error(chunk.error, seen)
    elif choices is None and usage is None:
        read_unknown(data, seen, _read_content if may_be_wrapped else None)


def _read_content(data: bytes, seen: Accumulated) -> None:
    _read(data, seen, may_be_wrapped=False)


def _keep(choices: list[_Choice] | None, seen: Accumulated) -> None:
    """Hold the content of the first choice; nothing of the others is held."""
    for choice in choices or ():
        if choice.index == 0:
            message = choice.delta or choice.message
            content = choice.text if message is None else message.content
            for text in (content,) if isinstance(content, str) else _texts(content):
                seen.add_text(text)
            if message is not None and message.tool_calls:
                _keep_calls(message.tool_calls, seen)


def _texts(parts: list[_Text] | None) -> list[str]:
    return [part.text for part in (parts or ())[:_PARTS] if part.text]


def _keep_calls(calls: list[_Call], seen: Accumulated) -> None:
    for place, call in enumerate(calls[:_PARTS]):
        key = place if call.index is None else call.index
        function = call.function or _Function()
        seen.open_call(key, call.id, function.name)
        if arguments := raw_text(function.arguments):
            seen.add_arguments(key, arguments)


def _count(usage: _Usage, seen: Accumulated) -> None:
    read = usage.prompt_tokens_details or _NO_INPUT
    made = usage.completion_tokens_details or _NO_OUTPUT
    taken, given = usage.prompt_tokens, usage.completion_tokens
    cached, reasoning = read.cached_tokens, made.reasoning_tokens
    if cached is None:
        cached = usage.cached_tokens
        if cached is None:
            cached = usage.prompt_cache_hit_tokens
    seen.count(
        input_tokens=usage.input_tokens if taken is None else taken,
        output_tokens=usage.output_tokens if given is None else given,
        cache_read_tokens=cached,
        cache_write_tokens=read.cache_write_tokens,
        reasoning_tokens=usage.reasoning_tokens if reasoning is None else reasoning,
    )


def _count_timings(timings: _Timings, seen: Accumulated) -> None:
    """Take llama.cpp's figures: ``prompt_n`` lacks what came from the cache."""
    read, cached = timings.prompt_n, timings.cache_n
    whole = None if read is None or cached is None else read + cached
    seen.count(input_tokens=whole, output_tokens=timings.predicted_n, cache_read_tokens=cached)


def _read_embeddings(data: bytes, seen: Accumulated) -> None:
    response = _embeddings(data, seen)
    seen.name(None, response.model)
    if response.usage is not None:
        _count(response.usage, seen)
    if response.error is not None:
        read_error(response.error, seen)
    elif response.usage is None and response.model is None:
        read_unknown(data, seen)


MAY_END = re.compile(rb"(?is)\A[^{]{0,32}done|\A\s*\[D?O?N?\Z")
"""What is no object and speaks of an end: ``[done]``, say, or a part of the marker."""


CHAT = Endpoint(
    "openai chat",
    Dialect.OPENAI,
    "chat",
    _read,
    _read,
    end_marker="[DONE]",
    may_end=MAY_END,
    usage_option=re.compile(rb"(?:.*/)?chat/completions"),
)
COMPLETIONS = Endpoint(
    "openai completions",
    Dialect.OPENAI,
    "text_completion",
    _read,
    _read,
    end_marker="[DONE]",
    may_end=MAY_END,
    # With a version before it, without one, or below one of Azure's deployments.  Behind another
    # word, "/completions" is a provider's own endpoint, which may refuse unknown members.
    usage_option=re.compile(
        rb"(?:.*/)?v[0-9][^/]*/completions|.*/deployments/[^/]+/completions|/completions"
    ),
)
EMBEDDINGS = Endpoint(
    "openai embeddings", Dialect.OPENAI, "embeddings", _read_embeddings, _read_embeddings
)
